"""The alternating timer, with a fake clock: no test here looks at the real one."""

import math

import pytest

from fastbert.bench.timer import CpuClock, Spread, measure, spread


class FakeTime:
    """A clock that only the contenders move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *durations: float):
        """A function whose calls take these durations in turn, the last for ever."""
        left = list(durations)

        def call() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def run(fake: FakeTime, contenders, baseline="a", **arguments):
    arguments = {"budget_seconds": 0.0, "min_sample_seconds": 0.0, **arguments}
    return measure(contenders, baseline, clock=CpuClock(fake), now=fake, **arguments)


def test_contenders_alternate_and_the_order_rotates():
    fake = FakeTime()
    # 1 s a call is far above the sample's length, so calibration is one call each
    contenders = {name: fake.contender(name, 1.0) for name in "abc"}
    timing = run(fake, contenders, min_sample_seconds=1e-3, min_rounds=4)
    assert timing.rounds == 4
    assert "".join(fake.log) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_medians_and_paired_ratios():
    fake = FakeTime()
    # the machine slows down threefold in the second round, and both contenders with it
    contenders = {"a": fake.contender("a", 1.0, 1.0, 3.0, 1.0), "b": fake.contender("b", 0.5, 0.5, 1.5, 0.5)}
    timing = run(fake, contenders, min_sample_seconds=1e-3, min_rounds=3)
    assert timing.seconds["a"].median == pytest.approx(1.0)
    assert timing.seconds["a"].high == pytest.approx(3.0)
    assert timing.ratios["b"] == Spread(*[pytest.approx(2.0)] * 5)
    assert timing.ratios["a"] == Spread(*[pytest.approx(1.0)] * 5)


def test_short_functions_are_repeated_until_a_sample_is_long_enough():
    fake = FakeTime()
    timing = run(fake, {"a": fake.contender("a", 1e-5), "b": fake.contender("b", 1.0)}, min_sample_seconds=2e-3)
    assert 200 <= timing.calls["a"] <= 300
    assert timing.calls["b"] == 1
    assert timing.seconds["a"].median == pytest.approx(1e-5)


def test_one_interrupted_call_does_not_pass_for_a_slow_function():
    fake = FakeTime()
    timing = run(fake, {"a": fake.contender("a", 1e-5, 8e-3, 1e-5)}, min_sample_seconds=2e-3)
    assert timing.calls["a"] >= 200


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (100.0, 49), (1e9, 60)], ids=["minimum", "budget", "maximum"])
def test_rounds_follow_the_budget(budget, rounds):
    fake = FakeTime()
    contenders = {"a": fake.contender("a", 1.0), "b": fake.contender("b", 1.0)}
    timing = run(fake, contenders, budget_seconds=budget, min_sample_seconds=1e-3, min_rounds=3, max_rounds=60)
    assert timing.rounds == rounds  # calibration took 2 s of the 100


def test_without_baseline_there_are_no_ratios():
    fake = FakeTime()
    assert run(fake, {"a": fake.contender("a", 1.0)}, baseline="wrong, so not timed").ratios == {}
    with pytest.raises(ValueError, match="nothing to measure"):
        run(fake, {})


def test_ctrl_c_keeps_complete_rounds():
    fake = FakeTime()
    calls = 0

    def interrupted() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # calibration, two rounds, and this
            raise KeyboardInterrupt
        fake.now += 1.0

    timing = run(fake, {"a": fake.contender("a", 1.0), "b": interrupted}, min_sample_seconds=1e-3, min_rounds=9)
    assert timing.interrupted
    assert timing.rounds == 2
    assert timing.seconds.keys() == {"a", "b"}


def test_ctrl_c_before_the_first_round_propagates():
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(FakeTime(), {"a": interrupted})


def test_garbage_collection_is_off_while_timing():
    import gc

    seen = []
    run(FakeTime(), {"a": lambda: seen.append(gc.isenabled())})
    assert seen and not any(seen)
    assert gc.isenabled()


def test_spread():
    few = spread([3.0, 1.0, 2.0])
    assert (few.median, few.q1, few.q3, few.low, few.high) == (2.0, 1.5, 2.5, 1.0, 3.0)
    many = spread([float(i) for i in range(20)])
    assert (many.low, many.high) == (2.0, 17.0)  # the central 80 %
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_no_winner_within_the_spread():
    assert spread([0.9, 1.2, 1.3]).straddles_one
    assert not spread([1.1, 1.2, 1.3]).straddles_one
    assert not spread([0.7, 0.8, 0.9]).straddles_one
    # one outlier of twenty is outside of the range
    assert not spread([1.2] * 19 + [0.5]).straddles_one
    assert spread([2.0, 2.0]).relative == 0.0
    assert spread([0.0]).relative == math.inf


def test_settling_comes_before_every_sample_and_is_not_part_of_it():
    fake, log = FakeTime(), []

    def function():
        log.append("call")
        fake.now += 1.0

    def sleep(seconds):
        log.append(f"sleep {seconds}")
        fake.now += 100.0

    timing = measure(
        {"a": function}, "a", budget_seconds=0.0, clock=CpuClock(fake), now=fake, sleep=sleep, settle_seconds=0.25
    )
    assert timing.seconds["a"].median == 1.0
    assert log[-3 * timing.rounds :] == ["sleep 0.25", "call", "call"] * timing.rounds
