"""bias_gelu, gated_act, rotary, pack and unpack in Triton's interpreter: every launcher on CPU tensors, against float64."""

import pytest
import torch

from fastbert import reference
from fastbert.kernels import gated_act, gelu, pack, rotary
from tests import elementwise_checks as checks

pytestmark = pytest.mark.interpreter

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
approximations = pytest.mark.parametrize("approximate", checks.APPROXIMATIONS)
shapes = pytest.mark.parametrize(("rows", "width"), checks.SHAPES, ids=str)


class Activations:
    """The launchers of two files as one."""

    bias_gelu, bias_gelu_backward = staticmethod(gelu.bias_gelu), staticmethod(gelu.bias_gelu_backward)
    gated_act, gated_act_backward = staticmethod(gated_act.gated_act), staticmethod(gated_act.gated_act_backward)


@dtypes
@shapes
def test_bias_gelu(rows, width, dtype):
    x, grad_y = (checks.normal(rows, width, dtype=dtype, scale=2.0) for _ in range(2))
    bias = checks.normal(width, dtype=dtype)
    checks.check_bias_gelu(gelu, x, bias, grad_y, "none")
    checks.check_bias_gelu(gelu, x, None, grad_y, "tanh")


@dtypes
@approximations
def test_gelu_everywhere(approximate, dtype):
    checks.check_gelu_everywhere(gelu, approximate, dtype)
    checks.check_gelu_not_finite(gelu, approximate, dtype)


def test_float32_bias_of_half_precision_rows():
    x, bias = checks.normal(5, 100, dtype=torch.float16), checks.normal(100, dtype=torch.float32)
    checks.check_bias_gelu(gelu, x, bias, x, "none")


@dtypes
@shapes
def test_gated_act(rows, width, dtype):
    tensors = (checks.normal(rows, width, dtype=dtype, scale=2.0) for _ in range(3))
    checks.check_gated_act(gated_act, *tensors, "silu")


@pytest.mark.parametrize("gate_first", [False, True], ids=["gate-second", "gate-first"])
@pytest.mark.parametrize("activation", reference.GATE_ACTIVATIONS)
def test_gate_activations(activation, gate_first):
    tensors = (checks.normal(5, 100, dtype=torch.float32, scale=3.0) for _ in range(3))
    checks.check_gated_act(gated_act, *tensors, activation, gate_first)


def test_activation_strides():
    checks.check_activation_strides(Activations)


def test_gate_that_is_not_finite():
    gate = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]])
    for activation, (function, _) in reference.GATE_ACTIVATIONS.items():
        y = gated_act.gated_act(torch.ones_like(gate), gate, activation, False)
        wanted = function(gate.double())
        if activation.startswith("gelu"):
            wanted[0, 1] = torch.inf  # where torch's vectorised kernel gives NaN, its CUDA kernel does not
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf()), activation


@dtypes
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "heads"), checks.ROTARY_HEADS, ids=str)
def test_rotary(head_dim, rotary_dim, heads, interleaved, dtype):
    packed = checks.normal(17, heads, head_dim, dtype=dtype)
    checks.check_rotary(rotary, packed, rotary_dim, torch.randint(50, (17,)), interleaved)
    dense = checks.normal(2, 9, heads, head_dim, dtype=dtype)
    checks.check_rotary(rotary, dense, rotary_dim, None, interleaved)


def test_rotary_strides():
    checks.check_rotary_strides(rotary)


@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 0, 5, 16), (2, 3, 0, 16)], ids=str)
def test_rotary_of_nothing(shape):
    table = torch.ones(5, 8)
    assert rotary.rotary(torch.ones(shape), table, table, None, False, False).shape == shape


def test_rotary_of_no_feature():
    x, table = torch.randn(4, 2, 8).transpose(0, 1), torch.ones(5, 0)
    y = rotary.rotary(x, table, table, torch.zeros(2, dtype=torch.int32), False, False)
    assert torch.equal(y, x) and y.is_contiguous()


def test_rotary_reads_nothing_outside_the_tables():
    x, angles = torch.randn(3, 1, 4), torch.rand(5, 2)
    y = rotary.rotary(x, angles.cos(), angles.sin(), torch.tensor([-7, 4, 9]), False, False)
    clamped = torch.tensor([0, 4, 4])
    torch.testing.assert_close(y, reference.rotary(x, angles.cos(), angles.sin(), clamped, False, False))


@pytest.mark.parametrize("pattern", checks.PATTERNS)
def test_pack_and_unpack(pattern):
    checks.check_pack(pack, torch.randn(300, 33), checks.PATTERNS[pattern], -1.5)


@pytest.mark.parametrize("dtype", [t for t in pack.VALUE_DTYPES if t is not torch.bfloat16], ids=str)
def test_pack_moves_any_element(dtype):
    for rest in ((), (2, 3)):
        values = torch.randint(2, (300, *rest)).to(dtype)
        checks.check_pack(pack, values, checks.PATTERNS["every third"], 1)


def test_pack_strided_and_empty():
    checks.check_pack(pack, torch.randn(50, 300).T[:, ::2], checks.PATTERNS["left"], 0.0)
    assert pack.pack(torch.randn(300, 0), torch.tensor([1, 2])).shape == (2, 0)
    assert pack.unpack(torch.randn(0, 3), torch.zeros(0, dtype=torch.int64), 0, 0.0).shape == (0, 3)


def test_indices_outside_the_batch_read_nothing():
    assert pack.pack(torch.ones(4, 3), torch.tensor([-1, 2, 4])).sum(1).tolist() == [0, 3, 0]


def test_repeated_indices_read_nothing_outside():
    """Which of a row's tokens it gets is nobody's promise; that it is one of the packed batch's is."""
    padded = pack.unpack(torch.ones(4, 3), torch.tensor([0, 2, 2, 2]), 4, 0.0)
    assert padded.sum(1).tolist() == [3, 0, 3, 0]


def test_what_the_kernels_do_not_take_is_refused():
    with pytest.raises(TypeError, match=r"bias_gelu: x is torch\.float64"):
        gelu.bias_gelu(torch.ones(2, 4, dtype=torch.float64), None, "none")
    with pytest.raises(TypeError, match=r"gated_act: gate is bfloat16; Triton's interpreter"):
        gated_act.gated_act(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bfloat16), "silu", False)
    with pytest.raises(ValueError, match="head_dim is 1026; the Triton kernel takes at most 1024"):
        rotary.rotary(torch.ones(1, 1, 1026), torch.ones(1, 2), torch.ones(1, 2), None, False, False)
    with pytest.raises(TypeError, match=r"pack: the values are torch\.complex64"):
        pack.pack(torch.ones(3, dtype=torch.complex64), torch.tensor([1]))
