"""How fast a quantity grows with the sequence length, and from where on its quadratic part is the larger one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]  # (length, value), both positive
_FEWEST = 3  # points of which a standard error can be had


@dataclass(frozen=True)
class Exponent:
    """value ∝ length^exponent."""

    exponent: float
    error: float | None  # standard error of the slope; None with two points, which leave no residual
    points: int


@dataclass(frozen=True)
class Quadratic:
    """value = linear · length + quadratic · length², neither of them negative."""

    linear: float
    quadratic: float
    residual: float  # root mean square of the relative deviations

    @property
    def crossover(self) -> float | None:
        """The length at which both parts are equal; 0: quadratic throughout; None: linear throughout."""
        return self.linear / self.quadratic if self.quadratic > 0.0 else None

    def at(self, length: float) -> float:
        return self.linear * length + self.quadratic * length**2


def fit_exponent(points: Points) -> Exponent | None:
    """The slope of log(value) over log(length), by least squares over the upper half of the points, three where there are so many.

    None with fewer than two lengths.
    """
    ordered = sorted(points)
    count = max(min(_FEWEST, len(ordered)), (len(ordered) + 1) // 2)
    chosen = [(math.log(x), math.log(y)) for x, y in ordered[-count:]] if count else []
    if len({x for x, _ in chosen}) < 2:
        return None
    mean_x, mean_y = (sum(values) / count for values in zip(*chosen, strict=True))
    squares = sum((x - mean_x) ** 2 for x, _ in chosen)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in chosen) / squares
    residuals = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in chosen)
    error = math.sqrt(residuals / (count - 2) / squares) if count >= _FEWEST else None
    return Exponent(slope, error, count)


def fit_quadratic(points: Points) -> Quadratic | None:
    """Non-negative least squares of the relative deviations: every length counts alike. None with fewer than two lengths.

    With two unknowns the active-set method (Lawson and Hanson, "Solving Least Squares Problems", 1974) has three cases: both
    positive, or either alone.
    """
    if len({x for x, _ in points}) < 2:
        return None
    rows = [(x / y, x * x / y) for x, y in points]  # (linear, quadratic) · row = 1 is an exact fit
    uu, uv, vv = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    u, v = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = uu * vv - uv * uv
    linear, quadratic = (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant
    # What rounding leaves of an absent part is none.
    longest = max(x for x, _ in points)
    whole = abs(linear) + abs(quadratic) * longest
    linear, quadratic = (
        part if size > 1e-9 * whole else 0.0 for part, size in ((linear, linear), (quadratic, quadratic * longest))
    )
    if linear == 0.0 or quadratic == 0.0:
        candidates = [(u / uu, 0.0), (0.0, v / vv)]
        linear, quadratic = min(candidates, key=lambda each: _deviation(rows, *each))
    return Quadratic(linear, quadratic, math.sqrt(_deviation(rows, linear, quadratic) / len(rows)))


def _deviation(rows: Points, linear: float, quadratic: float) -> float:
    return sum((linear * u + quadratic * v - 1.0) ** 2 for u, v in rows)
