"""Figures as SVG, drawn with matplotlib: for the HTML page, for files, for README.

The same values give the same file with the same matplotlib: no date, no random identifiers. Text stays text, so that a page can be
searched. Lines and text take the colour of the page around them, and a file of its own follows the reader's scheme, light or dark.
The other colours tell apart under the common colour blindnesses (Okabe and Ito, "Color Universal Design", 2008), on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDS_MATPLOTLIB = "plots need matplotlib, which is not installed: pip install 'fastbert-kernels[bench]'"
_OURS = "#0072b2"
_OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
_FEW_DECADES = 1e3
_UNDECIDED = "#8c8c8c"
_INK = "#010203"  # what becomes the colour of the text around the figure
_FILE_STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#d1d7e0}}</style>"
_WIDTH = 6.4  # inches; narrow enough that its text can be read on a phone
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastbert",
    "text.parse_math": False,  # names are names
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: text is laid out alike everywhere
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}


class PlotsUnavailable(RuntimeError):
    """matplotlib is not installed; the message says what to do."""


def require() -> None:
    """Raises PlotsUnavailable now rather than after minutes of measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotsUnavailable(NEEDS_MATPLOTLIB) from error


@dataclass(frozen=True)
class Line:
    """One contender's values, by x."""

    name: str
    points: Sequence[tuple[float, float]]
    ours: bool = False
    dashed: bool = False  # a limit, or a fit


def lines(
    series: Sequence[Line],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,  # by powers of two, each point a tick
    log_y: bool = False,
) -> str:
    """The SVG of a plot with a line a contender; ours is thick and in front. Raises PlotsUnavailable."""
    require()
    import matplotlib
    from matplotlib.ticker import LogLocator, NullFormatter

    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(_WIDTH, 3.9)
        others = 0
        for line in series:
            colour = _OURS if line.ours else _OTHERS[others % len(_OTHERS)]
            others += not line.ours
            axes.plot(
                *zip(*sorted(line.points), strict=True),
                label=line.name,
                color=colour,
                marker="" if line.dashed else "o",
                markersize=4.5,
                linestyle="--" if line.dashed else "-",
                linewidth=2.6 if line.ours else 1.4,
                zorder=3 if line.ours else 2,
            )
        if log_x:
            ticks = sorted({x for line in series for x, _ in line.points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if log_y:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            # A single power of ten is no scale; many with twos and fives between them are a crowd.
            few = high / low < _FEW_DECADES
            axes.yaxis.set_minor_formatter((lambda value, _: f"{value:g}") if few else NullFormatter())
        else:
            axes.set_ylim(bottom=0.0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _title(axes, title)
        axes.legend(fontsize="small")
        return _svg(figure)


def bars(
    rows: Mapping[str, tuple[float, float, float]],
    *,
    title: str,
    xlabel: str,
    ours: frozenset[str] = frozenset(),
    reference: float | None = 1.0,
    log_x: bool = False,
) -> str:
    """The SVG of horizontal bars, from above: name → (value, low, high), the range as a whisker. Raises PlotsUnavailable.

    `reference` is drawn as a line: a ratio of 1 is the baseline's speed. A bar whose range contains 1 is grey and marked with ~.
    With `log_x` the bars begin at 1.
    """
    require()
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = _figure(_WIDTH, 0.9 + 0.38 * len(rows))
        for at, (name, bar) in enumerate(rows.items()):
            _bar(axes, at, 0.4, bar, _OURS if name in ours else _OTHERS[-1], log_x, grey=True)
            _label(axes, at - 0.27, name)
        axes.set_ylim(len(rows) - 0.6, -0.85)  # from above
        _finish_bars(axes, [high for _, _, high in rows.values()], title, xlabel, reference, log_x)
        return _svg(figure)


def grouped_bars(
    rows: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    title: str,
    xlabel: str,
    ours: str = "",
    reference: float | None = 1.0,
) -> str:
    """The SVG of groups of bars: group → contender → (value, low, high); a colour a contender. Raises PlotsUnavailable."""
    require()
    import matplotlib

    names = list(dict.fromkeys(name for group in rows.values() for name in group))
    others = iter(_OTHERS * len(names))
    colours = {name: _OURS if name == ours else next(others) for name in names}
    height = 0.7 / max(1, len(names))
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = _figure(_WIDTH, 1.3 + 0.19 * len(rows) * (len(names) + 1.5))
        drawn = {}
        for at, group in enumerate(rows.values()):
            for index, name in enumerate(name for name in names if name in group):
                place = at + (index - 0.5 * (len(group) - 1)) * height
                drawn[name] = _bar(axes, place, 0.86 * height, group[name], colours[name], log_x=False, grey=False)
        for at, name in enumerate(rows):
            _label(axes, at - 0.37, name)
        axes.set_ylim(len(rows) - 0.6, -0.75)  # from above
        _finish_bars(
            axes, [bar[2] for group in rows.values() for bar in group.values()], title, xlabel, reference, False
        )
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=3, fontsize="small")
        return _svg(figure)


def _bar(
    axes: Axes,
    at: float,
    height: float,
    bar: tuple[float, float, float],
    colour: str,
    log_x: bool,
    grey: bool,
) -> Any:
    """One horizontal bar with its range and its value behind it; ~, and `grey` if asked, where its range contains 1."""
    value, low, high = bar
    undecided = low < high and low <= 1.0 <= high
    left = 1.0 if log_x else 0.0
    drawn = axes.barh(
        at,
        value - left,
        left=left,
        height=height,
        color=_UNDECIDED if undecided and grey else colour,
        xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        error_kw={"elinewidth": 1.0, "alpha": 0.6, "ecolor": _INK},
    )
    label = f"  {'~' if undecided else ''}{value:.2f}×" if value < 99.5 else f"  {value:,.0f}×"
    axes.text(max(high, left), at, label, va="center", fontsize="small")
    return drawn


def _label(axes: Axes, at: float, name: str) -> None:
    """Above its bars: names are long, and phones narrow."""
    axes.text(0.012, at, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize="small", zorder=4)


def _finish_bars(
    axes: Axes, ends: Sequence[float], title: str, xlabel: str, reference: float | None, log_x: bool
) -> None:
    axes.set_yticks([])
    end = max(ends, default=1.0)
    if log_x:
        axes.set_xscale("log")
        axes.set_xlim(right=end**1.25)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlim(0.0, 1.18 * end)
    if reference is not None:
        axes.axvline(reference, color="#8c8c8c", linewidth=1.0, linestyle="--")
    axes.set(xlabel=xlabel)
    _title(axes, title)


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")


def standalone(svg: str, comment: str) -> str:
    """A drawn figure as a file: it names its colours, for there is no page around it, and carries a comment."""
    start = svg.index(">") + 1
    return f'<?xml version="1.0" encoding="utf-8"?>\n<!-- {comment} -->\n{svg[:start]}\n {_FILE_STYLE}{svg[start:]}'


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: no window, no state of the process

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    """From the element <svg> on, as it stands in a page: without names that another figure has too."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' id="[\w.]+_\d+"', "", svg.replace(_INK, "currentColor"))
