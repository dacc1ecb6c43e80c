"""Text to sentence embeddings on all-MiniLM-L6-v2: `pytest benchmarks/test_end_to_end.py --benchmark-only`."""

CASES = ("end-to-end/",)


def test_end_to_end(case, contender, run_contender):
    run_contender(case, contender)
