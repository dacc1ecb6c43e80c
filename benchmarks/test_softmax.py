"""Scaled, masked softmax: `pytest benchmarks/test_softmax.py --benchmark-only`."""

CASES = ("ops/softmax",)


def test_softmax(case, contender, run_contender):
    run_contender(case, contender)
