"""The attention operators on a GPU: the interpreter's checks on CUDA tensors, and what only a GPU can show."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastbert
from fastbert import reference
from tests import attention_checks as checks
from tests.attention_checks import Case
from tests.gpu_checks import check_graph, without_synchronisation

pytestmark = pytest.mark.gpu

CUDA = "cuda"
operations = torch.ops.fastbert
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
HEAD_DIMS = [16, 17, 32, 64, 80, 96, 128, 192, 256]


def ids(names):
    return [name.replace(" ", "_") for name in names]


def ids_of_lengths(lengths):
    return "+".join(f"{q}x{k}" for q, k in lengths) or "no_sequences"


def test_triton_answers():
    answers = [s for s in fastbert.backends() if s.device == "cuda" and s.operation.startswith("attention")]
    assert {s.operation for s in answers} == {"attention", "attention_backward", "attention_decode"}
    assert {s.implementation for s in answers if s.dtype != "float64"} == {"Triton"}


@dtypes
@pytest.mark.parametrize("factor", [1, 4, 16], ids=lambda factor: f"x{factor}")
@pytest.mark.parametrize("case", checks.CASES.values(), ids=ids(checks.CASES))
def test_attention(case, factor, dtype):
    checks.check(operations, checks.larger(case, factor), dtype, CUDA)


@dtypes
@pytest.mark.parametrize("seed", range(100), ids=lambda seed: f"seed{seed}-{checks.random_case(seed).id}")
def test_random_case(seed, dtype):
    checks.check(operations, checks.larger(checks.random_case(seed), 1 + seed % 5), dtype, CUDA)


@dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 127, 128, 129, 256, 257, 1000])
def test_head_dims_and_lengths(length, head_dim, dtype):
    case = Case(((length, length),), head_dim=head_dim)
    checks.check(operations, case, dtype, CUDA)
    checks.check(operations, replace(case, right=0, dropout_p=0.1), dtype, CUDA)
    checks.check(operations, replace(case, mask="additive-h", kv_heads=1), dtype, CUDA)


@dtypes
def test_deterministic(dtype):
    case = Case(
        ((700, 900), (1, 5), (0, 3), (300, 300)), heads=4, packed=True, dropout_p=0.1, right=0, mask="additive-h"
    )
    checks.check_deterministic(operations, case, dtype, CUDA)
    checks.check_deterministic(operations, Case(((128, 128),) * 8, padding="holes"), dtype, CUDA)


def test_strides():
    checks.check_strides(operations, CUDA)


@dtypes
@pytest.mark.parametrize("lengths", [((700, 900), (5, 5)), ((128, 128), (0, 9)), ((0, 0),), ()], ids=ids_of_lengths)
def test_rows_past_the_end(lengths, dtype):
    checks.check_rows_past_the_end(operations, lengths, dtype, CUDA)


@pytest.mark.parametrize("lengths", [(256, 255), (128, 128), (33, 37)], ids=lambda n: f"{n[0]}x{n[1]}")
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-1, 2**31 - 4), (2**40 + 7, 2**34 + 8), (-(2**63), 2**62)])
def test_dropout_mask(lengths, seed, offset):
    case = Case((lengths, lengths), head_dim=256, dropout_p=0.3)
    checks.check_dropout_is_the_contracts(operations, case, seed, offset, CUDA)


def test_packed_dropout_mask():
    checks.check_packed_dropout_is_the_contracts(operations, CUDA)


@dtypes
def test_not_finite(dtype):
    checks.check_not_finite(operations, dtype, CUDA)


@dtypes
def test_infinite_logits_backward(dtype):
    checks.check_infinite_logits_backward(operations, dtype, CUDA)


@dtypes
def test_padding_is_not_read(dtype):
    checks.check_padding_is_not_read(operations, dtype, CUDA, factor=8)


@dtypes
def test_masks_of_the_least_number(dtype):
    checks.check_least_masks(operations, dtype, CUDA)


@dtypes
@pytest.mark.parametrize("case", checks.DECODE_CASES.values(), ids=ids(checks.DECODE_CASES))
def test_decode(case, dtype):
    checks.check_decode(operations, case, dtype, CUDA)


@dtypes
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_of_a_long_cache(head_dim, dtype):
    lengths = (8192, 1, 4097, 0)
    case = checks.DecodeCase(lengths, seq_q=2, heads=8, kv_heads=2, head_dim=head_dim)
    checks.check_decode(operations, case, dtype, CUDA)
    checks.check_decode(operations, replace(case, left=1000, alibi=1), dtype, CUDA)


@dtypes
def test_decode_is_causal_attention(dtype):
    checks.check_decode_is_causal_attention(operations, dtype, CUDA)


def test_tf32_only_where_torch_allows_it():
    i = checks.inputs(Case(((257, 257),), head_dim=128), torch.float32, CUDA)
    exact, _ = reference.attention(*(checks.double(x) for x in (i.q, i.k, i.v)), *i.arguments, False)
    errors = []
    setting = torch.backends.cuda.matmul.fp32_precision
    try:
        for torch.backends.cuda.matmul.fp32_precision in ("ieee", "tf32"):
            out, _ = operations.attention(i.q, i.k, i.v, *i.arguments, False)
            errors.append(float((out - exact).abs().max()))
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
    assert errors[0] < 3e-6 and errors[0] < errors[1] < 1e-2


@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_public_functions_and_their_gradients(causal, dtype):
    q, k, v = (torch.randn(2, 4, 130, 64, device=CUDA, dtype=dtype) for _ in "qkv")
    grad = torch.randn_like(q)
    results = []
    for function, tensors in (
        (fastbert.functional.scaled_dot_product_attention, (q, k, v)),
        (F.scaled_dot_product_attention, (q, k, v)),
        (F.scaled_dot_product_attention, (q.double(), k.double(), v.double())),
    ):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(*leaves, is_causal=causal)
        out.backward(grad.to(out.dtype))
        results.append([out, *(x.grad for x in leaves)])
    for name, mine, torchs, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        checks.assert_close_to_exact(mine, exact, torchs, name, floor_ulps=checks.FLOOR_ULPS)


def test_packed_equals_dense():
    """Sequences of one length give, packed or dense, the same bits."""
    q, k, v = (torch.randn(3, 4, 200, 64, device=CUDA, dtype=torch.bfloat16) for _ in "qkv")
    dense = fastbert.functional.scaled_dot_product_attention(q, k, v)
    cu_seqlens = torch.arange(0, 601, 200, dtype=torch.int32, device=CUDA)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = fastbert.functional.varlen_attention(*packed, cu_seqlens, cu_seqlens, 200, 200)
    assert torch.equal(out.unflatten(0, (3, 200)).transpose(1, 2), dense)


def _steps():
    """Forward, backward and decoding, with a seed that may change between calls."""
    i = checks.inputs(
        Case(((130, 130), (7, 7)), packed=True, head_dim=64, dropout_p=0.1, right=0), torch.bfloat16, CUDA
    )
    seed = i.arguments[12]
    cache = torch.randn(2, 4096, 2, 64, device=CUDA, dtype=torch.bfloat16)
    lengths = torch.tensor([4096, 77], dtype=torch.int32, device=CUDA)
    query = torch.randn(2, 1, 4, 64, device=CUDA, dtype=torch.bfloat16)

    def step():
        out, lse = operations.attention(i.q, i.k, i.v, *i.arguments, True)
        gradients = operations.attention_backward(i.grad_out, i.q, i.k, i.v, out, lse, *i.arguments, False, True)
        return out, lse, *gradients, *operations.attention_decode(query, cache, cache, lengths, None, 0.125, -1)

    return step, seed, lengths


def test_cuda_graph_replays_with_a_new_seed_and_new_lengths():
    step, seed, lengths = _steps()

    def change(value, length):
        seed.fill_(value)
        lengths[0] = length

    changes = [functools.partial(change, *values) for values in ((1, 4096), (2, 100), (-3, 0))]
    replays = check_graph(step, changes)
    outs, decoded = [replay[0] for replay in replays], [replay[-2] for replay in replays]
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    assert not torch.equal(decoded[0], decoded[1]) and not decoded[2][0].any()


def test_no_host_synchronisation():
    step, _, _ = _steps()
    without_synchronisation(step)


def test_memory_is_linear_in_the_length():
    length = 16384
    q, k, v = (torch.randn(1, 4, length, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = fastbert.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.numel() * q.element_size()


def test_more_than_2_31_elements():
    """Offsets pass 2**31: the last sequence is right, forward and backward."""
    heads, head_dim, length, batch = 16, 128, 512, 2**11 + 2  # 2**31 + 2**21 elements
    elements = heads * head_dim * length * batch
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2 * elements:
        pytest.skip(f"needs {12 * 2 * elements / 2**30:.0f} GiB of GPU memory; {free / 2**30:.0f} are free")
    q = torch.randn(batch * length, heads, head_dim, device=CUDA, dtype=torch.bfloat16)
    cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=CUDA)
    masks = (None, None, None, head_dim**-0.5, -1, 0, True, 0.0, None, 0)
    out, lse = operations.attention(q, q, q, cu_seqlens, cu_seqlens, length, length, *masks, True)
    gradients = operations.attention_backward(
        q, q, q, q, out, lse, cu_seqlens, cu_seqlens, length, length, *masks, False, False
    )
    last = q[-length:].transpose(0, 1)[None].double()
    dense = (None, None, 0, 0, *masks)
    exact, exact_lse = reference.attention(last, last, last, *dense, True)
    wanted = reference.attention_backward(last, last, last, last, exact, exact_lse, *dense, False, True)
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), (out, *gradients), (exact, *wanted), strict=False):
        tail = actual[-length:].transpose(0, 1)[None].double()
        torch.testing.assert_close(tail, expected, atol=3e-2, rtol=3e-2, msg=name)


def test_one_sequence_of_more_than_2_31_elements():
    """Row times stride passes 2**31 within one sequence; a window keeps it cheap."""
    heads, head_dim, length = 16, 128, 2**20 + 2**10
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2 * heads * head_dim * length:
        pytest.skip(f"needs {4 * 2 * heads * head_dim * length / 2**30:.0f} GiB of GPU memory")
    q = torch.randn(length, heads, head_dim, device=CUDA, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=CUDA)
    arguments = (None, None, None, head_dim**-0.5, 127, 0, True, 0.0, None, 0)
    out, _ = operations.attention(q, q, q, cu_seqlens, cu_seqlens, length, length, *arguments, False)
    tail = q[-512:].transpose(0, 1)[None].double()
    exact, _ = reference.attention(tail, tail, tail, None, None, 0, 0, *arguments, False)
    torch.testing.assert_close(out[-256:].transpose(0, 1)[None].double(), exact[:, :, -256:], atol=2e-2, rtol=2e-2)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    checks.check(operations, Case(((65, 65),)), torch.float32, "cuda:1")


def test_cpu_tensors_are_refused_by_the_kernels():
    from fastbert.kernels import attention as kernels

    q = torch.ones(1, 1, 4, 16)
    arguments = (None, None, 0, 0, None, None, None, 1.0, -1, -1, False, 0.0, None, 0, False)
    with pytest.raises(ValueError, match="q is on cpu; the Triton kernels take cuda tensors"):
        kernels.attention(q, q, q, *arguments)
