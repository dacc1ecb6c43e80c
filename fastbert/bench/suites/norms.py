"""layer_norm and add_layer_norm, forward and backward: the first operations with all implementations.

Forward is measured into reused outputs as well as fresh ones: for large tensors on CPUs, page faults of fresh outputs cost more
than the arithmetic. The limit is a copy, which moves the same bytes and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbert.bench.cases import LIMIT, OURS, PEER, Case, Contender, Prepared, Settings, check_against
from fastbert.bench.suites._common import DTYPE_NAMES, Maker, answers, nbytes

WIDTH = 768  # BERT-base
ROWS = (2048, 24, 16384)  # a batch of 16 × 128; one short text; past the caches
_QUICK_ROWS = (2048, 24)
_EPS = 1e-12

# contenders
_REUSED, _FUNCTIONAL = "fastbert, reused outputs", "fastbert.functional"
_ALONE = "fastbert, reused output, y alone"  # what a post-norm block computes without gradients
_NATIVE, _TORCH, _COPY = "torch native_layer_norm.out", "torch F.layer_norm", "copy, reused output"
_ADD_NATIVE, _ADD_TORCH = "torch add.out, native_layer_norm.out", "torch F.layer_norm(x + r)"
_AUTOGRAD = "torch autograd"


def cases() -> list[Case]:
    found = []
    for group, prepare, names in (
        ("layer_norm", _layer_norm, (_REUSED, _FUNCTIONAL, _NATIVE, _TORCH, _COPY)),
        ("add_layer_norm", _add_layer_norm, (_REUSED, _ALONE, _FUNCTIONAL, _ADD_NATIVE, _ADD_TORCH)),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            for rows in ROWS:
                found.append(_case(group, names, prepare, rows, dtype, quick=rows in _QUICK_ROWS))
    for group, prepare in (("layer_norm_backward", _layer_norm_backward), ("add_layer_norm_backward", _add_backward)):
        for dtype in (torch.float32, torch.bfloat16):
            found.append(_case(group, (_FUNCTIONAL, _AUTOGRAD), prepare, 2048, dtype, quick=True))
    return found


def _case(
    group: str,
    contenders: tuple[str, ...],
    prepare: Callable[[Settings, int, torch.dtype], Prepared],
    rows: int,
    dtype: torch.dtype,
    quick: bool,
) -> Case:
    name = DTYPE_NAMES[dtype]
    return Case(
        name=f"ops/{group}/{rows}x{WIDTH}-{name}",
        suite="ops",
        group=group,
        title=f"{rows}×{WIDTH} {name}",
        contenders=contenders,
        prepare=lambda settings: prepare(settings, rows, dtype),
        quick=quick,
    )


def _reused(operation: str, settings: Settings) -> tuple[Callable[..., object] | None, str]:
    """The C++ launcher, which takes `out=`; or None and the reason."""
    if torch.device(settings.device).type != "cpu":
        return None, "only the CPU launcher writes into a given output"
    try:
        from fastbert.cpu import layer_norm as launchers
    except ImportError as error:
        return None, f"the extension does not load ({error})"
    return getattr(launchers, operation), ""


def _layer_norm(settings: Settings, rows: int, dtype: torch.dtype) -> Prepared:
    from fastbert import functional

    make = Maker(settings.seed, settings.device, dtype)
    x = make.normal(rows, WIDTH)
    weight, bias = make.normal(WIDTH, scale=0.1, shift=1.0), make.normal(WIDTH, scale=0.1)
    y = torch.empty_like(x)
    native = torch.ops.aten.native_layer_norm.out
    _, mean, rstd = torch.native_layer_norm(x, (WIDTH,), weight, bias, _EPS)  # their dtype depends on the device

    contenders = []
    not_measured = {}
    implementation = answers("layer_norm", settings.device, dtype)
    launcher, reason = _reused("layer_norm", settings)
    if launcher is None:
        not_measured[_REUSED] = reason
    else:
        contenders.append(
            Contender(
                _REUSED,
                OURS,
                lambda: launcher(x, weight, bias, _EPS, False, out=y),
                implementation=implementation,
                convert=lambda _: y,
            )
        )
    contenders += [
        Contender(
            _FUNCTIONAL,
            OURS,
            lambda: functional.layer_norm(x, (WIDTH,), weight, bias, _EPS),
            implementation=implementation,
        ),
        Contender(
            _NATIVE,
            PEER,
            lambda: native(x, (WIDTH,), weight, bias, _EPS, out0=y, out1=mean, out2=rstd),
            convert=lambda _: y,
        ),
        Contender(_TORCH, PEER, lambda: F.layer_norm(x, (WIDTH,), weight, bias, _EPS)),
        Contender(_COPY, LIMIT, lambda: y.copy_(x), checked=False),
    ]

    def expected() -> list[Tensor]:
        return [F.layer_norm(x.double(), (WIDTH,), weight.double(), bias.double(), _EPS)]

    return Prepared(
        contenders,
        _NATIVE,
        lambda: check_against(contenders, expected, _NATIVE, dtype),
        bytes=2 * nbytes(x) + nbytes(weight, bias),
        items=rows,
        not_measured=not_measured,
    )


def _add_layer_norm(settings: Settings, rows: int, dtype: torch.dtype) -> Prepared:
    from fastbert import functional

    make = Maker(settings.seed, settings.device, dtype)
    x, residual = make.normal(rows, WIDTH), make.normal(rows, WIDTH)
    weight, bias = make.normal(WIDTH, scale=0.1, shift=1.0), make.normal(WIDTH, scale=0.1)
    y, total = torch.empty_like(x), torch.empty_like(x)
    native = torch.ops.aten.native_layer_norm.out
    _, mean, rstd = torch.native_layer_norm(x, (WIDTH,), weight, bias, _EPS)  # their dtype depends on the device

    def two_operations() -> None:
        torch.add(x, residual, out=total)
        native(total, (WIDTH,), weight, bias, _EPS, out0=y, out1=mean, out2=rstd)

    contenders = []
    not_measured = {}
    implementation = answers("add_layer_norm", settings.device, dtype)
    launcher, reason = _reused("add_layer_norm", settings)
    if launcher is None:
        not_measured[_REUSED] = not_measured[_ALONE] = reason
    else:
        contenders.append(
            Contender(
                _REUSED,
                OURS,
                lambda: launcher(x, residual, None, weight, bias, _EPS, 0.0, None, 0, False, out=y, sum_out=total),
                implementation=implementation,
                convert=lambda _: (y, total),
            )
        )
        contenders.append(
            Contender(
                _ALONE,
                OURS,
                lambda: launcher(x, residual, None, weight, bias, _EPS, 0.0, None, 0, False, False, out=y),
                implementation=implementation,
                convert=lambda _: (y, x + residual),
            )
        )
    contenders += [
        Contender(
            _FUNCTIONAL,
            OURS,
            lambda: functional.add_layer_norm(x, residual, weight, bias, _EPS),
            implementation=implementation,
        ),
        Contender(_ADD_NATIVE, PEER, two_operations, convert=lambda _: (y, total)),
        Contender(
            _ADD_TORCH,
            PEER,
            lambda: F.layer_norm(x + residual, (WIDTH,), weight, bias, _EPS),
            convert=lambda output: (output, x + residual),
        ),
    ]

    def expected() -> list[Tensor]:
        wide = x.double() + residual.double()
        return [F.layer_norm(wide, (WIDTH,), weight.double(), bias.double(), _EPS), wide]

    return Prepared(
        contenders,
        _ADD_NATIVE,
        lambda: check_against(contenders, expected, _ADD_NATIVE, dtype),
        bytes=4 * nbytes(x) + nbytes(weight, bias),
        items=rows,
        not_measured=not_measured,
    )


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [each.detach().requires_grad_() for each in tensors]


def _gradients(
    outputs: Callable[[list[Tensor]], Tensor],
    leaves: list[Tensor],
    grad: Tensor,
) -> Callable[[], tuple[Tensor, ...]]:
    """One backward pass as a call: the graph is made once and kept."""
    leaves = _leaves(*leaves)
    y = outputs(leaves)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def _backward(
    settings: Settings,
    dtype: torch.dtype,
    operation: str,
    leaves: list[Tensor],
    grad: Tensor,
    ours: Callable[[list[Tensor]], Tensor],
    theirs: Callable[[list[Tensor]], Tensor],
    moved: int,
) -> Prepared:
    contenders = [
        Contender(
            _FUNCTIONAL,
            OURS,
            _gradients(ours, leaves, grad),
            implementation=answers(operation, settings.device, dtype),
        ),
        Contender(_AUTOGRAD, PEER, _gradients(theirs, leaves, grad)),
    ]

    def expected() -> tuple[Tensor, ...]:
        return _gradients(theirs, [each.double() for each in leaves], grad.double())()

    return Prepared(
        contenders,
        _AUTOGRAD,
        lambda: check_against(contenders, expected, _AUTOGRAD, dtype),
        bytes=moved,
        items=grad.shape[0],
    )


def _layer_norm_backward(settings: Settings, rows: int, dtype: torch.dtype) -> Prepared:
    from fastbert import functional

    make = Maker(settings.seed, settings.device, dtype)
    x, grad = make.normal(rows, WIDTH), make.normal(rows, WIDTH)
    weight, bias = make.normal(WIDTH, scale=0.1, shift=1.0), make.normal(WIDTH, scale=0.1)
    return _backward(
        settings,
        dtype,
        "layer_norm_backward",
        [x, weight, bias],
        grad,
        lambda t: functional.layer_norm(t[0], (WIDTH,), t[1], t[2], _EPS),
        lambda t: F.layer_norm(t[0], (WIDTH,), t[1], t[2], _EPS),
        3 * nbytes(x),
    )


def _add_backward(settings: Settings, rows: int, dtype: torch.dtype) -> Prepared:
    from fastbert import functional

    make = Maker(settings.seed, settings.device, dtype)
    x, residual, grad = make.normal(rows, WIDTH), make.normal(rows, WIDTH), make.normal(rows, WIDTH)
    weight, bias = make.normal(WIDTH, scale=0.1, shift=1.0), make.normal(WIDTH, scale=0.1)
    return _backward(
        settings,
        dtype,
        "add_layer_norm_backward",
        [x, residual, weight, bias],
        grad,
        lambda t: functional.add_layer_norm(t[0], t[1], t[2], t[3], _EPS)[0],
        lambda t: F.layer_norm(t[0] + t[1], (WIDTH,), t[2], t[3], _EPS),
        3 * nbytes(x),
    )
