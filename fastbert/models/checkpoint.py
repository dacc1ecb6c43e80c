"""Hugging Face folders: finding one, reading its configuration and its tensors, writing one.

Nothing here knows an architecture, and nothing runs code from a checkpoint.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastbert import hub
from fastbert.hub import make_folder, read_json, replace_file

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"

# What a model and its tokenizer are read from. The old format is fetched only where there is no other.
_HUB_PATTERNS = (
    "*.json",
    "*/config.json",
    "vocab.txt",
    "model*.safetensors",
)


def find_folder(path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a checkpoint: a path here, or a Hugging Face hub id. The errors are hub.find_folder's."""
    expected = f"{CONFIG} and {SAFETENSORS}"
    folder = hub.find_folder(path_or_hub_id, revision, _HUB_PATTERNS, expected)
    # Where the hub gave no weights of the new format; a local folder comes back as it is.
    if not Path(path_or_hub_id).expanduser().is_dir() and not any(folder.glob("model*.safetensors")):
        folder = hub.find_folder(path_or_hub_id, revision, (*_HUB_PATTERNS, "pytorch_model*.bin"), expected)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; expected a Hugging Face checkpoint folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}; expected an object")
    return config


class Tensors(Protocol):
    """The tensors of a checkpoint: their names now, each one's content when asked."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor: ...


class _Safetensors:
    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, tuple[Path, Any]] = {}
        for path in files:
            with _explained(path):
                opened = safe_open(path, framework="pt")
                for name in opened.keys():  # noqa: SIM118
                    self._file_of[name] = path, opened

    def names(self) -> list[str]:
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        path, opened = self._file_of[name]
        with _explained(path):
            return opened.get_tensor(name)


class _Pickled:
    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            with _explained(path):
                content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise ValueError(f"{path} holds a {type(content).__name__}; expected a state_dict")
            for name, value in content.items():
                if not isinstance(name, str) or not isinstance(value, Tensor):
                    raise ValueError(
                        f"{path} holds a {type(value).__name__} under {name!r}; expected a state_dict, names and tensors"
                    )
                if value.layout != torch.strided or value.is_meta:
                    form = "on the meta device" if value.is_meta else value.layout
                    raise ValueError(f"{path}: {name} is {form}; expected a dense tensor")
            self._tensors.update(content)

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def open_tensors(folder: Path) -> Tensors:
    """The tensors of a checkpoint: safetensors, whole or in shards, or the old format, whose code is never run.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
        ValueError: a file is truncated or damaged, or a pickle holds more than tensors.
    """
    kinds: tuple[tuple[str, Callable[[list[Path]], Tensors]], ...] = ((SAFETENSORS, _Safetensors), (PICKLED, _Pickled))
    for name, kind in kinds:
        if (folder / name).is_file():
            return kind([folder / name])
        index = folder / f"{name}.index.json"
        if index.is_file():
            return kind(_shards(index))
    raise FileNotFoundError(
        f"{folder} has no weights; expected {SAFETENSORS}, {SAFETENSORS}.index.json with its shards, or {PICKLED}"
    )


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f'{index} has no "weight_map" from tensors to files')
    shards = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}; expected a file beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} does not exist, but {index.name} names it as a shard")
        shards.append(index.parent / name)
    return shards


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What the readers of a file raise, as a ValueError with its path."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower():
            raise ValueError(f"{path} is truncated or not a file of torch.save: {error}") from error
        raise ValueError(
            f"{path} is a pickle that holds more than tensors, and loading it could run code; it is refused. "
            f"Expected {SAFETENSORS}: convert the checkpoint where you trust it."
        ) from error
    except (FileNotFoundError, PermissionError):
        raise
    # torch.load seeks before the start of a truncated file, and its unpickler trusts what it reads.
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or not a file of torch.save: {error}") from error


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors. Each file appears whole or not at all, replacing the one before.

    Raises NotADirectoryError where ``folder`` is a file.
    """
    make_folder(folder)
    # safetensors refuses tensors that share memory.
    separate = {name: tensor.detach().clone().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    replace_file(folder / SAFETENSORS, lambda path: save_file(separate, path, metadata={"format": "pt"}))
    replace_file(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
