"""The Triton attention kernels in Triton's interpreter: every launcher on CPU tensors, against float64."""

from types import SimpleNamespace

import pytest
import torch

from fastbert.kernels import _configs, _launch, attention, attention_backward, attention_decode
from tests import attention_checks as checks
from tests.attention_checks import Case

pytestmark = pytest.mark.interpreter

kernels = SimpleNamespace(
    attention=attention.attention,
    attention_backward=attention_backward.attention_backward,
    attention_decode=attention_decode.attention_decode,
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SEEDS = range(32)


def ids(names):
    return [name.replace(" ", "_") for name in names]


def test_kernels_are_interpreted():
    assert _launch.INTERPRETED


@dtypes
@pytest.mark.parametrize("case", checks.CASES.values(), ids=ids(checks.CASES))
def test_attention(case, dtype):
    checks.check(kernels, case, dtype)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}-{checks.random_case(seed).id}")
def test_random_case(seed):
    checks.check(kernels, checks.random_case(seed), DTYPES["fp16" if seed % 2 else "fp32"])


def test_cases_have_several_blocks_and_short_ones():
    """The small blocks of the interpreter's table make the cases what they are for."""
    device = _launch.device_of(torch.empty(0))
    key = _configs.AttentionKey(64, 4, 65, dropout=False)
    for operation in ("attention", "attention_backward_dq", "attention_backward_dk_dv"):
        tile = _configs.attention_tile(operation, device, key)
        assert max(tile.block_m, tile.block_n) * 2 <= 64
    assert not _configs.has_attention_tile("attention_backward_whole", device, key)
    short = _configs.AttentionKey(64, 4, 31, dropout=False)
    assert _configs.has_attention_tile("attention_backward_whole", device, short)


@dtypes
def test_deterministic(dtype):
    case = Case(((33, 40),), heads=4, kv_heads=2, mask="additive-h", dropout_p=0.1, right=0)
    checks.check_deterministic(kernels, case, dtype)


def test_strides():
    checks.check_strides(kernels)


@pytest.mark.parametrize(
    ("seed", "offset"),
    [(0, 0), (-1, 2**31 - 4), (2**40 + 7, 2**34 + 8), (-(2**63), 2**62)],
    ids=["0-0", "minus_1-2^31", "2^40-2^34", "minus_2^63-2^62"],
)
@pytest.mark.parametrize("lengths", [(33, 37), (17, 30)], ids=["long", "short"])
def test_dropout_mask(lengths, seed, offset):
    checks.check_dropout_is_the_contracts(kernels, Case((lengths,), head_dim=40, dropout_p=0.3), seed, offset)


def test_packed_dropout_mask():
    checks.check_packed_dropout_is_the_contracts(kernels)


@dtypes
def test_not_finite(dtype):
    checks.check_not_finite(kernels, dtype)


@dtypes
def test_masks_of_the_least_number(dtype):
    checks.check_least_masks(kernels, dtype)


@dtypes
@pytest.mark.parametrize("case", checks.DECODE_CASES.values(), ids=ids(checks.DECODE_CASES))
def test_decode(case, dtype):
    checks.check_decode(kernels, case, dtype)


@dtypes
def test_decode_is_causal_attention(dtype):
    checks.check_decode_is_causal_attention(kernels, dtype)


def test_keys_of_a_sequence_are_split():
    device = _launch.device_of(torch.empty(0))
    assert _configs.decode_splits(device, rows=1, blocks=9) > 1
    assert _configs.decode_splits(device, rows=100, blocks=9) == 1


def test_inputs_are_not_written():
    i = checks.inputs(Case(((33, 33),), mask="additive", padding=True), torch.float32)
    tensors = [x for x in (i.q, i.k, i.v, i.grad_out, *i.arguments) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    out, lse = kernels.attention(i.q, i.k, i.v, *i.arguments, True)
    saved = out.clone(), lse.clone()
    kernels.attention_backward(i.grad_out, i.q, i.k, i.v, out, lse, *i.arguments, True, False)
    assert all(torch.equal(a, b) for a, b in zip([*tensors, out, lse], [*before, *saved], strict=True))


# ---------------------------------------------------------------------------------------------------------- bad input


def _call(head_dim=16, dtype=torch.float32, **changes):
    q = torch.ones(1, 2, 3, head_dim, dtype=dtype)
    arguments = dict(
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, attn_mask=None, key_padding_mask=None,
        alibi_slopes=None, scale=1.0, window_left=-1, window_right=-1, bottom_right=False,
        dropout_p=0.0, seed=None, offset=0, save_lse=False,
    )  # fmt: skip
    return kernels.attention(q, changes.pop("k", q), changes.pop("v", q), **(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(head_dim=257), ValueError, r"head_dim is 257; the Triton kernels take 1 to 256\. Use fastbert\.use_ref"),
        (dict(v=torch.ones(1, 2, 3, 300)), ValueError, "value_dim is 300; the Triton kernels take 1 to 256"),
        (dict(dtype=torch.float64), TypeError, r"attention: q is torch\.float64"),
        (dict(dtype=torch.bfloat16), TypeError, "q is bfloat16; Triton's interpreter computes garbage"),
        (dict(dropout_p=0.5), ValueError, "seed is None"),
        (dict(dropout_p=1.5, seed=torch.zeros(1, dtype=torch.int64)), ValueError, "dropout_p is 1.5"),
        (dict(dropout_p=0.5, seed=torch.zeros(1, dtype=torch.int64), offset=2), ValueError, "offset is 2"),
        (dict(k=torch.ones(1, 2, 3, 16, device="meta")), ValueError, "k is on meta"),
    ],
    ids=["head_dim", "value_dim", "float64", "bfloat16", "no-seed", "p-above-1", "offset-2", "device"],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)


def test_decode_of_wide_heads_is_refused():
    q = torch.ones(1, 1, 2, 320)
    with pytest.raises(ValueError, match="attention_decode: head_dim is 320"):
        kernels.attention_decode(q, q, q, torch.ones(1, dtype=torch.int32), None, 1.0, -1)
