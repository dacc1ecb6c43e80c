"""Which figures a run has: for the page, and for the files that README shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastbert.bench import plots
from fastbert.bench.cases import LIMIT, OURS
from fastbert.bench.headline import headlines, ours_of
from fastbert.bench.results import CaseResult, RunResult

_LENGTH = re.compile(r"-S(\d+)-")
_ENGINES = ("cpu-fp32", "cpu")  # suites whose contenders are engines
_LEAST_LENGTHS = 3  # that make a line worth drawing
_WIDE_RANGE = 20.0  # of ratios, from which a linear axis hides the small ones


@dataclass(frozen=True)
class Drawing:
    """A figure and what it is drawn from, so that a file can be held against a result without drawing it again."""

    name: str  # of a file, without suffix
    caption: str
    kind: str  # the function of fastbert.bench.plots
    data: Any
    options: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of the values, 16 hexadecimal digits; the same for the same figure, whatever matplotlib draws it."""
        plain = json.dumps([self.kind, self.data, self.options], default=_plain, ensure_ascii=False)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def draw(self) -> str:
        """As SVG, for a page. Raises plots.PlotsUnavailable."""
        return getattr(plots, self.kind)(self.data, **self.options)

    def file(self) -> str:
        """As an SVG file, which carries the fingerprint. Raises plots.PlotsUnavailable."""
        return plots.standalone(self.draw(), f"values {self.fingerprint}")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"a figure cannot be drawn from {type(value).__name__}")


def drawings(run: RunResult) -> list[Drawing]:
    """All figures of a run, by its suites."""
    by_suite: dict[str, list[CaseResult]] = {}
    for case in run.cases:
        by_suite.setdefault(case.suite, []).append(case)
    found = [*engines(run), *attention(run)]
    for suite, cases in by_suite.items():
        if suite not in _ENGINES:
            found += _ratios(f"suite-{suite}", f"{suite}: fastbert against the baseline of each case", cases)
    return found


def headline(run: RunResult) -> list[Drawing]:
    """The rows that stand for the run, against their baselines; none without such rows."""
    chosen = [each for each in headlines(run) if each.section != "Tokenizer"]  # hundreds of times: another scale
    rows = {
        f"{each.title}, against {each.case.baseline}": (
            each.ours.ratio.median,
            each.ours.ratio.low,
            each.ours.ratio.high,
        )
        for each in chosen
        if each.ours.ratio is not None
    }
    if not rows:
        return []
    options = {"title": "", "xlabel": "times as fast", "ours": frozenset(rows)}
    return [Drawing("headline", "fastbert against its peers, " + _device(run), "bars", rows, options)]


def _ratios(name: str, title: str, cases: list[CaseResult]) -> list[Drawing]:
    """A bar a case: ours against the case's baseline."""
    rows = {}
    for case in cases:
        ours = ours_of(case)
        if ours is not None and ours.ratio is not None:
            rows[f"{case.group}, {case.title}"] = (ours.ratio.median, ours.ratio.low, ours.ratio.high)
    if not rows:
        return []
    medians = [value for value, _, _ in rows.values()]
    options = {
        "title": title,
        "xlabel": "times as fast as the baseline",
        "ours": frozenset(rows),
        "log_x": max(medians) > _WIDE_RANGE * max(1.0, min(medians)),
    }
    return [Drawing(name, title, "bars", rows, options)]


def engines(run: RunResult) -> list[Drawing]:
    """Whole models: a group of bars a case, a bar an engine."""
    found = []
    for suite in _ENGINES:
        for precision in ("fp32", "bf16", "int8"):
            rows: dict[str, dict[str, tuple[float, float, float]]] = {}
            baselines = set()
            for case in run.cases:
                if case.suite != suite or case.group != f"models, {precision}" or not case.contenders:
                    continue
                rows[case.title] = {
                    each.name: (each.ratio.median, each.ratio.low, each.ratio.high)
                    for each in case.contenders
                    if each.ratio is not None and each.role != LIMIT
                }
                baselines.add(case.baseline)
            if rows:
                title = f"Whole models, {precision}"
                xlabel = f"times as fast as {' or '.join(sorted(baselines))}"
                options = {"title": title, "xlabel": xlabel, "ours": "fastbert"}
                name = "models" if suite == "cpu-fp32" else f"models-{precision}"
                found.append(Drawing(name, f"{title}, {_device(run)}", "grouped_bars", rows, options))
    return found


def attention(run: RunResult) -> list[Drawing]:
    """Attention's rate by length, a figure a table of the suite that has enough lengths."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    ours, limits = set(), set()
    for case in run.cases:
        length = _LENGTH.search(case.name)
        if case.suite != "attention" or length is None or not case.flops:
            continue
        for each in case.contenders:
            if each.seconds is not None:
                rate = case.flops / each.seconds.median * 1e-12
                groups.setdefault(case.group, {}).setdefault(each.name, []).append((float(length[1]), rate))
                ours |= {each.name} if each.role == OURS else set()
                limits |= {each.name} if each.role == LIMIT else set()
    found = []
    for group, rates in groups.items():
        if max(len(points) for points in rates.values()) < _LEAST_LENGTHS:
            continue
        series = [
            plots.Line(name, sorted(points), ours=name in ours, dashed=name in limits) for name, points in rates.items()
        ]
        options = {"title": group, "xlabel": "tokens a sequence", "ylabel": "TFLOP/s", "log_x": True}
        name = "attention-" + re.sub(r"[^a-z0-9]+", "-", group.lower().removeprefix("attention "))
        found.append(Drawing(name, f"{group}, {_device(run)}", "lines", series, options))
    return found


def _device(run: RunResult) -> str:
    environment = run.environment
    on_cpu = environment["device_type"] == "cpu"
    return f"{environment['device']}, {environment['threads']} threads" if on_cpu else environment["device"]
