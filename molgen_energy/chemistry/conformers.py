"""Conformers of SMILES: embedded by ETKDG, relaxed by a force field or GFN2-xTB.

ETKDG: S. Riniker, G. A. Landrum, J. Chem. Inf. Model. 55, 2562 (2015), version 3: S. Wang et al.,
J. Chem. Inf. Model. 60, 2044 (2020), by RDKit. MMFF94: T. A. Halgren, J. Comput. Chem. 17, 490
(1996), by RDKit. GFN2-xTB: C. Bannwarth, S. Ehlert, S. Grimme, J. Chem. Theory Comput. 15, 1652
(2019), by tblite and ASE.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molgen_energy.chemistry.anomalies import Neighbours
from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError

RELAXATIONS = ("mmff94", "gfn2-xtb", "none")

_MAX_STEPS_MMFF = 10_000
_MAX_STEPS_XTB = 500
_MAX_FORCE_XTB = 0.05  # eV/Å


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
class Embedded:
    """Conformers of a molecule, or why there are none."""

    conformers: tuple[Molecule, ...] = ()
    failure: str = ""
    lost: bool = False
    """Whether the time limit, or the death of the process, is the reason."""


def check_relaxation(name: str) -> None:
    """Raise `InputError` where what a relaxation needs is not installed."""
    if name == "gfn2-xtb" and not all(map(importlib.util.find_spec, ("ase", "tblite"))):
        raise InputError("--relax gfn2-xtb needs `pip install 'molgen-energy[xtb]'`")


def parse_smiles(smiles: str, largest_fragment: bool = False) -> tuple[Chem.Mol, bool]:
    """A molecule with all hydrogens as atoms, and whether fragments were left out.

    Parameters
    ----------
    largest_fragment
        Keep only the fragment of most atoms; of several, the one with the largest sum of atomic
        numbers; of several, the first.

    Raises
    ------
    ValueError
        RDKit cannot parse the SMILES, it has several fragments, or atoms of no element.
    """
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
            f"'{smiles}' has {len(parts)} fragments, which have no common conformer; "
            "--largest-fragment keeps the largest"
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


def embed(item: Embedding) -> Embedded:
    """Conformers of a SMILES that `parse_smiles` accepts; the same on every machine and process.

    All specified stereochemistry is that of the SMILES.
    """
    with rdBase.BlockLogs():
        try:
            molecule, _ = parse_smiles(item.smiles)
            conformers = tuple(_conformers(molecule, item))
        except (ValueError, RuntimeError) as error:
            return Embedded(failure=" ".join(str(error).split()))
    return Embedded(conformers)


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
            _relax_mmff(molecule, k)
        conformer = molecule_from_rdkit(molecule, k)
        if item.relaxation == "gfn2-xtb":
            conformer = _relaxed_xtb(molecule, conformer)
            molecule.GetConformer(k).SetPositions(conformer.positions.astype(np.float64))
        if not _has_stereochemistry(molecule, k):
            raise ValueError(f"a conformer of '{item.smiles}' is another stereoisomer")
        found.append(conformer)
    return found


def _relax_mmff(molecule: Chem.Mol, conformer: int) -> None:
    """Move a conformer to a minimum of MMFF94; `ValueError` where there is none."""
    if molecule.GetNumAtoms() == 1:
        return
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    field = properties and rdForceFieldHelpers.MMFFGetMoleculeForceField(
        molecule, properties, confId=conformer
    )
    if not field:
        raise ValueError("it has no MMFF94 parameters; --relax none or gfn2-xtb needs none")
    field.Initialize()
    if field.Minimize(maxIts=_MAX_STEPS_MMFF) != 0:
        raise ValueError(f"MMFF94 does not converge in {_MAX_STEPS_MMFF:,} steps")


def _relaxed_xtb(molecule: Chem.Mol, conformer: Molecule) -> Molecule:
    """A conformer at a minimum of GFN2-xTB; `ValueError` where there is none or bonds changed."""
    from ase import Atoms
    from ase.optimize import BFGS
    from tblite.ase import TBLite

    atoms = Atoms(conformer.atomic_numbers, conformer.positions.astype(np.float64))
    unpaired = sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms())
    atoms.calc = TBLite(
        method="GFN2-xTB",
        charge=Chem.GetFormalCharge(molecule),
        multiplicity=unpaired + 1,
        verbosity=0,
    )
    try:
        converged = BFGS(atoms, logfile=None).run(fmax=_MAX_FORCE_XTB, steps=_MAX_STEPS_XTB)
    except Exception as error:  # tblite raises several types where charges do not converge
        raise ValueError(f"GFN2-xTB failed: {error}") from error
    if not converged:
        raise ValueError(f"GFN2-xTB does not converge in {_MAX_STEPS_XTB} steps")
    relaxed = replace(conformer, positions=atoms.positions.astype(np.float32))
    bare = replace(relaxed, bond_index=None, bond_order=None)
    near = {tuple(pair) for pair in Neighbours(Molecules.from_list([bare])).edges.tolist()}
    assert relaxed.bond_index is not None
    if near != {tuple(sorted(pair)) for pair in relaxed.bond_index.tolist()}:
        raise ValueError("its bonds change on relaxation by GFN2-xTB")
    return relaxed


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
