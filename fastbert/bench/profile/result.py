"""The result of a profile and its JSON. SCHEMA_VERSION grows whenever a field changes its meaning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastbert.bench.profile.fit import Exponent, Quadratic
from fastbert.bench.profile.operations import Breakdown, Operation
from fastbert.bench.results import finite, parse
from fastbert.bench.timer import Spread

SCHEMA_VERSION = 1
OK, WRONG, DROPPED = "ok", "wrong", "dropped"


@dataclass(frozen=True)
class Measurement:
    """A contender at a length."""

    name: str
    status: str  # ok; wrong: its result was, nothing was timed; dropped: not measured from here on
    reason: str = ""  # why it is not ok
    error: float | None = None  # largest difference, as a share of the largest value
    tolerance: float | None = None
    against: str = ""  # what the error is the difference from: "float64", or a contender
    seconds: Spread | None = None  # of one call
    ratio: Spread | None = None  # baseline's time / this one's, paired by round
    calls: int = 0  # that make one sample
    peak_bytes: int | None = None  # of memory above the loaded model, see bench.profile.worker
    total_bytes: int | None = None  # of the process, or allocated on the GPU, at that time
    peak_sampled: bool = False  # the peak is the largest of samples, not the system's
    limit_share: float | None = None  # of the speed that the operations at matmul_rate would have


@dataclass(frozen=True)
class Point:
    """All contenders at a length."""

    seq: int
    batch: int
    tokens: int  # real ones
    flops: int  # of the products on them
    matmul_rate: float | None  # operations a second of torch's own square product, in turn with the contenders
    rounds: int
    contenders: list[Measurement]

    def of(self, name: str) -> Measurement | None:
        return next((each for each in self.contenders if each.name == name), None)


@dataclass(frozen=True)
class Growth:
    """How a contender's time and memory grow with the length, a sequence; None where too little was measured."""

    name: str
    time: Exponent | None
    time_parts: Quadratic | None  # seconds a sequence
    memory: Exponent | None
    memory_parts: Quadratic | None  # bytes a sequence


@dataclass(frozen=True)
class ProfileResult:
    environment: dict[str, Any]  # fastbert.bench.environment.describe()
    settings: dict[str, Any]  # as asked for
    model: dict[str, Any]  # problem.Architecture, and its number of parameters
    baseline: str
    points: list[Point] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    breakdowns: list[Breakdown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    schema: int = SCHEMA_VERSION

    @property
    def failed(self) -> bool:
        return any(each.status == WRONG for point in self.points for each in point.contenders)

    def to_json(self) -> str:
        return json.dumps(finite(dataclasses.asdict(self)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> ProfileResult:
        """Raises ValueError when the text is no profile of this schema."""
        data = parse(text, "profile", SCHEMA_VERSION, "points")
        try:
            return ProfileResult(
                **{
                    **data,
                    "points": [_point(each) for each in data["points"]],
                    "growth": [_growth(each) for each in data["growth"]],
                    "breakdowns": [_breakdown(each) for each in data["breakdowns"]],
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a profile: {type(error).__name__} {error}") from error


def _made(kind: Any, data: Mapping[str, Any] | None) -> Any:
    return None if data is None else kind(**data)


def _point(data: Mapping[str, Any]) -> Point:
    contenders = [
        Measurement(**{**each, "seconds": _made(Spread, each["seconds"]), "ratio": _made(Spread, each["ratio"])})
        for each in data["contenders"]
    ]
    return Point(**{**data, "contenders": contenders})


def _growth(data: Mapping[str, Any]) -> Growth:
    return Growth(
        data["name"],
        _made(Exponent, data["time"]),
        _made(Quadratic, data["time_parts"]),
        _made(Exponent, data["memory"]),
        _made(Quadratic, data["memory_parts"]),
    )


def _breakdown(data: Mapping[str, Any]) -> Breakdown:
    operations = [Operation(**each) for each in data["operations"]]
    return Breakdown(**{**data, "operations": operations, "others": _made(Operation, data["others"])})
