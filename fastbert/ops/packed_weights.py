"""What the CPU keeps packed of a model's weights: how much, and how to drop it."""

from dataclasses import dataclass

from fastbert.ops._registry import has_extension


@dataclass(frozen=True)
class PackedWeightsInfo:
    """Packed weights of the whole process, beside their originals.

    Attributes:
        count: how many.
        nbytes: their memory.
        by_precision: nbytes of each precision, "fp32", "bf16" and "int8".
    """

    count: int
    nbytes: int
    by_precision: dict[str, int]


def packed_weights_info() -> PackedWeightsInfo:
    """How many weights are packed for products on the CPU, and what memory they take."""
    by_precision: dict[str, int] = {}
    packed = []
    if has_extension():
        from fastbert.cpu.packed_weights import all_packed

        packed = all_packed()
    for each in packed:
        by_precision[each.precision] = by_precision.get(each.precision, 0) + each.nbytes
    return PackedWeightsInfo(len(packed), sum(by_precision.values()), by_precision)


def drop_packed_weights() -> None:
    """Gives that memory back. The next product packs again: also the way to tell of single numbers changed behind torch's back."""
    if has_extension():
        from fastbert.cpu import packed_weights

        packed_weights.drop_packed_weights()
