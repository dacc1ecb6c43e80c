"""Every operator: registered properly, same results from every implementation, the override, the honest report."""

import subprocess
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad

import fastbert
from fastbert.ops import _registry
from fastbert.ops._registry import OPERATIONS, Operation
from tests.numerics import assert_close_to_exact
from tests.samples import SAMPLES, all_samples, cu_seqlens

FP32 = all_samples(torch.float32)
IDS = [f"{name}-{case}" for name, case, _ in FP32]


def _operator(name):
    return getattr(torch.ops.fastbert, name).default


def test_every_operator_has_samples():
    assert set(SAMPLES) == set(OPERATIONS)


@pytest.mark.parametrize(("name", "case", "arguments"), FP32, ids=IDS)
def test_opcheck(name, case, arguments):
    torch.library.opcheck(_operator(name), arguments)


def _with_another_implementation(dtype):
    """Samples whose operator is answered by something else than the reference on CPUs."""
    fast = {
        s.operation
        for s in fastbert.backends()
        if s.device == "cpu" and s.dtype == str(dtype).removeprefix("torch.") and s.implementation != "reference"
    }
    return [row for row in all_samples(dtype) if row[0] in fast]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_implementation_matches_the_reference_in_float64(dtype):
    samples = _with_another_implementation(dtype)
    assert {name for name, _, _ in samples} >= {"layer_norm", "add_layer_norm_backward", "attention"}
    for name, case, arguments in samples:
        actual = _operator(name)(*arguments)
        with fastbert.use_reference():
            own = _operator(name)(*arguments)
            exact = _operator(name)(*(_widened(a, dtype) for a in arguments))
        for i, (a, o, e) in enumerate(zip(as_tuple(actual), as_tuple(own), as_tuple(exact), strict=True)):
            assert a.dtype == o.dtype, f"{name}-{case} result {i}"
            assert_close_to_exact(a, e, o, f"{name}-{case} result {i}", floor_ulps=8)


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else results


def _widened(argument, dtype):
    if isinstance(argument, torch.Tensor) and argument.is_floating_point():
        return argument.to(torch.float64)
    return argument


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_results_have_the_dtype_the_shape_function_says(dtype):
    for name, case, arguments in all_samples(dtype):
        real = _operator(name)(*arguments)
        fake = OPERATIONS[name].fake(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        for r, f in zip(as_tuple(real), as_tuple(fake), strict=True):
            assert (r.dtype, r.shape) == (f.dtype, f.shape), f"{name}-{case}"


def test_same_input_same_output_bit_for_bit():
    for name, case, arguments in FP32:
        first, second = _operator(name)(*arguments), _operator(name)(*arguments)
        for a, b in zip(as_tuple(first), as_tuple(second), strict=True):
            assert torch.equal(a, b), f"{name}-{case}"


def test_use_reference_reaches_every_thread_and_ends_with_the_block():
    def answer():
        statuses = fastbert.backends()
        return next(s for s in statuses if (s.operation, s.device, s.dtype) == ("attention", "cpu", "float32"))

    seen = []
    with fastbert.use_reference():
        thread = threading.Thread(target=lambda: seen.append(answer()))
        thread.start()
        thread.join()
        with fastbert.use_reference():
            pass
        seen.append(answer())
    assert [s.implementation for s in seen] == ["reference", "reference"]
    assert answer().implementation.startswith("C++ (")


def test_backends_cover_every_operation_device_and_dtype():
    statuses = fastbert.backends()
    assert len(statuses) == len(OPERATIONS) * 2 * 4
    assert all(s.reason for s in statuses)
    assert all(s.implementation == "reference" for s in statuses if s.device == "cpu" and s.dtype == "float64")


_WITHOUT_EXTENSION = """
import importlib.abc, sys, warnings
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "fastbert._C":
            raise ImportError("blocked for the test")
sys.meta_path.insert(0, Blocker())
import torch, fastbert
x = torch.randn(3, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = fastbert.functional.layer_norm(x, 8)
        fastbert.functional.add_layer_norm(x, x)
assert torch.allclose(y, torch.nn.functional.layer_norm(x, (8,)), atol=1e-6)
messages = [str(w.message) for w in caught if issubclass(w.category, fastbert.MissingBackendWarning)]
assert len(messages) == 1 and "blocked for the test" in messages[0], messages
status = {(s.operation, s.dtype): s for s in fastbert.backends() if s.device == "cpu"}
assert status["layer_norm", "float32"].implementation == "reference"
assert "blocked for the test" in status["layer_norm", "float32"].reason
"""


def test_without_the_extension_the_reference_answers_and_says_so_once():
    done = subprocess.run([sys.executable, "-c", _WITHOUT_EXTENSION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


X, HEADS = torch.randn(3, 64), torch.randn(4, 2, 8)
SHORT, STATS = torch.ones(4), torch.zeros(3)
OUT_OF_BOUNDS = {
    "weight": lambda o: o.layer_norm(X, SHORT, None, 1e-5, True),
    "scalar": lambda o: o.layer_norm(X[0, 0], None, None, 1e-5, True),
    "x_bias": lambda o: o.add_layer_norm(X, X, SHORT, None, None, 1e-5, 0.0, None, 0, True, True),
    "residual": lambda o: o.add_layer_norm(X, X[:2], None, None, None, 1e-5, 0.0, None, 0, True, True),
    "backward-weight": lambda o: o.layer_norm_backward(X, X, STATS, STATS, SHORT, [True] * 3),
    "backward-stats": lambda o: o.layer_norm_backward(X, X, STATS[:2], STATS, None, [True] * 3),
    "backward-stats-dtype": lambda o: o.layer_norm_backward(X, X, STATS.to(torch.int8), STATS, None, [True] * 3),
    "backward-grad": lambda o: o.layer_norm_backward(X[:2], X, STATS, STATS, None, [True] * 3),
    "attention-keys": lambda o: _attention(o, HEADS[None], HEADS[None, :3]),
    "attention-values": lambda o: _attention(o, HEADS[None], HEADS[None], HEADS[None, :, :1]),
    "attention-head_dim": lambda o: _attention(o, HEADS[None], HEADS[None, ..., :4]),
    "attention-mask": lambda o: _attention(o, HEADS[None], HEADS[None], attn_mask=torch.ones(3, 2)),
    "attention-padding": lambda o: _attention(o, HEADS[None], HEADS[None], key_padding_mask=torch.ones(2, 2) > 0),
    "attention-slopes": lambda o: _attention(o, HEADS[None], HEADS[None], alibi_slopes=torch.ones(1, 2)),
    "attention-boundaries": lambda o: _attention(o, HEADS, HEADS, cu_q=cu_seqlens(4), cu_k=cu_seqlens(2, 2)),
    "attention-packed-values": lambda o: _attention(
        o, HEADS, HEADS, HEADS[:3], cu_q=cu_seqlens(4), cu_k=cu_seqlens(4), longest=4
    ),
    "decode-lengths": lambda o: o.attention_decode(HEADS[None], HEADS[None], HEADS[None], STATS.int(), None, 1.0, -1),
}


def _attention(
    o, q, k, v=None, cu_q=None, cu_k=None, longest=0, attn_mask=None, key_padding_mask=None, alibi_slopes=None
):
    masks = (cu_q, cu_k, longest, longest, attn_mask, key_padding_mask, alibi_slopes)
    return o.attention(q, k, k if v is None else v, *masks, 1.0, -1, -1, False, 0.0, None, 0, False)


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_operators_called_directly_read_nothing_out_of_bounds(name):
    with pytest.raises((ValueError, RuntimeError)):
        OUT_OF_BOUNDS[name](torch.ops.fastbert)


BAD_VALUES = {
    "id": (
        IndexError,
        "input_ids holds -1",
        lambda i: fastbert.functional.embedding_layer_norm(i, torch.ones(5, 6)),
        [torch.tensor([-1, 2])],
    ),
    "label": (
        IndexError,
        "target holds 9",
        lambda t: fastbert.functional.cross_entropy(torch.ones(2, 5), t),
        [torch.tensor([9, 2])],
    ),
    "boundary": (
        ValueError,
        "from 0 to 2",
        lambda cu: fastbert.functional.varlen_attention(HEADS, HEADS, HEADS, cu, cu, 4, 4),
        [torch.tensor([0, 2], dtype=torch.int32)],
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_are_checked_in_compiled_graphs_too(name):
    error, message, function, arguments = BAD_VALUES[name]
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with pytest.raises(error, match=message):
            run(*arguments)


def test_debug_asks_operators_to_look_at_values_elsewhere():
    """A device that is neither CPU nor there: whoever looks at its values raises."""
    ids, word = torch.zeros(3, dtype=torch.int64), torch.ones(5, 6)
    operation = OPERATIONS["embedding_layer_norm"]
    looked = []
    spy = Operation(
        "spy", operation.schema, lambda *a: word.new_empty(0), operation.fake, check_values=lambda *a: looked.append(1)
    )
    run = _registry._choosing(spy, None)

    class Elsewhere:
        device, dtype = torch.device("cuda"), torch.float32

    run(Elsewhere())
    assert not looked
    with fastbert.debug():
        run(Elsewhere())
    assert looked == [1]
    run(ids)
    assert looked == [1, 1]


def test_forward_mode_is_refused_not_dropped():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda a: fastbert.functional.layer_norm(a, 3), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        fastbert.functional.gelu(forward_ad.make_dual(x, x))
