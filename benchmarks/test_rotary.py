"""Rotary positions: `pytest benchmarks/test_rotary.py --benchmark-only`."""

CASES = ("ops/rotary",)


def test_rotary(case, contender, run_contender):
    run_contender(case, contender)
