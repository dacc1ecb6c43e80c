"""The extension and the packages made from this tree."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")

PACKAGE_FILES = {
    "fastbert/__init__.py",
    "fastbert/py.typed",
    "fastbert/_C.pyi",
    "fastbert/bench/page.html",
    "fastbert/cpu/layer_norm.py",
    "fastbert/integrations/transformers/attention.py",
    "fastbert/models/sentence_encoder.py",
    "fastbert/tokenizer/wordpiece.py",
}


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def build(folder: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py without traces in the tree, except that ninja keeps its objects in build/."""
    for module in ("setuptools", "ninja", "pybind11"):
        pytest.importorskip(module)
    return run(
        sys.executable,
        "setup.py",
        "--quiet",
        *("egg_info", "--egg-base", folder),
        *("build", "--build-base", folder / "build"),
        *command,
        **environment,
    )


def build_wheel(folder: Path, **environment: str) -> Path:
    done = build(folder, "bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "bdist", **environment)
    assert done.returncode == 0, done.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel


def kernel_files() -> set[str]:
    return {f"fastbert/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


# ---- the extension ----


def test_instruction_sets_share_no_code():
    """A weak symbol compiled for AVX-512 could be the copy that the linker gives to the baseline."""
    nm = shutil.which("nm")
    objects = sorted((ROOT / "build").glob("extension-*/**/*_kernels.*.o"))
    objects = [path for path in objects if not any("sanitized" in part for part in path.parts)]
    if nm is None or not objects:
        pytest.skip("no nm, or the extension was not compiled in this tree")
    isas = ("avx512_bf16", "avx512", "avx2", "baseline") if platform.machine() == "x86_64" else ("baseline",)
    sources = (ROOT / "csrc").glob("**/*_kernels.cpp")
    assert {path.name for path in objects} == {f"{source.stem}.{isa}.o" for source in sources for isa in isas}
    for path in objects:
        isa = path.suffixes[-2].removeprefix(".")
        for line in run(nm, "--demangle", path).stdout.splitlines():
            kind, name = line[17:].split(" ", 1)
            assert kind not in "VvWwu", f"{path.name} has the weak symbol {name}"
            if kind.isupper() and kind not in "U":
                assert name.startswith(f"fastbert::{isa}::"), f"{path.name} defines {name} for everybody"


def test_make_fuzz_links_every_instruction_set():
    declared = re.search(r"enum class Isa \{ (.*) \};", (ROOT / "csrc/cpu/dispatch.h").read_text())
    linked = re.search(r"^FUZZ_ISAS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(declared[1].split(", ")) <= set(re.findall(r"\w+", linked[1]))


def test_torch_is_not_linked():
    _C = pytest.importorskip("fastbert._C", reason="the extension is not built")
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    needed = [line for line in run(readelf, "--dynamic", _C.__file__).stdout.splitlines() if "(NEEDED)" in line]
    assert needed
    for library in ("torch", "c10", "python"):
        assert not any(library in line for line in needed), needed
    symbols = run(readelf, "--dyn-syms", "--wide", _C.__file__).stdout
    exported = [line.split()[-1] for line in symbols.splitlines() if " GLOBAL " in line and " UND " not in line]
    assert exported == ["PyInit__C"], "everything else is hidden"


def test_nothing_is_compiled_twice(tmp_path):
    pytest.importorskip("fastbert._C", reason="the extension is not built")
    arguments = ("build_ext", "--build-lib", tmp_path / "lib")
    assert build(tmp_path, *arguments).returncode == 0
    again = build(tmp_path, *arguments)
    assert "no work to do" in again.stdout, again.stdout


def test_no_compiler_is_one_clear_sentence(tmp_path):
    done = build(tmp_path, "build_ext", "--build-lib", tmp_path / "lib", CXX="/nonexistent/g++")
    assert done.returncode != 0
    (line,) = (line for line in done.stdout.splitlines() if line.strip() and not line.startswith("warning: "))
    assert line.startswith("fastbert needs a C++17 compiler and /nonexistent/g++ does not work")
    assert "apt-get install g++" in line and "FASTBERT_NO_EXTENSION=1" in line


# ---- packages ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("fastbert._C", reason="the extension is not built")
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("pure"), FASTBERT_NO_EXTENSION="1")


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel(wheel):
    names = names_in(wheel)
    assert set(names) >= PACKAGE_FILES | kernel_files()
    assert [name for name, count in Counter(names).items() if count > 1] == []
    (extension,) = (name for name in names if name.endswith(".so"))
    assert extension.startswith("fastbert/_C.")
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastbert"}
    assert not any(name.endswith((".cpp", ".h", ".o")) for name in names)


def test_pure_wheel(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = names_in(pure_wheel)
    assert set(names) >= PACKAGE_FILES | kernel_files()
    assert not any(name.endswith(".so") for name in names)


IMPORTS = """
import pathlib, sys, fastbert, fastbert.kernels
folder = pathlib.Path(sys.argv[1]).resolve()
for module in (fastbert, fastbert.kernels):
    assert folder in pathlib.Path(module.__file__).resolve().parents, module.__file__
"""


@pytest.mark.parametrize("kind", ["wheel", "pure_wheel"])
def test_installed_wheel_is_imported_from_anywhere(kind, request, tmp_path):
    folder = tmp_path / "site"
    with zipfile.ZipFile(request.getfixturevalue(kind)) as archive:
        archive.extractall(folder)
    extension = "from fastbert import _C; assert _C.isas()" if kind == "wheel" else ""
    done = run(sys.executable, "-c", IMPORTS + extension, folder, cwd=tmp_path, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stdout


def test_kernels_are_imported_from_the_root_and_from_elsewhere(tmp_path):
    for cwd in (ROOT, tmp_path):
        done = run(sys.executable, "-c", "import fastbert.kernels; print(fastbert.kernels.__file__)", cwd=cwd)
        assert done.returncode == 0, done.stdout
        assert Path(done.stdout.splitlines()[-1]).exists()


def test_sdist_builds(tmp_path):
    """The archive has what a build needs, and gives the wheel that the tree gives."""
    done = build(tmp_path, "sdist", "--dist-dir", tmp_path / "dist")
    assert done.returncode == 0, done.stdout
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    wanted = [path for suffix in ("cpp", "h") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    wanted += (ROOT / "kernels").glob("*.py")
    for path in [*wanted, ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "tests" / "test_build.py"]:
        assert (tree / path.relative_to(ROOT)).exists(), path
    assert not list(tree.rglob("*.so")) and not list(tree.rglob("*.o"))

    done = run(
        *(sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path / "wheel"),
        cwd=tree,
        FASTBERT_NO_EXTENSION="1",
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert set(names_in(wheel)) >= PACKAGE_FILES | kernel_files()
