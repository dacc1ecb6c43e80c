"""Runs pytest with the extension of another build: `python -m tests.sanitized FOLDER PYTEST_ARGUMENTS`, see the Makefile."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  it comes before the extension, which shares its OpenMP threads


def use_extension(folder: Path) -> None:
    """Put FOLDER/fastbert/_C.*.so in the place of the installed extension."""
    (path,) = (folder / "fastbert").glob("_C.*.so")
    loader = importlib.machinery.ExtensionFileLoader("fastbert._C", str(path))
    spec = importlib.util.spec_from_loader("fastbert._C", loader)
    assert spec is not None
    sys.modules["fastbert._C"] = module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)


if __name__ == "__main__":
    use_extension(Path(sys.argv[1]))
    sys.exit(pytest.main(sys.argv[2:]))
