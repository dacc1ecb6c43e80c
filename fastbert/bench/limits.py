"""What the machine itself can do: the rates that a share of the limit refers to."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastbert.bench.timer import clock_for, measure

_BUDGET_SECONDS = 0.3
#: Of matrices: on a GPU the smallest that reaches the full rate.
_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def _median_seconds(function: object, device: str) -> float:
    timing = measure({"": function}, None, budget_seconds=_BUDGET_SECONDS, clock=clock_for(device))  # type: ignore[dict-item]
    return timing.seconds[""].median


@functools.cache
def copy_bandwidth(moved: int, device: str) -> float:
    """Bytes per second of a copy into a reused tensor that reads and writes `moved` bytes together: the same caches."""
    source = torch.ones(max(1, moved // 8), device=device)  # float32: 4 bytes read, 4 written
    target = torch.empty_like(source)
    return source.numel() * 8 / _median_seconds(lambda: target.copy_(source), device)


def product(dtype: torch.dtype, device: str) -> tuple[Callable[[], object], int]:
    """torch's own product of two square matrices, and its floating-point operations."""
    size = _MATMUL_SIZE[torch.device(device).type]
    # Random: a GPU's clock depends on how many bits its multipliers flip.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2 * size**3


@functools.cache
def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of torch's own matrix product; better kernels can exceed it."""
    run, flops = product(dtype, device)
    return flops / _median_seconds(run, device)


def floor_seconds(flops: int | None, dtype: torch.dtype | None, moved: int | None, device: str) -> float | None:
    """The least time for products in `dtype` and bytes, at the rates of torch's product and of a copy; None without either."""
    floors = []
    if flops and dtype is not None:
        floors.append(flops / matmul_rate(dtype, device))
    if moved:
        floors.append(moved / copy_bandwidth(moved, device))
    return max(floors, default=None)
