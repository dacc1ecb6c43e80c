"""Bad input to the public functions: an exception that names the value and what was expected, before any kernel runs."""

import pytest
import torch

from fastbert import functional as F
from tests.samples import cu_seqlens

X = torch.randn(4, 8)
Q = torch.randn(2, 4, 5, 8)
P = torch.randn(5, 4, 8)
CU = cu_seqlens(3, 2)
IDS = torch.tensor([1, 2, 3])
WORD = torch.randn(10, 6)

BAD = {
    "layer_norm-shape": (ValueError, r"normalized_shape is \[7\]", lambda: F.layer_norm(X, 7)),
    "layer_norm-weight": (
        ValueError,
        r"weight has shape \[7\]; expected \[8\]",
        lambda: F.layer_norm(X, 8, torch.ones(7)),
    ),
    "layer_norm-int": (TypeError, "int64", lambda: F.layer_norm(X.long(), 8)),
    "layer_norm-weight-list": (TypeError, "weight is a list", lambda: F.layer_norm(X, 8, [1.0] * 8)),
    "layer_norm-weight-dtype": (
        TypeError,
        "complex64",
        lambda: F.layer_norm(X, 8, torch.ones(8, dtype=torch.complex64)),
    ),
    "layer_norm-weight-order": (
        ValueError,
        r"weight has shape \[3, 2\]; expected \[2, 3\]",
        lambda: F.layer_norm(torch.ones(4, 2, 3), (2, 3), torch.ones(3, 2)),
    ),
    "layer_norm-float8": (TypeError, "float8", lambda: F.layer_norm(X.to(torch.float8_e4m3fn), 8)),
    "add_layer_norm-none": (TypeError, "residual is a NoneType", lambda: F.add_layer_norm(X, None)),
    "add_layer_norm-seed": (TypeError, "seed is a int", lambda: F.add_layer_norm(X, X, seed=3, dropout_p=0.1)),
    "linear_act-none": (TypeError, "weight is a NoneType", lambda: F.linear_act(X, None)),
    "softmax-mask-list": (TypeError, "mask is a list", lambda: F.softmax(X, mask=[1])),
    "embedding-list": (TypeError, "input_ids is a list", lambda: F.embedding_layer_norm([1, 2], WORD)),
    "varlen-list": (TypeError, "cu_seqlens_q is a list", lambda: F.varlen_attention(P, P, P, [0, 5], CU, 3, 3)),
    "varlen-window": (
        ValueError,
        "window is None",
        lambda: F.varlen_attention(P, P, P, CU, CU, 3, 3, window_size=None),
    ),
    "layer_norm-list": (TypeError, "input is a list", lambda: F.layer_norm([1.0, 2.0], 2)),
    "sdpa-none": (TypeError, "query is a NoneType", lambda: F.scaled_dot_product_attention(None, Q, Q)),
    "layer_norm-no-features": (ValueError, "at least one feature", lambda: F.layer_norm(X[:, :0], 0)),
    "layer_norm-device": (ValueError, "weight is on meta", lambda: F.layer_norm(X, 8, torch.ones(8, device="meta"))),
    "add_layer_norm-residual": (ValueError, r"residual has shape \[3, 8\]", lambda: F.add_layer_norm(X, X[:3])),
    "add_layer_norm-dtype": (TypeError, "torch.float64", lambda: F.add_layer_norm(X, X.double())),
    "add_layer_norm-x_bias": (
        ValueError,
        r"x_bias has shape \[9\]",
        lambda: F.add_layer_norm(X, X, x_bias=torch.ones(9)),
    ),
    "linear_act-activation": (ValueError, "'swoosh'", lambda: F.linear_act(X, torch.ones(3, 8), None, "swoosh")),
    "linear_act-shape": (ValueError, r"weight \[3, 7\]", lambda: F.linear_act(X, torch.ones(3, 7))),
    "linear_act-dtype": (TypeError, "bfloat16", lambda: F.linear_act(X, torch.ones(3, 8).bfloat16())),
    "linear_residual-shape": (
        ValueError,
        r"expected \[4, 3\]",
        lambda: F.linear_residual(X, torch.ones(3, 8), None, X),
    ),
    "gelu-approximate": (ValueError, "'exact'", lambda: F.gelu(X, "exact")),
    "bias_gelu-bias": (ValueError, r"bias has shape \[2\]", lambda: F.bias_gelu(X, torch.ones(2))),
    "rms_norm-shape": (ValueError, r"rms_norm: normalized_shape is \[7\]", lambda: F.rms_norm(X, 7)),
    "rms_norm-weight": (ValueError, r"weight has shape \[7\]", lambda: F.rms_norm(X, 8, torch.ones(7))),
    "rms_norm-int": (TypeError, "int64", lambda: F.rms_norm(X.long(), 8)),
    "geglu-odd": (ValueError, r"\[4, 7\]; expected \[..., 2 · width\]", lambda: F.geglu(X[:, :7])),
    "geglu-gate": (ValueError, r"gate has shape \[4, 4\]", lambda: F.geglu(X, X[:, :4])),
    "geglu-gate-dtype": (TypeError, "torch.float64", lambda: F.geglu(X, X.double())),
    "geglu-gate-first": (ValueError, "gate_first is about the halves", lambda: F.geglu(X, X, gate_first=True)),
    "geglu-approximate": (ValueError, "'exact'", lambda: F.geglu(X, approximate="exact")),
    "swiglu-int": (TypeError, "int64", lambda: F.swiglu(X.long())),
    "gated_act-activation": (ValueError, "'swoosh'", lambda: F.gated_act(X, activation="swoosh")),
    "softmax-dim": (ValueError, "dim is 2", lambda: F.softmax(X, 2)),
    "softmax-mask": (ValueError, r"mask has shape \[3, 8\]", lambda: F.softmax(X, mask=torch.ones(3, 8).bool())),
    "softmax-mask-dtype": (TypeError, "int64", lambda: F.softmax(X, mask=torch.ones(4, 8).long())),
    "softmax-causal-dim": (ValueError, "must be the last", lambda: F.softmax(X, 0, causal=True)),
    "sdpa-heads": (ValueError, "enable_gqa", lambda: F.scaled_dot_product_attention(Q, Q[:, :2], Q[:, :2])),
    "sdpa-head-dim": (
        ValueError,
        "head_dim is 8 in the query and 4",
        lambda: F.scaled_dot_product_attention(Q, Q[..., :4], Q),
    ),
    "sdpa-batch": (ValueError, "batch sizes", lambda: F.scaled_dot_product_attention(Q, Q[:1], Q[:1])),
    "sdpa-mask": (
        ValueError,
        r"\[2, 4, 5, 5\]",
        lambda: F.scaled_dot_product_attention(Q, Q, Q, torch.ones(5, 6).bool()),
    ),
    "sdpa-padding": (
        ValueError,
        r"bool \[2, 5\]",
        lambda: F.scaled_dot_product_attention(Q, Q, Q, key_padding_mask=torch.ones(2, 5)),
    ),
    "sdpa-padding-type": (
        TypeError,
        "key_padding_mask is a list",
        lambda: F.scaled_dot_product_attention(Q, Q, Q, key_padding_mask=[1]),
    ),
    "sdpa-window": (ValueError, "-2", lambda: F.scaled_dot_product_attention(Q, Q, Q, window=(-2, 0))),
    "sdpa-dtype": (TypeError, "float64", lambda: F.scaled_dot_product_attention(Q, Q.double(), Q)),
    "sdpa-dropout": (ValueError, "dropout_p is 2", lambda: F.scaled_dot_product_attention(Q, Q, Q, dropout_p=2.0)),
    "varlen-dtype": (TypeError, "int64", lambda: F.varlen_attention(P, P, P, CU.long(), CU, 3, 3)),
    "varlen-end": (ValueError, "from 0 to 4", lambda: F.varlen_attention(P, P, P, cu_seqlens(3, 1), CU, 3, 3)),
    "varlen-max": (ValueError, "max_seqlen_k is 2", lambda: F.varlen_attention(P, P, P, CU, CU, 3, 2)),
    "varlen-decreasing": (
        ValueError,
        "decreases",
        lambda: F.varlen_attention(P, P, P, torch.tensor([0, 7, 5], dtype=torch.int32), CU, 7, 3),
    ),
    "varlen-batches": (ValueError, "same batch", lambda: F.varlen_attention(P, P, P, CU, cu_seqlens(3, 1, 1), 3, 3)),
    "varlen-bias-type": (TypeError, "the mask is a list", lambda: F.varlen_attention(P, P, P, CU, CU, 3, 3, bias=[1])),
    "varlen-bias": (
        ValueError,
        r"\[4 or 1, 3, 3\]",
        lambda: F.varlen_attention(P, P, P, CU, CU, 3, 3, bias=torch.ones(4, 2, 3)),
    ),
    "varlen-alibi": (
        ValueError,
        r"alibi_slopes has shape \[3\]",
        lambda: F.varlen_attention(P, P, P, CU, CU, 3, 3, alibi_slopes=torch.ones(3)),
    ),
    "varlen-dense": (ValueError, "expected 3 dimensions", lambda: F.varlen_attention(Q, Q, Q, CU, CU, 3, 3)),
    "decode-grad": (
        RuntimeError,
        "no gradient",
        lambda: F.attention_decode(Q.clone().requires_grad_(), Q, Q, torch.tensor([1, 1], dtype=torch.int32)),
    ),
    "decode-length": (
        ValueError,
        "lengths holds 9",
        lambda: F.attention_decode(Q, Q, Q, torch.tensor([9, 1], dtype=torch.int32)),
    ),
    "embedding-id": (
        IndexError,
        "input_ids holds 10; the vocabulary takes 0 to 9",
        lambda: F.embedding_layer_norm(IDS + 7, WORD),
    ),
    "embedding-negative": (IndexError, "holds -1", lambda: F.embedding_layer_norm(IDS - 2, WORD)),
    "embedding-float-ids": (TypeError, "float32", lambda: F.embedding_layer_norm(IDS.float(), WORD)),
    "embedding-position": (
        IndexError,
        "position_ids holds 3",
        lambda: F.embedding_layer_norm(IDS, WORD, torch.randn(3, 6), position_ids=IDS),
    ),
    "embedding-types": (
        IndexError,
        "token_type_ids holds 2",
        lambda: F.embedding_layer_norm(IDS, WORD, token_type=torch.randn(2, 6), token_type_ids=IDS - 1),
    ),
    "embedding-no-positions": (
        ValueError,
        "come together",
        lambda: F.embedding_layer_norm(IDS, WORD, torch.randn(3, 6)),
    ),
    "embedding-padding-idx": (
        ValueError,
        "padding_idx is 10",
        lambda: F.embedding_layer_norm(IDS, WORD, padding_idx=10),
    ),
    "cross_entropy-target": (IndexError, "target holds 8", lambda: F.cross_entropy(X, torch.tensor([0, 8, 1, 1]))),
    "cross_entropy-ignore": (
        IndexError,
        "target holds -100",
        lambda: F.cross_entropy(X, torch.tensor([0, -100, 1, 1]), ignore_index=3),
    ),
    "cross_entropy-probabilities": (TypeError, "class probabilities", lambda: F.cross_entropy(X, X.softmax(-1))),
    "cross_entropy-weight": (
        NotImplementedError,
        "torch.nn.functional",
        lambda: F.cross_entropy(X, torch.tensor([0, 1, 1, 1]), torch.ones(8)),
    ),
    "cross_entropy-reduction": (
        ValueError,
        "'average'",
        lambda: F.cross_entropy(X, torch.tensor([0, 1, 1, 1]), reduction="average"),
    ),
    "cross_entropy-in-place-leaf": (
        ValueError,
        "input is a leaf",
        lambda: F.cross_entropy(X.clone().requires_grad_(), torch.tensor([0, 1, 1, 1]), inplace_backward=True),
    ),
    "cross_entropy-in-place-view-of-a-leaf": (
        ValueError,
        "a view of one",
        lambda: F.cross_entropy(X.clone().requires_grad_()[:, 1:], torch.tensor([0, 1, 1, 1]), inplace_backward=True),
    ),
    "cross_entropy-in-place-strides": (
        ValueError,
        "the rows must lie apart",
        lambda: F.cross_entropy(
            (X[:1].clone().requires_grad_() * 2).expand(4, 8), torch.tensor([0, 1, 1, 1]), inplace_backward=True
        ),
    ),
    "cross_entropy-rows": (ValueError, r"target has shape \[3\]", lambda: F.cross_entropy(X, torch.tensor([0, 1, 1]))),
    "linear_cross_entropy-shape": (
        ValueError,
        r"\[classes, hidden\]",
        lambda: F.linear_cross_entropy(X, torch.ones(5, 7), torch.tensor([0, 1, 1, 1])),
    ),
    "rotary-positions": (ValueError, "needs position_ids", lambda: F.rotary(P, torch.ones(9, 4), torch.ones(9, 4))),
    "rotary-table": (
        IndexError,
        "position_ids holds 9",
        lambda: F.rotary(P, torch.ones(9, 4), torch.ones(9, 4), position_ids=torch.arange(5) + 5),
    ),
    "rotary-width": (
        ValueError,
        "at most 4",
        lambda: F.rotary(P, torch.ones(9, 5), torch.ones(9, 5), position_ids=torch.arange(5)),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("target", [-1, 8])
def test_backward_operators_look_at_ids_too(target):
    """They write where the ids say."""
    rows, ids = torch.zeros(4), torch.full((4,), target)
    for name in ("cross_entropy_backward", "cross_entropy_backward_"):
        with pytest.raises(IndexError, match=f"target holds {target}"):
            getattr(torch.ops.fastbert, name)(rows, X.clone(), ids, rows, -100, 0.0)
    with pytest.raises(IndexError, match=f"target holds {target}"):
        torch.ops.fastbert.linear_cross_entropy_backward(rows, X, X[:, :8], None, ids, rows, -100, 0.0, [True] * 3)
    with pytest.raises(IndexError, match=f"input_ids holds {target}"):
        torch.ops.fastbert.embedding_layer_norm_backward(
            X, ids, None, None, X, None, None, rows, rows, None, 0.0, None, 0, -1, [True, False, False, False, False]
        )


def test_all_ignored_gives_nan_as_torch_does():
    target = torch.full((4,), -100)
    assert F.cross_entropy(X, target).isnan() and torch.nn.functional.cross_entropy(X, target).isnan()
    assert F.cross_entropy(X, target, reduction="sum") == 0
