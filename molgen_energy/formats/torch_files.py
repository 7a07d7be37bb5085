"""Files of `torch.save`: a pickle, and the numbers of its tensors, in a zip archive.

PyTorch writes such archives since version 1.6, and does not compress them, so that the numbers are
read where they lie in the file, when they are used. The pickle is read by
`molgen_energy.formats.pickles`, which runs no code, and neither PyTorch nor PyTorch Geometric is
needed. Checksums of all that is used are compared.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.formats.parts import check_part
from molgen_energy.formats.pickles import (
    PickleError,
    Storage,
    StorageKey,
    damaged_pickle,
    iterate_pickle,
    read_pickle_with,
)

MARK = b"PK\x03\x04"
"""The first bytes of such a file."""

_END = struct.Struct("<4s4H2LH")  # of the archive
_END_64_PLACE = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_COMMENT = 1 << 16  # bytes after the end of the archive
_FULL, _FULL_16 = 0xFFFFFFFF, 0xFFFF  # the true value is among the 64-bit ones
_BLOCK = 1 << 24  # bytes
_OBJECT = "data.pkl"


class _Part(NamedTuple):
    """A file inside of the archive."""

    place: int
    """Of its header."""
    size: int
    checksum: int


class TorchFile:
    """An archive of `torch.save`.

    Raises
    ------
    InputError
        It cannot be read, or is no such archive; as all methods do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not check_part(path):
            raise InputError(f"{path} is empty; fetch it again")
        try:
            self._content: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        self._object: _Part | None = None
        self._little = True
        try:
            self._read_directory()
        except (struct.error, ValueError, UnicodeError):
            raise InputError(
                f"{path} is no file of torch.save of PyTorch 1.6 or later, or is cut off or "
                "damaged; fetch it again"
            ) from None

    def load(self) -> Any:
        """The object, with tensors as read-only arrays."""
        try:
            return read_pickle_with(*self._pickle(), self._storage)
        except PickleError as error:
            raise damaged_pickle(self.path, error) from None

    def items(self) -> Iterator[Any]:
        """The items of a list, one after another; any other object as one item."""
        try:
            yield from iterate_pickle(*self._pickle(), self._storage)
        except PickleError as error:
            raise damaged_pickle(self.path, error) from None

    def _pickle(self) -> tuple[io.BufferedReader, int]:
        assert self._object is not None
        data = self._bytes(self._object)
        return io.BufferedReader(_Stream(data), 1 << 16), len(data)

    def _storage(self, key: StorageKey) -> Storage:
        """The numbers of a tensor."""
        number = int(key.key) if key.key.isascii() and key.key.isdecimal() else -1
        k = int(np.searchsorted(self._keys, number))
        if k == len(self._keys) or self._keys[k] != number:
            raise PickleError(f"it lacks the numbers {key.key[:20]!r} of a tensor; fetch it again")
        data = self._bytes(_Part(*(int(column[k]) for column in self._parts)))
        if len(data) != key.count * key.dtype.itemsize:
            raise PickleError("a tensor is cut off or damaged; fetch it again")
        dtype = key.dtype if self._little else key.dtype.newbyteorder(">")
        return Storage(dtype, data.view(dtype))

    def _bytes(self, part: _Part) -> NDArray[np.uint8]:
        """The content of a part, with its checksum compared."""
        header = bytes(self._content[part.place : part.place + _LOCAL.size])
        if len(header) != _LOCAL.size or header[:4] != MARK:
            raise PickleError("it is cut off or damaged; fetch it again")
        *_, name, extra = _LOCAL.unpack(header)
        start = part.place + _LOCAL.size + name + extra
        data = self._content[start : start + part.size]
        checksum = 0
        for k in range(0, part.size, _BLOCK):
            checksum = zlib.crc32(data[k : k + _BLOCK].data, checksum)
        if len(data) != part.size or checksum != part.checksum:
            raise PickleError("it is cut off or damaged (a checksum differs); fetch it again")
        return data

    def _read_directory(self) -> None:
        """Where the parts of the archive are; raises `ValueError` where it is no such archive."""
        place, count, size = self._directory()
        directory = bytes(self._content[place : place + size])
        keys, parts = np.zeros(count, np.int64), np.zeros((3, count), np.int64)
        found = at = 0
        for _ in range(count):
            entry = _ENTRY.unpack_from(directory, at)
            flags, method, checksum, packed, whole = entry[5], entry[6], *entry[9:12]
            name_size, extra_size, comment = entry[12:15]
            at += _ENTRY.size
            name = directory[at : at + name_size].decode().partition("/")[2]
            extra = directory[at + name_size : at + name_size + extra_size]
            at += name_size + extra_size + comment
            wide = _wide_numbers(extra)
            if whole == _FULL:
                whole = next(wide)
            if packed == _FULL:
                packed = next(wide)
            header = entry[18]
            if header == _FULL:
                header = next(wide)
            if entry[0] != b"PK\x01\x02" or flags & 1 or method or packed != whole:
                raise ValueError("no archive of torch.save")
            if max(header, whole) > len(self._content):
                raise ValueError("beyond the end")
            key = name.removeprefix("data/")
            if key != name and key.isascii() and key.isdecimal() and len(key) <= 15:
                keys[found] = int(key)
                parts[:, found] = header, whole, checksum
                found += 1
            elif name == _OBJECT:
                self._object = _Part(header, whole, checksum)
            elif name == "byteorder":
                self._little = self._bytes(_Part(header, whole, checksum)).tobytes() == b"little"
        if self._object is None:
            raise ValueError("no object")
        order = np.argsort(keys[:found], kind="stable")
        self._keys, self._parts = keys[:found][order], parts[:, :found][:, order]

    def _directory(self) -> tuple[int, int, int]:
        """Place, entries and bytes of the list of parts."""
        length = len(self._content)
        tail_at = max(0, length - _END.size - _MOST_COMMENT)
        tail = bytes(self._content[tail_at:])
        end = tail.rfind(b"PK\x05\x06")
        if end < 0:
            raise ValueError("no end")
        *_, count, size, place, _ = _END.unpack_from(tail, end)
        if count == _FULL_16 or size == _FULL or place == _FULL:
            mark, _, at, _ = _END_64_PLACE.unpack_from(tail, end - _END_64_PLACE.size)
            if mark != b"PK\x06\x07":
                raise ValueError("no end of 64 bits")
            values = _END_64.unpack(bytes(self._content[at : at + _END_64.size]))
            count, size, place = values[7:10]
        if place + size > length or count * _ENTRY.size > size:
            raise ValueError("beyond the end")
        return place, count, size


def _wide_numbers(extra: bytes) -> Iterator[int]:
    """Numbers of 64 bits for those that did not fit the entry."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            for k in range(at + 4, at + 4 + size // 8 * 8, 8):
                yield struct.unpack_from("<Q", extra, k)[0]
        at += 4 + size
    raise ValueError("a number is missing")


class _Stream(io.RawIOBase):
    """Bytes of an array as a file, without a copy."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes."""
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part.tobytes()
        self._at += len(part)
        return len(part)

    def tell(self) -> int:
        """Bytes that were read."""
        return self._at
