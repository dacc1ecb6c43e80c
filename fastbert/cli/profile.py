"""`fastbert profile`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

from fastbert.cli._common import (
    INTERRUPTED,
    OK,
    WRONG,
    BadInput,
    add_machine_arguments,
    check_distinct,
    check_output,
    count,
    device_of,
    progress,
    require_rich,
)

_LENGTHS, _QUICK_LENGTHS = "128..2048", "128..512"
_BUDGET, _QUICK_BUDGET = 2.0, 0.5
_TIME_LIMIT = 30.0
_MOST_POSITIONS = 2**31 - 1


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="how a model's time and memory grow with the sequence length",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(
            """\
            Measure how time and peak memory of a model grow with the length of its
            sequences: fastbert against transformers with SDPA and with eager attention,
            on the same weights and tokens. Results are compared first, with float64 at
            short lengths. A contender that runs out of memory or time is dropped from
            that length on. The default takes about a minute on two cores, --quick a
            third of that. Ctrl-C ends the run and keeps what was measured.
            """
        ),
        epilog=textwrap.dedent(
            """\
            examples:
              fastbert profile                                          bert-base, 2 layers, 128..2048
              fastbert profile --model gpt2 --seq-lens 128..8192 --plots plots
              fastbert profile --model my/model --tokens 8192 --padding 0.5 --seq-lens 128,256,512
              fastbert profile --mode train --batch 8 --json profile.json --trace trace.json
            """
        ),
    )
    parser.add_argument(
        "--model",
        default="bert-base",
        metavar="NAME|PATH",
        help="bert-base, bert-large, minilm or gpt2 with random weights, or a folder of a Hugging Face model (default: bert-base)",
    )
    parser.add_argument(
        "--layers",
        type=count,
        metavar="N",
        help="only so many layers; they are alike, and so are the ratios of few (default: 2 of a named model, all of a folder)",
    )
    parser.add_argument(
        "--seq-lens",
        metavar="LENGTHS",
        help=f"128..16384, doubling, or 128,384,512 (default: {_LENGTHS}, with --quick {_QUICK_LENGTHS})",
    )
    parser.add_argument("--batch", type=count, metavar="N", help="sequences in a batch (default: 1)")
    parser.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help="positions in a batch instead: as many sequences of each length as fit",
    )
    parser.add_argument(
        "--padding",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the positions that are padding, 0 to below 1; lengths are spread evenly (default: 0)",
    )
    parser.add_argument(
        "--mode",
        choices=("forward", "train"),
        default="forward",
        help="a forward pass without gradients, or forward, loss and backward, without an optimizer (default: forward)",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of parameters and activations (default: fp32)"
    )
    add_machine_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="fewer lengths, less time for each")
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help=f"of timing at each length, three rounds at least (default: {_BUDGET:g}, with --quick {_QUICK_BUDGET:g})",
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=_TIME_LIMIT,
        metavar="SECONDS",
        help=f"a contender is dropped where a call takes longer (default: {_TIME_LIMIT:g})",
    )
    parser.add_argument("--no-breakdown", action="store_true", help="no table of the operations inside a call")
    parser.add_argument("--json", metavar="FILE", help="write the result, with environment and versions, to this file")
    parser.add_argument("--plots", metavar="FOLDER", help="write time.svg and memory.svg into this folder")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a trace of one call of fastbert at the largest length, for Perfetto (ui.perfetto.dev) or chrome://tracing",
    )


def run(options: argparse.Namespace, command: list[str]) -> int:
    """Measure, print, write; the exit status."""
    require_rich()
    lengths = _check(options)

    import torch

    from fastbert.bench.profile.models import NAMES, ModelError, Spec, describe
    from fastbert.bench.profile.run import Plan, run_plan, steps

    options.device = device_of(options.device)
    model = options.model if options.model in NAMES else str(Path(options.model).expanduser())
    spec = Spec(model, options.layers, lengths[-1], options.mode, options.dtype, options.device)
    try:
        architecture = describe(spec)
    except ModelError as error:
        raise BadInput(str(error)) from None
    if architecture.positions is not None and lengths[-1] > architecture.positions:
        raise BadInput(
            f"a length of {lengths[-1]} is beyond the {architecture.positions} positions of {options.model}; "
            f"choose --seq-lens up to {architecture.positions}"
        )
    positions = options.tokens or (options.batch or 1) * lengths[-1]
    if positions > _MOST_POSITIONS:
        raise BadInput(
            f"a batch of {positions} positions is too large, at most {_MOST_POSITIONS}: boundaries are 32-bit numbers"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plan = Plan(
        spec,
        architecture,
        lengths,
        None if options.tokens else options.batch or 1,
        options.tokens,
        options.padding,
        options.budget or (_QUICK_BUDGET if options.quick else _BUDGET),
        options.time_limit,
        torch.get_num_threads(),
        not options.no_breakdown,
        options.trace,
    )

    from fastbert.bench.environment import describe as describe_environment

    environment = describe_environment(options.device, command)  # before the run, whose own load it must not report
    try:
        with progress(steps(plan)) as step:
            outcome = run_plan(plan, before=step)
    except ModelError as error:
        raise BadInput(str(error)) from None
    return _report(options, plan, environment, outcome)


def _report(options: argparse.Namespace, plan: Any, environment: dict[str, Any], outcome: Any) -> int:
    import dataclasses

    from rich.console import Console

    from fastbert.bench.profile.growth import growth
    from fastbert.bench.profile.result import ProfileResult
    from fastbert.bench.profile.run import BASELINE
    from fastbert.bench.profile.table import print_profile

    asked = {
        "model": options.model,
        "lengths": plan.lengths,
        "batch": plan.batch,
        "tokens": plan.tokens,
        "padding": plan.padding,
        "mode": options.mode,
        "dtype": options.dtype,
        "device": options.device,
        "budget_seconds": plan.budget_seconds,
        "time_limit": plan.time_limit,
        "seed": plan.spec.seed,
    }
    result = ProfileResult(
        environment,
        asked,
        {**dataclasses.asdict(plan.architecture), "parameters": outcome.parameters},
        BASELINE,
        outcome.points,
        growth(outcome.points),
        outcome.breakdowns,
        outcome.notes,
        outcome.interrupted,
    )
    failures = _write(options, result)
    if options.trace is not None and outcome.points and not outcome.interrupted and not Path(options.trace).is_file():
        failures.append(f"no trace was written to {options.trace}")
    print_profile(Console(), result)
    for failure in failures:
        print(f"fastbert profile: {failure}", file=sys.stderr)
    if outcome.interrupted:
        return INTERRUPTED
    return WRONG if failures or result.failed else OK


def _write(options: argparse.Namespace, result: Any) -> list[str]:
    """What could not be written, in spite of the look before."""
    from fastbert.bench.results import write_atomically

    files = {}
    if options.json is not None:
        files[options.json] = result.to_json()
    if options.plots is not None:
        from fastbert.bench.profile.figures import figures

        files |= {str(Path(options.plots, f"{each.name}.svg")): each.file() for each in figures(result)}
    failures = []
    for path, content in files.items():
        try:
            write_atomically(path, content)
            print(f"written to {path}", file=sys.stderr)
        except OSError as error:
            failures.append(f"cannot write {path}: {error}")
    return failures


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds") from None
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time; expected more than 0 seconds")
    return value


def _check(options: argparse.Namespace) -> list[int]:
    """The lengths. Whatever would fail after minutes of measuring fails now."""
    from fastbert.bench.plots import PlotsUnavailable, require
    from fastbert.bench.profile.problem import parse_lengths

    default = _QUICK_LENGTHS if options.quick else _LENGTHS
    try:
        lengths = parse_lengths(options.seq_lens if options.seq_lens is not None else default)
    except ValueError as error:
        raise BadInput(f"--seq-lens: {error}") from None
    if options.batch is not None and options.tokens is not None:
        raise BadInput("--batch and --tokens are two ways to say the same; give one of them")
    if options.tokens is not None and options.tokens < lengths[-1]:
        raise BadInput(f"--tokens {options.tokens} holds no sequence of {lengths[-1]}; give at least as many")
    if not 0.0 <= options.padding < 1.0:
        raise BadInput(f"--padding {options.padding:g} is no share of padding; expected 0 to below 1")
    plots = {
        f"--plots ({name}.svg)": str(Path(options.plots, f"{name}.svg")) for name in ("time", "memory") if options.plots
    }
    check_distinct({}, {"--json": options.json, "--trace": options.trace, **plots})
    if options.json is not None:
        check_output("--json", options.json)
    if options.trace is not None:
        check_output("--trace", options.trace)
    if options.plots is not None:
        try:
            require()
        except PlotsUnavailable as error:
            raise BadInput(str(error)) from None
        folder = Path(options.plots)
        if not options.plots or not folder.is_dir():
            raise BadInput(f"--plots needs a folder that exists: {options.plots or 'nothing'} is none")
        for name in ("time.svg", "memory.svg"):
            check_output("--plots", str(folder / name))
    return lengths
