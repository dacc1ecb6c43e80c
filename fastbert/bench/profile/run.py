"""Length after length, contender after contender: call once under watch, compare, time in turn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastbert.bench import limits
from fastbert.bench.cases import errors_of
from fastbert.bench.profile import memory
from fastbert.bench.profile.fit import fit_quadratic
from fastbert.bench.profile.models import CONTENDERS, DTYPES, EAGER, OURS, SDPA, ModelError, Spec
from fastbert.bench.profile.operations import Breakdown
from fastbert.bench.profile.problem import Architecture, Problem
from fastbert.bench.profile.result import DROPPED, OK, WRONG, Measurement, Point
from fastbert.bench.profile.worker import FirstCall, Stopped, Worker, WorkerClock, gib, without_interrupts
from fastbert.bench.timer import Timing, clock_for, measure

BASELINE = SDPA
_PRODUCT = "product"
_PRODUCTS = 20
#: Operations of a call up to which it is repeated in float64, which takes several times as long.
_EXACT_FLOPS = 2e10
#: Largest error that passes, as a share of the largest value: through all layers, and back. float32 sums in another order;
#: bfloat16 rounds at every operation (transformers' own is off by 2e-2 on BERT-base). Two contenders may differ by twice as much.
_TOLERANCES = {"fp32": 2e-5, "bf16": 1e-1}
_RECENT = 3  # lengths from which the next one is predicted: what grows faster shows in the last ones


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    spec: Spec
    architecture: Architecture
    lengths: list[int]
    batch: int | None  # sequences; or
    tokens: int | None  # positions in all, padding included: batch = tokens / length, at least 1
    padding: float
    budget_seconds: float  # of timing, a length
    time_limit: float  # seconds that a call may take
    threads: int
    breakdown: bool = True
    trace: str | None = None

    def problem(self, seq: int) -> Problem:
        batch = self.batch if self.tokens is None else max(1, self.tokens // seq)
        assert batch is not None
        return Problem.of(batch, seq, self.padding)


@dataclass
class Outcome:
    """What was measured until now; whole at every moment."""

    points: list[Point] = field(default_factory=list)
    breakdowns: list[Breakdown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parameters: int | None = None
    interrupted: bool = False


def run_plan(plan: Plan, before: Callable[[str], None] = lambda what: None) -> Outcome:
    """Everything; Ctrl-C ends it, and what was measured until then is returned.

    `before` is told what comes. Raises ModelError where fastbert or transformers cannot take the model.
    """
    outcome = Outcome()
    profiler = _Profiler(plan, outcome, before)
    try:
        profiler.run()
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        with without_interrupts():  # one is sometimes sent twice, and a second must not cost what the first one kept
            profiler.close()
    return outcome


def steps(plan: Plan) -> int:
    """How often `before` is called."""
    return 1 + len(plan.lengths) * (len(CONTENDERS) + 1) + plan.breakdown * 2 + (plan.trace is not None)


class _Product:
    """The limit, timed in turn with the workers as if it were one, so that a drifting machine hits it alike."""

    def __init__(self, spec: Spec) -> None:
        self._product, self._flops = limits.product(DTYPES[spec.dtype], spec.device)
        self._clock = clock_for(spec.device)
        self._times = 1

    def fit(self, flops: int) -> int:
        """From now on a call has about so many operations, that it may find its pace as a model's does; at most _PRODUCTS products.

        Returns how many they are.
        """
        self._times = min(_PRODUCTS, max(1, flops // self._flops))
        return self._times * self._flops

    def __call__(self) -> None:
        for _ in range(self._times):
            self._product()

    def ask(self, method: str, calls: int) -> float:
        return self._clock.measure(self, calls)


class _Profiler:
    def __init__(self, plan: Plan, outcome: Outcome, before: Callable[[str], None]) -> None:
        self._plan, self._outcome, self._before = plan, outcome, before
        self._workers: dict[str, Worker] = {}
        self._dropped: dict[str, tuple[int, str]] = {}  # contender → length, reason
        self._seen: dict[str, list[tuple[Problem, FirstCall]]] = {name: [] for name in CONTENDERS}

    def run(self) -> None:
        plan, outcome = self._plan, self._outcome
        self._before("loading")
        self._check_weights()
        self._product = _Product(plan.spec)
        for seq in plan.lengths:
            if len(self._dropped) == len(CONTENDERS):
                break
            self._start(seq)
            self._length(plan.problem(seq))
            if outcome.interrupted:
                return
        if plan.breakdown:
            self._break_down()
        if plan.trace is not None:
            self._trace(plan.trace)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close(kill=True)

    def _check_weights(self) -> None:
        """Raises ModelError where the processes together will not hold the model."""
        free = memory.available()
        # In each it exists twice: when it is made, and packed by fastbert.
        needed = 2 * len(CONTENDERS) * self._plan.architecture.weights * torch.float32.itemsize
        if free is not None and needed > free:
            raise ModelError(
                f"{len(CONTENDERS)} processes with the model {self._plan.spec.model} need about {gib(needed)} of memory, and "
                f"{gib(free)} are free; choose fewer --layers"
            )

    # ---- a length ----

    def _start(self, seq: int) -> None:
        """A process for every contender still there.

        A new one for each length on CPUs: what a heap keeps of shorter sequences, and how it is cut up, would count as this one's
        (half as much again, measured for SDPA). A GPU's allocator is emptied and asked what it gave out.
        """
        names = [name for name in CONTENDERS if name not in self._dropped]
        if self._workers and self._plan.spec.device.startswith("cuda"):
            return
        self.close()
        for name in names:  # side by side
            self._workers[name] = Worker(self._plan.spec, name, self._plan.threads)
        for name in names:
            try:
                self._workers[name].wait_until_ready()
                if name == OURS:
                    self._outcome.parameters = self._workers[name].parameters
            except Stopped as stopped:
                self._dropped[name] = seq, str(stopped)
            except ModelError as error:
                if not self._outcome.points:
                    raise  # it was never right; later, what was measured is kept
                self._dropped[name] = seq, str(error)

    def _length(self, problem: Problem) -> None:
        calls: dict[str, FirstCall] = {}
        for name in CONTENDERS:
            self._before(f"{problem.batch}×{problem.seq}: {name}")
            if name in self._dropped:
                continue
            try:
                self._expect(name, problem)
                calls[name] = self._workers[name].first_call(problem, self._plan.time_limit)
                self._seen[name].append((problem, calls[name]))
            except Stopped as stopped:
                self._dropped[name] = problem.seq, str(stopped)
        flops = self._plan.architecture.flops(problem.lengths, self._plan.spec.training)
        checks = self._check(calls, exactly=flops <= _EXACT_FLOPS)
        timed: dict[str, Any] = {name: self._workers[name] for name in calls if checks[name].status == OK}
        self._before(f"{problem.batch}×{problem.seq}: timing")
        product_flops = self._product.fit(flops)
        timing = Timing({}, {}, {}, 0, False)
        if timed:
            try:
                everyone = {**timed, _PRODUCT: self._product}
                timing = measure(everyone, BASELINE, budget_seconds=self._plan.budget_seconds, clock=WorkerClock())
            except Stopped as stopped:  # unheard of after a first call: nobody knows whose, all else is kept
                self._outcome.notes.append(f"at length {problem.seq} nothing was timed: {stopped}")
        self._outcome.interrupted = timing.interrupted
        product = timing.seconds.get(_PRODUCT)
        rate = None if product is None else product_flops / product.median
        self._outcome.points.append(self._point(problem, flops, rate, calls, checks, timing))

    def _expect(self, name: str, problem: Problem) -> None:
        """Raises Stopped where the call will take more than there is."""
        needed, seconds = self._predict(name, problem)
        worker = self._workers[name]
        free = worker.ask("free") if self._plan.spec.device.startswith("cuda") else memory.available()
        if needed is not None and free is not None and needed > free:
            raise Stopped(f"out of memory: needs about {gib(needed)}, {gib(free)} free")
        if seconds is not None and seconds > self._plan.time_limit:
            raise Stopped(f"> {self._plan.time_limit:g} s a call: about {seconds:.0f} s")

    def _predict(self, name: str, problem: Problem) -> tuple[float | None, float | None]:
        """(bytes, seconds) of the next call, from those at shorter lengths; what it needs at least where there are none."""
        seen = self._seen[name]
        if len(seen) < 2:
            return (self._scores(problem) if name == EAGER else None), None
        found = []
        for pick in (lambda call: call.peak, lambda call: call.seconds):
            values = [(float(p.seq), pick(call) / p.batch) for p, call in seen[-_RECENT:] if pick(call)]
            parts = fit_quadratic(values)
            found.append(None if parts is None else parts.at(problem.seq) * problem.batch)
        return found[0], found[1]

    def _scores(self, problem: Problem) -> float:
        """Bytes of eager attention's logits and probabilities of a layer, which exist together; in training those of all layers."""
        layers = self._plan.architecture.layers if self._plan.spec.training else 1
        elements = problem.batch * self._plan.architecture.heads * problem.seq**2
        return float(2 * layers * elements * DTYPES[self._plan.spec.dtype].itemsize)

    # ---- right or wrong ----

    def _check(self, calls: Mapping[str, FirstCall], exactly: bool) -> dict[str, Measurement]:
        """Contender → status, error, tolerance: against float64, or against SDPA."""
        samples = {name: _tensors(call.sample) for name, call in calls.items()}
        tolerance = _TOLERANCES[self._plan.spec.dtype]
        exact = None
        if SDPA in calls and exactly:
            try:
                exact = _tensors(self._workers[SDPA].ask("exact"))
            except Stopped as stopped:
                self._outcome.notes.append(f"no check against float64: {stopped}")
        if exact is not None:
            return {
                name: _checked(name, errors_of(sample, exact), tolerance, "float64") for name, sample in samples.items()
            }
        checks = {name: Measurement(name, OK) for name in calls}
        if SDPA in calls:
            for name in calls.keys() - {SDPA}:
                errors = errors_of(samples[name], samples[SDPA])
                checks[name] = _checked(name, errors, 2.0 * tolerance, SDPA)
        return checks

    def _point(
        self,
        problem: Problem,
        flops: int,
        rate: float | None,
        calls: Mapping[str, FirstCall],
        checks: Mapping[str, Measurement],
        timing: Timing,
    ) -> Point:
        contenders = []
        for name in CONTENDERS:
            if name not in calls:
                seq, reason = self._dropped[name]
                where = "" if seq == problem.seq else f"at {seq}: "
                contenders.append(Measurement(name, DROPPED, where + reason))
                continue
            seconds, call = timing.seconds.get(name), calls[name]
            contenders.append(
                dataclasses.replace(
                    checks[name],
                    seconds=seconds,
                    ratio=timing.ratios.get(name),
                    calls=timing.calls.get(name, 0),
                    peak_bytes=call.peak,
                    total_bytes=call.total,
                    peak_sampled=call.sampled,
                    limit_share=None if seconds is None or rate is None else flops / seconds.median / rate,
                )
            )
        return Point(problem.seq, problem.batch, problem.tokens, flops, rate, timing.rounds, contenders)

    # ---- inside a call ----

    def _longest(self, *names: str) -> int | None:
        """The longest length at which all of these were measured."""
        lengths = []
        for point in self._outcome.points:
            found = [point.of(name) for name in names]
            if all(each is not None and each.seconds is not None for each in found):
                lengths.append(point.seq)
        return max(lengths, default=None)

    def _break_down(self) -> None:
        seq = self._longest(OURS, SDPA)
        for name in (OURS, SDPA):
            self._before(f"{name} by operation")
            if seq is not None:
                self._profile(name, seq, None)

    def _trace(self, target: str) -> None:
        self._before("trace")
        seq = self._longest(OURS)
        if seq is None:
            self._outcome.notes.append("no trace: no length was measured")
        else:
            written = self._profile(OURS, seq, target)
            self._outcome.notes.append(
                f"the trace is of a call at length {seq}" if written else f"no trace was written to {target}"
            )

    def _profile(self, name: str, seq: int, trace: str | None) -> bool:
        """Whether it was."""
        try:
            if not self._workers[name].alive:  # ended at a longer one
                self._workers[name] = Worker(self._plan.spec, name, self._plan.threads)
            found = self._workers[name].ask("operations", self._plan.problem(seq), trace)
        except (Stopped, ModelError) as stopped:
            self._outcome.notes.append(f"{name} was not broken down: {stopped}")
            return False
        if trace is None:
            self._outcome.breakdowns.append(Breakdown(name, seq, *found))
        return True


def _tensors(sample: list[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(each)) for each in sample]


def _checked(name: str, errors: list[float], tolerance: float, against: str) -> Measurement:
    error = max(errors)
    if error <= tolerance:
        return Measurement(name, OK, "", error, tolerance, against)
    if not math.isfinite(error):
        return Measurement(name, WRONG, "its result is not finite", None, tolerance, against)
    reason = f"its difference from {against}, {error:.1e}, exceeds the tolerance {tolerance:.1e}"
    return Measurement(name, WRONG, reason, error, tolerance, against)
