"""A call of the tokenizer: its arguments checked and resolved as transformers resolves them, and its outputs shaped."""

import warnings
from operator import index
from typing import Any, NamedTuple

import numpy
import torch

from fastbert.packing import PackedBatch
from fastbert.tokenizer.encoding import PADDING, BatchEncoding, Padding, Request
from fastbert.tokenizer.tensors import as_tensors, check_tensor_type, pad_row, rounded_up

VERY_LARGE_INTEGER = int(1e30)  # model_max_length where there is no limit
LARGE_INTEGER = int(1e20)
_PADDINGS = ("longest", "max_length", "do_not_pad")
_TRUNCATIONS = ("only_first", "only_second", "longest_first", "do_not_truncate")
MAX_LENGTH = 2**31 - 1  # tokens; longer limits mean the same
_UNCHANGING = {str, tuple}
MANY_TEXTS = 16  # from here on threads pay
_TEXT_TYPES = (
    "text input must be of type `str` (single example), `list[str]` (batch or single pretokenized example) or "
    "`list[list[str]]` (batch of pretokenized examples) or `list[tuple[list[str], list[str]]]` (batch of pretokenized "
    "sequence pairs)."
)


class Lengths(NamedTuple):
    """How long rows become. ``padding`` and ``truncation`` are transformers' names, None for neither."""

    padding: str | None
    truncation: str | None
    max_length: int | None


def resolve_lengths(
    tokenizer: Any, padding: Any, truncation: Any, max_length: Any, pad_to_multiple_of: Any = None, verbose: bool = True
) -> Lengths:
    """transformers' rules for padding, truncation and max_length. Raises ValueError."""
    if max_length is not None and padding is False and truncation is None:
        truncation = True
    if padding is True:
        if (
            max_length is not None
            and verbose is not None
            and (truncation in (None, False) or truncation == "do_not_truncate")
        ):
            warnings.warn(
                "`max_length` is ignored when `padding`=`True` and there is no truncation strategy. To pad to max "
                "length, use `padding='max_length'`.",
                stacklevel=4,  # of who called the tokenizer
            )
        padding = "longest"
    elif padding is not False:
        padding = _choice(padding, "PaddingStrategy", _PADDINGS)
    if truncation is True:
        truncation = "longest_first"
    elif truncation is not False and truncation is not None:
        truncation = _choice(truncation, "TruncationStrategy", _TRUNCATIONS)
    pad = None if padding in (False, "do_not_pad") else str(padding)
    cut = None if truncation in (False, None, "do_not_truncate") else str(truncation)
    if max_length is None and (pad == "max_length" or cut is not None):
        unlimited = tokenizer.model_max_length > LARGE_INTEGER
        if pad == "max_length":
            pad, max_length = (None, None) if unlimited else (pad, tokenizer.model_max_length)
        if cut is not None:
            cut, max_length = (None, None) if unlimited else (cut, tokenizer.model_max_length)
    if pad is not None and tokenizer.pad_token is None:
        raise ValueError(
            "Asking to pad but the tokenizer does not have a padding token. Please select a token to use as `pad_token` "
            "`(tokenizer.pad_token = tokenizer.eos_token e.g.)` or add a new pad token via "
            "`tokenizer.add_special_tokens({'pad_token': '[PAD]'})`."
        )
    if pad and cut and pad_to_multiple_of is not None and max_length is not None and max_length % pad_to_multiple_of:
        raise ValueError(
            f"Truncation and padding are both activated but truncation length ({max_length}) is not a multiple of "
            f"pad_to_multiple_of ({pad_to_multiple_of})."
        )
    return Lengths(pad, cut, max_length)


def _choice(value: Any, kind: str, choices: tuple[str, ...]) -> str:
    value = getattr(value, "value", value)  # of transformers' enumerations
    if value not in choices:
        raise ValueError(f"{value} is not a valid {kind}, please select one of {list(choices)}")
    return str(value)


def _size(value: Any) -> int:
    """An unsigned integer, with the exceptions that tokenizers raises for others."""
    number = index(value)
    if not 0 <= number < 2**64:
        raise OverflowError("can't convert negative int to unsigned" if number < 0 else "int too big to convert")
    return number


def _is_text(text: Any) -> bool:
    if isinstance(text, str):
        return True
    if not isinstance(text, list | tuple):
        return False
    if text and isinstance(text[0], str):
        return True
    for _ in range(2):
        if len(text) == 0 or isinstance(text[0], str):
            return True
        if not isinstance(text[0], list | tuple):
            return False
        text = text[0]
    return len(text) == 0 or isinstance(text[0], str)


def resolve_texts(text: Any, text_pair: Any, is_split_into_words: bool) -> tuple[Any, Any, bool]:
    """(texts, pairs, whether it is a batch) as the extension takes them: copies, that nobody else changes."""
    if type(is_split_into_words) is not bool:
        raise TypeError(f"is_split_into_words is {is_split_into_words!r:.60}; expected True or False")
    if not _is_text(text) or (text_pair is not None and not _is_text(text_pair)):
        raise ValueError(_TEXT_TYPES)
    batched = isinstance(text, list | tuple)
    if is_split_into_words:
        batched = batched and len(text) > 0 and isinstance(text[0], list | tuple)
    if not batched:
        if not text_pair:
            text_pair = None
        if not is_split_into_words:
            if text_pair is not None and not isinstance(text_pair, str):
                raise TypeError("TextInputSequence must be str")
            return text, text_pair, False
        for words in (text, text_pair):
            if isinstance(words, str):
                raise TypeError(f"the words are the string {words!r:.60}; expected a list of strings")
        return [list(text)], None if text_pair is None else [list(text_pair)], False
    if text_pair is None:
        return _frozen(text), None, True
    if isinstance(text_pair, str):
        raise TypeError(
            "when tokenizing batches of text, `text_pair` must be a list or tuple with the same length as `text`."
        )
    if len(text) != len(text_pair):
        raise ValueError(
            f"batch length of `text`: {len(text)} does not match batch length of `text_pair`: {len(text_pair)}."
        )
    if is_split_into_words:
        return _frozen(text), _frozen(text_pair), True
    return list(text), list(text_pair), True


def _frozen(items: Any) -> list[Any]:
    if set(map(type, items)) <= _UNCHANGING:
        return list(items)
    return [tuple(item) if isinstance(item, list) else item for item in items]


def resolve_options(
    tokenizer: Any,
    lengths: Lengths,
    *,
    add_special_tokens: bool,
    stride: int,
    is_split_into_words: bool,
    overflow: bool,
    split_special_tokens: bool | None,
) -> dict[str, Any]:
    """The extension's options, those that are not its defaults."""
    options: dict[str, Any] = {}
    if add_special_tokens is not True:
        if add_special_tokens is not False:
            raise TypeError(f"add_special_tokens is {add_special_tokens!r:.60}; expected True or False")
        options["add_special_tokens"] = False
    if lengths.truncation is not None:
        limit, stride = _size(lengths.max_length), _size(stride)
        template = tokenizer.template_tokens
        if 0 <= limit - template < stride:
            raise ValueError(
                f"tokenizer stride set to {stride}, which is greater than or equal to its effective max length of "
                f"{limit - template} (= {limit} original max length - {template} added special tokens), "
            )
        options["max_length"] = min(limit, MAX_LENGTH)
        if lengths.truncation != "longest_first":
            options["strategy"] = lengths.truncation
        if stride:
            options["stride"] = min(stride, MAX_LENGTH)
        if tokenizer.truncation_side != "right":
            options["truncation_side"] = _side(tokenizer.truncation_side)
        if overflow:
            options["overflow"] = True
    if is_split_into_words:
        options["is_split_into_words"] = True
    if split_special_tokens is None:
        split_special_tokens = tokenizer.split_special_tokens
    if type(split_special_tokens) is not bool:
        raise TypeError(f"split_special_tokens is {split_special_tokens!r:.60}; expected True or False")
    if split_special_tokens:
        options["split_special_tokens"] = True
    return options


def _side(side: Any) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"Unknown `direction`: `{side}`. Use one of `left` or `right`")
    return str(side)


def resolve_padding(
    tokenizer: Any, lengths: Lengths, longest: int, pad_to_multiple_of: Any, padding_side: str | None
) -> Padding | None:
    if lengths.padding is None:
        return None
    side = _side(tokenizer.padding_side if padding_side is None else padding_side)
    multiple = None if pad_to_multiple_of is None else _size(pad_to_multiple_of)
    length = longest if lengths.padding == "longest" else _size(lengths.max_length)
    token = tokenizer.pad_token
    return Padding(rounded_up(length, multiple), side == "left", token, tokenizer.convert_tokens_to_ids(token))


def default_threads(tokenizer: Any, many: bool, threads: int | None) -> int:
    """As many as torch uses, which is one in a DataLoader's workers; one where there are not many texts."""
    if threads is None:
        threads = tokenizer.threads
    if threads is not None:
        return threads
    return torch.get_num_threads() if many else 1


def shape_outputs(
    rows: Any, request: Request, fields: list[str], *, batched: bool, tensors: str | None, length: bool, samples: bool
) -> BatchEncoding:
    """The outputs as lists, or as tensors where ``tensors`` is "pt" or "np"."""
    padding = request.padding
    count, longest = len(rows), rows.longest
    width = longest if padding is None else padding.length
    # Rows may stay longer than the padding: fewer tokens than max_length are no limit to them.
    rectangular = longest <= width and (padding is not None or rows.total == count * longest)
    outputs: dict[str, Any] = {}
    if tensors is not None and rectangular:
        for field in fields:
            fill = padding.token_id if padding is not None and field == "input_ids" else PADDING[field]
            left = padding is not None and padding.left
            array = rows.padded(field, width, 0 if field == "offset_mapping" else fill, left)
            outputs[field] = array.reshape(count, 0) if width == 0 else array
    else:
        for field in fields:
            outputs[field] = rows.lists(field) if batched or tensors or samples else rows.list(field, 0)
        if padding is not None:
            for field in fields:
                fill = padding.token_id if field == "input_ids" else PADDING[field]
                if batched or tensors or samples:
                    outputs[field] = [pad_row(row, width, fill, padding.left) for row in outputs[field]]
                else:
                    outputs[field] = pad_row(outputs[field], width, fill, padding.left)
    if length:
        counts = rows.lengths() if padding is None else numpy.maximum(rows.lengths(), width)
        outputs["length"] = counts if tensors and rectangular else counts.tolist()
    if samples:
        mapping = rows.samples()
        outputs["overflow_to_sample_mapping"] = mapping if tensors and rectangular else mapping.tolist()
    if tensors == "pt" and rectangular:
        outputs = {name: torch.from_numpy(value) for name, value in outputs.items()}
    elif tensors is not None and not rectangular:
        outputs = as_tensors(outputs, tensors)
    return BatchEncoding(outputs, request)


def packed_batch(rows: Any, with_types: bool) -> PackedBatch:
    """Encoded rows end to end, without any padding."""
    values, cu_seqlens, positions, types, lengths = rows.packed_batch(with_types)
    return PackedBatch.of_valid(
        values=torch.from_numpy(values),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=rows.longest,
        position_ids=torch.from_numpy(positions),
        token_type_ids=None if types is None else torch.from_numpy(types),
        lengths=lengths,
    )


def check_packed(asked: dict[str, bool]) -> None:
    """Raises ValueError for what a packed batch cannot hold."""
    refused = [name for name, value in asked.items() if value]
    if refused:
        raise ValueError(
            f'return_tensors="packed" gives ids, positions and types alone; take away {", ".join(refused)}'
        )


def check_return_tensors(kind: Any) -> str | None:
    if kind is None:
        return None
    return "packed" if kind == "packed" else check_tensor_type(kind)
