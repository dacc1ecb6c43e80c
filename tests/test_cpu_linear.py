"""C++ linear layers: every instruction set, precision and activation, odd shapes and layouts, threads, what is not finite."""

import pytest
import torch
from torch import nn
from torch.nn import functional as TF

from fastbert import reference
from tests.numerics import assert_close_to_exact

_C = pytest.importorskip("fastbert._C", reason="the extension is not built")
from fastbert.cpu import gelu, linear  # noqa: E402
from fastbert.cpu.packed_weights import PackedWeight  # noqa: E402

ISAS = _C.isas()
# rows, in, out: a tile and one more, widths that are no multiple of a unit, a vector or a panel, single ones, none
SHAPES = [
    (1, 1, 1),
    (9, 17, 49),
    (8, 64, 48),
    (23, 33, 100),
    (65, 130, 7),
    (0, 8, 8),
    (5, 8, 0),
    (4, 0, 6),
    (600, 40, 30),
]


@pytest.fixture(params=ISAS)
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def _arguments(rows, width, out, dtype=torch.float32):
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
    return x, w, torch.randn(out, dtype=dtype), torch.randn(rows, out, dtype=dtype)


@pytest.mark.parametrize("precision", reference.PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_products_are_what_the_reference_says(isa, precision, shape):
    x, w, b, r = _arguments(*shape)
    actual = linear.linear_reduced(x, w, b, "none", r, precision, torch.float32)
    # The reference on float64 copies quantizes and rounds the same numbers, and then loses nothing.
    exact = reference.linear_reduced(x.double(), w.double(), b.double(), "none", r.double(), precision, torch.float64)
    own = TF.linear(x, w, b) + r - (TF.linear(x.double(), w.double(), b.double()) + r.double())
    assert_close_to_exact(actual, exact, (exact + own).float(), floor_ulps=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(isa, dtype, activation):
    """From -20 to 20, where each of their approximations has its ranges; the weight is 1."""
    x = torch.linspace(-20.0, 20.0, 20001).to(dtype).unsqueeze(1)
    actual = linear.linear_act(x, nn.Parameter(torch.ones(1, 1, dtype=dtype)), None, activation, False)[0]
    function = reference.ACTIVATIONS[activation][0]
    assert_close_to_exact(actual, function(x.double()), function(x))
    near = x[x.abs().squeeze(1) < 1.0]
    actual = linear.linear_act(near, nn.Parameter(torch.ones(1, 1, dtype=dtype)), None, activation, False)[0]
    assert_close_to_exact(actual, function(near.double()), function(near))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("activation", [*reference.GELU_BY_APPROXIMATION.values(), "relu", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_gradients(isa, shape, activation, needs):
    x, w, b, grad = _arguments(*shape)
    tensors = grad, x, w, TF.linear(x, w, b)
    actual = linear.linear_act_backward(*tensors, activation, list(needs))
    exact = reference.linear_act_backward(*(t.double() for t in tensors), activation, list(needs))
    own = reference.linear_act_backward(*tensors, activation, list(needs))
    for name, result, wanted, torchs in zip(("dx", "dweight", "dbias"), actual, exact, own, strict=True):
        assert result.dtype == torch.float32
        assert_close_to_exact(result, wanted, torchs, name, floor_ulps=8.0)


@pytest.mark.parametrize("approximate", reference.GELU_BY_APPROXIMATION)
def test_gelu_is_that_of_bias_gelu(isa, approximate):
    """Bit for bit, and so with its precision in the left tail."""
    x = torch.linspace(-15.0, 15.0, 5001)
    activation = reference.GELU_BY_APPROXIMATION[approximate]
    packed = PackedWeight((torch.ones(1, 1),), "fp32")
    actual = linear.multiply(x.unsqueeze(1), packed, None, activation, None, torch.float32)
    assert torch.equal(actual.squeeze(1), gelu.bias_gelu(x, None, approximate))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_infinity_and_the_ends_of_float32_flow_as_in_torch(isa, activation):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-38, -1e-38, 0.0]).unsqueeze(1)
    actual = linear.multiply(x, PackedWeight((torch.ones(1, 1),), "fp32"), None, activation, None, torch.float32)
    torch.testing.assert_close(actual, reference.ACTIVATIONS[activation][0](x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("precision", reference.PRECISIONS)
def test_what_is_not_finite_stays_in_its_row_and_channel(isa, precision):
    x, w, b, _ = _arguments(11, 20, 53)
    clean = linear.linear_reduced(x, w, b, "none", None, precision, torch.float32)
    x[3, 5], x[7, 0], w[50, 19] = torch.nan, torch.inf, torch.nan
    actual = linear.linear_reduced(x, w, b, "none", None, precision, torch.float32)
    touched = torch.zeros_like(actual, dtype=torch.bool)
    touched[3], touched[7], touched[:, 50] = True, True, True
    assert torch.equal(actual[~touched], clean[~touched])
    assert not actual[touched].isfinite().any()


def test_int8_of_rows_of_zeros_and_of_the_smallest_numbers(isa):
    x, w = torch.zeros(3, 16), torch.randn(5, 16)
    x[1], x[2] = 1e-44, 1e-30
    actual = linear.linear_reduced(x, w, None, "none", None, "int8", torch.float32)
    assert torch.equal(actual[:2], torch.zeros(2, 5))
    torch.testing.assert_close(actual[2], w.sum(1) * 1e-30, rtol=0.05, atol=1e-31)


@pytest.mark.parametrize("precision", reference.PRECISIONS)
def test_strides_and_dtypes(isa, precision):
    wide = torch.randn(2, 6, 40)
    x, w, b, r = wide[:, ::2, 3:36], torch.randn(33, 20).T, torch.randn(40)[::2], torch.randn(3, 2, 20).transpose(0, 1)
    plain = linear.linear_reduced(
        x.contiguous(), w.contiguous(), b.contiguous(), "gelu", r.contiguous(), precision, torch.float32
    )
    assert torch.equal(linear.linear_reduced(x, w, b, "gelu", r, precision, torch.float32), plain)
    half = [t.bfloat16() for t in (x, w, b, r)]
    expected = reference.linear_reduced(half[0], half[1], half[2], "gelu", half[3], precision, torch.float32)
    actual = linear.linear_reduced(*half[:3], "gelu", half[3], precision, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
    rounded = linear.linear_reduced(*half[:3], "gelu", half[3], precision, torch.bfloat16)
    assert torch.equal(rounded, actual.bfloat16())


@pytest.mark.parametrize("precision", reference.PRECISIONS)
def test_threads_and_neighbours_change_no_bit(isa, precision):
    x, w, b, _ = _arguments(530, 96, 200)
    packed = PackedWeight((w,), precision)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(linear.multiply(x, packed, b, "gelu", None, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, results[0]) for each in results)
    some = linear.multiply(x[17:30], packed, b, "gelu", None, torch.float32)
    assert torch.equal(some, results[0][17:30])


@pytest.mark.parametrize("width", [4096, 132104])
def test_large_sums_of_integers_are_exact(isa, width):
    """Up to the widest row whose sum an int32 holds, of either sign."""
    for sign in (1.0, -1.0):
        actual = linear.linear_reduced(
            torch.ones(1, width), torch.full((1, width), sign), None, "none", None, "int8", torch.float32
        )
        assert_close_to_exact(actual, torch.full((1, 1), sign * width, dtype=torch.float64))


def test_sums_of_integers_that_may_overflow_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 132105\].*at most 132104"):
        linear.linear_reduced(torch.ones(1, 132105), torch.ones(1, 132105), None, "none", None, "int8", torch.float32)


def test_several_weights_make_one_product():
    parts = [torch.randn(n, 24) for n in (24, 8, 50)]
    x = torch.randn(10, 24)
    for precision in reference.PRECISIONS:
        merged = linear.multiply(x, PackedWeight(tuple(parts), precision), None, "none", None, torch.float32)
        each = [linear.linear_reduced(x, w, None, "none", None, precision, torch.float32) for w in parts]
        assert torch.equal(merged, torch.cat(each, 1))


BAD = {
    "width": lambda x, p: linear.multiply(x[:, :7], p, None, "none", None, torch.float32),
    "bias": lambda x, p: linear.multiply(x, p, torch.ones(4), "none", None, torch.float32),
    "residual": lambda x, p: linear.multiply(x, p, None, "none", torch.ones(2, 5), torch.float32),
    "residual-dtype": lambda x, p: linear.multiply(x, p, None, "none", torch.ones(3, 5).half(), torch.float32),
}


@pytest.mark.parametrize("name", BAD)
def test_launchers_read_nothing_out_of_bounds(name):
    with pytest.raises(ValueError, match="expected"):
        BAD[name](torch.ones(3, 8), PackedWeight((torch.ones(5, 8),), "fp32"))
