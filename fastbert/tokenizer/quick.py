"""The commonest calls of a tokenizer, in one step of C++: what a call costs beside encoding is its arguments.

Whatever is rare, or wrong, is left to the general way, which gives the same results and raises the exceptions.
"""

from typing import Any

import torch

from fastbert.tokenizer.calls import LARGE_INTEGER, MANY_TEXTS, MAX_LENGTH, default_threads
from fastbert.tokenizer.encoding import BatchEncoding, Padding, Request

_NO_OPTIONS: dict[str, Any] = {}
_ALL_NAMES = ["input_ids", "token_type_ids", "attention_mask"]
_CONVERSIONS = {None: None, "pt": torch.from_numpy, "np": True}
_new_encoding = BatchEncoding.__new__
_new_request = tuple.__new__


def quick_call(
    tokenizer: Any,
    text: Any,
    text_pair: Any,
    add_special_tokens: Any,
    padding: Any,
    truncation: Any,
    max_length: Any,
    return_tensors: Any,
    types: Any,
    mask: Any,
    special_mask: Any,
    offsets: Any,
    verbose: Any,
    threads: int | None,
) -> BatchEncoding | None:
    """What the general way gives for strings, or a list of them, perhaps with such pairs; None where it has to be gone.

    The arguments are those of a call; those that are missing have their defaults.
    """
    used = 1
    if type(text) is str:
        if text_pair is not None:
            if type(text_pair) is not str:
                return None
            text_pair = text_pair or None
    elif type(text) is list:
        if text_pair is not None:
            if type(text_pair) is not list or len(text_pair) != len(text):
                return None
            text_pair = text_pair[:]  # copies, that nobody else changes
        text = text[:]
        if len(text) >= MANY_TEXTS:
            used = default_threads(tokenizer, True, threads)
    else:
        return None
    if tokenizer.split_special_tokens is not False or (
        add_special_tokens is not True and add_special_tokens is not False
    ):
        return None
    if return_tensors is not None and (type(return_tensors) is not str or return_tensors not in _CONVERSIONS):
        return None

    truncates = truncation is True
    if not truncates:
        if truncation is not None and truncation is not False:
            return None
        truncates = truncation is None and max_length is not None and padding is False
    limit = max_length
    if limit is None and (truncates or padding == "max_length"):
        limit = tokenizer.model_max_length
        if type(limit) is int and limit > LARGE_INTEGER:
            limit, truncates = None, False
    if limit is not None and (type(limit) is not int or not 0 <= limit <= MAX_LENGTH):
        return None
    if truncates and tokenizer.truncation_side != "right":
        return None

    vocabulary = tokenizer._vocabulary
    padded = None
    pad_id: Any = 0
    length = -1
    if padding is not False:
        if padding is True:
            if max_length is not None and not truncates:
                return None
            length = 0
        elif type(padding) is not str:
            return None
        elif padding == "longest":
            length = 0
        elif padding == "max_length" and limit:
            length = limit
        else:
            return None
        pad_token = tokenizer.pad_token
        pad_id = None if pad_token is None else vocabulary.token_to_id(pad_token)
        if pad_id is None or tokenizer.padding_side != "right":
            return None
        padded = Padding(length, False, pad_token, pad_id)

    names = tokenizer.model_input_names
    fields = 7
    if types is not None or mask is not None or names != _ALL_NAMES:
        fields = 1
        if "token_type_ids" in names if types is None else types:
            fields = 3
        if "attention_mask" in names if mask is None else mask:
            fields |= 4
    if special_mask:
        fields |= 8
    if offsets:
        fields |= 16

    result = _new_encoding(BatchEncoding)
    longest = vocabulary.fill(
        result,
        text,
        text_pair,
        fields,
        add_special_tokens,
        limit if truncates else -1,
        length,
        pad_id,
        _CONVERSIONS[return_tensors],
        used,
    )
    if longest is None:
        return None
    rows = None
    if offsets:
        rows = longest
        longest = rows.longest
    if limit is None and verbose and longest > tokenizer.model_max_length:
        tokenizer._warn_of_length(longest)
    if length == 0:
        padded = Padding(longest, False, pad_token, pad_id)
    options = _NO_OPTIONS
    if truncates or not add_special_tokens:
        options = {"max_length": limit} if truncates else {}
        if not add_special_tokens:
            options["add_special_tokens"] = False
    result._details = _new_request(Request, (vocabulary, text, text_pair, options, padded, rows))
    return result
