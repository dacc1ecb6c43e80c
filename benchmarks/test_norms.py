"""Norms, forward and backward: `pytest benchmarks/test_norms.py --benchmark-only`."""

CASES = ("ops/layer_norm", "ops/add_layer_norm", "ops/rms_norm")


def test_norm(case, contender, run_contender):
    run_contender(case, contender)
