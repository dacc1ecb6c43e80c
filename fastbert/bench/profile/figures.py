"""The two plots of a profile: time and memory over the length."""

from __future__ import annotations

from fastbert.bench.figures import Drawing
from fastbert.bench.plots import Line
from fastbert.bench.profile.models import CONTENDERS, OURS
from fastbert.bench.profile.result import ProfileResult
from fastbert.bench.profile.table import full_name, title


def figures(result: ProfileResult) -> list[Drawing]:
    """ "time" and "memory"; one that nothing was measured for is left out."""
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
    found = []
    for file, series, quantity, ylabel in (
        ("time", times, "Time", "milliseconds"),
        ("memory", peaks, "Peak memory above the loaded model", "MiB"),
    ):
        caption = f"{quantity}, {what}"
        options = {
            "title": f"{caption}\n{title(result)}",
            "xlabel": "sequence length, tokens",
            "ylabel": ylabel,
            "log_x": True,
            "log_y": True,
        }
        if series:
            found.append(Drawing(file, f"{caption}: {title(result)}", "lines", series, options))
    return found
