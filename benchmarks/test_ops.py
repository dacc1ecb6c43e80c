"""Single operations: `pytest benchmarks/test_ops.py --benchmark-only -k layer_norm`."""

SUITE = "ops"


def test_operation(case, contender, run_contender):
    run_contender(case, contender)
