"""Lists of token ids as tensors, and padding of what is encoded already."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import torch

TENSOR_TYPES = ("pt", "np")


def check_tensor_type(kind: Any) -> str:
    """ "pt" or "np", also from transformers' enumeration. Raises ValueError."""
    kind = getattr(kind, "value", kind)
    if kind not in TENSOR_TYPES:
        raise ValueError(f"{kind} is not a valid TensorType, please select one of ['pt', 'np']")
    return str(kind)


def as_tensors(data: Mapping[str, Any], kind: Any, prepend_batch_axis: bool = False) -> dict[str, Any]:
    """Each entry as a tensor or an array of int64; NumPy takes rows of differing lengths as an array of objects.

    Raises ValueError, naming the entry, where "pt" meets such rows, or an entry is no nest of numbers.
    """
    convert = _torch_tensor if check_tensor_type(kind) == "pt" else _array
    result = {}
    for key, value in data.items():
        try:
            result[key] = convert([value] if prepend_batch_axis else value)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                "Unable to create tensor, you should probably activate truncation and/or padding with 'padding=True' "
                f"'truncation=True' to have batched tensors with the same length. Perhaps your features (`{key}` in "
                "this case) have excessive nesting (inputs type `list` where type `int` is expected)."
            ) from error
    return result


def _torch_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list) and value and isinstance(value[0], numpy.ndarray):
        return torch.from_numpy(numpy.array(value))
    return torch.tensor(value, dtype=torch.int64 if _is_empty(value) else None)


def _array(value: Any) -> numpy.ndarray:
    if isinstance(value, numpy.ndarray):
        return value
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | numpy.ndarray):
        lengths = {len(row) for row in value}
        if len(lengths) > 1:
            result = numpy.empty(len(value), dtype=object)
            result[:] = [numpy.asarray(row) for row in value]
            return result
    return numpy.asarray(value, dtype=numpy.int64 if _is_empty(value) else None)


def _is_empty(value: Any) -> bool:
    """Whether a nest of lists holds nothing, which has no type of its own."""
    return isinstance(value, list | tuple) and all(_is_empty(each) for each in value)


def to_lists(value: Any) -> Any:
    """Tensors and arrays, alone or in lists, as Python lists and numbers."""
    if isinstance(value, torch.Tensor | numpy.ndarray | numpy.generic):
        return value.tolist()
    if isinstance(value, list | tuple) and not (value and type(value[0]) is int):
        return [to_lists(each) for each in value]
    if isinstance(value, Mapping):
        return {key: to_lists(each) for key, each in value.items()}
    return value


def pad_row(values: list[Any], length: int, fill: Any, left: bool) -> list[Any]:
    missing = [fill] * (length - len(values))
    return missing + list(values) if left else list(values) + missing


def rounded_up(length: int, multiple: int | None) -> int:
    return length if not multiple else -(-length // multiple) * multiple


def columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A list of mappings as a mapping of lists."""
    rows = list(rows)
    return {key: [row[key] for row in rows] for key in rows[0]}
