"""Memory on Linux: what a process has, what it had at most, what is left for it.

Everything is read from /proc and the control groups, so nothing here works elsewhere: the functions then return None.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # control groups of version 1 say "no limit" by a number near 2⁶³
#: Left to everybody else when it is said what is free.
RESERVE_SHARE, RESERVE_BYTES = 0.05, 256 << 20


def resident(pid: int | str = "self", field: str = "VmRSS") -> int | None:
    """Bytes of physical memory that a process has; "VmHWM": had at most since it began, or since `reset_peak`."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def reset_peak() -> bool:
    """Sets this process's VmHWM to what it has now; whether the kernel let it (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Gives freed memory back to the system, so that what stays is in use. glibc only; elsewhere nothing happens."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available(root: Path = _ROOT) -> int | None:
    """Bytes that processes here may still take, by the kernel and by the control groups, less a reserve. None where nobody says."""
    total, free = (_meminfo(root, name) for name in ("MemTotal", "MemAvailable"))
    if total is None or free is None:
        return None
    for limit, used in _groups(root):
        total, free = min(total, limit), min(free, limit - used)
    return max(0, free - max(RESERVE_BYTES, int(RESERVE_SHARE * total)))


def _meminfo(root: Path, name: str) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def _groups(root: Path) -> list[tuple[int, int]]:
    """(limit, used without cache that can go) of this process's control groups and all above them, of both versions."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        # In a container the path is often that of the host, and its own group is mounted at the top.
        here = mount / path.strip("/")
        for folder in (here, *here.parents):
            if folder != mount and mount not in folder.parents:
                break
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None and limit < _UNLIMITED:
                found.append((limit, used - _cache(folder / "memory.stat", names[2])))
    return found


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no number, and no limit
        return None


def _cache(file: Path, name: str) -> int:
    try:
        for line in file.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
