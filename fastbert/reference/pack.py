"""Rows of a padded batch gathered into a packed one, and put back."""

from torch import Tensor


def pack(
    padded: Tensor,  # [padded_rows, ...]
    indices: Tensor,  # int64 [total], ascending
) -> Tensor:
    """padded[indices], [total, ...]."""
    return padded.index_select(0, indices)


def unpack(
    packed: Tensor,  # [total, ...]
    indices: Tensor,  # int64 [total], ascending
    padded_rows: int,
    padding_value: float,
) -> Tensor:
    """[padded_rows, ...] with packed[t] at indices[t], and padding_value in every other row."""
    return packed.new_full((padded_rows, *packed.shape[1:]), padding_value).index_copy(0, indices, packed)
