"""``attn_implementation="fastbert"``: our attention for every model on transformers' AttentionInterface.

Two functions, registered under one name. transformers calls :func:`attention_mask` once a forward pass and hands what it
returns to every layer's :func:`attention`. Where transformers' own mask for SDPA would be [batch, 1, seq_q, seq_k], ours keeps
the padding mask's [batch, seq_k] and says beside it which keys around its own a query sees; the kernels skip what is masked.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_tracing

from fastbert import functional as F

NAME = "fastbert"

# Arguments of attention functions that change the result and that the kernels do not know.
_UNSUPPORTED = (
    "softcap",
    "s_aux",
    "sinks",
    "cache",
    "block_table",
    "cache_seqlens",
    "indices",
    "block_indices",
    "head_mask",
)


def register() -> None:
    """Makes ``attn_implementation="fastbert"`` known to transformers. Importing this package does it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**arguments: Any) -> Tensor | None:
    """The mask of one forward pass, as transformers' ``sdpa_mask`` with its arguments, in less memory where it can be.

    Returns:
        None for no mask, or for one that is causal and nothing else, as ``sdpa_mask`` does; else one of

        - [batch, 1, 1, seq_k], bool: every query sees the keys that are True;
        - a compact mask (see :func:`_compact`): of those, the keys in a window around the query; or packed sequences;
        - ``sdpa_mask``'s [batch, 1, seq_q, seq_k], bool.
    """
    padding = arguments.get("attention_mask")
    if padding is not None and padding.dim() > 2:
        return padding  # a mask of ours came back, as masks made ahead of generate() do
    seq_k = arguments["kv_length"]
    window = _window(arguments)
    if window is None or (padding is not None and padding.shape[-1] != seq_k):
        packed = _packed_sequences(arguments)
        return sdpa_mask(**arguments) if packed is None else packed
    if padding is None or _all_real(padding):
        if window in ((-1, -1), (-1, 0)):
            return None
        padding = torch.empty((0, seq_k), dtype=torch.bool, device=_device(arguments))
    elif window == (-1, -1):
        return padding[:, None, None, :]
    return _compact(padding, window)


def _window(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """How many keys left and right of its own a query sees, −1 for all; None where the mask is of another kind.

    ``sdpa_mask`` gets the permission to return no mask, and that says of which kind the mask is: causal, or everything, and
    within ``local_size``, but for padding.
    """
    causal = bool(arguments.get("allow_is_causal_skip", True))
    if arguments.get("use_vmap", False) or not (causal or arguments.get("allow_is_bidirectional_skip", False)):
        return None
    seq_k, local_size = arguments["kv_length"], arguments.get("local_size")
    if not causal and local_size is None:
        return -1, -1
    cache_position = arguments.get("cache_position")  # transformers 5.0 passes it, later ones the numbers
    seq_q = arguments["q_length"] if cache_position is None else cache_position.shape[0]
    offsets = (arguments.get("q_offset", 0), arguments.get("kv_offset", 0))
    # With a cache the first query is not the first key; an offset may also be a tensor, which is not looked into.
    if seq_q != seq_k or not all(isinstance(offset, int) and offset == 0 for offset in offsets):
        return None
    if local_size is None or local_size > seq_k:
        return -1, 0 if causal else -1
    config = arguments.get("config")
    if getattr(config, "attention_chunk_size", None) is not None or local_size != getattr(
        config, "sliding_window", None
    ):
        return None  # chunks are no window
    # As transformers counts: a causal window holds the query itself, one to both sides does not.
    return (local_size - 1, 0) if causal else (local_size, local_size)


def _packed_sequences(arguments: dict[str, Any]) -> Tensor | None:
    """The compact mask of sequences that position_ids told transformers to be packed; None where the mask is anything else.

    What transformers found out stands in the closures of its mask function and nowhere else. Functions that are not known to the
    letter, and compilation, which cannot look into closures, get ``sdpa_mask``'s answer.
    """
    if torch.compiler.is_compiling() or arguments.get("use_vmap", False) or arguments.get("attention_mask") is not None:
        return None
    segments, left, causal = None, -1, False
    functions = [arguments["mask_function"]]
    while functions:
        function = functions.pop()
        if not inspect.isfunction(function):
            return None
        inside = inspect.getclosurevars(function).nonlocals
        match function.__qualname__.split(".")[0] if function.__module__ == masking_utils.__name__ else None:
            case "and_masks":
                functions.extend(inside["mask_functions"])
            case "remap_positions_for_packed_sequence":  # positions differ as columns do within a sequence
                functions.append(inside["mask_function"])
            case "packed_sequence_mask_function":
                segments = inside["packed_sequence_mask"]
            case "sliding_window_overlay":
                left = inside["sliding_window"] - 1
            case "causal_mask_function":
                causal = True
            case _:
                return None
    if not causal or segments is None or segments.shape[-1] != arguments["kv_length"] or segments.numel() == 0:
        return None
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    cu_seqlens = torch.nn.functional.pad(starts.flatten().nonzero().flatten().int(), (0, 1), value=segments.numel())
    return _compact(cu_seqlens.expand(int(cu_seqlens.diff().max()), -1), (left, 0))


def _all_real(padding: Tensor) -> bool:
    """Whether every token is real, where looking costs nothing: not on a GPU, which would have to be waited for."""
    return padding.device.type == "cpu" and not is_tracing(padding) and bool(padding.all())


def _device(arguments: dict[str, Any]) -> torch.device | str:
    cache_position = arguments.get("cache_position")
    return arguments.get("device", "cpu") if cache_position is None else cache_position.device


def _compact(rows: Tensor, window: tuple[int, int]) -> Tensor:
    """rows [n, columns] as a view [left + 2, right + 2, n, 1, columns]: query i sees keys i − left to i + right, −1 for no limit.

    Sizes are the only numbers that a tensor carries through torch.compile, checkpointing and hooks without its values being
    looked at. Rows of bool are a padding mask [batch, seq_k], with a batch of 0 where all keys are real; rows of int32 are
    cu_seqlens [sequences + 1], as many times as the longest sequence has tokens.
    """
    left, right = window
    return rows[None, None, :, None, :].expand(left + 2, right + 2, -1, 1, -1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, called as transformers calls its own.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: [batch, heads, seq_q, head_dim].
        key: [batch, kv_heads, seq_k, head_dim]; kv_heads divides heads.
        value: [batch, kv_heads, seq_k, value_dim].
        attention_mask: what :func:`attention_mask` returned; or [batch, seq_k], nonzero for real tokens, beside ``is_causal``;
            or a mask of one's own that broadcasts to [batch, heads, seq_q, seq_k], bool (True = attend) or additive. None:
            causal if ``is_causal``, counted from the first query and key; one query alone sees all.
        dropout: probability that an attention weight is dropped.
        scaling: factor on the logits; default 1/sqrt(head_dim).
        is_causal: see attention_mask.
        sliding_window: counts where no mask of four or more dimensions says it: a query sees this many tokens, its own included,
            to the left, and to the right where attention is not causal, as transformers' flash attention takes it.
        position_bias: [batch or 1, heads, seq_q, seq_k], added to the logits; gets its gradient.
        cu_seq_lens_q: [sequences + 1], for packed sequences in a batch of one: 0 and the running sums of their lengths. They
            replace attention_mask, as in transformers' flash attention.
        cu_seq_lens_k: the same for the keys.
        max_length_q: at least the longest sequence's length; default seq_q.
        max_length_k: the same for the keys.
        kwargs: what models pass along; those that ask for what is not served raise.

    Returns:
        [batch, seq_q, heads, value_dim], and None for the attention weights.

    Raises:
        NotImplementedError: an argument asks for what the kernels do not compute; its name is in the message.
        TypeError, ValueError: a mask or a shape does not fit.
    """
    _refuse(kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if query.shape[0] != 1 or key.shape[0] != 1:
            raise ValueError(
                f"cu_seq_lens_q cuts a batch of one into sequences, and the batch has {query.shape[0]} rows"
            )
        boundaries = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        window = _flash_window(sliding_window, is_causal)
        return _packed(query, key, value, boundaries, dropout, scaling, window, position_bias), None
    if attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 5:
        boundaries = (attention_mask[0, 0, 0, 0],) * 2 + (attention_mask.shape[2],) * 2
        window = attention_mask.shape[0] - 2, attention_mask.shape[1] - 2
        return _packed(query, key, value, boundaries, dropout, scaling, window, position_bias), None
    bias, key_padding_mask, window = _masks(query, key, attention_mask, is_causal, sliding_window)
    if position_bias is not None:
        if bias is None:
            bias = position_bias
        elif bias.dtype == torch.bool:
            bias = position_bias.masked_fill(~bias, float("-inf"))
        else:
            bias = position_bias + bias
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        bias,
        dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        key_padding_mask=key_padding_mask,
        window=window,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise _not_served(name)
    if kwargs.get("output_attentions"):
        raise _not_served("output_attentions=True")


def _not_served(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'attn_implementation="{NAME}" does not serve {what}; load the model with attn_implementation="eager" or "sdpa", '
        'or switch with model.set_attn_implementation("eager")'
    )


def _flash_window(sliding_window: int | None, is_causal: bool) -> tuple[int, int]:
    left = -1 if sliding_window is None else sliding_window - 1
    return left, 0 if is_causal else left


def _masks(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, sliding_window: int | None
) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
    """What attn_mask, key_padding_mask and window say together what ``mask`` says."""
    batch, seq_q, seq_k = query.shape[0], query.shape[2], key.shape[2]
    if mask is not None and mask.dim() == 5:
        left, right, rows = mask.shape[0] - 2, mask.shape[1] - 2, mask.shape[2]
        if rows not in (0, batch) or mask.shape[-1] != seq_k or seq_q != seq_k:
            raise ValueError(
                f"the mask was made for {rows or 'any number of'} sequences of {mask.shape[-1]} tokens, and this layer has "
                f"{batch} of {seq_q} queries and {seq_k} keys"
            )
        return None, mask[0, 0, :, 0] if rows else None, (left, right)
    if mask is not None and mask.dim() == 4:
        if mask.dtype == torch.bool and mask.shape[1] == 1 and mask.shape[2] == 1 and mask.shape[3] == seq_k:
            return None, mask[:, 0, 0].expand(batch, -1), (-1, -1)
        return mask, None, (-1, -1)
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; expected [batch, seq_k] or one that broadcasts to "
            "[batch, heads, seq_q, seq_k]"
        )
    is_causal = is_causal and seq_q > 1
    window = _flash_window(sliding_window if sliding_window is not None and sliding_window < seq_k else None, is_causal)
    if seq_q != seq_k and (window[0] >= 0 or (is_causal and mask is not None)):
        raise ValueError(
            f"{seq_q} queries over {seq_k} keys with sliding_window {sliding_window} need a mask of [batch, 1, seq_q, seq_k] that "
            "says where the queries stand"
        )
    return None, None if mask is None else mask.bool(), window


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: tuple[Tensor | None, Tensor | None, int | Tensor | None, int | Tensor | None],
    dropout: float,
    scaling: float | None,
    window: tuple[int, int],
    position_bias: Tensor | None,
) -> Tensor:
    """varlen_attention on a batch's rows in line: [batch, heads, seq, head_dim] to [batch, seq, heads, value_dim]."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = boundaries
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k come together; one of them is None")
    if position_bias is not None:
        raise _not_served("position_bias on packed sequences")
    same = cu_seqlens_k is cu_seqlens_q
    cu_seqlens_q = cu_seqlens_q.to(torch.int32)
    out = F.varlen_attention(
        query.transpose(1, 2).flatten(0, 1),
        key.transpose(1, 2).flatten(0, 1),
        value.transpose(1, 2).flatten(0, 1),
        cu_seqlens_q,
        cu_seqlens_q if same else cu_seqlens_k.to(torch.int32),
        query.shape[2] if max_seqlen_q is None else int(max_seqlen_q),
        key.shape[2] if max_seqlen_k is None else int(max_seqlen_k),
        dropout,
        scaling,
        window_size=window,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (query.shape[0], query.shape[2]))
