"""Conformers of SMILES by ETKDG, and the relaxation of conformers by a force field or GFN2-xTB.

ETKDG: S. Riniker, G. A. Landrum, J. Chem. Inf. Model. 55, 2562 (2015), version 3: S. Wang et al.,
J. Chem. Inf. Model. 60, 2044 (2020), by RDKit. Relaxation:
`molgen_energy.chemistry.relaxation`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.anomalies import Neighbours
from molgen_energy.chemistry.convert import as_positions, molecule_from_rdkit
from molgen_energy.chemistry.rdkit import build
from molgen_energy.chemistry.relaxation import relax_mmff, relax_xtb
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError, unknown_name

RELAXATIONS = ("mmff94", "gfn2-xtb", "none")
_SHORT = {"mmff": "mmff94", "xtb": "gfn2-xtb"}
LONGEST_SMILES = 2000
"""Characters of a SMILES that is read."""


@dataclass(frozen=True)
class Embedding:
    """A SMILES whose conformers are wanted."""

    name: str
    """The place of the SMILES in its file."""
    smiles: str
    seed: int
    count: int
    """How many conformers."""
    relaxation: str
    """One of `RELAXATIONS`."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class GivenConformer:
    """A molecule with bonds and formal charges whose conformer is to be relaxed."""

    name: str
    molecule: Molecule
    relaxation: str
    """One of `RELAXATIONS`."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Conformers:
    """Conformers of a molecule, or why there are none."""

    conformers: tuple[Molecule, ...] = ()
    energies: tuple[float, ...] = ()
    """kcal/mol that each given conformer lost on relaxation; none where it was embedded."""
    failure: str = ""
    lost: bool = False
    """Whether the time limit, or the death of the process, is the reason."""


def relaxation_named(name: str) -> str:
    """One of `RELAXATIONS`, of its name or a short one, `mmff` or `xtb`."""
    return _SHORT.get(name, name)


def check_relaxation(name: str, timeout: float) -> None:
    """Raise `InputError` where there is no such relaxation, what it needs is not installed, or the
    most seconds of a molecule are not above 0."""
    if name not in RELAXATIONS:
        raise InputError(unknown_name("--relax", name, RELAXATIONS))
    if name == "gfn2-xtb" and not all(map(importlib.util.find_spec, ("ase", "tblite"))):
        raise InputError("--relax gfn2-xtb needs `pip install 'molgen-energy[xtb]'`")
    if not timeout > 0:
        raise InputError(f"--timeout {timeout:g}: expected seconds above 0")


def parse_smiles(
    smiles: str,
    largest_fragment: bool = False,
    remedy: str = "--largest-fragment keeps the largest",
) -> tuple[Chem.Mol, bool]:
    """A molecule with all hydrogens as atoms, and whether fragments were left out.

    Parameters
    ----------
    largest_fragment
        Keep only the fragment of most atoms; of several, the one with the largest sum of atomic
        numbers; of several, the first.
    remedy
        What to do about several fragments, for the message.

    Raises
    ------
    ValueError
        RDKit cannot parse the SMILES, it is too long, has several fragments, or atoms of no
        element.
    """
    if len(smiles) > LONGEST_SMILES:
        raise ValueError(
            f"the SMILES has {len(smiles):,} characters, at most {LONGEST_SMILES:,} are read"
        )
    if "\0" in smiles:  # where RDKit ends it
        raise ValueError("it holds NUL bytes, which no text has")
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            raise ValueError(_parse_error(smiles))
        if not molecule.GetNumAtoms():
            raise ValueError("no SMILES")
        if any(atom.GetAtomicNum() == 0 for atom in molecule.GetAtoms()):
            raise ValueError(f"'{smiles}' has an atom of no element (*)")
        molecule = Chem.AddHs(molecule)
        parts = Chem.GetMolFrags(molecule, asMols=True)
    if len(parts) == 1:
        return molecule, False
    if not largest_fragment:
        raise ValueError(
            f"'{smiles}' has {len(parts)} fragments, which have no common conformer; {remedy}"
        )
    return max(parts, key=_size), True


def _size(molecule: Chem.Mol) -> tuple[int, int]:
    return molecule.GetNumAtoms(), sum(atom.GetAtomicNum() for atom in molecule.GetAtoms())


def _parse_error(smiles: str) -> str:
    """Why RDKit does not parse a SMILES."""
    raw = Chem.MolFromSmiles(smiles, sanitize=False)
    if raw is not None:
        problems = Chem.DetectChemistryProblems(raw)
        if problems:
            return f"RDKit refuses '{smiles}': {problems[0].Message().strip()}"
    return f"RDKit cannot parse '{smiles}' as a SMILES"


def embed(item: Embedding) -> Conformers:
    """Conformers of a SMILES that `parse_smiles` accepts; the same on every machine and process.

    All specified stereochemistry is that of the SMILES.
    """
    with rdBase.BlockLogs():
        try:
            molecule, _ = parse_smiles(item.smiles)
            conformers = tuple(_conformers(molecule, item))
        except (ValueError, RuntimeError) as error:
            return Conformers(failure=_reason(error))
    return Conformers(conformers)


def relax(item: GivenConformer) -> Conformers:
    """The conformer at a minimum of the force field or of GFN2-xTB; fails as `embed` does.

    All stereocentres and double bonds keep the stereochemistry that the given positions have.
    """
    given = item.molecule
    built = build(given, positions=True)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            Chem.AssignStereochemistryFrom3D(built)
            if item.relaxation == "mmff94":
                energy = _relaxed_mmff(built, -1)
                positions = as_positions(built.GetConformer().GetPositions())
                found = replace(given, positions=positions)
            else:
                found, energy = _relaxed_xtb(built, given)
                built.GetConformer().SetPositions(found.positions.astype(np.float64))
            if not _has_stereochemistry(built, -1):
                raise ValueError("it becomes another stereoisomer")
        except (ValueError, RuntimeError) as error:
            return Conformers(failure=_reason(error))
    return Conformers((found,), (energy,))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _conformers(molecule: Chem.Mol, item: Embedding) -> list[Molecule]:
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = item.seed
    ids = list(rdDistGeom.EmbedMultipleConfs(molecule, item.count, parameters))
    if len(ids) < item.count:  # large rings and cages need other initial coordinates
        parameters.useRandomCoords = True
        ids = list(rdDistGeom.EmbedMultipleConfs(molecule, item.count, parameters))
    if len(ids) < item.count:
        raise ValueError(f"RDKit cannot embed '{item.smiles}' in 3D")
    found = []
    for k in ids:
        if item.relaxation == "mmff94":
            try:
                _relaxed_mmff(molecule, k)
            except ValueError as error:
                raise ValueError(f"{error}; try --relax gfn2-xtb or none") from error
        conformer = molecule_from_rdkit(molecule, k)
        if item.relaxation == "gfn2-xtb":
            conformer, _ = _relaxed_xtb(molecule, conformer)
            molecule.GetConformer(k).SetPositions(conformer.positions.astype(np.float64))
        if not _has_stereochemistry(molecule, k):
            raise ValueError(f"a conformer of '{item.smiles}' is another stereoisomer")
        found.append(conformer)
    return found


def _relaxed_mmff(molecule: Chem.Mol, conformer: int) -> float:
    """Move a conformer to a minimum of MMFF94; the energy lost, `ValueError` without a minimum."""
    return 0.0 if molecule.GetNumAtoms() == 1 else relax_mmff(molecule, conformer).energy


def _relaxed_xtb(molecule: Chem.Mol, conformer: Molecule) -> tuple[Molecule, float]:
    """A conformer at a minimum of GFN2-xTB, and the energy lost.

    `ValueError` where there is no minimum or bonds change.
    """
    unpaired = sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms())
    charge = Chem.GetFormalCharge(molecule)
    found = relax_xtb(conformer.atomic_numbers, conformer.positions, charge, unpaired)
    relaxed = replace(conformer, positions=found.positions.astype(np.float32))
    bare = replace(relaxed, bond_index=None, bond_order=None)
    near = {tuple(pair) for pair in Neighbours(Molecules.from_list([bare])).edges.tolist()}
    assert relaxed.bond_index is not None
    if near != {tuple(sorted(pair)) for pair in relaxed.bond_index.tolist()}:
        raise ValueError("its bonds change on relaxation by GFN2-xTB")
    return relaxed, found.energy


def _has_stereochemistry(molecule: Chem.Mol, conformer: int) -> bool:
    """Whether a conformer has the stereocentres and double bonds that the molecule specifies."""
    given, found = Chem.Mol(molecule), Chem.Mol(molecule)
    Chem.AssignStereochemistry(given, cleanIt=True, force=True)
    Chem.AssignStereochemistryFrom3D(found, conformer, replaceExistingTags=True)
    centres = all(
        ours.GetProp("_CIPCode") == (theirs.HasProp("_CIPCode") and theirs.GetProp("_CIPCode"))
        for ours, theirs in zip(given.GetAtoms(), found.GetAtoms(), strict=True)
        if ours.HasProp("_CIPCode")
    )
    specified = (Chem.BondStereo.STEREOE, Chem.BondStereo.STEREOZ)
    return centres and all(
        ours.GetStereo() == theirs.GetStereo()
        for ours, theirs in zip(given.GetBonds(), found.GetBonds(), strict=True)
        if ours.GetStereo() in specified
    )
