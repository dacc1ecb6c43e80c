"""The cases, a file a family of operations or models. `fastbert.bench.cases.all_cases` registers what is here."""
