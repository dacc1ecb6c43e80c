"""One real problem for each of the other operations, against what torch offers for it.

Shapes are those of BERT-base on a batch of 2048 tokens, or smaller where torch needs more than some tens of milliseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench.cases import OURS, PEER, Case, Contender, Prepared, Settings, check_against
from fastbert.bench.suites._common import Maker, answers, nbytes

_HIDDEN, _INNER, _HEADS, _HEAD_DIM, _VOCABULARY = 768, 3072, 12, 64, 30522  # BERT-base
_EPS = 1e-12
_OURS = "fastbert.functional"


def cases() -> list[Case]:
    return [
        _case("bias_gelu", "2048x3072", "2048×3072", _bias_gelu, "torch F.gelu(x + b)"),
        _case("gated_act", "2048x1152-geglu", "2048×1152 geglu", _gated_act, "torch a · F.gelu(b)"),
        _case("rms_norm", "2048x768", "2048×768", _rms_norm, "torch F.rms_norm"),
        _case(
            "softmax", "16x12x128x128-masked", "16×12×128×128 masked", _softmax, "torch (x · s).masked_fill, softmax"
        ),
        _case("linear_act", "512x768x3072-gelu", "512×768×3072 gelu", _linear_act, "torch F.gelu(F.linear)"),
        _case("linear_residual", "512x3072x768", "512×3072×768", _linear_residual, "torch F.linear + r"),
        _case("attention", "B8-S128-H12", "dense B8 S128 H12", _attention, "torch SDPA"),
        _case(
            "attention",
            "B16-S128-H12-varlen",
            "packed B16 S≤128 H12",
            _varlen_attention,
            "torch SDPA, padded and masked",
            "torch SDPA, a call per sequence",
        ),
        _case("attention_decode", "B8-cache512-H12", "B8 cache 512 H12", _attention_decode, "torch SDPA, masked"),
        _case(
            "embedding_layer_norm",
            "16x128x768",
            "16×128×768",
            _embedding_layer_norm,
            "torch 3 × F.embedding, F.layer_norm",
        ),
        _case("rotary", "2048x12x64", "2048×12×64", _rotary, "torch x · cos + rotate_half(x) · sin"),
        _case("cross_entropy", "256x30522", "256×30522", _cross_entropy, "torch F.cross_entropy"),
        _case(
            "linear_cross_entropy",
            "256x768x30522-15pc",
            "256×768×30522, 15 % labelled",
            _linear_cross_entropy,
            "torch F.cross_entropy(F.linear)",
        ),
    ]


def _case(operation: str, suffix: str, title: str, prepare: Callable[[Settings, Maker], Prepared], *peers: str) -> Case:
    return Case(
        name=f"ops/{operation}/{suffix}-fp32",
        suite="ops",
        group=operation,
        title=f"{title} fp32",
        contenders=(_OURS, *peers),
        prepare=lambda settings: prepare(settings, Maker(settings.seed, settings.device)),
        quick=True,
    )


def _prepared(
    settings: Settings,
    operation: str,
    ours: Callable[[], object],
    theirs: dict[str, Callable[[], object]],  # the first is the baseline
    expected: Callable[[], Sequence[Tensor]],
    convert: dict[str, Callable[[object], object]] | None = None,
    *,
    items: int,
    item_unit: str = "rows",
    bytes: int | None = None,
    flops: int | None = None,
    notes: Sequence[str] = (),
) -> Prepared:
    implementation = answers(operation, settings.device, torch.float32)
    contenders = [Contender(_OURS, OURS, ours, implementation=implementation)]
    contenders += [
        Contender(name, PEER, run, convert=None if convert is None else convert.get(name))
        for name, run in theirs.items()
    ]
    baseline = next(iter(theirs))
    return Prepared(
        contenders,
        baseline,
        lambda: check_against(contenders, expected, baseline, torch.float32),
        bytes=bytes,
        flops=flops,
        items=items,
        item_unit=item_unit,
        notes=list(notes),
    )


def _bias_gelu(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    x, bias = make.normal(2048, _INNER), make.normal(_INNER)
    return _prepared(
        settings,
        "bias_gelu",
        lambda: functional.bias_gelu(x, bias),
        {"torch F.gelu(x + b)": lambda: F.gelu(x + bias)},
        lambda: [F.gelu(x.double() + bias.double())],
        items=x.shape[0],
        bytes=2 * nbytes(x),
    )


def _gated_act(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    x = make.normal(2048, 2 * 1152)  # ModernBERT-base's

    def separate(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    return _prepared(
        settings,
        "gated_act",
        lambda: functional.geglu(x),
        {"torch a · F.gelu(b)": lambda: separate(x)},
        lambda: [separate(x.double())],
        items=x.shape[0],
        bytes=nbytes(x) * 3 // 2,
    )


def _rms_norm(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    x, weight = make.normal(2048, _HIDDEN), make.normal(_HIDDEN, scale=0.1, shift=1.0)
    return _prepared(
        settings,
        "rms_norm",
        lambda: functional.rms_norm(x, _HIDDEN, weight, _EPS),
        {"torch F.rms_norm": lambda: F.rms_norm(x, (_HIDDEN,), weight, _EPS)},
        lambda: [F.rms_norm(x.double(), (_HIDDEN,), weight.double(), _EPS)],
        items=x.shape[0],
        bytes=2 * nbytes(x),
    )


def _softmax(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    x = make.normal(16, _HEADS, 128, 128, scale=4.0)
    mask = make.choice(0.7, 16, 1, 1, 128)
    mask[..., 0] = True  # a row with nothing to keep is NaN in torch, zeros here
    scale = _HEAD_DIM**-0.5
    return _prepared(
        settings,
        "softmax",
        lambda: functional.softmax(x, mask=mask, scale=scale),
        {"torch (x · s).masked_fill, softmax": lambda: (x * scale).masked_fill(~mask, -torch.inf).softmax(-1)},
        lambda: [(x.double() * scale).masked_fill(~mask, -torch.inf).softmax(-1)],
        items=x.numel() // 128,
        bytes=2 * nbytes(x),
    )


def _linear_act(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    x = make.normal(512, _HIDDEN)
    weight, bias = make.normal(_INNER, _HIDDEN, scale=0.03), make.normal(_INNER)
    return _prepared(
        settings,
        "linear_act",
        lambda: functional.linear_act(x, weight, bias, "gelu"),
        {"torch F.gelu(F.linear)": lambda: F.gelu(F.linear(x, weight, bias))},
        lambda: [F.gelu(F.linear(x.double(), weight.double(), bias.double()))],
        items=x.shape[0],
        flops=2 * x.shape[0] * _HIDDEN * _INNER,
    )


def _linear_residual(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    x, residual = make.normal(512, _INNER), make.normal(512, _HIDDEN)
    weight, bias = make.normal(_HIDDEN, _INNER, scale=0.02), make.normal(_HIDDEN)
    return _prepared(
        settings,
        "linear_residual",
        lambda: functional.linear_residual(x, weight, bias, residual),
        {"torch F.linear + r": lambda: F.linear(x, weight, bias) + residual},
        lambda: [F.linear(x.double(), weight.double(), bias.double()) + residual.double()],
        items=x.shape[0],
        flops=2 * x.shape[0] * _HIDDEN * _INNER,
    )


def _attention(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    q, k, v = (make.normal(8, _HEADS, 128, _HEAD_DIM) for _ in range(3))
    return _prepared(
        settings,
        "attention",
        lambda: functional.scaled_dot_product_attention(q, k, v),
        {"torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v)},
        lambda: [F.scaled_dot_product_attention(q.double(), k.double(), v.double())],
        items=8 * 128,
        item_unit="tokens",
        flops=4 * 8 * _HEADS * 128 * 128 * _HEAD_DIM,
    )


def _varlen_attention(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    longest = 128
    lengths = [128, 96, 8, 40, 17, 24, 64, 33, 12, 75, 20, 28, 9, 51, 30, 41]  # 33 % of 16 × 128
    ends = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = ends.to(torch.int32).to(make.device)
    q, k, v = (make.normal(sum(lengths), _HEADS, _HEAD_DIM) for _ in range(3))  # [total, heads, head_dim]
    real = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(make.device)  # [batch, longest]

    def padded(x: Tensor) -> Tensor:  # [batch, heads, longest, head_dim]
        out = x.new_zeros(len(lengths), longest, _HEADS, _HEAD_DIM)
        out[real] = x
        return out.transpose(1, 2).contiguous()

    padded_q, padded_k, padded_v = padded(q), padded(k), padded(v)
    mask = real[:, None, None, :]
    sequences = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in itertools.pairwise(ends)]

    def expected() -> list[Tensor]:
        outputs = [F.scaled_dot_product_attention(q.double(), k.double(), v.double()) for q, k, v in sequences]
        return [torch.cat([output[0].transpose(0, 1) for output in outputs])]

    return _prepared(
        settings,
        "attention",
        lambda: functional.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest),
        {
            "torch SDPA, padded and masked": lambda: F.scaled_dot_product_attention(
                padded_q, padded_k, padded_v, attn_mask=mask
            ),
            "torch SDPA, a call per sequence": lambda: [
                F.scaled_dot_product_attention(q, k, v) for q, k, v in sequences
            ],
        },
        expected,
        {
            "torch SDPA, padded and masked": lambda output: output.transpose(1, 2)[real],  # type: ignore[attr-defined]
            "torch SDPA, a call per sequence": lambda outputs: torch.cat([o[0].transpose(0, 1) for o in outputs]),  # type: ignore[attr-defined]
        },
        items=sum(lengths),
        item_unit="tokens",
        flops=4 * _HEADS * _HEAD_DIM * sum(n * n for n in lengths),
        notes=["packing and padding are not part of the time"],
    )


def _attention_decode(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    capacity = 512
    q = make.normal(8, 1, _HEADS, _HEAD_DIM)
    k_cache, v_cache = (make.normal(8, capacity, _HEADS, _HEAD_DIM) for _ in range(2))
    lengths = torch.tensor([512, 300, 17, 128, 64, 500, 1, 256], dtype=torch.int32, device=make.device)
    mask = (torch.arange(capacity, device=make.device) < lengths[:, None])[:, None, None, :]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return out.transpose(1, 2)

    return _prepared(
        settings,
        "attention_decode",
        lambda: functional.attention_decode(q, k_cache, v_cache, lengths),
        {"torch SDPA, masked": lambda: sdpa(q, k_cache, v_cache)},
        lambda: [sdpa(q.double(), k_cache.double(), v_cache.double())],
        items=8,
        item_unit="tokens",
        bytes=2 * 4 * int(lengths.sum()) * _HEADS * _HEAD_DIM,
    )


def _embedding_layer_norm(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    ids, types = make.integers(0, _VOCABULARY, 16, 128), make.integers(0, 2, 16, 128)
    word, position, token_type = make.normal(_VOCABULARY, _HIDDEN), make.normal(512, _HIDDEN), make.normal(2, _HIDDEN)
    weight, bias = make.normal(_HIDDEN, scale=0.1, shift=1.0), make.normal(_HIDDEN, scale=0.1)
    positions = torch.arange(128, device=make.device).expand(16, 128)

    def separate(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = F.embedding(ids, word) + F.embedding(types, token_type) + F.embedding(positions, position)
        return F.layer_norm(total, (_HIDDEN,), weight, bias, _EPS)

    tables = (word, position, token_type, weight, bias)
    return _prepared(
        settings,
        "embedding_layer_norm",
        lambda: functional.embedding_layer_norm(
            ids, word, position, token_type, weight, bias, _EPS, position_ids=positions, token_type_ids=types
        ),
        {"torch 3 × F.embedding, F.layer_norm": lambda: separate(*tables)},
        lambda: [separate(*(each.double() for each in tables))],
        items=ids.numel(),
        item_unit="tokens",
        bytes=4 * ids.numel() * _HIDDEN * 4,
    )


def _rotary(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    tokens = 2048
    x = make.normal(tokens, _HEADS, _HEAD_DIM)
    rates = 10000.0 ** (-torch.arange(0, _HEAD_DIM, 2) / _HEAD_DIM)
    angles = (torch.arange(tokens)[:, None] * rates).to(make.device)  # [tokens, head_dim / 2]
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(tokens, device=make.device)

    def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # as models in transformers do it
        first, second = x.chunk(2, -1)
        cos, sin = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, sin], -1)[:, None]
        return x * cos + torch.cat([-second, first], -1) * sin

    return _prepared(
        settings,
        "rotary",
        lambda: functional.rotary(x, cos, sin, position_ids=positions),
        {"torch x · cos + rotate_half(x) · sin": lambda: rotate_half(x, cos, sin)},
        lambda: [rotate_half(x.double(), cos.double(), sin.double())],
        items=tokens,
        item_unit="tokens",
        bytes=2 * nbytes(x),
    )


def _cross_entropy(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    logits, target = make.normal(256, _VOCABULARY), make.integers(0, _VOCABULARY, 256)
    return _prepared(
        settings,
        "cross_entropy",
        lambda: functional.cross_entropy(logits, target),
        {"torch F.cross_entropy": lambda: F.cross_entropy(logits, target)},
        lambda: [F.cross_entropy(logits.double(), target)],
        items=256,
        bytes=nbytes(logits),
    )


def _linear_cross_entropy(settings: Settings, make: Maker) -> Prepared:
    from fastbert import functional

    x = make.normal(256, _HIDDEN)
    weight, bias = make.normal(_VOCABULARY, _HIDDEN, scale=0.03), make.normal(_VOCABULARY, scale=0.1)
    labelled = make.choice(0.15, 256)  # as in masked language modelling
    target = torch.where(labelled, make.integers(0, _VOCABULARY, 256), -100)
    return _prepared(
        settings,
        "linear_cross_entropy",
        lambda: functional.linear_cross_entropy(x, weight, target, bias),
        {"torch F.cross_entropy(F.linear)": lambda: F.cross_entropy(F.linear(x, weight, bias), target)},
        lambda: [F.cross_entropy(F.linear(x.double(), weight.double(), bias.double()), target)],
        items=256,
        flops=2 * int(labelled.sum()) * _HIDDEN * _VOCABULARY,
        notes=["the floating-point operations counted are those of the labelled rows"],
    )
