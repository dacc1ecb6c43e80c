"""A deterministic gradient is asked for by the call or by torch's switch, and the operator gets to know: compiled too."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import functional


class _Asked(TorchDispatchMode):
    """What attention_backward is called with for `deterministic`."""

    def __init__(self):
        super().__init__()
        self.values = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fastbert.attention_backward.default:
            self.values.append(args[-1])
        return function(*args, **(kwargs or {}))


def _dense(q):
    return functional.scaled_dot_product_attention(q[None], q[None], q[None])


def _packed(q, **options):
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    return functional.varlen_attention(q, q, q, cu_seqlens, cu_seqlens, 3, 3, **options)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("function", "switch", "expected"),
    [
        (_dense, False, False),
        (_dense, True, True),
        (_packed, False, False),
        (_packed, True, True),
        (lambda q: _packed(q, deterministic=True), False, True),
    ],
    ids=["dense", "dense-switch", "packed", "packed-switch", "packed-argument"],
)
def test_the_operator_is_told(function, switch, expected, compiled):
    torch.use_deterministic_algorithms(switch)
    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    q = torch.randn(5, 2, 8, requires_grad=True)
    out = run(q)
    with _Asked() as asked:
        out.sum().backward()
    assert asked.values == [expected]


def test_the_switch_is_a_guard_of_a_compiled_function():
    """Thrown between two calls, it makes another graph."""
    run = torch.compile(_dense, fullgraph=True, backend="aot_eager")
    values = []
    for switch in (False, True, False):
        torch.use_deterministic_algorithms(switch)
        out = run(torch.randn(5, 2, 8, requires_grad=True))
        with _Asked() as asked:
            out.sum().backward()
        values += asked.values
    assert values == [False, True, False]
