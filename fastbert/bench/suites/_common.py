"""What the suites share: seeded tensors, names of dtypes, and who answers for an operation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Maker:
    """Random tensors that are the same on every run and every device."""

    def __init__(self, seed: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = torch.randn(shape, generator=self._generator) * scale + shift
        return x.to(self.device, self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """int64, 0 to count - 1 in random order."""
        return torch.randperm(count, generator=self._generator).to(self.device)

    def choice(self, probability: float, *shape: int) -> Tensor:
        """bool, True with the probability."""
        return (torch.rand(shape, generator=self._generator) < probability).to(self.device)


def nbytes(*tensors: Tensor) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


@functools.cache
def _answers() -> dict[tuple[str, str, str], str]:
    import fastbert

    return {(each.operation, each.device, each.dtype): each.implementation for each in fastbert.backends()}


def answers(operation: str, device: str, dtype: torch.dtype) -> str:
    """Who answers for the operation `fastbert::<operation>` on this machine: "C++ (avx512)", "Triton", "reference"."""
    key = (operation, torch.device(device).type, str(dtype).removeprefix("torch."))
    return _answers().get(key, "unknown")
