"""What identifies a molecule apart from its geometry: canonical SMILES and scaffold."""

from __future__ import annotations

from typing import NamedTuple

from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from molgen_energy.chemistry.rdkit import (
    MAX_NEIGHBOURS,
    any_lacks_hydrogens,
    build,
    max_neighbours,
)
from molgen_energy.data.molecules import Molecule, Molecules


class Identity(NamedTuple):
    """What RDKit finds in one molecule."""

    fragments: int = 1
    """Number of connected fragments."""
    incomplete: bool = False
    """Whether it needs implicit hydrogens or radical electrons."""
    smiles: str = ""
    """Canonical, without stereochemistry and with implicit hydrogens."""
    scaffold: str = ""
    """SMILES of the Murcko scaffold (Bemis and Murcko, J. Med. Chem. 39, 2887, 1996): its rings and
    what links them. Empty without a ring."""
    failure: str = ""
    """Why RDKit does not sanitise it; then SMILES and scaffold are empty."""


def identify(molecule: Molecule) -> Identity:
    """Sanitise a molecule with bonds and explicit hydrogens, and name it.

    Two molecules have the same SMILES if they differ in their geometry or stereochemistry alone.
    """
    built = build(molecule)
    fragments = len(Chem.GetMolFrags(built))
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return Identity(fragments, failure=f"an atom has more than {MAX_NEIGHBOURS} bonds")
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            incomplete = any_lacks_hydrogens(built)
            heavy = Chem.RemoveHs(built)
            smiles = Chem.MolToSmiles(heavy, isomericSmiles=False)
            core = MurckoScaffold.GetScaffoldForMol(heavy)  # type: ignore[no-untyped-call]
            scaffold = Chem.MolToSmiles(core, isomericSmiles=False)
        except (ValueError, RuntimeError) as error:
            return Identity(fragments, failure=" ".join(str(error).split()))
    return Identity(fragments, incomplete, smiles, scaffold)


def identify_all(molecules: Molecules) -> list[Identity]:
    """`identify` of each molecule."""
    return [identify(molecule) for molecule in molecules]
