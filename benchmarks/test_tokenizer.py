"""Text to token ids: `pytest benchmarks/test_tokenizer.py --benchmark-only`."""

CASES = ("tokenizer/",)


def test_tokenizer(case, contender, run_contender):
    run_contender(case, contender)
