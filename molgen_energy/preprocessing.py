"""Make HDF5 files of QM9 and of anybody's SDF or XYZ files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.sources.qm9 import Progress, read_qm9, split_of_edm
from molgen_energy.errors import InputError
from molgen_energy.output import check_writable

_PIECE = 2000


def preprocess_qm9(
    output: Path, source: Path | None = None, progress: Progress = lambda _: None
) -> int:
    """Write QM9 with EDM's split to `output`; returns the number of molecules.

    Raises
    ------
    InputError
        QM9 is not to be found or incomplete, or `output` cannot be written.
    """
    _check_output(output)
    molecules = read_qm9(source, progress)
    name = "QM9 (qm9pack)" if source is None else f"QM9 ({source.name})"
    with MoleculeWriter(output, source=name) as writer:
        writer.append(molecules)
        writer.set_split(split_of_edm())
    return len(molecules)


def preprocess_file(
    reader: MoleculeReader,
    output: Path,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> int:
    """Write the molecules of an SDF or XYZ file to `output`; returns their number.

    Parameters
    ----------
    fractions
        Shares of training, validation and test molecules, drawn at random with `seed`.

    Raises
    ------
    InputError
        A record is bad, the fractions do not add up to 1, or `output` cannot be written or is
        not named .h5 or .hdf5.
    """
    check_fractions(fractions)
    _check_output(output)
    with MoleculeWriter(output, source=reader.path.name) as writer:
        for piece in reader.chunks(_PIECE):
            writer.append(piece.molecules)
            progress(len(piece))
        writer.set_split(random_split(writer.count, fractions, seed))
    return writer.count


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Raise `InputError` unless three shares, none negative, add up to 1, with some to train on."""
    # Written so that NaN is refused too.
    if not (min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-6 and fractions[0] > 0):
        raise InputError(
            f"the split {','.join(f'{x:g}' for x in fractions)} must be three shares, train above "
            "zero, that add up to 1, such as 0.8,0.1,0.1"
        )


def random_split(count: int, fractions: tuple[float, float, float], seed: int) -> NDArray[np.uint8]:
    """Labels 0, 1, 2 in the given shares in random order, (count,); one at least is 0."""
    train = max(1, round(fractions[0] * count))
    valid = min(count - train, round(fractions[1] * count))
    labels = np.repeat(np.array([0, 1, 2], np.uint8), [train, valid, count - train - valid])
    return np.random.default_rng(seed).permutation(labels)


def _check_output(output: Path) -> None:
    if output.suffix.lower() not in (".h5", ".hdf5"):
        raise InputError(f"{output}: the name of an HDF5 file must end in .h5 or .hdf5")
    check_writable(output)
