"""Memory that a file may take, checked before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from molgen_energy.errors import InputError

_UNKNOWN = 4 << 30  # bytes, where the system does not say what is available
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_MEMINFO = Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes that this process can still take: the least of the limits that the system states.

    These are `machine_memory` and the limit of its address space. 4 GiB where the system states
    none.
    """
    stated = [machine_memory(), _address_space()]
    return min((size for size in stated if size is not None), default=_UNKNOWN)


def machine_memory() -> int | None:
    """Bytes that the machine and the control group of this process still have.

    The least of the available memory of Linux and the rest of the limit of the control group; None
    where the system states neither.
    """
    stated = [_machine(), _control_group()]
    return min((size for size in stated if size is not None), default=None)


def check_memory(size: int, what: str, remedy: str) -> None:
    """Raise `InputError` where `size` bytes for `what` exceed the memory that is available."""
    available = available_memory()
    if size > available:
        raise InputError(
            f"{what} takes {_shown(size)}, {_shown(available)} of memory are available; {remedy}"
        )


def _machine() -> int | None:
    for line in system_text(_MEMINFO).splitlines():  # empty on another system
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _control_group() -> int | None:
    path = next(filter(system_text, _CGROUP_LIMITS), _CGROUP_LIMITS[0])
    limit = system_text(path)
    if not limit.isdigit():  # there is none, or `max`, which is no limit
        return None
    used = system_text(path.with_name("memory.current"))
    if not used.isdigit():
        return int(limit)
    # Cached pages of files count as used, but are freed when memory is needed.
    parts = dict(line.split() for line in system_text(path.with_name("memory.stat")).splitlines())
    cache = int(parts.get("inactive_file", 0)) + int(parts.get("slab_reclaimable", 0))
    return max(0, int(limit) - int(used) + cache)


def system_text(path: Path) -> str:
    """What a file of the system such as /proc/cpuinfo holds; empty without it."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _shown(size: int) -> str:
    """Bytes in the unit that suits a reader."""
    for unit, bytes_ in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_:
            return f"{size / bytes_:,.1f} {unit}"
    return f"{size:,} bytes"
