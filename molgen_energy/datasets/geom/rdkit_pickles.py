"""Pickled lists of molecules, each a SMILES and its RDKit conformers: MiDi and those after it.

MiDi (Vignac et al., ECML 2023), EQGAT-diff, SemlaFlow, FlowMol and Megalodon start from
`train_data.pickle`, `val_data.pickle` and `test_data.pickle`, a split of molecules. The conformers
are taken for sorted by energy. In memory are at most 1,000 molecules of a list, as Python writes
them together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.layout import Entry, PickledListLayout
from molgen_energy.elements import ELEMENTS
from molgen_energy.formats.pickles import PickledMolecule


class RDKitPickles(PickledListLayout):
    """`train_data.pickle`, `val_data.pickle`, `test_data.pickle`."""

    name = "MiDi's pickles"
    file_names = "train_data.pickle, val_data.pickle, test_data.pickle"
    file_pattern = "{}_data.pickle"
    has_smiles = True

    @staticmethod
    def is_item(found: Any) -> bool:
        """A tuple."""
        return isinstance(found, tuple)

    @staticmethod
    def entry(item: Any) -> Entry:
        """A SMILES with RDKit conformers."""
        if not _is_pair(item):
            raise ValueError("not a SMILES with RDKit conformers")
        smiles, conformers = item
        return Entry("", pickled_bytes(conformers), smiles=smiles)

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """The bytes of an RDKit molecule."""
        return decode_pickled(conformer)


def pickled_bytes(conformers: Iterable[Any]) -> list[bytes | None]:
    """What `decode_pickled` takes; None for what is no RDKit molecule."""
    return [one.content if isinstance(one, PickledMolecule) else None for one in conformers]


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
