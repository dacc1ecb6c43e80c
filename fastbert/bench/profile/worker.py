"""A process a contender, and a new one for each length on CPUs: what it takes, and how it ends, is its own.

The process holds one model. It makes a batch, runs it once with an eye on its memory, times itself, compares, and profiles, as the
parent asks; it lies idle while others do. The parent watches it during the first call at a length, when nobody knows yet what that
takes, and ends it before it exceeds its share of time or memory, so that the kernel need not.

Peak memory on CPUs is the process's largest resident set during a call (VmHWM, set back before it through /proc/self/clear_refs),
minus its resident set when the model was loaded and had answered a short sequence: packed weights, code and thread stacks are in
neither, workspaces that a contender keeps are in. Where the kernel does not let VmHWM be set back, the parent's samples of VmRSS
stand in. On GPUs it is the allocator's peak minus what was allocated at that time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from fastbert.bench.profile import memory
from fastbert.bench.profile.models import Contender, ModelError, Spec
from fastbert.bench.profile.problem import Problem

_WATCH_SECONDS = 0.005
_CLOSING_SECONDS = 2.0
_WARM_UP = Problem(16, (16,))


class Stopped(Exception):
    """A contender that goes no further; the message is the reason, for a table."""


@dataclass(frozen=True)
class FirstCall:
    """What the first call at a length took."""

    seconds: float
    peak: int | None  # bytes above the loaded model; None: it cannot be told here
    total: int | None  # bytes of the process, or of the device, at the peak
    sampled: bool  # the peak is that of the parent's samples
    sample: list[Any]  # Contender.sample


class Worker:
    """The parent's end. Raises ModelError where the model cannot be made, Stopped where the process ended."""

    def __init__(self, spec: Spec, name: str, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a forked child has no thread pool
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, spec, name, threads), daemon=True)
        with _for_children():
            self._process.start()
        theirs.close()
        self._ready = False

    def wait_until_ready(self) -> None:
        if not self._ready:
            self.parameters: int = self._answer()
            self._ready = True

    def first_call(self, problem: Problem, seconds: float) -> FirstCall:
        """The first call at this length, under watch: at most so many seconds, and the memory that is free now."""
        free = memory.available()
        before = memory.resident(self._process.pid or 0)
        limit = None if free is None or before is None else before + free
        self._send("first_call", problem)
        found, highest = self._answer_under_watch(time.monotonic() + seconds, limit, seconds)
        taken, peak, total, base, sample = found
        sampled = peak is None and base is not None and highest is not None
        if sampled:
            peak, total = max(0, highest - base), highest
        return FirstCall(taken, peak, total, sampled, sample)

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method of the process, and its answer."""
        self.wait_until_ready()
        self._send(method, *arguments)
        return self._answer()

    def __call__(self) -> None:
        """One call of the model, for a timer's warm-up."""
        self.ask("time", 1)

    def _send(self, method: str, *arguments: Any) -> None:
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise self._ended() from None

    def _answer(self) -> Any:
        try:
            outcome, value = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if outcome == "answer":
            return value
        if outcome == "model":
            raise ModelError(value)
        raise Stopped(value)

    def _answer_under_watch(self, deadline: float, limit: int | None, seconds: float) -> tuple[Any, int | None]:
        highest = None
        while not self._connection.poll(_WATCH_SECONDS):
            now = memory.resident(self._process.pid or 0)
            highest = now if highest is None or now is None else max(highest, now)
            if limit is not None and now is not None and now > limit:
                self.close(kill=True)
                raise Stopped(f"out of memory: stopped at {gib(now)}, the last that was free")
            if time.monotonic() > deadline:
                self.close(kill=True)
                raise Stopped(f"> {seconds:g} s a call")
        return self._answer(), highest

    def _ended(self) -> Stopped:
        self._process.join(_CLOSING_SECONDS)
        status = self._process.exitcode
        self._connection.close()
        if status == -signal.SIGKILL:
            return Stopped("out of memory: the system ended its process")
        return Stopped(f"its process ended with status {status}")

    @property
    def alive(self) -> bool:
        return not self._connection.closed and self._process.is_alive()

    def close(self, kill: bool = False) -> None:
        if kill:
            self._process.kill()
        self._connection.close()  # at which the process ends by itself
        self._process.join(_CLOSING_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _for_children() -> Iterator[None]:
    """What processes that begin here inherit: Ctrl-C is their parent's, and torch's profiler prints nothing."""
    name = "KINETO_LOG_LEVEL"
    given = os.environ.get(name)
    os.environ[name] = given or "6"
    try:
        with without_interrupts():
            yield
    finally:
        if given is None:
            del os.environ[name]


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Ctrl-C does nothing meanwhile, here and in processes that begin here."""
    if threading.current_thread() is not threading.main_thread():  # others may set no handlers, and get no signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class WorkerClock:
    """A clock of `bench.timer` for functions that are workers: each times itself."""

    def measure(self, function: Any, calls: int) -> float:
        taken: float = function.ask("time", calls)
        return taken


def gib(size: float) -> str:
    """Bytes for a reader: "1.2 GiB", "340 MiB"."""
    if size >= 1 << 30:
        return f"{size / (1 << 30):.1f} GiB"
    return f"{size / (1 << 20):.0f} MiB" if size >= 10 << 20 else f"{size / (1 << 20):.1f} MiB"


# ---- in the process ----


def _main(connection: Connection, spec: Spec, name: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _volunteer()
    import torch

    torch.set_num_threads(threads)
    try:
        served = _Served(spec, name)
        connection.send(("answer", served.contender.parameters))
    except ModelError as error:
        connection.send(("model", str(error)))
        return
    except (MemoryError, RuntimeError) as error:
        connection.send(("stopped", _reason(error)))
        return
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = "answer", getattr(served, method)(*arguments)
        except Exception as error:  # the others go on
            reply = "stopped", _reason(error)
        try:
            connection.send(reply)
        except OSError:
            return


def _volunteer() -> None:
    """If memory runs out all the same, the kernel shall take this process."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        pass


def _reason(error: BaseException) -> str:
    import torch

    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory: {lines[0]}"[:160]
    return f"{type(error).__name__}: {lines[0]}"[:160]


class _Served:
    """What the parent may ask for."""

    def __init__(self, spec: Spec, name: str) -> None:
        from fastbert.bench.timer import clock_for

        self.contender = Contender(spec, name)
        self._cuda = spec.device.startswith("cuda")
        self._device = spec.device
        self.contender.take(_WARM_UP)
        self.contender.call()
        self._clock = clock_for(spec.device)
        self._settle()
        self._base = self._now()

    def _now(self) -> int | None:
        if self._cuda:
            import torch

            return torch.cuda.memory_allocated(self._device)
        return memory.resident()

    def _settle(self) -> None:
        """Nothing of an earlier length is left, but what the contender itself keeps."""
        self.contender.model.zero_grad(set_to_none=True)
        memory.trim()
        if self._cuda:
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def first_call(self, problem: Problem) -> tuple[float, int | None, int | None, int | None, list[Any]]:
        """(seconds, peak above the loaded model, peak, what the loaded model has, sample)."""
        self.contender.take(problem)
        self._settle()
        hidden, seconds, highest = self._peak()
        peak = None if highest is None or self._base is None else max(0, highest - self._base)
        sample = self.contender.sample(hidden)
        del hidden
        self._settle()
        return seconds, peak, highest, self._base, [each.numpy() for each in sample]

    def _peak(self) -> tuple[Any, float, int | None]:
        if not self._cuda:
            known = memory.reset_peak()
            start = time.perf_counter()
            hidden = self.contender.call()
            seconds = time.perf_counter() - start
            return hidden, seconds, memory.resident(field="VmHWM") if known else None
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        hidden = self.contender.call()
        torch.cuda.synchronize(self._device)
        return hidden, time.perf_counter() - start, torch.cuda.max_memory_allocated(self._device)

    def exact(self) -> list[Any]:
        found = [each.numpy() for each in self.contender.exact()]
        self._settle()
        return found

    def time(self, calls: int) -> float:
        return self._clock.measure(self.contender.call, calls)

    def free(self) -> int | None:
        """Bytes of the device that are free, where it has memory of its own."""
        if not self._cuda:
            return None
        import torch

        return int(torch.cuda.mem_get_info(self._device)[0])

    def operations(self, problem: Problem, trace: str | None) -> Any:
        from fastbert.bench.profile.operations import profile_operations

        self.contender.take(problem)
        return profile_operations(self.contender, trace)
