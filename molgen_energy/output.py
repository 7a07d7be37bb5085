"""Atomic writing: files appear under their name only when they are complete.

A file is written under a temporary name beside its final one and then renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from molgen_energy.errors import InputError


def check_writable(path: Path) -> None:
    """Check that a file can be written, before any work is done for it.

    Raises
    ------
    InputError
        The path is a folder, or the folder it is in does not exist or is not writable.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    check_folder(path.parent)


def named_path(name: str | Path) -> Path:
    """The path of a name that the user gave; raises `InputError` where it is empty.

    `Path("")` is the current folder.
    """
    if not str(name):
        raise InputError("a file name is empty; is a variable of the shell not set?")
    return Path(name)


def check_file(path: Path) -> None:
    """Check that a path is a regular file, which can be read more than once.

    Raises
    ------
    InputError
        The path does not exist, or is a folder, a device, a pipe or a link to nothing; or a folder
        on the way to it cannot be read.
    """
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise InputError(f"{path} is a folder")
        if path.exists():
            raise InputError(f"{path} is a device or a pipe; name a file")
        if path.is_symlink():
            raise InputError(f"{path} is a link to {path.readlink()}, which does not exist")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    raise InputError(f"{path} does not exist")


def display_path(path: Path) -> str:
    """A path as valid Unicode; bytes that are not UTF-8 become replacement characters."""
    return os.fsencode(path).decode("utf-8", "replace")


def check_folder(folder: Path) -> None:
    """Check that files can be written into a folder.

    Raises
    ------
    InputError
        The folder does not exist, is not a folder, or is not writable.
    """
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist; make it first"
        raise InputError(f"cannot write the output: {folder} {why}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}") from error


def resolve_symlink(path: Path) -> Path:
    """The file to write for a path: the target of a symbolic link, so that the link stays."""
    return path.resolve() if path.is_symlink() else path


@dataclass(frozen=True)
class Replacement:
    """A file that replaces another one when it is complete."""

    temporary: Path
    """Where to write it."""


@contextmanager
def atomic_replace(path: Path) -> Iterator[Replacement]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    If the block raises, the temporary file is removed and `path` stays as it was.

    Raises
    ------
    InputError
        The file cannot be written, see `check_writable`.
    OSError
        Writing failed; the error names `path`.
    """
    check_writable(path)
    path = resolve_symlink(path)
    replacement = Replacement(path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    try:
        yield replacement
        flush_to_disk(replacement.temporary)
        replacement.temporary.replace(path)
    except OSError as error:
        raise with_filename(error, path) from None
    finally:
        remove(replacement.temporary)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file in one step; errors are those of `atomic_replace`."""
    with atomic_replace(path) as output:
        output.temporary.write_bytes(content)


def lock_file(path: Path, what: str) -> IO[bytes]:
    """Open a file with an exclusive lock, which ends when the file is closed.

    Where the system or the file system has no locks, the file is opened without one.

    Parameters
    ----------
    what
        Name of the locked thing, for the message.

    Raises
    ------
    InputError
        Another process holds the lock.
    """
    file = path.open("rb")
    with contextlib.suppress(ImportError):  # Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(
                f"{what} is in use by another process; wait for it, or stop it first"
            ) from None
        except OSError:  # some network file systems have none
            pass
    return file


def with_filename(error: OSError, path: Path) -> OSError:
    """The error with the name of the output file, where it has none or a temporary one."""
    if error.filename is None or Path(error.filename).name.startswith("."):
        error.filename = str(path)
    return error


def flush_to_disk(path: Path) -> None:
    """Have the system write the content of a file to disk, before a rename makes it visible."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
