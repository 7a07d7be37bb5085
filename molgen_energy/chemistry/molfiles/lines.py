"""Lines of a text file, plain or compressed, and what is read of one record."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from molgen_energy.data.molecules import Molecule
from molgen_energy.errors import InputError
from molgen_energy.output import check_file

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_BLOCK = 1 << 14  # bytes that are read at once

MOST_IN_LINE = 4 << 20
"""Characters of a line."""
MOST_IN_RECORD = 64 << 20
"""Characters of a record."""
MOST_LINES = 1_500_000
"""Lines of a record: a million atoms, or half a million with their bonds."""
# Packed molecules take a tenth of their size, copies of one molecule a hundredth.
_MOST_RATIO = 200
_FREE = 100 << 20  # bytes that any file may unpack to
_MOST_MEMORY_XZ = 128 << 20  # bytes; `xz -9` takes 65 MiB

_NOT_READ_ON = "; the file is not read on"

NUL = "it holds NUL bytes, which no text has: the file is damaged"

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged compressed file raises; an `OSError` with a number is another fault."""


class TooLargeError(ValueError):
    """A line, a record or what a file unpacks to is beyond a limit; the message names both."""


def open_unpacked(path: Path) -> io.BufferedReader:
    """A file as bytes, unpacked if its first bytes are those of gzip, bzip2 or xz.

    Reading raises one of `DAMAGED`, or `TooLargeError` where it unpacks to more than 200 times its
    size, beyond 100 MiB.

    Raises
    ------
    InputError
        The file is missing, is no regular file, or cannot be opened.
    """
    check_file(path)
    try:
        file = path.open("rb")
        # By the first bytes, whatever the name: browsers and download tools pack and unpack files.
        start = file.peek()
        opener = next((opener for mark, opener in _OPENERS.items() if start.startswith(mark)), None)
        if opener is None:
            return file
        return io.BufferedReader(_Unpacked(file, opener(file), path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


class _Unpacked(io.RawIOBase):
    """The unpacked content of a file, which can be read once, forwards."""

    def __init__(self, file: IO[bytes], content: Any, path: Path) -> None:
        self._file, self._content = file, content
        self._path = path
        self._most = max(_FREE, _MOST_RATIO * path.stat().st_size)
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """Forwards, as reading tar archives needs."""
        return True

    def tell(self) -> int:
        """Bytes that were read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read up to a position."""
        if whence == io.SEEK_CUR:
            offset += self._position
        if whence == io.SEEK_END or offset < self._position:
            raise io.UnsupportedOperation("packed files are read forwards")
        while self._position < offset and self._read(min(_BLOCK, offset - self._position)):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Unpack as much as one step gives."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        data: bytes = self._content.read1(size)
        self._position += len(data)
        if self._position > self._most:
            raise TooLargeError(
                f"{self._path.name} unpacks to more than {self._most >> 20:,} MiB, {_MOST_RATIO} "
                "times its size, as no molecules do; if it is right, unpack it first"
            )
        return data

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()


class _XZ:
    """Unpacks xz in bounded memory, which `lzma.LZMAFile` does not: a file can ask for 4 GB."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor: lzma.LZMADecompressor | None = None
        self._packed = b""

    def read1(self, size: int) -> bytes:
        """At most `size` bytes, none at the end."""
        while True:
            if not self._packed and (self._decompressor is None or self._decompressor.needs_input):
                self._packed = self._file.read(_BLOCK)
                if not self._packed:
                    if self._decompressor is not None:
                        raise EOFError("the end of the xz file is missing")
                    return b""
            if self._decompressor is None:
                self._packed = self._packed.lstrip(b"\0")  # there may be some between two streams
                if not self._packed:
                    continue
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, _MOST_MEMORY_XZ)
            try:
                data = self._decompressor.decompress(self._packed, size)
            except lzma.LZMAError as error:
                if "Memory" not in str(error):
                    raise
                raise TooLargeError(
                    f"unpacking takes more than {_MOST_MEMORY_XZ >> 20} MiB of memory; unpack it "
                    "first, or pack it with `xz -9`"
                ) from error
            self._packed = b""
            if self._decompressor.eof:
                self._packed = self._decompressor.unused_data
                self._decompressor = None
            if data:
                return data


_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": _XZ,
}


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

    Reading raises what `open_unpacked` names, and `TooLargeError` for a line of more than
    `MOST_IN_LINE` characters, and where a record has more than `MOST_IN_RECORD` characters or
    `MOST_LINES` lines.

    Raises
    ------
    InputError
        The file is missing, is no regular file, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._content = open_unpacked(path)
        try:
            self.head: bytes = self._content.peek(io.DEFAULT_BUFFER_SIZE)
        except (*DAMAGED, TooLargeError):  # reading the lines says so
            self.head = b""
        self.is_utf16 = self.head.startswith(_UTF16_MARKS)
        decode = codecs.getincrementaldecoder("utf-16" if self.is_utf16 else "utf-8-sig")
        self._decoder = io.IncrementalNewlineDecoder(decode("replace"), translate=True)
        self._lines = chain.from_iterable(self._blocks())
        self._ahead: deque[str] = deque()
        self._characters = self._count = 0
        """What was read since the last record began."""
        self.number = 0
        """Of the line that was read last, from 1."""

    def begin_record(self) -> None:
        """Count characters and lines of a record from here on."""
        self._characters = self._count = 0

    def next(self) -> str | None:
        """The next line, None at the end."""
        line = self._ahead.popleft() if self._ahead else next(self._lines, None)
        if line is not None:
            self.number += 1
        return line

    def until(self, mark: str) -> tuple[list[str], bool]:
        """The lines before one that begins with a mark, which is read too, or up to the end.

        And whether there was such a line.
        """
        found: list[str] = []
        ended = False
        peeked = (self._ahead.popleft() for _ in range(len(self._ahead)))
        sign, add = mark[0], found.append  # comparing one character first takes half the time
        try:
            for line in chain(peeked, self._lines):
                if line[0] == sign and line.startswith(mark):
                    ended = True
                    break
                add(line)
        finally:
            self.number += len(found) + ended
        return found, ended

    def ahead(self, k: int) -> str | None:
        """The line that `next` gives after k others, None beyond the end."""
        self._look_ahead(k + 1)
        return self._ahead[k] if k < len(self._ahead) else None

    def peek(self, count: int) -> list[str]:
        """The next lines, fewer at the end, without reading them."""
        return list(self.iter_ahead(count))

    def iter_ahead(self, count: int) -> Iterator[str]:
        """Iterate over the next lines, fewer at the end, before any of them is read."""
        self._look_ahead(count)
        return islice(self._ahead, count)

    def _look_ahead(self, count: int) -> None:
        if (missing := count - len(self._ahead)) > 0:
            self._ahead.extend(islice(self._lines, missing))

    def skip(self, count: int) -> None:
        """Read some lines that `peek` gave."""
        for _ in range(count):
            self._ahead.popleft()
        self.number += count

    def close(self) -> None:
        """Close the file."""
        self._content.close()

    def _blocks(self) -> Iterator[list[str]]:
        """The lines, some hundred at a time."""
        begun = ""  # a line that has no end yet
        data = b"-"
        while data:
            data = self._content.read1(_BLOCK)
            text = self._decoder.decode(data, final=not data)
            lines = list(io.StringIO(text))
            self._check_size(len(text), len(lines), len(begun))
            if lines:
                lines[0] = begun + lines[0]
                begun = "" if lines[-1].endswith("\n") else lines.pop()
            yield lines
        if begun:
            yield [begun]

    def _check_size(self, characters: int, lines: int, begun: int) -> None:
        """Raise `TooLargeError` where a block of so many characters and lines goes beyond a limit.

        ``begun`` characters of its first line came before.
        """
        self._characters += characters
        self._count += lines
        if begun > MOST_IN_LINE:
            raise TooLargeError(f"a line has more than {MOST_IN_LINE:,} characters{_NOT_READ_ON}")
        if self._characters > MOST_IN_RECORD or self._count > MOST_LINES:
            raise TooLargeError(
                f"it has more than {MOST_LINES:,} lines or {MOST_IN_RECORD >> 20} MiB of text"
                f"{_NOT_READ_ON}"
            )
