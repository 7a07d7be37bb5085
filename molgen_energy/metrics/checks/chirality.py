"""R and S stereocentres of molecules, from their positions."""

from __future__ import annotations

from typing import NamedTuple

from rdkit import Chem, rdBase
from rdkit.Chem import rdCIPLabeler, rdqueries

from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, build, max_neighbours
from molgen_energy.data.molecules import Molecule, MoleculeChunk


class Stereocentres(NamedTuple):
    """Number of stereocentres of a molecule by their label, which its mirror image exchanges."""

    r: int
    s: int


def stereocentres_failed(chunk: MoleculeChunk, reason: str) -> list[Stereocentres]:
    """Result for molecules whose labels did not finish: none."""
    return [Stereocentres(0, 0)] * len(chunk)


def count_stereocentres(chunk: MoleculeChunk) -> list[Stereocentres]:
    """R and S among the stereocentres of molecules, with their bonds and positions.

    Labels are those of the accurate algorithm (R. M. Hanson et al., "Algorithmic analysis of
    Cahn–Ingold–Prelog rules of stereochemistry", J. Chem. Inf. Model. 58, 1755, 2018), by RDKit. A
    pseudoasymmetric centre (r, s) keeps its label in the mirror image, and is not counted. A
    molecule that RDKit cannot sanitise has none.
    """
    return [_count(molecule) for molecule in chunk.molecules]


def _count(molecule: Molecule) -> Stereocentres:
    none = Stereocentres(0, 0)
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return none
    built = build(molecule, positions=True)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            Chem.AssignStereochemistryFrom3D(built)
            centres = list(built.GetAtomsMatchingQuery(rdqueries.HasChiralTagQueryAtom()))
            if not centres:
                return none
            rdCIPLabeler.AssignCIPLabels(built, [a.GetIdx() for a in centres], [])
        except (ValueError, RuntimeError):
            return none
    labels = [a.GetProp("_CIPCode") for a in centres if a.HasProp("_CIPCode")]
    return Stereocentres(labels.count("R"), labels.count("S"))
