"""The elementwise operations and rms_norm on a GPU: the interpreter's checks on CUDA tensors, and what only a GPU can show."""

import pytest
import torch

import fastbert
from fastbert import reference
from fastbert.kernels.pack import VALUE_DTYPES
from tests import elementwise_checks as checks
from tests import rms_norm_checks
from tests.gpu_checks import check_graph, without_synchronisation
from tests.layer_norm_checks import SHAPES

pytestmark = pytest.mark.gpu

CUDA = "cuda"
operations = torch.ops.fastbert
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
shapes = pytest.mark.parametrize(("rows", "width"), [*checks.SHAPES, (1000, 4096), (3, 65537)], ids=str)
approximations = pytest.mark.parametrize("approximate", checks.APPROXIMATIONS)


def test_triton_answers():
    mine = {"bias_gelu", "gated_act", "rotary", "pack", "unpack", "rms_norm", "bias_gelu_backward", "rms_norm_backward"}
    answers = [s for s in fastbert.backends() if s.device == CUDA and s.operation in mine and s.dtype != "float64"]
    assert {s.operation for s in answers} == mine and {s.implementation for s in answers} == {"Triton"}


@dtypes
@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (63, 8192), (63, 8193), (5, 65536)], ids=str)
def test_rms_norm(rows, width, dtype):
    rms_norm_checks.check_rms_norm(operations, *rms_norm_checks.inputs(rows, width, dtype, CUDA))


@dtypes
def test_rms_norm_not_finite(dtype):
    rms_norm_checks.check_not_finite(operations, dtype, CUDA)
    rms_norm_checks.check_strides(operations, CUDA)


@dtypes
@shapes
def test_bias_gelu(rows, width, dtype):
    x, grad_y = (checks.normal(rows, width, dtype=dtype, device=CUDA, scale=2.0) for _ in range(2))
    bias = checks.normal(width, dtype=dtype, device=CUDA)
    for approximate in checks.APPROXIMATIONS:
        checks.check_bias_gelu(operations, x, bias, grad_y, approximate)
        checks.check_bias_gelu(operations, x, None, grad_y, approximate)


@dtypes
@approximations
def test_gelu_everywhere(approximate, dtype):
    checks.check_gelu_everywhere(operations, approximate, dtype, CUDA)
    checks.check_gelu_not_finite(operations, approximate, dtype, CUDA)


@dtypes
@shapes
@pytest.mark.parametrize("activation", reference.GATE_ACTIVATIONS)
def test_gated_act(rows, width, activation, dtype):
    tensors = [checks.normal(rows, width, dtype=dtype, device=CUDA, scale=3.0) for _ in range(3)]
    for gate_first in (False, True):
        checks.check_gated_act(operations, *tensors, activation, gate_first)


def test_activation_strides():
    checks.check_activation_strides(operations, CUDA)


@dtypes
def test_unaligned_rows(dtype):
    """Tensors that do not start on 16 bytes, of a width that keeps rows on them or not."""
    for width in (767, 768):
        x = checks.normal(9 * width + 1, dtype=dtype, device=CUDA)[1:].view(9, width)
        checks.check_bias_gelu(operations, x, x[0], x, "none")
        checks.check_gated_act(operations, x, x, x, "silu")
        rms_norm_checks.check_rms_norm(operations, x, x, x[0])


@dtypes
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "heads"), checks.ROTARY_HEADS, ids=str)
def test_rotary(head_dim, rotary_dim, heads, interleaved, dtype):
    for tokens in (0, 1, 1000):
        x = checks.normal(tokens, heads, head_dim, dtype=dtype, device=CUDA)
        ids = torch.randint(50, (tokens,), device=CUDA)
        if tokens:
            checks.check_rotary(operations, x, rotary_dim, ids, interleaved)
    checks.check_rotary(
        operations, checks.normal(3, 50, heads, head_dim, dtype=dtype, device=CUDA), rotary_dim, None, interleaved
    )
    checks.check_rotary_strides(operations, CUDA)


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("pattern", checks.PATTERNS)
def test_pack_and_unpack(pattern, dtype):
    for rest in ((), (33,), (768,), (2, 1500)):
        values = (torch.randn(300, *rest, device=CUDA) * 50).to(dtype)
        checks.check_pack(operations, values, checks.PATTERNS[pattern], 1)


def test_unpack_searches_many_tokens():
    """More tokens than one step of the search looks at, and than two."""
    for rows in (1000, 100_000):
        indices = torch.arange(rows, device=CUDA)[torch.rand(rows, device=CUDA) < 0.5]
        values = torch.randn(rows, 24, device=CUDA)
        padded = operations.unpack(values[indices], indices, rows, 0.0)
        real = torch.zeros(rows, dtype=torch.bool, device=CUDA).index_fill(0, indices, True)
        assert torch.equal(padded, torch.where(real[:, None], values, 0.0))


def _step(x: torch.Tensor, bias: torch.Tensor, indices: torch.Tensor, angles: torch.Tensor) -> list[torch.Tensor]:
    """Every operation once, forward and backward."""
    rows = x.shape[0]
    heads = x.view(rows, 12, -1)
    y, rstd = operations.rms_norm(x, bias, 1e-6, True)
    packed = operations.pack(x, indices)
    return [
        y,
        *operations.rms_norm_backward(x, x, rstd, bias, [True, True]),
        operations.bias_gelu(x, bias, "none"),
        *operations.bias_gelu_backward(x, x, bias, "none", [True, True]),
        operations.gated_act(x, None, "silu", False),
        operations.gated_act_backward(x[:, : x.shape[1] // 2], x, None, "silu", False, [True, False])[0],
        operations.rotary(heads, angles, angles, indices.new_zeros(rows), False, False),
        packed,
        operations.unpack(packed, indices, rows, 0.0),
    ]


@pytest.fixture
def arguments():
    generator = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(1000, 768, device=CUDA, dtype=torch.bfloat16, generator=generator)
    bias, angles = torch.randn(768, device=CUDA, dtype=torch.bfloat16), torch.rand(5, 32, device=CUDA)
    return x, bias, torch.arange(0, 1000, 3, device=CUDA), angles


def test_deterministic_and_without_synchronisation(arguments):
    first, second = _step(*arguments), without_synchronisation(lambda: _step(*arguments))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cuda_graph(arguments):
    check_graph(lambda: _step(*arguments), [lambda: None])


def test_more_than_2_31_elements():
    """Offsets pass 2**31: the last rows are right."""
    width, rows = 1024, 2**21 + 1024
    free, _ = torch.cuda.mem_get_info()
    if free < 8 * 2 * rows * width:
        pytest.skip(f"needs {8 * 2 * rows * width / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    x = torch.randn(rows, width, device=CUDA, dtype=torch.bfloat16)
    tail = slice(rows - 8, rows)
    for bias in (None, x[0].clone()):
        y = operations.bias_gelu(x, bias, "none")
        assert torch.equal(y[tail], operations.bias_gelu(x[tail], bias, "none"))
    dx, _ = operations.bias_gelu_backward(x, x, x[0].clone(), "none", [True, True])
    assert torch.equal(
        dx[tail], operations.bias_gelu_backward(x[tail], x[tail], x[0].clone(), "none", [True, False])[0]
    )
    y = operations.gated_act(x, None, "silu", False)
    assert torch.equal(y[tail], operations.gated_act(x[tail], None, "silu", False))
    angles = torch.rand(1, 32, device=CUDA)
    ids = torch.zeros(rows, dtype=torch.int64, device=CUDA)
    y = operations.rotary(x.view(rows, 16, 64), angles, angles, ids, False, False)
    assert torch.equal(y[tail], operations.rotary(x.view(rows, 16, 64)[tail], angles, angles, ids[tail], False, False))
    indices = torch.arange(0, rows, 2, device=CUDA)
    padded = operations.unpack(operations.pack(x, indices), indices, rows, 0.0)
    assert torch.equal(padded[rows - 2], x[rows - 2]) and not padded[rows - 1].any()
    assert torch.equal(
        operations.rms_norm(x, None, 1e-6, False)[0][tail], operations.rms_norm(x[tail], None, 1e-6, False)[0]
    )
