"""What bias_gelu, gated_act, rotary, pack and unpack must satisfy, whatever implements them: shared by the interpreter's and the
GPU's tests. `operations` is anything with functions of the operators' names and signatures.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference
from tests.layer_norm_checks import double
from tests.numerics import assert_close_to_exact

#: Rows, and columns or pairs of them; each with its reason.
SHAPES = {
    (0, 24): "an empty batch",
    (1, 1): "a single element",
    (5, 17): "odd, below a block",
    (63, 384): "MiniLM; several tiles, the last not full",
    (3, 3072): "BERT-base; three blocks of columns",
    (2, 4097): "one over a power of two",
}


def normal(*shape: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)


# ----------------------------------------------------------------------------------------------------------- activations

APPROXIMATIONS = ("none", "tanh", "quick")


def _torchs_gelu(z: Tensor, approximate: str) -> Tensor:
    return z * torch.sigmoid(1.702 * z) if approximate == "quick" else F.gelu(z, approximate=approximate)


def check_bias_gelu(operations: Any, x: Tensor, bias: Tensor | None, grad_y: Tensor, approximate: str) -> None:
    """y, dx and dbias against float64, and every subset of the gradients."""
    y = operations.bias_gelu(x, bias, approximate)
    assert y.dtype == x.dtype and y.shape == x.shape and y.is_contiguous()
    leaf = x.detach().clone().requires_grad_()
    own = _torchs_gelu(leaf if bias is None else leaf + bias.to(x.dtype), approximate)
    (own_dx,) = torch.autograd.grad(own, leaf, grad_y)
    assert_close_to_exact(y, reference.bias_gelu(double(x), double(bias), approximate), own, "y")

    needs = [True, bias is not None]
    dx, dbias = operations.bias_gelu_backward(grad_y, x, bias, approximate, needs)
    wanted = reference.bias_gelu_backward(double(grad_y), double(x), double(bias), approximate, needs)
    assert dx.dtype == x.dtype and dx.is_contiguous() and dbias.dtype == torch.float32
    assert_close_to_exact(dx, wanted[0], own_dx, "dx")
    if bias is not None:
        own_dbias = reference.bias_gelu_backward(grad_y.float(), x.float(), bias.float(), approximate, needs)[1]
        assert_close_to_exact(dbias, wanted[1], own_dbias, "dbias")
        for needs in ([True, False], [False, True], [False, False]):
            some = operations.bias_gelu_backward(grad_y, x, bias, approximate, needs)
            for needed, actual, full in zip(needs, some, (dx, dbias), strict=True):
                assert torch.equal(actual, full) if needed else actual.shape == (0,), needs


def check_gelu_everywhere(operations: Any, approximate: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """A sweep over the numbers, tiny, large and huge, with gradient 1: the derivative itself."""
    steps = torch.linspace(-12, 12, 2401, dtype=torch.float64)
    powers = torch.logspace(-30, 4, 69, dtype=torch.float64)
    for x in (steps, steps / 16, torch.cat([powers, -powers])):
        x = x.to(device, dtype)
        check_bias_gelu(operations, x[None], None, torch.ones_like(x)[None], approximate)
    # Each tiny number for itself: beside a large one its error would not count.
    for magnitude in (1e-30, 1e-10, 1e-3) if dtype is torch.float32 else (1e-3,):
        x = torch.tensor([[magnitude, -magnitude]], device=device, dtype=dtype)
        check_bias_gelu(operations, x, None, torch.ones_like(x), approximate)


def check_gelu_not_finite(operations: Any, approximate: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """As the formula has it, and as torch on GPUs; torch's vectorised CPU kernel makes NaN of infinity."""
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, -1.0]], dtype=dtype, device=device)
    y = operations.bias_gelu(x, None, approximate)
    assert y[0, 0].isnan() and y[0, 1] == torch.inf and y[0, 2].isnan() and y[0, 3:].isfinite().all()
    bias = torch.zeros(5, dtype=dtype, device=device)
    dx, dbias = operations.bias_gelu_backward(torch.ones_like(x), x, bias, approximate, [True, True])
    assert dx[0, 0].isnan() and dbias[0].isnan() and dx[0, 3:].isfinite().all() and dbias[3:].isfinite().all()


def check_gated_act(
    operations: Any, value: Tensor, gate: Tensor, grad_y: Tensor, activation: str, gate_first: bool = False
) -> None:
    """y and both gradients against float64, from two tensors and from the halves of one: bit for bit the same."""
    y = operations.gated_act(value, gate, activation, False)
    assert y.dtype == value.dtype and y.shape == value.shape and y.is_contiguous()
    function = reference.GATE_ACTIVATIONS[activation][0]
    leaves = [t.detach().clone().requires_grad_() for t in (value, gate)]
    own = leaves[0] * function(leaves[1])
    own_gradients = torch.autograd.grad(own, leaves, grad_y)
    assert_close_to_exact(y, reference.gated_act(double(value), double(gate), activation, False), own, "y")
    gradients = operations.gated_act_backward(grad_y, value, gate, activation, False, [True, True])
    wanted = reference.gated_act_backward(double(grad_y), double(value), double(gate), activation, False, [True, True])
    for name, a, e, o in zip(("dvalue", "dgate"), gradients, wanted, own_gradients, strict=True):
        assert a.dtype == value.dtype and a.is_contiguous()
        assert_close_to_exact(a, e, o, name)
    for needs in ([True, False], [False, True]):
        some = operations.gated_act_backward(grad_y, value, gate, activation, False, needs)
        for needed, a, full in zip(needs, some, gradients, strict=True):
            assert torch.equal(a, full) if needed else a.shape == (0,)

    def joined(value: Tensor, gate: Tensor) -> Tensor:
        return torch.cat([gate, value] if gate_first else [value, gate], -1)

    both = joined(value, gate)
    assert torch.equal(operations.gated_act(both, None, activation, gate_first), y)
    dboth, nothing = operations.gated_act_backward(grad_y, both, None, activation, gate_first, [True, False])
    assert torch.equal(dboth, joined(*gradients)) and nothing.shape == (0,)


def check_activation_strides(operations: Any, device: str = "cpu") -> None:
    """Rows apart, columns apart, expanded: bit for bit what contiguous inputs give."""
    base, bias = torch.randn(8, 6, 80, device=device), torch.randn(66, device=device)[::2]
    for name, x in {
        "rows apart": base[:, 0, 1:34],
        "columns apart": base[:, 0, ::2][:, :33],
        "three dimensions, permuted": base.transpose(0, 1)[..., :33],
        "expanded rows": base[0, 0, :33].expand(7, 33),
    }.items():
        c = x.contiguous()
        for results, wanted in (
            (operations.bias_gelu(x, bias, "none"), operations.bias_gelu(c, bias.contiguous(), "none")),
            (operations.bias_gelu(x, None, "none"), operations.bias_gelu(c, None, "none")),
            (operations.gated_act(x, x, "silu", False), operations.gated_act(c, c, "silu", False)),
            (
                torch.cat([t.flatten() for t in operations.bias_gelu_backward(x, x, bias, "none", [True, True])]),
                torch.cat([t.flatten() for t in operations.bias_gelu_backward(c, c, bias, "none", [True, True])]),
            ),
            (
                operations.gated_act_backward(x, x, x, "gelu", False, [True, True])[1],
                operations.gated_act_backward(c, c, c, "gelu", False, [True, True])[1],
            ),
        ):
            assert torch.equal(results, wanted), name


# ---------------------------------------------------------------------------------------------------------------- rotary

#: head_dim, rotary_dim, heads; each with its reason.
ROTARY_HEADS = {
    (64, 64, 12): "BERT",
    (80, 32, 4): "part of the head turns",
    (70, 66, 3): "odd halves, odd heads, two features more",
    (2, 2, 1): "one pair",
    (256, 256, 2): "wide",
}


def check_rotary(operations: Any, x: Tensor, rotary_dim: int, ids: Tensor | None, interleaved: bool) -> None:
    """Both directions against float64, and back to where it came from."""
    positions = 50
    angles = torch.rand(positions, rotary_dim // 2, dtype=torch.float64) * 50
    cos, sin = angles.cos().to(x.device, torch.float32), angles.sin().to(x.device, torch.float32)
    for inverse in (False, True):
        y = operations.rotary(x, cos, sin, ids, interleaved, inverse)
        assert y.dtype == x.dtype and y.shape == x.shape and y.is_contiguous()
        exact = reference.rotary(double(x), double(cos), double(sin), ids, interleaved, inverse)
        own = reference.rotary(x, cos, sin, ids, interleaved, inverse)
        assert_close_to_exact(y, exact, own, f"inverse {inverse}")
    back = operations.rotary(operations.rotary(x, cos, sin, ids, interleaved, False), cos, sin, ids, interleaved, True)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(back, x.contiguous(), rtol=0, atol=8 * eps * float(x.abs().max()))


def check_rotary_strides(operations: Any, device: str = "cpu") -> None:
    """The query of a fused projection, heads before tokens, columns apart: bit for bit what contiguous inputs give."""
    angles = torch.rand(50, 8, device=device)
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(2, 9, 3, 4, 16, device=device)
    for name, x in {
        "fused": qkv[:, :, 1],
        "heads first": torch.randn(2, 4, 9, 16, device=device).transpose(1, 2),
        "columns apart": torch.randn(2, 9, 4, 32, device=device)[..., ::2],
        "batch expanded": qkv[:1, :, 0].expand(3, 9, 4, 16),
    }.items():
        wanted = operations.rotary(x.contiguous(), cos, sin, None, False, False)
        assert torch.equal(operations.rotary(x, cos, sin, None, False, False), wanted), name
        transposed = operations.rotary(x, cos.T.contiguous().T, sin, None, True, False)
        assert torch.equal(transposed, operations.rotary(x.contiguous(), cos, sin, None, True, False)), name


# ------------------------------------------------------------------------------------------------------- pack and unpack

#: Real rows of 300.
PATTERNS = {
    "none": [],
    "all": list(range(300)),
    "first": [0],
    "last": [299],
    "left": list(range(170, 300)),
    "a long gap": [3, 4, 5, 290],
    "every third": list(range(0, 300, 3)),
}


def check_pack(operations: Any, values: Tensor, rows: list[int], padding_value: float) -> None:
    """pack and unpack move the elements, bit for bit as indexing does. `values` is [300, ...]."""
    indices = torch.tensor(rows, dtype=torch.int64, device=values.device)
    packed = operations.pack(values, indices)
    assert packed.is_contiguous() and torch.equal(packed, values[indices])
    padded = operations.unpack(values[: len(rows)], indices, 300, padding_value)
    wanted = torch.full_like(values, padding_value, memory_format=torch.contiguous_format)
    wanted[indices] = values[: len(rows)]
    assert padded.is_contiguous() and padded.dtype == values.dtype and torch.equal(padded, wanted)
