"""The two plots of a profile: time and memory over the length, as SVG."""

from __future__ import annotations

from fastbert.bench.plots import Line, lines
from fastbert.bench.profile.models import CONTENDERS, OURS
from fastbert.bench.profile.result import ProfileResult
from fastbert.bench.profile.table import full_name, title

FILES = ("time.svg", "memory.svg")


def figures(result: ProfileResult) -> dict[str, str]:
    """File name → SVG; a plot that nothing was measured for is left out. Raises bench.plots.PlotsUnavailable."""
    times, peaks = [], []
    for name in CONTENDERS:
        measured = [(point, each) for point in result.points for each in point.contenders if each.name == name]
        time = [(p.seq, each.seconds.median * 1e3) for p, each in measured if each.seconds is not None]
        peak = [(p.seq, each.peak_bytes / (1 << 20)) for p, each in measured if each.peak_bytes]
        if time:
            times.append(Line(full_name(name), time, ours=name == OURS))
        if peak:
            peaks.append(Line(full_name(name), peak, ours=name == OURS))
    what = "a training step" if result.settings["mode"] == "train" else "a forward pass"
    xlabel = "sequence length, tokens"
    found = {}
    for file, series, quantity, ylabel in (
        (FILES[0], times, "Time", "milliseconds"),
        (FILES[1], peaks, "Peak memory above the loaded model", "MiB"),
    ):
        if series:
            found[file] = lines(
                series,
                title=f"{quantity}, {what}\n{title(result)}",
                xlabel=xlabel,
                ylabel=ylabel,
                log_x=True,
                log_y=True,
            )
    return found
