"""What the launchers share: how tensors become addresses."""

import torch
from torch import Tensor

# Numbers of csrc/cpu/layer_norm.h's enum Dtype.
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1}

# Numbers of csrc/cpu/types.h's enum Activation.
ACTIVATION_NUMBERS = {
    "gelu": 0,
    "gelu_tanh": 1,
    "gelu_quick": 2,
    "silu": 3,
    "relu": 4,
    "sigmoid": 5,
    "tanh": 6,
    "none": 7,
}


def dtype_number(operation: str, x: Tensor) -> int:
    if x.dim() == 0 or not x.is_cpu:
        raise ValueError(f"{operation}: the input is {list(x.shape)} on {x.device}; expected [..., width] on the CPU")
    number = DTYPE_NUMBERS.get(x.dtype)
    if number is None:
        raise NotImplementedError(
            f"{operation}: dtype is {x.dtype}; the C++ implementation takes torch.float32 and torch.bfloat16. "
            f"Use fastbert.reference.{operation}."
        )
    return number


def parameters_dtype(operation: str, x: Tensor, *parameters: Tensor | None) -> int:
    """The number of the one dtype that all parameters have: x's, or float32."""
    found = None
    for parameter in parameters:
        if parameter is None:
            continue
        if found is None:
            found = parameter.dtype
            if found is not torch.float32 and found is not x.dtype:
                raise TypeError(
                    f"{operation}: a parameter is {found} and x is {x.dtype}; parameters have x's dtype or torch.float32"
                )
        elif parameter.dtype is not found:
            raise TypeError(f"{operation}: weight is {found} and bias is {parameter.dtype}; both must have one dtype")
    return 0 if found is None else DTYPE_NUMBERS[found]


def matrix(x: Tensor) -> tuple[Tensor, int]:
    """x [..., width] as rows with unit stride inside, copied only where its strides allow no such view.

    Returns:
        The tensor whose address counts, and the distance of its rows in elements.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = x.contiguous()
    return x, x.stride(0)


def row_count(x: Tensor) -> int:
    width = x.shape[-1]
    return x.numel() // width if width else x.shape[:-1].numel()


def vector(operation: str, name: str, parameter: Tensor | None, length: int) -> Tensor | None:
    """A parameter or statistic as one run of memory. C++ reads `length` elements, so there must be as many."""
    if parameter is None:
        return None
    if parameter.numel() != length or not parameter.is_cpu:
        raise ValueError(
            f"{operation}: {name} has {parameter.numel()} elements on {parameter.device}; expected {length} on the CPU"
        )
    return parameter.contiguous()


def address(x: Tensor | None) -> int:
    """0 for None. RuntimeError for a tensor whose storage was given back, as FSDP does: C++ would crash, or take it for None."""
    if x is None:
        return 0
    if is_gone(x):
        raise RuntimeError(f"a tensor of shape {list(x.shape)} has no memory: its storage was resized to 0")
    return x.data_ptr()


def is_gone(x: Tensor) -> bool:
    """Whether the storage of a tensor on the CPU was given back: resize_(0), as FSDP does."""
    return x.data_ptr() == 0 and x.numel() > 0 and x.is_cpu


def check_output(operation: str, name: str, out: Tensor, x: Tensor) -> None:
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous() or out.device != x.device:
        raise ValueError(
            f"{operation}: {name} is {tuple(out.shape)} {out.dtype} on {out.device}"
            f"{'' if out.is_contiguous() else ', not contiguous'}; expected a contiguous {tuple(x.shape)} {x.dtype} on "
            f"{x.device}"
        )


def check_like(operation: str, name: str, other: Tensor, x: Tensor) -> None:
    """Raises ValueError unless `other` has the shape, dtype and device of the tensor it belongs to."""
    if other.shape != x.shape or other.dtype is not x.dtype or other.is_cpu != x.is_cpu:
        raise ValueError(
            f"{operation}: {name} is {tuple(other.shape)} {other.dtype} on {other.device}; the tensor it belongs to is "
            f"{tuple(x.shape)} {x.dtype} on {x.device}"
        )


# What was measured is why these are functions: torch.empty with a shape takes 2.3 µs, empty_like and an integer 0.9.
def empty_result(x: Tensor) -> Tensor:
    """Contiguous, x's shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_statistics(x: Tensor) -> Tensor:
    """One float32 for each row of x."""
    return torch.empty(x.shape[0] if x.dim() == 2 else x.shape[:-1], dtype=torch.float32)


def nothing(dtype: torch.dtype = torch.float32) -> Tensor:
    """The [0] tensor that stands for a result nobody asked for."""
    return torch.empty(0, dtype=dtype)


def seed_number(operation: str, dropout_p: float, seed: Tensor | None, offset: int) -> int:
    """The key of the dropout stream; 0 without dropout, when the seed is not read."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{operation}: dropout_p is {dropout_p}; expected a probability from 0 to 1")
    if dropout_p == 0.0:
        return 0
    if seed is None or seed.dtype is not torch.int64 or seed.numel() != 1:
        what = "None" if seed is None else f"{tuple(seed.shape)} {seed.dtype}"
        raise ValueError(f"{operation}: seed is {what}; dropout needs one torch.int64 element")
    if offset < 0 or offset % 4 != 0:
        raise ValueError(f"{operation}: offset is {offset}; expected a multiple of 4, at least 0")
    return int(seed.item())
