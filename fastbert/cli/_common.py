"""What the commands share: exit statuses, errors of one line, checks of what the user gave, a bar of progress."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

OK, WRONG, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_NEEDS_RICH = "it draws its tables with rich, which is not installed: pip install 'fastbert-kernels[bench]'"


class BadInput(Exception):
    """What the user asked for cannot be done; the message is one line."""


class Parser(argparse.ArgumentParser):
    """argparse prints the usage before an error; one line is enough."""

    def error(self, message: str) -> Any:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few, at least 1")
    return value


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """--device and --threads."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: cuda where there is a device, else cpu)",
    )
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: torch's choice)")


def require_rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError:
        raise BadInput(_NEEDS_RICH) from None


def check_output(option: str, path: str) -> None:
    from fastbert.bench.results import check_writable

    if not path:
        raise BadInput(f"{option} needs the name of a file")
    try:
        check_writable(path)
    except OSError as error:
        raise BadInput(str(error)) from None


def check_distinct(inputs: Mapping[str, str | None], outputs: Mapping[str, str | None]) -> None:
    """Option → path: no output may be an input or another output."""
    seen = {Path(path).resolve(): option for option, path in inputs.items() if path is not None}
    for option, path in outputs.items():
        if path is not None:
            other = seen.setdefault(Path(path).resolve(), option)
            if other != option:
                raise BadInput(f"{other} and {option} are both {path}: one would overwrite the other")


def device_of(name: str) -> str:
    """The device that --device means. Raises BadInput where it is not here."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"unknown device '{name}': choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BadInput(f"no device '{name}' here: torch sees {torch.cuda.device_count()} CUDA devices")
    return name


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function it gives is called before each step with what comes next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        done = -1

        def step(description: str) -> None:
            nonlocal done
            done += 1
            progress.update(task, completed=done, description=description)

        yield step
