"""The Triton layer norm kernels in Triton's interpreter: every launcher on CPU tensors, against float64."""

import pytest
import torch

from fastbert.kernels import _configs, _launch, _philox
from fastbert.kernels import layer_norm as kernels
from tests import layer_norm_checks as checks

pytestmark = pytest.mark.interpreter

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
shapes = pytest.mark.parametrize(("rows", "width"), checks.SHAPES, ids=lambda n: str(n))

#: Rows that take several blocks of columns: one more than the widest resident row of each operation.
BLOCKED_WIDTHS = {"layer_norm": 8193, "add_layer_norm": 8193}


def test_kernels_are_interpreted():
    assert _launch.INTERPRETED


@dtypes
@shapes
def test_layer_norm(rows, width, dtype):
    i = checks.inputs(rows, width, dtype)
    checks.check_layer_norm(kernels, i.x, i.weight, i.bias)
    checks.check_layer_norm_backward(kernels, i.grad_y, i.x, i.weight)


@dtypes
@shapes
def test_add_layer_norm(rows, width, dtype):
    i = checks.inputs(rows, width, dtype)
    checks.check_add_layer_norm(kernels, i, 0.1, checks.seed_tensor(-123456789012345), 4 * 1001)


@dtypes
@pytest.mark.parametrize("width", checks.WIDTHS)
def test_add_layer_norm_without_dropout(width, dtype):
    checks.check_add_layer_norm(kernels, checks.inputs(5, width, dtype), 0.0, None, 0)


@dtypes
def test_rows_wider_than_a_program(dtype):
    i = checks.inputs(2, BLOCKED_WIDTHS["layer_norm"], dtype, offset=10.0)
    checks.check_layer_norm(kernels, i.x, i.weight, i.bias)
    checks.check_layer_norm_backward(kernels, i.grad_y, i.x, i.weight)
    i = checks.inputs(3, BLOCKED_WIDTHS["add_layer_norm"], dtype)
    checks.check_add_layer_norm(kernels, i, 0.1, checks.seed_tensor(1), 0)


def test_blocked_widths_are_blocked():
    device = _launch.device_of(torch.empty(0))
    for operation, width in BLOCKED_WIDTHS.items():
        assert width > _configs.row_tile(operation, width, device).tile
        assert width - 1 <= _configs.row_tile(operation, width - 1, device).tile


@dtypes
def test_no_parameters(dtype):
    i = checks.inputs(5, 100, dtype)
    checks.check_layer_norm(kernels, i.x, None, None)
    checks.check_layer_norm(kernels, i.x, None, i.bias)
    checks.check_layer_norm_backward(kernels, i.grad_y, i.x, None)


def test_float32_parameters_of_half_precision_rows():
    i = checks.inputs(5, 100, torch.float16)
    checks.check_layer_norm(kernels, i.x, i.weight.float(), i.bias.float())
    checks.check_layer_norm_backward(kernels, i.grad_y, i.x, i.weight.float())


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e4), (torch.float32, -1e6), (torch.float16, 100.0)])
@pytest.mark.parametrize("width", [100, 1025, 8193])
def test_large_offset(dtype, offset, width):
    i = checks.inputs(3, width, dtype, offset=offset)
    checks.check_layer_norm(kernels, i.x, i.weight, i.bias)
    if width < 8193:
        checks.check_layer_norm_backward(kernels, i.grad_y, i.x, i.weight)
        checks.check_add_layer_norm(kernels, i, 0.0, None, 0)


@pytest.mark.parametrize("scale", [1e-20, 1e15], ids=["tiny", "huge"])
def test_magnitude(scale):
    i = checks.inputs(5, 384, torch.float32)
    checks.check_layer_norm(kernels, i.x * scale, i.weight, i.bias)


def test_strides():
    checks.check_strides(kernels)


@dtypes
def test_not_finite(dtype):
    checks.check_not_finite(kernels, dtype)


@dtypes
def test_deterministic(dtype):
    checks.check_deterministic(kernels, dtype, rows=19)


def test_every_subset_of_gradients():
    checks.check_needs(kernels, checks.inputs(5, 100, torch.float32))


def test_known_answer_of_philox():
    checks.check_known_answer(kernels)


@pytest.mark.parametrize(
    ("seed", "offset"),
    [(0, 0), (1, 4), (-1, 2**31 - 4), (2**40 + 7, 2**34 + 8), (-(2**63), 2**62), (5, 2**34 - 80)],
    ids=["0-0", "1-4", "minus_1-2^31", "2^40-2^34", "minus_2^63-2^62", "crosses_2^34"],  # counters are offsets / 4
)
def test_dropout_mask(seed, offset):
    checks.check_dropout_is_the_contracts(kernels, 5, 77, 0.3, checks.seed_tensor(seed), offset)


@pytest.mark.parametrize("dropout_p", [1e-12, 0.5, 1 - 1e-9, 1.0])
def test_dropout_probability(dropout_p):
    checks.check_dropout_is_the_contracts(kernels, 5, 77, dropout_p, checks.seed_tensor(3), 0)


def test_dropout_mask_of_rows_wider_than_a_program():
    checks.check_dropout_is_the_contracts(kernels, 2, BLOCKED_WIDTHS["add_layer_norm"], 0.3, checks.seed_tensor(3), 4)


def test_inputs_are_not_written():
    i = checks.inputs(5, 100, torch.float32)
    before = [tensor.clone() for tensor in vars(i).values()]
    checks.check_add_layer_norm(kernels, i, 0.3, checks.seed_tensor(3), 0)
    assert all(torch.equal(a, b) for a, b in zip(vars(i).values(), before, strict=True))


# ---------------------------------------------------------------------------------------------------------- bad input


def raises(error, match):
    return pytest.raises(error, match=match)


def test_bfloat16_is_refused():
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with raises(TypeError, "layer_norm: x is bfloat16; Triton's interpreter"):
        kernels.layer_norm(x, None, None, 1e-5, True)


def test_float64_is_refused():
    x = torch.ones(2, 4, dtype=torch.float64)
    with raises(TypeError, r"x is torch\.float64; .* Cast it, or use fastbert\.use_reference"):
        kernels.layer_norm(x, None, None, 1e-5, True)


@pytest.mark.parametrize("shape", [(1, 65537), (3, 0), ()])
def test_width_is_limited(shape):
    with raises(ValueError, "the Triton kernels take 1 to 65536"):
        kernels.layer_norm(torch.ones(shape), None, None, 1e-5, True)


def test_widest_row():
    x = torch.randn(1, 65536)
    y, _, _ = kernels.layer_norm(x, None, None, 1e-5, False)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (65536,)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("seed", "dropout_p", "offset", "message"),
    [
        (None, 0.1, 0, "seed is None"),
        (torch.zeros(1, dtype=torch.int32), 0.1, 0, "seed is torch.int32"),
        (torch.zeros(2, dtype=torch.int64), 0.1, 0, r"of shape \[2\]"),
        (torch.zeros(1, dtype=torch.int64), 1.5, 0, "dropout_p is 1.5"),
        (torch.zeros(1, dtype=torch.int64), float("nan"), 0, "dropout_p is nan"),
        (torch.zeros(1, dtype=torch.int64), 0.1, 3, "offset is 3"),
        (torch.zeros(1, dtype=torch.int64), 0.1, -4, "offset is -4"),
    ],
    ids=["no-seed", "int32-seed", "two-seeds", "p-above-1", "p-nan", "offset-3", "offset-negative"],
)
def test_bad_dropout(seed, dropout_p, offset, message):
    x = torch.ones(2, 4)
    with raises(ValueError, message):
        kernels.add_layer_norm(x, x, None, None, None, 1e-5, dropout_p, seed, offset, True)


def test_interpreted_kernels_are_not_compiled_ahead_of_time():
    device = _launch.Device("sm_90", "cuda", 132)
    with raises(RuntimeError, "TRITON_INTERPRET is set"), _launch.recorded_launches(device):
        pass


def test_threshold_and_scale():
    assert _philox.keep_threshold(0.5) == 2**31 and _philox.keep_scale(0.5) == 2.0
    assert _philox.keep_threshold(1.0) == 2**32 - 1 and _philox.keep_scale(1.0) == 0.0
    assert _philox.keep_threshold(0.0) == 0 and _philox.keep_scale(0.0) == 1.0
