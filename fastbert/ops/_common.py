"""What the public functions share: checks of their arguments, autocast, dropout seeds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastbert.reference import wide_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def may_want_grad() -> bool:
    """Whether wants_grad() may say so of any tensor."""
    # The autograd.Function says that there is no forward mode; the operator would drop the tangent.
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for, so that the operation has to enter its autograd.Function."""
    if not may_want_grad():
        return False
    return forward_ad._current_level >= 0 or any(t is not None and t.requires_grad for t in tensors)


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, none twice: torch.compile does not trace an autograd.Function that gets a tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(t.view_as(t) if any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors))


def empty_gradients(x: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """In shape and dtype what the backward pass of rows x gives: dx, then wide sums over rows; [0] for what is not needed."""
    dx = x.new_empty(x.shape if needs[0] else (0,))
    return dx, *(x.new_empty(x.shape[-1:] if needed else (0,), dtype=wide_dtype(x)) for needed in needs[1:])


def check_tensor(function: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} is a {type(x).__name__}; expected a tensor")


def check_floating(function: str, name: str, x: Any) -> None:
    check_tensor(function, name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{function}: {name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64")


def check_device(function: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    device = first.device
    for name, other in others.items():
        if other is None:
            continue
        check_tensor(function, name, other)
        if other.device != device:
            raise ValueError(
                f"{function}: {name} is on {other.device} and {first_name} on {first.device}; move them to one device"
            )


def check_vector(function: str, name: str, x: Tensor | None, width: int) -> None:
    if x is None:
        return
    check_floating(function, name, x)
    if x.dim() != 1 or x.shape[0] != width:
        raise ValueError(f"{function}: {name} has shape {list(x.shape)}; expected [{width}]")


def check_same(function: str, first_name: str, first: Tensor, name: str, other: Tensor) -> None:
    """Same shape, dtype and device."""
    check_tensor(function, name, other)
    if other.shape != first.shape:
        raise ValueError(
            f"{function}: {name} has shape {list(other.shape)} and {first_name} {list(first.shape)}; they must be equal"
        )
    if other.dtype != first.dtype:
        raise TypeError(f"{function}: {name} has dtype {other.dtype} and {first_name} {first.dtype}; cast one of them")
    check_device(function, first_name, first, **{name: other})


def check_probability(function: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{function}: dropout_p is {p}; expected a probability in [0, 1]")


def check_choice(function: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{function}: {name} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_integers(function: str, name: str, ids: Any) -> None:
    check_tensor(function, name, ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{function}: {name} has dtype {ids.dtype}; expected int64 or int32")


def check_range(function: str, name: str, ids: Tensor, limit: int, what: str, ignore: int | None = None) -> None:
    """Raises IndexError unless every id is in [0, limit) or equal to ``ignore``. Looks at values: for operators."""
    if ids.numel() == 0:
        return
    lowest, highest = torch.aminmax(ids)
    if lowest.item() >= 0 and highest.item() < limit:
        return
    wrong = (ids < 0) | (ids >= limit)
    if ignore is not None:
        wrong &= ids != ignore
    if wrong.any():
        value = int(ids[wrong][0])
        takes = f"takes 0 to {limit - 1}" if limit else "is empty"
        raise IndexError(f"{function}: {name} holds {value}; {what} {takes}")


def parameter_for(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A layer norm's weight or a bias as the kernels take it: in x's dtype or float32."""
    if (
        parameter is None
        or parameter.dtype == x.dtype
        or (parameter.dtype == torch.float32 and x.dtype != torch.float64)
    ):
        return parameter
    return parameter.to(x.dtype)


def norm_parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A layer norm's weight and bias as the kernels take them: both in one dtype, x's or float32."""
    weight, bias = parameter_for(x, weight), parameter_for(x, bias)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return weight, bias


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The arguments of a product, cast as torch's autocast casts those of its own products."""
    tensors = (first, *others)
    device = first.device.type
    if first.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def dropout_seed(
    function: str, dropout_p: float, seed: Tensor | None, offset: int, device: torch.device
) -> Tensor | None:
    """The stream's key: the one given, or one drawn from torch's generator; None without dropout."""
    check_probability(function, dropout_p)
    if dropout_p == 0.0:
        return None
    if offset < 0 or offset % 4:
        raise ValueError(f"{function}: offset is {offset}; expected a multiple of 4, at least 0")
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    check_tensor(function, "seed", seed)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"{function}: seed is {seed.dtype} {list(seed.shape)} on {seed.device}; expected one int64 on {device}"
        )
    return seed.reshape(1)


def or_none(gradient: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor | None:
    """A gradient for autograd: None where it was not asked for, else in its parameter's dtype."""
    if not needed:
        return None
    return gradient if dtype is None else gradient.to(dtype)
