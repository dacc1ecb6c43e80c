"""Every public function against torch's own in float64, forward and gradient; gradcheck; compile; export; autocast.

Each case is a pair of functions of the same tensors: ours, and what a user would have written with torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

import fastbert
from fastbert import functional as F
from fastbert import packing
from tests.numerics import assert_close_to_exact
from tests.samples import cu_seqlens

torch._dynamo.config.recompile_limit = 64


@dataclass
class Case:
    name: str
    inputs: Callable[[], list[Tensor]]  # float64; the differentiable ones
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]


def _normal(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(s, dtype=torch.float64) for s in shapes]


LABELS = torch.tensor([3, -100, 0, 10, 5, 5])
IDS = torch.tensor([[1, 4, 4, 0], [9, 2, 0, 3]])
TYPES = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
POSITIONS = torch.arange(4).expand(2, 4)
KEYS = torch.tensor([[True, True, False, True, False, True, True], [True] * 3 + [False] * 4])
LENGTHS = (5, 0, 1, 3)
CU = cu_seqlens(*LENGTHS)


def _torch_add_layer_norm(x, r, x_bias, w, b):
    total = r + x + x_bias
    return torch.cat((TF.layer_norm(total, total.shape[-1:], w, b), total), -1)


def _torch_embedding(word, position, token_type, w, b):
    total = TF.embedding(IDS, word) + position[POSITIONS] + token_type[TYPES]
    return TF.layer_norm(total, total.shape[-1:], w, b, 1e-12)


def _torch_varlen(q, k, v, causal=False, window=(-1, -1), slopes=None, bias=None):
    """Sequence by sequence, with an additive mask spelled out."""
    outputs = []
    group = q.shape[1] // k.shape[1]
    for a, b in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        n = b - a
        distance = torch.arange(n) - torch.arange(n)[:, None]
        mask = torch.zeros(q.shape[1], n, n, dtype=q.dtype)
        if slopes is not None:
            mask = mask - slopes.to(q.dtype)[:, None, None] * distance.abs()
        if bias is not None:
            mask = mask + bias[:, :n, :n]
        hidden = torch.zeros(n, n, dtype=torch.bool)
        if causal:
            hidden |= distance > 0
        if window[0] >= 0:
            hidden |= distance < -window[0]
        if window[1] >= 0:
            hidden |= distance > window[1]
        mask = mask.masked_fill(hidden, -torch.inf)
        qs, ks, vs = (x[a:b].transpose(0, 1) for x in (q, k, v))
        ks, vs = ks.repeat_interleave(group, 0), vs.repeat_interleave(group, 0)
        logits = qs @ ks.mT / q.shape[-1] ** 0.5 + mask
        outputs.append((logits.softmax(-1) @ vs).transpose(0, 1))
    return torch.cat(outputs)


def _varlen(q, k, v, bias=None, **kwargs):
    return F.varlen_attention(q, k, v, CU, CU, 5, 5, bias=bias, **kwargs)


def _torch_rotary(x, angles, interleaved):
    """The definition: pairs as complex numbers times exp(i · angle)."""
    n, dtype = angles.shape[-1], x.dtype
    x, angles = (t.double() if dtype == torch.float64 else t.float() for t in (x, angles))
    turned, kept = x[..., : 2 * n], x[..., 2 * n :]
    pairs = turned.unflatten(-1, (n, 2)) if interleaved else turned.unflatten(-1, (2, n)).mT
    z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)[:, None]
    back = torch.view_as_real(z)
    back = back.flatten(-2) if interleaved else back.mT.flatten(-2)
    return torch.cat((back, kept), -1).to(dtype)


def _torch_gated(value, gate, act):
    return value * act(gate)


ANGLES = torch.rand(6, 3, dtype=torch.float64) * 6
ACTS = {
    "none": lambda z: z,
    "relu": TF.relu,
    "gelu": TF.gelu,
    "gelu_tanh": lambda z: TF.gelu(z, approximate="tanh"),
    "gelu_quick": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": TF.silu,
    "tanh": torch.tanh,
}
GATES = {name: ACTS[name] for name in ("gelu", "gelu_tanh", "gelu_quick", "silu", "relu")}
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.1])
DENSE = _normal((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
GROUPED = _normal((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
PACKED = _normal((9, 4, 8), (9, 2, 8), (9, 2, 8))

CASES = [
    Case(
        "layer_norm",
        _normal((3, 5, 17), (17,), (17,)),
        lambda x, w, b: F.layer_norm(x, 17, w, b),
        lambda x, w, b: TF.layer_norm(x, (17,), w, b),
    ),
    Case(
        "layer_norm-two-dimensions",
        _normal((3, 4, 6), (4, 6), (4, 6)),
        lambda x, w, b: F.layer_norm(x, (4, 6), w, b, 1e-3),
        lambda x, w, b: TF.layer_norm(x, (4, 6), w, b, 1e-3),
    ),
    Case(
        "layer_norm-bare",
        _normal((7, 33)),
        lambda x: F.layer_norm(x, (33,)),
        lambda x: TF.layer_norm(x, (33,)),
    ),
    Case(
        "rms_norm",
        _normal((3, 5, 17), (17,)),
        lambda x, w: F.rms_norm(x, 17, w, 1e-3),
        lambda x, w: TF.rms_norm(x, (17,), w, 1e-3),
    ),
    Case("rms_norm-bare", _normal((7, 4, 6)), lambda x: F.rms_norm(x, (4, 6)), lambda x: TF.rms_norm(x, (4, 6))),
    Case(
        "add_layer_norm",
        _normal((3, 5, 17), (3, 5, 17), (17,), (17,), (17,)),
        lambda x, r, xb, w, b: torch.cat(F.add_layer_norm(x, r, w, b, x_bias=xb), -1),
        _torch_add_layer_norm,
    ),
    Case(
        "add_layer_norm-no-sum",
        _normal((3, 5, 17), (3, 5, 17), (17,)),
        lambda x, r, w: F.add_layer_norm(x, r, w, return_sum=False),
        lambda x, r, w: TF.layer_norm(x + r, (17,), w),
    ),
    *(
        Case(
            f"linear_act-{name}",
            _normal((4, 3, 8), (5, 8), (5,)),
            lambda x, w, b, name=name: F.linear_act(x, w, b, name),
            lambda x, w, b, act=act: act(TF.linear(x, w, b)),
        )
        for name, act in ACTS.items()
    ),
    Case(
        "linear_residual",
        _normal((4, 3, 8), (5, 8), (5,), (4, 3, 5)),
        F.linear_residual,
        lambda x, w, b, r: TF.linear(x, w, b) + r,
    ),
    *(
        Case(
            f"bias_gelu-{how}",
            _normal((4, 9), (9,)),
            lambda x, b, how=how: F.bias_gelu(x, b, how),
            lambda x, b, how=how: ACTS[{"none": "gelu", "tanh": "gelu_tanh", "quick": "gelu_quick"}[how]](x + b),
        )
        for how in ("none", "tanh", "quick")
    ),
    Case("gelu", _normal((4, 9)), F.gelu, TF.gelu),
    *(
        Case(
            f"gated_act-{name}{'-gate-first' if gate_first else ''}",
            _normal((4, 3, 18)),
            lambda x, name=name, first=gate_first: F.gated_act(x, activation=name, gate_first=first),
            lambda x, act=act, first=gate_first: _torch_gated(*x.chunk(2, -1)[:: -1 if first else 1], act),
        )
        for name, act in GATES.items()
        for gate_first in (False, True)
    ),
    Case("geglu", _normal((5, 7), (5, 7)), F.geglu, lambda x, gate: _torch_gated(x, gate, TF.gelu)),
    Case("swiglu", _normal((5, 7), (5, 7)), F.swiglu, lambda x, gate: _torch_gated(x, gate, TF.silu)),
    Case("glu", _normal((5, 14)), F.gated_act, TF.glu),
    Case("softmax", _normal((3, 4, 9)), F.softmax, lambda x: x.softmax(-1)),
    Case("softmax-dim", _normal((3, 4, 9)), lambda x: F.softmax(x, 1), lambda x: x.softmax(1)),
    Case(
        "softmax-additive-causal",
        _normal((2, 3, 5, 5), (3, 1, 5)),
        lambda x, m: F.softmax(x, mask=m, scale=0.3, causal=True),
        lambda x, m: (0.3 * x + m).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1),
    ),
    Case(
        "softmax-bool",
        _normal((2, 3, 7)),
        lambda x: F.softmax(x, mask=KEYS[:, None], scale=2.0),
        lambda x: (2 * x).masked_fill(~KEYS[:, None], -torch.inf).softmax(-1),
    ),
    Case("attention", DENSE, F.scaled_dot_product_attention, TF.scaled_dot_product_attention),
    Case(
        "attention-causal",
        DENSE,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2),
        lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2),
    ),
    Case(
        "attention-grouped",
        GROUPED,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    ),
    Case(
        "attention-three-dimensions",
        _normal((4, 5, 8), (4, 7, 8), (4, 7, 6)),
        F.scaled_dot_product_attention,
        TF.scaled_dot_product_attention,
    ),
    Case(
        "attention-additive-mask",
        lambda: [*DENSE(), torch.randn(4, 1, 7, dtype=torch.float64)],
        F.scaled_dot_product_attention,
        TF.scaled_dot_product_attention,
    ),
    Case(
        "attention-key-padding",
        DENSE,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, key_padding_mask=KEYS),
        lambda q, k, v: TF.scaled_dot_product_attention(q, k, v, KEYS[:, None, None]),
    ),
    Case(
        "attention-window",
        DENSE,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, window=(2, 1)),
        lambda q, k, v: TF.scaled_dot_product_attention(
            q, k, v, torch.ones(5, 7, dtype=torch.bool).tril(1) & torch.ones(5, 7, dtype=torch.bool).triu(-2)
        ),
    ),
    Case("varlen", PACKED, _varlen, _torch_varlen),
    Case(
        "varlen-causal",
        PACKED,
        lambda q, k, v: _varlen(q, k, v, causal=True),
        lambda q, k, v: _torch_varlen(q, k, v, causal=True),
    ),
    Case(
        "varlen-window-alibi-bias",
        lambda: [*PACKED(), torch.randn(4, 5, 5, dtype=torch.float64)],
        lambda q, k, v, bias: _varlen(q, k, v, bias, window_size=(2, 1), alibi_slopes=SLOPES),
        lambda q, k, v, bias: _torch_varlen(q, k, v, window=(2, 1), slopes=SLOPES, bias=bias),
    ),
    Case(
        "embedding_layer_norm",
        _normal((10, 6), (4, 6), (2, 6), (6,), (6,)),
        lambda word, position, token_type, w, b: F.embedding_layer_norm(
            IDS, word, position, token_type, w, b, position_ids=POSITIONS, token_type_ids=TYPES
        ),
        _torch_embedding,
    ),
    Case(
        "cross_entropy",
        _normal((6, 11)),
        lambda z: F.cross_entropy(z, LABELS),
        lambda z: TF.cross_entropy(z, LABELS),
    ),
    Case(
        "cross_entropy-smoothed",
        _normal((6, 11)),
        lambda z: F.cross_entropy(z, LABELS.clamp_min(0), ignore_index=5, label_smoothing=0.2, reduction="none"),
        lambda z: TF.cross_entropy(z, LABELS.clamp_min(0), ignore_index=5, label_smoothing=0.2, reduction="none"),
    ),
    Case(
        "linear_cross_entropy",
        _normal((6, 8), (11, 8), (11,)),
        lambda x, w, b: F.linear_cross_entropy(x, w, LABELS, b, reduction="sum", label_smoothing=0.1),
        lambda x, w, b: TF.cross_entropy(TF.linear(x, w, b), LABELS, reduction="sum", label_smoothing=0.1),
    ),
    *(
        Case(
            f"rotary-{'interleaved' if interleaved else 'halves'}",
            _normal((6, 2, 8)),
            lambda x, i=interleaved: F.rotary(
                x, ANGLES.cos(), ANGLES.sin(), position_ids=torch.arange(6), interleaved=i
            ),
            lambda x, i=interleaved: _torch_rotary(x, ANGLES, i),
        )
        for interleaved in (False, True)
    ),
    Case(
        "pack",
        _normal((4, 5, 3)),
        lambda x: packing.pack(x, lengths=LENGTHS).values,
        lambda x: x[torch.arange(5) < torch.tensor(LENGTHS)[:, None]],
    ),
    Case(
        "unpack",
        _normal((9, 3)),
        lambda x: packing.unpack(packing.PackedBatch.from_lengths(x, LENGTHS), padding_value=2.0),
        lambda x: torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True, padding_value=2.0),
    ),
]
BY_NAME = {case.name: case for case in CASES}
parametrize_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def _run(function, inputs, grad=None):
    """The result and the gradients of the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    grad = torch.ones_like(y) if grad is None else grad.to(y.dtype)
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=["fp32", "bf16", "fp16", "fp64"]
)
@parametrize_cases
def test_result_and_gradients_against_float64(case, dtype):
    rounded = [x.to(dtype) for x in case.inputs()]
    exact_inputs = [x.double() for x in rounded]
    grad = torch.randn_like(case.torchs(*exact_inputs)).to(dtype).double()
    exact = _run(case.torchs, exact_inputs, grad)
    own = _run(case.torchs, rounded, grad)
    ours = _run(case.ours, rounded, grad)
    names = ["result", *(f"gradient {i}" for i in range(len(rounded)))]
    for name, a, e, o in zip(names, ours, exact, own, strict=True):
        # Losses are float32 for half inputs, which torch's are not.
        assert a.dtype == o.dtype or (name == "result" and a.dtype == torch.float32), name
        assert_close_to_exact(a, e, o, f"{case.name} {name}", floor_ulps=8)


@parametrize_cases
def test_gradcheck(case):
    inputs = [x.requires_grad_() for x in case.inputs()]
    assert torch.autograd.gradcheck(case.ours, inputs, fast_mode=False)


@parametrize_cases
def test_without_gradients_the_result_is_the_same(case):
    inputs = [x.float() for x in case.inputs()]
    with_graph = case.ours(*[x.clone().requires_grad_() for x in inputs])
    with torch.no_grad():
        without = case.ours(*inputs)
    assert not without.requires_grad
    torch.testing.assert_close(without, with_graph.detach(), rtol=2e-6, atol=2e-6)


@parametrize_cases
def test_compiled_in_one_graph(case):
    inputs = [x.float() for x in case.inputs()]
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    for a, b in zip(_run(compiled, inputs), _run(case.ours, inputs), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), case.ours(*inputs))


def test_compiled_with_one_tensor_as_several_arguments():
    q, x = torch.randn(9, 4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    w = torch.randn(8, 8)
    for function, tensor in (
        (lambda q: _varlen(q, q, q), q),
        (lambda x: F.add_layer_norm(x, x)[0], x),
        (lambda x: F.linear_residual(x, w, None, x), x),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(_run(compiled, [tensor]), _run(function, [tensor]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name",
    [
        "layer_norm",
        "rms_norm",
        "geglu",
        "pack",
        "unpack",
        "add_layer_norm",
        "linear_act-gelu",
        "attention",
        "varlen",
        "embedding_layer_norm",
    ],
)
def test_exported(name):
    case = BY_NAME[name]
    inputs = [x.float() for x in case.inputs()]

    class Module(torch.nn.Module):
        def forward(self, *xs):
            return case.ours(*xs)

    with torch.no_grad():
        program = torch.export.export(Module(), tuple(inputs))
        torch.testing.assert_close(program.module()(*inputs), case.ours(*inputs))
    assert any("fastbert" in str(node.target) for node in program.graph.nodes)


def test_autocast_casts_products_and_keeps_norms_in_their_input_dtype():
    x, w = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    gamma = torch.ones(6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear_act(x, w, None, "gelu")
        z = F.layer_norm(y, 6, gamma)
        q = torch.randn(2, 4, 5, 8)
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        assert F.layer_norm(x, 8).dtype == torch.float32
        loss = F.linear_cross_entropy(z, torch.randn(11, 6), torch.tensor([1, 2, 3, 4]))
    assert (y.dtype, z.dtype, loss.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    loss.backward()
    assert w.grad.dtype == torch.float32 and gamma.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = TF.gelu(TF.linear(x, w))
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [1, 17, 63, 64, 65, 127, 128, 129, 768, 1000])
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e15])
def test_layer_norm_at_odd_widths_and_magnitudes(width, magnitude):
    x = torch.randn(5, width) * magnitude
    args = (torch.randn(width), torch.randn(width))
    exact = TF.layer_norm(x.double(), (width,), *(a.double() for a in args))
    assert_close_to_exact(F.layer_norm(x, width, *args), exact, TF.layer_norm(x, (width,), *args), "y")


def test_layer_norm_with_a_large_offset_keeps_torchs_accuracy():
    x = torch.randn(16, 768) + 1e4
    exact = TF.layer_norm(x.double(), (768,))
    assert_close_to_exact(F.layer_norm(x, 768), exact, TF.layer_norm(x, (768,)), "y")


def test_nan_and_inf_rows_stay_alone():
    x = torch.randn(4, 24)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = F.layer_norm(x, 24)
    assert y[1].isnan().all() and y[2].isnan().all() and y[[0, 3]].isfinite().all()


def test_float32_parameters_on_bfloat16_activations():
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    w, b = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    y = F.layer_norm(x, 64, w, b)
    exact = TF.layer_norm(x.double(), (64,), w.double(), b.double())
    assert y.dtype == torch.bfloat16
    assert_close_to_exact(y, exact, what="y", floor_ulps=1)
    y.sum().backward()
    assert w.grad.dtype == torch.float32


def test_fully_masked_rows_give_zeros_and_zero_gradients():
    q, k, v = (torch.randn(2, 2, 3, 8, requires_grad=True) for _ in range(3))
    keys = torch.tensor([[True, False, True], [False, False, False]])
    out = F.scaled_dot_product_attention(q, k, v, key_padding_mask=keys)
    assert not out[1].any() and out[0].any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() and not x.grad[1].any() for x in (q, k, v))
    with torch.no_grad():
        assert not F.scaled_dot_product_attention(q, k, v, key_padding_mask=keys)[1].any()
    assert not F.softmax(torch.randn(1, 4), mask=torch.zeros(1, 4, dtype=torch.bool)).any()


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_nan_flows_through_attention_as_in_the_specification(which, packed):
    inputs = [torch.randn(9, 4, 8) for _ in range(3)] if packed else [torch.randn(2, 4, 7, 8) for _ in range(3)]
    inputs[which][1, 0, 3] = torch.nan
    run = _varlen if packed else F.scaled_dot_product_attention
    with torch.no_grad():
        out = run(*inputs)
        with fastbert.use_reference():
            expected = run(*inputs)
    assert expected.isnan().any() and torch.equal(out.isnan(), expected.isnan())


def test_a_row_masked_by_the_least_number_attends_evenly():
    """As in the formula; torch's CPU kernel is off by the number of keys in such a row's gradient."""
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(4, 4)
    mask[2] = torch.finfo(torch.float32).min
    for a, b in zip(
        _run(lambda *x: F.scaled_dot_product_attention(*x, mask), [q, k, v]),
        _run(lambda q, k, v: (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v, [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_varlen_lse_and_queries_without_keys():
    q, k = torch.randn(5, 2, 8), torch.randn(3, 2, 8)
    cu_q, cu_k = cu_seqlens(3, 2), cu_seqlens(3, 0)
    out, lse = F.varlen_attention(q, k, k, cu_q, cu_k, 3, 3, return_lse=True)
    assert not out[3:].any() and (lse[:, 3:] == -torch.inf).all()
    expected = torch.logsumexp(torch.einsum("qhd,khd->hqk", q[:3], k) / 8**0.5, -1)
    torch.testing.assert_close(lse[:, :3], expected)
    assert torch.equal(F.varlen_attention(q, k, k, cu_q, cu_k, 3, 3)[3:], torch.zeros(2, 2, 8))


def test_varlen_causal_is_aligned_at_the_end():
    q, k = torch.randn(2, 1, 8), torch.randn(5, 1, 8)
    out = F.varlen_attention(q, k, k, cu_seqlens(2), cu_seqlens(5), 2, 5, causal=True)
    logits = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
    logits[:, 0, 4] = -torch.inf
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", logits.softmax(-1), k))


@pytest.mark.parametrize("window_left", [-1, 2])
def test_decode_equals_full_causal_attention(window_left):
    lengths, capacity = [7, 3, 5], 9
    q = torch.randn(3, 2, 4, 8)
    k, v = torch.full((3, capacity, 2, 8), torch.nan), torch.full((3, capacity, 2, 8), torch.nan)
    for i, n in enumerate(lengths):
        k[i, :n], v[i, :n] = torch.randn(n, 2, 8), torch.randn(n, 2, 8)
    out, lse = F.attention_decode(
        q, k, v, torch.tensor(lengths, dtype=torch.int32), window_left=window_left, return_lse=True
    )
    for i, n in enumerate(lengths):
        expected, expected_lse = F.varlen_attention(
            q[i],
            k[i, :n],
            v[i, :n],
            cu_seqlens(2),
            cu_seqlens(n),
            2,
            n,
            causal=True,
            window_size=(window_left, 0),
            return_lse=True,
        )
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(lse[i], expected_lse)


def test_the_padding_row_of_the_word_table_gets_no_gradient():
    word = torch.randn(10, 6, requires_grad=True)
    F.embedding_layer_norm(IDS, word, padding_idx=0).square().sum().backward()
    with_padding, word.grad = word.grad, None
    F.embedding_layer_norm(IDS, word).square().sum().backward()
    assert not with_padding[0].any() and word.grad[0].any()
    assert torch.equal(with_padding[1:], word.grad[1:])


def test_cross_entropy_in_place_overwrites_the_logits_and_nothing_reads_them_unnoticed():
    z = torch.randn(6, 11, requires_grad=True)
    logits = z * 2
    memory = logits.data_ptr()
    logits.retain_grad()
    loss = F.cross_entropy(logits[:, 2:], LABELS.clamp_max(8), inplace_backward=True)
    entropy = logits.square().sum()  # saves the logits for a backward pass of its own
    loss.backward(retain_graph=True)
    expected = torch.autograd.grad(TF.cross_entropy((z * 2)[:, 2:], LABELS.clamp_max(8)), z)[0]
    torch.testing.assert_close(z.grad, expected)
    torch.testing.assert_close(logits.detach()[:, 2:], expected[:, 2:] / 2)
    assert logits.data_ptr() == memory
    for again in (loss, entropy):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


def test_cross_entropy_in_place_in_a_compiled_graph():
    def loss(z):
        return F.cross_entropy(z * 2, LABELS, inplace_backward=True)

    z = torch.randn(6, 11)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(_run(compiled, [z]), _run(loss, [z]), strict=True):
        torch.testing.assert_close(a, b)


def test_cross_entropy_in_place_after_the_logits_changed():
    logits = torch.randn(6, 11, requires_grad=True) * 2
    loss = F.cross_entropy(logits, LABELS, inplace_backward=True)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("module", "dtype"),
    [("fastbert.reference.losses", torch.float64), ("fastbert.cpu.cross_entropy", torch.float32)],
    ids=["reference", "C++"],
)
def test_linear_cross_entropy_never_makes_all_logits(monkeypatch, module, dtype):
    losses = pytest.importorskip(module)
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 3 * 11)
    seen = []
    linear = TF.linear
    monkeypatch.setattr(losses.F, "linear", lambda *a: seen.append(linear(*a)) or seen[-1])
    x, w = torch.randn(20, 8, dtype=dtype), torch.randn(11, 8, dtype=dtype)
    target = torch.arange(20) % 11
    target[::2] = -100
    loss = F.linear_cross_entropy(x, w, target)
    assert max(s.shape[0] for s in seen) == 3 and sum(s.shape[0] for s in seen) == 10
    torch.testing.assert_close(loss, TF.cross_entropy(x @ w.T, target))
