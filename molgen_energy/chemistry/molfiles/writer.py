"""Write molecules into SDF and XYZ files."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.fields import BOND_FORM, BONDS, data_fields, units_field
from molgen_energy.chemistry.molfiles import sdf, xyz
from molgen_energy.chemistry.rdkit import (
    MAX_NEIGHBOURS,
    bond_forms,
    max_neighbours,
    sanitize,
    short_reason,
)
from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules
from molgen_energy.output import atomic_replace

BondForm = Literal["kekule", "aromatic"]


class MoleculeTextWriter:
    """Write SDF or XYZ chunk by chunk; the file appears under its name when the block succeeds.

    Every molecule becomes a record, with its properties, SMILES and group as data fields (SDF) or
    keys of the comment (XYZ). An SDF record holds the bonds and formal charges of the molecule, as
    they are unless `bond_form` chooses; where there are no bonds, they are perceived from
    distances. The field `bonds` says `given` or `perceived`, `status` says `valid` or why RDKit
    cannot sanitise the molecule, and `fragments` counts its fragments. No stereochemistry is
    marked: programs derive it from the coordinates.

    No format can hold coordinates that are not finite: the atoms are put at the origin, and the
    status says so. A molecule with more bonds at an atom than RDKit handles is written without
    bonds.

    Parameters
    ----------
    path
        Ends in .sdf or .xyz.
    fields
        Data fields of every molecule. They take precedence over properties of the same name.
    once
        Data fields of the first molecule of an SDF only, such as a whole configuration.
    bond_form
        Of the bonds that molecules have, in an SDF: `kekule`, or `aromatic` where RDKit finds
        aromaticity. The field `bond_form` names it. Aromatic bonds that RDKit cannot Kekulise
        stay, and the field says so. None writes bonds as they are, without the field.
    """

    def __init__(
        self,
        path: Path,
        fields: dict[str, str],
        once: dict[str, str] | None = None,
        bond_form: BondForm | None = None,
    ) -> None:
        self._path = path
        self._bond_form = bond_form
        self._fields = fields
        self._once = once or {}
        self._is_sdf = path.suffix.lower() == ".sdf"
        self.count = 0
        self.invalid: Counter[str] = Counter()
        """Records of an SDF by the reason why RDKit cannot sanitise their given bonds."""
        self.not_kekulised = 0
        """Records whose aromatic bonds RDKit cannot Kekulise."""

    def __enter__(self) -> MoleculeTextWriter:
        self._stack = ExitStack()
        self.output = self._stack.enter_context(atomic_replace(self._path))
        self._file = self._stack.enter_context(self.output.temporary.open("w", encoding="utf-8"))
        return self

    def append(self, molecules: Molecules, numbers: NDArray[np.int64] | None = None) -> None:
        """Write molecules after those that are there, in their order.

        The field `molecule` holds the number of each, of `numbers` (M,); by default it counts the
        records of the file from 0.
        """
        bonds = "given"
        if molecules.bonds is None and self._is_sdf:
            bonds = "perceived"
            molecules = replace(perceive(molecules), formal_charges=molecules.formal_charges)
        for k, molecule in enumerate(molecules):
            number = self.count if numbers is None else int(numbers[k])
            fields: dict[str, str | float] = {"molecule": str(number)}
            fields |= data_fields(molecule)
            fields |= self._fields
            if self.count == 0:
                fields |= units_field(molecules)
            if self.count == 0 and self._is_sdf:
                fields |= self._once
            if self._is_sdf:
                self._file.write(self._sdf_record(molecule, fields, bonds))
            else:
                self._file.write(_xyz_record(molecule, fields))
            self.count += 1

    def _sdf_record(self, molecule: Molecule, fields: dict[str, str | float], bonds: str) -> str:
        finite = bool(np.isfinite(molecule.positions).all())
        if not finite:
            molecule = _at_origin(molecule)
            if bonds == "perceived":
                molecule = _without_bonds(molecule)
        sanitized = sanitize(molecule)
        status = " ".join(sanitized.reason.split()) or "valid"
        if bonds == "given" and not sanitized.valid:
            self.invalid[short_reason(status)] += 1
        if not finite:
            status = "coordinates are not finite"
        if max_neighbours(molecule) > MAX_NEIGHBOURS:
            molecule = _without_bonds(molecule)
        elif bonds == "given" and self._bond_form is not None:
            molecule, fields[BOND_FORM] = self._in_form(molecule, self._bond_form)
        fields |= {BONDS: bonds, "status": status, "fragments": str(sanitized.fragments)}
        return sdf.format_record(molecule, f"molecule {fields['molecule']}", fields)

    def _in_form(self, molecule: Molecule, form: BondForm) -> tuple[Molecule, str]:
        """The molecule with its bonds in a form, and the field that names it."""
        aromatic = molecule.bond_order is not None and bool((molecule.bond_order == AROMATIC).any())
        if form == "kekule" and not aromatic:
            return molecule, form
        forms = bond_forms(molecule)
        if form == "aromatic":
            return replace(molecule, bond_order=forms.aromatic), form
        if (forms.kekule == AROMATIC).any():
            self.not_kekulised += 1
            return molecule, "aromatic, since RDKit cannot Kekulise it"
        return replace(molecule, bond_order=forms.kekule), form

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _xyz_record(molecule: Molecule, fields: dict[str, str | float]) -> str:
    if not np.isfinite(molecule.positions).all():
        molecule, fields = _at_origin(molecule), fields | {"status": "coordinates not finite"}
    return xyz.format_record(molecule, fields)


def _at_origin(molecule: Molecule) -> Molecule:
    return replace(molecule, positions=np.zeros_like(molecule.positions))


def _without_bonds(molecule: Molecule) -> Molecule:
    return replace(molecule, bond_index=None, bond_order=None)


def count_records(path: Path) -> int:
    """Whole records of an SDF (`$$$$`) or frames of an XYZ, counted without parsing them."""
    with path.open(encoding="utf-8") as lines:
        if path.suffix.lower() == ".sdf":
            return sum(line.startswith("$$$$") for line in lines)
        frames = 0
        for line in lines:
            rest = int(line) + 1  # a comment, then the atoms
            if sum(1 for _ in islice(lines, rest)) < rest:
                break
            frames += 1
        return frames
