"""How a contender's time and memory grow with the length, read off what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fastbert.bench.profile.fit import fit_exponent, fit_quadratic
from fastbert.bench.profile.models import CONTENDERS
from fastbert.bench.profile.result import Growth, Point


def growth(points: Sequence[Point]) -> list[Growth]:
    """Of a sequence, for every contender that was timed at two lengths.

    The lengths are measured one after another, and a machine may be slower for one than for the next. So a time counts as many
    products as torch's own product made in the same rounds: seconds · its rate there / its median rate.
    """
    rates = [point.matmul_rate for point in points if point.matmul_rate]
    usual = statistics.median(rates) if rates else None
    found = []
    for name in CONTENDERS:
        times, peaks = [], []
        for point in points:
            each = point.of(name)
            if each is None or each.seconds is None:
                continue
            speed = point.matmul_rate / usual if point.matmul_rate and usual else 1.0
            times.append((float(point.seq), each.seconds.median * speed / point.batch))
            if each.peak_bytes:
                peaks.append((float(point.seq), each.peak_bytes / point.batch))
        if len(times) > 1:
            found.append(
                Growth(name, fit_exponent(times), fit_quadratic(times), fit_exponent(peaks), fit_quadratic(peaks))
            )
    return found
