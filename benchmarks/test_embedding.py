"""Embeddings, their sum and norm: `pytest benchmarks/test_embedding.py --benchmark-only`."""

CASES = ("ops/embedding_layer_norm",)


def test_embedding(case, contender, run_contender):
    run_contender(case, contender)
