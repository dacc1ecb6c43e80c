"""What a tokenizer is called for: encoding, padding and decoding, with transformers' arguments and exceptions."""

import logging
from collections.abc import Mapping
from typing import Any

from fastbert.packing import PackedBatch
from fastbert.tokenizer import calls
from fastbert.tokenizer.encoding import Request
from fastbert.tokenizer.padding import pad
from fastbert.tokenizer.quick import quick_call
from fastbert.tokenizer.special import SpecialTokens
from fastbert.tokenizer.tensors import to_lists
from fastbert.tokenizer.vocabulary import Vocabulary, clean_up

logger = logging.getLogger(__name__)


class CallSurface(SpecialTokens):
    """The methods of WordPieceTokenizer that take texts or ids."""

    model_input_names: list[str]
    model_max_length: int
    clean_up_tokenization_spaces: bool
    split_special_tokens: bool
    threads: int | None
    _vocabulary: Vocabulary
    _warned: bool

    # Encoding

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        *,
        threads: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encodes a text or a batch, alone or in pairs: the arguments are those of transformers' tokenizers.

        Args:
            text: a string, a list of strings or of pairs; with is_split_into_words a list of words, or of such lists.
            text_pair: the second texts, shaped as ``text``.
            text_target, text_pair_target: texts whose ids come back as "labels".
            add_special_tokens: put the template's tokens around.
            padding: True or "longest", "max_length", or False.
            truncation: True or "longest_first", "only_first", "only_second", or False.
            max_length: tokens, special tokens included; the model's where it is needed and not given. Alone, it
                truncates.
            stride: tokens that an overflowing window shares with the one before.
            is_split_into_words: the texts are lists of words.
            pad_to_multiple_of: round padded lengths up.
            padding_side: "right" or "left"; the tokenizer's unless given.
            return_tensors: None for lists, "pt" or "np" for int64 tensors or arrays [rows, tokens], "packed" for a
                PackedBatch of all texts end to end, with positions and types, that goes into fastbert's models.
            return_token_type_ids, return_attention_mask: as model_input_names says unless given.
            return_overflowing_tokens: rows for what truncation took away, too.
            return_special_tokens_mask, return_offsets_mapping, return_length: more outputs.
            verbose: log once when a row is longer than the model takes.
            tokenizer_kwargs: arguments as a mapping, before those given by name.
            threads: the most to encode a batch with.
            kwargs: split_special_tokens, max_target_length; others are ignored, as transformers does.

        Returns:
            A BatchEncoding; with return_tensors="packed" a PackedBatch.

        Raises:
            ValueError: text is neither a string nor a list of them, or arguments contradict each other.
            TypeError: an item is no string, or no valid Unicode.
            IndexError: an empty batch, "packed" apart.
            OverflowError: a negative length.
            Exception: only_first or only_second asks for more than that text has; transformers raises no other class.
        """
        if (
            text is not None
            and text_target is None
            and type(stride) is int
            and stride == 0
            and is_split_into_words is False
            and pad_to_multiple_of is None
            and padding_side is None
            and return_overflowing_tokens is False
            and return_length is False
            and tokenizer_kwargs is None
            and not kwargs
        ):
            result = quick_call(
                self,
                text,
                text_pair,
                add_special_tokens,
                padding,
                truncation,
                max_length,
                return_tensors,
                return_token_type_ids,
                return_attention_mask,
                return_special_tokens_mask,
                return_offsets_mapping,
                verbose,
                threads,
            )
            if result is not None:
                return result
        if text is None and text_target is None:
            raise ValueError("You need to specify either `text` or `text_target`.")
        given: dict[str, Any] = {
            "add_special_tokens": add_special_tokens,
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "stride": stride,
            "is_split_into_words": is_split_into_words,
            "pad_to_multiple_of": pad_to_multiple_of,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
            "return_token_type_ids": return_token_type_ids,
            "return_attention_mask": return_attention_mask,
            "return_overflowing_tokens": return_overflowing_tokens,
            "return_special_tokens_mask": return_special_tokens_mask,
            "return_offsets_mapping": return_offsets_mapping,
            "return_length": return_length,
            "verbose": verbose,
            "threads": threads,
            **(tokenizer_kwargs or {}),
            **kwargs,
        }
        target_length = given.pop("max_target_length", None)
        result = None if text is None else self._encode(text, text_pair, **given)
        if text_target is None:
            return result
        if target_length is not None:
            # Whether to cut and pad was decided with max_length; the target's only replaces the number.
            decided = calls.resolve_lengths(self, given["padding"], given["truncation"], given["max_length"])
            given["padding"], given["truncation"] = decided.padding or False, decided.truncation or False
            given["max_length"] = target_length
        target = self._encode(text_target, text_pair_target, **given)
        if result is None:
            return target
        result["labels"] = target["input_ids"]
        return result

    def _encode(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: Any = None,
        stride: Any = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: Any = None,
        padding_side: Any = None,
        return_tensors: Any = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        threads: int | None = None,
        **_: Any,
    ) -> Any:
        lengths = calls.resolve_lengths(self, padding, truncation, max_length, pad_to_multiple_of, verbose)
        texts, pairs, batched = calls.resolve_texts(text, text_pair, is_split_into_words)
        overflow = bool(return_overflowing_tokens)
        options = calls.resolve_options(
            self,
            lengths,
            add_special_tokens=add_special_tokens,
            stride=stride,
            is_split_into_words=is_split_into_words,
            overflow=overflow,
            split_special_tokens=split_special_tokens,
        )
        tensors = calls.check_return_tensors(return_tensors)
        names = self.model_input_names
        types = "token_type_ids" in names if return_token_type_ids is None else return_token_type_ids
        mask = "attention_mask" in names if return_attention_mask is None else return_attention_mask
        vocabulary = self._vocabulary
        many = not isinstance(texts, str) and len(texts) >= calls.MANY_TEXTS
        used = calls.default_threads(self, many, threads)
        rows = vocabulary.encode(texts, pairs, options, bool(return_offsets_mapping), used)
        if lengths.max_length is None and verbose and rows.longest > self.model_max_length:
            self._warn_of_length(rows.longest)
        if tensors == "packed":
            calls.check_packed(
                {
                    "padding": lengths.padding is not None,
                    "return_overflowing_tokens": overflow,
                    "return_offsets_mapping": bool(return_offsets_mapping),
                    "return_special_tokens_mask": bool(return_special_tokens_mask),
                    "return_length": bool(return_length),
                }
            )
            return calls.packed_batch(rows, bool(types))
        if len(rows) == 0:
            raise IndexError("list index out of range: the batch holds no text")
        padding_to = calls.resolve_padding(self, lengths, rows.longest, pad_to_multiple_of, padding_side)
        wanted = (
            ("token_type_ids", types),
            ("attention_mask", mask),
            ("special_tokens_mask", return_special_tokens_mask),
            ("offset_mapping", return_offsets_mapping),
        )
        return calls.shape_outputs(
            rows,
            Request(vocabulary, texts, pairs, options, padding_to, rows if return_offsets_mapping else None),
            ["input_ids", *(name for name, asked in wanted if asked)],
            batched=batched,
            tensors=tensors,
            length=bool(return_length),
            samples=overflow,
        )

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        padding_side: str | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The ids alone; the arguments are those of a call."""
        if not kwargs and type(stride) is int and stride == 0 and padding_side is None:
            quick = quick_call(
                self,
                text,
                text_pair,
                add_special_tokens,
                padding,
                truncation,
                max_length,
                return_tensors,
                False,
                False,
                False,
                False,
                True,
                None,
            )
            if quick is not None:
                return quick["input_ids"]
        encoded = self._encode(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            padding_side=padding_side,
            return_tensors=return_tensors,
            **kwargs,
        )
        return encoded if isinstance(encoded, PackedBatch) else encoded["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens as strings, of the whole text: padding and truncation are ignored, as transformers does."""
        for name in ("padding", "truncation", "max_length"):
            kwargs.pop(name, None)
        if type(text) is str and not kwargs:
            quick = quick_call(
                self, text, pair, add_special_tokens, False, None, None, None, False, False, False, False, True, None
            )
            if quick is not None:
                return quick._details.plain_tokens(quick["input_ids"]) or quick.tokens()
        return self._encode(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    def encode_utf8(
        self,
        data: Any,
        offsets: Any = None,
        *,
        add_special_tokens: bool = True,
        truncation: Any = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        threads: int | None = None,
    ) -> Any:
        """Encodes UTF-8 without a Python object for each text.

        Args:
            data: bytes, bytearray or memoryview: one text, or with ``offsets`` several; a list of those; an Arrow array of
                strings, such as pyarrow's; a NumPy array of strings.
            offsets: int32 or int64 [texts + 1], ascending: where each text starts and the last ends, in bytes.
            add_special_tokens, truncation, max_length, threads: as in a call.
            return_tensors: None for the extension's Encodings, whose packed(), padded(), lengths() and cu_seqlens() give
                NumPy arrays of what is asked; "packed" for a PackedBatch.

        Raises:
            ValueError: a text is no valid UTF-8 (the message says which and where), or is missing; offsets out of range.
            TypeError: data is nothing of the above.
        """
        if return_tensors not in (None, "packed"):
            raise ValueError(f'return_tensors is {return_tensors!r}; encode_utf8 gives None or "packed"')
        lengths = calls.resolve_lengths(self, False, truncation, max_length)
        options = calls.resolve_options(
            self,
            lengths,
            add_special_tokens=add_special_tokens,
            stride=0,
            is_split_into_words=False,
            overflow=False,
            split_special_tokens=None,
        )
        alone = offsets is None and isinstance(data, bytes | bytearray | memoryview)
        used = calls.default_threads(self, not alone, threads)
        rows = self._vocabulary.encode_utf8(data, offsets, options, used)
        return rows if return_tensors is None else calls.packed_batch(rows, "token_type_ids" in self.model_input_names)

    @property
    def template_tokens(self) -> int:
        """How many tokens the template puts around a single text."""
        return self._vocabulary.template_tokens

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        verbose: bool = True,
    ) -> Any:
        """Pads what is encoded already: one encoding, a mapping of lists, or a list of mappings.

        Labels and other entries stay as they are. See transformers' method of the same name.
        """
        return pad(
            self,
            encoded_inputs,
            padding,
            max_length,
            pad_to_multiple_of,
            padding_side,
            return_attention_mask,
            return_tensors,
            verbose,
        )

    def _warn_of_length(self, length: int) -> None:
        if not self._warned and self.model_max_length != 0:
            logger.warning(
                "Token indices sequence length is longer than the specified maximum sequence length for this model "
                "(%d > %d). Running this sequence through the model will result in indexing errors",
                length,
                self.model_max_length,
            )
            self._warned = True

    # Decoding

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> Any:
        """The text of ids, or a list of texts for a list of lists. Ids that there are not are left out."""
        token_ids = to_lists(token_ids)
        if isinstance(token_ids, list | tuple) and token_ids and isinstance(token_ids[0], list | tuple):
            return [self._decode_row(ids, skip_special_tokens, clean_up_tokenization_spaces) for ids in token_ids]
        return self._decode_row(token_ids, skip_special_tokens, clean_up_tokenization_spaces)

    def _decode_row(self, token_ids: Any, skip_special_tokens: bool, clean_up_tokenization_spaces: bool | None) -> str:
        if type(skip_special_tokens) is not bool:
            raise TypeError(f"skip_special_tokens is {skip_special_tokens!r:.60}; expected True or False")
        if isinstance(token_ids, Mapping):
            token_ids = token_ids["input_ids"]
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        text = self._vocabulary.decode(token_ids, skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return clean_up(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> list[str]:
        """decode() that always gives a list."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def clean_up_tokenization(self, text: str) -> str:
        """The text without spaces before punctuation."""
        return clean_up(text)
