"""A small problem of every operation, forward and backward, against the reference in float64.

`fastbert doctor` runs them on every device of a machine. They take a second together, and answer one question: is what this
installation computes right? The tests of the repository ask many more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastbert
from fastbert import functional, packing
from fastbert.bench.cases import first_line, largest_error

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# Of the largest value of a result. A wrong kernel is wrong by far more; rounding stays far below, sums here are short.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
_EPS = 1e-5
_WIDTH = 72  # no power of two, no multiple of the widest vectors


@dataclass(frozen=True)
class Problem:
    """One operation. `function` takes the floating tensors of `make`, of any dtype and device, and closes over nothing else."""

    operation: str  # a name of the registry; its backward is tested along
    variant: str
    function: Function
    shapes: tuple[tuple[int, ...], ...]  # of the floating tensors
    backward: str | None  # the registry's name of its gradient; None: it has none of its own


@dataclass(frozen=True)
class Outcome:
    operation: str
    variant: str
    device: str
    dtype: str
    direction: str  # "forward" or "backward"
    implementation: str
    error: float | None
    tolerance: float
    message: str  # why it failed, when it raised

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def _ids(like: Tensor, high: int, *shape: int) -> Tensor:
    """The same pseudo-random integers for every dtype and device."""
    count = torch.tensor(shape).prod().item()
    return (torch.arange(count) * 7919 % 104729 % high).reshape(shape).to(like.device)


def _add_layer_norm(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return functional.add_layer_norm(x, residual, weight, bias, _EPS, x_bias=x_bias)


def _add_layer_norm_dropout(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    seed = torch.tensor([1234567890123], device=x.device)
    return functional.add_layer_norm(x, residual, weight, bias, _EPS, dropout_p=0.25, seed=seed)


def _softmax(x: Tensor) -> Tensor:
    mask = _ids(x, 3, *x.shape[-2:]) > 0
    return functional.softmax(x, mask=mask, scale=0.5)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, ...]:
    cu_seqlens = torch.tensor([0, 5, 5, 22, 40], dtype=torch.int32, device=q.device)  # one sequence is empty
    return functional.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 18, 18)


def _attention_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor | tuple[Tensor, ...]:
    lengths = torch.tensor([1, 9, 24], dtype=torch.int32, device=q.device)
    return functional.attention_decode(q, k_cache, v_cache, lengths)


def _embedding_layer_norm(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    ids, types = _ids(word, word.shape[0], 3, 16), _ids(word, 2, 3, 16)
    positions = torch.arange(16, device=word.device).expand(3, 16)
    return functional.embedding_layer_norm(
        ids, word, position, token_type, weight, bias, _EPS, position_ids=positions, token_type_ids=types
    )


def _rotary(x: Tensor) -> Tensor:
    rates = 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * rates
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = torch.arange(x.shape[0], device=x.device)
    return functional.rotary(
        x, angles.cos().to(x.device, dtype), angles.sin().to(x.device, dtype), position_ids=positions
    )


_LENGTHS = [5, 0, 17, 9]


def _pack(padded: Tensor) -> Tensor:
    return packing.pack(padded, lengths=_LENGTHS).values


def _unpack(values: Tensor) -> Tensor:
    return packing.unpack(packing.PackedBatch.from_lengths(values, _LENGTHS))


def _cross_entropy(logits: Tensor) -> Tensor:
    target = _ids(logits, logits.shape[1], logits.shape[0])
    target[3] = -100
    return functional.cross_entropy(logits, target, label_smoothing=0.1)


def _cross_entropy_in_place(logits: Tensor) -> Tensor:
    target = _ids(logits, logits.shape[1], logits.shape[0])
    return functional.cross_entropy(logits * 1.0, target, inplace_backward=True)  # a leaf would be refused


def _linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    target = _ids(x, weight.shape[0], x.shape[0])
    target[::2] = -100
    return functional.linear_cross_entropy(x, weight, target, bias)


PROBLEMS = (
    Problem(
        "layer_norm",
        "",
        lambda x, weight, bias: functional.layer_norm(x, (_WIDTH,), weight, bias, _EPS),
        ((37, _WIDTH), (_WIDTH,), (_WIDTH,)),
        "layer_norm_backward",
    ),
    Problem(
        "add_layer_norm",
        "with bias",
        _add_layer_norm,
        ((37, _WIDTH), (37, _WIDTH), (_WIDTH,), (_WIDTH,), (_WIDTH,)),
        "add_layer_norm_backward",
    ),
    Problem(
        "add_layer_norm",
        "with dropout",
        _add_layer_norm_dropout,
        ((37, _WIDTH), (37, _WIDTH), (_WIDTH,), (_WIDTH,)),
        "add_layer_norm_backward",
    ),
    Problem(
        "linear_act",
        "gelu",
        lambda x, weight, bias: functional.linear_act(x, weight, bias, "gelu"),
        ((37, 48), (_WIDTH, 48), (_WIDTH,)),
        "linear_act_backward",
    ),
    Problem(
        "linear_act",
        "packed weight",
        lambda x, weight, bias: functional.linear_act(x, torch.nn.Parameter(weight, False), bias, "gelu"),
        ((37, 48), (_WIDTH, 48), (_WIDTH,)),
        None,
    ),
    Problem(
        "linear_reduced",
        "bf16",
        lambda x, weight, bias: functional.linear_act(x, weight, bias, "gelu", precision="bf16"),
        ((37, 48), (_WIDTH, 48), (_WIDTH,)),
        None,
    ),
    Problem(
        "linear_reduced",
        "int8",
        lambda x, weight, bias: functional.linear_act(x, weight, bias, "gelu", precision="int8"),
        ((37, 48), (_WIDTH, 48), (_WIDTH,)),
        None,
    ),
    Problem(
        "linear_residual",
        "",
        functional.linear_residual,
        ((37, 48), (_WIDTH, 48), (_WIDTH,), (37, _WIDTH)),
        "linear_act_backward",
    ),
    Problem("bias_gelu", "", functional.bias_gelu, ((37, _WIDTH), (_WIDTH,)), "bias_gelu_backward"),
    Problem("gated_act", "GEGLU", functional.geglu, ((37, 2 * _WIDTH),), "gated_act_backward"),
    Problem("gated_act", "SwiGLU of two tensors", functional.swiglu, ((37, _WIDTH),) * 2, "gated_act_backward"),
    Problem(
        "rms_norm",
        "",
        lambda x, weight: functional.rms_norm(x, _WIDTH, weight, _EPS),
        ((37, _WIDTH), (_WIDTH,)),
        "rms_norm_backward",
    ),
    Problem("pack", "", _pack, ((4, 17, _WIDTH),), "unpack"),
    Problem("unpack", "", _unpack, ((31, _WIDTH),), "pack"),
    Problem("softmax", "masked", _softmax, ((2, 3, 17, 33),), "softmax_backward"),
    Problem("attention", "dense, causal", _dense_attention, ((2, 3, 17, 16),) * 3, "attention_backward"),
    Problem("attention", "packed", _varlen_attention, ((40, 3, 16),) * 3, "attention_backward"),
    Problem("attention_decode", "", _attention_decode, ((3, 1, 4, 16), (3, 24, 2, 16), (3, 24, 2, 16)), None),
    Problem(
        "embedding_layer_norm",
        "",
        _embedding_layer_norm,
        ((50, _WIDTH), (16, _WIDTH), (2, _WIDTH), (_WIDTH,), (_WIDTH,)),
        "embedding_layer_norm_backward",
    ),
    Problem("rotary", "", _rotary, ((19, 3, 24),), "rotary"),
    Problem("cross_entropy", "smoothed", _cross_entropy, ((23, 101),), "cross_entropy_backward"),
    Problem("cross_entropy", "in place", _cross_entropy_in_place, ((23, 101),), "cross_entropy_backward_"),
    Problem(
        "linear_cross_entropy",
        "",
        _linear_cross_entropy,
        ((23, 48), (101, 48), (101,)),
        "linear_cross_entropy_backward",
    ),
)


def covered() -> set[str]:
    """Names of the registry that the problems reach."""
    return {each.operation for each in PROBLEMS} | {each.backward for each in PROBLEMS if each.backward is not None}


def devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def run(problem: Problem, device: str) -> Iterator[Outcome]:
    """Forward and backward in float32 and bfloat16 (and float16 on GPUs)."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in problem.shapes]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = [each.to(device, dtype) for each in tensors]
        yield from _compare(problem, device, dtype, rounded)


def _compare(problem: Problem, device: str, dtype: torch.dtype, tensors: Sequence[Tensor]) -> Iterator[Outcome]:
    def outcome(direction: str, error: float | None, message: str = "") -> Outcome:
        operation = problem.operation if direction == "forward" else problem.backward
        name = str(dtype).removeprefix("torch.")
        return Outcome(
            operation or problem.operation,
            problem.variant,
            device,
            name,
            direction,
            _implementation(operation or problem.operation, device, name),
            error if error is None or error != float("inf") else None,
            TOLERANCES[dtype],
            message if error != float("inf") else "the result is not finite, or has another shape",
        )

    wide = [each.double() for each in tensors]
    for direction, compute in (("forward", _forward), ("backward", _gradients)):
        if direction == "backward" and problem.backward is None:
            continue
        try:
            with fastbert.use_reference():
                expected = compute(problem, wide)
            yield outcome(direction, largest_error(compute(problem, tensors), expected))
        except Exception as error:  # whatever a broken installation raises is what the doctor reports
            yield outcome(direction, None, first_line(error))


def _forward(problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _outputs(problem, tensors)


def _outputs(problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
    found = problem.function(*tensors)
    return [found] if isinstance(found, Tensor) else list(found)


def _gradients(problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in tensors]
    outputs = _outputs(problem, leaves)
    # Small integers: exact in every dtype, so that both sides pull with the same gradient.
    grads = [
        (_ids(each, 7, *each.shape) - 3).to(each.dtype) if each.dim() else torch.ones_like(each) for each in outputs
    ]
    return list(torch.autograd.grad(outputs, leaves, grads))


def _implementation(operation: str, device: str, dtype: str) -> str:
    from fastbert.bench.suites._common import answers

    return answers(operation, device, getattr(torch, dtype))
