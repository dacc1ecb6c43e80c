"""Arguments for every operator, small and odd: the table that opcheck and the self-consistency tests run over.

A new operation adds its rows here; test_registry.py fails for an operator without any.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from fastbert.reference import wide_dtype

Arguments = tuple[Any, ...]


def seed(value: int = 7) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


def cu_seqlens(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _layer_norm(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w, b = torch.randn(3, 5, 17, dtype=dtype), torch.randn(17, dtype=dtype), torch.randn(17, dtype=dtype)
    yield "3x5x17", (x, w, b, 1e-5, True)
    yield "no-parameters", (x, None, None, 1e-5, False)
    yield "no-rows", (x[:0], w, b, 1e-5, True)
    yield "strided", (torch.randn(6, 40, dtype=dtype)[::2, :17], w, None, 1e-5, True)


def _layer_norm_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w = torch.randn(4, 17, dtype=dtype), torch.randn(17, dtype=dtype)
    _, mean, rstd = reference.layer_norm(x, w, None, 1e-5, True)
    yield "all", (torch.randn_like(x), x, mean, rstd, w, [True, True, True])
    yield "dx-only", (torch.randn_like(x), x, mean, rstd, None, [True, False, False])
    yield "no-rows", (x[:0], x[:0], mean[:0], rstd[:0], w, [True, True, True])


def _add_layer_norm(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, r = torch.randn(5, 18, dtype=dtype), torch.randn(5, 18, dtype=dtype)
    w, b, x_bias = (torch.randn(18, dtype=dtype) for _ in range(3))
    yield "dropout", (x, r, x_bias, w, b, 1e-5, 0.3, seed(), 8, True)
    yield "no-dropout", (x, r, None, w, b, 1e-5, 0.0, None, 0, False)
    yield "no-sum", (x, r, None, w, b, 1e-5, 0.0, None, 0, False, False)
    yield "no-rows", (x[:0], r[:0], x_bias, w, b, 1e-5, 0.3, seed(), 0, True)


def _add_layer_norm_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, r, w = torch.randn(5, 18, dtype=dtype), torch.randn(5, 18, dtype=dtype), torch.randn(18, dtype=dtype)
    _, total, mean, rstd = reference.add_layer_norm(x, r, None, w, None, 1e-5, 0.3, seed(), 0, True)
    grads = torch.randn_like(x), torch.randn_like(x)
    yield "dropout", (*grads, total, mean, rstd, w, 0.3, seed(), 0, [True] * 5)
    yield "no-dropout", (grads[0], None, total, mean, rstd, w, 0.0, None, 0, [True, False, True, False, True])


def _rms_norm(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w = torch.randn(3, 5, 17, dtype=dtype), torch.randn(17, dtype=dtype)
    yield "3x5x17", (x, w, 1e-6, True)
    yield "no-weight", (x, None, 1e-6, False)
    yield "no-rows", (x[:0], w, 1e-6, True)
    yield "strided", (torch.randn(6, 40, dtype=dtype)[::2, :17], w, 1e-6, True)


def _rms_norm_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w = torch.randn(4, 17, dtype=dtype), torch.randn(17, dtype=dtype)
    _, rstd = reference.rms_norm(x, w, 1e-6, True)
    yield "all", (torch.randn_like(x), x, rstd, w, [True, True])
    yield "dx-only", (torch.randn_like(x), x, rstd, None, [True, False])
    yield "no-rows", (x[:0], x[:0], rstd[:0], w, [True, True])


def _linear_act(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w, b = torch.randn(2, 3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype), torch.randn(5, dtype=dtype)
    for activation in reference.ACTIVATIONS:
        yield activation, (x, w, b, activation, True)
    yield "no-bias", (x, w, None, "gelu", False)


def _linear_act_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w = torch.randn(2, 3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    _, pre = reference.linear_act(x, w, None, "gelu", True)
    yield "gelu", (torch.randn_like(pre), x, w, pre, "gelu", [True, True, True])
    yield "none", (torch.randn_like(pre), x, w, x.new_empty(0), "none", [True, False, True])


def _linear_residual(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w = torch.randn(2, 3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    yield "bias", (x, w, torch.randn(5, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype))
    yield "no-bias", (x, w, None, torch.randn(2, 3, 5, dtype=dtype))


def _linear_reduced(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w, b = torch.randn(2, 3, 9, dtype=dtype), torch.randn(5, 9, dtype=dtype), torch.randn(5, dtype=dtype)
    for precision in reference.PRECISIONS:
        yield precision, (x, w, b, "gelu", torch.randn(2, 3, 5, dtype=dtype), precision, dtype)
    yield "wider", (x, w, None, "none", None, "bf16", torch.float32)


def attention_masks(
    *,
    cu: Tensor | None = None,
    longest: int = 0,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = False,
    dropout_p: float = 0.0,
) -> Arguments:
    """The operator's arguments from cu_seqlens_q to offset."""
    key = seed() if dropout_p else None
    return (
        cu,
        cu,
        longest,
        longest,
        attn_mask,
        key_padding_mask,
        alibi,
        0.4,
        *window,
        bottom_right,
        dropout_p,
        key,
        0,
    )


def _attention_inputs(dtype: torch.dtype) -> Iterator[tuple[str, Arguments, Arguments]]:
    q, k, v = (torch.randn(2, h, s, 8, dtype=dtype) for h, s in ((4, 5), (2, 7), (2, 7)))
    key_mask = torch.rand(2, 7) > 0.4
    yield "dense", (q, k, v), attention_masks()
    yield "dense-transposed", (q.mT.contiguous().mT, k, v), attention_masks(dropout_p=0.2)
    masks = attention_masks(attn_mask=torch.randn(4, 5, 7, dtype=dtype), key_padding_mask=key_mask, window=(3, 0))
    yield "dense-masks", (q, k, v), masks
    packed = tuple(torch.randn(9, h, 8, dtype=dtype) for h in (4, 2, 2))
    lengths = cu_seqlens(4, 0, 5)
    yield "packed", packed, attention_masks(cu=lengths, longest=5, bottom_right=True)
    masks = attention_masks(
        cu=lengths,
        longest=5,
        attn_mask=torch.randn(1, 5, 5, dtype=dtype),
        alibi=torch.rand(3, 4),
        window=(2, 0),
        bottom_right=True,
        dropout_p=0.2,
    )
    yield "packed-masks", packed, masks


def _attention(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    for name, qkv, masks in _attention_inputs(dtype):
        yield name, (*qkv, *masks, True)
        yield f"{name}-no-lse", (*qkv, *masks, False)


def _attention_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    for name, qkv, masks in _attention_inputs(dtype):
        out, lse = reference.attention(*qkv, *masks, True)
        yield name, (torch.randn_like(out), *qkv, out, lse, *masks, masks[4] is not None, True)


def _attention_decode(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    q, k, v = (
        torch.randn(3, 2, 4, 8, dtype=dtype),
        torch.randn(3, 6, 2, 8, dtype=dtype),
        torch.randn(3, 6, 2, 8, dtype=dtype),
    )
    lengths = torch.tensor([6, 2, 0], dtype=torch.int32)
    yield "plain", (q, k, v, lengths, None, 0.4, -1)
    yield "window-alibi", (q, k, v, lengths, torch.rand(4), 0.4, 2)


def _bias_gelu(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, b = torch.randn(3, 9, dtype=dtype), torch.randn(9, dtype=dtype)
    for approximate in ("none", "tanh", "quick"):
        yield approximate, (x, b, approximate)
    yield "transposed", (torch.randn(9, 3, dtype=dtype).T, None, "none")


def _bias_gelu_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, b = torch.randn(3, 9, dtype=dtype), torch.randn(9, dtype=dtype)
    yield "both", (torch.randn_like(x), x, b, "tanh", [True, True])
    yield "dx", (torch.randn_like(x), x, None, "none", [True, False])


def _gated_act(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    both, other = torch.randn(3, 2, 10, dtype=dtype), torch.randn(3, 2, 5, dtype=dtype)
    for activation in reference.GATE_ACTIVATIONS:
        yield activation, (both, None, activation, False)
    yield "gate-first", (both, None, "gelu", True)
    yield "two", (both[..., 3:8], other, "silu", False)
    yield "no-rows", (both[:0], None, "silu", False)


def _gated_act_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    both, other, grad = (torch.randn(3, n, dtype=dtype) for n in (10, 5, 5))
    for activation in reference.GATE_ACTIVATIONS:
        yield activation, (grad, both, None, activation, False, [True, False])
    yield "gate-first", (grad, both, None, "gelu", True, [True, False])
    yield "two", (grad, both[:, 3:8], other, "silu", False, [True, True])
    yield "dgate", (grad, both[:, :5], other, "gelu", False, [False, True])


def _softmax(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x = torch.randn(2, 3, 5, dtype=dtype)
    yield "plain", (x, None, 1.0, False)
    yield "masks", (x, torch.rand(2, 1, 5) > 0.5, 0.7, True)
    yield "strided", (torch.randn(3, 5, 2, dtype=dtype).mT, torch.randn(3, 1, 1, dtype=dtype), 0.7, False)
    yield "no-rows", (x[:0], None, 1.0, False)


def _softmax_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    y = torch.softmax(torch.randn(2, 3, 5, dtype=dtype), -1)
    yield "plain", (torch.randn_like(y), y, 0.7)


def _embedding_inputs(dtype: torch.dtype) -> Arguments:
    ids = torch.randint(11, (2, 4))
    types, tables = torch.randint(2, (2, 4)), [torch.randn(n, 6, dtype=dtype) for n in (11, 4, 2)]
    return (ids, torch.arange(4).expand(2, 4), types, *tables)


def _embedding(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    inputs, w, b = _embedding_inputs(dtype), torch.randn(6, dtype=dtype), torch.randn(6, dtype=dtype)
    yield "all", (*inputs, w, b, 1e-12, 0.1, seed(), 0, True)
    yield "words-only", (inputs[0], None, None, inputs[3], None, None, w, b, 1e-12, 0.0, None, 0, False)


def _embedding_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    inputs, w = _embedding_inputs(dtype), torch.randn(6, dtype=dtype)
    y, mean, rstd = reference.embedding_layer_norm(*inputs, w, None, 1e-12, 0.0, None, 0, True)
    yield "all", (torch.randn_like(y), *inputs, mean, rstd, w, 0.1, seed(), 0, 0, [True] * 5)
    yield "words", (torch.randn_like(y), *inputs, mean, rstd, w, 0.0, None, 0, -1, [True] + [False] * 4)
    none = (inputs[0][:0], None, None, inputs[3], None, None)
    yield "no-rows", (torch.randn_like(y)[:0], *none, mean[:0], rstd[:0], w, 0.0, None, 0, 0, [True] * 5)


_LABELS = torch.tensor([3, -100, 0, 10, 5])


def _cross_entropy(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    yield "smoothed", (torch.randn(5, 11, dtype=dtype), _LABELS, -100, 0.1)


def _cross_entropy_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    z = torch.randn(5, 11, dtype=dtype)
    losses, lse = reference.cross_entropy(z, _LABELS, -100, 0.1)
    yield "smoothed", (torch.randn_like(losses), z, _LABELS, lse, -100, 0.1)


def _cross_entropy_backward_in_place(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    z = torch.randn(5, 14, dtype=dtype)[:, :11]
    losses, lse = reference.cross_entropy(z, _LABELS, -100, 0.1)
    yield "rows-apart", (torch.randn_like(losses), z, _LABELS, lse, -100, 0.1)


def _linear_cross_entropy(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w, b = torch.randn(5, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype), torch.randn(11, dtype=dtype)
    yield "bias", (x, w, b, _LABELS, -100, 0.1)
    yield "no-labels", (x, w, None, torch.full_like(_LABELS, -100), -100, 0.0)


def _linear_cross_entropy_backward(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    x, w, b = torch.randn(5, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype), torch.randn(11, dtype=dtype)
    losses, lse = reference.linear_cross_entropy(x, w, b, _LABELS, -100, 0.1)
    yield "all", (torch.randn_like(losses), x, w, b, _LABELS, lse, -100, 0.1, [True, True, True])
    yield "dx", (torch.randn_like(losses), x, w, None, _LABELS, lse, -100, 0.1, [True, False, False])


def _rotary(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    angles = torch.rand(9, 3).to(wide_dtype(torch.empty(0, dtype=dtype)))
    yield "dense", (torch.randn(2, 5, 3, 8, dtype=dtype), angles.cos(), angles.sin(), None, False, False)
    ids = torch.randint(9, (5,))
    yield "packed", (torch.randn(5, 3, 6, dtype=dtype), angles.cos(), angles.sin(), ids, True, True)


_ROWS = torch.tensor([0, 1, 4, 6])


def _pack(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    yield "two-dimensions", (torch.randn(7, 2, 3, dtype=dtype), _ROWS)
    yield "vector", (torch.randn(7, dtype=dtype), _ROWS)
    yield "integers", (torch.randint(9, (7, 2)), _ROWS)
    yield "strided", (torch.randn(3, 7, dtype=dtype).T, _ROWS)
    yield "nothing", (torch.randn(7, 3, dtype=dtype), _ROWS[:0])


def _unpack(dtype: torch.dtype) -> Iterator[tuple[str, Arguments]]:
    yield "two-dimensions", (torch.randn(4, 2, 3, dtype=dtype), _ROWS, 9, 0)
    yield "vector", (torch.randn(4, dtype=dtype), _ROWS, 7, -1.5)
    yield "integers", (torch.randint(9, (4, 2)), _ROWS, 7, -100)
    yield "nothing", (torch.randn(0, 3, dtype=dtype), _ROWS[:0], 7, 2.0)


SAMPLES: dict[str, Callable[[torch.dtype], Iterator[tuple[str, Arguments]]]] = {
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "add_layer_norm": _add_layer_norm,
    "add_layer_norm_backward": _add_layer_norm_backward,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "linear_act": _linear_act,
    "linear_act_backward": _linear_act_backward,
    "linear_reduced": _linear_reduced,
    "linear_residual": _linear_residual,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_decode": _attention_decode,
    "bias_gelu": _bias_gelu,
    "bias_gelu_backward": _bias_gelu_backward,
    "gated_act": _gated_act,
    "gated_act_backward": _gated_act_backward,
    "softmax": _softmax,
    "softmax_backward": _softmax_backward,
    "embedding_layer_norm": _embedding,
    "embedding_layer_norm_backward": _embedding_backward,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "cross_entropy_backward_": _cross_entropy_backward_in_place,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_backward": _linear_cross_entropy_backward,
    "rotary": _rotary,
    "pack": _pack,
    "unpack": _unpack,
}


def all_samples(dtype: torch.dtype) -> list[tuple[str, str, Arguments]]:
    """(operator, case, arguments) of the whole table."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(1)
    rows = [(name, case, arguments) for name, make in SAMPLES.items() for case, arguments in make(dtype)]
    torch.set_rng_state(generator_state)
    return rows
