"""Linear layers with what follows them: `pytest benchmarks/test_linear.py --benchmark-only`."""

CASES = ("ops/linear_act", "ops/linear_residual")


def test_linear(case, contender, run_contender):
    run_contender(case, contender)
