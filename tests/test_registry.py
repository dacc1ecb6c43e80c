"""Every operator: registered properly, same results from every implementation, the override, the honest report."""

import subprocess
import sys
import threading

import pytest
import torch

import fastbert
from fastbert.ops._registry import OPERATIONS
from tests.numerics import assert_close_to_exact
from tests.samples import SAMPLES, all_samples

FP32 = all_samples(torch.float32)
IDS = [f"{name}-{case}" for name, case, _ in FP32]


def _operator(name):
    return getattr(torch.ops.fastbert, name).default


def test_every_operator_has_samples():
    assert set(SAMPLES) == set(OPERATIONS)


@pytest.mark.parametrize(("name", "case", "arguments"), FP32, ids=IDS)
def test_opcheck(name, case, arguments):
    torch.library.opcheck(_operator(name), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_implementation_matches_the_reference_in_float64(dtype):
    for name, case, arguments in all_samples(dtype):
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
    assert answer().implementation == "torch SDPA"


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
