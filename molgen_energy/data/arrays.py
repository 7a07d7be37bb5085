"""HDF5 files of samples that are all of one shape: columns of equal length, and their split.

The schema is that of molecules' files (`molgen_energy.data.hdf5`): attributes `schema`, `system`,
`source`, `created_by`, those of the system, and `provenance`, JSON that names the checkpoint and
the seed of samples; data sets (M, …), and an optional `split` (M,) uint8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.hdf5 import (
    DeferredErrorFile,
    check_columns,
    check_hdf5_name,
    open_store,
)
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError
from molgen_energy.formats.declaration import SCHEMA
from molgen_energy.output import atomic_replace

Columns = Mapping[str, NDArray[Any]]


class Column(NamedTuple):
    """Shape and type that a data set must have."""

    shape: tuple[int | str, ...]
    """Of one sample. A letter stands for one number in all columns of a file."""
    kind: str = "f"
    """f for floating-point numbers, i for integers."""


_MARGIN = 1 << 20  # bytes for the library's own tables


class ArrayFile:
    """A file of one physical system, read whole into memory.

    Parameters
    ----------
    path
        The file.
    system
        Name of the physical system that it must be of.
    columns
        Data sets that it must have; those of `optional` it may have, others are not read.
        Floating-point numbers must be finite.
    remedy
        The command that makes such a file, for the message where it is missing.

    Raises
    ------
    InputError
        The file is missing, no HDF5, cut off, of another schema or another physical system, empty,
        lacks a column, or a column has another shape or type.
    """

    def __init__(
        self,
        path: Path,
        system: str,
        columns: Mapping[str, Column],
        optional: Mapping[str, Column] = MappingProxyType({}),
        remedy: str = "`molgen-energy preprocess`",
    ) -> None:
        self.path = path
        with open_store(path, system, remedy) as file:
            check_columns(file, path, columns)
            known = {**columns, **optional, "split": Column((), "i")}
            self.columns: dict[str, NDArray[Any]] = {}
            sizes: dict[str, int] = {}
            for name, column in known.items():
                if name in file:
                    self.columns[name] = _read(file[name], name, column, sizes, path)
            self.attributes = {name: _plain(value) for name, value in file.attrs.items()}
        lengths = {len(column) for column in self.columns.values()}
        if len(lengths) > 1:
            raise InputError(f"{path}: the lengths of its data sets disagree; make it again")
        if lengths == {0}:
            raise InputError(f"{path} is empty; make it again")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def source(self) -> str:
        """What the file was made from."""
        return str(self.attributes.get("source", self.path.name))

    @property
    def provenance(self) -> dict[str, str]:
        """Checkpoint, seed and configuration that samples come from."""
        try:
            return dict(json.loads(self.attributes["provenance"]))
        except (KeyError, TypeError, ValueError):  # none, or of another program
            return {"source": self.source}

    def split_indices(self, split: str) -> NDArray[np.int64]:
        """Numbers of the samples of `train`, `valid` or `test`; without a split all are `train`."""
        labels = self.columns.get("split", np.zeros(len(self), np.uint8))
        return np.flatnonzero(labels == SPLITS.index(split))

    def select(self, which: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The columns of some samples."""
        return {name: column[which] for name, column in self.columns.items() if name != "split"}

    def fingerprint(self) -> str:
        """Hash of the training samples, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, column in sorted(self.select(self.split_indices("train")).items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]


def _read(data: Any, name: str, column: Column, sizes: dict[str, int], path: Path) -> NDArray[Any]:
    """Read a data set and check it; `sizes` holds the numbers that letters of shapes stand for."""
    kinds = {"f": "f", "i": "iu"}[column.kind]
    shape = getattr(data, "shape", None)
    fits = shape is not None and len(shape) == 1 + len(column.shape) and data.dtype.kind in kinds
    if shape is not None and fits:
        for size, expected in zip(shape[1:], column.shape, strict=True):
            known = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
            fits = fits and size == known
    if not fits:
        shown = ", ".join(map(str, ("M", *column.shape)))
        what = {"f": "floating-point numbers", "i": "integers"}[column.kind]
        raise InputError(f"{path}: {name} must be {what} ({shown}); make it again")
    try:
        values: NDArray[Any] = data[:]
    except OSError as error:
        raise InputError(f"{path} is damaged ({error}); make it again") from error
    if column.kind == "f":
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            raise InputError(
                f"{path}: record {bad.argmax() + 1}: {name} holds what is not a finite number; "
                "make it again"
            )
    return values


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """All data sets of a file, by name."""
    with h5py.File(path, "r") as file:
        return {name: data[:] for name, data in file.items()}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def write_arrays(
    path: Path,
    system: str,
    source: str,
    columns: Columns,
    attributes: Mapping[str, Any],
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write a file that `ArrayFile` reads, under a temporary name that is renamed at the end.

    Raises
    ------
    InputError
        The path does not end in .h5 or .hdf5, or is not writable.
    OSError
        No space is left, or the disk has another fault.
    """
    check_hdf5_name(path)
    with atomic_replace(path) as output, DeferredErrorFile(output.temporary) as raw:
        with h5py.File(raw, "w") as file:
            file.attrs.update(
                schema=SCHEMA,
                system=system,
                source=source,
                created_by=f"molgen-energy {__version__}",
                **attributes,
            )
            file.flush()
            raw.reserve(sum(column.nbytes for column in columns.values()) + _MARGIN)
            if provenance is not None:
                file.attrs["provenance"] = json.dumps(dict(provenance))
            for name, column in columns.items():
                file.create_dataset(name, data=column)
        raw.check()
