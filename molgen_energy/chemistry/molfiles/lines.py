"""Lines of a text file, plain or compressed, and what is read of one record."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from molgen_energy.data.molecules import Molecule
from molgen_energy.errors import InputError
from molgen_energy.output import check_file

# By their first bytes, whatever the name: browsers and download tools pack and unpack files.
_OPENERS: dict[bytes, Callable[[Path, str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged compressed file raises; an `OSError` with a number is another fault."""


def open_unpacked(path: Path) -> Any:
    """A file as bytes, unpacked if its first bytes are those of gzip, bzip2 or xz.

    Raises
    ------
    InputError
        The file is missing, is no regular file, or cannot be opened.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            start = file.peek()
        opener = next((opener for mark, opener in _OPENERS.items() if start.startswith(mark)), open)
        return opener(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


class Record(NamedTuple):
    """One record of a file."""

    line: int
    """Its first line, from 1."""
    molecule: Molecule | str
    """The molecule, or why it cannot be read."""
    fields: dict[str, str]
    """Data fields: those of an SDF, or keys of the comment of an XYZ."""
    note: str = ""
    """What is dropped or may be misunderstood; the same text for all such records."""


class Lines:
    """Lines with their numbers; those ahead can be looked at before they are read.

    Raises
    ------
    InputError
        The file is missing, is no regular file, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        content = open_unpacked(path)
        try:
            self.head: bytes = content.peek(io.DEFAULT_BUFFER_SIZE)
        except DAMAGED:  # reading the lines says so
            self.head = b""
        self.is_utf16 = self.head.startswith(_UTF16_MARKS)
        encoding = "utf-16" if self.is_utf16 else "utf-8-sig"
        self._text = io.TextIOWrapper(content, encoding, errors="replace")
        self._ahead: deque[str] = deque()
        self.number = 0
        """Of the line that was read last, from 1."""

    def next(self) -> str | None:
        """The next line, None at the end."""
        line = self._ahead.popleft() if self._ahead else next(self._text, None)
        if line is not None:
            self.number += 1
        return line

    def ahead(self, k: int) -> str | None:
        """The line that `next` gives after k others, None beyond the end."""
        self._look_ahead(k + 1)
        return self._ahead[k] if k < len(self._ahead) else None

    def peek(self, count: int) -> list[str]:
        """The next lines, fewer at the end, without reading them."""
        self._look_ahead(count)
        return list(islice(self._ahead, count))

    def _look_ahead(self, count: int) -> None:
        if (missing := count - len(self._ahead)) > 0:
            self._ahead.extend(islice(self._text, missing))

    def skip(self, count: int) -> None:
        """Read some lines that `peek` gave."""
        for _ in range(count):
            self._ahead.popleft()
        self.number += count

    def close(self) -> None:
        """Close the file."""
        self._text.close()
