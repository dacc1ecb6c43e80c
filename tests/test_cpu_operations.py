"""The C++ implementations of the elementwise, softmax, loss and embedding operations, called directly: against float64.

Under every instruction set that this machine has; what a shape must do to the vectors of 4, 8 or 16 lanes, two at a time,
decides which shapes are here.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import reference
from fastbert.ops.pack import mask_lengths
from tests.numerics import assert_close_to_exact

_C = pytest.importorskip("fastbert._C", reason="the extension is not built")
from fastbert.cpu import cross_entropy, embedding, gated_act, gelu, rms_norm, rotary, softmax  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
WIDTHS = [1, 3, 16, 17, 31, 33, 47, 64, 65, 100, 384, 1025]
widths = pytest.mark.parametrize("width", WIDTHS)
APPROXIMATIONS = ("none", "tanh", "quick")
approximations = pytest.mark.parametrize("approximate", APPROXIMATIONS)


@pytest.fixture(autouse=True)
def _leaves_threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def check(module: Any, name: str, *arguments: Any, floor_ulps: float = 8) -> tuple[Tensor, ...]:
    """The launcher against the reference in float64; the reference in the tested dtype is what torch makes of it."""
    results = as_tuple(getattr(module, name)(*arguments))
    formula: Callable[..., Any] = getattr(reference, name)
    exact, own = as_tuple(formula(*map(double, arguments))), as_tuple(formula(*arguments))
    for i, (a, e, o) in enumerate(zip(results, exact, own, strict=True)):
        assert a.dtype == o.dtype and a.is_contiguous(), f"{name} result {i}"
        # Where torch's own result is not finite it allows nothing.
        bound = o if torch.equal(o.isfinite(), e.to(o.dtype).isfinite()) else None
        assert_close_to_exact(a, e, bound, f"{name} result {i}", floor_ulps=floor_ulps)
    return results


def check_same_bits(function: Callable[..., Any], first: tuple[Any, ...], second: tuple[Any, ...], what: str) -> None:
    for a, b in zip(as_tuple(function(*first)), as_tuple(function(*second)), strict=True):
        assert torch.equal(a, b), what


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


# ---- GELU ----


@dtypes
@widths
@approximations
def test_bias_gelu(isa, approximate, width, dtype):
    x, grad, bias = normal(5, width, dtype=dtype, scale=3), normal(5, width, dtype=dtype), normal(width, dtype=dtype)
    for b in (bias, None):
        check(gelu, "bias_gelu", x, b, approximate)
        check(gelu, "bias_gelu_backward", grad, x, b, approximate, [True, True])


@approximations
def test_gelu_is_accurate_over_its_whole_range(isa, approximate):
    """Element by element, also in the left tail, where x Φ(x) from 1 + erf(x) has no correct digit."""
    x = torch.cat([torch.linspace(-13, 13, 50001), torch.logspace(-37, 1, 2000), -torch.logspace(-37, 1, 2000)])
    wide = x.double()
    if approximate == "none":
        exact = 0.5 * wide * torch.special.erfc(-wide * 0.5**0.5)
    else:
        u = 1.702 * wide if approximate == "quick" else 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
        exact = wide * torch.sigmoid(u)
    result = gelu.bias_gelu(x, None, approximate).double()
    probability = exact / wide
    normal_range = torch.minimum(exact.abs(), probability) > 2.0**-124  # below, a result may be 0
    error = ((result - exact) / exact).abs()[normal_range]
    # The exponent of the tail is rounded: its half ulp is a relative error of the result.
    exponent = -probability[normal_range].log().clamp(max=0)
    assert (error <= 2.0**-24 * (10 + 3 * exponent)).all()
    assert (result[~normal_range].abs() <= 2.0**-120).all()


@approximations
@dtypes
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e-3, 1e3, 1e20, 1e38])
def test_gelu_magnitudes(isa, magnitude, dtype, approximate):
    x = normal(3, 40, dtype=dtype, scale=magnitude)
    y = gelu.bias_gelu(x, None, approximate)
    assert_close_to_exact(y, reference.bias_gelu(x.double(), None, approximate), floor_ulps=8)
    (dx, _) = gelu.bias_gelu_backward(torch.ones_like(x), x, None, approximate, [True, False])
    assert_close_to_exact(
        dx,
        reference.bias_gelu_backward(torch.ones_like(x).double(), x.double(), None, approximate, [True, False])[0],
        floor_ulps=8,
    )


@approximations
@dtypes
def test_gelu_of_what_is_not_finite(isa, dtype, approximate):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0] * 20, dtype=dtype)
    wide = x.double()  # in float32 torch's own gelu(infinity) is NaN
    exact, y = reference.bias_gelu(wide, None, approximate), gelu.bias_gelu(x, None, approximate)
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())
    dx, _ = gelu.bias_gelu_backward(torch.ones_like(x), x, None, approximate, [True, False])
    exact, _ = reference.bias_gelu_backward(torch.ones_like(wide), wide, None, approximate, [True, False])
    assert torch.equal(dx.isnan(), exact.isnan())


def test_nan_of_any_bits_stays_nan(isa):
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00003, -1], dtype=torch.int32).repeat(10)
    x = bits.view(torch.float32)
    for approximate in APPROXIMATIONS:
        assert gelu.bias_gelu(x, None, approximate).isnan().all()
    assert softmax.softmax(x, None, 1.0, False).isnan().all()
    losses, lse = cross_entropy.cross_entropy(x[None], torch.zeros(1, dtype=torch.int64), -100, 0.0)
    assert losses.isnan().all() and lse.isnan().all()


def test_gelu_float32_bias_of_bfloat16_rows(isa):
    x, bias = normal(3, 100, dtype=torch.bfloat16), normal(100)
    y = gelu.bias_gelu(x, bias, "none")
    exact = reference.bias_gelu(x.double(), bias.double(), "none")
    assert_close_to_exact(y, exact, floor_ulps=1)


def test_gelu_needs(isa):
    x, grad, bias = normal(40, 33), normal(40, 33), normal(33)
    every = gelu.bias_gelu_backward(grad, x, bias, "none", [True, True])
    for needs in ([True, False], [False, True], [False, False]):
        some = gelu.bias_gelu_backward(grad, x, bias, "none", needs)
        for needed, a, b in zip(needs, some, every, strict=True):
            assert torch.equal(a, b) if needed else a.shape == (0,)


# ---- gated activations ----


@dtypes
@pytest.mark.parametrize("activation", reference.GATE_ACTIVATIONS)
def test_gated_act(isa, activation, dtype):
    for width in (1, 17, 64, 101):
        both, grad, gate = (normal(5, n, dtype=dtype, scale=2) for n in (2 * width, width, width))
        for gate_first in (False, True):
            check(gated_act, "gated_act", both, None, activation, gate_first)
            check(gated_act, "gated_act_backward", grad, both, None, activation, gate_first, [True, False])
        value = both[:, :width]
        check(gated_act, "gated_act", value, gate, activation, False)
        for needs in ([True, True], [True, False], [False, True]):
            check(gated_act, "gated_act_backward", grad, value, gate, activation, False, needs)


@pytest.mark.parametrize("activation", reference.GATE_ACTIVATIONS)
def test_gates_that_are_not_finite(isa, activation):
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 0.0] * 10)
    y = gated_act.gated_act(torch.ones(50), gate, activation, False)
    exact = reference.gated_act(torch.ones(50).double(), gate.double(), activation, False)
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())


# ---- RMS norm ----


@dtypes
@widths
def test_rms_norm(isa, width, dtype):
    x, grad, weight = normal(70, width, dtype=dtype), normal(70, width, dtype=dtype), normal(width, dtype=dtype)
    for w in (weight, None, weight.float() * 1.001):
        _, rstd = check(rms_norm, "rms_norm", x, w, 1e-6, True)
        check(rms_norm, "rms_norm_backward", grad, x, rstd, w, [True, True], floor_ulps=16)
    assert torch.equal(
        rms_norm.rms_norm_backward(grad, x, rstd, weight, [False, True])[1],
        rms_norm.rms_norm_backward(grad, x, rstd, weight, [True, True])[1],
    )


# ---- softmax ----


@dtypes
@pytest.mark.parametrize("columns", WIDTHS)
def test_softmax(isa, columns, dtype):
    x = normal(2, 3, columns, dtype=dtype, scale=3)
    (y,) = check(softmax, "softmax", x, None, 0.7, False)
    check(softmax, "softmax", x, None, 1.0, True)
    check(softmax, "softmax_backward", normal(2, 3, columns, dtype=dtype), y, 0.7)


MASKS: dict[str, Callable[[], Tensor]] = {
    "padding": lambda: torch.rand(2, 1, 1, 70) < 0.6,
    "rows": lambda: torch.rand(2, 3, 40, 70) < 0.6,
    "one-column": lambda: torch.rand(2, 3, 40, 1) < 0.6,
    "a-number": lambda: torch.tensor(True),
    "added-fp32": lambda: normal(40, 70),
    "added-bf16": lambda: normal(3, 1, 70, dtype=torch.bfloat16),
    "added-fp16": lambda: normal(2, 1, 40, 70).half(),
    "transposed": lambda: normal(70, 40).T,
    "minus-infinity": lambda: torch.where(torch.rand(40, 70) < 0.6, 0.0, -torch.inf),
}


@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", MASKS)
def test_softmax_masks(isa, name, causal, dtype):
    x, mask = normal(2, 3, 40, 70, dtype=dtype), MASKS[name]()
    (y,) = check(softmax, "softmax", x, mask, 0.3, causal)
    if causal:
        assert torch.equal(y, y.tril())


@dtypes
def test_softmax_of_rows_with_nothing_to_keep(isa, dtype):
    x = normal(3, 40, dtype=dtype)
    x[1, 7] = torch.nan  # what is hidden does not count
    y = softmax.softmax(x, torch.tensor([[True], [False], [True]]), 1.0, False)
    assert torch.equal(y[1], torch.zeros_like(y[1])) and (y[[0, 2]].float().sum(-1) - 1).abs().max() < 0.02
    x[0], x[2, 3] = -torch.inf, torch.nan
    y = softmax.softmax(x, None, 1.0, False)
    assert torch.equal(y[0], torch.zeros_like(y[0])) and y[1:].isnan().all()
    x[2], x[2, 3] = -torch.inf, torch.nan
    assert softmax.softmax(x, None, 1.0, False)[2].isnan().all()


@dtypes
def test_softmax_of_what_is_not_finite(isa, dtype):
    x = normal(4, 70, dtype=dtype)
    x[0, 69], x[1, 3], x[2, 40] = torch.inf, torch.nan, -torch.inf
    y, own = softmax.softmax(x, None, 1.0, False), reference.softmax(x, None, 1.0, False)
    assert torch.equal(y.isnan(), own.isnan()) and y[2, 40] == 0
    causal = softmax.softmax(x[:2, :2].contiguous(), None, 1.0, True)
    assert causal.isfinite().all()


@dtypes
@pytest.mark.parametrize("scale", [1e-30, 1e2, 1e4])
def test_softmax_magnitudes(isa, scale, dtype):
    check(softmax, "softmax", normal(5, 100, dtype=dtype, scale=scale), None, 1.0, False)


# ---- cross-entropy ----


@dtypes
@pytest.mark.parametrize("classes", [1, 2, 17, 33, 100, 1025, 5003])  # a row goes through the caches in chunks of 2048
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(isa, classes, smoothing, dtype):
    logits = normal(7, classes, dtype=dtype, scale=3)
    target = torch.randint(classes, (7,))
    target[2] = -100
    _, lse = check(cross_entropy, "cross_entropy", logits, target, -100, smoothing)
    check(cross_entropy, "cross_entropy_backward", torch.rand(7), logits, target, lse, -100, smoothing)
    one = torch.ones(()).expand(7)  # a sum's gradient
    wanted = check(cross_entropy, "cross_entropy_backward", one, logits, target, lse, -100, smoothing)[0]
    out = cross_entropy.cross_entropy_backward(one, logits, target, lse, -100, smoothing, out=logits)
    assert out is logits and torch.equal(out, wanted)


def test_cross_entropy_of_large_logits(isa):
    """Losses do not lose what the log-sum-exp loses: they are differences from the largest logit."""
    logits, target = normal(7, 3000) + 1e5, torch.randint(3000, (7,))
    for smoothing in (0.0, 0.1):
        losses, _ = cross_entropy.cross_entropy(logits, target, -100, smoothing)
        exact = reference.cross_entropy(logits.double(), target, -100, smoothing)[0]
        assert_close_to_exact(losses, exact, floor_ulps=8)


def test_smoothed_cross_entropy_of_masked_classes(isa):
    """Their logits are the least number: the mean is near it, and no sum on the way may overflow."""
    logits, target = normal(3, 5000), torch.zeros(3, dtype=torch.int64)
    logits[:, 7:4990] = torch.finfo(torch.float32).min
    losses, _ = cross_entropy.cross_entropy(logits, target, -100, 0.1)
    exact = reference.cross_entropy(logits.double(), target, -100, 0.1)[0]
    assert exact.isfinite().all()
    assert_close_to_exact(losses, exact.clamp(max=torch.finfo(torch.float32).max))


@dtypes
def test_cross_entropy_of_what_is_not_finite(isa, dtype):
    logits = normal(6, 5000, dtype=dtype)
    logits[0, 4999], logits[1, 7], logits[2, :3000], logits[3] = torch.inf, torch.nan, -torch.inf, -torch.inf
    logits[4, 0], logits[4, 4000] = torch.nan, torch.inf
    target = torch.full((6,), 4500)
    losses, lse = cross_entropy.cross_entropy(logits, target, -100, 0.0)
    own_losses, own_lse = reference.cross_entropy(logits, target, -100, 0.0)
    for a, b in ((losses, own_losses), (lse, own_lse)):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
    d = cross_entropy.cross_entropy_backward(torch.ones(6), logits, target, lse, -100, 0.0)
    own = reference.cross_entropy_backward(torch.ones(6), logits, target, own_lse, -100, 0.0)
    assert torch.equal(d.isnan(), own.isnan())


@dtypes
@pytest.mark.parametrize("classes", [30522, 30528])
def test_gradients_written_past_the_caches_are_the_same(isa, classes, dtype):
    """From 4 MiB on, where rows start within a cache line, too."""
    rows = (5 << 20) // (classes * dtype.itemsize)
    logits, target = normal(rows, 40, dtype=dtype).repeat(1, classes // 40 + 1)[:, :classes], torch.arange(rows)
    _, lse = cross_entropy.cross_entropy(logits, target, 3, 0.1)
    grad = torch.rand(rows)
    large = cross_entropy.cross_entropy_backward(grad, logits, target, lse, 3, 0.1)
    for row in range(rows):
        one = slice(row, row + 1)
        small = cross_entropy.cross_entropy_backward(grad[one], logits[one], target[one], lse[one], 3, 0.1)
        assert torch.equal(large[one], small)


@dtypes
@pytest.mark.parametrize("labelled", [0.0, 0.4, 1.0])
def test_linear_cross_entropy(monkeypatch, labelled, dtype):
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 7 * 101)  # several chunks
    x, weight, bias = normal(40, 24, dtype=dtype), normal(101, 24, dtype=dtype), normal(101, dtype=dtype)
    target = torch.where(torch.rand(40) < labelled, torch.randint(101, (40,)), -100)
    for b in (bias, None):
        _, lse = check(cross_entropy, "linear_cross_entropy", x, weight, b, target, -100, 0.1)
        rest = (x, weight, b, target, lse, -100, 0.1)
        check(cross_entropy, "linear_cross_entropy_backward", torch.rand(40), *rest, [True] * 3, floor_ulps=16)


# ---- rotary ----


@dtypes
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("head_dim", "pairs"), [(2, 1), (8, 3), (64, 32), (96, 40), (80, 40), (256, 128)], ids=str)
def test_rotary(isa, head_dim, pairs, interleaved, dtype):
    angles = torch.rand(11, pairs, dtype=torch.float64) * 6
    positions = torch.randint(11, (2, 7))
    qkv = normal(2, 7, 3, 5, head_dim, dtype=dtype)
    for tables in (torch.float32, dtype):
        cos, sin = angles.cos().to(tables), angles.sin().to(tables)
        for inverse in (False, True):
            check(rotary, "rotary", qkv[:, :, 1], cos, sin, None, interleaved, inverse)
            check(rotary, "rotary", qkv[:, :, 2], cos, sin, positions.int(), interleaved, inverse)
            check(rotary, "rotary", qkv[0, :, 0], cos, sin, positions[0], interleaved, inverse)


# ---- embedding ----


def embedding_inputs(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    ids = torch.randint(50, (tokens,))
    return (
        ids,
        torch.randint(9, (tokens,), dtype=torch.int32),
        torch.randint(2, (tokens,)),
        *(normal(entries, width, dtype=dtype) for entries in (50, 9, 2)),
    )


SEED = torch.tensor([-1234567])


@dtypes
@widths
def test_embedding_layer_norm(isa, width, dtype):
    inputs = embedding_inputs(37, width, dtype)
    weight, bias, grad = (normal(*shape, dtype=dtype) for shape in ((width,), (width,), (37, width)))
    for dropout_p in (0.0, 0.3):
        norm = (weight, bias, 1e-5, dropout_p, SEED, 8, True)
        _, mean, rstd = check(embedding, "embedding_layer_norm", *inputs, *norm, floor_ulps=16)
        rest = (mean, rstd, weight, dropout_p, SEED, 8, 3, [True] * 5)
        check(embedding, "embedding_layer_norm_backward", grad, *inputs, *rest, floor_ulps=16)


def directly(*arguments: Any) -> Tensor | None:
    return embedding.embed_directly(*arguments, 1e-5)


@dtypes
@pytest.mark.parametrize("shape", [(0,), (37,), (3, 5), ()], ids=str)
def test_embedding_past_the_operator_is_the_same_bit_for_bit(isa, shape, dtype):
    ids, positions, types = (torch.randint(entries, shape) for entries in (50, 9, 2))
    word, position, token_type = (normal(entries, 24, dtype=dtype) for entries in (50, 9, 2))
    norms = [(None, None), *((normal(24, dtype=each), normal(24, dtype=each)) for each in {dtype, torch.float32})]
    for weight, bias in norms:
        for inputs in (
            (ids, positions, types, word, position, token_type),
            (ids, None, types, word, None, token_type),
            (ids, positions, None, word, position, None),
        ):
            expected = embedding.embedding_layer_norm(*inputs, weight, bias, 1e-5, 0.0, None, 0, False)[0]
            assert torch.equal(directly(*inputs, weight, bias), expected)
    untyped = embedding.embedding_layer_norm(
        ids, positions, torch.zeros_like(ids), word, position, token_type, None, None, 1e-5, 0.0, None, 0, False
    )
    assert torch.equal(directly(ids, positions, None, word, position, token_type, None, None), untyped[0])


class Subclass(Tensor):
    """May compute its values."""


NOT_DIRECTLY = {
    "id-too-large": {0: torch.tensor([3, 50])},
    "id-negative": {0: torch.tensor([3, -1])},
    "position-too-large": {1: torch.tensor([9, 0])},
    "type-too-large": {2: torch.tensor([0, 2])},
    "int32-ids": {0: torch.tensor([3, 4], dtype=torch.int32)},
    "positions-of-another-shape": {1: torch.tensor([3])},
    "no-positions": {1: None},
    "no-position-table": {4: None},
    "ids-are-a-list": {0: [3, 4]},
    "words-of-one-dimension": {3: torch.zeros(50)},
    "words-in-float64": {3: torch.zeros(50, 24, dtype=torch.float64)},
    "words-across": {3: torch.zeros(24, 50).T},
    "words-without-width": {3: torch.zeros(50, 0)},
    "types-of-another-width": {5: torch.zeros(2, 25)},
    "types-of-another-dtype": {5: torch.zeros(2, 24, dtype=torch.bfloat16)},
    "weight-of-another-width": {6: torch.zeros(25)},
    "weight-and-bias-of-two-dtypes": {6: torch.zeros(24, dtype=torch.bfloat16)},
    "a-subclass": {3: torch.zeros(50, 24).as_subclass(Subclass)},
}


@pytest.mark.parametrize("name", NOT_DIRECTLY)
def test_embedding_past_the_operator_leaves_the_rest_to_it(name):
    ids = torch.tensor([3, 49])
    tables = (torch.zeros(50, 24), torch.zeros(9, 24), torch.zeros(2, 24))
    arguments: list[Any] = [ids, torch.tensor([8, 0]), torch.tensor([1, 0]), *tables, torch.zeros(24), torch.zeros(24)]
    assert directly(*arguments) is not None
    for index, value in NOT_DIRECTLY[name].items():
        arguments[index] = value
    assert directly(*arguments) is None


MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_mask_lengths(dtype):
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).to(dtype)
    assert mask_lengths(mask) == [2, 0, 3]
    assert mask_lengths(mask[:, :0]) == [0, 0, 0] and mask_lengths(mask[:0]) == []
    assert mask_lengths(mask.T) is None  # not contiguous
    if dtype is not torch.bool:
        for wrong in (2, 127):
            mask[1, 2] = wrong
            assert mask_lengths(mask) is None


@pytest.mark.parametrize(("count", "limit", "expected"), [(3, 6, True), (3, 5, False), (1, 1, True), (0, 0, True)])
def test_ids_in_range(count, limit, expected):
    ids = torch.tensor([0, 5, 2])
    assert _C.ids_in_range(ids.data_ptr(), count, limit) is expected


@dtypes
@pytest.mark.parametrize("tokens", [0, 1, 33, 4103])
def test_embedding_tokens_and_absent_parts(isa, tokens, dtype):
    ids, positions, _, word, position, _ = embedding_inputs(tokens, 24, dtype)
    inputs = (ids, positions, None, word, position, None)
    y, mean, rstd = embedding.embedding_layer_norm(*inputs, None, None, 1e-5, 0.0, None, 0, True)
    exact = reference.embedding_layer_norm(*map(double, inputs), None, None, 1e-5, 0.0, None, 0, True)
    assert_close_to_exact(y, exact[0], floor_ulps=16)
    grad = normal(tokens, 24, dtype=dtype)
    rest = (mean, rstd, None, 0.0, None, 0, -1)
    every = check(embedding, "embedding_layer_norm_backward", grad, *inputs, *rest, [True] * 5, floor_ulps=16)
    for i in range(5):
        needs = [j == i for j in range(5)]
        some = embedding.embedding_layer_norm_backward(grad, *inputs, *rest, needs)
        assert torch.equal(some[i], every[i]) and all(some[j].shape == (0,) for j in range(5) if j != i)


def test_embedding_drops_what_the_contract_says(isa):
    ids, word = torch.zeros(5, dtype=torch.int64), normal(1, 33)
    arguments = (ids, None, None, word, None, None, torch.zeros(33), torch.ones(33), 1e-5)
    y, _, _ = embedding.embedding_layer_norm(*arguments, 0.4, SEED, 12, False)
    assert torch.equal(y, reference.dropout_mask((5, 33), 0.4, SEED, 12, torch.float32))


# ---- strides, threads ----


def everything(dtype: torch.dtype, layout: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
    """Every operation on some hundred rows, inputs in a layout."""
    torch.manual_seed(5)
    x, grad = layout(normal(700, 333, dtype=dtype)), layout(normal(700, 333, dtype=dtype))
    bias, target = normal(333, dtype=dtype), torch.randint(333, (700,))
    y = softmax.softmax(x, layout(normal(700, 333)), 0.7, True)
    losses, lse = cross_entropy.cross_entropy(x, target, -100, 0.1)
    results = [
        gelu.bias_gelu(x, bias, "none"),
        gelu.bias_gelu(x, None, "tanh"),
        *gelu.bias_gelu_backward(grad, x, bias, "none", [True, True]),
        gelu.bias_gelu_backward(grad, x, None, "quick", [True, False])[0],
        y,
        softmax.softmax_backward(grad, layout(y), 0.7),
        losses,
        lse,
        cross_entropy.cross_entropy_backward(losses, x, target, lse, -100, 0.1),
        gated_act.gated_act(x, grad, "silu", False),
        *gated_act.gated_act_backward(grad, x, grad, "gelu", False, [True, True]),
        *(norm := rms_norm.rms_norm(x, bias, 1e-6, True)),
        *rms_norm.rms_norm_backward(grad, x, norm[1], bias, [True, True]),
        rotary.rotary(x[:, :330].unflatten(1, (5, 66)), *(layout(normal(700, 33)) for _ in "cs"), target, False, False),
    ]
    inputs = [layout(t) if t.is_floating_point() else t for t in embedding_inputs(700, 333, dtype)]
    out, mean, rstd = embedding.embedding_layer_norm(*inputs, bias, bias, 1e-5, 0.1, SEED, 0, True)
    results += [out, mean, rstd]
    results += embedding.embedding_layer_norm_backward(grad, *inputs, mean, rstd, bias, 0.1, SEED, 0, 3, [True] * 5)
    return results


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows-apart": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "columns-apart": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.T.contiguous().T,
    "within-a-line": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
}


@dtypes
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(isa, name, dtype):
    for i, (a, b) in enumerate(zip(everything(dtype, LAYOUTS[name]), everything(dtype), strict=True)):
        assert torch.equal(a, b), f"{name}: result {i}"


@dtypes
def test_any_number_of_threads_gives_the_same_bits(isa, dtype):
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(everything(dtype))
    for result in results[1:]:
        for i, (a, b) in enumerate(zip(result, results[0], strict=True)):
            assert torch.equal(a, b), f"result {i}"


def test_python_threads_at_once():
    """The lock is released: several calls run at once, each with its own workspace."""
    x, bias = normal(3000, 100), normal(100)
    target = torch.randint(100, (3000,))

    def run(_: int) -> list[Tensor]:
        return [
            *gelu.bias_gelu_backward(x, x, bias, "none", [True, True]),
            softmax.softmax(x, bias, 1.0, False),
            *cross_entropy.cross_entropy(x, target, -100, 0.0),
        ]

    wanted = run(0)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(run, range(12)):
            assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


def test_large_results_written_past_the_caches(isa):
    x = normal(1500, 800)
    large, small = softmax.softmax(x, None, 1.0, False), softmax.softmax(x[:7], None, 1.0, False)
    assert torch.equal(large[:7], small)
    assert_close_to_exact(large, torch.softmax(x.double(), -1), torch.softmax(x, -1))
    gradient = softmax.softmax_backward(x, large, 0.5)
    assert torch.equal(gradient[:7], softmax.softmax_backward(x[:7], small, 0.5))


# ---- bad input ----

X, IDS, HEADS, ANGLES = torch.ones(3, 8), torch.zeros(3, dtype=torch.int64), torch.ones(3, 2, 8), torch.ones(5, 4)
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "dtype": (NotImplementedError, "float64.*reference.bias_gelu", lambda: gelu.bias_gelu(X.double(), None, "none")),
    "approximate": (ValueError, "'erf'; expected one of 'none'", lambda: gelu.bias_gelu(X, None, "erf")),
    "bias": (ValueError, "bias has 7 elements", lambda: gelu.bias_gelu(X, torch.ones(7), "none")),
    "bias-dtype": (TypeError, "float16", lambda: gelu.bias_gelu(X, torch.ones(8).half(), "none")),
    "grad": (ValueError, "grad_y is", lambda: gelu.bias_gelu_backward(X[:2], X, None, "none", [True, True])),
    "activation": (ValueError, "'none'; expected one of 'gelu'", lambda: gated_act.gated_act(X, X, "none", False)),
    "odd": (ValueError, "must be even", lambda: gated_act.gated_act(X[:, :7], None, "silu", False)),
    "gate": (ValueError, "gate is", lambda: gated_act.gated_act(X, X[:2], "silu", False)),
    "rms-weight": (ValueError, "weight has 7", lambda: rms_norm.rms_norm(X, torch.ones(7), 1e-6, False)),
    "rstd": (ValueError, "save_stats=True", lambda: rms_norm.rms_norm_backward(X, X, X[:2, 0], None, [True, True])),
    "causal": (ValueError, "rows and columns", lambda: softmax.softmax(X[0], None, 1.0, True)),
    "mask-columns": (ValueError, "broadcast", lambda: softmax.softmax(X, torch.ones(7).bool(), 1.0, False)),
    "mask-rows": (ValueError, "broadcast", lambda: softmax.softmax(X, torch.ones(2, 8).bool(), 1.0, False)),
    "mask-dtype": (TypeError, "int64", lambda: softmax.softmax(X, torch.ones(8).long(), 1.0, False)),
    "softmax-grad": (ValueError, "grad_y", lambda: softmax.softmax_backward(X[:2], X, 1.0)),
    "target": (ValueError, r"expected \[3\]", lambda: cross_entropy.cross_entropy(X, IDS[:2], -100, 0.0)),
    "classes": (ValueError, "at least one class", lambda: cross_entropy.cross_entropy(X[:, :0], IDS, -100, 0.0)),
    "lse": (
        ValueError,
        "lse",
        lambda: cross_entropy.cross_entropy_backward(X[:, 0], X, IDS, X[:2, 0], -100, 0.0),
    ),
    "out": (
        ValueError,
        "not contiguous",
        lambda: cross_entropy.cross_entropy_backward(X[:, 0], X, IDS, X[:, 0], -100, 0.0, out=torch.ones(8, 3).T),
    ),
    "positions": (
        ValueError,
        "has 9 positions",
        lambda: rotary.rotary(torch.ones(9, 2, 8), ANGLES, ANGLES, None, False, False),
    ),
    "tables": (
        ValueError,
        "at most head_dim",
        lambda: rotary.rotary(HEADS[..., :6], ANGLES, ANGLES, IDS, False, False),
    ),
    "position-ids": (ValueError, "position_ids", lambda: rotary.rotary(HEADS, ANGLES, ANGLES, IDS[:2], False, False)),
    "ids": (
        ValueError,
        "come together",
        lambda: embedding.embedding_layer_norm(IDS, None, None, X, X, None, None, None, 1e-5, 0.0, None, 0, False),
    ),
    "ids-shape": (
        ValueError,
        "expected integers",
        lambda: embedding.embedding_layer_norm(IDS, IDS[:2], None, X, X, None, None, None, 1e-5, 0.0, None, 0, False),
    ),
    "table-width": (
        ValueError,
        r"\[entries, 8\]",
        lambda: embedding.embedding_layer_norm(
            IDS, IDS, None, X, X[:, :7], None, None, None, 1e-5, 0.0, None, 0, False
        ),
    ),
    "seed": (
        ValueError,
        "seed is None",
        lambda: embedding.embedding_layer_norm(IDS, None, None, X, None, None, None, None, 1e-5, 0.1, None, 0, False),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()


@dtypes
def test_nothing_in_nothing_out(dtype):
    x = torch.empty(0, 8, dtype=dtype)
    none = torch.empty(0, dtype=torch.int64)
    assert gelu.bias_gelu(x, None, "none").shape == (0, 8)
    dx, dbias = gelu.bias_gelu_backward(x, x, None, "none", [True, True])
    assert dx.shape == (0, 8) and torch.equal(dbias, torch.zeros(8))
    assert softmax.softmax(x, None, 1.0, True).shape == (0, 8)
    assert softmax.softmax(x.T.contiguous(), None, 1.0, False).shape == (8, 0)
    losses, lse = cross_entropy.cross_entropy(x, none, -100, 0.0)
    assert losses.shape == lse.shape == (0,)
    assert cross_entropy.cross_entropy_backward(losses, x, none, lse, -100, 0.0).shape == (0, 8)
    assert rotary.rotary(torch.empty(0, 2, 8, dtype=dtype), ANGLES, ANGLES, none, True, False).shape == (0, 2, 8)
