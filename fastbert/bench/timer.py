"""Timing that a drifting machine cannot bend: the contenders of a case run in turn, round after round.

A round takes one sample of every contender, in an order that rotates from round to round. What slows the machine for a second slows
all of them, so the quotient of two samples of one round is steadier than either. Medians, quartiles and the ratios' range are
reported; no winner is claimed when that range contains 1.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

MIN_SAMPLE_SECONDS = 2e-3  # far above the clock's resolution and the interpreter's loop overhead
SETTLED_SAMPLE_SECONDS = 30e-3  # of short calls in a row, as a server makes them: none but the first finds cold caches
MIN_ROUNDS = 3
MAX_ROUNDS = 200
_CALIBRATIONS = (
    3  # measurements of a number of calls; the fastest counts, lest an interruption pass for a slow function
)
RANGE_SHARE = 0.8  # a range holds this central share of the rounds: one interrupted sample must not decide it
_FLUSH_BYTES = (
    256 << 20
)  # several times the largest L2 cache of the GPUs that we know (50 MiB on H100, 126 MiB on B200)


@dataclass(frozen=True)
class Spread:
    """A median with the values around it."""

    median: float
    q1: float
    q3: float
    low: float  # low..high: the central RANGE_SHARE of the samples; all of them when there are fewer than ten
    high: float

    @property
    def straddles_one(self) -> bool:
        return self.low <= 1.0 <= self.high

    @property
    def relative(self) -> float:
        """Half of the interquartile range as a share of the median: the ± of a table."""
        return 0.5 * (self.q3 - self.q1) / self.median if self.median > 0.0 else math.inf


def spread(samples: Sequence[float]) -> Spread:
    """Median, quartiles and range of at least one sample."""
    ordered = sorted(samples)
    count = len(ordered)
    if count == 0:
        raise ValueError("spread of no samples")

    def quantile(share: float) -> float:
        at = share * (count - 1)
        below = math.floor(at)
        above = min(below + 1, count - 1)
        return ordered[below] + (at - below) * (ordered[above] - ordered[below])

    cut = int(count * (1.0 - RANGE_SHARE) / 2.0 + 1e-9)  # the epsilon: 10 * 0.1 is one sample, whatever floats say
    return Spread(quantile(0.5), quantile(0.25), quantile(0.75), ordered[cut], ordered[count - 1 - cut])


class Clock(Protocol):
    def measure(self, function: Callable[[], object], calls: int) -> float:
        """Seconds that `calls` calls of `function` take together."""
        ...


class CpuClock:
    """The wall clock. `now` is an argument for tests."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def measure(self, function: Callable[[], object], calls: int) -> float:
        start = self._now()
        for _ in range(calls):
            function()
        return self._now() - start


class CudaClock:
    """CUDA events around each call; between two calls a buffer larger than the L2 cache is written."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        self._device = device

    def measure(self, function: Callable[[], object], calls: int) -> float:
        with torch.cuda.device(self._device):
            starts = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
            for start, end in zip(starts, ends, strict=True):
                # The flush also keeps the queue full, so that launch overhead of the host hides behind it.
                self._flush.zero_()
                start.record()
                function()
                end.record()
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) * 1e-3


def clock_for(device: torch.device | str) -> Clock:
    device = torch.device(device)
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timing:
    """What `measure` found, by contender."""

    seconds: dict[str, Spread]  # of one call
    ratios: dict[
        str, Spread
    ]  # baseline's sample / this contender's sample of the same round; > 1: faster than the baseline
    calls: dict[str, int]  # calls that make one sample
    rounds: int
    interrupted: bool  # Ctrl-C ended it early


def measure(
    contenders: Mapping[str, Callable[[], object]],
    baseline: str | None,
    *,
    budget_seconds: float,
    clock: Clock,
    min_sample_seconds: float = MIN_SAMPLE_SECONDS,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    settle_seconds: float = 0.0,
    now: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Timing:
    """Time all contenders in turn until the budget is spent, at least `min_rounds` rounds.

    With settle_seconds nothing runs for so long before each sample: threads of another contender's pool go on spinning after
    their work, up to 0.2 s (OpenMP of LLVM and Intel), and would take a core from the next one. As many calls as a sample has
    then wake its own, and a sample lasts at least SETTLED_SAMPLE_SECONDS.

    Ctrl-C after the first complete round ends the measurement and keeps the complete rounds; before that it propagates.
    `baseline` None or not among the contenders: no ratios.
    """
    if not contenders:
        raise ValueError("nothing to measure")
    if settle_seconds:
        min_sample_seconds = max(min_sample_seconds, SETTLED_SAMPLE_SECONDS)
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    calls = {}
    interrupted = False
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = now()
        for name in names:
            calls[name] = _calibrate(contenders[name], clock, min_sample_seconds)
        rounds = 0
        while rounds < max_rounds and (rounds < min_rounds or now() - start < budget_seconds):
            first = rounds % len(names)
            this_round = {}
            try:
                for name in names[first:] + names[:first]:
                    function = contenders[name]
                    if settle_seconds:
                        sleep(settle_seconds)
                    # Not timed: brings back the caches that the other contenders have emptied.
                    for _ in range(calls[name] if settle_seconds else min(calls[name] - 1, 1)):
                        function()
                    this_round[name] = clock.measure(function, calls[name]) / calls[name]
            except KeyboardInterrupt:
                if rounds == 0:
                    raise
                interrupted = True
                break
            for name, sample in this_round.items():
                samples[name].append(sample)
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    ratios = {}
    if baseline is not None and baseline in contenders:
        for name in names:
            pairs = zip(samples[baseline], samples[name], strict=True)
            ratios[name] = spread([theirs / ours if ours > 0.0 else math.inf for theirs, ours in pairs])
    return Timing({name: spread(samples[name]) for name in names}, ratios, calls, rounds, interrupted)


def _calibrate(function: Callable[[], object], clock: Clock, min_sample_seconds: float) -> int:
    """How many calls last `min_sample_seconds`. Its calls are the warm-up."""
    took = clock.measure(function, 1)  # may compile, pack weights, fault pages: says nothing yet
    if took > 50.0 * min_sample_seconds:
        return 1
    calls = 1
    while True:
        took = min(clock.measure(function, calls) for _ in range(_CALIBRATIONS))
        if took >= min_sample_seconds:
            return calls
        wanted = calls * min_sample_seconds / took if took > 0.0 else calls * 10.0
        # A tenth more than the estimate, so that the loop ends; at most tenfold, for the first estimates are poor.
        calls = max(calls + 1, min(math.ceil(1.1 * wanted), calls * 10))
