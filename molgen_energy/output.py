"""Writing so that a reader never sees half a file: a temporary name, then a rename."""

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
    """Raise `InputError` unless a file `path` could be made, before any work is done for it."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    check_folder(path.parent)


def check_file(path: Path) -> None:
    """Raise `InputError` unless a path is that of a file, which can be read more than once."""
    if path.is_file():
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder")
    if path.exists():
        raise InputError(f"{path} is a device or a pipe; name a file")
    raise InputError(f"{path} does not exist")


def display_path(path: Path) -> str:
    """A path as text that can be written anywhere, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless files can be made in a folder."""
    if not folder.is_dir():
        why = "is no folder" if folder.exists() else "does not exist; make it first"
        raise InputError(f"cannot write there: {folder} {why}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}") from error


def resolve_symlink(path: Path) -> Path:
    """The file that is written under a name: what a link leads to, and the link stays."""
    return path.resolve() if path.is_symlink() else path


@dataclass(frozen=True)
class Replacement:
    """A file in the making."""

    temporary: Path


@contextmanager
def atomic_replace(path: Path) -> Iterator[Replacement]:
    """Give a temporary path beside `path`; rename it to `path` if the block succeeds.

    When the block raises, the temporary file is removed and `path` is as before.
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
    """Write a file under a temporary name that is changed in the end."""
    with atomic_replace(path) as output:
        output.temporary.write_bytes(content)


def lock_file(path: Path, what: str) -> IO[bytes]:
    """Open a file and keep other processes from holding it, until it is closed.

    Raises
    ------
    InputError
        Another process has it; the message begins with `what`.
    """
    file = path.open("rb")
    with contextlib.suppress(ImportError):  # where there is no such lock it is only a courtesy
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(
                f"{what} is at work in another process; wait for it, or stop it first"
            ) from None
        except OSError:  # some network file systems have none
            pass
    return file


def with_filename(error: OSError, path: Path) -> OSError:
    """The error with the file named that was written, where the system did not say."""
    if error.filename is None or Path(error.filename).name.startswith("."):
        error.filename = str(path)
    return error


def flush_to_disk(path: Path) -> None:
    """Ask the system to write a file through, so that a rename cannot overtake its content."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
