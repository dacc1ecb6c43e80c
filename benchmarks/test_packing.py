"""Packing and unpacking, on a GPU: `pytest benchmarks/test_packing.py --benchmark-only`."""

CASES = ("ops/pack", "ops/unpack")


def test_packing(case, contender, run_contender):
    run_contender(case, contender)
