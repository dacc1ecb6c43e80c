"""Layer norm, and residual + bias + dropout + layer norm: forward and backward.

    sum = residual + dropout(x + x_bias)        (layer_norm alone: sum = x)
    x_hat = (sum - mean) * rstd;  y = x_hat * weight + bias;  rstd = 1 / sqrt(var + eps)

    wdy = weight * grad_y
    d_sum = rstd * (wdy - mean_w(wdy) - x_hat * mean_w(wdy * x_hat)) + grad_sum
    d_residual = d_sum;  dx = dropout's mask and scale applied to d_sum;  dx_bias = sum_rows(dx)
    dweight = sum_rows(grad_y * x_hat);  dbias = sum_rows(grad_y)

The kernels stand in _norm.py and _norm_backward.py.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastbert.kernels import _configs
from fastbert.kernels._launch import AotCase
from fastbert.kernels._norm import norm_forward
from fastbert.kernels._norm_backward import norm_backward
from fastbert.kernels._rows import DTYPE_NAMES, meta_tensor


def layer_norm(
    x: Tensor,  # [..., width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, contiguous; mean and rstd float32 [...], or [0] without `save_stats`.

    Raises ValueError for a width above 65536 or a tensor that is not on the kernels' device, TypeError for a dtype.
    """
    y, _, mean, rstd = norm_forward("layer_norm", x, None, None, weight, bias, eps, 0.0, None, 0, save_stats, False)
    return y, mean, rstd


def add_layer_norm(
    x: Tensor,  # [..., width]
    residual: Tensor,  # [..., width]
    x_bias: Tensor | None,  # [width]
    weight: Tensor | None,  # [width]
    bias: Tensor | None,  # [width]
    eps: float,
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]; not read when dropout_p == 0
    offset: int,  # the stream index of the first element, a multiple of 4
    save_stats: bool,
    save_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = layer_norm(sum), sum = residual + dropout(x + x_bias), both like x, contiguous; mean, rstd as `layer_norm`'s.

    Without `save_sum` the sum is [0]. y comes from the unrounded float32 sum. Raises as `layer_norm` does, and ValueError
    for a bad dropout_p, seed or offset.
    """
    return norm_forward(
        "add_layer_norm", x, residual, x_bias, weight, bias, eps, dropout_p, seed, offset, save_stats, save_sum
    )


def layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    x: Tensor,  # [..., width]
    mean: Tensor,  # float32 [...]
    rstd: Tensor,  # float32 [...]
    weight: Tensor | None,  # [width]
    needs: Sequence[bool],  # dx, dweight, dbias
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight and dbias float32 [width]; [0] for what is not needed. Raises as `layer_norm` does."""
    needs_dx, needs_dweight, needs_dbias = needs
    dx, _, _, dweight, dbias = norm_backward(
        "layer_norm_backward", grad_y, None, x, mean, rstd, weight, 0.0, None, 0,
        needs_d_sum=needs_dx, needs_dx=False, needs_sums=(needs_dweight, needs_dbias, False),
    )  # fmt: skip
    return dx, dweight, dbias


def add_layer_norm_backward(
    grad_y: Tensor,  # [..., width]
    grad_sum: Tensor | None,  # [..., width]
    sum: Tensor,  # [..., width]
    mean: Tensor,  # float32 [...]
    rstd: Tensor,  # float32 [...]
    weight: Tensor | None,  # [width]
    dropout_p: float,
    seed: Tensor | None,  # int64 [1]; not read when dropout_p == 0
    offset: int,
    needs: Sequence[bool],  # x, residual, x_bias, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx and dresidual like sum; dx_bias, dweight and dbias float32 [width]; [0] for what is not needed.

    Without dropout dx equals dresidual: then dx is always [0], and dresidual is written if x or residual needs it.
    Raises as `add_layer_norm` does.
    """
    needs_x, needs_residual, needs_dx_bias, needs_dweight, needs_dbias = needs
    dropout = dropout_p != 0.0
    d_sum, dx, dx_bias, dweight, dbias = norm_backward(
        "add_layer_norm_backward", grad_y, grad_sum, sum, mean, rstd, weight, dropout_p, seed, offset,
        needs_d_sum=needs_residual or (needs_x and not dropout), needs_dx=needs_x and dropout,
        needs_sums=(needs_dweight, needs_dbias, needs_dx_bias),
    )  # fmt: skip
    return dx, d_sum, dx_bias, dweight, dbias


def aot_cases() -> Iterator[AotCase]:
    """What is compiled ahead of time: every line of the tables, usual widths, each dtype and alignment."""
    operations = [norm + way for norm in ("layer_norm", "add_layer_norm") for way in ("", "_backward")]
    for width in sorted({64, 128, 384, 768} | _configs.row_tile_widths(*operations)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for aligned in (True, False):
                yield from _aot_cases(width if aligned else width - 1, dtype, aligned)


def _aot_cases(width: int, dtype: torch.dtype, aligned: bool) -> Iterator[AotCase]:
    rows = 64

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return meta_tensor(*shape, dtype=dtype, aligned=aligned)

    x, parameter = tensor(rows, width), tensor(width)
    statistics = tensor(rows, dtype=torch.float32)
    seed = tensor(1, dtype=torch.int64)
    calls: dict[str, Callable[[], object]] = {
        "layer_norm": lambda: layer_norm(x, parameter, parameter, 1e-5, True),
        "add_layer_norm": lambda: add_layer_norm(x, x, parameter, parameter, parameter, 1e-5, 0.1, seed, 0, True),
        "layer_norm_backward": lambda: layer_norm_backward(x, x, statistics, statistics, parameter, (True,) * 3),
        "add_layer_norm_backward": lambda: add_layer_norm_backward(
            x, x, x, statistics, statistics, parameter, 0.1, seed, 0, (True,) * 5
        ),
    }
    if width == 768:  # what removes code is tried at one width
        calls |= {
            "layer_norm-no_stats": lambda: layer_norm(x, parameter, parameter, 1e-5, False),
            "layer_norm-no_affine": lambda: layer_norm(x, None, None, 1e-5, True),
            "add_layer_norm-no_sum": lambda: add_layer_norm(
                x, x, parameter, parameter, parameter, 1e-5, 0.0, None, 0, False, False
            ),
            "add_layer_norm-no_dropout": lambda: add_layer_norm(
                x, x, None, parameter, parameter, 1e-5, 0.0, None, 0, False
            ),
            "add_layer_norm_backward-no_dropout": lambda: add_layer_norm_backward(
                x, None, x, statistics, statistics, parameter, 0.0, None, 0, (True,) * 5
            ),
        }
    for name, call in calls.items():
        operation, _, variant = name.partition("-")
        parts = [operation, f"w{width}", DTYPE_NAMES[dtype], variant, "" if aligned else "unaligned"]
        sample = dtype is torch.float16 if width == 767 else width == 768 and dtype is torch.bfloat16 and not variant
        yield AotCase("-".join(filter(None, parts)), call, sample)
