"""Attention's rates as plots: sequence length against TFLOP/s, a file for each table of a result of the attention suite.

fastbert bench --suite attention --device cuda --json result.json
python benchmarks/plot.py result.json FOLDER        # needs matplotlib: pip install matplotlib
"""

import argparse
import re
import sys
from pathlib import Path

from fastbert.bench.results import RunResult

_LENGTH = re.compile(r"-S(\d+)-")

Series = dict[str, list[tuple[int, float]]]  # contender → (length, TFLOP/s), by length


def series(run: RunResult) -> dict[str, Series]:
    """The timed contenders of each group of the attention suite: "forward, full, head_dim 64" → series."""
    groups: dict[str, Series] = {}
    for case in run.cases:
        length = _LENGTH.search(case.name)
        if case.suite != "attention" or length is None or not case.flops:
            continue
        for contender in case.contenders:
            if contender.seconds is not None:
                rate = case.flops / contender.seconds.median * 1e-12
                groups.setdefault(case.group, {}).setdefault(contender.name, []).append((int(length[1]), rate))
    return {group: {name: sorted(points) for name, points in lines.items()} for group, lines in groups.items()}


def file_name(group: str) -> str:
    return "attention-" + re.sub(r"[^a-z0-9]+", "-", group.lower()) + ".svg"


def plot(group: str, lines: Series, device: str, path: Path) -> None:
    """One figure, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        ours = name == "fastbert"
        axes.plot(
            *zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if ours else 1.2, zorder=3 if ours else 2
        )
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_ylim(bottom=0.0)
    axes.set(xlabel="tokens a sequence, 16384 in all", ylabel="TFLOP/s", title=f"{group}, bf16, {device}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="as written by fastbert bench --json")
    parser.add_argument("folder", type=Path, help="where the plots go; made if missing")
    options = parser.parse_args(arguments)
    try:
        run = RunResult.from_json(options.result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{options.result}: {error}")
    groups = series(run)
    if not groups:
        print(f"{options.result} has no timed case of the attention suite: nothing to plot", file=sys.stderr)
        return 1
    options.folder.mkdir(parents=True, exist_ok=True)
    for group, lines in groups.items():
        path = options.folder / file_name(group)
        try:
            plot(group, lines, run.environment["device"], path)
        except ImportError as error:
            print(f"no plots: {error}; pip install matplotlib", file=sys.stderr)
            return 1
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
