"""GPT-2 that writes: `pytest benchmarks/test_generation.py --benchmark-only`."""

CASES = ("generation/",)


def test_generation(case, contender, run_contender):
    run_contender(case, contender)
