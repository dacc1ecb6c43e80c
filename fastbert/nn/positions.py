"""Where tokens stand, without parameters: sinusoidal tables to add, rotary angles to turn by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert import functional as F


def _angles(positions: int, width: int, base: float, device: torch.device) -> Tensor:
    """position · base^(−2i / width), [positions, width / 2] in float64: angles grow to the number of positions."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    return torch.outer(torch.arange(positions, dtype=torch.float64, device=device), base**-exponents)


class Rotation(NamedTuple):
    """Where tokens stand, for rotary position embedding of query and key; see ``fastbert.functional.rotary``."""

    cos: Tensor  # [positions, rotary_dim / 2]
    sin: Tensor  # [positions, rotary_dim / 2]
    position_ids: Tensor  # int [total]
    interleaved: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """[total, heads, head_dim], turned."""
        return F.rotary(x, self.cos, self.sin, position_ids=self.position_ids, interleaved=self.interleaved)


class _Tables(nn.Module):
    """Buffers that are computed, and computed again where a move has not kept them: from the meta device, or to fewer bits."""

    def __init__(self, positions: int, width: int, base: float) -> None:
        super().__init__()
        if positions < 1 or width < 2 or width % 2:
            raise ValueError(
                f"{type(self).__name__}: {positions} positions of width {width}; expected at least one, and an even width"
            )
        self.positions, self.width, self.base = positions, width, base

    def _fill(self, device: torch.device, dtype: torch.dtype) -> None:
        raise NotImplementedError

    def _kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the tables are in, in a module whose parameters are dtype."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = next(self.buffers())
        super()._apply(fn, recurse)
        after = next(self.buffers())
        if before.is_meta or after.dtype != before.dtype:
            self._fill(after.device, self._kept_dtype(after.dtype))
        return self

    def extra_repr(self) -> str:
        return f"positions={self.positions}, width={self.width}, base={self.base}"


class SinusoidalPositions(_Tables):
    """The fixed table of Vaswani et al. 2017, section 3.5: sines at even features, cosines at odd ones.

    Args:
        positions: rows.
        width: of a row; even.
        base: of the geometric series of wavelengths.

    Attributes:
        weight: [positions, width], no parameter and no part of the state.
    """

    weight: Tensor

    def __init__(
        self,
        positions: int,
        width: int,
        *,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(positions, width, base)
        self._fill(torch.empty(0, device=device).device, dtype or torch.get_default_dtype())

    def _fill(self, device: torch.device, dtype: torch.dtype) -> None:
        angles = _angles(self.positions, self.width, self.base, device)
        table = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
        self.register_buffer("weight", table.to(dtype), persistent=False)

    def _kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


class RotaryPositions(_Tables):
    """Angles of rotary position embedding (Su et al. 2021, RoFormer), for SelfAttention and TransformerBlock.

    One module may serve all blocks of a model. The tables stay in float32 whatever the model is cast to.

    Args:
        positions: rows; positions past them are refused.
        width: features of a head that are turned, head_dim or less; even.
        base: of the geometric series of wavelengths.
        interleaved: pairs are neighbours (GPT-J), else halves (GPT-NeoX, Llama).
    """

    cos: Tensor  # [positions, width / 2]
    sin: Tensor  # [positions, width / 2]

    def __init__(
        self,
        positions: int,
        width: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(positions, width, base)
        self.interleaved = interleaved
        self._fill(torch.empty(0, device=device).device, torch.float32)

    def _fill(self, device: torch.device, dtype: torch.dtype) -> None:
        angles = _angles(self.positions, self.width, self.base, device)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def _kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def forward(self, position_ids: Tensor) -> Rotation:
        """int [total], the tokens' positions."""
        return Rotation(self.cos, self.sin, position_ids, self.interleaved)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, interleaved={self.interleaved}"


def positions_in_sequences(cu_seqlens: Tensor, total: int) -> Tensor:
    """0, 1, … in each sequence of a packed batch: int64 [total]. Nothing synchronises."""
    starts = cu_seqlens[:-1].to(torch.int64)
    return torch.arange(total, device=cu_seqlens.device) - starts.repeat_interleave(
        cu_seqlens.diff(), output_size=total
    )
