"""Safe writing: files appear under their name only when they are complete.

A file is written under a temporary name beside its final one and then renamed. The temporary name
is random and the file is created anew, so that none can be planted; it is locked while it is
written, so that the next run finds those of killed processes. A file that is overwritten keeps its
permissions. Devices, pipes and, in folders of this package, links are refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from molgen_energy.errors import InputError

_PERMISSIONS = 0o777
_TOKEN = 8  # random bytes in a temporary name
# What a terminal may act on or hide: control characters, marks that change the direction of text,
# and halves of surrogate pairs, which stand for bytes of file names that are not UTF-8.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def check_writable(path: Path) -> None:
    """Check that a file can be written, before any work is done for it.

    Raises
    ------
    InputError
        The path is a folder, a device or a pipe, or a link to one or to itself, or the folder it is
        in does not exist or is not writable.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a device or a pipe; name a file to write")
    check_folder(resolve_symlink(path).parent)


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


def printable(text: str) -> str:
    """A text in one line that a terminal shows as it is: control characters become `\\x1b`."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name
        code -= 0xDC00
    return {10: "\\n", 13: "\\r"}.get(code, f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def display_path(path: Path) -> str:
    """A path as printable Unicode; bytes that are not UTF-8 become replacement characters."""
    return printable(valid_unicode(path))


def valid_unicode(path: Path | str) -> str:
    """A path as files of text can hold it, with such replacement characters."""
    return os.fsencode(path).decode("utf-8", "replace")


def display_names(paths: Sequence[Path]) -> list[str]:
    """Short names of files for readers elsewhere: with folders where they need them.

    Of a path that is given twice, the names are equal.
    """
    parts = [[part for part in path.parts if part != path.anchor] for path in paths]
    count = 1
    while count < max(map(len, parts), default=1):
        if len({tuple(own[-count:]) for own in parts}) == len({tuple(own) for own in parts}):
            break
        count += 1
    return [display_path(Path(*own[-count:])) for own in parts]


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


def real_path(path: Path) -> Path:
    """The absolute path without links; a link that leads to itself stays in it."""
    return Path(os.path.realpath(path))


def resolve_symlink(path: Path) -> Path:
    """The file to write for a path: the target of a symbolic link, so that the link stays.

    Raises
    ------
    InputError
        The link leads to itself.
    """
    if not path.is_symlink():
        return path
    target = real_path(path)
    if target.is_symlink():
        raise InputError(f"{path} is a link that leads to itself; remove it")
    return target


def check_own_file(path: Path) -> None:
    """Check a place in a folder of this package, which may come from somebody else, for writing.

    Raises
    ------
    InputError
        It is a link, which could lead out of the folder, a device or a pipe.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise InputError(
            f"{path} is a link to {path.readlink()}, and nothing is written through links in such "
            "a folder; remove it"
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path} is a device or a pipe where a file belongs; remove it")


@dataclass(frozen=True)
class Replacement:
    """A file that replaces another one when it is complete."""

    temporary: Path
    """Where to write it; it exists and is empty."""


@contextmanager
def atomic_replace(path: Path, *, own: bool = False) -> Iterator[Replacement]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    If the block raises, the temporary file is removed and `path` stays as it was. A file that is
    replaced passes on its permissions.

    Parameters
    ----------
    path
        The file. Where the user named it, a link is followed and stays, and temporary files that
        killed processes left for it are removed.
    own
        Whether this package chose the name, in a folder that may come from somebody else: there
        links are refused.

    Raises
    ------
    InputError
        The file cannot be written, see `check_writable` and `check_own_file`.
    OSError
        Writing failed; the error names `path`.
    """
    if own:
        check_own_file(path)
    check_writable(path)
    path = resolve_symlink(path)
    if not own:
        remove_leftovers(path.parent, path.name)
    mode = _permissions(path)
    try:
        temporary, file = _create_temporary(path, mode)
        with file:
            try:
                yield Replacement(temporary)
                if not os.path.samestat(os.fstat(file.fileno()), temporary.lstat()):
                    raise OSError(None, "another process replaced the temporary file")
                os.fsync(file.fileno())
                if mode is not None:
                    temporary.chmod(mode)
                if os.name == "nt":  # no open file can be renamed there
                    file.close()
                temporary.replace(path)
            finally:
                remove(temporary)
    except OSError as error:
        raise with_filename(error, path) from None


def atomic_write(path: Path, content: bytes, *, own: bool = False) -> None:
    """Write a file in one step; parameters and errors are those of `atomic_replace`."""
    with atomic_replace(path, own=own) as output:
        output.temporary.write_bytes(content)


def move_over(source: Path, path: Path) -> None:
    """Rename a complete file to `path`; a file that it replaces passes on its permissions."""
    mode = _permissions(path)
    if mode is not None:
        source.chmod(mode)
    source.replace(path)


def open_to_append(path: Path) -> IO[str]:
    """Open a text file of this package's own for appending; raises as `check_own_file` does."""
    check_own_file(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "a", newline="", encoding="utf-8")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, to be renamed; removed at the end where it is still there.

    Those that killed processes left for `path` are removed.
    """
    remove_leftovers(path.parent, path.name)
    temporary = _temporary_name(path)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY) if os.name == "posix" else None
    try:
        if descriptor is not None:
            _lock(descriptor)
        yield temporary
    finally:
        remove(temporary)
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders of processes that were killed: those without a lock.

    Parameters
    ----------
    folder
        Where they are.
    name
        Of the file that they were to become; None stands for any file.
    """
    of = "[^/]+" if name is None else re.escape(name)
    pattern = re.compile(rf"\.{of}\.[0-9a-f]{{{2 * _TOKEN}}}\.tmp", re.DOTALL)
    with contextlib.suppress(OSError):
        for found in list(folder.iterdir()):
            if pattern.fullmatch(found.name) and not found.is_symlink():
                _remove_unlocked(found)


def _remove_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if _lock(descriptor):
                remove(path)
        finally:
            os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN)}.tmp")


def _create_temporary(path: Path, mode: int | None) -> tuple[Path, IO[bytes]]:
    """A new, empty, locked file; while it is written nobody can read it who cannot read `path`."""
    # O_EXCL: no file and no link under this name is opened.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    writable = 0o666 if mode is None else mode | stat.S_IRUSR | stat.S_IWUSR
    while True:
        temporary = _temporary_name(path)
        file = os.fdopen(os.open(temporary, flags, writable), "r+b")
        # Before it was locked, another process may have taken it for a leftover.
        if _lock(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()


def _permissions(path: Path) -> int | None:
    """Of an existing file."""
    return path.stat().st_mode & _PERMISSIONS if path.is_file() else None


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder; False if another process has, None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have none
        return None
    return True


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
    if _lock(file.fileno()) is False:
        file.close()
        raise InputError(f"{what} is in use by another process; wait for it, or stop it first")
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
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
