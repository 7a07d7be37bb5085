"""The heaps in which HDF5 files keep texts of any length, checked before the library reads them.

A heap is a list of objects, each with a size. The library steps over them and never ends where a
size is 0 or so large that it wraps around.
"""

from __future__ import annotations

import mmap
import os

_MOST = 1 << 28  # bytes of a file that is searched; larger ones would take seconds
_MARK = b"GCOL\x01\0\0\0"
_HEAD = 16  # bytes before the first object, and of each object before its content


def has_damaged_heap(descriptor: int) -> bool:
    """Whether an open HDF5 file has a heap that the library could read for ever.

    Source: HDF5 File Format Specification 3.0, section III.E. Files above 256 MB are not searched.
    """
    size = os.fstat(descriptor).st_size
    if not 0 < size <= _MOST:
        return False
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
        place = content.find(_MARK)
        while place >= 0:
            if _is_damaged(content, place, size):
                return True
            place = content.find(_MARK, place + 1)
    return False


def _is_damaged(content: mmap.mmap, start: int, size: int) -> bool:
    """Whether the sizes of a heap's objects do not lead from its begin to its end."""
    end = start + _number(content, start + 8, 8)
    if end > size:  # the library refuses it
        return False
    place = start + _HEAD
    while place + _HEAD <= end:
        length = _number(content, place + 8, 8)
        if _number(content, place, 2):  # otherwise it is free, with a length that includes its head
            length = _HEAD + (length + 7) // 8 * 8
        if not 0 < length <= end - place:
            return True
        place += length
    return False


def _number(content: mmap.mmap, place: int, size: int) -> int:
    return int.from_bytes(content[place : place + size], "little")
