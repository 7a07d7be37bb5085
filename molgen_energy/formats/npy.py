"""Single arrays of NumPy, `.npy`, which are read from the file when they are used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.formats.declaration import shape_text, shown
from molgen_energy.formats.parts import check_part

MARK = b"\x93NUMPY"
"""The first bytes of such a file."""

_HEADER = 10_000  # bytes, as NumPy allows


def read_header(content: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type of an array."""
    version = np.lib.format.read_magic(content)
    if version != (1, 0):  # others, for structured types, read a header of any size
        raise ValueError(f"version {version[0]}.{version[1]} of the .npy format")
    shape, by_column, kind = np.lib.format.read_array_header_1_0(content, max_header_size=_HEADER)
    return shape, by_column, kind


def map_npy(path: Path, shape: tuple[int | None, ...]) -> NDArray[Any]:
    """An array of numbers of a shape, None for any length, whose rows are read when they are used.

    Raises
    ------
    InputError
        The file cannot be read, is no such array, holds objects, is cut off, or has another shape.
    """
    size = check_part(path)
    try:
        with path.open("rb") as file:
            found, by_column, kind = read_header(file)
            start = file.tell()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # damaged headers raise errors of many types
        why = shown(error) or type(error).__name__
        raise InputError(f"{path} is no array of NumPy ({why}); fetch it again") from None
    fits = len(found) == len(shape) and all(
        length in (wanted, length if wanted is None else None)
        for length, wanted in zip(found, shape, strict=True)
    )
    if kind.kind not in "iuf" or kind.itemsize > 8 or by_column or not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        is_kind = "objects, which are not read" if kind.hasobject else str(kind)
        raise InputError(
            f"{path}: expected an array of numbers ({wanted}), found {is_kind} {shape_text(found)}"
        )
    if start + math.prod(found) * kind.itemsize != size:
        raise InputError(
            f"{path} is cut off or damaged: {kind} {shape_text(found)} in {size:,} bytes; fetch it "
            "again"
        )
    if not math.prod(found):
        return np.zeros(found, kind)
    return np.memmap(path, kind, "r", start, found)
