"""The Triton RMS norm in Triton's interpreter: every launcher on CPU tensors, against float64."""

import pytest
import torch

from fastbert.kernels import rms_norm as kernels
from tests import rms_norm_checks as checks

pytestmark = pytest.mark.interpreter

#: Rows and widths that reach every branch of the kernels, which layer_norm's tests try with more.
SHAPES = ((0, 384), (1, 17), (5, 1), (5, 1000), (63, 384), (3, 1025), (2, 8193))

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@dtypes
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=str)
def test_rms_norm(rows, width, dtype):
    checks.check_rms_norm(kernels, *checks.inputs(rows, width, dtype))


@dtypes
def test_weight(dtype):
    x, grad_y, weight = checks.inputs(5, 100, dtype)
    checks.check_rms_norm(kernels, x, grad_y, None)
    checks.check_rms_norm(kernels, x, grad_y, weight.float())


@pytest.mark.parametrize("scale", [1e-15, 1e15], ids=["tiny", "huge"])
def test_magnitude(scale):
    x, grad_y, weight = checks.inputs(5, 384, torch.float32)
    checks.check_rms_norm(kernels, x * scale, grad_y, weight)


def test_strides():
    checks.check_strides(kernels)


@dtypes
def test_not_finite(dtype):
    checks.check_not_finite(kernels, dtype)


@pytest.mark.parametrize("shape", [(1, 65537), (3, 0), ()], ids=str)
def test_width_is_limited(shape):
    with pytest.raises(ValueError, match=r"rms_norm: .* the Triton kernels take 1 to 65536"):
        kernels.rms_norm(torch.ones(shape), None, 1e-6, True)
