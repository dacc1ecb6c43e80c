"""How the C++ extension is compiled. The metadata is in pyproject.toml.

Each ``csrc/cpu/*_kernels.cpp`` is compiled once for every instruction set, into a namespace of its own, and the rest once
for the baseline; ninja does it in parallel and incrementally in ``build/``. Neither torch nor Python packages beyond
pybind11 and ninja are needed.

Environment: ``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` as everywhere; ``FASTBERT_NO_EXTENSION=1`` makes a package without the
extension, whose operations on CPU come from plain PyTorch.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    # An older one fails on the licence in pyproject.toml with ninety lines of schema.
    raise SystemExit(
        f"building fastbert needs setuptools 77 or newer and found {setuptools.__version__}: pip install --upgrade "
        "setuptools, or build with pip's build isolation."
    )

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"

COMMON_FLAGS = shlex.split(
    "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra"
)
# Namespace of the kernels: flags. The list matches csrc/cpu/dispatch.cpp, which asks the processor for the same features.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"]
X86_ISAS = {
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
ISAS = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}

NO_EXTENSION = os.environ.get("FASTBERT_NO_EXTENSION", "") not in ("", "0")


def compiler() -> list[str]:
    """The C++ compiler as a command, from CXX or the first usual name that is there."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return [next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "g++")]


def compiles(cxx: list[str], flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <vector>\nint probe() { return (int)std::vector<int>(3).size(); }\n")
        command = [*cxx, "-std=c++17", "-fPIC", "-shared", *flags, str(source), "-o", str(Path(folder, "probe.so"))]
        try:
            return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
        except OSError:
            return False


def working_compiler() -> list[str]:
    cxx = compiler()
    if not compiles(cxx, []):
        raise SystemExit(
            f"fastbert needs a C++17 compiler and {shlex.join(cxx)} does not work: install g++ (on Debian and Ubuntu: "
            "apt-get install g++) or name another in CXX, or set FASTBERT_NO_EXTENSION=1 to install without the C++ "
            "extension."
        )
    return cxx


class CheckedBuild(build):
    """build that says at once when there is no compiler, and does not pack what an earlier build left over."""

    def run(self) -> None:
        if not NO_EXTENSION:
            working_compiler()
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class NinjaBuildExt(build_ext):
    """build_ext through ninja: one process for all files, dependencies on headers known, nothing compiled twice."""

    def run(self) -> None:
        if self.extensions:
            self.cxx = working_compiler()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            import ninja
            import pybind11
            from ninja import ninja_syntax
        except ImportError as error:
            raise SystemExit(
                f"building fastbert without build isolation needs {error.name}: pip install ninja pybind11"
            ) from error

        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        if any(flag.startswith("-fsanitize") for flag in user_flags):
            tag += "-sanitized"  # beside the usual objects, which stay
        folder = ROOT / "build" / f"extension-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        built = folder / target.name

        openmp = ["-fopenmp"] if compiles(self.cxx, ["-fopenmp"]) else []
        if not openmp:
            print(f"{shlex.join(self.cxx)} has no -fopenmp: the extension will use one thread", file=sys.stderr)
        user_link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-pthread"]
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        version = f'-DFASTBERT_VERSION="{self.distribution.get_version()}"'

        def words(items: list[str]) -> str:
            return " ".join(shlex.quote(item).replace("$", "$$") for item in items)

        with open(folder / "build.ninja.new", "w") as file:
            n = ninja_syntax.Writer(file, width=1000)
            n.rule(
                "compile",
                f"{words(self.cxx)} -MMD -MF $out.d {words(COMMON_FLAGS)} $flags {words(user_flags)} -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $out",
            )
            n.rule(
                "link",
                f"{words(self.cxx)} {words([*shared, *openmp])} $in -o $out {words(user_link_flags)}",
                description="link $out",
            )
            objects: list[str] = []
            for source in sorted(SOURCES.rglob("*.cpp")):
                relative = source.relative_to(SOURCES).with_suffix("")
                if source.stem.endswith("_kernels"):
                    variants = {f"{relative}.{isa}.o": [f"-DFASTBERT_ISA={isa}", *ISAS[isa]] for isa in ISAS}
                elif relative.parent == Path():  # what knows Python
                    variants = {f"{relative}.o": [*openmp, version, *includes]}
                else:
                    variants = {f"{relative}.o": openmp}
                for name, flags in variants.items():
                    path = ninja_syntax.escape_path(str(source))
                    objects += n.build(name, "compile", path, variables={"flags": words(flags)})
            n.build(built.name, "link", objects)
        os.replace(folder / "build.ninja.new", folder / "build.ninja")

        executable = Path(ninja.BIN_DIR, "ninja")
        command = [str(executable if executable.exists() else shutil.which("ninja") or "ninja"), "-C", str(folder)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit("compiling fastbert's C++ extension failed: the compiler's messages are above.")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.read_bytes() == built.read_bytes()):
            target.unlink(missing_ok=True)  # never write into a library that a process has mapped
            shutil.copy2(built, target)

    def get_source_files(self) -> list[str]:
        files = (path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h"))
        return sorted(path.relative_to(ROOT).as_posix() for path in files)


# fastbert/kernels is a link to kernels/ for editors and type checkers; the package comes from kernels/ itself.
kernels = ["fastbert.kernels", *(f"fastbert.kernels.{name}" for name in find_packages(str(ROOT / "kernels")))]
own = [name for name in find_packages(str(ROOT), include=["fastbert", "fastbert.*"]) if name not in kernels]

setup(
    packages=sorted({*own, *kernels}),
    package_dir={"fastbert": "fastbert", "fastbert.kernels": "kernels"},
    package_data={"fastbert": ["py.typed", "*.pyi"], "fastbert.bench": ["*.html"]},
    include_package_data=False,
    ext_modules=[] if NO_EXTENSION else [Extension("fastbert._C", sources=[])],
    cmdclass={"build": CheckedBuild, "build_ext": NinjaBuildExt},
    zip_safe=False,
)
