"""Attention: prefill by length, packed and dense, and decoding: `pytest benchmarks/test_attention.py --benchmark-only`."""

CASES = ("ops/attention", "attention/")


def test_attention(case, contender, run_contender):
    run_contender(case, contender)
