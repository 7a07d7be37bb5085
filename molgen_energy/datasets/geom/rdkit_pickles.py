"""Pickled lists of molecules, each a SMILES and its RDKit conformers: MiDi and those after it.

MiDi (Vignac et al., ECML 2023), EQGAT-diff, SemlaFlow, FlowMol and Megalodon start from
`train_data.pickle`, `val_data.pickle` and `test_data.pickle`, a split of molecules. The conformers
are taken for sorted by energy. In memory are at most 1,000 molecules of a list, as Python writes
them together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.layout import Entry, Layout, SplitFiles
from molgen_energy.elements import ELEMENTS
from molgen_energy.errors import InputError
from molgen_energy.formats.pickles import PickledMolecule, iterate_pickle, pickle_file


class RDKitPickles(Layout):
    """`train_data.pickle`, `val_data.pickle`, `test_data.pickle`."""

    name = "MiDi's pickles"
    marks = "train_data.pickle, val_data.pickle, test_data.pickle"
    has_smiles = True

    def __init__(self, files: SplitFiles) -> None:
        self._files = files
        self.splits_molecules = files.is_set

    @classmethod
    def in_folder(cls, folder: Path) -> RDKitPickles | None:
        """The files of these names."""
        files = SplitFiles.in_folder(folder, "{}_data.pickle")
        return cls(files) if files else None

    @classmethod
    def of_file(cls, path: Path, start: bytes) -> RDKitPickles | None:
        """A pickle whose first item is a tuple."""
        if not start.startswith(b"\x80"):
            return None
        with pickle_file(path) as (file, size):
            first = next(iterate_pickle(file, size), None)
        return cls(SplitFiles.of_file(path)) if isinstance(first, tuple) else None

    def check_split(self) -> None:
        """All three files must be there."""
        self._files.check()

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, file by file."""
        for path, label in self._files.each(own_split):
            with pickle_file(path) as (file, size):
                for number, found in enumerate(iterate_pickle(file, size), start=1):
                    if not _is_pair(found):
                        raise InputError(
                            f"{path}: item {number} is not a SMILES with RDKit conformers; fetch "
                            "it again"
                        )
                    smiles, conformers = found
                    yield Entry(
                        f"{path.name}: molecule {number}",
                        [
                            one.content if isinstance(one, PickledMolecule) else None
                            for one in conformers
                        ],
                        smiles=smiles,
                        splits=label * len(conformers),
                    )

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """The bytes of an RDKit molecule."""
        return decode_pickled(conformer)


def _is_pair(found: Any) -> bool:
    return (
        isinstance(found, (tuple, list))
        and len(found) == 2
        and isinstance(found[0], str)
        and isinstance(found[1], (tuple, list))
    )


def decode_pickled(content: Any) -> Molecule:
    """A molecule of the bytes of `Mol.ToBinary`; damaged ones may end the process."""
    from rdkit import Chem, rdBase

    from molgen_energy.chemistry.convert import molecule_from_rdkit

    if not isinstance(content, bytes):
        raise ValueError("a conformer is no RDKit molecule")
    with rdBase.BlockLogs():
        try:
            molecule = Chem.Mol(content)  # type: ignore[call-overload] # its stubs lack it
        except (ValueError, RuntimeError, MemoryError):
            raise ValueError("RDKit cannot read a conformer, which is damaged") from None
        try:
            found = molecule_from_rdkit(molecule)
        except OverflowError:
            raise ValueError("a conformer has an element or charge that there is not") from None
    if found.atomic_numbers.max() > ELEMENTS:
        raise ValueError(f"a conformer has the atomic number {found.atomic_numbers.max()}")
    return found
