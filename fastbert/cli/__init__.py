"""The command line: `fastbert bench`, `fastbert profile` and `fastbert doctor`, a module each.

Exit status: 0 all is well; 1 something is wrong (an error above the tolerance, a failed self-test); 2 bad input, one line on
stderr; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fastbert.cli import bench, doctor, profile
from fastbert.cli._common import BAD_INPUT, INTERRUPTED, OK, BadInput, Parser

_COMMANDS = {"bench": bench, "profile": profile, "doctor": doctor}


def _parser() -> Parser:
    parser = Parser(
        prog="fastbert",
        description="fastbert: BERT- and GPT-style transformers on real tokens only. Benchmarks and a look at this installation.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for module in _COMMANDS.values():
        module.add_parser(commands)
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
        if options.command is None:
            parser.print_help()
            return BAD_INPUT
        return _COMMANDS[options.command].run(options, ["fastbert", *arguments])
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
