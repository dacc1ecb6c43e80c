"""Ahead-of-time compilation without a GPU: every shipped configuration, for every target, with what it costs.

    python -m fastbert.kernels._aot --sample              a few configurations, every target: what the tests run
    python -m fastbert.kernels._aot --all --json FILE     everything; with --shard 1/3, 2/3, 3/3 in parts
    python -m fastbert.kernels._aot --merge PART … --json FILE

Each kernel module lists calls of its launchers (`aot_cases`). A call on `meta` tensors records the kernels that the
launcher would start, with their arguments, so what is compiled here is what a GPU would compile. The report has
registers, spills and shared memory from the binary itself, and the widest access to global memory from its assembly.
The exit status is 1 when a compilation fails, or spills registers on sm_90.

Of the specialisations that the calls reach, sm_90 compiles every one in bfloat16 and float32. Elsewhere, and in float16,
which the other targets leave out, as many as have each kernel in each of its launch configurations, and with each set of
its options (what masks there are, dropout, rows off 16 bytes), if not each with each."""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbert.kernels import (
    attention,
    attention_backward,
    attention_decode,
    cross_entropy,
    embedding,
    gated_act,
    gelu,
    layer_norm,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    pack,
    rms_norm,
    rotary,
    softmax,
)
from fastbert.kernels._launch import INTERPRETED, AotCase, Device, Launch, recorded_launches

#: Every kernel module; each has `aot_cases()`.
MODULES = (
    layer_norm,
    rms_norm,
    gelu,
    gated_act,
    rotary,
    pack,
    attention,
    attention_backward,
    attention_decode,
    softmax,
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    embedding,
)


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What the programs that live on one multiprocessor share."""

    shared_bytes: int
    warps: int
    reserved_bytes: int = 1024  # of shared memory, for each program
    registers: int = 65536
    warp: int = 32  # threads


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for. `processors` only shapes grids, which are no part of what is compiled."""

    device: Device
    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory that one program may have
    multiprocessor: Multiprocessor


#: Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; CDNA 3 ISA guide (a compute unit has
#: four SIMDs of 512 vector registers for each of 64 lanes and 8 wavefronts).
TARGETS = {
    "sm_80": Target(
        Device("sm_80", "cuda", 108), GPUTarget("cuda", 80, 32), 163 * 1024, Multiprocessor(164 * 1024, 64)
    ),
    "sm_90": Target(
        Device("sm_90", "cuda", 132), GPUTarget("cuda", 90, 32), 227 * 1024, Multiprocessor(228 * 1024, 64)
    ),
    "sm_100": Target(
        Device("sm_100", "cuda", 148), GPUTarget("cuda", 100, 32), 227 * 1024, Multiprocessor(228 * 1024, 64)
    ),
    "gfx942": Target(
        Device("gfx942", "hip", 304), GPUTarget("hip", "gfx942", 64), 64 * 1024,
        Multiprocessor(64 * 1024, 32, reserved_bytes=0, registers=4 * 512 * 64, warp=64),
    ),
}  # fmt: skip
#: Where every specialisation is compiled, and a spill fails the report.
THOROUGH = "sm_90"
#: What must use Hopper's asynchronous products there ("case kernel"): backward, the blocks of wider heads are too low for them.
WITH_WGMMA = re.compile(r"^attention(-d\d+|_backward-d(32|64|80|128))-.*-(fp16|bf16)-.* (forward|dq|dk_dv)_kernel$")


@dataclasses.dataclass
class Report:
    """What one kernel of one case became on one target."""

    case: str
    kernel: str
    target: str
    num_warps: int
    seconds: float = 0.0
    registers: int = 0  # per thread
    spills: int = 0  # CUDA: bytes of local memory per thread; HIP: spilled vector registers
    shared_bytes: int = 0  # per program
    widest_load: int = 0  # bytes of the widest access to global memory by one thread
    widest_store: int = 0
    wgmma: int = 0  # asynchronous tensor core instructions of Hopper in the assembly
    error: str = ""  # why there is no binary

    @property
    def problem(self) -> str:
        """Why this fails the whole, or an empty string."""
        if self.error:
            return self.error
        if self.spills and self.target == THOROUGH:
            return f"spills {self.spills} bytes a thread"
        if self.shared_bytes > TARGETS[self.target].shared_limit:
            return f"{self.shared_bytes} bytes of shared memory; at most {TARGETS[self.target].shared_limit}"
        if self.target == THOROUGH and WITH_WGMMA.search(f"{self.case} {self.kernel}") and not self.wgmma:
            return "no wgmma instruction"
        return ""

    @property
    def programs(self) -> int:
        """How many programs fit a multiprocessor at a time (on AMD: a compute unit), by registers, threads and memory."""
        if not self.registers:
            return 0
        limits = TARGETS[self.target].multiprocessor
        registers = -(-self.registers // 8) * 8  # allocated by eights
        by_memory = limits.shared_bytes // (self.shared_bytes + limits.reserved_bytes or 1)
        by_registers = limits.registers // (registers * limits.warp) // self.num_warps
        return min(by_memory, by_registers, limits.warps // self.num_warps)


#: What of a report a file holds.
WRITTEN = [field.name for field in dataclasses.fields(Report) if field.name not in ("seconds", "error")]
WRITTEN += ["programs", "error"]


def specialised_source(launch: Launch, target: Target) -> ASTSource:
    """The launch as Triton's launcher would specialise it: None and 1 are constants, multiples of 16 are marked."""
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constexprs
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialise):
            signature[parameter.name] = "constexpr"
            constexprs[index,] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _DTYPE_NAMES[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            divisible = False
        else:
            signature[parameter.name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            divisible = value % 16 == 0
        if divisible and specialise:
            attributes[index,] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor) and target.device.family == "hip":
            # On AMD a tensor below 2 GiB is marked too, for the sake of buffer loads.
            attributes.setdefault((index,), []).append(["tt.pointer_range", 32])
    return ASTSource(launch.kernel, signature, constexprs, attributes)


_DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def cases(sample: bool) -> list[AotCase]:
    """Every case of every kernel module, or the sample."""
    return [case for case in _cases().values() if case.sample or not sample]


@functools.cache
def _cases() -> dict[str, AotCase]:
    return {case.id: case for module in MODULES for case in module.aot_cases()}


def _launches(case: AotCase, target: str) -> list[Launch]:
    with recorded_launches(TARGETS[target].device) as launches:
        case.call()
    return launches


def jobs(sample: bool, targets: list[str]) -> list[tuple[str, int, str]]:
    """(case, number of its launch, target): of the sample each distinct specialisation, of all cases what the module says."""
    result = []
    for target in targets:
        seen: set[object] = set()
        for case in cases(sample):
            for number, launch in enumerate(_launches(case, target)):
                source = specialised_source(launch, TARGETS[target])
                specialisation = (
                    launch.num_warps,
                    source.name,
                    *map(str, (source.signature, source.constants, source.attrs)),
                )
                if specialisation in seen:
                    continue
                seen.add(specialisation)
                dtype, configuration, options = _aspects(launch, source)
                new = not seen.issuperset((configuration, options))
                # Two of the three: not float16, where all is compiled, not compiled yet.
                if sample or sum((dtype != "fp16", target == THOROUGH, new)) >= 2:
                    seen |= {configuration, options}
                    result.append((case.id, number, target))
    return result


def _aspects(launch: Launch, source: ASTSource) -> tuple[str, object, object]:
    """(dtype of the elements, the kernel with its launch configuration, the kernel with its options) of a specialisation."""
    pointers = {name: type_[1:] for name, type_ in source.signature.items() if type_.startswith("*")}
    dtypes = sorted(set(pointers.values()))
    dtype = next((name for name in ("bf16", "fp16", "fp32") if name in dtypes), ",".join(dtypes))
    names = launch.kernel.arg_names
    constants = {names[index]: value for (index,), value in source.constants.items()}
    tile = [(name, value) for name, value in constants.items() if type(value) is int and name.isupper()]
    flags = [(name, value) for name, value in constants.items() if value is None or isinstance(value, bool | str)]
    aligned = all((names.index(name),) in source.attrs for name in pointers)
    kernel = f"{launch.kernel.fn.__module__}.{source.name}"  # modules have kernels of one name
    configuration = ("configuration", kernel, launch.num_warps, dtype, *tile)
    return dtype, configuration, ("options", kernel, aligned, *flags)


def compile_job(job: tuple[str, int, str]) -> Report:
    """Compile one launch and read its binary."""
    case_id, number, target = job
    launch = _launches(_cases()[case_id], target)[number]
    report = Report(case_id, launch.kernel.__name__.strip("_"), target, launch.num_warps)
    start = time.perf_counter()
    try:
        source = specialised_source(launch, TARGETS[target])
        compiled = triton.compile(source, target=TARGETS[target].gpu, options={"num_warps": launch.num_warps})
        report.shared_bytes = compiled.metadata.shared
        read = _read_cuda if TARGETS[target].device.family == "cuda" else _read_hip
        read(compiled.asm, report)
    except Exception as error:  # whatever the compiler raises is the report; the run goes on and fails at its end
        report.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    report.seconds = time.perf_counter() - start
    return report


def _read_cuda(assembly: dict[str, Any], report: Report) -> None:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(assembly["cubin"])
        cubin.flush()
        command = [str(cuobjdump), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report.registers = _field(r"REG:(\d+)", usage)
    # Local memory. Triton's kernels have no arrays of their own, so all of it is spilled registers.
    report.spills = max(_field(r"LOCAL:(\d+)", usage), _field(r"STACK:(\d+)", usage))
    report.wgmma = assembly["ptx"].count("wgmma.mma_async")
    accesses = re.findall(r"\b(ld|st|cp\.async)\.(?:\w+\.|\w+::\w+\.)*?global\b([^;]*);", assembly["ptx"])
    for kind, rest in accesses:
        if kind == "cp.async":
            size = int(re.search(r"\],\s*(0x[0-9a-f]+|\d+)", rest).group(1), 0)
        else:
            size = _field(r"\.v(\d)\.", rest, 1) * _field(r"\.[busf](\d+)\b", rest) // 8
        if kind == "st":
            report.widest_store = max(report.widest_store, size)
        else:
            report.widest_load = max(report.widest_load, size)


def _read_hip(assembly: dict[str, Any], report: Report) -> None:
    metadata = assembly["amdgcn"]
    report.registers = _field(r"\.vgpr_count:\s*(\d+)", metadata)
    report.spills = _field(r"\.vgpr_spill_count:\s*(\d+)", metadata)
    report.shared_bytes = max(report.shared_bytes, _field(r"\.group_segment_fixed_size:\s*(\d+)", metadata))
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}
    for kind, suffix in re.findall(r"\b(?:global|buffer)_(load|store)_(dword(?:x\d)?|u?short|u?byte)\b", metadata):
        if kind == "store":
            report.widest_store = max(report.widest_store, sizes[suffix])
        else:
            report.widest_load = max(report.widest_load, sizes[suffix])


def _field(pattern: str, text: str, default: int | None = None) -> int:
    found = re.search(pattern, text)
    if found:
        return int(found.group(1))
    if default is None:
        raise ValueError(f"no {pattern} in the compiler's output: {text[:200]!r}")
    return default


def table(reports: list[Report]) -> str:
    """The reports as text: one line for a kernel of an operation on a target, with the worst of its figures."""
    lines = [
        f"{'operation':29} {'kernel':20} {'target':7} compilations  registers  spilling  shared memory  programs  wgmma"
    ]
    groups: dict[tuple[str, str, str], list[Report]] = {}
    for r in reports:
        groups.setdefault((r.case.partition("-")[0], r.kernel, r.target), []).append(r)
    for (operation, kernel, target), group in sorted(groups.items()):
        lines.append(
            f"{operation:29} {kernel:20} {target:7} {len(group):12} {max(r.registers for r in group):10} "
            f"{sum(bool(r.spills) for r in group):9} {max(r.shared_bytes for r in group):14} "
            f"{min(r.programs for r in group):9} {sum(bool(r.wgmma) for r in group):6}"
        )
    return "\n".join(lines)


def summary(reports: list[Report]) -> str:
    """One line a target."""
    lines = []
    for target in dict.fromkeys(r.target for r in reports):
        mine = [r for r in reports if r.target == target]
        lines.append(
            f"{target}: {len(mine)} compilations, {sum(bool(r.error) for r in mine)} failed, "
            f"{sum(bool(r.spills) for r in mine)} spill, at most {max(r.registers for r in mine)} registers and "
            f"{max(r.shared_bytes for r in mine)} bytes of shared memory"
        )
    return "\n".join(lines)


def write(file: Path, reports: list[Report]) -> None:
    """The reports as JSON, a line each; what a report counts and what it follows from that, but for how long it took."""
    lines = [json.dumps(line) for line in sorted([getattr(report, name) for name in WRITTEN] for report in reports)]
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    heads = f'"versions": {json.dumps(versions)},\n"fields": {json.dumps(WRITTEN)},\n"reports": [\n'
    file.write_text("{\n" + heads + ",\n".join(lines) + "\n]\n}\n")


def read(file: Path) -> list[Report]:
    """What `write` wrote. Raises ValueError for another triton's."""
    content = json.loads(file.read_text())
    if content["versions"]["triton"] != triton.__version__:
        raise ValueError(f"{file} is triton {content['versions']['triton']}'s; this is {triton.__version__}")
    return [
        Report(**{name: value for name, value in zip(content["fields"], line, strict=True) if name != "programs"})
        for line in content["reports"]
    ]


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"a shard is I/N with 1 <= I <= N, not {text!r}")
    return int(found[1]), int(found[2])


def _compiled(work: list[tuple[str, int, str]], processes: int) -> list[Report]:
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache, which the workers inherit: every figure comes from a compilation of now.
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max(1, min(processes, len(work))), context) as pool:
            for done, report in enumerate(pool.map(compile_job, work), 1):
                reports.append(report)
                if sys.stderr.isatty():
                    print(f"\r{done}/{len(work)}", end="", file=sys.stderr, flush=True)
    return reports


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastbert.kernels._aot", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every shipped configuration")
    which.add_argument("--sample", action="store_true", help="the few that the tests compile")
    which.add_argument("--merge", nargs="+", type=Path, metavar="PART", help="what was compiled before, in shards")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="worker processes")
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="every N-th compilation, from the I-th"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled ahead of time: unset it")

    start = time.perf_counter()
    if options.merge:
        reports = [report for part in options.merge for report in read(part)]
    else:
        shard, shards = options.shard
        work = jobs(options.sample, options.target or list(TARGETS))[shard - 1 :: shards]
        reports = _compiled(work, options.jobs)
    print(table(reports))
    print(summary(reports))
    print(f"triton {triton.__version__}, {time.perf_counter() - start:.0f} s")
    if options.json:
        write(options.json, reports)
    failed = [report for report in reports if report.problem]
    for report in failed:
        print(f"FAILED {report.case} {report.kernel} {report.target}: {report.problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
