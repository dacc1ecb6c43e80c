"""A column of strings that offers Arrow's C data interface, so that no Arrow library is needed to test it."""

import ctypes
import struct
from collections.abc import Sequence


class _Schema(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("format", "name", "metadata")),
        ("flags", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("children", "dictionary", "release", "private_data")),
    ]


class _Array(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("children", "dictionary", "release", "private_data")),
    ]


def _capsule(value: ctypes.Structure, name: bytes) -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(value), name, None)


class ArrowStrings:
    """format: "u", "U" or "vu". The array starts at an offset of one row, as a slice does. None is null."""

    def __init__(self, texts: Sequence[bytes | None], format: str) -> None:
        rows = [b"left out", *(text or b"" for text in texts)]
        bounds = [0]
        for row in rows:
            bounds.append(bounds[-1] + len(row))
        data = b"".join(rows)
        valid = sum(1 << i for i, text in enumerate(["", *texts]) if text is not None)
        buffers = [valid.to_bytes(len(rows) // 8 + 1, "little")]
        if format == "vu":
            buffers += [b"".join(self._view(row, at) for row, at in zip(rows, bounds, strict=False)), data]
            buffers.append(struct.pack("q", len(data)))
        else:
            buffers += [struct.pack(f"{len(bounds)}{'q' if format == 'U' else 'i'}", *bounds), data]
        self._keep = [ctypes.create_string_buffer(each, len(each) + 1) for each in buffers]
        pointers = (ctypes.c_void_p * len(buffers))(*(ctypes.addressof(each) for each in self._keep))
        self._names = (b"arrow_schema", b"arrow_array")  # capsules do not copy their names
        self._format = format.encode()
        self._schema = _Schema(format=self._format)
        nulls = sum(text is None for text in texts)
        self._array = _Array(length=len(texts), null_count=nulls, offset=1, n_buffers=len(buffers), buffers=pointers)

    @staticmethod
    def _view(row: bytes, at: int) -> bytes:
        if len(row) <= 12:
            return struct.pack("i12s", len(row), row)
        return struct.pack("i4sii", len(row), row[:4], 0, at)

    def __arrow_c_array__(self, requested_schema: object = None) -> tuple[object, object]:
        return _capsule(self._schema, self._names[0]), _capsule(self._array, self._names[1])
