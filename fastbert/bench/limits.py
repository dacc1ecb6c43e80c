"""What the machine itself can do: the rates that a share of the limit refers to."""

from __future__ import annotations

import functools

import torch

from fastbert.bench.timer import clock_for, measure

_BUDGET_SECONDS = 0.3
_MATMUL_SIZE = 1024


def _median_seconds(function: object, device: str) -> float:
    timing = measure({"": function}, None, budget_seconds=_BUDGET_SECONDS, clock=clock_for(device))  # type: ignore[dict-item]
    return timing.seconds[""].median


@functools.cache
def copy_bandwidth(moved: int, device: str) -> float:
    """Bytes per second of a copy into a reused tensor that reads and writes `moved` bytes together: the same caches."""
    source = torch.ones(max(1, moved // 8), device=device)  # float32: 4 bytes read, 4 written
    target = torch.empty_like(source)
    return source.numel() * 8 / _median_seconds(lambda: target.copy_(source), device)


@functools.cache
def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of torch's own matrix product; better kernels can exceed it."""
    a, b = (torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _MATMUL_SIZE**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)
