"""RMS norm (Zhang and Sennrich 2019), forward and backward: layer norm's kernels without the mean (_norm.py).

x_hat = x * rstd;  y = x_hat * weight;  rstd = 1 / sqrt(mean_w(x^2) + eps)

wdy = weight * grad_y
dx = rstd * (wdy - x_hat * mean_w(wdy * x_hat));  dweight = sum_rows(grad_y * x_hat)
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import AotCase
from fastbert.kernels._norm import norm_forward
from fastbert.kernels._norm_backward import norm_backward
from fastbert.kernels._rows import DTYPE_NAMES, meta_tensor


def rms_norm(
    x: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """y like x, contiguous; rstd float32 [...], or [0] without `save_stats`.

    Raises ValueError for a width above 65536 or a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    y, _, _, rstd = norm_forward(
        "rms_norm", x, None, None, weight, None, eps, 0.0, None, 0, save_stats, False, centred=False
    )
    return y, rstd


def rms_norm_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    rstd: Tensor,  # float32 [...]
    weight: Tensor | None,  # [width]
    needs: Sequence[bool],  # dx, dweight
) -> tuple[Tensor, Tensor]:
    """dx like x; dweight float32 [width]; [0] for what is not needed. Raises as `rms_norm` does."""
    needs_dx, needs_dweight = needs
    dx, _, _, dweight, _ = norm_backward(
        "rms_norm_backward", grad_y, None, x, None, rstd, weight, 0.0, None, 0,
        needs_d_sum=needs_dx, needs_dx=False, needs_sums=(needs_dweight, False, False),
    )  # fmt: skip
    return dx, dweight


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the tables, each dtype and alignment."""
    for width in sorted({768} | _configs.row_tile_widths("rms_norm", "rms_norm_backward")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for aligned in (True, False):
                yield from _aot_cases(width if aligned else width - 1, dtype, aligned)


def _aot_cases(width: int, dtype: torch.dtype, aligned: bool) -> Iterator[AotCase]:
    x, weight = (meta_tensor(*shape, dtype=dtype, aligned=aligned) for shape in ((64, width), (width,)))
    rstd = meta_tensor(64, dtype=torch.float32)
    calls: dict[str, Callable[[], object]] = {
        "rms_norm": lambda: rms_norm(x, weight, 1e-6, True),
        "rms_norm_backward": lambda: rms_norm_backward(x, x, rstd, weight, (True, True)),
    }
    for name, call in calls.items():
        parts = [name, f"w{width}", DTYPE_NAMES[dtype], "" if aligned else "unaligned"]
        sample = dtype is torch.float16 if width == 767 else width == 768 and dtype is torch.bfloat16
        yield AotCase("-".join(filter(None, parts)), call, sample)
