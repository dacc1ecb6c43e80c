"""The benchmark core: cases, an alternating timer, results.

`fastbert bench` and the pytest-benchmark suite in benchmarks/ run the same cases. Every case checks its contenders against float64
before it times them, and says who answered. Nothing here is imported by the library itself.
"""
