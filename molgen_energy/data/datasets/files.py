"""Make HDF5 files of QM9 and of anybody's SDF or XYZ files."""

from __future__ import annotations

from pathlib import Path

from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.datasets.qm9 import Progress, read_qm9, split_of_edm
from molgen_energy.data.hdf5 import MoleculeWriter, check_hdf5_name
from molgen_energy.data.splits import check_fractions, random_split

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
    check_hdf5_name(output)
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
    check_hdf5_name(output)
    with MoleculeWriter(output, source=reader.path.name) as writer:
        for piece in reader.chunks(_PIECE):
            writer.append(piece.molecules)
            progress(len(piece))
        writer.set_split(random_split(writer.count, fractions, seed))
    return writer.count
