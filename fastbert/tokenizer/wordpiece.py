"""WordPieceTokenizer: BERT's tokenizer in C++ behind the arguments, results and exceptions of transformers' BertTokenizer."""

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbert.hub import make_folder, replace_file
from fastbert.tokenizer import calls, files
from fastbert.tokenizer.added import AddedToken, AddedVocabulary
from fastbert.tokenizer.blueprint import Blueprint, bert_template
from fastbert.tokenizer.surface import CallSurface
from fastbert.tokenizer.vocabulary import Vocabulary

__all__ = ["WordPieceTokenizer"]

_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "subfolder")


class WordPieceTokenizer(CallSurface):
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
        self.do_lower_case = bool(normalizer.get("lowercase"))
        self.tokenize_chinese_chars = bool(normalizer.get("handle_chinese_chars"))
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
            _write(folder / f"{prefix}{name}", text)
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
        _write(path, text)
        return (str(path),)

    def _saved_config(self) -> dict[str, Any]:
        config = {
            key: value
            for key, value in self.init_kwargs.items()
            if _is_json(value) and not key.endswith("_file")  # old configurations hold their authors' paths
        }
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


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float | bool)
