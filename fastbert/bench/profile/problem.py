"""What is asked for: lengths, batches, padding, and the operations that their real tokens need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def parse_lengths(text: str) -> list[int]:
    """ "128..2048" (doubling, with the last one) and "128,384,512", mixed too: ascending, each once. Raises ValueError."""
    lengths: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        start = _length(first)
        if not dots:
            lengths.add(start)
            continue
        end = _length(last)
        if end < start:
            raise ValueError(f"{part.strip()} runs backwards; the smaller length comes first")
        while start < end:
            lengths.add(start)
            start *= 2
        lengths.add(end)
    return sorted(lengths)


def _length(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{text.strip()!r} is no length; expected numbers as in 128..2048 or 128,384,512") from None
    if value < 1:
        raise ValueError(f"{value} is no length; expected at least 1")
    return value


def spread_lengths(batch: int, seq: int, padding: float) -> list[int]:
    """Lengths of the batch's sequences, evenly spread, whose padding to `seq` is this share of all positions.

    The last one is seq long wherever a batch with so much padding can hold a full sequence.
    """
    if padding == 0.0:
        return [seq] * batch
    real = (1.0 - padding) * batch * seq
    if batch == 1:
        return [max(1, round(real))]
    if real >= 0.5 * batch * seq:
        low, high, count, full = 2.0 * real / batch - seq, float(seq), batch, []
    elif real > seq + batch:
        mean = (real - seq) / (batch - 1)
        low, high, count, full = 1.0, 2.0 * mean - 1.0, batch - 1, [seq]
    else:
        mean = real / batch
        low, high, count, full = 1.0, max(1.0, 2.0 * mean - 1.0), batch, []
    step = (high - low) / max(1, count - 1)
    return [max(1, round(low + i * step)) for i in range(count)] + full


@dataclass(frozen=True)
class Problem:
    """A batch: `batch` sequences of these lengths, padded on the right to `seq`."""

    seq: int
    lengths: tuple[int, ...]

    @staticmethod
    def of(batch: int, seq: int, padding: float) -> Problem:
        return Problem(seq, tuple(spread_lengths(batch, seq, padding)))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Real ones."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Architecture:
    """The numbers of a model that its operations follow from."""

    family: str  # config.json's model_type
    layers: int
    hidden: int
    heads: int
    inner: int  # the feed-forward part's width
    vocabulary: int
    causal: bool
    positions: int | None  # the longest sequence; None: as long as asked for

    @property
    def weights(self) -> int:
        """Elements of the large ones: of the layers, and the table of words."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.inner) + self.vocabulary * self.hidden

    def flops(self, lengths: Sequence[int], training: bool) -> int:
        """Of the layers' matrix products on real tokens: linear layers, and visible query-key pairs. Backward is two more."""
        tokens = sum(lengths)
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in lengths)
        linear = 2 * tokens * (4 * self.hidden**2 + 2 * self.hidden * self.inner)
        return self.layers * (linear + 4 * pairs * self.hidden) * (3 if training else 1)
