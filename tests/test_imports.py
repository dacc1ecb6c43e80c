"""Imports go one way, and importing fastbert costs and disturbs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastbert"

# Higher may import lower, never the reverse.
LEVELS = {
    "cli": 9,
    "doctor": 8,
    "__main__": 10,
    "bench": 7,
    "integrations": 6,
    "models": 5,
    "nn": 4,
    "packing": 3,
    "tokenizer": 4,
    "functional": 3,
    "ops": 2,
    "cpu": 1,
    "kernels": 1,
    "_C": 0,
    "hub": 0,
    "reference": 0,
    "_version": 0,
}
FROM_THE_TOP = {
    "use_reference",
    "backends",
    "debug",
    "functional",
    "MissingBackendWarning",
    "BackendStatus",
    "__version__",
}


def _modules():
    files = [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]
    return sorted(files) + sorted((ROOT / "kernels").glob("*.py"))


def _parts(file: Path) -> tuple[str, ...]:
    if file.parent.name == "kernels":
        return ("kernels", file.stem)
    return file.relative_to(PACKAGE).with_suffix("").parts


def _imported(file: Path):
    """(imported name below fastbert, line) of every import statement, also those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            module = node.module or ""
            if module == "fastbert":
                for alias in node.names:
                    yield alias.name, node.lineno
            elif module.startswith("fastbert."):
                yield module.split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("fastbert."):
                    yield alias.name.split(".")[1], node.lineno


@pytest.mark.parametrize("file", _modules(), ids=lambda f: "/".join(_parts(f)))
def test_imports_go_one_way(file):
    here = _parts(file)[0]
    if here == "__init__":
        return
    assert here in LEVELS, f"{here} has no level: add it to LEVELS"
    for name, line in _imported(file):
        if name in FROM_THE_TOP and name not in LEVELS:
            name = "functional"  # what fastbert/__init__.py takes from ops and functional
        assert name in LEVELS, f"{file}:{line}: fastbert.{name} has no level: add it to LEVELS"
        assert LEVELS[name] <= LEVELS[here], f"{file}:{line}: {here} imports {name}, which stands above it"
        assert name == here or LEVELS[name] < LEVELS[here], f"{file}:{line}: {here} imports its neighbour {name}"


def test_kernels_import_torch_triton_and_themselves_only():
    allowed = {"torch", "triton", "fastbert"} | set(sys.stdlib_module_names)
    for file in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{file}:{node.lineno}: {name}"
                assert not name.startswith("fastbert") or name.startswith("fastbert.kernels"), (
                    f"{file}:{node.lineno}: {name}"
                )
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def _run(code: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_fastbert_imports_no_heavy_optional_package():
    heavy = ["triton", "transformers", "tokenizers", "rich", "huggingface_hub", "sentence_transformers"]
    _run(
        "import sys, torch\nbefore = set(sys.modules)\nimport fastbert\n"
        f"new = [m for m in {heavy} if m in sys.modules and m not in before]\nassert not new, new",
        ROOT,
    )


def test_transformers_imports_from_the_repository_root():
    """Hugging Face has a package named kernels, which transformers looks for; from the root it finds ours."""
    pytest.importorskip("transformers")
    _run("import kernels, pathlib; from transformers import BertModel; assert BertModel", ROOT)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_kernels_are_importable_as_fastbert_kernels(where, tmp_path):
    _run("import fastbert.kernels; assert fastbert.kernels.__file__", ROOT if where == "root" else tmp_path)
