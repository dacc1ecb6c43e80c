"""The one place where an operation's implementation is chosen.

An operation is one torch operator ``fastbert::<name>``. torch's dispatcher picks by device, and the functions registered
here pick by dtype: CPU → C++, CUDA → Triton, and the reference for float64, for every other device, for dtypes without a
kernel, and (with one warning) where the extension or triton is missing. Nothing is imported before its first use.

The operators know no autograd: the public function of an operation enters its ``autograd.Function`` when a gradient is wanted
and calls the operator directly when none is, which costs a third.
"""

import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What a missing part is called, and how to get it.
_REMEDIES = {
    "C++": "the C++ extension fastbert._C does not load ({error}); reinstall fastbert-kernels where a C++ compiler is",
    "Triton": "triton does not load ({error}); install it (it comes with torch's GPU builds)",
}

_LIBRARY = torch.library.Library("fastbert", "DEF")


class MissingBackendWarning(UserWarning):
    """The fast implementation of an operation cannot be loaded, so the reference answers: correct, but slow."""


@dataclass(frozen=True)
class Implementation:
    """A faster function with the operator's signature.

    Attributes:
        kind: "C++", "Triton", …: what ``backends()`` calls it.
        target: "module:function", imported at the first call.
        dtypes: those it takes; the reference answers for others.
        note: what a user should know about it, shown by ``fastbert doctor``.
    """

    kind: str
    target: str
    dtypes: tuple[torch.dtype, ...]
    note: str = ""

    def load(self) -> Callable[..., Any]:
        """The function. Raises ImportError where its extension or triton is missing."""
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Operation:
    """An operator, its specification, and what may answer in its place.

    Attributes:
        name: of the operator, without ``fastbert::``.
        schema: "(arguments) -> (results)".
        reference: the specification in plain PyTorch.
        fake: the shape function: results of the right shape, dtype and strides, never their values.
        cpu, cuda: the fast implementations, where there are.
        dtype_argument: position of the argument whose dtype decides.
        check_values: raises where ids, labels or boundaries, arguments of the operator, are out of range. It runs with the
            operator, so under torch.compile too: on CPU always, elsewhere under debug().
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cpu: Implementation | None = None
    cuda: Implementation | None = None
    dtype_argument: int = 0
    check_values: Callable[..., None] | None = None


@dataclass(frozen=True)
class BackendStatus:
    """What answers for an operation on a device in a dtype, and why."""

    operation: str
    device: str
    dtype: str
    implementation: str
    reason: str


@dataclass
class _State:
    reference_depth: int = 0
    debug_depth: int = 0
    warned: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


OPERATIONS: dict[str, Operation] = {}
_state = _State()


def register(operation: Operation) -> torch._ops.OpOverload:
    """Define ``fastbert::<name>`` and return the operator to call."""
    name = operation.name
    _LIBRARY.define(name + operation.schema)
    _LIBRARY.impl(name, _choosing(operation, operation.cpu), "CPU")
    _LIBRARY.impl(name, _choosing(operation, operation.cuda), "CUDA")
    _LIBRARY.impl(name, _choosing(operation, None), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastbert::{name}", operation.fake, lib=_LIBRARY)
    OPERATIONS[name] = operation
    return getattr(torch.ops.fastbert, name).default


def _choosing(operation: Operation, implementation: Implementation | None) -> Callable[..., Any]:
    """The function that the dispatcher calls on one device."""
    chosen: dict[torch.dtype, Callable[..., Any]] = {}
    position = operation.dtype_argument
    check_values = operation.check_values

    def run_reference(*arguments: Any) -> Any:
        with torch.no_grad():
            results = operation.reference(*arguments)
        if results is None:  # an operator that writes into its argument
            return None
        # The kernels return contiguous tensors; elementwise PyTorch keeps its input's strides.
        return results.contiguous() if isinstance(results, Tensor) else tuple(r.contiguous() for r in results)

    def run(*arguments: Any) -> Any:
        deciding = arguments[position]
        if check_values is not None and (deciding.device.type == "cpu" or _state.debug_depth):
            check_values(*arguments)
        if _state.reference_depth:
            return run_reference(*arguments)
        dtype = deciding.dtype
        function = chosen.get(dtype)
        if function is None:
            function = chosen[dtype] = _load_or_warn(implementation, dtype) or run_reference
        return function(*arguments)

    return run


@functools.cache
def has_extension() -> bool:
    """Whether the C++ extension loads."""
    try:
        importlib.import_module("fastbert._C")
    except ImportError:
        return False  # the operations' own calls warn
    return True


def answers_with_extension() -> bool:
    """Whether C++ answers on the CPU now: for what calls it past the operators."""
    return not _state.reference_depth and has_extension()


def _load_or_warn(implementation: Implementation | None, dtype: torch.dtype) -> Callable[..., Any] | None:
    if implementation is None or dtype not in implementation.dtypes:
        return None
    try:
        return implementation.load()
    except ImportError as error:
        with _state.lock:
            first = implementation.kind not in _state.warned
            _state.warned.add(implementation.kind)
        if first:
            warnings.warn(
                f"fastbert: {_remedy(implementation, error)}. The reference in plain PyTorch answers: correct, but slow.",
                MissingBackendWarning,
                stacklevel=4,
            )
        return None


def _remedy(implementation: Implementation, error: ImportError) -> str:
    return _REMEDIES.get(implementation.kind, f"{implementation.kind} does not load ({{error}})").format(error=error)


@contextmanager
def use_reference() -> Iterator[None]:
    """Within the block the reference in plain PyTorch answers for every operation, in the whole process.

    For looking into a difference, and for tests. Compiled graphs obey it too, since they call the same operators.
    """
    with _state.lock:
        _state.reference_depth += 1
    try:
        yield
    finally:
        with _state.lock:
            _state.reference_depth -= 1


@contextmanager
def debug() -> Iterator[None]:
    """Within the block values that live on the GPU (token ids, labels, sequence boundaries) are checked, with a synchronisation.

    On CPU tensors these checks always run. On CUDA they would stop the pipeline at every call, so the kernels clamp their
    reads instead, and a wrong id gives a wrong row rather than an error: run a failing step under ``debug()`` to find it.
    """
    with _state.lock:
        _state.debug_depth += 1
    try:
        yield
    finally:
        with _state.lock:
            _state.debug_depth -= 1


def backends() -> list[BackendStatus]:
    """For each operation, device and dtype: what answers on this machine, and why. Imports what it reports on."""
    statuses = []
    for operation in OPERATIONS.values():
        for device, implementation in (("cpu", operation.cpu), ("cuda", operation.cuda)):
            for dtype in REPORTED_DTYPES:
                answer, reason = _status(device, implementation, dtype)
                statuses.append(
                    BackendStatus(operation.name, device, str(dtype).removeprefix("torch."), answer, reason)
                )
    return statuses


def _status(device: str, implementation: Implementation | None, dtype: torch.dtype) -> tuple[str, str]:
    answer, reason = _answer(implementation, dtype)
    if device == "cuda" and not torch.cuda.is_available():
        return "none", f"no CUDA device; {answer} would answer: {reason}"
    return answer, reason


def _answer(implementation: Implementation | None, dtype: torch.dtype) -> tuple[str, str]:
    if _state.reference_depth:
        return "reference", "use_reference() is in force"
    if dtype == torch.float64:
        return "reference", "float64 always goes to the reference"
    if implementation is None:
        return "reference", "no faster implementation yet"
    if dtype not in implementation.dtypes:
        return "reference", f"{implementation.kind} takes {', '.join(map(_name, implementation.dtypes))}"
    try:
        implementation.load()
    except ImportError as error:
        return "reference", _remedy(implementation, error)
    return _label(implementation), implementation.note or "fastest for this device and dtype"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _label(implementation: Implementation) -> str:
    if implementation.kind != "C++":
        return implementation.kind
    from fastbert import _C

    return f"C++ ({_C.isa()})"
