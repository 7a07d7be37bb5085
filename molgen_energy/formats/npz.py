"""Reading `.npz` archives of NumPy: the one place that does, which checks what an archive declares.

An archive is a ZIP of `.npy` files. The directory of the ZIP and the header of each array declare
sizes, which can be far larger than the file; an array of objects is a pickle, which can run any
program. So each header is read and compared with the declaration, the file's own size and the
available memory, and then as many bytes as it says are read, and no more.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.formats.declaration import (
    DatasetSpec,
    Size,
    check_values,
    shape_text,
    shown,
)
from molgen_energy.formats.limits import check_memory
from molgen_energy.formats.npy import read_header
from molgen_energy.output import check_file

_MEMBERS = 100  # arrays of an archive
_RATIO = 1032  # the most that a byte of deflate becomes
_COPIES = 4  # of each array in memory at once, some in float64
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class NpzFormat:
    """The declaration of archives of arrays. Integers may stand for floating-point numbers."""

    title: str
    purpose: str
    arrays: tuple[DatasetSpec, ...]
    sizes: Mapping[str, Size]
    """What symbols in shapes stand for."""
    remedy: str
    """How to get a good file, the end of every message."""


def read_npz(path: Path, format: NpzFormat) -> dict[str, NDArray[Any]]:
    """The declared arrays of an archive, of the declared types and with their values checked.

    Raises
    ------
    InputError
        It is missing, no archive, not as declared, or larger than the available memory.
    """
    check_file(path)
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist()[: _MEMBERS + 1]]
            if len(names) > _MEMBERS:
                raise InputError(f"{path} holds more than {_MEMBERS} files; {format.remedy}")
            sizes: dict[str, int] = {}
            for spec in format.arrays:
                if names.count(f"{spec.name}.npy") != 1:
                    raise InputError(f"{path} lacks the array '{spec.name}'; {format.remedy}")
                arrays[spec.name] = _array(path, archive, spec, sizes, format)
    except InputError:
        raise
    except Exception as error:  # damaged archives raise errors of many types
        why = shown(error) or type(error).__name__
        raise InputError(f"{path} is not an .npz of NumPy ({why}); {format.remedy}") from None
    return arrays


def _array(
    path: Path,
    archive: zipfile.ZipFile,
    spec: DatasetSpec,
    sizes: dict[str, int],
    format: NpzFormat,
) -> NDArray[Any]:
    """One array; `sizes` holds the numbers that symbols of shapes stand for."""
    member = archive.getinfo(f"{spec.name}.npy")

    def differs(found: str) -> InputError:
        return InputError(
            f"{path}: array '{spec.name}': expected {spec.structure}, found {found}; "
            f"{format.remedy}"
        )

    if member.compress_type not in _METHODS:
        raise differs("a compression other than that of NumPy")
    stored = member.compress_size
    if stored > path.stat().st_size or member.file_size > max(1, stored) * _RATIO:
        raise differs(f"{member.file_size:,} bytes declared and {stored:,} stored")
    with archive.open(member) as content:
        shape, by_column, kind = read_header(content)
        if kind.kind not in "iuf" or kind.itemsize > 8:
            raise differs("objects, which are not read" if kind.hasobject else str(kind))
        if not _fits(shape, spec, sizes, format):
            raise differs(f"{kind} {shape_text(shape)}")
        size = math.prod(shape) * kind.itemsize
        if content.tell() + size != member.file_size:
            raise differs(f"{kind} {shape_text(shape)} in {member.file_size:,} bytes")
        check_memory(_COPIES * size, f"{path}: array '{spec.name}'", "take fewer records")
        flat = np.frombuffer(content.read(size), kind)
        content.read(1)  # compares the checksum
    values = flat.reshape(shape, order="F" if by_column else "C")
    with np.errstate(over="ignore"):  # infinity is refused
        found = values.astype(spec.read_dtype)
    check_values(path, spec, found, remedy=format.remedy)
    return found


def _fits(
    shape: tuple[int, ...], spec: DatasetSpec, sizes: dict[str, int], format: NpzFormat
) -> bool:
    """Whether a shape is the declared one, and no number is below its least."""
    if len(shape) != len(spec.shape):
        return False
    return all(
        length >= (format.sizes[symbol].low if isinstance(symbol, str) else symbol)
        and length == (sizes.setdefault(symbol, length) if isinstance(symbol, str) else symbol)
        for length, symbol in zip(shape, spec.shape, strict=True)
    )
