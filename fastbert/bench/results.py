"""The result of a benchmark run: dataclasses, their JSON, and writing it so that a file is never half written.

`RunResult.to_json` and `RunResult.from_json` are inverse to each other. SCHEMA_VERSION grows whenever a field changes its meaning.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.bench.timer import Spread

SCHEMA_VERSION = 1
#: What tables say of the machine; `fastbert.bench.environment.describe` has more.
ENVIRONMENT = frozenset({"device", "device_type", "cpu", "isa", "threads", "cores", "load"}) | {
    "versions",
    "python",
    "platform",
    "commit",
    "date",
    "command",
}
OK, WRONG, FAILED = "ok", "wrong", "failed"  # of a contender: timed; error above the tolerance; raised


@dataclass(frozen=True)
class ContenderResult:
    name: str
    role: str  # ours, peer, limit
    status: str  # ok, wrong, failed; only "ok" is timed
    implementation: str  # who answered; "" for peers
    error: float | None  # against float64; None: not checked, or not finite (then status is "wrong")
    tolerance: float | None
    message: str  # why it is not ok
    seconds: Spread | None  # of one call
    ratio: Spread | None  # baseline's time / this one's, paired by round: above 1 is faster than the baseline
    calls: int  # that make one sample

    @property
    def decided(self) -> bool:
        """Whether the ratio's range lies on one side of 1."""
        return self.ratio is not None and not self.ratio.straddles_one


@dataclass(frozen=True)
class CaseResult:
    name: str
    suite: str
    group: str
    title: str
    baseline: str
    contenders: list[ContenderResult]
    not_measured: dict[str, str]  # contender, or "*" for the whole case → reason
    notes: list[str]
    error_unit: str
    bytes: int | None
    flops: int | None
    items: int | None
    item_unit: str
    rounds: int
    interrupted: bool
    failed: bool  # an exception ended it; not_measured["*"] has its message
    floor: float | None = None  # seconds for flops and bytes at this GPU's matmul rate and copy bandwidth; None on CPUs

    @property
    def wrong(self) -> list[ContenderResult]:
        return [each for each in self.contenders if each.status != OK]


@dataclass(frozen=True)
class RunResult:
    environment: dict[str, Any]  # fastbert.bench.environment.describe()
    settings: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    interrupted: bool = False
    schema: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return json.dumps(finite(dataclasses.asdict(self)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> RunResult:
        """Raises ValueError when the text is no result of this schema."""
        data = parse(text, "benchmark result", SCHEMA_VERSION, "cases")
        try:
            cases = [_case(case) for case in data["cases"]]
            for name in ("environment", "settings"):
                if not isinstance(data[name], dict):
                    raise TypeError(f"of {name}, which is no object")
            run = RunResult(data["environment"], data["settings"], cases, data["interrupted"], data["schema"])
            missing = [
                *(ENVIRONMENT - run.environment.keys()),
                *({"fastbert", "torch"} - run.environment["versions"].keys()),
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a benchmark result: {type(error).__name__} {error}") from error
        if missing:
            raise ValueError(f"not a benchmark result: its environment lacks {', '.join(sorted(missing))}")
        return run


def parse(text: str, what: str, schema: int, field: str) -> dict[str, Any]:
    """The object of a result file. Raises ValueError when it is no `what` of this schema, with that field."""
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not a {what}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"not a {what}: it is no object with fields")
    if "schema" not in data:
        raise ValueError(f"not a {what}: it has no field 'schema'")
    if data["schema"] != schema:
        raise ValueError(f"this {what} has schema {data['schema']}; this fastbert reads schema {schema}: measure again")
    if field not in data:
        raise ValueError(f"not a {what}: it has no field '{field}'")
    return data


def _case(data: Mapping[str, Any]) -> CaseResult:
    contenders = [
        ContenderResult(**{**each, "seconds": _spread(each["seconds"]), "ratio": _spread(each["ratio"])})
        for each in data["contenders"]
    ]
    return CaseResult(**{**data, "contenders": contenders})


def _spread(data: Mapping[str, float] | None) -> Spread | None:
    if data is None:
        return None
    if not all(isinstance(value, int | float) for value in data.values()):
        raise TypeError(f"of a spread that is not of numbers: {dict(data)}")
    return Spread(**data)


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError now if a result could not be written to `path` later, after minutes of measuring."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {target}: it is read-only")
    try:
        descriptor, probe = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise PermissionError(f"cannot write {target}: {error.strerror or error}") from error
    os.close(descriptor)
    os.unlink(probe)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a neighbour and rename it: a reader sees the old file or the new one, never a part."""
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", text=True)
    try:
        # A command line may hold bytes that are no text.
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
