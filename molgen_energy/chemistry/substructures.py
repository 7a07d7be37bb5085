"""Fingerprints, fragments and scaffolds of molecules, as the benchmark MOSES takes them.

D. Polykovskiy et al., "Molecular Sets (MOSES): A Benchmarking Platform for Molecular Generation
Models", Frontiers in Pharmacology 11, 565644 (2020).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from rdkit import Chem, rdBase
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
from rdkit.Chem.rdMolDescriptors import CalcNumRings
from rdkit.Chem.rdmolops import FragmentOnBRICSBonds

FINGERPRINT_BITS = 1024
_RADIUS = 2
_RINGS_OF_SCAFFOLD = 2  # molecules with fewer have none


class Substructures(NamedTuple):
    """What the similarity of a molecule to others is computed from."""

    fingerprint: bytes
    """Morgan fingerprint of radius 2 and 1,024 bits, eight bits a byte, the first bit highest."""
    fragments: tuple[str, ...]
    """SMILES of the parts between the bonds that BRICS breaks (J. Degen et al., ChemMedChem 3,
    1503, 2008); a part that occurs twice is there twice."""
    scaffold: str
    """SMILES of the scaffold of Bemis and Murcko (J. Med. Chem. 39, 2887, 1996); empty where it has
    fewer than two rings."""


def substructures_of(smiles: str) -> Substructures | None:
    """Fingerprint, fragments and scaffold of a SMILES without stereochemistry.

    None where RDKit fails.
    """
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            return None
        try:
            bits = _morgan().GetFingerprintAsNumPy(molecule)
            fragments = Chem.MolToSmiles(FragmentOnBRICSBonds(molecule)).split(".")
            scaffold = _scaffold(molecule)
        except (ValueError, RuntimeError):
            return None
    return Substructures(np.packbits(bits).tobytes(), tuple(fragments), scaffold)


@cache
def _morgan() -> Any:
    return GetMorganGenerator(radius=_RADIUS, fpSize=FINGERPRINT_BITS)


def _scaffold(molecule: Chem.Mol) -> str:
    from rdkit.Chem.Scaffolds.MurckoScaffold import GetScaffoldForMol  # imports much of RDKit

    try:
        scaffold = GetScaffoldForMol(molecule)  # type: ignore[no-untyped-call]  # has no types
    except (ValueError, RuntimeError):
        return ""
    return Chem.MolToSmiles(scaffold) if CalcNumRings(scaffold) >= _RINGS_OF_SCAFFOLD else ""
