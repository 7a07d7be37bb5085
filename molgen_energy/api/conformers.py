"""Compare generated conformers with those of data."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
from rdkit import Chem

from molgen_energy.chemistry.convert import molecule_from_rdkit, to_rdkit
from molgen_energy.chemistry.identity import identify
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics.conformers import (
    DRUG_THRESHOLD,
    ConformerScores,
    conformer_rmsd,
    heavy_atoms,
)
from molgen_energy.metrics.sources import FileSource
from molgen_energy.output import named_path

_Conformers = str | PathLike[str] | Sequence[Chem.Mol]


def compare_conformers(
    samples: _Conformers, reference: _Conformers, threshold: float = DRUG_THRESHOLD
) -> ConformerScores:
    """Coverage and matching of generated conformers, of `sample --smiles` or of any other method.

    Samples and references are brought together by canonical SMILES without stereochemistry, so
    stereoisomers count as one molecule.

    >>> conformers = molgen_energy.sample(20, smiles="CCO", checkpoint="runs/conformers")
    >>> print(molgen_energy.compare_conformers(conformers, "reference.sdf"))

    Parameters
    ----------
    samples, reference
        RDKit molecules with explicit hydrogens and bonds, each with one conformer or several; or
        the path of an SDF or HDF5 file with bonds. Of an HDF5 file with splits the reference is
        the test split.
    threshold
        δ of coverage in Å: 1.25 for drug-like molecules (default), 0.5 for QM9, as in the
        literature (Ganea et al., NeurIPS 2021).

    Returns
    -------
    The scores of each molecule. `print` shows means and medians; `to_dict` has them as numbers.

    Raises
    ------
    InputError
        A file cannot be read or has no bonds, a molecule has no conformer, the threshold is not
        above 0, or no sample belongs to a molecule of the reference.
    """
    if not threshold > 0:
        raise InputError(f"threshold {threshold:g}: expected a length above 0 Å")
    drawn, others = _by_molecule(samples, "samples", None)
    found, _ = _by_molecule(reference, "reference", "test")
    names = [name for name in found if name in drawn]
    if not names:
        raise InputError(
            "no sample belongs to a molecule of the reference; compare conformers of the same "
            "molecules, with all hydrogens"
        )
    return ConformerScores(
        tuple(names),
        tuple(conformer_rmsd(drawn[name], found[name]) for name in names),
        threshold,
        len(found) - len(names),
        others + sum(len(drawn[name]) for name in drawn.keys() - found.keys()),
    )


def _by_molecule(
    given: _Conformers, what: str, split: str | None
) -> tuple[dict[str, list[Chem.Mol]], int]:
    """Conformers without hydrogens by SMILES, and how many molecules are not valid or finite."""
    groups: dict[str, list[Chem.Mol]] = {}
    failed = 0
    for molecule in _molecules(given, what, split):
        identity = identify(molecule)
        if identity.failure or not np.isfinite(molecule.positions).all():
            failed += 1
            continue
        built = to_rdkit(Molecules.from_list([molecule]))[0]
        groups.setdefault(identity.smiles, []).append(heavy_atoms(built))
    return groups, failed


def _molecules(given: _Conformers, what: str, split: str | None) -> list[Molecule]:
    """One molecule for each conformer."""
    if isinstance(given, (str, PathLike)):
        path = named_path(Path(given))
        source = FileSource(path, split)
        found = [molecule for chunk in source.chunks() for molecule in chunk.molecules]
        if any(molecule.bond_index is None for molecule in found):
            raise InputError(
                f"{path} has no bonds, by which conformers are compared; name an SDF or HDF5 file "
                "with bonds"
            )
        return found
    return [
        conformer
        for number, molecule in enumerate(given, start=1)
        for conformer in _conformers(molecule, f"molecule {number} of {what}")
    ]


def _conformers(molecule: Chem.Mol, name: str) -> list[Molecule]:
    ids = [conformer.GetId() for conformer in molecule.GetConformers()] or [-1]
    try:
        return [molecule_from_rdkit(molecule, conformer) for conformer in ids]
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
