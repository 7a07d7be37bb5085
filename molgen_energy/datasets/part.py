"""A part of the training molecules of a file, such as one half of them.

Conditional generation is judged by a network that predicts the property of samples. It must not
share training molecules with the generator: both train on one half of them (EDM, section 5.2 of
Hoogeboom et al., ICML 2022).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import MoleculeChunk
from molgen_energy.data.splits import SPLITS, check_seed
from molgen_energy.datasets.base import MoleculeDataset, argument, option
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.errors import InputError
from molgen_energy.output import named_path

_CHUNK = 10_000
_MOST_PARTS = 1000


@dataclass(frozen=True, kw_only=True)
class TrainingPart(MoleculeDataset):
    """A random part of the training molecules of an HDF5 file, such as one half of two."""

    name = "part"
    output = "FILE_part1of2.h5"

    files: tuple[Path, ...] = argument("An HDF5 file of `preprocess`.", "FILE.h5")
    part: str = option(
        "1/2",
        "Which part of the training molecules to keep: 1/2 and 2/2 are two random halves. "
        "Validation and test molecules stay.",
    )
    seed: int = option(0, "Seed of the parts; parts of one seed have no molecule in common.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(map(named_path, self.files)))

    def default_output(self) -> Path:
        """Named after the file and the part."""
        number, count = self._numbers()
        return Path(f"{self._file().stem}_part{number}of{count}.h5")

    def source_name(self) -> str:
        """The source of the file, and which part of it."""
        from molgen_energy.data.hdf5 import MoleculeFile

        with MoleculeFile(self._file()) as file:
            return f"{file.source}, part {self.part} of the training molecules, seed {self.seed}"

    def check(self) -> None:
        """Raise `InputError` unless file, part and seed can be used."""
        self._file()
        self._numbers()
        check_seed(self.seed)

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The molecules of the part, of the validation and of the test split, in their order."""
        from molgen_energy.data.hdf5 import MoleculeFile

        with MoleculeFile(self._file()) as file:
            kept = self._kept(file.split)
            for chunk in file.chunks(_CHUNK):
                log.progress(int(chunk.records[-1]), len(file))
                chosen = np.flatnonzero(kept[chunk.records - 1])
                if len(chosen):
                    yield chunk.select(chosen)

    def split_labels(self, count: int, groups: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """Those of the file."""
        from molgen_energy.data.hdf5 import MoleculeFile

        with MoleculeFile(self._file()) as file:
            labels: NDArray[np.uint8] = file.split[self._kept(file.split)]
            return labels

    def _kept(self, split: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which molecules are in the file that is written, (M,), by their split (M,)."""
        number, count = self._numbers()
        train = np.flatnonzero(split == SPLITS.index("train"))
        if len(train) < count:
            raise InputError(
                f"{self._file()} holds {len(train):,} training molecules, too few for "
                f"--part {self.part}"
            )
        order = np.random.default_rng(self.seed).permutation(train)
        kept: NDArray[np.bool_] = split != SPLITS.index("train")
        kept[np.array_split(order, count)[number - 1]] = True
        return kept

    def _file(self) -> Path:
        if len(self.files) != 1:
            raise InputError("name one HDF5 file of `preprocess`")
        return self.files[0]

    def _numbers(self) -> tuple[int, int]:
        """K and N of the part K/N."""
        match = re.fullmatch(r"\s*([0-9]{1,4})\s*/\s*([0-9]{1,4})\s*", self.part)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count or not 2 <= count <= _MOST_PARTS:
            raise InputError(
                f"--part {self.part}: expected K/N such as 1/2, with K from 1 to N and N from 2 to "
                f"{_MOST_PARTS}"
            )
        return number, count
