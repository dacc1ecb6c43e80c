"""`fastbert doctor`."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

from fastbert.cli._common import OK, WRONG, check_output, progress, require_rich


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
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
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="the report as JSON, to FILE or to standard output; needs no rich",
    )


def run(options: argparse.Namespace, command: list[str]) -> int:
    """Examine, print or write; the exit status."""
    if options.json is None:
        require_rich()
    elif options.json != "-":
        check_output("--json", options.json)

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

        with progress(len(doctor.selftest_names())) as step:
            report = doctor.examine(before=step)
        doctor.print_report(Console(), report)
    return OK if report["selftest"]["passed"] else WRONG
