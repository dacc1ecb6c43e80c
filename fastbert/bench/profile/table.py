"""A profile as rich tables, for terminals from 80 columns up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fastbert.bench.profile.fit import Exponent, Quadratic
from fastbert.bench.profile.models import OURS, SDPA
from fastbert.bench.profile.operations import Breakdown
from fastbert.bench.profile.result import OK, Measurement, Point, ProfileResult
from fastbert.bench.profile.worker import gib
from fastbert.bench.rows import busy, factor, number, range_text
from fastbert.bench.tables import WIDE, WIDER, print_environment

_ROWS = {80: 5, WIDE: 6, WIDER: 8}  # operations shown, by width
_SHORT = 0.01  # share of a call below which an operation is one of the others

_FOOTER = (
    "SDPA and eager are transformers' attention implementations. Ratio: SDPA's time / this one's, median over rounds in which all "
    "ran in turn, each in a process of its own; above 1 is faster than SDPA, ~ marks a range (central 80 % of the rounds) that "
    "contains 1: no winner. tokens/s: real ones. limit%: share of the speed that the real tokens' products would have at the rate "
    "of torch's own product of square matrices, measured in the same rounds; packed weights can exceed it."
)
_FOOTER_TRAINING = (
    "A training step is forward, a linear loss, backward; no dropout, and no optimizer, which costs all alike."
)
_FOOTER_MEMORY = (
    "memory: the largest resident set, during a call, of a process that has done nothing before but a short call, above its "
    "resident set then; packed weights are in neither, the output is in, and so are gradients in training."
)
_FOOTER_MEMORY_GPU = (
    "memory: the most that torch's allocator had given out during a call, above the loaded model; the output is in, and so are "
    "gradients in training."
)
_FOOTER_GROWTH = (
    "Growth is a sequence's: exponent of the length, by least squares of logarithms over the upper half of the lengths, ± its "
    "standard error; quadratic from: where b·n² passes a·n in the non-negative fit a·n + b·n² over all lengths. A machine drifts: "
    "for this, times are corrected by the speed of torch's product at each length."
)


def full_name(name: str) -> str:
    return name if name == OURS else f"transformers {name}"


def title(result: ProfileResult) -> str:
    """The model and what was done with it: "bert-base, 2 layers, fp32, 50 % padding"."""
    asked, layers = result.settings, result.model["layers"]
    name = str(asked["model"]).rstrip("/").rpartition("/")[2]
    parts = [name, f"{layers} layer{'' if layers == 1 else 's'}", asked["dtype"]]
    parts += [f"{asked['tokens']} tokens a batch"] if asked["tokens"] else []
    parts += [f"batch {asked['batch']}"] if asked["batch"] else []
    parts += [f"{100.0 * asked['padding']:g} % padding"] if asked["padding"] else []
    return ", ".join(parts)


def print_profile(console: Console, result: ProfileResult) -> None:
    print_environment(console, result.environment)
    console.print()
    what = "training step" if result.settings["mode"] == "train" else "forward pass"
    console.print(f"[bold]{what}[/] · {escape(title(result))}", highlight=False)
    if result.points:
        console.print(_points(result.points, console.width))
        _print_reasons(console, result)
    if result.growth:
        console.print()
        console.print(_growth(result))
    if result.breakdowns:
        console.print()
        _print_breakdowns(console, result)
    _print_remarks(console, result)


def _table(**options: Any) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="bold", **options)


def _points(points: Sequence[Point], width: int) -> Table:
    table = _table()
    for header, shown in (
        ("length", True),
        ("batch", True),
        ("real tokens", width >= WIDER),
        ("contender", True),
        ("ms", True),
        ("±%", True),
        ("tokens/s", True),
        ("memory", True),
        ("ratio", True),
        ("range", width >= WIDER),
        ("limit%", True),
        ("error", width >= WIDE),
    ):
        if shown:
            left = header == "contender"
            table.add_column(header, justify="left" if left else "right", no_wrap=True, min_width=8 if left else None)
    seen: set[str] = set()
    for point in points:
        shown_here = [each for each in point.contenders if each.status == OK or each.name not in seen]
        seen |= {each.name for each in point.contenders if each.status != OK}
        for index, each in enumerate(shown_here):
            cells: list[str | Text] = [str(point.seq), str(point.batch)] if index == 0 else ["", ""]
            if width >= WIDER:
                cells.append(f"{point.tokens:,}" if index == 0 else "")
            cells += _cells(point, each, width)
            table.add_row(*cells, end_section=index == len(shown_here) - 1 and len(points) <= 12)
    return table


def _cells(point: Point, each: Measurement, width: int) -> list[str | Text]:
    name = Text(each.name, style="bold cyan" if each.name == OURS else "")
    seconds = each.seconds
    if seconds is None:
        cells: list[str | Text] = [name, Text(each.status if each.status != OK else "-", style="yellow"), "", ""]
    else:
        milliseconds = number(seconds.median * 1e3)
        cells = [name, milliseconds, f"{100.0 * seconds.relative:.0f}", number(point.tokens / seconds.median)]
    cells.append("" if each.peak_bytes is None else gib(each.peak_bytes))
    cells.append(_ratio(each))
    if width >= WIDER:
        cells.append("" if each.ratio is None or each.name == SDPA else range_text(each.ratio))
    cells.append("" if each.limit_share is None else f"{100.0 * each.limit_share:.0f}")
    if width >= WIDE:
        cells.append("" if each.error is None else f"{each.error:.1e}")
    return cells


def _ratio(each: Measurement) -> Text:
    if each.ratio is None:
        return Text("")
    if each.name == SDPA:
        return Text("1×", style="dim")
    undecided = each.ratio.straddles_one
    ours = each.name == OURS
    style = "bold yellow" if ours and undecided else "bold green" if ours and each.ratio.median > 1.0 else "bold"
    return Text(f"{'~' if undecided else ''}{factor(each.ratio.median)}×", style=style)


def _print_reasons(console: Console, result: ProfileResult) -> None:
    """Why a contender has no time, once, directly below the table."""
    seen: set[str] = set()
    for point in result.points:
        for each in point.contenders:
            if each.status != OK and each.name not in seen:
                seen.add(each.name)
                style = "yellow" if each.status != "wrong" else "bold red"
                text = f"[{style}]{each.status}[/] {each.name} at {point.seq}: {escape(each.reason)}"
                console.print(text, highlight=False)


def _growth(result: ProfileResult) -> Table:
    table = _table()
    table.add_column("growth", no_wrap=True, min_width=8)
    for header in ("time", "quadratic from", "memory", "quadratic from"):
        table.add_column(header, justify="right")
    for each in result.growth:
        longest = max(point.seq for point in result.points if (found := point.of(each.name)) and found.seconds)
        table.add_row(
            Text(each.name, style="bold cyan" if each.name == OURS else ""),
            exponent_text(each.time),
            crossover_text(each.time_parts, longest),
            exponent_text(each.memory),
            crossover_text(each.memory_parts, longest),
        )
    return table


def exponent_text(found: Exponent | None) -> str:
    if found is None:
        return "-"
    return f"n^{found.exponent:.2f}" + ("" if found.error is None else f" ± {found.error:.2f}")


def crossover_text(found: Quadratic | None, longest: int) -> str:
    """From which length on the quadratic part is the larger one."""
    if found is None:
        return "-"
    at = found.crossover
    if at is None:
        return "nowhere: linear"
    if at > longest:
        return f"beyond {longest:,}"  # where nothing was measured the fit is a guess
    return "everywhere" if at == 0.0 else f"{at:,.0f} tokens"


def _print_breakdowns(console: Console, result: ProfileResult) -> None:
    rows = max(count for width, count in _ROWS.items() if console.width >= width or width == 80)
    table = _table(
        title=f"[bold]by operation[/], a call at length {result.breakdowns[0].seq}",
        title_justify="left",
        title_style="",
    )
    table.add_column("contender", no_wrap=True, min_width=9)
    table.add_column("operation", overflow="fold")
    for header in ("calls", "ms", "share"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in result.breakdowns:
        shown = [op for op in each.operations[:rows] if op.seconds >= _SHORT * each.seconds]
        listed = [(op.name, str(op.calls), op.seconds) for op in shown]
        rest = each.seconds - sum(op.seconds for op in shown)
        listed.append(("others", "", rest))
        for index, (name, calls, seconds) in enumerate(listed):
            first = Text(each.contender, style="bold cyan" if each.contender == OURS else "") if index == 0 else ""
            share = f"{100.0 * seconds / each.seconds:.0f} %"
            table.add_row(first, name, calls, number(seconds * 1e3), share)
        table.add_row(
            "", Text("sum", style="dim"), "", Text(number(each.seconds * 1e3), style="dim"), "", end_section=True
        )
    console.print(table)
    for each in result.breakdowns:
        if each.one_by_one:
            console.print(f"[dim]{_taken_apart(each, result)}[/]", highlight=False)


def _taken_apart(each: Breakdown, result: ProfileResult) -> str:
    point = next(point for point in result.points if point.seq == each.seq)
    found = point.of(each.contender)
    whole = (
        "" if found is None or found.seconds is None else f", which took {number(found.seconds.median * 1e3)} ms above"
    )
    return (
        f"{each.contender} is taken apart here: its operators run one by one under the profiler; otherwise all layers are one "
        f"call of C++{whole}."
    )


def _print_remarks(console: Console, result: ProfileResult) -> None:
    console.print()
    line = busy(result.environment)
    if line:
        console.print(f"[yellow]busy[/] {line}", highlight=False)
    if result.interrupted:
        console.print("[yellow]interrupted[/]: what had been measured until then is above.")
    for note in result.notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    if not result.points:
        return
    gpu = result.environment["device_type"] != "cpu"
    sampled = any(each.peak_sampled for point in result.points for each in point.contenders)
    footer = [_FOOTER, _FOOTER_TRAINING if result.settings["mode"] == "train" else ""]
    footer += [_FOOTER_MEMORY_GPU if gpu else _FOOTER_MEMORY]
    footer += ["It is the largest of samples here: the kernel does not let the peak be set back." if sampled else ""]
    footer += [_FOOTER_GROWTH if result.growth else "", _checked(result)]
    console.print(f"[dim]{' '.join(filter(None, footer))}[/]", highlight=False)


def _checked(result: ProfileResult) -> str:
    against: dict[str, list[int]] = {}
    for point in result.points:
        for name in {each.against for each in point.contenders if each.against}:
            against.setdefault(name, []).append(point.seq)
    said = [f"with {name} at {', '.join(map(str, lengths))}" for name, lengths in against.items()]
    return f"Results were compared before timing {'; '.join(said)}." if said else ""
