"""Cross entropy, of logits and with the linear layer before it: `pytest benchmarks/test_losses.py --benchmark-only`."""

CASES = ("ops/cross_entropy", "ops/linear_cross_entropy")


def test_loss(case, contender, run_contender):
    run_contender(case, contender)
