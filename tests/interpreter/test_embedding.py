"""The Triton embedding kernels in Triton's interpreter: every launcher on CPU tensors, against float64."""

import dataclasses

import pytest
import torch

from fastbert.kernels import _configs, _launch
from fastbert.kernels import embedding as kernels
from fastbert.kernels._table_gradient import table_gradient
from tests import embedding_checks as checks

pytestmark = pytest.mark.interpreter

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@dtypes
@pytest.mark.parametrize(("tokens", "width"), checks.SHAPES)
def test_embedding_layer_norm(tokens, width, dtype):
    i = checks.inputs(tokens, width, dtype)
    checks.check_embedding_layer_norm(kernels, i, 0.1, checks.seed_tensor(-5), 8, padding_idx=0)


def test_rows_wider_than_a_program():
    assert _configs.row_tile("embedding_layer_norm", checks.WIDE, _launch.device_of(torch.empty(0))).tile < checks.WIDE
    checks.check_embedding_layer_norm(
        kernels, checks.inputs(3, checks.WIDE, torch.float16, words=4), 0.1, checks.seed_tensor(3)
    )


@dtypes
@pytest.mark.parametrize(
    "absent",
    [("position", "position_ids"), ("token_type", "token_type_ids"), ("weight",), ("bias",), ("weight", "bias")],
    ids="-".join,
)
def test_what_may_be_absent(absent, dtype):
    i = dataclasses.replace(checks.inputs(19, 64, dtype), **dict.fromkeys(absent))
    checks.check_embedding_layer_norm(kernels, i)


def test_float32_parameters_of_half_precision_tables():
    i = checks.inputs(19, 64, torch.float16)
    float32 = dataclasses.replace(i, weight=i.weight.float(), bias=i.bias.float())
    y, *_ = kernels.embedding_layer_norm(*float32.arguments, checks.EPS, 0.0, None, 0, True)
    assert torch.equal(y, kernels.embedding_layer_norm(*i.arguments, checks.EPS, 0.0, None, 0, True)[0])


def test_every_subset_of_gradients():
    checks.check_needs(kernels, checks.inputs(11, 17, torch.float32))


def test_ids_outside_the_tables_read_nothing_else():
    checks.check_ids_outside_the_tables_read_nothing_else(kernels)


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (-(2**63), 2**62), (5, 2**34 - 80)])
def test_dropout_mask(seed, offset):
    checks.check_dropout_is_the_contracts(kernels, 5, 77, checks.seed_tensor(seed), offset)


def test_dropout_mask_of_rows_wider_than_a_program():
    checks.check_dropout_is_the_contracts(kernels, 2, checks.WIDE, checks.seed_tensor(3), 4)


def test_strides():
    checks.check_strides(kernels)


@dtypes
def test_deterministic(dtype):
    checks.check_deterministic(kernels, checks.inputs(37, 64, dtype))


#: How many tokens each row of a table has: none, some, all; segments that start and end inside chunks of 4 and on their edges.
@pytest.mark.parametrize(
    "lengths", [[0, 0, 9], [3, 1, 0, 5], [4, 4, 8], [2, 17, 0, 1, 12], [1] * 9, [40]], ids=lambda lengths: str(lengths)
)
def test_table_gradient(lengths):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    ids = ids[torch.randperm(len(ids))]
    values = torch.randn(len(ids), 21)
    for skipped in (-1, 0):
        exact = torch.zeros(len(lengths), 21, dtype=torch.float64).index_add_(0, ids, values.double())
        if skipped >= 0:
            exact[skipped] = 0.0
        out = table_gradient(values, ids, len(lengths), skipped)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_table_without_rows():
    i = checks.inputs(3, 17, torch.float32)
    i.word = i.word[:0]
    with pytest.raises(ValueError, match="input_ids has 3 ids and their table no rows"):
        kernels.embedding_layer_norm(*i.arguments, checks.EPS, 0.0, None, 0, True)


@pytest.mark.parametrize(
    ("random", "message"),
    [
        ((0.1, None, 0), "seed is None"),
        ((1.5, checks.seed_tensor(1), 0), "dropout_p is 1.5"),
        ((0.1, checks.seed_tensor(1), 3), "is 3"),
    ],
    ids=["no-seed", "p-above-1", "offset-3"],
)
def test_bad_dropout(random, message):
    i = checks.inputs(3, 17, torch.float32)
    with pytest.raises(ValueError, match=message):
        kernels.embedding_layer_norm(*i.arguments, checks.EPS, *random, True)
