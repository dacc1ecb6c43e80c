"""On paper: what every kernel computes and moves, and how long a GPU needs for it at least.

`python -m fastbert.bench.floors` prints the estimates that the kernels' launch configurations were chosen by: attention's and
decoding's, whose works stand here, and those of the training suites' problems, which state their own. A floor takes
all of a kernel's products, exponentials and bytes to overlap perfectly; "in turn" takes products and exponentials to follow
each other, as they do where a multiprocessor has a single program (Shah et al., "FlashAttention-3", 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

_LOG_SUM_EXP = 4  # bytes of a row's statistic, float32


@dataclass(frozen=True)
class Gpu:
    """Rates a second."""

    bytes: float
    flops: float  # of 16-bit matrix products
    exponentials: float


#: Measured: a copy, and an 8192³ bf16 product of random matrices. The special function units of a multiprocessor make 16
#: exponentials a cycle (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"): 132 · 16 · 1.75 GHz.
H200 = Gpu(bytes=4.3e12, flops=790e12, exponentials=132 * 16 * 1.75e9)


@dataclass(frozen=True)
class Work:
    """What a kernel computes and moves."""

    flops: float = 0
    exponentials: float = 0
    bytes: float = 0
    added_bytes: float = 0  # by atomic additions, in the L2 cache: not in the floor

    def floor(self, gpu: Gpu) -> float:
        """Seconds, everything overlapped."""
        return max(self.flops / gpu.flops, self.exponentials / gpu.exponentials, self.bytes / gpu.bytes)

    def in_turn(self, gpu: Gpu) -> float:
        """Seconds, exponentials after products, or the bytes if they take longer."""
        return max(self.flops / gpu.flops + self.exponentials / gpu.exponentials, self.bytes / gpu.bytes)


@dataclass(frozen=True)
class Attention:
    """Self-attention of `tokens` tokens in all, whose queries and keys make `pairs` visible pairs: the work of its kernels."""

    tokens: int
    pairs: int
    heads: int
    head_dim: int
    element_size: int = 2  # bytes

    def _tensors(self, count: float, element_size: int = 0) -> float:
        """Bytes of `count` tensors of q's shape."""
        return count * self.tokens * self.heads * self.head_dim * (element_size or self.element_size)

    def _rows(self, count: int) -> float:
        return count * self.tokens * self.heads * _LOG_SUM_EXP

    def _products(self, count: int) -> float:
        return count * 2 * self.pairs * self.heads * self.head_dim

    def forward(self) -> Work:
        """q, k, v in, out and the log-sum-exp out."""
        return Work(self._products(2), self.pairs * self.heads, self._tensors(4) + self._rows(1))

    def backward_whole(self) -> Work:
        """One program has all keys of a head: q, k, v, out, dout and lse in, dq, dk, dv out."""
        return Work(self._products(5), self.pairs * self.heads, self._tensors(8) + self._rows(1))

    def backward_add(self, block_n: int = 128) -> tuple[Work, ...]:
        """delta and zeros; one kernel, whose blocks of `block_n` keys add to dq in float32; the cast of that sum."""
        added = self.pairs / block_n * self.heads * self.head_dim * 4
        return (
            Work(bytes=self._tensors(2) + self._tensors(1, 4) + self._rows(1)),
            Work(
                self._products(5),
                self.pairs * self.heads,
                self._tensors(6) + self._tensors(1, 4) + self._rows(2),
                added,
            ),
            Work(bytes=self._tensors(1, 4) + self._tensors(1) + self._rows(1)),
        )

    def backward_two_passes(self) -> tuple[Work, ...]:
        """dq and delta, three products; dk and dv, four: logits and dp twice."""
        return (
            Work(self._products(3), self.pairs * self.heads, self._tensors(6) + self._rows(2)),
            Work(self._products(4), self.pairs * self.heads, self._tensors(6) + self._rows(2)),
        )

    def mask_gradient(self) -> Work:
        """dlogit once more, for the sum over what the mask is broadcast over; without the mask itself."""
        return Work(self._products(2), self.pairs * self.heads, self._tensors(4) + self._rows(2))


def decode(batch: int, keys: int, kv_heads: int, head_dim: int, group: int = 1, element_size: int = 2) -> Work:
    """One query a sequence and head against `keys` cached ones: the cache is read once for the heads that share it."""
    heads = kv_heads * group
    return Work(
        4 * batch * heads * keys * head_dim,
        batch * heads * keys,
        2 * batch * keys * kv_heads * head_dim * element_size,
    )


def table() -> str:
    """The estimates on H200, 16384 tokens in 16 bits: every operation of the training suites, then attention of 1024 features."""
    from fastbert.bench.suites import elementwise, losses  # whose problems have a Work of this module

    lines = [f"{'kernels':60} {'GFLOP':>8} {'Gexp':>6} {'MB':>6} {'added':>6} {'floor us':>9} {'in turn us':>10}"]
    for problem in (*elementwise.PROBLEMS, *losses.PROBLEMS):
        name = f"{problem.operation} {problem.title}"
        lines.append(_line(name, (problem.forward,)))
        lines.append(_line(f"{name}, backward", (problem.backward,)))
    tokens = 16384
    for head_dim in (64, 128):
        for length in (128, 256, 512, 1024, 4096, 16384):
            case = Attention(tokens, tokens * length, 1024 // head_dim, head_dim)
            ways: dict[str, tuple[Work, ...]] = {"forward": (case.forward(),)}
            if length <= 256 and head_dim == 64:
                ways["backward, whole"] = (case.backward_whole(),)
            else:
                ways["backward, added dq"] = case.backward_add(block_n=128 if head_dim == 64 else 64)
                ways["backward, two passes"] = case.backward_two_passes()
            ways["gradient of a mask"] = (case.mask_gradient(),)
            lines += [
                _line(f"attention, head_dim {head_dim}, length {length}, {way}", kernels)
                for way, kernels in ways.items()
            ]
    lines.append(_line("decode, head_dim 128, 16 sequences of 8192", (decode(16, 8192, 8, 128, group=4),)))
    return "\n".join(lines)


def _line(name: str, kernels: tuple[Work, ...]) -> str:
    flops, exponentials = sum(k.flops for k in kernels), sum(k.exponentials for k in kernels)
    moved, added = sum(k.bytes for k in kernels), sum(k.added_bytes for k in kernels)
    seconds = sum(k.floor(H200) for k in kernels), sum(k.in_turn(H200) for k in kernels)
    return (
        f"{name:60} {flops / 1e9:8.0f} {exponentials / 1e9:6.2f} {moved / 1e6:6.0f} {added / 1e6:6.0f} "
        f"{seconds[0] * 1e6:9.1f} {seconds[1] * 1e6:10.1f}"
    )


if __name__ == "__main__":
    print(table())
