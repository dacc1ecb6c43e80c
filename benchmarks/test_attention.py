"""Attention by length, on a GPU: `pytest benchmarks/test_attention.py --benchmark-only --fastbert-device cuda`."""

SUITE = "attention"


def test_attention(case, contender, run_contender):
    run_contender(case, contender)
