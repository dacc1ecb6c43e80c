"""Two results of one device, case by case: is anything slower than it was?

Compared are ratios to the baseline of the case, never times: a machine is not as fast today as it was yesterday, and drifts alike
for all contenders. Slower means both that the ranges of the two ratios do not overlap and that the median has fallen by more than a
share. A range of few rounds is narrow by luck now and then: what is slower once is measured again, and is a regression where it is
slower again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbert.bench.cases import OURS
from fastbert.bench.environment import device_folder
from fastbert.bench.results import CaseResult, ContenderResult, RunResult
from fastbert.bench.rows import range_text, ratio_text
from fastbert.bench.timer import Spread

SHARE = 0.1  # of the ratio that must be lost or won
COMMITTED = "bench.json"  # in a device's folder, what `make bench` wrote

SAME, SLOWER, FASTER = "same", "slower", "faster"
NOT_AGAIN, ONCE = "slower once, not again", "slower once, not measured again"


class NotComparable(ValueError):
    """There is nothing to compare with; the message is one line."""


@dataclass(frozen=True)
class Change:
    """A contender of ours in both results."""

    case: str
    contender: str
    before: Spread  # ratio to the baseline
    after: Spread
    verdict: str

    @property
    def before_text(self) -> str:
        return ratio_text(self.before)

    @property
    def before_range(self) -> str:
        return range_text(self.before)

    @property
    def after_text(self) -> str:
        return ratio_text(self.after)

    @property
    def after_range(self) -> str:
        return range_text(self.after)


@dataclass(frozen=True)
class Comparison:
    source: str  # what the run was compared with
    date: str  # of its run
    changes: list[Change]
    new: list[str]  # cases, or "case: contender", that only this run measured
    gone: list[str]  # that only the other one measured
    remarks: list[str]  # other device, other versions, other settings

    @property
    def regressions(self) -> list[Change]:
        return [each for each in self.changes if each.verdict == SLOWER]

    @property
    def notable(self) -> list[Change]:
        """All but what is the same, the worst first."""
        changed = [each for each in self.changes if each.verdict != SAME]
        return sorted(changed, key=lambda each: each.after.median / each.before.median)

    @property
    def suspects(self) -> list[str]:
        """Cases to measure again."""
        return list(dict.fromkeys(each.case for each in self.regressions))

    @property
    def summary(self) -> str:
        counts = {verdict: sum(each.verdict == verdict for each in self.changes) for verdict in (SLOWER, FASTER)}
        return (
            f"Comparisons: {len(self.changes)}, slower: {counts[SLOWER]}, faster: {counts[FASTER]}, that is with ranges that do "
            f"not overlap and medians more than {100 * SHARE:.0f} % apart."
        )

    def confirmed(self, again: Comparison) -> Comparison:
        """With what `again` found for the suspects: only what is slower in both is a regression."""
        second = {(each.case, each.contender): each.verdict for each in again.changes}

        def verdict(change: Change) -> str:
            if change.verdict != SLOWER:
                return change.verdict
            found = second.get((change.case, change.contender))
            return ONCE if found is None else SLOWER if found == SLOWER else NOT_AGAIN

        return dataclasses.replace(
            self, changes=[dataclasses.replace(each, verdict=verdict(each)) for each in self.changes]
        )


def find(path: str, environment: dict[str, object]) -> Path:
    """The result at `path`, a file, or a folder of devices' folders in which this device's is looked for. Raises NotComparable."""
    found = Path(path)
    if found.is_dir():
        found = found / device_folder(environment) / COMMITTED
        if not found.is_file():
            raise NotComparable(f"{path} has no result of this device: {found} does not exist")
    elif not found.is_file():
        raise NotComparable(f"no result in {path}: there is no such file or folder")
    return found


def read(path: Path) -> RunResult:
    """A result file. Raises NotComparable where it is none."""
    try:
        return RunResult.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotComparable(f"cannot read {path}: {error}") from error


def compare(before: RunResult, after: RunResult, *, source: str, asked: Collection[str] | None = None) -> Comparison:
    """Every ratio of ours that both runs have.

    `asked` are the cases that `after` was asked for, where it was not asked for all: others are not called gone.
    """
    old, new = _ratios(before, asked), _ratios(after, None)
    changes = []
    remarks = _differences(before, after)
    for key, (baseline, now) in new.items():
        if key not in old:
            continue
        other, then = old[key]
        if other != baseline:
            remarks.append(f"{key[0]}: {key[1]} is measured against {baseline} now, and was against {other}")
            continue
        changes.append(Change(*key, then, now, _verdict(then, now)))
    return Comparison(
        source=source,
        date=str(before.environment["date"]),
        changes=changes,
        new=_only_in(new, old),
        gone=_only_in(old, new),
        remarks=remarks,
    )


def compare_twice(
    before: RunResult, after: RunResult, measure: Callable[[Sequence[str]], RunResult], **options: object
) -> Comparison:
    """`compare`, and once more for the cases that seem slower, by `measure` of their names."""
    found = compare(before, after, **options)  # type: ignore[arg-type]
    if not found.suspects:
        return found
    return found.confirmed(compare(before, measure(found.suspects), **options))  # type: ignore[arg-type]


Key = tuple[str, str]  # case, contender


def _ratios(run: RunResult, asked: Collection[str] | None) -> dict[Key, tuple[str, Spread]]:
    """(case, contender) → (baseline, ratio) of our contenders that were timed."""
    return {
        (case.name, each.name): (case.baseline, each.ratio)
        for case in run.cases
        if asked is None or case.name in asked
        for each in case.contenders
        if _is_compared(case, each) and each.ratio is not None
    }


def _is_compared(case: CaseResult, contender: ContenderResult) -> bool:
    return contender.role == OURS and contender.name != case.baseline


def _verdict(before: Spread, after: Spread) -> str:
    if after.high < before.low and after.median < before.median * (1.0 - SHARE):
        return SLOWER
    if after.low > before.high and after.median > before.median * (1.0 + SHARE):
        return FASTER
    return SAME


def _only_in(these: Collection[Key], those: Collection[Key]) -> list[str]:
    """Whole cases by name; of cases that both have, "case: contender"."""
    known = {case for case, _ in those}
    names = (f"{case}: {name}" if case in known else case for case, name in these if (case, name) not in those)
    return list(dict.fromkeys(names))


def _differences(before: RunResult, after: RunResult) -> list[str]:
    """What may explain a difference that is not this library's."""
    remarks = []
    then, now = before.environment, after.environment
    if device_folder(then) != device_folder(now):
        remarks.append(
            f"the other result is of another device ({device_folder(then)}, this is {device_folder(now)}): ratios of two "
            "machines differ without anything being slower"
        )
    versions = [
        f"{name} {version or 'absent'} → {now['versions'][name] or 'absent'}"
        for name, version in then["versions"].items()
        if name != "fastbert" and name in now["versions"] and now["versions"][name] != version
    ]
    if versions:
        remarks.append(f"other versions, so a baseline may be what changed: {', '.join(versions)}")
    settings = [
        f"{name} {before.settings.get(name)} → {after.settings.get(name)}"
        for name in ("quick", "text", "model")
        if before.settings.get(name) != after.settings.get(name)
    ]
    if settings:
        remarks.append(f"other settings, so texts and sizes differ: {', '.join(settings)}")
    if then.get("isa") != now.get("isa"):
        remarks.append(f"another instruction set: {then.get('isa')} → {now.get('isa')}")
    return remarks
