"""Padding of what is encoded already, as data collators need it."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy
import torch

from fastbert.tokenizer.calls import resolve_lengths
from fastbert.tokenizer.encoding import PADDING, BatchEncoding
from fastbert.tokenizer.tensors import columns, pad_row, rounded_up, to_lists

_PADDED = ("token_type_ids", "special_tokens_mask")


def pad(
    tokenizer: Any,
    encoded: Any,
    padding: Any,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    padding_side: str | None,
    return_attention_mask: bool | None,
    return_tensors: Any,
    verbose: bool,
) -> Any:
    """See WordPieceTokenizer.pad."""
    if isinstance(encoded, list | tuple) and encoded and isinstance(encoded[0], Mapping):
        encoded = columns(encoded)
    main = tokenizer.model_input_names[0]
    if main not in encoded:
        raise ValueError(
            "You should supply an encoding or a list of encodings to this method that includes "
            f"{main}, but you provided {list(encoded.keys())}"
        )
    ids = encoded[main]
    if ids is None or (isinstance(ids, Sized) and len(ids) == 0):
        if return_attention_mask:
            encoded["attention_mask"] = []
        return encoded
    first = next((row[0] for row in ids if len(row)), ids[0]) if isinstance(ids[0], list | tuple) else ids[0]
    if return_tensors is None and isinstance(first, torch.Tensor):
        return_tensors = "pt"
    elif return_tensors is None and isinstance(first, numpy.ndarray | numpy.generic):
        return_tensors = "np"
    if not isinstance(first, int | list | tuple | torch.Tensor | numpy.ndarray | numpy.generic):
        raise ValueError(
            f"type of {first} unknown: {type(first)}. Should be one of a python, numpy, or pytorch object."
        )
    listed = (main, "attention_mask", *_PADDED)
    arrays = not isinstance(first, int | list | tuple)
    data = {key: to_lists(value) if arrays or key in listed else value for key, value in encoded.items()}
    lengths = resolve_lengths(tokenizer, padding, None, max_length, verbose=verbose)
    mask = "attention_mask" in tokenizer.model_input_names if return_attention_mask is None else return_attention_mask
    single = not isinstance(data[main][0], list | tuple)
    if single:
        data = {key: [value] for key, value in data.items()}
    rows = data[main]
    if not single and any(len(value) != len(rows) for value in data.values()):
        raise AssertionError("Some items in the output dictionary have a different batch size than others.")
    if mask and "attention_mask" not in data:
        data["attention_mask"] = [[1] * len(row) for row in rows]
    if lengths.padding is not None:
        length = max(map(len, rows)) if lengths.padding == "longest" else lengths.max_length
        assert length is not None
        side = tokenizer.padding_side if padding_side is None else padding_side
        length = rounded_up(length, pad_to_multiple_of)
        if side not in ("right", "left") and any(len(row) != length for row in rows):
            raise ValueError(f"Invalid padding strategy:{side}")
        for key in (main, *_PADDED, *(["attention_mask"] if mask else [])):
            if key in data:
                fill = tokenizer.pad_token_id if key == main else PADDING[key]
                # By the difference of the ids' lengths, whatever the entry's own.
                data[key] = [
                    pad_row(row, len(row) + max(0, length - len(of)), fill, side == "left")
                    for row, of in zip(data[key], rows, strict=True)
                ]
    if single:
        data = {key: value[0] for key, value in data.items()}
    return BatchEncoding(data, tensor_type=return_tensors)
