"""Weights as the C++ products read them, kept beside the parameters they were made from.

The cache knows a weight by identity and holds it weakly: it is no part of a module, a ``state_dict``, a copy or a pickle. What was
packed is used only while the weight is what it was: the same storage, address, shape, strides and dtype, and the same version,
which torch counts at every change in place. The step of an optimizer, which torch does not count if it is a fused one, drops what
was packed of its parameters. Another change that torch does not count (through ``.data`` or ``.numpy()``, or by another process in
shared memory) is seen if it changes any of a few samples of the weight, as a change of all of it does; after one of single elements
call ``drop_packed_weights()``. ``torch.utils.swap_tensors`` refuses a weight that is packed: drop them before it, too.
"""

import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastbert import _C
from fastbert.cpu._launch import DTYPE_NUMBERS, address

# Numbers of csrc/cpu/linear.h's enum Precision.
PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}
_ALIGNMENT = 64
_MOST_INTEGERS = (2**31 - 1) // (127 * 128)  # products of 8-bit integers whose sum, and its offset, an int32 holds


class PackedWeight:
    """A weight [out, in] in panels for one instruction set.

    Attributes:
        precision: "fp32", "bf16" or "int8".
        out, in_features: the weight's shape.
        address: of the panels.
        nbytes: of memory.
        originals: address, bytes and fingerprint of each weight without gaps that it was made from.
        blocks: plans of transformer blocks that begin with this weight, see fastbert.cpu.block.
    """

    __slots__ = (
        "__weakref__",
        "_buffer",
        "address",
        "blocks",
        "in_features",
        "nbytes",
        "originals",
        "out",
        "precision",
    )

    def __init__(self, weights: tuple[Tensor, ...], precision: str) -> None:
        for each in weights:
            address(each)  # there is one
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if weight.stride(-1) != 1 and weight.shape[1] != 1:
            weight = weight.contiguous()
        self.precision = precision
        self.out, self.in_features = weight.shape
        if precision == "int8" and self.in_features > _MOST_INTEGERS:
            raise ValueError(
                f"a weight {list(weight.shape)} has {self.in_features} columns; with precision 'int8' at most {_MOST_INTEGERS} "
                "are summed exactly: take 'bf16' or 'fp32'"
            )
        number = PRECISIONS[precision]
        self.nbytes = _C.linear_packed_bytes(number, self.out, self.in_features)
        self._buffer = torch.empty(self.nbytes + _ALIGNMENT, dtype=torch.uint8)
        self.address = self._buffer.data_ptr() + -self._buffer.data_ptr() % _ALIGNMENT
        _C.linear_pack(
            number,
            weight.data_ptr(),
            DTYPE_NUMBERS[weight.dtype],
            weight.stride(0),
            self.out,
            self.in_features,
            self.address,
            torch.get_num_threads(),
        )
        self.originals = [
            (each.data_ptr(), each.nbytes, _C.fingerprint(each.data_ptr(), each.nbytes))
            for each in weights
            if each.is_contiguous() or each.t().is_contiguous()
        ]
        self.blocks: dict[object, object] = {}

    def without_originals(self) -> "PackedWeight":
        """The same memory, for which nobody looks whether the originals are what they were: they may go."""
        other = object.__new__(PackedWeight)
        for name in ("precision", "out", "in_features", "nbytes", "_buffer", "address"):
            setattr(other, name, getattr(self, name))
        other.originals, other.blocks = [], {}
        with _lock:
            _alone.add(other)
        return other

    def is_unchanged(self) -> bool:
        """Whether samples of the originals are what they were; only while these are alive and current."""
        return all(_C.fingerprint(address, nbytes) == expected for address, nbytes, expected in self.originals)


def _stamp(weight: Tensor) -> tuple[object, ...]:
    """What does not change while a weight is left alone."""
    return (
        weight._version,
        weight.data_ptr(),
        weight.untyped_storage()._cdata,
        weight.dtype,
        weight.shape,
        weight.stride(),
    )


class _Entry:
    __slots__ = ("isa", "packed", "pins", "references", "stamps", "storages")

    def __init__(self, weights: tuple[Tensor, ...], precision: str, key: tuple[object, ...]) -> None:
        def forget(_: object) -> None:
            _drop(key)

        # Before packing: a change meanwhile makes the entry stale, never a later one.
        self.stamps = [_stamp(weight) for weight in weights]
        # A pinned storage object is not reused for another storage, so that its address in the stamp means it. (Its memory is
        # not held.)
        self.pins = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        self.storages = {weight.untyped_storage()._cdata for weight in weights}
        self.isa = _C.isa()
        self.references = [weakref.ref(weight, forget) for weight in weights]
        self.packed = PackedWeight(weights, precision)

    def is_current(self, weights: tuple[Tensor, ...]) -> bool:
        """By what torch and the instruction set say; the samples are looked at where the weight is used."""
        for weight, stamp in zip(weights, self.stamps):  # noqa: B905 - strict costs as much as the comparison
            if _stamp(weight) != stamp:
                return False
        return self.isa == _C.isa()


_entries: dict[tuple[object, ...], _Entry] = {}
_derived: dict[object, Any] = {}
_alone: weakref.WeakSet[PackedWeight] = weakref.WeakSet()  # those without originals, that live
_lock = threading.Lock()  # held while packing: two threads that need one weight do not both make it


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    # OpenMP's threads are not there in a child, and the next parallel operation, torch's own too, would wait for them forever.
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def derived() -> dict[object, Any]:
    """Where to keep what is right while no packed weight is dropped: then there is another, empty one.

    Fetch it before the packed weights: what is put into an old one is forgotten.
    """
    return _derived


def _drop(key: tuple[object, ...]) -> None:
    global _derived
    _entries.pop(key, None)
    _derived = {}


def is_cacheable(weight: Tensor) -> bool:
    """Whether changes of the weight can be noticed: tensors made under inference_mode have no version."""
    return not weight.is_inference()


def packed_weight(precision: str, *weights: Tensor, check: bool = True) -> PackedWeight:
    """The packed weight, from the cache if it is current.

    Args:
        precision: "fp32", "bf16" or "int8".
        weights: [out, in], float32 or bfloat16 on the CPU; several, of one dtype and ``in``, become one product with their
            channels one after another.
        check: whether samples of the weights are looked at too; without it the caller does.
    """
    key = (precision, *map(id, weights))
    entry = _entries.get(key)
    if entry is not None and entry.is_current(weights) and (not check or entry.packed.is_unchanged()):
        return entry.packed
    if not all(map(is_cacheable, weights)):
        with torch.no_grad():
            return PackedWeight(weights, precision)
    with _lock:
        entry = _entries.get(key)
        if entry is None or not entry.is_current(weights) or not entry.packed.is_unchanged():
            if entry is not None:
                _drop(key)
            with torch.no_grad():
                entry = _entries[key] = _Entry(weights, precision, key)
        return entry.packed


def forget(weights: Iterable[Tensor]) -> None:
    """Drops what was packed from these weights."""
    wanted = set(map(id, weights))
    for key in list(_entries):
        if wanted.intersection(key[1:]):
            _drop(key)


def _after_step(optimizer: torch.optim.Optimizer, _arguments: object, _keywords: object) -> None:
    if not _entries:
        return
    stepped = [weight for group in optimizer.param_groups for weight in group["params"]]
    forget(stepped)
    storages = {weight.untyped_storage()._cdata for weight in stepped if type(weight) is torch.nn.Parameter}
    for key, entry in list(_entries.items()):  # what was packed of views of them
        if not storages.isdisjoint(entry.storages):
            _drop(key)


register_optimizer_step_post_hook(_after_step)


def drop_packed_weights() -> None:
    """Drops all packed weights; the next use packs again."""
    global _derived
    _entries.clear()
    _derived = {}


def all_packed() -> list[PackedWeight]:
    """What the cache holds, and what lives without originals; memory that both share once."""
    with _lock:
        alone = list(_alone)
    found = [*(entry.packed for entry in list(_entries.values())), *alone]
    return list({packed.address: packed for packed in found}.values())
