"""What is installed, what answers for each operation and why, and whether it is right: `fastbert doctor`."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

import fastbert
from fastbert.bench import environment, selftest

if TYPE_CHECKING:
    from rich.console import Console


def examine(before: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Everything that the doctor finds, as JSON values. `before` is called with the name of each self-test to come."""
    with warnings.catch_warnings():
        # A missing part is what this report is about; the warning that the first operation gives would only repeat it.
        warnings.simplefilter("ignore", fastbert.MissingBackendWarning)
        backends = [dataclasses.asdict(each) for each in fastbert.backends()]
        outcomes: list[selftest.Outcome] = []
        for device in selftest.devices():
            for problem in selftest.PROBLEMS:
                before(problem.operation)
                outcomes += selftest.run(problem, device)
    described = environment.describe(command=["fastbert", "doctor"])
    keep = ("cpu", "threads", "cores", "gpus", "versions", "python", "platform", "commit", "date")
    return {
        **{key: described[key] for key in keep},
        "extension": _extension(),
        "triton": _triton(),
        "cuda": {"available": torch.cuda.is_available(), "built_for": torch.version.cuda or torch.version.hip},
        "backends": backends,
        "selftest": {
            "passed": all(each.passed for each in outcomes),
            "outcomes": [{**dataclasses.asdict(each), "passed": each.passed} for each in outcomes],
            "not_covered": sorted(set(_operations()) - selftest.covered()),
        },
    }


def selftest_names() -> list[str]:
    """The steps that `examine` announces."""
    return [problem.operation for _ in selftest.devices() for problem in selftest.PROBLEMS]


def _operations() -> list[str]:
    from fastbert.ops._registry import OPERATIONS

    return list(OPERATIONS)


def _extension() -> dict[str, Any]:
    module, error = environment.extension()
    if module is None:
        return {"loaded": False, "error": error, "isa": None, "isas": [], "build": None}
    return {
        "loaded": True,
        "error": None,
        "isa": module.isa(),
        "isas": list(module.isas()),
        "build": dict(module.build_info()),
    }


def _triton() -> dict[str, Any]:
    """Whether triton imports, which an installed version does not promise."""
    try:
        module = importlib.import_module("triton")
    except ImportError as error:
        return {
            "importable": False,
            "version": environment.package_version("triton"),
            "error": f"{type(error).__name__}: {error}",
        }
    return {"importable": True, "version": module.__version__, "error": None}


def print_report(console: Console, report: dict[str, Any]) -> None:
    """The report as tables."""
    _print_machine(console, report)
    console.print()
    _print_backends(console, report)
    console.print()
    _print_selftest(console, report)


def _print_machine(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    extension, triton = report["extension"], report["triton"]
    if extension["loaded"]:
        others = [name for name in extension["isas"] if name != extension["isa"]]
        also = f" (also {', '.join(others)})" if others else ""
        openmp = "" if extension["build"].get("openmp", True) else ", one thread: built without OpenMP"
        loaded = Text(f"loads, answers with {extension['isa']}{also}{openmp}", style="green")
    else:
        loaded = Text(f"does not load: {extension['error']}", style="yellow")
    if triton["importable"]:
        imports = Text(f"{triton['version']}, imports", style="green")
    else:
        imports = Text(f"does not import: {triton['error']}", style="yellow")
    graphics = ", ".join(
        f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')}, {gpu['memory_bytes'] / 2**30:.0f} GiB)"
        for gpu in report["gpus"]
    )
    built = report["cuda"]["built_for"]
    none = "none" + (
        "; torch is built for CPUs only"
        if built is None
        else f"; torch is built for CUDA or HIP {built}, but sees no device"
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "fastbert", report["versions"]["fastbert"] + (f", commit {report['commit']}" if report["commit"] else "")
    )
    table.add_row("python", f"{report['python']}, {report['platform']}")
    versions = {name: version for name, version in report["versions"].items() if name not in ("fastbert", "triton")}
    table.add_row(
        "packages", Text(", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()))
    )
    table.add_row("cpu", Text(f"{report['cpu']}, {report['threads']} threads on {report['cores']} cores"))
    table.add_row("gpu", Text(graphics or none))
    table.add_row("C++ extension", loaded)
    table.add_row("triton", imports)
    console.print(table, highlight=False)


def _print_backends(console: Console, report: dict[str, Any]) -> None:
    """A table for each device that is there: operations down, dtypes across, reasons as notes below."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    backends = report["backends"]
    present = ["cpu", *(["cuda"] if report["cuda"]["available"] else [])]
    notes: dict[str, int] = {}  # reason → its number
    for device in present:
        here = [each for each in backends if each["device"] == device]
        dtypes = [name for name in dict.fromkeys(each["dtype"] for each in here) if name != "float64"]
        table = Table(
            title=f"What answers on {device}",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("operation", no_wrap=True)
        for dtype in dtypes:
            table.add_column(_SHORT.get(dtype, dtype))
        for operation in dict.fromkeys(each["operation"] for each in here):
            row: list[str | Text] = [operation]
            for dtype in dtypes:
                status = next(each for each in here if each["operation"] == operation and each["dtype"] == dtype)
                mark = ""
                if status["reason"] != _PLAIN_REASON:
                    mark = f" {_superscript(notes.setdefault(status['reason'], len(notes) + 1))}"
                style = "yellow" if status["implementation"] == "reference" else "green"
                row.append(Text(status["implementation"], style=style) + Text(mark, style="dim"))
            table.add_row(*row)
        console.print(table)
    for reason, count in notes.items():
        console.print(f"[dim]{_superscript(count)} {escape(reason)}[/]", highlight=False)
    wide = {each["reason"] for each in backends if each["dtype"] == "float64" and each["device"] in present}
    for reason in sorted(wide):
        console.print(f"[dim]fp64: {escape(reason)}[/]", highlight=False)
    if "cuda" not in present:
        would = [each["reason"] for each in backends if each["device"] == "cuda" and each["dtype"] == "float32"]
        there = sum("Triton would answer" in reason for reason in would)
        text = f"cuda: no device here; Triton would answer for {there} of {len(would)} operations, the reference for the others."
        if not report["triton"]["importable"]:
            text = "cuda: no device here, and no triton: the reference would answer."
        console.print(f"[dim]{text}[/]", highlight=False)


_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_PLAIN_REASON = "fastest for this device and dtype"


def _superscript(count: int) -> str:
    return str(count).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _print_selftest(console: Console, report: dict[str, Any]) -> None:
    """The largest error of each operation, device and dtype; failures in full."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    outcomes = report["selftest"]["outcomes"]
    table = Table(
        title="Self-test: largest error against float64, as a share of the largest value",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("operation", overflow="fold")
    columns = list(dict.fromkeys((each["device"], each["dtype"]) for each in outcomes))
    for device, dtype in columns:
        table.add_column(
            _SHORT.get(dtype, dtype) if device == "cpu" else f"{device} {_SHORT.get(dtype, dtype)}", justify="right"
        )
    for operation in dict.fromkeys(each["operation"] for each in outcomes):
        row: list[Text | str] = [operation]
        for column in columns:
            found = [
                each
                for each in outcomes
                if each["operation"] == operation and (each["device"], each["dtype"]) == column
            ]
            if not found:
                row.append("")
            elif all(each["passed"] for each in found):
                row.append(Text(f"{max(each['error'] for each in found):.1e}"))
            else:
                row.append(Text("FAILED", style="bold red"))
        table.add_row(*row)
    console.print(table)
    failed = [each for each in outcomes if not each["passed"]]
    for each in failed:
        why = each["message"] or f"error {each['error']:.1e} exceeds {each['tolerance']:.1e}"
        variant = f" ({each['variant']})" if each["variant"] else ""
        console.print(
            f"[bold red]FAILED[/] {escape(each['operation'] + variant)}, {each['device']} {each['dtype']}, "
            f"{escape(each['implementation'])}: {escape(why)}",
            highlight=False,
        )
    for name in report["selftest"]["not_covered"]:
        console.print(f"[yellow]not tested[/] {name}", highlight=False)
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(outcomes)} self-tests failed[/]", highlight=False)
    else:
        console.print(f"[green]all {len(outcomes)} self-tests pass[/]", highlight=False)
