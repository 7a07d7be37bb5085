"""Sorted texts in few bytes: each without what it shares with the one before, then by bzip2."""

from __future__ import annotations

import bz2
from collections.abc import Iterable
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

_FIRST = 32  # the byte that says 0 common characters; those up to 126 are printable
_MOST_COMMON = 94
_MOST_BYTES = 1 << 21  # more than ten times ours; damaged files must not fill the memory


def pack(texts: Iterable[str]) -> NDArray[np.uint8]:
    """Lines of ASCII, which may repeat, sorted and compressed, (B,)."""
    lines, before = [], ""
    for text in sorted(texts):
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
        common = min(sum(1 for _ in equal), _MOST_COMMON)
        lines.append(chr(_FIRST + common) + text[common:])
        before = text
    return np.frombuffer(bz2.compress("\n".join(lines).encode("ascii")), np.uint8)


def unpack(packed: NDArray[np.uint8]) -> list[str]:
    """The sorted lines of `pack`.

    Raises
    ------
    ValueError
        The bytes are not those of `pack`.
    """
    decompressor = bz2.BZ2Decompressor()
    try:
        content = decompressor.decompress(packed.tobytes(), _MOST_BYTES)
    except (OSError, EOFError) as error:
        raise ValueError("not compressed by bzip2") from error
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("too long, or cut off")
    texts, before = [], ""
    for line in content.decode("ascii").split("\n"):
        common = ord(line[0]) - _FIRST if line else -1
        if not 0 <= common <= len(before):
            raise ValueError("a line that does not begin as the one before")
        before = before[:common] + line[1:]
        texts.append(before)
    return texts
