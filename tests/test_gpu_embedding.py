"""The embedding operators on a GPU: the interpreter's checks on CUDA tensors, and what only a GPU can show."""

import dataclasses
import functools

import pytest
import torch

import fastbert
from tests import embedding_checks as checks
from tests.gpu_checks import check_graph, without_synchronisation

pytestmark = pytest.mark.gpu

CUDA = "cuda"
operations = torch.ops.fastbert
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def test_triton_answers():
    answers = [s for s in fastbert.backends() if s.device == "cuda" and s.operation.startswith("embedding")]
    assert {s.implementation for s in answers if s.dtype != "float64"} == {"Triton"}


@dtypes
@pytest.mark.parametrize("width", [*checks.WIDTHS, 768, 1024, 4096, checks.WIDE, 65536])
@pytest.mark.parametrize("tokens", [*checks.TOKENS, 1000])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_embedding_layer_norm(tokens, width, dropout_p, dtype):
    seed = checks.seed_tensor(-5, CUDA) if dropout_p else None
    i = checks.inputs(tokens, width, dtype, CUDA, words=3000 if width < 4096 else 30)
    checks.check_embedding_layer_norm(operations, i, dropout_p, seed, 8, padding_idx=0)


@dtypes
def test_words_alone(dtype):
    absent = dict.fromkeys(("position", "position_ids", "token_type", "token_type_ids"))
    checks.check_embedding_layer_norm(operations, dataclasses.replace(checks.inputs(300, 768, dtype, CUDA), **absent))


def test_every_subset_of_gradients():
    checks.check_needs(operations, checks.inputs(300, 768, torch.bfloat16, CUDA))


def test_ids_outside_the_tables_read_nothing_else():
    checks.check_ids_outside_the_tables_read_nothing_else(operations, CUDA)


@pytest.mark.parametrize("width", [4, 77, 768, checks.WIDE])
def test_dropout_mask(width):
    checks.check_dropout_is_the_contracts(operations, 37, width, checks.seed_tensor(-(2**63), CUDA), 2**62)


def test_strides():
    checks.check_strides(operations, CUDA)


@dtypes
@pytest.mark.parametrize("tokens", [300, 16384])
def test_deterministic(tokens, dtype):
    checks.check_deterministic(operations, checks.inputs(tokens, 768, dtype, CUDA, words=30522))


def test_cuda_graph_replays_with_other_ids_and_seed():
    i = checks.inputs(300, 768, torch.bfloat16, CUDA)
    seed = checks.seed_tensor(1, CUDA)

    def step():
        y, mean, rstd = operations.embedding_layer_norm(*i.arguments, checks.EPS, 0.1, seed, 0, True)
        arguments = (y, *i.arguments[:6], mean, rstd, i.weight, 0.1, seed, 0, 0, [True] * 5)
        return y, *operations.embedding_layer_norm_backward(*arguments)

    def change(value):
        seed.fill_(value)
        i.input_ids.copy_(torch.randint(30, (300,)))

    check_graph(step, [functools.partial(change, value) for value in (1, 2)])


def test_no_host_synchronisation():
    i = checks.inputs(300, 768, torch.float32, CUDA)

    def step():
        y, mean, rstd = operations.embedding_layer_norm(*i.arguments, checks.EPS, 0.0, None, 0, True)
        arguments = (y, *i.arguments[:6], mean, rstd, i.weight, 0.0, None, 0, 0, [True] * 5)
        return operations.embedding_layer_norm_backward(*arguments)

    without_synchronisation(step)
