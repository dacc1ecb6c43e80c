"""A transformer block for inference on a CPU that keeps nothing but what it reads: packed weights, biases and norms."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastbert.nn.block import BlockOptions, BlockWeights, as_whole
from fastbert.ops._common import wants_grad
from fastbert.ops.block import answers_directly, fixed_block, run_fixed_blocks


class InferenceBlock(nn.Module):
    """What a TransformerBlock becomes when its weights are freed, in one precision and one dtype of tokens, for good.

    It has no parameters. Training, saving, loading, moving, converting, pickling and gradients raise RuntimeError: for these load
    the model again. Copies share the memory, which nobody writes.

    Raises:
        ValueError: the C++ extension does not take the block as a whole.
    """

    def __init__(self, weights: BlockWeights, options: BlockOptions) -> None:
        super().__init__()
        self.options = options
        self.hidden_size: int = weights.out_weight.shape[0]
        self.dtype = weights.out_weight.dtype
        self._run = fixed_block(as_whole(weights, options), self.dtype)
        if self._run is None:
            raise ValueError(
                f"weights of {self.dtype} on {weights.out_weight.device} cannot be freed: that needs float32 or bfloat16 on a CPU "
                "with AVX2 or newer, the C++ extension (fastbert doctor tells what answers here), no use_reference(), and weights "
                "that were not made under inference_mode"
            )
        self.eval()

    @property
    def precision(self) -> str:
        return self.options.precision

    @precision.setter
    def precision(self, precision: str) -> None:
        if precision != self.precision:
            self.refuse(f"change its precision from {self.precision!r} to {precision!r}")

    def forward(
        self,
        x: Tensor,  # [total, hidden]
        cu_seqlens: Tensor,  # int32 [batch + 1]
        max_seqlen: int,
        attend: Any = None,
    ) -> Tensor:
        """[total, hidden]. Raises RuntimeError for gradients, caches, tracing and autocast, ValueError for another x."""
        if attend is not None:
            self.refuse("attend over a cache")
        return run_inference_blocks([self], x, cu_seqlens, max_seqlen)

    def train(self, mode: bool = True) -> "InferenceBlock":
        if mode:
            self.refuse("train")
        return super().train(mode)

    def refuse(self, what: str) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError(f"the weights of this block were freed: it cannot {what}. Load the model again for that")

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raises RuntimeError where `fn` would give another dtype or device."""
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.dtype is not self.dtype or moved.device.type != "cpu":
            self.refuse(f"become {moved.dtype} on {moved.device}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InferenceBlock":
        self.check_move(fn)
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self.refuse("be saved")

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.refuse("take other weights")

    def __copy__(self) -> "InferenceBlock":
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> "InferenceBlock":
        other = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            other.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.refuse("be pickled")

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, dtype={self.dtype}, precision={self.precision!r}"


def run_inference_blocks(
    blocks: Sequence[InferenceBlock],  # at least one
    x: Tensor,  # [total, hidden]
    cu_seqlens: Tensor,  # int32 [batch + 1]
    max_seqlen: int,
) -> Tensor:
    """All in one call, [total, hidden]; see InferenceBlock.forward."""
    first = blocks[0]
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype is not torch.int32 or cu_seqlens.dim() != 1:
        found = (
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else type(cu_seqlens).__name__
        )
        raise ValueError(f"cu_seqlens is {found}; expected int32 [batch + 1]")
    if wants_grad(x):
        first.refuse("give a gradient: call it under torch.no_grad() or torch.inference_mode()")
    if x.dtype is not first.dtype or x.dim() != 2 or x.shape[1] != first.hidden_size or x.device.type != "cpu":
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}; the blocks take {first.dtype} [total, {first.hidden_size}] on the CPU"
        )
    y = run_fixed_blocks(x.contiguous(), cu_seqlens.contiguous(), max_seqlen, [block._run for block in blocks])
    if y is None:
        if not answers_directly(x):
            first.refuse("run under autocast, a compiler, a tracer or use_reference()")
        raise ValueError(
            f"boundaries or max_seqlen, {max_seqlen!r}, do not fit: expected boundaries from 0 to {x.shape[0]}, on the CPU, no "
            "sequence longer than max_seqlen, and the instruction set that the weights were packed for"
        )
    return y
