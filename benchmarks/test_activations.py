"""GELU with its bias, and gated activations: `pytest benchmarks/test_activations.py --benchmark-only`."""

CASES = ("ops/bias_gelu", "ops/gated_act")


def test_activation(case, contender, run_contender):
    run_contender(case, contender)
