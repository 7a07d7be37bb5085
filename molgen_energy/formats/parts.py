"""The parts of folders that this package writes: of runs, checkpoints and shards.

Reading a pipe or a device need not end. A link to a file is read, since caches of downloaded
weights hold such links; nothing is written through it (`molgen_energy.output.check_own_file`).
"""

from __future__ import annotations

import stat
from pathlib import Path

from molgen_energy.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def has_part(path: Path) -> bool:
    """Whether a path is a file, or a link to one."""
    return path.is_file()


def check_part(path: Path) -> int:
    """Check that a part is a file or a link to one, and return its bytes.

    Raises
    ------
    InputError
        It does not exist, or is a folder, a pipe or a device, or a link to one or to nothing.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise InputError(f"{path} is {kind}; copy the file itself to this place")
    return found.st_size


def read_part(path: Path, most: int) -> bytes:
    """The bytes of a part.

    Raises
    ------
    InputError
        As of `check_part`; or there are more than `most` bytes, or they cannot be read.
    """
    size = check_part(path)
    if size > most:
        raise InputError(f"{path} has {size:,} bytes; expected at most {most:,}")
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
