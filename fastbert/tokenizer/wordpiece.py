"""WordPieceTokenizer: BERT's tokenizer in C++ behind the arguments, results and exceptions of transformers' BertTokenizer."""

import copy
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.hub import make_folder, replace_file
from fastbert.packing import PackedBatch
from fastbert.tokenizer import calls, files
from fastbert.tokenizer.added import AddedToken, AddedVocabulary
from fastbert.tokenizer.blueprint import Blueprint, bert_template
from fastbert.tokenizer.encoding import BatchEncoding, Request
from fastbert.tokenizer.padding import pad
from fastbert.tokenizer.special import SpecialTokens
from fastbert.tokenizer.tensors import to_lists
from fastbert.tokenizer.vocabulary import Vocabulary, clean_up

__all__ = ["WordPieceTokenizer"]

logger = logging.getLogger(__name__)

_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "subfolder")
_NO_OPTIONS: dict[str, Any] = {}
_new_encoding = BatchEncoding.__new__
_new_request = tuple.__new__


class WordPieceTokenizer(SpecialTokens):
    """A WordPiece tokenizer: ids, masks, offsets and words exactly as transformers' BertTokenizer gives them.

    Several threads may share one; it copies, pickles and forks. Ids and masks come from C++ whole; words and characters
    are computed when a result is asked for them.

    Attributes:
        model_max_length: the limit where a call asks for truncation or padding without one; 10**30 means none.
        padding_side, truncation_side: "right" or "left".
        model_input_names: which of token_type_ids and attention_mask a call returns unless told.
        clean_up_tokenization_spaces: whether decode() cleans the whole text up once more.
        split_special_tokens: whether special tokens in a text are split as any other.
        threads: the most that a batch is encoded with; None: as many as torch uses.
    """

    is_fast = True
    vocab_files_names = {"vocab_file": files.VOCABULARY, "tokenizer_file": files.TOKENIZER}  # noqa: RUF012
    pad_token_type_id = 0

    def __init__(
        self,
        vocab: str | os.PathLike[str] | Mapping[str, int] | Sequence[str] | None = None,
        do_lower_case: bool = True,
        unk_token: Any = "[UNK]",
        sep_token: Any = "[SEP]",
        pad_token: Any = "[PAD]",
        cls_token: Any = "[CLS]",
        mask_token: Any = "[MASK]",
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """BERT's tokenizer over a vocabulary.

        Args:
            vocab: a vocab.txt, a dict of tokens and ids, a list of tokens, or None for the special tokens alone.
            do_lower_case: lowercase texts.
            unk_token, sep_token, pad_token, cls_token, mask_token: strings or AddedTokens; the first must be in the
                vocabulary, the others are added to it.
            tokenize_chinese_chars: make each CJK character a word.
            strip_accents: drop accents; None: where texts are lowercased.
            kwargs: model_max_length, padding_side, truncation_side, model_input_names, extra_special_tokens,
                clean_up_tokenization_spaces, split_special_tokens, bos_token, eos_token, name_or_path, and
                added_tokens, a list of AddedTokens. Others are kept for saving.

        Raises:
            FileNotFoundError: vocab names a file that does not exist.
            TypeError, ValueError: a damaged vocabulary, or arguments out of range; the message names the entry.
            ImportError: fastbert's extension is missing.
        """
        named = {
            "unk_token": unk_token,
            "sep_token": sep_token,
            "pad_token": pad_token,
            "cls_token": cls_token,
            "mask_token": mask_token,
        }
        options = {"do_lower_case": do_lower_case, "tokenize_chinese_chars": tokenize_chinese_chars}
        for name, value in (*options.items(), ("strip_accents", strip_accents)):
            if type(value) is not bool and (name != "strip_accents" or value is not None):
                raise TypeError(f"{name} is {value!r:.60}; expected True or False")
        if unk_token is None:
            raise TypeError("unk_token is None; WordPiece needs one for words that the vocabulary does not have")
        if vocab is None:
            order = (pad_token, unk_token, cls_token, sep_token, mask_token)
            vocab = {str(token): i for i, token in enumerate(dict.fromkeys(map(str, order)))}
        blueprint = Blueprint(
            files.read_vocabulary_argument(vocab, str(unk_token)),
            unk_token=str(unk_token),
            normalizer={
                "clean_text": True,
                "handle_chinese_chars": tokenize_chinese_chars,
                "strip_accents": strip_accents,
                "lowercase": do_lower_case,
            },
        )
        self.do_lower_case = do_lower_case
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.strip_accents = strip_accents
        added = self._configure(blueprint, AddedVocabulary(), {**named, **kwargs})
        self.init_kwargs.update(options, strip_accents=strip_accents)
        cls, sep = (
            (str(token), added.ids.get(str(token), default)) for token, default in ((cls_token, 2), (sep_token, 3))
        )
        blueprint.single, blueprint.pair = bert_template(cls, sep)
        self._vocabulary = Vocabulary(blueprint, added)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
    ) -> "WordPieceTokenizer":
        """A tokenizer from a folder, a hub id, a tokenizer.json or a vocab.txt.

        A folder is read as transformers' AutoTokenizer reads it: where its configuration names a tokenizer of BERT's
        family, or its model is of one, the case, the accents and the special tokens come from tokenizer_config.json
        and only the vocabulary and the added tokens from tokenizer.json; elsewhere, and for a path to the file itself, a
        tokenizer.json means all that it says. Truncation and padding stored there set the sides alone, since a call
        asks for them itself.

        Args:
            pretrained_model_name_or_path: see above.
            revision: of a hub id.
            kwargs: arguments of the constructor, before what the files say.

        Raises:
            FileNotFoundError: nothing there, or no tokenizer in the folder.
            ValueError: a damaged file, or a component that is not implemented; the message names file and entry.
            ImportError: a hub id without huggingface_hub; fastbert's extension is missing.
        """
        for name in _HUB_OPTIONS:
            if kwargs.get(name):
                raise TypeError(
                    f"{name} is not taken; the hub's own variables hold (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN)"
                )
        blueprint, arguments = files.read_pretrained(pretrained_model_name_or_path, revision, kwargs)
        return cls(**arguments) if blueprint is None else cls._from_blueprint(blueprint, arguments)

    @classmethod
    def _from_blueprint(cls, blueprint: Blueprint, arguments: Mapping[str, Any]) -> "WordPieceTokenizer":
        """A tokenizer that does what a tokenizer.json says."""
        self = cls.__new__(cls)
        added = AddedVocabulary()
        added.add([token for _, token in blueprint.added_tokens], blueprint.vocab)
        normalizer = blueprint.normalizer or {}
        self.do_lower_case = normalizer.get("lowercase", False)
        self.tokenize_chinese_chars = normalizer.get("handle_chinese_chars", False)
        self.strip_accents = normalizer.get("strip_accents")
        added = self._configure(blueprint, added, files.with_sides(blueprint, arguments))
        self._vocabulary = Vocabulary(blueprint, added)
        return self

    def lowercased(self) -> "WordPieceTokenizer":
        """A copy that lowercases texts, and treats their accents as this one does."""
        blueprint = self._vocabulary.blueprint
        options = blueprint.core_arguments()
        normalizer = {name: options[name] for name in ("clean_text", "handle_chinese_chars", "strip_accents")}
        other = copy.deepcopy(self)
        other.do_lower_case = True
        other.strip_accents = normalizer["strip_accents"]
        blueprint = replace(blueprint, normalizer={**normalizer, "lowercase": True})
        other._vocabulary = Vocabulary(blueprint, self._vocabulary.added)
        return other

    def _configure(self, blueprint: Blueprint, added: AddedVocabulary, kwargs: Mapping[str, Any]) -> AddedVocabulary:
        """Takes attributes and special tokens from arguments, and returns the added tokens with all of them."""
        for name in kwargs:
            if callable(getattr(type(self), name, None)):
                raise AttributeError(f"{name} conflicts with the method {name} in {type(self).__name__}")
        left = dict(kwargs)
        more = [AddedToken.of(token) for token in left.pop("added_tokens", [])]
        self._take_special_tokens(left)
        self.name_or_path = left.pop("name_or_path", "")
        self.verbose = left.pop("verbose", False)
        limit = left.pop("model_max_length", left.pop("max_len", None))
        self.model_max_length = calls.VERY_LARGE_INTEGER if limit is None else limit
        for name in ("padding_side", "truncation_side"):
            side = left.pop(name, "right")
            if side not in ("right", "left"):
                raise ValueError(
                    f"{name.split('_')[0].capitalize()} side should be selected between 'right' and 'left', "
                    f"current value: {side}"
                )
            setattr(self, name, side)
        self.model_input_names = list(left.pop("model_input_names", ("input_ids", "token_type_ids", "attention_mask")))
        self.clean_up_tokenization_spaces = left.pop("clean_up_tokenization_spaces", False)
        self.split_special_tokens = left.pop("split_special_tokens", False)
        self.threads = left.pop("threads", None)
        self.init_kwargs = left
        self._warned = False
        added.add(self._tokens_to_add(more, added), blueprint.vocab)
        return added

    # The vocabulary

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, those added to it not counted."""
        return len(self._vocabulary.model)

    def __len__(self) -> int:
        """Tokens, added ones included."""
        return len(self._vocabulary)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        return {**self._vocabulary.model, **self._vocabulary.added.ids}

    vocab = property(get_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(sorted(self._vocabulary.added.by_id.items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added_tokens_encoder

    def _add_tokens(self, new_tokens: Iterable[Any], special_tokens: bool = False) -> int:
        if not isinstance(new_tokens, list | tuple):
            raise TypeError("Input must be a List[Union[str, AddedToken]]")
        tokens = [AddedToken.of(token, special=special_tokens) for token in new_tokens]
        self._vocabulary, count = self._vocabulary.with_added(tokens)
        return count

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or a list of ids; the unknown token's for what the vocabulary does not have."""
        if isinstance(tokens, str):
            return self._convert_token_to_id(tokens)
        return [self._convert_token_to_id(token) for token in tokens]

    def _convert_token_to_id(self, token: str) -> int | None:
        found = self._vocabulary.token_to_id(token)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or a list of them; None for an id that there is not."""
        vocabulary = self._vocabulary
        if isinstance(ids, int):
            return vocabulary.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [vocabulary.id_to_token(i) for i in map(int, ids) if i not in skipped]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._vocabulary.join(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens the template puts around a text or a pair."""
        if type(pair) is not bool:
            raise TypeError(f"pair is {pair!r:.60}; expected True or False")
        blueprint = self._vocabulary.blueprint
        return sum(len(piece.ids or ()) for piece in (blueprint.pair if pair else blueprint.single))

    @property
    def max_len_single_sentence(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(False)

    @property
    def max_len_sentences_pair(self) -> int:
        return self.model_max_length - self.num_special_tokens_to_add(True)

    @property
    def continuing_subword_prefix(self) -> str:
        """What marks a piece that does not start a word, "##" in BERT's vocabularies."""
        return self._vocabulary.blueprint.continuing_subword_prefix

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
            type(text) is str
            and text_pair is None
            and text_target is None
            and add_special_tokens is True
            and padding is False
            and return_tensors is None
            and max_length is None
            and (truncation is None or truncation is False)
            and is_split_into_words is False
            and return_token_type_ids is None
            and return_attention_mask is None
            and return_overflowing_tokens is False
            and return_special_tokens_mask is False
            and return_offsets_mapping is False
            and return_length is False
            and tokenizer_kwargs is None
            and not kwargs
            and not self.split_special_tokens
            and "token_type_ids" in self.model_input_names
            and "attention_mask" in self.model_input_names
        ):
            # One text and nothing else asked: the commonest call, whose cost would be its arguments.
            vocabulary = self._vocabulary
            outputs = vocabulary.encode_dict(text, True, -1)
            if verbose and len(outputs["input_ids"]) > self.model_max_length:
                self._warn_of_length(len(outputs["input_ids"]))
            result = _new_encoding(BatchEncoding)
            result.update(outputs)
            result._details = _new_request(Request, (vocabulary, text, None, _NO_OPTIONS, None))
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
        rows = vocabulary.encode(
            texts, pairs, options, bool(return_offsets_mapping), calls.default_threads(self, texts, threads)
        )
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
            Request(vocabulary, texts, pairs, options, padding_to),
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
        """The tokens as strings."""
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
        used = 1 if alone else calls.default_threads(self, (), threads) if threads is None else threads
        rows = self._vocabulary.encode_utf8(data, offsets, options, used)
        return rows if return_tensors is None else calls.packed_batch(rows, "token_type_ids" in self.model_input_names)

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
        if isinstance(token_ids, list) and token_ids and isinstance(token_ids[0], list):
            return [self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces) for ids in token_ids]
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

    # Saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Writes tokenizer.json and tokenizer_config.json, which transformers and from_pretrained() read back equal.

        With legacy_format a vocab.txt as well. Returns the files' paths.

        Raises:
            NotADirectoryError: save_directory is a file.
            ValueError: a vocab.txt is asked for and the ids of the vocabulary have gaps.
        """
        folder = Path(save_directory)
        make_folder(folder)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocabulary = self._vocabulary
        content = vocabulary.blueprint.to_json(sorted(vocabulary.added.by_id.items()))
        contents = {
            files.CONFIG: json.dumps(self._saved_config(), indent=2, sort_keys=True, ensure_ascii=False) + "\n",
            files.TOKENIZER: json.dumps(content, indent=2, ensure_ascii=False),
        }
        written = []
        for name, text in contents.items():
            replace_file(folder / f"{prefix}{name}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
            written.append(str(folder / f"{prefix}{name}"))
        return (*written, *(self.save_vocabulary(folder, filename_prefix) if legacy_format else ()))

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Writes vocab.txt, a token a line, added tokens behind. Raises ValueError where ids have gaps."""
        tokens = sorted(self.get_vocab().items(), key=lambda item: item[1])
        if [i for _, i in tokens] != list(range(len(tokens))):
            raise ValueError(f"the ids have gaps, which a {files.VOCABULARY} cannot have; save {files.TOKENIZER}")
        text = "".join(f"{token}\n" for token, _ in tokens)
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{files.VOCABULARY}"
        replace_file(path, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
        return (str(path),)

    def _saved_config(self) -> dict[str, Any]:
        config = {key: value for key, value in self.init_kwargs.items() if _is_json(value)}
        for name in ("model_max_length", "model_input_names", "padding_side", "truncation_side"):
            config[name] = getattr(self, name)
        for name in ("clean_up_tokenization_spaces", "split_special_tokens"):
            config[name] = getattr(self, name)
        config.update(self.special_tokens_map)
        if self.extra_special_tokens:
            config["extra_special_tokens"] = self.extra_special_tokens
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self._is_bert():
            normalizer = self._vocabulary.blueprint.normalizer or {}
            config["tokenizer_class"] = "BertTokenizer"
            config["do_lower_case"] = normalizer["lowercase"]
            config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
            config["strip_accents"] = normalizer["strip_accents"]
        return config

    def _is_bert(self) -> bool:
        """Whether a BertTokenizer made of the vocabulary and the configuration alone would be equal."""
        blueprint = self._vocabulary.blueprint
        if self.cls_token is None or self.sep_token is None or self.unk_token != blueprint.unk_token:
            return False
        template = bert_template((self.cls_token, self.cls_token_id), (self.sep_token, self.sep_token_id))
        return (
            (blueprint.continuing_subword_prefix, blueprint.max_input_chars_per_word) == ("##", 100)
            and blueprint.decoder == ("##", True)
            and blueprint.normalizer is not None
            and blueprint.normalizer["clean_text"] is True
            and (blueprint.single, blueprint.pair) == template
        )

    def __repr__(self) -> str:
        added = "".join(f"\n\t{i}: {token!r}," for i, token in self.added_tokens_decoder.items())
        return (
            f"{type(self).__name__}(name_or_path='{self.name_or_path}', vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side='{self.padding_side}', "
            f"truncation_side='{self.truncation_side}', special_tokens={self.special_tokens_map}, "
            f"added_tokens_decoder={{{added}\n}})"
        )


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float | bool)
