"""The heaps of an HDF5 file, which hold its texts of any length.

The HDF5 library walks through a heap object by object, and never ends where the size of an object
is damaged so that the next one begins at the same place. So heaps are checked before the library
reads one ("HDF5 File Format Specification", section III.E: global heap).
"""

from __future__ import annotations

import mmap
import os
from functools import lru_cache
from pathlib import Path

_HEAP = b"GCOL\x01\0\0\0"  # signature, version and three zeros
_HEADER = 16  # bytes, of a heap and of an object in it
_STRETCH = 1 << 26  # bytes that are mapped into memory at once
_SIZE = slice(8, 16)  # of a heap or an object; the index of an object is in its first two bytes


def damaged_heap(path: Path) -> int | None:
    """The place of a heap whose objects do not lie one after another in it; None if all do.

    The whole file is searched, once as long as it does not change.
    """
    found = path.stat()
    return _damaged_heap(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _damaged_heap(path: Path, *_: int) -> int | None:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for start in range(0, len(content), _STRETCH):
                end = start + _STRETCH + len(_HEAP) - 1
                place = content.find(_HEAP, start, end)
                while place >= 0:
                    if not _is_whole(content, place):
                        return place
                    place = content.find(_HEAP, place + 1, end)
                if hasattr(mmap, "MADV_DONTNEED"):  # else the whole file counts as our memory
                    content.madvise(mmap.MADV_DONTNEED, start, min(_STRETCH, len(content) - start))
    return None


def _is_whole(content: mmap.mmap, start: int) -> bool:
    """Whether each object of a heap takes some bytes and ends in it."""
    end = start + int.from_bytes(content[start + 8 : start + 16], "little")
    if end > len(content):
        return False
    place = start + _HEADER
    while place + _HEADER <= end:
        header = content[place : place + _HEADER]
        size = int.from_bytes(header[_SIZE], "little")
        # The free space at the end counts its header, an object does not and is padded to 8 bytes.
        step = _HEADER + (size + 7) // 8 * 8 if header[:2] != b"\0\0" else size
        if step < _HEADER or place + step > end:
            return False
        place += step
    return True
