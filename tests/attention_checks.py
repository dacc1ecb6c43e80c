"""What attention, its gradient and its decoding must satisfy, whatever implements them: shared by the interpreter's and the
GPU's tests.

`operations` is anything with functions of the operators' names and signatures: kernel modules, or torch.ops.fastbert.
"""

import functools
import itertools
import random
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fastbert import reference
from tests.numerics import assert_close_to_exact

#: Errors of the gradients of sums: that many ulps of the largest value, as a product's operands are rounded once more.
FLOOR_ULPS = 8.0


@dataclass(frozen=True)
class Case:
    """One call. Lengths are (queries, keys) of each sequence; a dense call has equal ones."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int = 0  # 0: head_dim
    packed: bool = False
    mask: str = ""  # "bool", "additive", "least" or "", and what it is broadcast over: "additive-b" also -h, -q, -k
    padding: str = ""  # where padding is: "holes", "end", "start", "middle"
    alibi: int = 0  # dimensions of the slopes
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    dropout_p: float = 0.0
    scale: float = 0.0  # 0: 1/sqrt(head_dim)
    beyond: int = 0  # how far max_seqlen passes the longest sequence
    magnitude: float = 1.0

    @property
    def id(self) -> str:
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "lengths":
                parts.append("+".join(f"{q}x{k}" for q, k in value) or "no_sequences")
            elif field.name in ("heads", "kv_heads", "head_dim") or value != field.default:
                parts.append(field.name if value is True else f"{field.name}={value}")
        return "-".join(parts)


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    arguments: tuple[Any, ...]  # from cu_seqlens_q to offset

    @property
    def attn_mask(self) -> Tensor | None:
        mask: Tensor | None = self.arguments[4]
        return mask

    @property
    def needs_mask_grad(self) -> bool:
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 7) -> Inputs:
    """Random inputs of a case, the same for every dtype and device but for rounding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=generator) * case.magnitude
        return values.to(dtype).to(device)

    def boundaries(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    queries, keys = [q for q, _ in case.lengths], [k for _, k in case.lengths]
    value_dim = case.value_dim or case.head_dim
    batch, max_q, max_k = len(case.lengths), max(queries, default=0), max(keys, default=0)
    cu_q = cu_k = None
    if case.packed:
        cu_q, cu_k = boundaries(queries), boundaries(keys)
        max_q, max_k = max_q + case.beyond, max_k + case.beyond
        q, grad_out = normal(sum(queries), case.heads, case.head_dim), normal(sum(queries), case.heads, value_dim)
        k, v = normal(sum(keys), case.kv_heads, case.head_dim), normal(sum(keys), case.kv_heads, value_dim)
    else:
        q, grad_out = normal(batch, case.heads, max_q, case.head_dim), normal(batch, case.heads, max_q, value_dim)
        k, v = normal(batch, case.kv_heads, max_k, case.head_dim), normal(batch, case.kv_heads, max_k, value_dim)

    attn_mask = None
    if case.mask:
        kind, *broadcast = case.mask.split("-")
        sizes = {"b": 1 if case.packed else batch, "h": case.heads, "q": max_q, "k": max_k}
        shape = [1 if name in broadcast else size for name, size in sizes.items()]
        values = torch.randn(*shape, generator=generator)
        if kind == "least":  # as transformers masks: zero or the dtype's least number, in some rows that alone
            values = torch.where(values > 0.0, 0.0, torch.finfo(dtype).min)
            values[..., ::5, :] = torch.finfo(dtype).min
        attn_mask = (values > -0.5 if kind == "bool" else values.to(dtype)).to(device)
        if case.packed:
            attn_mask = attn_mask[0]
    padding = None if not case.padding else _padding(case.padding, batch, max_k, generator).to(device)
    slopes = None
    if case.alibi:
        slopes = torch.rand(*((batch,) if case.alibi == 2 else ()), case.heads, generator=generator).to(device)
    key = torch.tensor([-123456789012345], dtype=torch.int64, device=device) if case.dropout_p else None
    scale = case.scale or case.head_dim**-0.5
    arguments = (
        cu_q, cu_k, max_q, max_k, attn_mask, padding, slopes, scale, case.left, case.right, case.bottom_right,
        case.dropout_p, key, 4 * 1001,
    )  # fmt: skip
    return Inputs(q, k, v, grad_out, arguments)


def _padding(where: str, batch: int, keys: int, generator: torch.Generator) -> Tensor:
    """bool [batch, keys], True = real: all of the first sequence (but for holes), ever fewer, none of the last of several."""
    real = torch.linspace(keys, 0 if batch > 1 else keys // 2, batch)[:, None]
    key = torch.arange(keys)
    if where == "end":
        return key < real
    if where == "start":
        return key >= keys - real
    if where == "middle":
        return (key < real / 3) | (key >= keys - real / 3)
    return torch.rand(batch, keys, generator=generator) > 0.4


def double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _torchs_own(i: Inputs) -> tuple[Tensor, ...]:
    """out and the gradients of q, k, v and the mask by plain torch in the inputs' dtype."""
    cu_q, cu_k, _, _, attn_mask, *rest = i.arguments
    leaves = [x.detach().clone().requires_grad_() for x in (i.q, i.k, i.v)]
    mask = attn_mask
    if i.needs_mask_grad and attn_mask is not None:
        mask = attn_mask.detach().clone().requires_grad_()
    if cu_q is None:
        out = _eager(*leaves, mask, *rest)
    else:
        out = torch.zeros((*i.q.shape[:2], i.v.shape[-1]), dtype=i.q.dtype, device=i.q.device)
        padding, slopes, scale, left, right, bottom_right, dropout_p, key, offset = rest
        _, _, max_q, max_k, *_ = i.arguments
        ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
        factors = None
        if dropout_p:
            shape = (len(ends_q) - 1, i.q.shape[1], max_q, max_k)
            factors = reference.dropout_mask(shape, dropout_p, key, offset, i.q.dtype)
        pieces = []
        for n in range(len(ends_q) - 1):
            rows_q, rows_k = slice(*ends_q[n : n + 2]), slice(*ends_k[n : n + 2])
            seq_q, seq_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
            q, k, v = (x[rows].transpose(0, 1)[None] for x, rows in zip(leaves, (rows_q, rows_k, rows_k), strict=True))
            pieces.append(
                _eager(
                    q, k, v, None if mask is None else mask[:, :seq_q, :seq_k], padding,
                    slopes[n] if slopes is not None and slopes.dim() == 2 else slopes,
                    scale, left, right, bottom_right, dropout_p, key, offset,
                    None if factors is None else factors[n : n + 1, :, :seq_q, :seq_k],
                )[0].transpose(0, 1)
            )  # fmt: skip
        out = torch.cat(pieces) if pieces else out + leaves[0].sum() * 0
    wanted = [*leaves, mask] if i.needs_mask_grad else leaves
    gradients = torch.autograd.grad(out, wanted, i.grad_out, allow_unused=True, materialize_grads=True)
    return out.detach(), *gradients


def _eager(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, padding: Tensor | None, slopes: Tensor | None,
    scale: float, left: int, right: int, bottom_right: bool,
    dropout_p: float, key: Tensor | None, offset: int, factors: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention as torch users write it, dense."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q @ k.mT) * scale
    distance = torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None]
    if bottom_right:
        distance = distance - (k.shape[2] - q.shape[2])
    visible = torch.ones_like(logits, dtype=torch.bool)
    if slopes is not None:
        logits = logits - (slopes.reshape(-1, q.shape[1], 1, 1) * distance.abs()).to(q.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask.to(q.dtype)
    if padding is not None:
        visible = visible & padding[:, None, None, :]
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    alone = ~visible.any(-1, keepdim=True)
    p = torch.softmax(logits.masked_fill(~visible & ~alone, -torch.inf), -1).masked_fill(alone, 0.0)
    if dropout_p and factors is None:
        assert key is not None
        factors = reference.dropout_mask(tuple(p.shape), dropout_p, key, offset, q.dtype)
    return (p if factors is None else p * factors) @ v


@dataclass(frozen=True)
class Expected:
    """What a case gives: in float64, and by torch's own means."""

    inputs: Inputs
    out: Tensor
    lse: Tensor
    gradients: tuple[Tensor, ...]  # of q, k, v and the mask
    torchs_out: Tensor
    torchs_lse: Tensor
    torchs_gradients: tuple[Tensor, ...]


@functools.lru_cache(maxsize=512)  # every instruction set is asked the same
def expected(case: Case, dtype: torch.dtype, device: str) -> Expected:
    i = inputs(case, dtype, device)
    wide = [double(x) for x in (i.q, i.k, i.v)]
    wide_arguments = [double(x) for x in i.arguments]
    out, lse = reference.attention(*wide, *wide_arguments, True)
    gradients = reference.attention_backward(
        double(i.grad_out), *wide, out, lse, *wide_arguments, i.needs_mask_grad, True
    )
    torchs_out, *torchs_gradients = _torchs_own(i)
    _, torchs_lse = reference.attention(i.q.float(), i.k.float(), i.v.float(), *i.arguments, True)
    return Expected(i, out, lse, gradients, torchs_out, torchs_lse, tuple(torchs_gradients))


def check(
    operations: Any,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    backward: bool = True,
    deterministic: bool = False,
) -> None:
    """out, lse and every gradient against float64."""
    wanted = expected(case, dtype, device)
    i = wanted.inputs
    out, lse = operations.attention(i.q, i.k, i.v, *i.arguments, True)
    assert out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
    assert_close_to_exact(out, wanted.out, wanted.torchs_out, "out")
    assert_close_to_exact(lse, wanted.lse, wanted.torchs_lse, "lse")
    if not backward:
        return
    gradients = operations.attention_backward(
        i.grad_out, i.q, i.k, i.v, out, lse, *i.arguments, i.needs_mask_grad, deterministic
    )
    for x, gradient in zip((i.q, i.k, i.v), gradients, strict=False):
        assert gradient.dtype == x.dtype and gradient.shape == x.shape and gradient.is_contiguous()
    # What cancels (a mask's gradient along a row, say) is as exact as what was summed, dout · v, is large.
    summed = (
        _largest(double(i.grad_out).norm(dim=-1)) * _largest(double(i.v).norm(dim=-1)) / max(1 - case.dropout_p, 0.1)
    )
    largest_of_all = max(map(_largest, wanted.gradients))
    for name, actual, exact, torchs in itertools.zip_longest(
        ("dq", "dk", "dv", "dmask"), gradients, wanted.gradients, wanted.torchs_gradients
    ):
        if torchs is None:
            assert actual.shape == exact.shape == (0,), name
            continue
        assert actual.dtype == (torch.float32 if name == "dmask" else dtype), name
        largest = _largest(exact)
        if largest <= 1e-9 * summed:
            assert _largest(actual) <= FLOOR_ULPS * torch.finfo(dtype).eps * summed, name
            continue
        if name == "dmask":
            actual = actual.to(dtype)  # a float32 sum of products of values rounded to dtype: as exact as those
        ulps = FLOOR_ULPS * max(1.0, largest_of_all / largest)
        assert_close_to_exact(actual, exact, torchs, name, floor_ulps=ulps)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


#: Cases by name: what each is there for.
CASES = {
    "one token": Case(((1, 1),)),
    "one query, many keys": Case(((1, 65),), right=0, bottom_right=True),
    "many queries, one key": Case(((33, 1),), right=0),
    "several blocks, nothing masked": Case(((64, 64),), head_dim=64),
    "odd lengths": Case(((33, 65),), head_dim=40),
    "causal": Case(((65, 65),), right=0, head_dim=16),
    "causal, more keys, top left": Case(((33, 65),), right=0),
    "causal, more keys, bottom right": Case(((33, 65),), right=0, bottom_right=True),
    "causal, more queries, bottom right: the first see nothing": Case(((65, 33),), right=0, bottom_right=True),
    "window": Case(((65, 65),), left=9, right=5),
    "window of whole blocks": Case(((65, 65),), left=40, right=40),
    "window to the left only": Case(((65, 65),), left=20),
    "window of one": Case(((33, 33),), left=0, right=0),
    "window outside: nothing is seen": Case(((17, 80),), left=3, right=3, bottom_right=True),
    "window wider than everything": Case(((17, 33),), left=2**31 - 1, right=2**40),
    "padding": Case(((17, 40), (17, 40)), padding="holes"),
    "padding at the end": Case(((17, 130),) * 3, padding="end"),
    "padding at the start, causal": Case(((65, 65),) * 3, padding="start", right=0),
    "padding in the middle, window": Case(((65, 65),) * 2, padding="middle", left=40, right=9, dropout_p=0.1),
    "padding at the end, grouped heads, a mask": Case(((17, 65),) * 2, padding="end", heads=4, mask="additive-h-q"),
    "padding at the end, short": Case(((17, 30),) * 3, padding="end"),
    "bool mask": Case(((17, 40), (17, 40)), mask="bool"),
    "bool mask for all heads": Case(((17, 40), (17, 40)), mask="bool-h-q", padding="holes"),
    "additive mask": Case(((17, 40), (17, 40)), mask="additive"),
    "additive mask for the batch": Case(((17, 40), (17, 40)), mask="additive-b", right=0),
    "additive mask for the heads": Case(((17, 40), (17, 40)), mask="additive-h-q"),
    "additive mask of rows": Case(((33, 33), (33, 33)), mask="additive-k-b", left=7),
    "additive mask of nothing": Case(((17, 17), (17, 17)), mask="additive-b-h-q-k"),
    "mask of the least number": Case(((33, 65), (33, 65)), mask="least-h"),
    "mask of the least number for all queries, short": Case(((17, 30), (17, 30)), mask="least-h-q"),
    "mask of the least number, causal, dropout": Case(((33, 33),), mask="least", right=0, dropout_p=0.2),
    "packed, bias of the least number": Case(
        ((5, 5), (33, 65)), packed=True, mask="least-h", right=0, bottom_right=True
    ),
    "alibi": Case(((33, 65),), alibi=1, right=0),
    "alibi by sequence, and a mask": Case(((17, 40), (17, 40)), alibi=2, mask="additive", bottom_right=True),
    "grouped heads": Case(((33, 40),), heads=6, kv_heads=2, head_dim=16),
    "grouped heads, short": Case(((17, 30), (17, 30)), heads=4, kv_heads=2),
    "multi-query": Case(((33, 33),), heads=3, kv_heads=1, head_dim=16, right=0),
    "values wider": Case(((33, 65),), head_dim=40, value_dim=80),
    "values narrower": Case(((17, 17),), head_dim=80, value_dim=16),
    "dropout": Case(((17, 40), (17, 40)), dropout_p=0.3),
    "dropout, keys no multiple of four, causal": Case(((33, 33),), dropout_p=0.5, right=0),
    "everything is dropped": Case(((17, 17),), dropout_p=1.0),
    "negative scale": Case(((33, 33),), scale=-0.3, right=0),
    "tiny scale": Case(((33, 33),), scale=1e-12),
    "large logits": Case(((33, 33),), magnitude=5.0),
    "no queries": Case(((0, 5), (0, 5))),
    "no keys": Case(((5, 0), (5, 0))),
    "no keys, causal": Case(((5, 0),), right=0, bottom_right=True),
    "empty batch": Case(()),
    "packed": Case(((5, 5), (65, 65), (0, 0), (1, 1), (33, 33)), packed=True),
    "packed, cross": Case(((5, 65), (33, 0), (0, 7), (17, 40)), packed=True),
    "packed, causal": Case(((5, 65), (65, 33), (0, 7), (17, 17)), packed=True, right=0, bottom_right=True),
    "packed, window": Case(((5, 65), (65, 33), (17, 17)), packed=True, left=10, right=3, bottom_right=True),
    "packed, bias": Case(((5, 5), (33, 65), (0, 0)), packed=True, mask="additive", beyond=3),
    "packed, bias for all heads": Case(((5, 5), (33, 65), (17, 1)), packed=True, mask="additive-h", beyond=1),
    "packed, bool mask": Case(((5, 5), (33, 65), (17, 1)), packed=True, mask="bool-h"),
    "packed, alibi": Case(((5, 5), (33, 65)), packed=True, alibi=2, right=0, bottom_right=True),
    "packed, grouped, dropout": Case(((5, 5), (0, 3), (17, 40)), packed=True, heads=4, dropout_p=0.2, beyond=2),
    "packed, short": Case(((5, 7), (0, 3), (4, 0), (30, 31)), packed=True, dropout_p=0.2, right=0),
    "packed, nothing": Case(((0, 0), (0, 0)), packed=True),
    "packed, no sequences": Case((), packed=True),
}


def random_case(seed: int) -> Case:
    """A case drawn by `seed`."""
    draw = random.Random(seed)
    packed = draw.random() < 0.5
    lengths = [0, 1, 17, 31, 33, 64, 65]
    if packed:
        sequences = tuple((draw.choice(lengths), draw.choice(lengths)) for _ in range(draw.randint(1, 3)))
    else:
        sequences = ((draw.choice(lengths), draw.choice(lengths)),) * draw.randint(1, 2)
    kv_heads = draw.choice([1, 2])
    head_dim = draw.choice([16, 32, 40, 64, 80])
    masks = ["", "", "", "bool", "additive"]
    mask = draw.choice(masks)
    if mask:
        mask = "-".join([mask, *(name for name in ("h" if packed else "bhqk") if draw.random() < 0.4)])
    return Case(
        lengths=sequences, heads=kv_heads * draw.choice([1, 2]), kv_heads=kv_heads, head_dim=head_dim,
        packed=packed, mask=mask, padding="" if packed else draw.choice(["", "", "", "holes", "end", "start"]),
        alibi=draw.choice([0, 0, 1, 2]),
        left=draw.choice([-1, -1, 0, 6, 40]), right=draw.choice([-1, 0, 0, 3, 40]),
        bottom_right=draw.random() < 0.5, dropout_p=draw.choice([0.0, 0.0, 0.1, 0.5]), beyond=draw.choice([0, 0, 5]),
    )  # fmt: skip


def check_deterministic(operations: Any, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The same input gives the same output, bit for bit, with the log-sum-exp or without."""
    i = inputs(case, dtype, device)
    alone, nothing = operations.attention(i.q, i.k, i.v, *i.arguments, False)
    assert nothing.shape == (0,)
    runs = []
    for _ in range(2):
        out, lse = operations.attention(i.q, i.k, i.v, *i.arguments, True)
        gradients = operations.attention_backward(
            i.grad_out, i.q, i.k, i.v, out, lse, *i.arguments, i.needs_mask_grad, True
        )
        assert torch.equal(alone, out)
        runs.append((out, lse, *gradients))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def check_strides(operations: Any, device: str = "cpu") -> None:
    """Any layout gives, bit for bit, what contiguous inputs give."""
    qkv = torch.randn(1, 19, 3, 2, 40, device=device)  # one projection's output
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    layouts = {
        "of one projection": (q, k, v),
        "columns apart": tuple(torch.randn(1, 2, 19, 80, device=device)[..., ::2] for _ in range(3)),
        "transposed": tuple(torch.randn(40, 19, 1, 2, device=device).permute(2, 3, 1, 0) for _ in range(3)),
        "one head for all": (q, k[:, :1].expand(-1, 2, -1, -1), v[:, :1].expand(-1, 2, -1, -1)),
        "backwards": (q.flip(2), k.flip(2), v),
        "not on 16 bytes": tuple(torch.randn(2 * 19 * 40 + 1, device=device)[1:].view(1, 2, 19, 40) for _ in "qkv"),
    }
    arguments = inputs(Case(((19, 19),), head_dim=40, mask="additive-b-h", right=0), torch.float32, device)
    mask = torch.randn(19, 38, device=device)[:, ::2].T
    masks = (*arguments.arguments[:4], mask, None, None, 0.2, -1, 0, False, 0.0, None, 0)
    for name, layout in layouts.items():
        grad = torch.randn(19, 1, 2, 40, device=device).permute(1, 2, 0, 3)
        results = []
        for tensors, g, m in (
            (layout, grad, mask),
            ([x.contiguous() for x in layout], grad.contiguous(), mask.contiguous()),
        ):
            call = (*masks[:4], m, *masks[5:])
            out, lse = operations.attention(*tensors, *call, True)
            results.append((out, lse, *operations.attention_backward(g, *tensors, out, lse, *call, True, True)))
        for actual, wanted in zip(*results, strict=True):
            assert torch.equal(actual, wanted) and actual.is_contiguous(), name


def check_rows_past_the_end(
    operations: Any, lengths: tuple[tuple[int, int], ...], dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Packed rows past the last boundary, here NaN, are not read, and get zeros, -inf and no gradient."""
    i = inputs(Case(lengths, kv_heads=1, packed=True, mask="additive", right=0, beyond=1), dtype, device)
    spare = 3000  # rows: several blocks of the kernels
    longer = [torch.cat([x, x.new_full((spare, *x.shape[1:]), torch.nan)]) for x in (i.q, i.k, i.v, i.grad_out)]
    for deterministic in (False, True):
        results = []
        for q, k, v, grad_out in ((i.q, i.k, i.v, i.grad_out), longer):
            out, lse = operations.attention(q, k, v, *i.arguments, True)
            call = (grad_out, q, k, v, out, lse, *i.arguments, True, deterministic)
            results.append((out, lse.T, *operations.attention_backward(*call)))
        for name, wanted, actual in zip(("out", "lse", "dq", "dk", "dv", "dmask"), *results, strict=True):
            rows = wanted.shape[0]
            # The order of dq's additions is the only one that may differ.
            tolerance = 8 * torch.finfo(dtype).eps * _largest(wanted) if name == "dq" and not deterministic else 0.0
            torch.testing.assert_close(actual[:rows], wanted, rtol=0.0, atol=tolerance, msg=name)
            assert torch.equal(actual[rows:], torch.full_like(actual[rows:], -torch.inf if name == "lse" else 0.0)), (
                name
            )


def check_dropout_is_the_contracts(operations: Any, case: Case, seed: int, offset: int, device: str = "cpu") -> None:
    """The mask, bit for bit, forward and backward: with equal keys and one-hot values, out is the mask's row."""
    (seq, seq_k) = case.lengths[0]
    batch, heads, width = len(case.lengths), case.heads, case.head_dim
    assert seq_k <= width and not case.packed
    key = torch.tensor([seed], dtype=torch.int64, device=device)
    q, k = torch.zeros(batch, heads, seq, width, device=device), torch.zeros(batch, heads, seq_k, width, device=device)
    one_hot = torch.eye(seq_k, width, device=device).expand(batch, heads, seq_k, width)
    arguments = (None, None, 0, 0, None, None, None, 1.0, -1, -1, False, case.dropout_p, key, offset)
    out, lse = operations.attention(q, k, one_hot, *arguments, True)
    mask = reference.dropout_mask((batch, heads, seq, seq_k), case.dropout_p, key, offset, torch.float32)
    assert torch.equal(out[..., :seq_k] != 0, mask != 0)
    torch.testing.assert_close(out[..., :seq_k], mask / seq_k, rtol=1e-5, atol=0)
    # dv_j = sum_i keep_ij / seq_k * grad_i: one-hot gradients give the mask's transpose.
    assert seq <= width
    grad = torch.eye(seq, width, device=device).expand(batch, heads, seq, width)
    _, _, dv, _ = operations.attention_backward(grad, q, k, one_hot, out, lse, *arguments, False, False)
    assert torch.equal(dv[..., :seq].mT != 0, mask != 0)
    torch.testing.assert_close(dv[..., :seq].mT, mask / seq_k, rtol=1e-5, atol=0)


def check_packed_dropout_is_the_contracts(operations: Any, device: str = "cpu") -> None:
    """Packed sequences draw from [batch, heads, max_seqlen_q, max_seqlen_k], whatever their own lengths are."""
    case = Case(((7, 9), (0, 0), (17, 33)), packed=True, head_dim=40, dropout_p=0.4, beyond=5)
    i = inputs(case, torch.float32, device)
    cu_q, _, max_q, max_k, *_, dropout_p, key, offset = i.arguments
    one_hot = torch.cat([torch.eye(n, 40, device=device) for _, n in case.lengths])[:, None].expand(-1, 2, -1)
    out, _ = operations.attention(i.q * 0, i.k, one_hot, *i.arguments, False)
    mask = reference.dropout_mask((3, 2, max_q, max_k), dropout_p, key, offset, torch.float32)
    for n, (seq_q, seq_k) in enumerate(case.lengths):
        rows = slice(int(cu_q[n]), int(cu_q[n + 1]))
        assert torch.equal(out[rows, :, :seq_k].transpose(0, 1) != 0, mask[n, :, :seq_q, :seq_k] != 0)


def check_not_finite(operations: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """NaN and Inf in a visible place make NaN where the reference makes it, and touch no other row."""
    case = Case(((33, 65),), right=0, bottom_right=True)
    i = inputs(case, dtype, device)
    clean, _ = operations.attention(i.q, i.k, i.v, *i.arguments, True)
    for name, value in itertools.product("qkv", (torch.nan, torch.inf, -torch.inf)):
        spoilt = {n: x.clone() for n, x in (("q", i.q), ("k", i.k), ("v", i.v))}
        spoilt[name][0, 1, 20, 3] = value
        out, lse = operations.attention(*spoilt.values(), *i.arguments, True)
        wanted, wanted_lse = reference.attention(*spoilt.values(), *i.arguments, True)
        seen = slice(20, 21) if name == "q" else slice(0, 33)  # every query sees key 20: the diagonal starts at 32
        assert torch.equal(out[0, 1, seen].isnan(), wanted[0, 1, seen].isnan()), (name, value)
        assert torch.equal(out[0, 1, seen].isinf(), wanted[0, 1, seen].isinf()), (name, value)
        assert torch.equal(lse.isnan(), wanted_lse.isnan()), (name, value)
        assert torch.equal(lse.isposinf(), wanted_lse.isposinf()), (name, value)
        untouched = torch.ones(1, 2, 33, dtype=torch.bool, device=out.device)
        untouched[0, 1, seen] = False
        assert torch.equal(out[untouched], clean[untouched]), (name, value)


def check_infinite_logits_backward(operations: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """A row with an infinite logit has weights of NaN: so have the gradients of every key that it sees, as the reference's."""
    for keys, deterministic in ((65, False), (65, True), (30, False)):
        case = Case(((17, keys),), right=keys - 17, bottom_right=True)
        i = inputs(case, dtype, device)
        i.q[0, 1, 3, 5] = torch.inf
        out, lse = operations.attention(i.q, i.k, i.v, *i.arguments, True)
        assert lse[0, 1, 3] == torch.inf
        call = (i.grad_out, i.q, i.k, i.v, out, lse, *i.arguments, False, deterministic)
        for name, actual, wanted in zip(
            ("dq", "dk", "dv"), operations.attention_backward(*call), reference.attention_backward(*call), strict=False
        ):
            assert torch.equal(actual[0, 0].isnan(), wanted[0, 0].isnan()), name
            assert torch.equal(actual[0, 1].isnan(), wanted[0, 1].isnan()), name


def check_padding_is_not_read(operations: Any, dtype: torch.dtype, device: str = "cpu", factor: int = 1) -> None:
    """Whole blocks of padded keys may hold NaN: nothing of them reaches a result, and their gradients are zero."""
    keys, real = 160 * factor, 60 * factor
    i = inputs(Case(((17 * factor, keys),) * 2, heads=1, kv_heads=1), dtype, device)
    key = torch.arange(keys, device=i.q.device)
    padding = torch.stack([key < real, key >= keys - real])
    far = torch.stack([key >= keys - real, key < real])  # a block of any table's away from the real ones
    spoilt = [torch.where(far[:, None, :, None], torch.nan, x) for x in (i.k, i.v)]
    arguments = (*i.arguments[:5], padding, *i.arguments[6:])
    for deterministic in (False, True):
        results = []
        for k, v in ((i.k, i.v), spoilt):
            out, lse = operations.attention(i.q, k, v, *arguments, True)
            call = (i.grad_out, i.q, k, v, out, lse, *arguments, False, deterministic)
            results.append((out, lse, *operations.attention_backward(*call)))
        for name, clean, actual in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=False):
            tolerance = 0.0 if deterministic or name != "dq" else 4 * torch.finfo(dtype).eps * float(clean.abs().max())
            torch.testing.assert_close(actual, clean, rtol=0.0, atol=tolerance, msg=name)
        for gradient in results[1][3:5]:
            assert not gradient.transpose(1, 2)[~padding].any()


def check_least_masks(operations: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """A row of nothing but a mask's least number averages the values, and its gradient is an average's."""
    i = inputs(Case(((33, 40), (33, 40)), heads=1, kv_heads=1, mask="additive-h-q"), dtype, device)
    mask = torch.full((2, 1, 1, 40), torch.finfo(torch.float32).min, device=device)
    arguments = (*i.arguments[:4], mask, *i.arguments[5:])
    out, lse = operations.attention(i.q, i.k, i.v, *arguments, True)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, i.v.mean(2, keepdim=True).expand_as(out), rtol=tolerance, atol=tolerance)
    for deterministic in (False, True):
        _, dk, dv, _ = operations.attention_backward(
            i.grad_out, i.q, i.k, i.v, out, lse, *arguments, True, deterministic
        )
        torch.testing.assert_close(
            dv, (i.grad_out.sum(2, keepdim=True) / 40).expand_as(dv), rtol=tolerance, atol=tolerance
        )
        assert dk.isfinite().all()


def larger(case: Case, factor: int) -> Case:
    """The same with longer sequences: on a GPU's blocks, as many as the interpreter's small ones have."""
    return replace(
        case,
        lengths=tuple((q * factor, k * factor) for q, k in case.lengths),
        left=case.left * factor if case.left > 0 else case.left,
        right=case.right * factor if case.right > 0 else case.right,
    )


# --------------------------------------------------------------------------------------------------------------- decode


@dataclass(frozen=True)
class DecodeCase:
    """Newest tokens over a cache; `lengths` with the new ones."""

    lengths: tuple[int, ...]
    capacity: int = 0  # 0: the longest
    seq_q: int = 1
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int = 0
    alibi: int = 0
    left: int = -1
    scale: float = 0.0


DECODE_CASES = {
    "one sequence, split": DecodeCase((129,)),
    "one head, split": DecodeCase((161,), heads=1, kv_heads=1, head_dim=64),
    "lengths of every kind": DecodeCase((1, 17, 64, 0, 65), capacity=80),
    "several queries": DecodeCase((65, 3, 5, 40), seq_q=5),
    "more queries than keys": DecodeCase((2, 0), seq_q=4, capacity=33),
    "grouped heads": DecodeCase((65, 97), heads=8, kv_heads=2, seq_q=3),
    "multi-query, more rows than a tile": DecodeCase((97,), heads=12, kv_heads=1, seq_q=2, head_dim=16),
    "window": DecodeCase((129, 20), left=33, seq_q=2, heads=1, kv_heads=1),
    "window of one, split": DecodeCase((129,), left=0, heads=1, kv_heads=1),
    "window past the start": DecodeCase((33,), left=2**40, capacity=64),
    "alibi": DecodeCase((65, 30), alibi=1, heads=4),
    "alibi by sequence": DecodeCase((65, 30), alibi=2, heads=4, left=20),
    "head_dim 80, values narrower": DecodeCase((65,), head_dim=80, value_dim=24),
    "negative scale": DecodeCase((65,), scale=-0.2),
    "an empty cache": DecodeCase((0,), capacity=0),
    "no sequences": DecodeCase((), capacity=16),
}


def check_decode(operations: Any, case: DecodeCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """out and lse against float64; what lies past a sequence's length, here NaN, is not read."""
    batch = len(case.lengths)
    capacity = case.capacity or max(case.lengths, default=0)
    value_dim = case.value_dim or case.head_dim
    q = torch.randn(batch, case.seq_q, case.heads, case.head_dim).to(dtype).to(device)
    k = torch.randn(batch, capacity, case.kv_heads, case.head_dim).to(dtype).to(device)
    v = torch.randn(batch, capacity, case.kv_heads, value_dim).to(dtype).to(device)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    slopes = torch.rand(*((batch,) if case.alibi == 2 else ()), case.heads, device=device) if case.alibi else None
    arguments = (lengths, slopes, case.scale or case.head_dim**-0.5, case.left)
    exact, exact_lse = reference.attention_decode(q.double(), k.double(), v.double(), *map(double, arguments))
    own, own_lse = reference.attention_decode(q, k, v, *arguments)
    for n, length in enumerate(case.lengths):
        k[n, length:] = v[n, length:] = torch.nan
    out, lse = operations.attention_decode(q, k, v, *arguments)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    assert_close_to_exact(out, exact, own, "out")
    assert_close_to_exact(lse, exact_lse, own_lse, "lse")
    again = operations.attention_decode(q, k, v, *arguments)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def check_decode_is_causal_attention(operations: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """The last queries of a causal attention and their decoding agree."""
    q, k, v = (torch.randn(1, 65, 2, 40).to(dtype).to(device) for _ in "qkv")
    lengths = torch.tensor([65], dtype=torch.int32, device=device)
    decoded, decoded_lse = operations.attention_decode(q[:, -3:], k, v, lengths, None, 0.2, -1)
    masks = (None, None, 0, 0, None, None, None, 0.2, -1, 0, False, 0.0, None, 0)
    out, lse = operations.attention(*(x.transpose(1, 2) for x in (q, k, v)), *masks, True)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(decoded, out[:, :, -3:].transpose(1, 2), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(decoded_lse, lse[..., -3:])
