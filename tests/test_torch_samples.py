"""torch's own samples, which ship in its wheel, through our namesakes: every one runs, and matches or deviates as documented.

ModuleInfo has arguments for modules, OpInfo for functions. Results and gradients are compared with torch's by the rule of
tests/numerics.py. What becomes of each sample is counted, and the counts are held below: nothing is left out in silence.
"""

import copy
import inspect
from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map

import fastbert.nn as fnn
from fastbert import functional as F
from tests.numerics import assert_close_to_exact

MATCHES = "matches"
ZEROS_ON_PADDING = "matches on real tokens, zeros on padding"
FLOAT32_LOSS = "matches, in float32"
RANDOM = "dropout: both random, shapes match"

# torch 2.13's samples. Other versions have others: all of theirs run too, and only the counts are not compared.
COUNTED_VERSION = "2.13"


def convert(tree, dtype):
    """A copy, every floating-point tensor a leaf of that dtype."""

    def one(x):
        if isinstance(x, nn.Module):
            return copy.deepcopy(x).to(dtype)
        if not isinstance(x, torch.Tensor):
            return x
        y = x.detach().clone()
        return y.to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else y

    return tree_map(one, tree)


def floating(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def run(call, args, kwargs, parameters, weigh, gradients):
    """Results, and gradients of everything that wants one."""
    with torch.set_grad_enabled(gradients):
        results = floating(call(*args, **kwargs))
    wanted = [x for x in (*floating((args, kwargs)), *parameters) if x.requires_grad]
    if not gradients or not any(r.requires_grad for r in results):
        return results, []
    sum((weigh(r.double()) for r in results if r.requires_grad), torch.zeros((), dtype=torch.float64)).backward()
    return results, [x.grad for x in wanted]


def compare(name, ours, theirs, exact, *, floor_ulps):
    for kind, mine, own, wide in zip(("result", "gradient"), ours, theirs, exact, strict=True):
        assert len(mine) == len(own), f"{name}: {len(mine)} {kind}s, torch has {len(own)}"
        for i, (a, b, c) in enumerate(zip(mine, own, wide, strict=True)):
            assert (a is None) == (b is None), f"{name}: {kind} {i} is {a}, torch's {b}"
            if a is not None:
                assert_close_to_exact(a.to(b.dtype), c, b, f"{name}: {kind} {i}", floor_ulps=floor_ulps)


def weighing(real=None):
    """A scalar of a result, that tells its elements apart; without padding, where there is."""

    def weigh(x):
        weights = torch.linspace(-1.0, 1.0, x.numel() + 3, dtype=torch.float64)[1:-2].sin().reshape(x.shape)
        return (x * weights if real is None else torch.where(real, x * weights, 0.0)).sum()

    return weigh


def names_of(counts):
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))


NAMESAKES = {
    info.module_cls: getattr(fnn, info.module_cls.__name__)
    for info in module_db
    if hasattr(fnn, info.module_cls.__name__) and info.module_cls.__module__.startswith("torch.nn.modules")
}
MODULES = {info.name: info for info in module_db if info.module_cls in NAMESAKES}


def real_tokens(module, kwargs):
    """[…, 1], False where the result's position is padding; None without."""
    padding = kwargs.get("src_key_padding_mask", kwargs.get("tgt_key_padding_mask"))
    if padding is None or isinstance(module, nn.MultiheadAttention):
        return None
    attention = module.layers[0].self_attn if hasattr(module, "layers") else module.self_attn
    return ~(padding if padding.dim() == 1 or attention.batch_first else padding.t()).unsqueeze(-1)


def construct(kind, args, kwargs):
    """A module, with the layer that it is given of the namesake's kin."""
    if kind in NAMESAKES.values():
        args = [as_ours(a) if isinstance(a, nn.TransformerEncoderLayer) else a for a in args]
    return kind(*args, **kwargs)


def as_ours(layer):
    return copy.copy(fnn.TransformerEncoderLayer.__new__(fnn.TransformerEncoderLayer)).__setstate__(layer.__dict__)


def module_sample(kind, sample, dtype, training, gradients):
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    takes = inspect.signature(kind.__init__).parameters
    if dtype is not None and ("dtype" in takes) and "dtype" not in kwargs:
        kwargs = {**kwargs, "dtype": dtype}
    torch.manual_seed(0)
    theirs = kind(*args, **kwargs).train(training)
    torch.manual_seed(0)
    ours = construct(NAMESAKES[kind], args, kwargs).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    wide = copy.deepcopy(theirs).double()
    real = real_tokens(theirs, sample.forward_input.kwargs)
    results = []
    for module, to in ((ours, dtype), (theirs, dtype), (wide, torch.float64)):
        a, k = convert((sample.forward_input.args, sample.forward_input.kwargs), to)
        results.append(run(module, a, k, list(module.parameters()), weighing(real), gradients))
    outcome = MATCHES
    (mine, *_), (own, *_), _ = results
    if real is not None:
        assert not mine[0].masked_fill(real, 0.0).any(), "padding is not zero"
        for each, _ in results:
            each[0] = each[0].masked_fill(~real, 0.0)
        outcome = ZEROS_ON_PADDING
    if isinstance(ours, nn.modules.loss._WeightedLoss) and mine[0].dtype != own[0].dtype:
        assert mine[0].dtype == torch.float32
        outcome = FLOAT32_LOSS
    compare(sample.desc or kind.__name__, *results, floor_ulps=16.0)
    return outcome


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_modules(name):
    info = MODULES[name]
    counts = Counter()
    for dtype in info.dtypes:
        for training in [True, False] if info.train_and_eval_differ else [True]:
            torch.manual_seed(0)
            for sample in info.module_inputs_func(info, "cpu", dtype, True, training):
                for gradients in (True, False):
                    counts[module_sample(info.module_cls, sample, dtype, training, gradients)] += 1
    print(f"{name}: {names_of(counts)}")
