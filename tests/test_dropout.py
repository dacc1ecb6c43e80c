"""The dropout stream: Philox's known answers, the mask's contract, and that every caller keeps to it."""

import re

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert import functional as F
from fastbert import reference


def _seed(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


# Random123, kat_vectors, philox4x32 10 rounds: (counter, key, result)
KNOWN_ANSWERS = [
    (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert reference.philox(torch.tensor([counter]), _seed(key)).tolist() == [list(expected)]


def _philox_in_python(counter: int, key: int) -> list[int]:
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("counter", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 12345])
@pytest.mark.parametrize("key", [0, 1, 2**31, 2**33 + 5, 2**62 + 2**31 + 7])
def test_philox_in_64_bit_arithmetic_equals_big_integers(counter, key):
    assert reference.philox(torch.tensor([counter]), _seed(key))[0].tolist() == _philox_in_python(counter, key)


def test_a_negative_seed_is_its_64_bits():
    assert reference.philox(torch.tensor([3]), _seed(-1))[0].tolist() == _philox_in_python(3, 2**64 - 1)


@pytest.mark.parametrize("width", [1, 3, 4, 17])
@pytest.mark.parametrize("offset", [0, 4, 2**34])
def test_mask_follows_the_contract_element_by_element(width, offset):
    p, rows = 0.3, 5
    mask = reference.dropout_mask((rows, width), p, _seed(11), offset, torch.float64)
    padded = (width + 3) // 4 * 4
    for row in range(rows):
        for column in range(width):
            n = offset + row * padded + column
            word = _philox_in_python(n // 4, 11)[n % 4]
            assert float(mask[row, column]) == (1 / (1 - p) if word >= round(p * 2**32) else 0.0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_dropped_elements(p):
    mask = reference.dropout_mask((1000, 1000), p, _seed(5), 0, torch.float64)
    # five standard deviations of a binomial share over 10⁶ draws
    assert abs(float((mask == 0).double().mean()) - p) < 5 * (p * (1 - p) / 1e6) ** 0.5
    assert abs(float(mask.mean()) - 1.0) < 0.02


def test_p_one_drops_everything():
    assert not reference.dropout_mask((64, 64), 1.0, _seed(5), 0, torch.float32).any()


def test_offsets_cut_one_stream():
    whole = reference.dropout_mask((4, 8), 0.5, _seed(9), 0, torch.float32)
    tail = reference.dropout_mask((2, 8), 0.5, _seed(9), 16, torch.float32)
    assert torch.equal(whole[2:], tail)


def test_packed_dropout_needs_the_memory_of_its_tokens_alone():
    q = torch.randn(4, 2, 8)
    cu = torch.tensor([0, 3, 4], dtype=torch.int32)
    torch.manual_seed(5)
    out = F.varlen_attention(q, q, q, cu, cu, 10**6, 10**6, dropout_p=0.5)
    assert out.isfinite().all()


def test_add_layer_norm_drops_the_branch_by_the_mask_and_its_gradient_alike():
    x = torch.randn(6, 10, requires_grad=True)
    residual = torch.zeros(6, 10, requires_grad=True)
    seed = _seed(3)
    _, total = F.add_layer_norm(x, residual, dropout_p=0.4, seed=seed)
    mask = reference.dropout_mask((6, 10), 0.4, seed, 0, torch.float32)
    torch.testing.assert_close(total, x * mask)
    total.sum().backward()
    torch.testing.assert_close(x.grad, mask)
    torch.testing.assert_close(residual.grad, torch.ones_like(residual))


def test_manual_seed_reproduces_and_draws_advance():
    x = torch.ones(4, 64)

    def draw():
        return F.add_layer_norm(x, torch.zeros_like(x), dropout_p=0.5)[1]

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw()) and not torch.equal(first, second)


def test_activation_checkpointing_sees_the_same_mask():
    x = torch.randn(8, 32, requires_grad=True)

    def step(x):
        return F.add_layer_norm(x, x, dropout_p=0.5)[0]

    torch.manual_seed(2)
    step(x).square().sum().backward()
    plain, x.grad = x.grad.clone(), None
    torch.manual_seed(2)
    torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(plain, x.grad)


@pytest.mark.parametrize(
    ("p", "offset", "message"), [(1.5, 0, "dropout_p is 1.5"), (-0.1, 0, "-0.1"), (0.5, 3, "offset is 3")]
)
def test_bad_arguments(p, offset, message):
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        F.add_layer_norm(x, x, dropout_p=p, offset=offset)


def test_bad_seeds():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"seed is torch\.int32"):
        F.add_layer_norm(x, x, dropout_p=0.5, seed=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"\[2\]"):
        F.add_layer_norm(x, x, dropout_p=0.5, seed=torch.tensor([1, 2]))


def test_reference_and_default_implementation_draw_the_same_mask():
    x, seed = torch.ones(33, 67), _seed(123456789012345)
    _, total = F.add_layer_norm(x, torch.zeros_like(x), dropout_p=0.25, seed=seed, offset=8)
    with fastbert.use_reference():
        _, expected = F.add_layer_norm(x, torch.zeros_like(x), dropout_p=0.25, seed=seed, offset=8)
    assert torch.equal(total == 0, expected == 0)
