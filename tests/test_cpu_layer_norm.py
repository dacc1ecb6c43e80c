"""The C++ layer norms, called directly, under every instruction set that this machine has: against float64."""

import itertools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from fastbert import reference
from tests import layer_norm_checks as checks
from tests.numerics import assert_close_to_exact

_C = pytest.importorskip("fastbert._C", reason="the extension is not built")
cpu = pytest.importorskip("fastbert.cpu.layer_norm")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

#: Rows go through vectors of 4, 8 or 16 lanes, two at a time, and parts of one: every remainder matters.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100, 127, 128, 384, 768, 1000, 1025, 4096]
widths = pytest.mark.parametrize("width", WIDTHS)


# ---- against float64 ----


@dtypes
@widths
def test_layer_norm(isa, width, dtype):
    i = checks.inputs(5, width, dtype)
    checks.check_layer_norm(cpu, i.x, i.weight, i.bias)
    checks.check_layer_norm_backward(cpu, i.grad_y, i.x, i.weight)


@dtypes
@pytest.mark.parametrize("width", [1, 3, 17, 31, 33, 48, 64, 100, 384, 768, 1025])
def test_add_layer_norm(isa, width, dtype):
    i = checks.inputs(5, width, dtype)
    checks.check_add_layer_norm(cpu, i, 0.1, checks.seed_tensor(-123456789012345), 4 * 1001)
    checks.check_add_layer_norm(cpu, i, 0.0, None, 0)


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 33, 70])  # a partial sum has 32 rows, a kernel 4 in flight
def test_rows(isa, rows, dtype):
    i = checks.inputs(rows, 100, dtype)
    checks.check_layer_norm(cpu, i.x, i.weight, i.bias)
    checks.check_layer_norm_backward(cpu, i.grad_y, i.x, i.weight)
    checks.check_add_layer_norm(cpu, i, 0.1, checks.seed_tensor(7), 8)


def test_more_rows_than_partial_sums(isa):
    i = checks.inputs(128 * 32 + 5, 24, torch.float32)
    checks.check_layer_norm_backward(cpu, i.grad_y, i.x, i.weight)


@dtypes
def test_no_parameters(isa, dtype):
    i = checks.inputs(5, 100, dtype)
    checks.check_layer_norm(cpu, i.x, None, None)
    checks.check_layer_norm(cpu, i.x, i.weight, None)
    checks.check_layer_norm(cpu, i.x, None, i.bias)
    checks.check_layer_norm_backward(cpu, i.grad_y, i.x, None)


@pytest.mark.parametrize("width", [17, 100, 768])
def test_float32_parameters_of_bfloat16_rows(isa, width):
    i = checks.inputs(5, width, torch.bfloat16)
    i.weight, i.bias, i.x_bias = i.weight.float() * 1.001, i.bias.float() * 1.001, i.x_bias.float() * 1.001
    checks.check_layer_norm(cpu, i.x, i.weight, i.bias)
    checks.check_layer_norm_backward(cpu, i.grad_y, i.x, i.weight)
    y, total, _, _ = cpu.add_layer_norm(i.x, i.residual, i.x_bias, i.weight, i.bias, 1e-5, 0.0, None, 0, False)
    exact = i.x.double() + i.x_bias.double() + i.residual.double()
    assert_close_to_exact(total, exact, None, "sum", floor_ulps=1)
    exact_y = F.layer_norm(exact, (width,), i.weight.double(), i.bias.double())
    # y comes from the unrounded sum: one rounding, at the end
    assert_close_to_exact(y, exact_y, None, "y", floor_ulps=1)


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, 1e4), (torch.float32, -1e6), (torch.bfloat16, 50.0)],
    ids=["fp32-1e4", "fp32--1e6", "bf16-50"],
)
@pytest.mark.parametrize("width", [17, 768, 1025])
def test_large_offset(isa, dtype, offset, width):
    i = checks.inputs(9, width, dtype, offset=offset)
    checks.check_layer_norm(cpu, i.x, i.weight, i.bias)
    checks.check_layer_norm_backward(cpu, i.grad_y, i.x, i.weight)
    checks.check_add_layer_norm(cpu, i, 0.0, None, 0)


@pytest.mark.parametrize("outlier", [1e3, -1e6, 1e12])
@pytest.mark.parametrize("place", [0, 3, 40, 767])
def test_outliers(isa, outlier, place):
    """The first elements give the shift that the sums start from: an outlier among them must not cost precision."""
    i = checks.inputs(9, 768, torch.float32)
    i.x[:, place] = outlier
    checks.check_layer_norm(cpu, i.x, i.weight, i.bias)
    total = i.x + i.residual
    y, *_ = cpu.add_layer_norm(i.x, i.residual, None, i.weight, i.bias, checks.EPS, 0.0, None, 0, False)
    parameters = ((768,), i.weight, i.bias, checks.EPS)
    exact = F.layer_norm(total.double(), (768,), i.weight.double(), i.bias.double(), checks.EPS)
    assert_close_to_exact(y, exact, F.layer_norm(total, *parameters), "y")


@dtypes
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e-6, 1e6, 1e18])
def test_magnitudes(isa, dtype, magnitude):
    i = checks.inputs(9, 100, dtype)
    checks.check_layer_norm(cpu, (i.x.double() * magnitude).to(dtype), i.weight, i.bias)


@dtypes
def test_constant_rows(isa, dtype):
    x = torch.tensor([0.0, 1.0, -3.7, 1e4, 1e-3]).to(dtype)[:, None].expand(5, 100)
    y, mean, rstd = cpu.layer_norm(x, None, None, 1e-5, True)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(mean, x[:, 0].float())
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5))


@dtypes
def test_not_finite(isa, dtype):
    checks.check_not_finite(cpu, dtype)


def test_strides(isa):
    checks.check_strides(cpu)


def test_needs(isa):
    checks.check_needs(cpu, checks.inputs(37, 100, torch.float32))


def test_zero_width():
    x = torch.randn(3, 0)
    y, mean, rstd = cpu.layer_norm(x, None, None, 1e-5, True)
    assert y.shape == (3, 0) and mean.shape == rstd.shape == (3,)


# ---- bfloat16 conversion ----


def test_bfloat16_rounds_as_torch(isa):
    """Every upper half, with lower halves at and around the tie, denormals, infinities and NaN among them."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    bits = (upper | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).reshape(-1)
    bits = bits[: len(bits) // 96 * 96].reshape(-1, 96)
    x_bias = torch.zeros(96)
    for values in (
        bits.to(torch.int32).view(torch.float32)[::31],
        torch.full((1, 96), 1e-40),
        torch.full((1, 96), 3.4e38),
    ):
        for row in values:
            zeros = torch.zeros(1, 96, dtype=torch.bfloat16)
            x_bias = row.contiguous()  # float32, so that the sum has bits to round
            _, total, _, _ = cpu.add_layer_norm(zeros, zeros, x_bias, None, None, 1e-5, 0.0, None, 0, False)
            wanted = row.to(torch.bfloat16)
            assert torch.equal(total[0].isnan(), wanted.isnan())
            assert torch.equal(total[0].nan_to_num(7.0), wanted.nan_to_num(7.0))


# ---- dropout ----

_MULTIPLIERS, _INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(counter: int, seed: int) -> tuple[int, int, int, int]:
    """Philox4x32-10, as in the paper, in Python's integers."""
    c = (counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF, 0, 0)
    k = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c[0], _MULTIPLIERS[1] * c[2]
        c = (p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF)
        k = (k[0] + _INCREMENTS[0] & 0xFFFFFFFF, k[1] + _INCREMENTS[1] & 0xFFFFFFFF)
    return c


def test_philox_known_answers(isa):
    """kat_vectors of Random123; a counter there has four words, ours two."""
    assert _C.philox(0, 0, 4) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert list(philox(0, 0)) == _C.philox(0, 0, 4)


@pytest.mark.parametrize("seed", [0, 1, -1, 0x0123456789ABCDEF, -(2**63)])
@pytest.mark.parametrize("offset", [0, 4, 4 * (2**32 - 3), 2**40])  # the third runs over the counter's low word
def test_philox_words(isa, seed, offset):
    words = _C.philox(seed, offset, 70)
    wanted = itertools.chain.from_iterable(philox(offset // 4 + n, seed) for n in range(18))
    assert words == list(wanted)[:70]


def test_philox_rejects_bad_offsets():
    for offset, count in ((2, 4), (-4, 4), (0, -1)):
        with pytest.raises(ValueError, match="multiple of 4"):
            _C.philox(0, offset, count)


@pytest.mark.parametrize("width", [1, 4, 17, 48, 100, 768])
@pytest.mark.parametrize("dropout_p", [1e-9, 0.1, 0.5, 0.999, 1.0])
def test_dropout_mask(isa, width, dropout_p):
    seed, offset = checks.seed_tensor(2**62 + 12345), 2**34 - 8
    checks.check_dropout_is_the_contracts(_OnlyFloat32, 3, width, dropout_p, seed, offset)
    # and in bfloat16, whose factors lie in another order
    ones, zeros = torch.ones(3, width, dtype=torch.bfloat16), torch.zeros(3, width, dtype=torch.bfloat16)
    arguments = (None, None, None, 1e-5, dropout_p, seed, offset, True)
    _, narrow, _, _ = cpu.add_layer_norm(ones, zeros, *arguments)
    _, wide, _, _ = cpu.add_layer_norm(ones.float(), zeros.float(), *arguments)
    assert torch.equal(narrow, wide.to(torch.bfloat16))


class _OnlyFloat32:
    """The shared check also asks for float16, which the registry sends to the reference."""

    @staticmethod
    def add_layer_norm(x, residual, *rest):
        y, total, mean, rstd = cpu.add_layer_norm(x.float(), residual.float(), *rest)
        return y.to(x.dtype), total.to(x.dtype), mean, rstd

    @staticmethod
    def add_layer_norm_backward(grad_y, grad_sum, total, *rest):
        wide = cpu.add_layer_norm_backward(grad_y.float(), grad_sum.float(), total.float(), *rest)
        return tuple(tensor.to(grad_y.dtype) for tensor in wide)


def test_known_answer_through_the_operation(isa):
    checks.check_known_answer(cpu)


# ---- determinism, threads, processes ----


def _everything(i: checks.Inputs) -> list[torch.Tensor]:
    seed = checks.seed_tensor(9)
    forward = cpu.add_layer_norm(i.x, i.residual, i.x_bias, i.weight, i.bias, 1e-5, 0.1, seed, 8, True)
    backward = cpu.add_layer_norm_backward(
        i.grad_y, i.grad_sum, forward[1], forward[2], forward[3], i.weight, 0.1, seed, 8, [True] * 5
    )
    alone = cpu.layer_norm(i.x, i.weight, i.bias, 1e-5, True)
    return [*forward, *backward, *alone]


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(700, 768), (701, 333), (3000, 100)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(isa, threads, rows, width, dtype):
    i = checks.inputs(rows, width, dtype)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(_everything(i))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_python_threads_at_once():
    """The lock is released: several calls run at once, each with its own workspace."""
    many = [checks.inputs(300, 768, torch.float32) for _ in range(4)]
    wanted = [_everything(i) for i in many]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for result, expected in zip(pool.map(_everything, many), wanted, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_forked_child():
    """A parallel region in a forked child would wait for threads that are not there."""
    script = """
        import os, sys, warnings, torch
        from fastbert.cpu import layer_norm as cpu
        torch.set_num_threads(2)
        x = torch.randn(2000, 768)
        wanted = cpu.layer_norm(x, None, None, 1e-5, False)[0]  # starts the threads
        pid = os.fork()
        if pid == 0:
            y = cpu.layer_norm(x, None, None, 1e-5, False)[0]
            os._exit(0 if (y.numpy() == wanted.numpy()).all() else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert torch.equal(cpu.layer_norm(x, None, None, 1e-5, False)[0], wanted)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs /proc")
def test_one_pool_of_threads_with_torch():
    """The extension runs on the threads that torch has started, not on a second set."""
    script = """
        import os, torch
        from fastbert.cpu import layer_norm as cpu
        torch.set_num_threads(2)
        x = torch.randn(2000, 768)
        torch.relu(x)
        before = len(os.listdir("/proc/self/task"))
        cpu.layer_norm(x, None, None, 1e-5, False)
        assert len(os.listdir("/proc/self/task")) == before
        libraries = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}
        assert len(libraries) <= 1, libraries
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


# ---- reused outputs ----


@dtypes
def test_outputs_are_reused(isa, dtype):
    i = checks.inputs(5, 100, dtype)
    parameters = (i.weight, i.bias, 1e-5)
    wanted = cpu.layer_norm(i.x, *parameters, True)
    out = torch.empty_like(i.x)
    y, mean, rstd = cpu.layer_norm(i.x, *parameters, True, out=out)
    assert y is out and torch.equal(y, wanted[0]) and torch.equal(mean, wanted[1]) and torch.equal(rstd, wanted[2])
    in_place = i.x.clone()
    cpu.layer_norm(in_place, *parameters, False, out=in_place)
    assert torch.equal(in_place, wanted[0])

    rest = (i.x_bias, *parameters, 0.1, checks.seed_tensor(3), 0, False)
    y, total, _, _ = cpu.add_layer_norm(i.x, i.residual, *rest)
    out, sum_out = torch.empty_like(i.x), torch.empty_like(i.x)
    results = cpu.add_layer_norm(i.x, i.residual, *rest, out=out, sum_out=sum_out)
    assert results[0] is out and results[1] is sum_out
    assert torch.equal(out, y) and torch.equal(sum_out, total)
    x, residual = i.x.clone(), i.residual.clone()
    cpu.add_layer_norm(x, residual, *rest, out=x, sum_out=residual)
    assert torch.equal(x, y) and torch.equal(residual, total)
    alone, nothing, _, _ = cpu.add_layer_norm(i.x, i.residual, *rest, save_sum=False)
    assert torch.equal(alone, y) and nothing.shape == (0,)


def test_what_is_not_supported_is_said():
    x = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match=r"torch\.float64.*torch\.float32 and torch\.bfloat16.*reference"):
        cpu.layer_norm(x.double(), None, None, 1e-5, False)
    with pytest.raises(TypeError, match=r"torch\.float64.*torch\.float32"):
        cpu.layer_norm(x, torch.ones(8).double(), None, 1e-5, False)
    with pytest.raises(TypeError, match="both must have one dtype"):
        cpu.layer_norm(x.bfloat16(), torch.ones(8), torch.ones(8).bfloat16(), 1e-5, False)
    with pytest.raises(ValueError, match=r"out is \(3, 7\).*expected a contiguous \(3, 8\)"):
        cpu.layer_norm(x, None, None, 1e-5, False, out=torch.empty(3, 7))
    with pytest.raises(ValueError, match="not contiguous"):
        cpu.layer_norm(x, None, None, 1e-5, False, out=torch.empty(8, 3).T)
    with pytest.raises(ValueError, match="residual"):
        cpu.add_layer_norm(x, x[:2], None, None, None, 1e-5, 0.0, None, 0, False)
    with pytest.raises(ValueError, match="seed is None"):
        cpu.add_layer_norm(x, x, None, None, None, 1e-5, 0.1, None, 0, False)
    with pytest.raises(ValueError, match="offset is 2"):
        cpu.add_layer_norm(x, x, None, None, None, 1e-5, 0.1, checks.seed_tensor(0), 2, False)
    with pytest.raises(ValueError, match=r"dropout_p is 1\.5"):
        cpu.add_layer_norm(x, x, None, None, None, 1e-5, 1.5, checks.seed_tensor(0), 0, False)
    with pytest.raises(ValueError, match="save_stats=True"):
        cpu.layer_norm_backward(x, x, torch.empty(0), torch.empty(0), None, [True] * 3)


# ---- instruction sets ----


def test_instruction_sets():
    assert _C.isas()[-1] == "baseline"
    assert _C.isa() == _C.isas()[0], "the best one answers"
    with pytest.raises(ValueError, match=r'"avx1024" is not one of those this machine supports: .*baseline'):
        _C.set_isa("avx1024")


def test_build_info():
    import fastbert

    info = _C.build_info()
    assert info["version"] == fastbert.__version__
    assert info["compiler"].startswith(("gcc", "clang"))


@pytest.mark.parametrize("width", [768, 784], ids=["whole-blocks", "with-a-rest"])
@dtypes
def test_sums_written_past_the_caches_are_the_same(isa, width, dtype):
    """From 4 MiB on; a few rows of the same tensor are below."""
    rows = (5 << 20) // (width * dtype.itemsize)
    i = checks.inputs(rows, width, dtype)
    for x_bias, dropout_p, seed in ((None, 0.0, None), (i.x_bias, 0.1, checks.seed_tensor(3))):
        rest = (x_bias, i.weight, i.bias, checks.EPS, dropout_p, seed, 0, True)
        large = cpu.add_layer_norm(i.x, i.residual, *rest)
        small = cpu.add_layer_norm(i.x[:9], i.residual[:9], *rest)
        for a, b in zip(large, small, strict=True):
            assert torch.equal(a[:9], b)
        wide = map(checks.double, (i.x, i.residual, x_bias, i.weight, i.bias))
        exact = reference.add_layer_norm(*wide, checks.EPS, dropout_p, seed, 0, True)
        for a, b in zip(large, exact, strict=True):
            assert_close_to_exact(a, b, what="past the caches", floor_ulps=16)
        x, residual = i.x.clone(), i.residual.clone()
        cpu.add_layer_norm(x, residual, *rest, out=residual, sum_out=x)
        assert torch.equal(x, large[1]) and torch.equal(residual, large[0])
