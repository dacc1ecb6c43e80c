"""The Triton attention kernels in Triton's interpreter: every launcher on CPU tensors, against float64."""

from types import SimpleNamespace

import pytest
import torch

from fastbert.kernels import _attention_configs, _launch, attention, attention_backward, attention_decode
from fastbert.kernels._attention_padding import key_bounds
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


def ids_of_lengths(lengths):
    return "+".join(f"{q}x{k}" for q, k in lengths) or "no_sequences"


def test_kernels_are_interpreted():
    assert _launch.INTERPRETED


@dtypes
@pytest.mark.parametrize("case", checks.CASES.values(), ids=ids(checks.CASES))
def test_attention(case, dtype):
    checks.check(kernels, case, dtype)


#: What the kernel for dq alone, which only deterministic gradients of long sequences take, tells apart.
TWO_PASSES = [
    "several blocks, nothing masked", "odd lengths", "causal", "window", "padding at the start, causal",
    "additive mask for the heads", "mask of the least number", "grouped heads", "values wider", "dropout",
    "packed, causal",
]  # fmt: skip


@pytest.mark.parametrize("name", TWO_PASSES, ids=ids(TWO_PASSES))
def test_deterministic_gradients(name):
    checks.check(kernels, checks.CASES[name], torch.float32, deterministic=True)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}-{checks.random_case(seed).id}")
def test_random_case(seed):
    dtype = DTYPES["fp16" if seed % 2 else "fp32"]
    checks.check(kernels, checks.random_case(seed), dtype, deterministic=seed % 4 > 1)


def test_cases_have_several_blocks_and_short_ones():
    """The small blocks of the interpreter's table make the cases what they are for."""
    device = _launch.device_of(torch.empty(0))
    key = _attention_configs.AttentionKey(64, 4, 65, dropout=False)
    for operation in (f"attention{name}" for name in ("", "_backward_dq", "_backward_dk_dv", "_backward_add")):
        tile = _attention_configs.attention_tile(operation, device, key)
        assert max(tile.block_m, tile.block_n) * 2 <= 64
    assert not _attention_configs.has_attention_tile("attention_backward_whole", device, key)
    short = _attention_configs.AttentionKey(64, 4, 31, dropout=False)
    assert _attention_configs.has_attention_tile("attention_backward_whole", device, short)
    assert not _attention_configs.has_attention_tile("attention_backward_add", device, short)


def test_key_bounds():
    """First real key, first gap, end; across the blocks that the kernel looks at, with strides."""
    keys = 2 * _attention_configs.KEY_BOUNDS_BLOCK + 5
    patterns = {
        "all": (lambda key: key >= 0, (0, keys, keys)),
        "none": (lambda key: key < 0, (keys, keys, 0)),
        "end": (lambda key: key < 1500, (0, 1500, 1500)),
        "start": (lambda key: key >= 1500, (1500, keys, keys)),
        "one": (lambda key: key == 1023, (1023, 1024, 1024)),
        "gap": (lambda key: (key > 9) & (key != 1024) & (key < 2000), (10, 1024, 2000)),
        "apart": (lambda key: key % 2049 == 3, (3, 4, 2053)),
    }
    key = torch.arange(keys)
    mask = torch.stack([pattern(key) for pattern, _ in patterns.values()])
    wide = torch.ones(len(patterns), keys + 7, dtype=torch.bool)
    wide[:, :keys] = mask
    for masks in (mask, wide[:, :keys]):
        found = key_bounds(masks.view(torch.uint8)).tolist()
        assert dict(zip(patterns, map(tuple, found), strict=True)) == {n: wanted for n, (_, wanted) in patterns.items()}


@dtypes
def test_padding_is_not_read(dtype):
    checks.check_padding_is_not_read(kernels, dtype)


@pytest.mark.parametrize(
    ("blocks", "tiles"), [(1, 1), (1, 4), (1, 7), (1, 1000), (3, 5), (8, 100), (9, 100)], ids=lambda n: str(n)
)
def test_mask_gradient_splits(blocks, tiles):
    """Every tile is dealt out once, no program is idle, and partial sums stay few."""
    device = _launch.device_of(torch.empty(0))
    each, splits = _attention_configs.mask_gradient_splits(device, blocks, tiles)
    assert (splits - 1) * each < tiles <= splits * each
    assert splits == 1 or splits * blocks <= 8
    assert splits == 1 or blocks < 8


def test_mask_gradient_of_very_many_tiles(monkeypatch):
    """Splits begin past 2**31 tiles: none of them may find its way back to the first."""
    i = checks.inputs(Case(((33, 40), (33, 40)), mask="additive-b-h-q-k"), torch.float32)
    out, lse = kernels.attention(i.q, i.k, i.v, *i.arguments, True)
    call = (i.grad_out, i.q, i.k, i.v, out, lse, *i.arguments, True, True)
    *_, wanted = kernels.attention_backward(*call)
    monkeypatch.setattr(_attention_configs, "mask_gradient_splits", lambda *_: (2**31 - 1, 3))
    *_, actual = kernels.attention_backward(*call)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("lengths", [((33, 65), (5, 5)), ((17, 30), (0, 9)), ((0, 0),), ()], ids=ids_of_lengths)
def test_rows_past_the_end(lengths):
    checks.check_rows_past_the_end(kernels, lengths, torch.float32)


@dtypes
def test_deterministic(dtype):
    case = Case(((33, 36),), heads=2, kv_heads=1, mask="additive-h", dropout_p=0.1, right=0)
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
def test_infinite_logits_backward(dtype):
    checks.check_infinite_logits_backward(kernels, dtype)


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
    assert _attention_configs.decode_splits(device, rows=1, blocks=9) > 1
    assert _attention_configs.decode_splits(device, rows=100, blocks=9) == 1


def test_inputs_are_not_written():
    i = checks.inputs(Case(((33, 33),), mask="additive", padding="holes"), torch.float32)
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
