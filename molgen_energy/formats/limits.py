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

    These are the available memory of the machine, the limit of its control group and the limit of
    its address space. 4 GiB where the system states none.
    """
    stated = [_machine(), _control_group(), _address_space()]
    return min((size for size in stated if size is not None), default=_UNKNOWN)


def check_memory(size: int, what: str, remedy: str) -> None:
    """Raise `InputError` where `size` bytes for `what` exceed the memory that is available."""
    available = available_memory()
    if size > available:
        raise InputError(
            f"{what} takes {_shown(size)}, {_shown(available)} of memory are available; {remedy}"
        )


def _machine() -> int | None:
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):  # another system
        pass
    return None


def _control_group() -> int | None:
    path = next((path for path in _CGROUP_LIMITS if path.is_file()), None)
    try:
        return None if path is None else int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # `max` is no limit
        return None


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
