"""HDF5 files of samples that are all of one shape: columns of equal length, and their split.

The schema is that of molecules' files (`molgen_energy.data.hdf5`): attributes `schema`, `system`,
`source`, `created_by`, those of the system, and `provenance`, JSON that names the checkpoint and
the seed of samples; data sets (M, …), among them `split` (M,) uint8. A physical system declares its
own data sets and attributes (`molgen_energy.formats.declaration`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.hdf5 import DeferredErrorFile, check_hdf5_name
from molgen_energy.data.splits import SPLITS
from molgen_energy.formats.declaration import SCHEMA, HDF5Format, check_relation
from molgen_energy.formats.hdf5 import open_hdf5
from molgen_energy.formats.limits import check_memory
from molgen_energy.output import atomic_replace

Columns = Mapping[str, NDArray[Any]]

_MARGIN = 1 << 20  # bytes for the library's own tables
_COPIES = 4
"""How many times what is stored is in memory at once, with float64 copies."""


class ArrayFile:
    """A file of one physical system, read whole into memory and checked by its declaration.

    Parameters
    ----------
    path
        The file.
    format
        Its declaration, with M records.
    remedy
        The command that makes such a file, for the message where it is missing.

    Raises
    ------
    InputError
        The file is missing, no HDF5, cut off, of another schema or another physical system, empty,
        not as declared, or larger than the available memory.
    """

    def __init__(self, path: Path, format: HDF5Format, remedy: str = "") -> None:
        self.path = path
        with open_hdf5(path, format, remedy) as file:
            check_memory(_COPIES * file.total_bytes(), str(path), "take fewer records")
            self.columns: dict[str, NDArray[Any]] = {name: file.read(name) for name in file.specs}
            self.attributes = file.attributes
        for relation in format.relations:
            check_relation(path, relation, self.columns, remedy=format.remedy)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def source(self) -> str:
        """What the file was made from."""
        return str(self.attributes.get("source", self.path.name))

    @property
    def provenance(self) -> dict[str, str]:
        """Checkpoint, seed and configuration that samples come from."""
        return dict(self.attributes.get("provenance", {"source": self.source}))

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


def write_arrays(
    path: Path,
    system: str,
    source: str,
    columns: Columns,
    attributes: Mapping[str, Any],
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write a file that `ArrayFile` reads, under a temporary name that is renamed at the end.

    Without `split` among the columns all samples are for training.

    Raises
    ------
    InputError
        The path does not end in .h5 or .hdf5, or is not writable.
    OSError
        No space is left, or the disk has another fault.
    """
    check_hdf5_name(path)
    count = len(next(iter(columns.values())))
    columns = {"split": np.zeros(count, np.uint8)} | dict(columns)
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
