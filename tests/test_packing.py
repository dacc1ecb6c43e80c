"""Packing and unpacking: every padding, one transfer at most, gradients."""

import logging
import warnings

import numpy
import pytest
import torch

from fastbert.packing import PackedBatch, pack, unpack

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]],
    "holes": [[0, 1, 0, 1, 1], [1, 0, 0, 0, 1], [0, 1, 1, 1, 0]],
    "full": [[1] * 5, [1] * 5, [1] * 5],
    "empty-rows": [[0] * 5, [1, 1, 0, 0, 0], [0] * 5],
    "nothing-real": [[0] * 5, [0] * 5, [0] * 5],
    "one-column": [[1], [0], [1]],
    "no-columns": [[], [], []],
}


@pytest.mark.parametrize("rest", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_mask_there_and_back(name, dtype, rest):
    mask = torch.tensor(MASKS[name]).to(dtype)
    real = mask.bool()
    padded = torch.randn(*mask.shape, *rest)
    packed = pack(padded, mask)
    packed.check()
    assert torch.equal(packed.values, padded[real])
    assert packed.cu_seqlens.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == max(real.sum(1).tolist())
    assert torch.equal(packed.position_ids, torch.arange(mask.shape[1]).expand(mask.shape)[real])
    restored = unpack(packed)
    assert restored.shape == padded.shape
    assert torch.equal(restored[real], padded[real])
    assert not restored[~real].any()


def test_padding_is_not_read():
    padded = torch.full((2, 3), torch.nan)
    padded[0, 1] = 5.0
    packed = pack(padded, torch.tensor([[0, 1, 0], [0, 0, 0]]))
    assert packed.values.tolist() == [5.0]
    assert unpack(packed).tolist() == [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32), numpy.array])
def test_lengths_equal_the_mask_they_stand_for(side, kind):
    lengths = [3, 0, 5, 1]
    mask = torch.zeros(4, 5, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = True
    if side == "left":
        mask = mask.flip(1)
    padded = torch.randn(4, 5, 2)
    by_lengths, by_mask = pack(padded, lengths=kind(lengths), padding_side=side), pack(padded, mask)
    for field in ("values", "cu_seqlens", "position_ids", "indices"):
        assert torch.equal(getattr(by_lengths, field), getattr(by_mask, field)), field
    assert by_lengths.lengths == by_mask.lengths == lengths
    assert by_lengths.max_seqlen == by_mask.max_seqlen == 5
    assert torch.equal(unpack(by_lengths), unpack(by_mask))


def test_without_mask_every_token_is_real_and_nothing_is_copied():
    padded = torch.randn(3, 5, 2)
    packed = pack(padded)
    assert packed.values.data_ptr() == padded.data_ptr()
    assert packed.lengths == [5, 5, 5]
    assert packed.position_ids.tolist() == list(range(5)) * 3
    assert torch.equal(unpack(packed), padded)


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (5,)], ids=str)
def test_position_and_token_type_ids_are_packed_along(shape):
    mask = torch.tensor(MASKS["holes"]).bool()
    ids = torch.randint(9, shape, dtype=torch.int32)
    packed = pack(torch.randn(3, 5), mask, position_ids=ids, token_type_ids=ids + 1)
    assert torch.equal(packed.position_ids, ids.long().expand(3, 5)[mask])
    assert torch.equal(packed.token_type_ids, ids.long().expand(3, 5)[mask] + 1)


def test_strided_input():
    padded = torch.randn(5, 3, 2).transpose(0, 1)
    mask = torch.tensor(MASKS["holes"]).bool().t().contiguous().t()
    assert torch.equal(pack(padded, mask).values, padded[mask])


def test_never_padded_comes_out_padded_on_the_right():
    packed = PackedBatch.from_lengths(torch.arange(1, 5), [1, 0, 3])
    assert packed.position_ids.tolist() == [0, 0, 1, 2]
    assert packed.padded_shape is None
    assert [part.tolist() for part in packed.split()] == [[1], [], [2, 3, 4]]
    assert unpack(packed).tolist() == [[1, 0, 0], [0, 0, 0], [2, 3, 4]]
    assert unpack(packed, padding_value=-1).tolist() == [[1, -1, -1], [-1, -1, -1], [2, 3, 4]]
    assert unpack(PackedBatch.from_lengths(torch.arange(4), [2, 2])).tolist() == [[0, 1], [2, 3]]


def test_empty_batch():
    packed = pack(torch.zeros(0, 7, 3), torch.zeros(0, 7, dtype=torch.bool))
    assert (len(packed), packed.total, packed.max_seqlen) == (0, 0, 0)
    assert packed.cu_seqlens.tolist() == [0]
    assert unpack(packed).shape == (0, 7, 3)
    assert unpack(PackedBatch.from_lengths(torch.zeros(0), [])).shape == (0, 0)


def test_other_values_of_another_width_and_dtype():
    packed = pack(torch.ones(3, 5, dtype=torch.int64), torch.tensor(MASKS["right"]))
    hidden = torch.randn(packed.total, 6, dtype=torch.bfloat16)
    padded = unpack(packed, hidden)
    assert padded.shape == (3, 5, 6)
    assert padded.dtype == torch.bfloat16
    assert torch.equal(pack(padded, torch.tensor(MASKS["right"])).values, hidden)
    assert packed.with_values(hidden).values is hidden


@pytest.mark.parametrize("name", ["right", "holes", "full", "nothing-real"])
def test_gradients(name):
    mask = torch.tensor(MASKS[name])
    padded = torch.randn(*mask.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, mask).values.square(), padded)
    packed = pack(padded.detach(), mask)
    values = torch.randn(packed.total, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(packed, x).square(), values)


# Tensors on the meta device have no values: whatever reads one raises. So what works there synchronises nowhere.


def test_gradients_twice():
    mask = torch.tensor(MASKS["holes"])
    padded = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: unpack(pack(x, mask)).pow(3), padded)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [([2, 1], ValueError, "do not ascend"), ([1, 9], IndexError, "from 1 to 9; the padded batch has 6 rows")],
    ids=["not-ascending", "outside"],
)
def test_indices_that_lie(indices, error, message):
    ids = torch.zeros(2, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 1, 2], dtype=torch.int32)
    packed = PackedBatch(ids, cu_seqlens, 1, ids, indices=torch.tensor(indices), padded_shape=(2, 3))
    with pytest.raises(error, match=message):
        unpack(packed)


def test_lengths_cost_no_synchronisation():
    padded = torch.empty(3, 5, 2, device="meta")
    for side in ("left", "right"):
        packed = pack(padded, lengths=[3, 0, 5], padding_side=side)
        assert packed.values.shape == (8, 2)
        assert unpack(packed).shape == (3, 5, 2)
    assert pack(padded).values.shape == (15, 2)
    never_padded = PackedBatch.from_lengths(torch.empty(8, 2, device="meta"), [3, 0, 5])
    assert unpack(never_padded).shape == (3, 5, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_a_mask_costs_one_synchronisation(monkeypatch, dtype):
    read = []

    def tolist(self):
        read.append(self)
        return [3, 0, 4] if dtype == torch.bool else [3, 0, 4, 0, 1]

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    mask = torch.empty(3, 5, device="meta", dtype=dtype)
    packed = pack(torch.empty(3, 5, 2, device="meta"), mask)
    assert len(read) == 1
    assert packed.values.shape == (7, 2)
    assert unpack(packed).shape == (3, 5, 2)
    assert packed.host_lengths() == [3, 0, 4]
    assert len(read) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_synchronisations_on_a_gpu(dtype):
    mask = torch.tensor(MASKS["holes"], device="cuda").to(dtype)
    padded = torch.randn(3, 5, 2, device="cuda")

    def synchronisations(call):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    assert synchronisations(lambda: padded.sum().item()) == 1, "this machine does not count"
    assert synchronisations(lambda: unpack(pack(padded, mask))) == 1
    assert synchronisations(lambda: unpack(pack(padded, lengths=[3, 2, 4]))) == 0
    assert synchronisations(lambda: pack(padded)) == 0
    assert torch.equal(pack(padded, mask).values, padded[mask.bool()])


def test_compiles_with_lengths_from_the_host():
    def there_and_back(x):
        packed = pack(x, lengths=[3, 0, 5])
        return unpack(packed, packed.values * 2)

    x = torch.randn(3, 5, 2)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), there_and_back(x))


def test_compiles_with_symbolic_sizes_without_a_warning(monkeypatch):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logging.getLogger("torch._dynamo"), "handlers", [handler])
    torch.compiler.reset()
    compiled = torch.compile(lambda x: unpack(pack(x, lengths=[x.shape[1]] * 3)), dynamic=True, backend="eager")
    x = torch.randn(3, 5, 2)
    assert torch.equal(compiled(x), x)
    assert [record.getMessage() for record in records] == []


def test_to_and_repr():
    packed = pack(torch.randn(3, 5), torch.tensor(MASKS["right"]))
    half = packed.to(dtype=torch.bfloat16)
    assert half.values.dtype == torch.bfloat16
    assert half.cu_seqlens.dtype == torch.int32
    ids = pack(torch.ones(3, 5, dtype=torch.int64), torch.tensor(MASKS["right"]))
    assert ids.to(dtype=torch.bfloat16).values.dtype == torch.int64
    moved = packed.to("meta")
    assert {moved.values.device.type, moved.cu_seqlens.device.type, moved.indices.device.type} == {"meta"}
    assert repr(packed) == (
        "PackedBatch(3 sequences, 9 tokens, longest 5, from [3, 5]: 40 % was padding; values float32 [9] on cpu)"
    )
    assert "1 sequences, 2 tokens, longest 2;" in repr(PackedBatch.from_lengths(torch.ones(2, 3), [2]))


def test_integers_of_numpy_become_ints():
    packed = PackedBatch.from_lengths(torch.zeros(3), [numpy.int64(1), numpy.uint8(2)])
    assert packed.lengths == [1, 2]
    assert {type(length) for length in packed.lengths} == {int}
    again = PackedBatch(packed.values, packed.cu_seqlens, numpy.int64(2), packed.position_ids)
    assert type(again.max_seqlen) is int


def test_padding_values():
    packed = pack(torch.ones(2, 2), lengths=[2, 1])
    assert unpack(packed, padding_value=float("nan"))[1, 1].isnan()
    ids = pack(torch.ones(2, 2, dtype=torch.int64), lengths=[2, 1])
    assert unpack(ids, padding_value=-100).tolist() == [[1, 1], [1, -100]]
    assert unpack(ids, padding_value=7.0).tolist() == [[1, 1], [1, 7]]


X = torch.zeros(3, 5)
IDS = torch.zeros(3, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: pack(torch.zeros(3)), ValueError, r"\[3\]; expected \[batch, seq"),
        (lambda: pack(X, torch.ones(3, 4)), ValueError, r"\[3, 4\]; expected \[3, 5\]"),
        (lambda: pack(X, torch.ones(3, 5)), TypeError, "float32; expected bool"),
        (lambda: pack(X, torch.full((3, 5), 2)), ValueError, "from 2 to 2"),
        (lambda: pack(X, torch.full((3, 5), -1)), ValueError, "from -1 to -1"),
        (
            lambda: pack(X, torch.ones(3, 5, dtype=torch.bool, device="meta")),
            ValueError,
            "is on meta, the batch on cpu",
        ),
        (lambda: pack(X, torch.ones(3, 5, dtype=torch.bool), lengths=[1, 1, 1]), ValueError, "give one of them"),
        (lambda: pack(X, lengths=[1, 2]), ValueError, "2 entries for a batch of 3"),
        (lambda: pack(X, lengths=[1, 2, 6]), ValueError, "has a 6, but the padded batch has 5"),
        (lambda: pack(X, lengths=[1, -2, 3]), ValueError, "has a -2; expected 0 or more"),
        (lambda: pack(X, lengths=[1, 2.0, 3]), TypeError, "2.0 of type float"),
        (lambda: pack(X, lengths=torch.tensor([1.0, 2.0, 3.0])), TypeError, "float32; expected integers"),
        (lambda: pack(X, lengths=torch.ones(3, 1, dtype=torch.int64)), ValueError, r"\[3, 1\]; expected \[batch\]"),
        (lambda: pack(X, padding_side="both"), ValueError, "'both'; expected"),
        (lambda: pack(X, position_ids=torch.zeros(3, 5)), TypeError, "position_ids is torch.float32"),
        (lambda: pack(X, token_type_ids=torch.zeros(3, 4, dtype=torch.int64)), ValueError, r"\[3, 4\]; expected"),
        (
            lambda: pack(X, token_type_ids=torch.zeros(3, 5, dtype=torch.int64, device="meta")),
            ValueError,
            "token_type_ids is on meta",
        ),
        (lambda: pack([[1, 2]]), TypeError, r"padded is of type list; expected a tensor \[batch, seq"),
        (lambda: pack(X, [[1] * 5] * 3), TypeError, "key_padding_mask is of type list; expected a tensor"),
        (lambda: pack(X, lengths=3), TypeError, "lengths is of type int; expected a list of integers"),
        (lambda: pack(X, lengths=[1, True, 2]), TypeError, r"lengths\[1\] is True of type bool"),
        (lambda: pack(X, lengths=numpy.ones((3, 2), int)), TypeError, r"lengths\[0\] is .* of type ndarray"),
        (lambda: pack(X, lengths=numpy.ones(3)), TypeError, r"lengths\[0\] is .* of type float64"),
        (lambda: pack(X, position_ids=[0]), TypeError, "position_ids is of type list"),
        (lambda: pack(X, token_type_ids=[0]), TypeError, "token_type_ids is of type list"),
        (lambda: unpack(X), TypeError, "packed is of type Tensor; expected a PackedBatch"),
        (lambda: unpack(pack(X), [0.0] * 15), TypeError, "values is of type list"),
        (lambda: unpack(pack(IDS), padding_value=float("nan")), ValueError, "nan, but values are torch.int64"),
        (lambda: unpack(pack(IDS), padding_value=float("inf")), ValueError, "inf, but values are torch.int64"),
        (lambda: unpack(pack(IDS), padding_value=1.5), ValueError, "1.5, but values are torch.int64; expected an int"),
        (lambda: PackedBatch.from_lengths([1, 2], [2]), TypeError, "values is of type list"),
        (lambda: PackedBatch.from_lengths(X, None), TypeError, "lengths is of type NoneType"),
        (lambda: PackedBatch.from_lengths(X, [3], position_ids=[0, 1, 2]), TypeError, "position_ids is of type list"),
        (lambda: unpack(pack(X), torch.zeros(14)), ValueError, r"\[14\]; the batch has 15"),
        (lambda: unpack(pack(X), torch.zeros(15, device="meta")), ValueError, "meta"),
        (lambda: PackedBatch.from_lengths(torch.zeros(4), [1, 2]), ValueError, "add up to 3"),
        (
            lambda: PackedBatch.from_lengths(torch.zeros(3), [3], position_ids=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"position_ids has shape \[2\]; expected \[3\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "cu_seqlens, max_seqlen, message",
    [
        ([0, 2, 5], 3, "runs from 0 to 5; expected 0 to 4"),
        ([1, 2, 4], 3, "runs from 1 to 4"),
        ([0, 5, 4], 5, "falls after sequence 1"),
        ([0, 1, 4], 2, "max_seqlen is 2, but a sequence has 3"),
    ],
)
def test_check_finds_boundaries_that_lie(cu_seqlens, max_seqlen, message):
    ids = torch.zeros(4, dtype=torch.int64)
    packed = PackedBatch(ids, torch.tensor(cu_seqlens, dtype=torch.int32), max_seqlen, ids)
    with pytest.raises(ValueError, match=message):
        packed.check()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, "int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"\[0\]; expected int32"),
        ({"max_seqlen": -1}, "-1; expected 0 or more"),
        ({"position_ids": torch.zeros(3, dtype=torch.int64)}, r"\[3\]; expected int64 \[4\]"),
        ({"position_ids": torch.zeros(4)}, "float32"),
        ({"values": torch.zeros(())}, "scalar"),
        ({"indices": torch.zeros(4, dtype=torch.int64, device="meta")}, "indices is on meta"),
    ],
)
def test_a_batch_that_makes_no_sense_is_not_made(changes, message):
    fields = {
        "values": torch.zeros(4),
        "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
        "max_seqlen": 4,
        "position_ids": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        PackedBatch(**(fields | changes))


@pytest.mark.parametrize("name", ["values", "cu_seqlens", "max_seqlen", "position_ids", "token_type_ids", "indices"])
def test_a_batch_of_something_else_is_not_made(name):
    ids = torch.zeros(4, dtype=torch.int64)
    fields = {"values": ids, "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4}
    wrong = 17.5 if name == "max_seqlen" else [0, 4]
    with pytest.raises(TypeError, match=f"PackedBatch.{name} is .*; expected"):
        PackedBatch(**({"position_ids": ids} | fields | {name: wrong}))
