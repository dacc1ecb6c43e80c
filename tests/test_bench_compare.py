"""What is slower than it was: ratios, ranges, a second look."""

import dataclasses

import pytest

from fastbert.bench import compare
from fastbert.bench.compare import FASTER, NOT_AGAIN, ONCE, SAME, SLOWER, NotComparable
from fastbert.bench.timer import Spread
from tests.bench_samples import case, contender, run, spread

NAME = "ops/x/16384x768-bf16"


def one(ratio, **changes):
    return run(case(contenders=[contender(ratio=ratio)], **changes))


def compared(before, after, **options):
    return compare.compare(before, after, source="old.json", **options)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (spread(2.0, 1.9, 2.1), spread(2.0, 1.9, 2.1), SAME),
        (spread(2.0, 1.9, 2.1), spread(1.5, 1.4, 1.6), SLOWER),
        (spread(2.0, 1.9, 2.1), spread(1.7, 1.4, 1.9), SAME),
        (spread(2.0, 1.99, 2.01), spread(1.85, 1.84, 1.86), SAME),
        (spread(2.0, 1.99, 2.01), spread(1.75, 1.74, 1.76), SLOWER),
        (spread(2.0, 1.9, 2.1), spread(2.6, 2.5, 2.7), FASTER),
        (spread(2.0, 1.9, 2.1), spread(2.6, 2.0, 2.7), SAME),
    ],
    ids=[
        "alike",
        "slower",
        "ranges-touch",
        "less-than-a-tenth",
        "more-than-a-tenth",
        "faster",
        "faster-but-ranges-overlap",
    ],
)
def test_verdicts(before, after, verdict):
    found = compared(one(before), one(after))
    assert [each.verdict for each in found.changes] == [verdict]  # the baseline itself is not compared
    assert bool(found.regressions) == bool(found.suspects) == (verdict == SLOWER)
    assert len(found.notable) == (verdict != SAME)


def test_times_do_not_count():
    """The same ratios on a machine that is three times as slow."""
    slow = contender(ratio=2.0, seconds=Spread(*[3.0] * 5))
    assert compared(one(2.0), run(case(contenders=[slow]))).changes[0].verdict == SAME


@pytest.mark.parametrize(
    ("second", "verdict"),
    [(1.0, SLOWER), (2.0, NOT_AGAIN), (None, ONCE)],
    ids=["again", "not-again", "not-measured-again"],
)
def test_only_what_is_slower_twice_is_a_regression(second, verdict):
    other = case("ops/y/1", [contender(ratio=3.0)])
    before = run(*one(2.0).cases, other)
    asked = []

    def measure(names):
        asked.append(list(names))
        return one(second) if second is not None else run()

    found = compare.compare_twice(before, run(*one(1.0).cases, other), measure, source="old.json")
    assert asked == [[NAME]]
    assert {each.case: each.verdict for each in found.changes} == {NAME: verdict, "ops/y/1": SAME}
    assert len(found.regressions) == (verdict == SLOWER)


def test_nothing_is_measured_again_without_a_suspect():
    found = compare.compare_twice(one(2.0), one(2.0), lambda names: pytest.fail("measured again"), source="old.json")
    assert not found.notable


def test_new_and_gone():
    before = run(
        *one(2.0).cases, case("ops/old/1", [contender(ratio=2.0)]), case("cpu/other/1", [contender(ratio=2.0)])
    )
    now = case(contenders=[contender(ratio=2.0), contender("fastbert, other", ratio=2.0)])
    after = run(now, case("ops/new/1", [contender(ratio=2.0)]))
    found = compared(before, after)
    assert found.new == [f"{NAME}: fastbert, other", "ops/new/1"]
    assert found.gone == ["ops/old/1", "cpu/other/1"]
    assert compared(before, after, asked={NAME, "ops/new/1", "ops/old/1"}).gone == ["ops/old/1"]


def test_what_else_differs_is_said():
    now = {"device": "Another", "versions": {"fastbert": "9", "torch": "9.9"}, "isa": "baseline"}
    before = run(*one(2.0).cases, environment={"versions": {"fastbert": "1", "torch": "2.0"}, "isa": "avx2"})
    after = run(*one(2.0).cases, environment=now, settings={"quick": True})
    remarks = " ".join(compared(before, after).remarks)
    for expected in ("another device", "torch 2.0 → 9.9", "quick None → True", "avx2 → baseline"):
        assert expected in remarks
    assert "fastbert 1" not in remarks
    assert compared(before, before).remarks == []


def test_another_baseline_is_not_compared():
    after = one(0.1, baseline="torch compiled")
    found = compared(one(2.0), after)
    assert not found.changes
    assert "is measured against torch compiled now" in found.remarks[0]


def test_the_result_of_the_device_is_found(tmp_path):
    environment = run().environment
    with pytest.raises(NotComparable, match="has no result of this device"):
        compare.find(str(tmp_path), environment)
    with pytest.raises(NotComparable, match="no such file or folder"):
        compare.find(str(tmp_path / "missing"), environment)
    folder = tmp_path / compare.device_folder(environment)
    folder.mkdir()
    (folder / "bench.json").write_text(one(2.0).to_json(), encoding="utf-8")
    assert compare.find(str(tmp_path), environment) == folder / "bench.json"
    assert compare.read(folder / "bench.json").cases == one(2.0).cases
    (folder / "bench.json").write_text("{", encoding="utf-8")
    with pytest.raises(NotComparable, match=r"cannot read .*bench\.json: not a benchmark result"):
        compare.read(folder / "bench.json")


def test_summary_counts():
    found = compared(one(2.0), one(1.0))
    assert "Comparisons: 1, slower: 1, faster: 0" in found.summary
    assert dataclasses.replace(found, changes=[]).regressions == []
