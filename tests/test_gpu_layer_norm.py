"""The layer norm operators on a GPU: the interpreter's checks on CUDA tensors, and what only a GPU can show."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert import reference
from tests import layer_norm_checks as checks
from tests.gpu_checks import check_graph, without_synchronisation

pytestmark = pytest.mark.gpu

CUDA = "cuda"
operations = torch.ops.fastbert
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
WIDTHS = [*checks.WIDTHS, 1024, 4096, 4097, 8192, 8193, 12288, 65536]


def test_triton_answers():
    answers = [s for s in fastbert.backends() if s.device == "cuda" and s.operation in ("layer_norm", "add_layer_norm")]
    assert {s.implementation for s in answers if s.dtype != "float64"} == {"Triton"}


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5, 63, 1000])
def test_layer_norm(rows, width, dtype):
    i = checks.inputs(rows, width, dtype, CUDA)
    checks.check_layer_norm(operations, i.x, i.weight, i.bias)
    checks.check_layer_norm_backward(operations, i.grad_y, i.x, i.weight)


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5, 63, 1000])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_add_layer_norm(rows, width, dtype, dropout_p):
    seed = checks.seed_tensor(-123456789012345, CUDA) if dropout_p else None
    checks.check_add_layer_norm(operations, checks.inputs(rows, width, dtype, CUDA), dropout_p, seed, 4 * 1001)


@dtypes
def test_parameters(dtype):
    i = checks.inputs(5, 100, dtype, CUDA)
    checks.check_layer_norm(operations, i.x, None, None)
    checks.check_layer_norm(operations, i.x, i.weight.float(), i.bias.float())
    checks.check_layer_norm_backward(operations, i.grad_y, i.x, None)


@pytest.mark.parametrize("offset", [1e4, -1e6])
@pytest.mark.parametrize("width", [100, 1025, 8193])
def test_large_offset(offset, width):
    i = checks.inputs(63, width, torch.float32, CUDA, offset=offset)
    checks.check_layer_norm(operations, i.x, i.weight, i.bias)


def test_strides():
    checks.check_strides(operations, CUDA)


@dtypes
def test_unaligned_rows(dtype):
    """A tensor that does not start on 16 bytes, of a width that does not keep rows on them."""
    for width in (767, 768):
        flat = torch.randn(9 * width + 1, device=CUDA).to(dtype)
        x = flat[1:].view(9, width)
        checks.check_layer_norm(operations, x, flat[1 : width + 1], None)
        checks.check_layer_norm_backward(operations, x, x, flat[1 : width + 1])


@dtypes
def test_not_finite(dtype):
    checks.check_not_finite(operations, dtype, CUDA)


@dtypes
@pytest.mark.parametrize("rows", [63, 16384])
def test_deterministic(dtype, rows):
    checks.check_deterministic(operations, dtype, CUDA, rows)


def test_every_subset_of_gradients():
    checks.check_needs(operations, checks.inputs(63, 768, torch.bfloat16, CUDA))


def test_known_answer_of_philox():
    checks.check_known_answer(operations, CUDA)


@pytest.mark.parametrize("width", [4, 77, 768, 8193])
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-1, 2**31 - 4), (2**40 + 7, 2**34 + 8), (-(2**63), 2**62)])
def test_dropout_mask(width, seed, offset):
    checks.check_dropout_is_the_contracts(operations, 37, width, 0.3, checks.seed_tensor(seed, CUDA), offset)


@dtypes
def test_public_functions_and_their_gradients(dtype):
    i = checks.inputs(63, 768, dtype, CUDA)
    x, weight, bias = (tensor.detach().requires_grad_() for tensor in (i.x, i.weight, i.bias))
    y = fastbert.functional.layer_norm(x, (768,), weight, bias)
    y.backward(i.grad_y)
    own = [tensor.detach().requires_grad_() for tensor in (i.x, i.weight, i.bias)]
    own_y = F.layer_norm(own[0], (768,), own[1], own[2])
    own_y.backward(i.grad_y)
    exact = [tensor.detach().double().requires_grad_() for tensor in (i.x, i.weight, i.bias)]
    exact_y = F.layer_norm(exact[0], (768,), exact[1], exact[2])
    exact_y.backward(i.grad_y.double())
    checks.assert_close_to_exact(y, exact_y, own_y, "y")
    for name, mine, wanted, torchs in zip(("x", "weight", "bias"), (x, weight, bias), exact, own, strict=True):
        checks.assert_close_to_exact(mine.grad, wanted.grad, torchs.grad, f"gradient of {name}")


def test_cuda_graph_replays_with_a_new_seed():
    """Forward and backward are captured once; the seed is read when the graph runs, not when it is captured."""
    i = checks.inputs(63, 768, torch.bfloat16, CUDA)
    seed = checks.seed_tensor(1, CUDA)

    def step():
        y, total, mean, rstd = operations.add_layer_norm(
            i.x, i.residual, i.x_bias, i.weight, i.bias, checks.EPS, 0.1, seed, 8, True
        )
        gradients = operations.add_layer_norm_backward(
            i.grad_y, i.grad_sum, total, mean, rstd, i.weight, 0.1, seed, 8, [True] * 5
        )
        return y, total, mean, rstd, *gradients

    changes = [functools.partial(seed.fill_, value) for value in (1, 2, -3)]
    sums = [replay[1] for replay in check_graph(step, changes)]
    assert not torch.equal(sums[0], sums[1]) and not torch.equal(sums[1], sums[2])


def test_no_host_synchronisation():
    i = checks.inputs(63, 768, torch.float32, CUDA)
    seed = checks.seed_tensor(1, CUDA)

    def step():
        _, total, mean, rstd = operations.add_layer_norm(
            i.x, i.residual, i.x_bias, i.weight, i.bias, checks.EPS, 0.1, seed, 0, True
        )
        return operations.add_layer_norm_backward(i.grad_y, None, total, mean, rstd, i.weight, 0.1, seed, 0, [True] * 5)

    without_synchronisation(step)


def test_more_than_2_31_elements():
    """Offsets pass 2**31: the last rows are right, in the values, the dropout mask and the gradient."""
    width, rows = 1024, 2**21 + 1024  # 2**31 + 2**20 elements
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * 2 * rows * width:
        pytest.skip(f"needs {10 * 2 * rows * width / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    x = torch.randn(rows, width, device=CUDA, dtype=torch.bfloat16)
    seed = checks.seed_tensor(11, CUDA)
    y, total, mean, rstd = operations.add_layer_norm(x, x, None, None, None, checks.EPS, 0.5, seed, 0, True)
    dx, d_sum, _, _, _ = operations.add_layer_norm_backward(
        x, None, total, mean, rstd, None, 0.5, seed, 0, [True, True, False, False, False]
    )
    last = slice(rows - 8, rows)
    offset = (rows - 8) * width
    tail = x[last].double()
    exact = reference.add_layer_norm(tail, tail, None, None, None, checks.EPS, 0.5, seed, offset, True)
    torch.testing.assert_close(y[last].double(), exact[0], atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(total[last].double(), exact[1], atol=1e-2, rtol=1e-2)
    exact = reference.add_layer_norm_backward(
        tail, None, total[last].double(), mean[last].double(), rstd[last].double(), None, 0.5, seed, offset, [True] * 5
    )
    torch.testing.assert_close(dx[last].double(), exact[0], atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(d_sum[last].double(), exact[1], atol=1e-2, rtol=1e-2)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    i = checks.inputs(5, 768, torch.float32, "cuda:1")
    checks.check_layer_norm(operations, i.x, i.weight, i.bias)


def test_cpu_tensors_are_refused_by_the_kernels():
    from fastbert.kernels import layer_norm as kernels

    with pytest.raises(ValueError, match="x is on cpu; the Triton kernels take cuda tensors"):
        kernels.layer_norm(torch.ones(2, 4), None, None, 1e-5, True)
