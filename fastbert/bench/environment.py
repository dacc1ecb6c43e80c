"""Where a result comes from: device, versions, commit, date, command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "safetensors",
    "onnxruntime",
    "openvino",
    "ctranslate2",
    "nanotoken",
)


def package_version(name: str) -> str | None:
    """The installed version, without importing the package; None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fastbert_version() -> str:
    import fastbert

    return fastbert.__version__


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def extension() -> tuple[Any, str | None]:
    """(fastbert._C, None), or (None, why it does not load)."""
    try:
        import fastbert._C as module
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    return module, None


def isa() -> str | None:
    """The instruction set whose kernels the extension chose; None without the extension."""
    module, _ = extension()
    return None if module is None else str(module.isa())


def gpus() -> list[dict[str, Any]]:
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return found


def commit() -> str | None:
    """The commit of the checkout that fastbert runs from, "+changes" when files differ; None for an installed wheel."""
    import fastbert

    package = Path(fastbert.__file__).resolve().parent
    root = package.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # status must not write the index
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    toplevel = git("rev-parse", "--show-toplevel")
    # A virtual environment inside somebody's repository is not a checkout of fastbert.
    if toplevel is None or Path(toplevel).resolve() != root:
        return None
    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def describe(device: str = "cpu", command: list[str] | None = None) -> dict[str, Any]:
    """Everything of a result file that is not a measurement. Values are JSON."""
    cpu = cpu_model()
    graphics = gpus()
    name = graphics[torch.device(device).index or 0]["name"] if device.startswith("cuda") and graphics else cpu
    return {
        "device": name,
        "device_type": torch.device(device).type,
        "cpu": cpu,
        "isa": isa(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # processes wanting to run, over the last minute
        "gpus": graphics,
        "versions": {"fastbert": fastbert_version(), **{package: package_version(package) for package in PACKAGES}},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command if command is not None else ["fastbert", *sys.argv[1:]]),
    }


def device_folder(environment: dict[str, Any]) -> str:
    """The name of this device's folder in benchmarks/results: "amd-epyc-9b14-2-threads", "nvidia-h200"."""
    name = re.sub(r"\((r|tm)\)", "", environment["device"], flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{slug}-{environment['threads']}-threads" if environment["device_type"] == "cpu" else slug
