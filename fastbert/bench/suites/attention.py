"""Attention at the lengths that people compare, against torch's own.

On a GPU against every backend of torch's SDPA and FlexAttention: 16384 tokens of 1024 features whatever the length, bf16,
forward alone and backward alone; full, causal, and packed with half of the padded positions real. On a CPU against SDPA: the
twelve heads of 64 of BERT-base, float32 and bf16, forward alone and both as in training, beside a matrix product of as many
operations. One head of one sequence is checked against float64, gradients too: heads do not see each other, so a wrong block
shows in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.bench.cases import (
    FLOOR_ULPS,
    LIMIT,
    OURS,
    PEER,
    TORCH_FACTOR,
    Case,
    CaseUnavailable,
    Check,
    Contender,
    Prepared,
    Settings,
    check_against,
    largest_error,
)
from fastbert.bench.floors import Attention, Work
from fastbert.bench.suites._common import DTYPE_NAMES, Maker, answers

_TOKENS, _FEATURES = 16384, 1024
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 16384)
_QUICK_LENGTHS = (128, 512, 4096)
_HEAD_DIMS = (64, 128)
_LONGEST_EAGER = 2048  # beyond, S² logits of 16384 tokens do not fit beside their gradient
_OURS = "fastbert"
_SDPA = {
    "torch SDPA flash": SDPBackend.FLASH_ATTENTION,
    "torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch SDPA math": SDPBackend.MATH,
}
_CPU_SDPA = {"torch SDPA": SDPBackend.FLASH_ATTENTION}  # its only one in blocks
_LIMIT = "one matrix product of as many operations"
_LIMIT_WIDTH = 1024
_CPU_TOKENS = {128: 1024, 512: 1024, 4096: 4096}  # by length
_CPU_TRAINING_TOKENS = {128: 1024, 512: 1024, 2048: 2048}
_TAKE_MASKS = ("torch SDPA cuDNN", "torch SDPA efficient", "torch SDPA math")
_FLEX = "torch FlexAttention, compiled"
if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What a case computes.

    Attributes:
        seq: tokens of a sequence, or of the longest.
        head_dim: features of a head.
        pattern: "full", "causal" or "half": packed, lengths from 1 to seq, half of the padded positions real.
        backward: the gradients of q, k and v, without the forward pass.
        training: with it.
    """

    seq: int
    head_dim: int
    pattern: str
    backward: bool
    tokens: int = _TOKENS
    features: int = _FEATURES
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    training: bool = False

    @property
    def sdpa(self) -> dict[str, SDPBackend]:
        return _SDPA if self.device == "cuda" else _CPU_SDPA

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.seq)

    @property
    def heads(self) -> int:
        return self.features // self.head_dim

    def lengths(self) -> list[int]:
        """Of the sequences; evenly spread for "half", so that their mean is (seq + 1) / 2."""
        if self.pattern != "half":
            return [self.seq] * self.batch
        if self.batch == 1:
            return [(self.seq + 1) // 2]
        return [1 + i * (self.seq - 1) // (self.batch - 1) for i in range(self.batch)]

    def work(self) -> Work:
        """Of one ideal kernel: two products forward, five backward; tensors in and out once."""
        lengths = self.lengths()
        pairs = sum(n * (n + 1) // 2 if self.pattern == "causal" else n * n for n in lengths)
        attention = Attention(sum(lengths), pairs, self.heads, self.head_dim, self.dtype.itemsize)
        forward, backward = attention.forward(), attention.backward_whole()
        if self.training:
            return Work(*(getattr(forward, x.name) + getattr(backward, x.name) for x in fields(Work)))
        return backward if self.backward else forward

    def peers(self) -> list[str]:
        if self.device == "cpu":
            return list(_CPU_SDPA)
        names = [name for name in _SDPA if self.pattern != "half" or name in _TAKE_MASKS]
        return [name for name in names if "math" not in name or self.seq <= _LONGEST_EAGER] + [_FLEX]


def cases() -> list[Case]:
    on_cpus = [
        _cpu_case(Problem(seq, 64, pattern, training, tokens, 12 * 64, dtype, "cpu", training))
        for training, sizes in ((False, _CPU_TOKENS), (True, _CPU_TRAINING_TOKENS))
        for dtype in (torch.float32, torch.bfloat16)
        for pattern in ("full", "causal", "half")
        for seq, tokens in sizes.items()
    ]
    return on_cpus + [
        _case(Problem(seq, head_dim, pattern, backward))
        for backward in (False, True)
        for head_dim in _HEAD_DIMS
        for pattern in ("full", "causal", "half")
        for seq in _LENGTHS
    ]


def _cpu_case(problem: Problem) -> Case:
    dtype = DTYPE_NAMES[problem.dtype]
    what, device = ("attention, forward and backward", "cpu-training") if problem.training else ("attention", "cpu")
    return Case(
        name=f"attention/{device}/d{problem.head_dim}-{problem.pattern}-S{problem.seq}-{dtype}",
        suite="attention",
        group=f"{what} on a CPU, {problem.pattern}, head_dim {problem.head_dim}, {dtype}",
        title=f"B{problem.batch} S{problem.seq} H{problem.heads} {dtype}",
        contenders=(_OURS, *problem.peers(), _LIMIT),
        prepare=lambda settings: _prepare_on(problem, settings),
        quick=problem.pattern == "full" and problem.seq <= 512 and not problem.training,
        budget_seconds=1.5,
        named_only=not _is_shown(problem),
        cpu_only=True,
    )


def _is_shown(problem: Problem) -> bool:
    """Whether a case for CPUs belongs to the runs that name no suite: a few of each kind are enough there."""
    if (problem.training and problem.seq != 512) or (problem.seq > 512 and problem.pattern != "full"):
        return False
    in_float32 = problem.dtype == torch.float32
    return problem.pattern == "full" or (in_float32 and (problem.pattern == "half" or not problem.training))


def _case(problem: Problem) -> Case:
    direction = "backward" if problem.backward else "forward"
    return Case(
        name=f"attention/{direction}/d{problem.head_dim}-{problem.pattern}-S{problem.seq}-bf16",
        suite="attention",
        group=f"{direction}, {problem.pattern}, head_dim {problem.head_dim}",
        title=f"B{problem.batch} S{problem.seq} H{problem.heads} {DTYPE_NAMES[problem.dtype]}",
        contenders=(_OURS, *problem.peers()),
        prepare=lambda settings: _prepare_on(problem, settings),
        quick=problem.seq in _QUICK_LENGTHS and problem.head_dim == _HEAD_DIMS[0],
        cuda_only=True,
    )


def _prepare_on(problem: Problem, settings: Settings) -> Prepared:
    if torch.device(settings.device).type != problem.device:
        needed = "a CUDA device; those for CPUs are attention/cpu" if problem.device == "cuda" else "the CPU"
        raise CaseUnavailable(f"this case needs {needed}")
    return prepare(problem, settings)


def prepare(problem: Problem, settings: Settings) -> Prepared:
    """The contenders of a problem, on any device."""
    make = Maker(settings.seed, settings.device, problem.dtype)
    shape = (problem.batch, problem.heads, problem.seq, problem.head_dim)
    q, k, v, grad = (make.normal(*shape) for _ in range(4))
    lengths = problem.lengths()
    real = torch.arange(problem.seq) < torch.tensor(lengths)[:, None]  # [batch, seq]
    real = real.to(make.device)
    checked = problem.batch - 1, lengths[-1]  # the last sequence is the longest
    causal = problem.pattern == "causal"

    def bind(function: Function, inputs: Sequence[Tensor], out_grad: Tensor) -> Callable[[], object]:
        """One call: the output, or the gradients, unless training of an output that was computed before."""
        if not problem.backward:
            return lambda: function(*inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        state: list[Tensor] = []

        def gradients() -> tuple[Tensor, ...]:
            if problem.training or not state:
                state[:] = [function(*leaves)]
            return torch.autograd.grad(state[0], leaves, out_grad, retain_graph=not problem.training)

        return gradients

    def head_of(outputs: object) -> list[Tensor]:
        """The checked head of dense results, [length, head_dim] each."""
        tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
        return [x[checked[0], 0, : checked[1]] for x in tensors]

    packed = problem.pattern == "half"
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(make.device)
        inputs = [x.transpose(1, 2)[real].contiguous() for x in (q, k, v, grad)]  # [total, heads, head_dim]
        ours = bind(_packed(ends, problem.seq), inputs[:3], inputs[3])
        start = sum(lengths[:-1])

        def convert(outputs: object) -> list[Tensor]:
            tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)  # type: ignore[call-overload]
            return [x[start:, 0] for x in tensors]

    else:
        ours = bind(_dense(causal), (q, k, v), grad)
        convert = head_of
    grad = grad * real[:, None, :, None]  # the gradient of a loss that leaves padding out

    operation = "attention_backward" if problem.backward else "attention"
    contenders = [
        Contender(_OURS, OURS, ours, implementation=answers(operation, settings.device, problem.dtype), convert=convert)
    ]
    mask = real[:, None, None, :] if packed else None
    for name in problem.peers():
        function = _flex(causal, real if packed else None) if name == _FLEX else _sdpa(problem.sdpa[name], causal, mask)
        contenders.append(Contender(name, PEER, bind(function, (q, k, v), grad), convert=head_of))

    if problem.device == "cpu":
        contenders.append(Contender(_LIMIT, LIMIT, _product(problem.work().flops, problem.dtype), checked=False))

    def one_head(dtype: torch.dtype) -> list[Tensor]:
        sequence, length = checked
        head = [x[sequence : sequence + 1, :1, :length].to(dtype).requires_grad_(problem.backward) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(head[0], head[1], head[2], is_causal=causal)
        if not problem.backward:
            return [out[0, 0]]
        gradients = torch.autograd.grad(out, head, grad[sequence : sequence + 1, :1, :length].to(dtype))
        return [x[0, 0] for x in gradients]

    def check() -> dict[str, Check]:
        # torch's own error comes from the head alone: no one backend takes every pattern on every device.
        exact = one_head(torch.float64)
        floor = FLOOR_ULPS * torch.finfo(problem.dtype).eps
        tolerance = floor + TORCH_FACTOR * largest_error(one_head(problem.dtype), exact)
        return check_against(contenders, lambda: exact, None, problem.dtype, tolerance=tolerance)

    return Prepared(
        contenders,
        problem.peers()[0],
        check,
        bytes=round(problem.work().bytes),
        flops=round(problem.work().flops),
        flops_dtype=problem.dtype,
        items=sum(lengths),
        item_unit="tokens",
        notes=["the operations counted are those of real tokens and visible pairs"],
    )


def _product(flops: float, dtype: torch.dtype) -> Callable[[], object]:
    """A product with a prepacked weight, as fast as the CPU multiplies: the rate that attention's can be a share of."""
    rows = max(1, round(flops / (2 * _LIMIT_WIDTH**2)))
    x, weight = torch.ones(rows, _LIMIT_WIDTH, dtype=dtype), torch.ones(_LIMIT_WIDTH, _LIMIT_WIDTH, dtype=dtype)
    try:  # private: what torch's own compiler calls
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        multiply = torch.ops.mkldnn._linear_pointwise
        multiply(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return lambda: F.linear(x, weight)
    return lambda: multiply(x, packed, None, "none", [], "")


def _dense(causal: bool) -> Function:
    from fastbert import functional

    return lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _packed(cu_seqlens: Tensor, longest: int) -> Function:
    from fastbert import functional

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = functional.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
        assert isinstance(out, Tensor)
        return out

    return run


def _sdpa(backend: SDPBackend, causal: bool, mask: Tensor | None) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    return run


def _flex(causal: bool, real: Tensor | None) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # imports the compiler

    compiled = torch.compile(flex_attention, dynamic=False)
    state: list[BlockMask | None] = []  # the block mask, made at the first call: it is no part of the time

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) if real is None else real[b, j]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not state:
            batch = None if real is None else q.shape[0]
            plain = not causal and real is None
            made = None if plain else create_block_mask(visible, batch, None, q.shape[2], k.shape[2], q.device.type)
            state.append(made)
        return compiled(q, k, v, block_mask=state[0])

    return run
