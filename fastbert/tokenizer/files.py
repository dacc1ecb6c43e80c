"""Which files a tokenizer is read from, and how they combine: what transformers' AutoTokenizer does for BERT's family.

In a folder whose configuration names a tokenizer of BERT's family, or whose model is one, transformers 5 takes the
vocabulary and the added tokens from tokenizer.json or vocab.txt, and everything else from tokenizer_config.json. Elsewhere
a tokenizer.json means what it says.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.hub import find_folder, read_json
from fastbert.tokenizer.added import FLAGS, AddedToken
from fastbert.tokenizer.blueprint import (
    Blueprint,
    check_unknown_token,
    check_vocabulary,
    read_tokenizer_json,
    read_vocabulary,
)

TOKENIZER = "tokenizer.json"
VOCABULARY = "vocab.txt"
CONFIG = "tokenizer_config.json"
SPECIAL_ATTRIBUTES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# BERT's own, and the attribute that each stands for.
BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
# Classes of transformers 5.23 that are its BertTokenizer under another name, and the model types that use it.
_BERT_CLASSES = (
    "BertTokenizer",
    "ConvBertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
)
# fmt: off
_BERT_MODELS = (
    "align", "bark", "bert", "blip", "bros", "chinese_clip", "convbert", "distilbert", "electra", "ernie", "flava", "git",
    "grounding-dino", "layoutlm", "lxmert", "megatron-bert", "mm-grounding-dino", "mobilebert", "nezha", "nomic_bert",
    "qdqbert", "realm", "retribert", "squeezebert", "tvp", "vilt", "visual_bert",
)
# fmt: on
_PATTERNS = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "config.json", VOCABULARY)


def read_pretrained(
    path_or_hub_id: str | os.PathLike[str], revision: str | None, overrides: Mapping[str, Any]
) -> tuple[Blueprint | None, dict[str, Any]]:
    """(blueprint, arguments) of a tokenizer: a folder, a hub id, a tokenizer.json or a vocab.txt.

    Without a blueprint the arguments are those of WordPieceTokenizer itself.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file():
        arguments = {"name_or_path": os.fspath(path_or_hub_id), **overrides}
        if path.suffix == ".json":
            blueprint = read_tokenizer_json(path)
            return blueprint, _named_tokens(blueprint, arguments)
        return None, {"vocab": path, **arguments}
    folder = find_folder(path_or_hub_id, revision, _PATTERNS, f"{TOKENIZER}, or {VOCABULARY} and perhaps {CONFIG}")
    return _read_folder(folder, {"name_or_path": os.fspath(path_or_hub_id), **overrides})


def read_vocabulary_argument(vocab: Any, unk_token: str) -> dict[str, int]:
    """The ``vocab`` argument: a vocab.txt, a dict, a list of tokens, or None for the special tokens alone."""
    if isinstance(vocab, str | os.PathLike):
        result = read_vocabulary(Path(vocab).expanduser())
        check_unknown_token(result, unk_token, str(vocab))
        return result
    if isinstance(vocab, list | tuple):
        if len(set(vocab)) != len(vocab):
            raise ValueError("vocab has a token twice; expected each once, its place being its id")
        vocab = {token: i for i, token in enumerate(vocab)}
    result = check_vocabulary(vocab, "vocab")
    check_unknown_token(result, unk_token, "vocab")
    return result


def _read_folder(folder: Path, overrides: Mapping[str, Any]) -> tuple[Blueprint | None, dict[str, Any]]:
    config = _read_object(folder / CONFIG)
    model = _read_object(folder / "config.json")
    declared = config.pop("tokenizer_class", None) or model.get("tokenizer_class")
    if declared is not None and not isinstance(declared, str):
        raise ValueError(f"{folder / CONFIG}: tokenizer_class is {declared!r:.60}; expected a string")
    has_json, has_vocabulary = (folder / TOKENIZER).is_file(), (folder / VOCABULARY).is_file()
    if not has_json and not has_vocabulary:
        raise FileNotFoundError(f"{folder} has neither a {TOKENIZER} nor a {VOCABULARY}")
    if declared is not None:
        of_bert = declared.removesuffix("Fast") in _BERT_CLASSES
        if not of_bert and not has_json:
            raise ValueError(f"{folder / CONFIG}: tokenizer_class is {declared!r}; expected one of BERT's family")
    else:
        of_bert = model.get("model_type") in _BERT_MODELS or not has_json
    for key in ("init_inputs", "auto_map", "chat_template", "add_bos_token", "add_eos_token"):
        config.pop(key, None)
    arguments, added = _with_token_files(folder, config, overrides)
    if declared is not None and (not of_bert or declared.startswith("DistilBert")):
        arguments.setdefault("model_input_names", ["input_ids", "attention_mask"])  # as these classes have it
    if has_json:
        blueprint = read_tokenizer_json(folder / TOKENIZER)
        if not of_bert:
            named = arguments if (folder / CONFIG).is_file() else _named_tokens(blueprint, arguments)
            return blueprint, {**named, "added_tokens": _in_order(added)}
        arguments = {"vocab": blueprint.vocab, **with_sides(blueprint, arguments, pads=False)}
        if "added_tokens_decoder" not in config:
            added += blueprint.added_tokens
    else:
        arguments.setdefault("vocab", folder / VOCABULARY)
    return None, {**arguments, "added_tokens": _in_order(added)}


def _in_order(added: list[tuple[int, AddedToken]]) -> list[AddedToken]:
    return [token for _, token in sorted(dict(added).items())]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def _with_token_files(
    folder: Path, config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[int, AddedToken]]]:
    """The constructor's arguments and the added tokens by id: from tokenizer_config.json and, in old folders, the two
    files of special tokens."""
    source = folder / CONFIG
    arguments = {**config, **overrides}
    decoder = arguments.pop("added_tokens_decoder", None)
    added = []
    if decoder is not None:
        if not isinstance(decoder, dict) or not all(str(i).isdecimal() for i in decoder):
            raise ValueError(f"{source}: added_tokens_decoder is {decoder!r:.60}; expected an object of ids and tokens")
        added = [(int(i), _token(entry, f"{source}: added_tokens_decoder.{i}")) for i, entry in decoder.items()]
    else:
        for key, value in _read_object(folder / "special_tokens_map.json").items():
            if not overrides.get(key):
                arguments[key] = value
        special = {str(_text(arguments[key])) for key in SPECIAL_ATTRIBUTES if arguments.get(key)}
        special |= {str(_text(token)) for token in _extra(arguments)}
        for token, i in _read_object(folder / "added_tokens.json").items():
            if type(i) is not int:
                raise ValueError(f"{folder / 'added_tokens.json'}: {token!r:.60} is {i!r:.60}; expected an id")
            added.append((i, AddedToken(token, special=token in special)))
    for key, value in list(arguments.items()):
        if key in SPECIAL_ATTRIBUTES and isinstance(value, dict):
            arguments[key] = _token(value, f"{source}: {key}", special=True)
        elif key in ("extra_special_tokens", "additional_special_tokens") and isinstance(value, list):
            arguments[key] = [
                _token(entry, f"{source}: {key}", special=True) if isinstance(entry, dict) else entry for entry in value
            ]
    return arguments, added


def _extra(arguments: Mapping[str, Any]) -> list[Any]:
    value = arguments.get("extra_special_tokens") or arguments.get("additional_special_tokens") or []
    return list(value.values() if isinstance(value, dict) else value)


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _token(entry: Any, where: str, special: bool = False) -> AddedToken:
    if isinstance(entry, AddedToken):
        return entry
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise ValueError(f'{where} is {entry!r:.60}; expected an object with "content"')
    flags = {name: entry[name] for name in FLAGS if name in entry}
    if not all(type(value) is bool for value in flags.values()):
        raise ValueError(f"{where} has {flags}; expected true or false")
    return AddedToken(entry["content"], **{**flags, **({"special": True} if special else {})})


def with_sides(blueprint: Blueprint, arguments: Mapping[str, Any], *, pads: bool = True) -> dict[str, Any]:
    """What transformers takes from the truncation and padding of a tokenizer.json: the sides and, with ``pads``,
    what pads."""
    taken: dict[str, Any] = {}
    for key, content in (("truncation_side", blueprint.truncation), ("padding_side", blueprint.padding)):
        if content is not None:
            taken[key] = content.get("direction", "Right").lower()
    if pads and blueprint.padding is not None and blueprint.padding.get("pad_token"):
        taken["pad_token"] = blueprint.padding["pad_token"]
    return {**taken, **arguments}


def _named_tokens(blueprint: Blueprint, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json by itself does not say which token pads. BERT's names stand for themselves where it has them."""
    special = {token.content for _, token in blueprint.added_tokens if token.special}
    named = {key: token for key, token in BERT_TOKENS.items() if token in special}
    named["unk_token"] = blueprint.unk_token
    return {**named, **arguments}
