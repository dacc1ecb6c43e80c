"""Files of Hugging Face folders, local or on the hub: finding a folder, reading JSON, replacing a file."""

import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_folder(
    path_or_hub_id: str | os.PathLike[str], revision: str | None, patterns: Sequence[str], expected: str
) -> Path:
    """A folder here, or a hub id's files that match ``patterns``, downloaded or from the hub's cache.

    The hub's own variables hold (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN). ``expected`` names the files in messages.

    Raises:
        FileNotFoundError: neither a folder here nor on the hub.
        NotADirectoryError: a file.
        ImportError: a hub id without huggingface_hub.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; expected the folder that holds {expected}")
    name = os.fspath(path_or_hub_id)
    if isinstance(path_or_hub_id, os.PathLike) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name} does not exist; expected a folder with {expected}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{name!r} is not a folder here, and reading it from the Hugging Face hub needs huggingface_hub: "
            "pip install 'fastbert-kernels[transformers]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name!r} is not a folder here, and the Hugging Face hub did not give it: {reason}"
        ) from error


def read_json(path: Path, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Raises FileNotFoundError or, where the content is no JSON, ValueError with the path."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_pairs_hook)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON (truncated?): {error}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """What ``write`` writes appears at ``path`` whole or not at all, replacing what was there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors makes files that only their owner can read
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Raises NotADirectoryError where ``folder`` is a file."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder to save to")
    folder.mkdir(parents=True, exist_ok=True)
