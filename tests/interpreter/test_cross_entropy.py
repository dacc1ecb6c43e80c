"""The Triton kernels of the losses in Triton's interpreter: every launcher on CPU tensors, against float64."""

import itertools
import types

import pytest
import torch

from fastbert.kernels import _launch, _loss_configs, cross_entropy, linear_cross_entropy, linear_cross_entropy_backward
from tests import cross_entropy_checks as checks

pytestmark = pytest.mark.interpreter

kernels = types.SimpleNamespace(
    **(vars(cross_entropy) | vars(linear_cross_entropy) | vars(linear_cross_entropy_backward))
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
smoothings = pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothed"])


@dtypes
@smoothings
@pytest.mark.parametrize("classes", checks.CLASSES)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_cross_entropy(rows, classes, smoothing, dtype):
    target = checks.labels(rows, classes)
    checks.check_cross_entropy(kernels, checks.logits_of(rows, classes, dtype), target, smoothing)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(offset):
    """Only the difference to the largest counts: the loss is as exact as torch's, which subtracts it first."""
    logits = checks.logits_of(5, 1000, torch.float32, offset=offset)
    target = torch.randint(1000, (5,))
    losses, _ = kernels.cross_entropy(logits, target, checks.IGNORED, 0.0)
    exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    own = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    checks.assert_close_to_exact(losses, exact, own, "losses")


def test_not_finite():
    checks.check_not_finite(kernels)


def test_targets_outside_the_classes_read_nothing_else():
    checks.check_targets_outside_the_classes_read_nothing_else(kernels)


def test_in_place_wants_neighbouring_columns():
    logits = torch.randn(17, 3).T
    with pytest.raises(ValueError, match=r"strides \(1, 3\)"):
        kernels.cross_entropy_backward_(
            torch.ones(3), logits, torch.zeros(3, dtype=torch.int64), torch.ones(3), -100, 0.0
        )


#: rows, hidden, classes, share of rows with a label: one of each; odd; several chunks, splits and tiles; none; all.
LINEAR = [(1, 8, 2, 1.0), (37, 17, 70, 0.5), (150, 64, 200, 0.6), (40, 16, 33, 0.0), (70, 48, 65, 1.0), (0, 8, 5, 1.0)]


@dtypes
@pytest.mark.parametrize(("rows", "hidden", "classes", "labelled"), LINEAR)
def test_linear_cross_entropy(rows, hidden, classes, labelled, dtype):
    x, weight, bias, target = checks.linear_inputs(rows, hidden, classes, dtype, labelled=labelled)
    checks.check_linear_cross_entropy(kernels, x, weight, bias, target)


@dtypes
def test_linear_cross_entropy_without_bias_and_smoothing(dtype):
    x, weight, _, target = checks.linear_inputs(37, 17, 70, dtype)
    checks.check_linear_cross_entropy(kernels, x, weight, None, target, 0.0)


def test_no_features():
    """The logits are the bias."""
    bias, target = torch.randn(70), checks.labels(30, 70, "cpu", 0.5)
    x, weight = torch.empty(30, 0), torch.empty(70, 0)
    losses, lse = kernels.linear_cross_entropy(x, weight, bias, target, checks.IGNORED, 0.1)
    wanted = kernels.cross_entropy(bias.expand(30, 70), target, checks.IGNORED, 0.1)
    torch.testing.assert_close((losses, lse), wanted)
    grad = torch.ones(30)
    gradients = kernels.linear_cross_entropy_backward(
        grad, x, weight, bias, target, lse, checks.IGNORED, 0.1, [True] * 3
    )
    d_logits = kernels.cross_entropy_backward(grad, bias.expand(30, 70), target, lse, checks.IGNORED, 0.1)
    assert gradients[0].shape == x.shape and gradients[1].shape == weight.shape
    torch.testing.assert_close(gradients[2], d_logits.sum(0))


def test_many_classes():
    """More blocks of classes than splits, so that a split has several."""
    x, weight, bias, target = checks.linear_inputs(10, 8, 64 * _loss_configs.CLASS_SPLITS + 130, torch.float32)
    checks.check_linear_cross_entropy(kernels, x, weight, bias, target, 0.0)


def test_labels_fill_several_chunks():
    tile = _loss_configs.product_tile("d_logits", _launch.device_of(torch.empty(0)), 4, 64)
    assert 2 * _loss_configs.chunk_slots(150, tile) < 150 * 0.6


@pytest.mark.parametrize("family", ["cuda", "hip", "interpreter"])
def test_tiles_read_only_what_d_logits_wrote(family):
    architecture = family if family == "interpreter" else "none"
    device = _launch.Device(architecture, "cuda" if family == "interpreter" else family, 132)
    for hidden, size in itertools.product((1, 64, 128, 192, 256, 384, 767, 768), (2, 4)):
        written, dx, dweight = (
            _loss_configs.product_tile(k, device, size, hidden) for k in ("d_logits", "dx", "dweight")
        )
        assert written.block_m % dx.block_m == written.block_m % dweight.block_k == 0, (hidden, size)


def test_chunks_stay_below_a_tenth_of_the_logits():
    rows, hidden, classes, device = 16384, 768, 30522, _launch.Device("sm_90", "cuda", 132)
    used = linear_cross_entropy_backward.backward_workspace(rows, hidden, classes, device, element_size=2)
    assert used < 0.1 * rows * classes * 2


def test_unlabelled_rows_are_not_read():
    checks.check_unlabelled_rows_are_not_read(kernels)


def test_linear_strides():
    checks.check_linear_strides(kernels)


def test_deterministic():
    checks.check_deterministic(kernels, checks.linear_inputs(70, 24, 70, torch.float16))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(torch.float64, "x is torch.float64"), (torch.bfloat16, "x is bfloat16; Triton's interpreter")],
)
def test_bad_dtype(dtype, message):
    x, weight, bias, target = checks.linear_inputs(3, 8, 5, dtype)
    with pytest.raises(TypeError, match=message):
        kernels.linear_cross_entropy(x, weight, bias, target, -100, 0.0)
