"""What every launcher shares: checking its tensors, knowing the device, starting a kernel.

Nothing here asks a device anything at import, and nothing synchronises with the host.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

#: Kernels are decorated once, at import: for the interpreter (CPU tensors, TRITON_INTERPRET=1) or for a compiler.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: In the interpreter programs run one after the other: few, but enough that loops go round and partials are added.
INTERPRETER_PROCESSORS = 2


@dataclass(frozen=True)
class Device:
    """What a launch depends on."""

    architecture: str  # "sm_90", "gfx942", "interpreter"
    family: str  # "cuda", "hip"
    processors: int  # streaming multiprocessors, or compute units


@dataclass(frozen=True)
class AotCase:
    """One call of a launcher on `meta` tensors, whose launches the ahead-of-time compiler has to compile.

    Every kernel module lists its own in `aot_cases()`: together they reach every line of its configuration tables.
    """

    id: str  # "add_layer_norm-w768-bf16-dropout"
    call: Callable[[], object]
    sample: bool = False  # among the few that every test run compiles


@dataclass(frozen=True)
class Launch:
    """One kernel launch, as the ahead-of-time compiler records it."""

    kernel: Any
    arguments: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int


@dataclass
class _Recorder:
    device: Device
    launches: list[Launch]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recorded_launches(device: Device) -> Iterator[list[Launch]]:
    """Within it launchers take `meta` tensors, start nothing, and list what they would have started on `device`."""
    global _recorder
    if INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set: an interpreted kernel cannot be compiled ahead of time. "
            "Unset it and start a new process."
        )
    if _recorder is not None:
        raise RuntimeError("launches are being recorded already")
    _recorder = _Recorder(device, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = None


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], "hip", properties.multi_processor_count)
    return Device(f"sm_{properties.major}{properties.minor}", "cuda", properties.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """The device of a tensor that passed `check_tensors`; asked once a device."""
    if _recorder is not None:
        return _recorder.device
    if INTERPRETED:
        return Device("interpreter", "cuda", INTERPRETER_PROCESSORS)
    return _cuda_device(tensor.device.index)


def check_tensors(operation: str, **tensors: torch.Tensor | None) -> None:
    """Raise where the kernels of `operation` cannot take these: TypeError for a dtype, ValueError for a device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{operation}: {name} is {tensor.dtype}; the Triton kernels take float32, float16 and bfloat16. "
                "Cast it, or use fastbert.use_reference()."
            )
        if INTERPRETED and tensor.dtype is torch.bfloat16:
            raise TypeError(
                f"{operation}: {name} is bfloat16; Triton's interpreter computes garbage in it. "
                "Use float32 or float16 with TRITON_INTERPRET=1."
            )
        check_device(operation, name, tensor)


def check_seed(operation: str, seed: torch.Tensor | None) -> torch.Tensor:
    """The seed of a dropout that is not zero: int64, one element, where the kernels are."""
    if seed is None:
        raise ValueError(f"{operation}: seed is None; a dropout_p above 0 needs an int64 tensor of one element")
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{operation}: seed is {seed.dtype} of shape {list(seed.shape)}; it must be an int64 tensor of one element"
        )
    check_device(operation, "seed", seed)
    return seed


def check_device(operation: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError where a tensor is not on the kernels' device."""
    wanted = "meta" if _recorder is not None else "cpu" if INTERPRETED else "cuda"
    if tensor.device.type != wanted:
        way_out = {
            "cuda": "Move it to a GPU, or set TRITON_INTERPRET=1 before triton is imported.",
            "cpu": "With TRITON_INTERPRET=1 kernels run on the CPU: move it there.",
            "meta": "Recorded launches take meta tensors.",
        }[wanted]
        raise ValueError(
            f"{operation}: {name} is on {tensor.device}; the Triton kernels take {wanted} tensors. {way_out}"
        )


def as_rows(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """`tensor` [..., width] as [rows, width] with neighbouring columns: a view where strides allow, else a copy."""
    rows = tensor.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def launch(
    kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *arguments: Any, num_warps: int, **constexprs: Any
) -> None:
    """Start `kernel` on the device of `like`."""
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, arguments, constexprs, num_warps))
    elif INTERPRETED or like.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, num_warps=num_warps, **constexprs)
    else:
        with torch.cuda.device(like.device):
            kernel[grid](*arguments, num_warps=num_warps, **constexprs)
