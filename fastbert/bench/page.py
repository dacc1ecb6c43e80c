"""A run as one HTML page: headline, figures, tables, environment, and what was not measured.

The page holds everything that it shows: no script, no font, no picture from elsewhere. The template is page.html beside this file.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastbert.bench import figures, plots
from fastbert.bench.compare import Comparison
from fastbert.bench.headline import headlines
from fastbert.bench.results import RunResult
from fastbert.bench.rows import environment_rows, groups, range_text, ratio_text, remarks, verdict_of

NEEDS_JINJA2 = "a page needs jinja2, which is not installed: pip install 'fastbert-kernels[bench]'"
_TILES = 2  # of a section of the headline


class PageUnavailable(RuntimeError):
    """Something that a page is made with is not installed; the message says what to do."""


def require() -> None:
    """Raises PageUnavailable now rather than after minutes of measuring."""
    try:
        import jinja2  # noqa: F401

        plots.require()
    except ImportError as error:
        raise PageUnavailable(NEEDS_JINJA2) from error
    except plots.PlotsUnavailable as error:
        raise PageUnavailable(str(error)) from error


def render(run: RunResult, comparison: Comparison | None = None) -> str:
    """The page. Raises PageUnavailable."""
    require()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = resources.files("fastbert.bench").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    tables = groups(run)
    return environment.from_string(template).render(
        run=run,
        environment=environment_rows(run.environment),
        tiles=_tiles(run),
        # matplotlib escapes the names that it draws
        figures=[(each.caption, Markup(each.draw())) for each in figures.drawings(run)],
        suites=list(dict.fromkeys(group.suite for group in tables)),
        groups=tables,
        remarks=remarks(run),
        comparison=comparison,
    )


def _tiles(run: RunResult) -> list[dict[str, Any]]:
    """The figures that stand above all others; none is called a win where its range contains 1."""
    tiles: list[dict[str, Any]] = []
    for each in headlines(run):
        if each.ours.ratio is None or sum(tile["section"] == each.section for tile in tiles) >= _TILES:
            continue
        verdict = verdict_of(each.ours.ratio)
        tiles.append(
            {
                "section": each.section,
                "value": ratio_text(each.ours.ratio),
                "title": each.title,
                "against": f"against: {each.case.baseline}",
                "range": "no winner: " * (verdict == "undecided") + range_text(each.ours.ratio),
                "verdict": verdict,
            }
        )
    return tiles
