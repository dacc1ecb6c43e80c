"""Whole models against the CPU engines: `pytest benchmarks/test_models.py --benchmark-only`."""

CASES = ("cpu/", "cpu-fp32/")


def test_model(case, contender, run_contender):
    run_contender(case, contender)
