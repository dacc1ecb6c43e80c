"""The Triton softmax kernels in Triton's interpreter: every launcher on CPU tensors, against float64."""

import pytest
import torch

from fastbert.kernels import _configs, _launch
from fastbert.kernels import softmax as kernels
from tests import softmax_checks as checks

pytestmark = pytest.mark.interpreter

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dtypes
@pytest.mark.parametrize("columns", [*checks.COLUMNS, checks.WIDE])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_softmax(rows, columns, dtype):
    checks.check_softmax(kernels, checks.random(min(rows, 5) if columns > 2000 else rows, columns, dtype=dtype))


@dtypes
@pytest.mark.parametrize("columns", [17, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_masks(columns, dtype, causal):
    checks.check_masks(kernels, columns, dtype, causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_masks_of_rows_wider_than_a_program(causal):
    x = checks.random(2, 3, checks.WIDE, dtype=torch.float32)
    checks.check_softmax(kernels, x, torch.rand(2, 1, checks.WIDE) > 0.3, 0.5, causal)
    checks.check_softmax(kernels, x, torch.randn(3, checks.WIDE), 0.5, causal)


def test_wide_rows_are_wider_than_a_program():
    line = _configs.row_tile("softmax", checks.WIDE, _launch.device_of(torch.empty(0)))
    assert line.tile < checks.WIDE


@pytest.mark.parametrize("columns", [17, checks.WIDE])
def test_nothing_kept(columns):
    checks.check_nothing_kept(kernels, columns)


@pytest.mark.parametrize("columns", [17, checks.WIDE])
def test_not_finite(columns):
    checks.check_not_finite(kernels, columns)


def test_strides():
    checks.check_strides(kernels)


def test_float64_mask_of_float32():
    checks.check_softmax(kernels, checks.random(4, 17, dtype=torch.float32), torch.randn(17, dtype=torch.float64))


def test_vector():
    checks.check_softmax(kernels, checks.random(17, dtype=torch.float32))


@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.ones(2, 4, dtype=torch.float64), None, TypeError, "x is torch.float64"),
        (torch.ones(2, 4, dtype=torch.bfloat16), None, TypeError, "x is bfloat16; Triton's interpreter"),
        (torch.ones(2, 4), torch.ones(2, 4, device="meta"), ValueError, "mask is on meta"),
        (torch.ones(2, 4), torch.ones(2, 4, dtype=torch.int32), TypeError, "mask is torch.int32"),
    ],
    ids=["float64", "bfloat16", "mask-device", "mask-dtype"],
)
def test_bad_input(x, mask, error, message):
    with pytest.raises(error, match=message):
        kernels.softmax(x, mask, 1.0, False)
