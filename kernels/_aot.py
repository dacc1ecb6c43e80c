"""Ahead-of-time compilation without a GPU: every shipped configuration, for every target, with what it costs.

    python -m fastbert.kernels._aot --sample              a few configurations, every target: what the tests run
    python -m fastbert.kernels._aot --all --json FILE     everything

Each kernel module lists calls of its launchers (`aot_cases`). A call on `meta` tensors records the kernels that the
launcher would start, with their arguments, so what is compiled here is what a GPU would compile. The report has
registers, spills and shared memory from the binary itself, and the widest access to global memory from its assembly.
The exit status is 1 when a compilation fails, or spills registers on sm_90."""

import argparse
import concurrent.futures
import dataclasses
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
    gated_act,
    gelu,
    layer_norm,
    pack,
    rms_norm,
    rotary,
)
from fastbert.kernels._launch import INTERPRETED, AotCase, Device, Launch, recorded_launches

#: Every kernel module; each has `aot_cases()`.
MODULES = (layer_norm, rms_norm, gelu, gated_act, rotary, pack, attention, attention_backward, attention_decode)


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
#: Where a spill fails the report.
NO_SPILLS = frozenset({"sm_90"})
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
        if self.spills and self.target in NO_SPILLS:
            return f"spills {self.spills} bytes a thread"
        if self.shared_bytes > TARGETS[self.target].shared_limit:
            return f"{self.shared_bytes} bytes of shared memory; at most {TARGETS[self.target].shared_limit}"
        if self.target == "sm_90" and WITH_WGMMA.search(f"{self.case} {self.kernel}") and not self.wgmma:
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
    return [case for module in MODULES for case in module.aot_cases() if case.sample or not sample]


def _launches(case: AotCase, target: str) -> list[Launch]:
    with recorded_launches(TARGETS[target].device) as launches:
        case.call()
    return launches


def jobs(sample: bool, targets: list[str]) -> list[tuple[str, int, str]]:
    """(case, number of its launch, target), each distinct specialisation once."""
    result: dict[object, tuple[str, int, str]] = {}
    for target in targets:
        for case in cases(sample):
            for number, launch in enumerate(_launches(case, target)):
                source = specialised_source(launch, TARGETS[target])
                specialisation = (source.name, *map(str, (source.signature, source.constants, source.attrs)))
                result.setdefault((target, launch.num_warps, *specialisation), (case.id, number, target))
    return list(result.values())


def compile_job(job: tuple[str, int, str]) -> Report:
    """Compile one launch and read its binary."""
    case_id, number, target = job
    case = next(case for case in cases(sample=False) if case.id == case_id)
    launch = _launches(case, target)[number]
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
    """The reports as text, one line each."""
    lines = [f"{'case':58} {'kernel':22} {'target':7} warps  regs spills  shared programs  load store  wgmma  seconds"]
    for r in sorted(reports, key=lambda r: (r.case, r.kernel, r.target)):
        figures = (
            f"{r.num_warps:5} {r.registers:5} {r.spills:6} {r.shared_bytes:7} {r.programs:8} "
            f"{r.widest_load:5} {r.widest_store:5} {r.wgmma:6}"
        )
        lines.append(
            f"{r.case:58} {r.kernel:22} {r.target:7} {figures} {r.seconds:8.2f}{'  ' + r.problem if r.problem else ''}"
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


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastbert.kernels._aot", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every shipped configuration")
    which.add_argument("--sample", action="store_true", help="the few that the tests compile")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="worker processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports there")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled ahead of time: unset it")

    work = jobs(options.sample, options.target or list(TARGETS))
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache, which the workers inherit: every figure comes from a compilation of now.
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max(1, min(options.jobs, len(work))), context) as pool:
            for done, report in enumerate(pool.map(compile_job, work), 1):
                reports.append(report)
                if sys.stderr.isatty():
                    print(f"\r{done}/{len(work)}", end="", file=sys.stderr, flush=True)
    print(table(reports))
    print(summary(reports))
    if options.json:
        entries = [
            {**dataclasses.asdict(report), "programs": report.programs, "problem": report.problem} for report in reports
        ]
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        options.json.write_text(json.dumps({"versions": versions, "reports": entries}, indent=1) + "\n")
    failed = [report for report in reports if report.problem]
    for report in failed:
        print(f"FAILED {report.case} {report.kernel} {report.target}: {report.problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
