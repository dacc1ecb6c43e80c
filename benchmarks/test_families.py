"""fastbert.optimize by family of models: `pytest benchmarks/test_families.py --benchmark-only`."""

CASES = ("families/",)


def test_family(case, contender, run_contender):
    run_contender(case, contender)
