"""Figures as SVG, drawn with matplotlib: for the HTML page, for files, for README.

The same values give the same file with the same matplotlib: no date, no random identifiers. Text stays text, so that a page can be
searched. Colours tell apart under the common colour blindnesses (Okabe and Ito, "Color Universal Design", 2008), and on white as
on dark backgrounds.
"""

from __future__ import annotations

import io
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
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastbert",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: text is laid out alike everywhere
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
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
        figure, axes = _figure(7.0, 4.2)
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
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
        axes.legend(fontsize="small")
        return _svg(figure)


def bars(
    rows: Mapping[str, tuple[float, float, float]],
    *,
    title: str,
    xlabel: str,
    ours: frozenset[str] = frozenset(),
    reference: float | None = 1.0,
) -> str:
    """The SVG of horizontal bars, from above: name → (value, low, high), the range as a whisker. Raises PlotsUnavailable.

    `reference` is drawn as a line: a ratio of 1 is the baseline's speed.
    """
    require()
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x"}):
        figure, axes = _figure(7.0, 0.9 + 0.34 * len(rows))
        for at, (name, (value, low, high)) in enumerate(rows.items()):
            colour = _OURS if name in ours else _OTHERS[-1]
            whisker = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.barh(at, value, height=0.66, color=colour, xerr=whisker, error_kw={"elinewidth": 1.0, "alpha": 0.6})
            axes.text(high, at, f"  {value:.2f}×", va="center", fontsize="small")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlim(0.0, 1.15 * max((high for _, _, high in rows.values()), default=1.0))
        if reference is not None:
            axes.axvline(reference, color="#8c8c8c", linewidth=1.0, linestyle="--")
        axes.set(xlabel=xlabel)
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
        return _svg(figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: no window, no state of the process

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> str:
    """From the element <svg> on, as it stands in a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
