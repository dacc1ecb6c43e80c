"""Where a call's time goes, by operator, from torch.profiler; and its trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastbert.bench.profile.models import Contender

_ROWS = 12  # that are kept; the others together are one


@dataclass(frozen=True)
class Operation:
    name: str  # the operator's, as the trace has it
    seconds: float  # its own, without the operators that it calls
    calls: int


@dataclass(frozen=True)
class Breakdown:
    """A call under the profiler.

    `seconds` is the sum of `operations`, which the profiler's own work lengthens a little. Of fastbert in inference on a CPU it is
    that of its operators one by one: otherwise all layers are a single call of C++, which is faster and has no inner operators.
    """

    contender: str
    seq: int
    seconds: float
    operations: list[Operation]
    others: Operation | None  # all that are not listed
    one_by_one: bool  # the call was taken apart, see above


def profile_operations(
    contender: Contender, trace: str | None
) -> tuple[float, list[Operation], Operation | None, bool]:
    """(seconds, operations by time, the others, whether the call was taken apart) of one call; its trace goes to the file."""
    cuda = contender.spec.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    apart = contender.native and not contender.spec.training and not cuda
    run = contender.operator_by_operator() if apart else contender.call
    run()
    with torch.profiler.profile(activities=activities) as profiled:
        run()
        if cuda:
            torch.cuda.synchronize(contender.spec.device)
    found = []
    for event in profiled.key_averages():
        if cuda and event.device_type is not torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time its operator has
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own > 0.0:
            found.append(Operation(event.key, own * 1e-6, event.count))
    found.sort(key=lambda each: -each.seconds)
    rest = found[_ROWS:]
    others = Operation("others", sum(each.seconds for each in rest), sum(each.calls for each in rest)) if rest else None
    if trace is not None:
        _export(profiled, Path(trace))
    return sum(each.seconds for each in found), found[:_ROWS], others, apart


def _export(profiled: torch.profiler.profile, target: Path) -> None:
    """Writes a neighbour and renames it, as `results.write_atomically` does."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        # torch compresses what ends in .gz.
        part = Path(folder, f"trace{''.join(target.suffixes[-2:])}")
        profiled.export_chrome_trace(str(part))
        os.replace(part, target)
