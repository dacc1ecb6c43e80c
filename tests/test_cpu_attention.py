"""The C++ attention, called directly, under every instruction set that this machine has: against float64."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests import attention_checks as checks
from tests.attention_checks import Case
from tests.numerics import assert_close_to_exact

_C = pytest.importorskip("fastbert._C", reason="the extension is not built")
cpu = pytest.importorskip("fastbert.cpu.attention")

operations = SimpleNamespace(
    attention=cpu.attention,
    attention_backward=cpu.attention_backward,
    attention_decode=cpu.attention_decode,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
PLAIN = (None, None, 0, 0, None, None, None, 0.125, -1, -1, False, 0.0, None, 0)


def ids(names):
    return [name.replace(" ", "_") for name in names]


# ---- against float64 ----


@dtypes
@pytest.mark.parametrize("case", checks.CASES.values(), ids=ids(checks.CASES))
def test_attention(isa, case, dtype):
    checks.check(operations, case, dtype)


@dtypes
@pytest.mark.parametrize("seed", range(24), ids=lambda seed: f"seed{seed}-{checks.random_case(seed).id}")
def test_random_case(isa, seed, dtype):
    """Twice as long: tiles have up to 64 queries, blocks 64 keys."""
    checks.check(operations, checks.larger(checks.random_case(seed), 2), dtype)


@dtypes
@pytest.mark.parametrize("head_dim", [1, 3, 16, 17, 31, 33, 64, 80, 96, 128, 256])
def test_head_dims(isa, head_dim, dtype):
    for value_dim in (head_dim, 7):
        checks.check(operations, Case(((33, 70),), head_dim=head_dim, value_dim=value_dim), dtype)


@dtypes
@pytest.mark.parametrize("right", [-1, 0], ids=["full", "causal"])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000])
def test_lengths(isa, length, right, dtype):
    """Every remainder of a vector, a tile, a block and a group of keys."""
    checks.check(operations, Case(((length, length),), heads=1, kv_heads=1, right=right), dtype)
    case = Case(((length, 70), (3, length)), packed=True, heads=1, kv_heads=1, right=right, bottom_right=True)
    checks.check(operations, case, dtype)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-6, 30.0, 1e6])
def test_magnitudes(isa, magnitude):
    """Gradients beside SDPA's, which come from the same sums (of almost one-hot weights almost nothing is left), or where
    those overflow beside eager's."""
    case = Case(((70, 130),), magnitude=magnitude)
    checks.check(operations, case, torch.float32, backward=False)
    wanted = checks.expected(case, torch.float32, "cpu")
    i = wanted.inputs
    leaves = [x.clone().requires_grad_() for x in (i.q, i.k, i.v)]
    torchs = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, i.grad_out)
    if not all(x.isfinite().all() for x in torchs):
        torchs = wanted.torchs_gradients
    _, _, *gradients, _ = _forward_and_backward(i)
    for name, actual, exact, own in zip(("dq", "dk", "dv"), gradients, wanted.gradients, torchs, strict=False):
        assert_close_to_exact(actual, exact, own, name)


@pytest.mark.parametrize("name", ["causal", "padding", "additive mask", "packed, grouped, dropout"])
def test_float16_is_computed_in_float32(name):
    checks.check(operations, checks.CASES[name], torch.float16)


def test_weights_are_exact_down_to_the_smallest(isa):
    """One-hot values show the weights themselves: a few ulps, and what rounding its argument does to an exponential."""
    logits = torch.cat([torch.linspace(-80, 0, 500), torch.tensor([-1e30, -200.0, -1e-7])])
    k, v = logits[None, None, :, None], torch.eye(503)[None, None]
    out, _ = cpu.attention(torch.ones(1, 1, 1, 1), k, v, *PLAIN[:7], 1.0, *PLAIN[8:], False)
    exact = torch.softmax(logits.double(), 0)
    error = ((out[0, 0, 0] - exact).abs() / exact)[:500] / 2**-23
    assert (error <= 4 + logits[:500].abs()).all()
    assert not out[0, 0, 0, 500:502].any()


def test_one_visible_key_is_the_result(isa):
    """Its weight is 1, and its logit the log-sum-exp, to the last bit."""
    q, k, v = (torch.randn(1, 2, 70, 16) for _ in "qkv")
    out, lse = cpu.attention(q, k, v, *PLAIN[:8], 0, 0, *PLAIN[10:], True)
    assert torch.equal(out, v)
    assert_close_to_exact(lse, (q.double() * k.double()).sum(-1) * 0.125)


def test_boundaries_of_any_stride():
    q, ends = torch.randn(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    wanted, _ = cpu.attention(q, q, q, ends, ends, 3, 3, *PLAIN[4:], False)
    apart = ends.repeat_interleave(2)[::2]
    assert torch.equal(cpu.attention(q, q, q, apart, apart, 3, 3, *PLAIN[4:], False)[0], wanted)


# ---- masks, dropout, values that are no numbers ----


@pytest.mark.parametrize("kept", [0, 1, 64, 65, 130])
def test_padding_of_whole_blocks(isa, kept):
    """Blocks of keys that nobody sees are left out, and give the bits of the shorter sequence."""
    q, k, v = (torch.randn(1, 2, 200, 64) for _ in "qkv")
    keys = (torch.arange(200) < kept)[None]
    for masks in ((None, keys), (keys, None), (keys[:, None].expand(2, 200, 200), None)):
        out, lse = cpu.attention(q, k, v, *PLAIN[:4], *masks, *PLAIN[6:], True)
        wanted, wanted_lse = cpu.attention(q, k[:, :, :kept], v[:, :, :kept], *PLAIN, True)
        assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (-1, 2**31 - 4), (2**40 + 7, 2**34 + 8), (-(2**63), 2**62)], ids=str
)
def test_dropout_mask(isa, seed, offset):
    for lengths in ((33, 37), (70, 79), (17, 30)):
        case = Case((lengths,), head_dim=80, dropout_p=0.3)
        checks.check_dropout_is_the_contracts(operations, case, seed, offset)


def test_packed_dropout_mask(isa):
    checks.check_packed_dropout_is_the_contracts(operations)


@dtypes
def test_not_finite(isa, dtype):
    checks.check_not_finite(operations, dtype)
    checks.check_infinite_logits_backward(operations, dtype)
    checks.check_padding_is_not_read(operations, dtype, factor=2)


def test_log_sum_exp_of_not_finite_logits(isa):
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 70, 1)
    for values, wanted in (
        ([torch.inf], torch.inf),
        ([torch.inf, torch.nan], torch.nan),
        ([torch.nan], torch.nan),
        ([torch.nan] + [0.0] * 68 + [torch.inf], torch.nan),  # in the block before
        ([-torch.inf] * 70, -torch.inf),
    ):
        k[0, 0, : len(values), 0] = torch.tensor(values)
        _, lse = cpu.attention(q, k, k.nan_to_num(), *PLAIN, True)
        torch.testing.assert_close(lse, torch.full((1, 1, 1), wanted), equal_nan=True)
        k.zero_()


@dtypes
def test_masks_of_the_least_number(isa, dtype):
    checks.check_least_masks(operations, dtype)


# ---- layouts, determinism, threads, processes ----


def test_strides(isa):
    checks.check_strides(operations)


@pytest.mark.parametrize("head_dim", [40, 33])
def test_strides_of_bfloat16(isa, head_dim):
    qkv = torch.randn(1, 70, 3, 2, head_dim).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    wanted, _ = cpu.attention(*(x.contiguous() for x in (q, k, v)), *PLAIN, False)
    apart = [torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    transposed = [x.mT.contiguous().mT for x in (q, k, v)]
    for layout in ((q, k, v), apart, transposed):
        assert torch.equal(cpu.attention(*layout, *PLAIN, False)[0], wanted)


@dtypes
def test_packed_equals_dense(isa, dtype):
    q, k, v = (torch.randn(3, 2, 100, 64).to(dtype) for _ in "qkv")
    dense, lse = cpu.attention(q, k, v, *PLAIN, True)
    ends = torch.arange(0, 301, 100, dtype=torch.int32)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out, packed_lse = cpu.attention(*packed, ends, ends, 100, 100, *PLAIN[4:], True)
    assert torch.equal(out.unflatten(0, (3, 100)).transpose(1, 2), dense)
    assert torch.equal(packed_lse.unflatten(1, (3, 100)).transpose(0, 1), lse)


def _forward_and_backward(i: checks.Inputs):
    out, lse = cpu.attention(i.q, i.k, i.v, *i.arguments, True)
    gradients = cpu.attention_backward(i.grad_out, i.q, i.k, i.v, out, lse, *i.arguments, i.needs_mask_grad, False)
    return out, lse, *gradients


def _long_among_short(dtype: torch.dtype) -> checks.Inputs:
    lengths = tuple((n, n) for n in (3, 500, 0, 17, 1, 64, 65))
    case = Case(lengths, packed=True, heads=4, head_dim=64, right=0, bottom_right=True, dropout_p=0.1)
    return checks.inputs(case, dtype)


@dtypes
def test_any_number_of_threads_gives_the_same_bits(isa, threads, dtype):
    i = _long_among_short(dtype)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(_forward_and_backward(i))
    alone, _ = cpu.attention(i.q, i.k, i.v, *i.arguments, False)
    assert torch.equal(alone, results[0][0])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("mask", ["additive", "additive-b", "additive-h", "additive-b-h-q", "additive-b-k"])
def test_any_number_of_threads_sums_a_masks_gradient_alike(threads, mask):
    i = checks.inputs(Case(((130, 140),) * 5, heads=6, kv_heads=3, mask=mask), torch.float32)
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        results.append(_forward_and_backward(i))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_python_threads_at_once():
    """The lock is released: several calls run at once, each with its own workspace."""
    many = [checks.inputs(Case(((150, 150),), heads=4), dtype, seed=n) for n in range(4) for dtype in DTYPES.values()]

    wanted = [_forward_and_backward(i) for i in many]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for result, expected in zip(pool.map(_forward_and_backward, many), wanted, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def _in_a_new_process(script: str) -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)


def test_forked_child():
    """A parallel region in a forked child would wait for threads that are not there."""
    _in_a_new_process("""
        import os, torch
        from fastbert.cpu.attention import attention
        torch.set_num_threads(2)
        q = torch.randn(2, 12, 100, 64)
        masks = (None, None, 0, 0, None, None, None, 0.125, -1, -1, False, 0.0, None, 0, False)
        wanted = attention(q, q, q, *masks)[0]  # starts the threads
        pid = os.fork()
        if pid == 0:
            out = attention(q, q, q, *masks)[0]
            os._exit(0 if (out.numpy() == wanted.numpy()).all() else 1)
        assert os.waitpid(pid, 0)[1] == 0
    """)


@dtypes
def test_memory_is_linear_in_the_length(dtype):
    """The logits alone would be 268 MB."""
    _in_a_new_process(f"""
        import resource, torch
        from fastbert.cpu.attention import attention, attention_backward
        masks = (None, None, 0, 0, None, None, None, 0.125, 255, 0, False, 0.0, None, 0)
        q = torch.randn(1, 1, 8192, 64).to({dtype})
        def run(q, k):
            out, lse = attention(q, k, k, *masks, True)
            attention_backward(q, q, k, k, out, lse, *masks, False, False)
        run(q[:, :, :64], q)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run(q, q)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
    """)


# ---- decoding ----


@dtypes
@pytest.mark.parametrize("case", checks.DECODE_CASES.values(), ids=ids(checks.DECODE_CASES))
def test_decode(isa, case, dtype):
    checks.check_decode(operations, case, dtype)


@dtypes
def test_decode_is_causal_attention(isa, dtype):
    checks.check_decode_is_causal_attention(operations, dtype)


def test_decode_of_float16():
    checks.check_decode(operations, checks.DECODE_CASES["several queries"], torch.float16)


# ---- bad input ----


def _call(**changes):
    q = torch.ones(2, 2, 3, 8)
    arguments = dict(
        q=q, k=q, v=q, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, attn_mask=None,
        key_padding_mask=None, alibi_slopes=None, scale=1.0, window_left=-1, window_right=-1, bottom_right=False,
        dropout_p=0.0, seed=None, offset=0, save_lse=False,
    )  # fmt: skip
    return cpu.attention(**(arguments | changes))


OTHER = torch.ones(2, 3, 3, 8)
ENDS = torch.tensor([0, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q=OTHER.double()), NotImplementedError, r"torch\.float64; the C\+\+ implementation takes torch\.float32"),
        (dict(k=OTHER.bfloat16()), TypeError, r"k torch\.bfloat16.*cast them to one dtype"),
        (dict(k=OTHER.to("meta")), ValueError, "k is on meta"),
        (dict(k=OTHER, v=OTHER), ValueError, "heads that divide"),
        (dict(k=OTHER[:1]), ValueError, "batch sizes"),
        (dict(v=OTHER), ValueError, "equal tokens"),
        (dict(attn_mask=torch.ones(4, 3)), ValueError, r"attn_mask has shape \[4, 3\]; expected \[2, 2, 3, 3\]"),
        (dict(key_padding_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"expected bool \[2, 3\]"),
        (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes has shape \[3\]; expected \[2\] or \[2, 2\]"),
        (dict(cu_seqlens_q=ENDS), ValueError, "expected two of one shape"),
        (dict(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS.long()), ValueError, r"torch\.int64 on cpu; expected int32"),
        (dict(dropout_p=0.5), ValueError, "seed is None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(grad_out=OTHER), r"grad_out is \[2, 3, 3, 8\].*expected \[2, 2, 3, 8\]"),
        (dict(out=torch.ones(2, 2, 3, 8).bfloat16()), r"out is .*torch\.bfloat16"),
        (dict(lse=torch.ones(2, 3, 2)), r"lse is \[2, 3, 2\].*expected \[2, 2, 3\]"),
        (dict(k=OTHER, v=OTHER), "attention_backward: .*heads that divide"),
        (dict(needs_mask_grad=True), "no additive mask"),
        (dict(attn_mask=torch.ones(3, 3, dtype=torch.bool), needs_mask_grad=True), "no additive mask"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_of_the_gradients(changes, message):
    q = torch.ones(2, 2, 3, 8)
    tensors = dict(grad_out=q, q=q, k=q, v=q, out=q, lse=torch.ones(2, 2, 3))
    rest = dict(attn_mask=None, needs_mask_grad=False) | {k: v for k, v in changes.items() if k not in tensors}
    masks = (None, None, 0, 0, rest["attn_mask"], *PLAIN[5:])
    with pytest.raises(ValueError, match=message):
        cpu.attention_backward(
            *(changes.get(name, x) for name, x in tensors.items()), *masks, rest["needs_mask_grad"], False
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=torch.ones(2, 5, 2, 4)), "head_dim"),
        (dict(v=torch.ones(2, 4, 2, 8)), "equal capacities"),
        (dict(lengths=torch.ones(3, dtype=torch.int32)), r"lengths is \[3\] torch\.int32.*expected int32 \[2\]"),
        (dict(lengths=torch.ones(2, dtype=torch.int64)), "expected int32"),
    ],
    ids=["head_dim", "capacity", "lengths", "int64"],
)
def test_bad_input_of_decoding(changes, message):
    q, k = torch.ones(2, 1, 4, 8), torch.ones(2, 5, 2, 8)
    arguments = dict(q=q, k=k, v=k, lengths=torch.ones(2, dtype=torch.int32)) | changes
    with pytest.raises(ValueError, match=message):
        cpu.attention_decode(*arguments.values(), None, 1.0, -1)
