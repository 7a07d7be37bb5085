"""The molecules that `sample` returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex, overload

from rdkit import Chem
from rdkit.Chem.rdMolDescriptors import CalcMolFormula

from molgen_energy.chemistry.convert import from_rdkit, to_ase
from molgen_energy.chemistry.fields import BONDS
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.output import named_path
from molgen_energy.systems.molecules.sampling import check_name

_NAMED = 3


class MoleculeList(list[Chem.Mol]):
    """A list of RDKit molecules, each with one conformer (Å), that shows itself in a notebook.

    It is a list in every respect: RDKit, `evaluate` and `preprocess` take it. A slice is a
    `MoleculeList` too.

    >>> molecules = molgen_energy.sample(100)
    >>> molecules[:6]  # in a notebook, rotating
    >>> molecules.save("samples.sdf")
    """

    @overload
    def __getitem__(self, index: SupportsIndex) -> Chem.Mol: ...

    @overload
    def __getitem__(self, index: slice) -> MoleculeList: ...

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return MoleculeList(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        formulas = [f"{CalcMolFormula(m)}" for m in super().__getitem__(slice(0, _NAMED)) if m]
        more = ", …" if len(self) > _NAMED else ""
        return f"MoleculeList of {len(self):,}: {', '.join(formulas)}{more}"

    def _repr_html_(self) -> str:
        from molgen_energy.api.show import show

        return show(self)._repr_html_()

    def to_ase(self) -> list[Any]:
        """ASE `Atoms`, one for each molecule: positions in Å, formal charges (e) as initial ones.

        Properties and SMILES are in `info`. ASE has no bonds.

        Raises
        ------
        InputError
            ASE is not installed.
        """
        return to_ase(from_rdkit(self))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the molecules into a file `.sdf`, `.xyz` or `.h5`; returns its path.

        The records are those that `sample` writes: bonds that were perceived from distances are
        marked as such, and data of a molecule become fields.

        Raises
        ------
        InputError
            The name has another ending, or the file cannot be written.
        """
        from molgen_energy.chemistry.molfiles import MoleculeTextWriter
        from molgen_energy.data.hdf5 import MoleculeWriter

        target = named_path(Path(path))
        check_name(target)
        if not self:
            raise InputError("there are no molecules to save")
        molecules = self._arrays()
        if target.suffix.lower() == ".h5":
            with MoleculeWriter(target, source="molecules in memory") as file:
                file.append(molecules)
        else:
            with MoleculeTextWriter(target, {}) as text:
                text.append(molecules)
        return target

    def _arrays(self) -> Molecules:
        """As arrays; without bonds where these were perceived, which the writer does again."""
        origins = Counter(m.GetProp(BONDS) if m.HasProp(BONDS) else "given" for m in self)
        molecules = from_rdkit(self)
        return molecules if origins["given"] else replace(molecules, bonds=None)
