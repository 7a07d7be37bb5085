"""Descriptors of drug-like molecules: rings and their systems, flexibility, drug-likeness.

Numbers are those of RDKit. QED: G. R. Bickerton et al., Nature Chemistry 4, 90 (2012). Synthetic
accessibility: P. Ertl, A. Schuffenhauer, J. Cheminformatics 1, 8 (2009). logP: S. A. Wildman, G. M.
Crippen, J. Chem. Inf. Comput. Sci. 39, 868 (1999).
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem import rdMolDescriptors

from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, build, max_neighbours
from molgen_energy.data.molecules import Molecule

_SIZES = range(3, 9)  # of rings that are counted by size
_SA_SCORE = Path(RDConfig.RDContribDir, "SA_Score")
_FUSED, _SPIRO, _BRIDGED = "fused", "spiro", "bridged"


class Descriptor(NamedTuple):
    """What one number of a molecule means."""

    label: str
    meaning: str
    unit: str = ""
    digits: int = 0
    """Decimals that are stored; 0 for whole numbers."""
    least: float = 0.0
    """Lower bound of its mean."""


DESCRIPTORS = {
    "rings": Descriptor("rings", "RDKit's symmetrised smallest set of smallest rings"),
    **{f"rings_{k}": Descriptor(f"rings of {k} atoms", "of all rings") for k in _SIZES},
    "rings_larger": Descriptor("rings of 9 or more atoms", "of all rings"),
    "ring_systems": Descriptor("ring systems", "rings that share atoms make one system"),
    "fused_systems": Descriptor("fused ring systems", "two rings of the system share one bond"),
    "spiro_systems": Descriptor("spiro ring systems", "two rings of the system share one atom"),
    "bridged_systems": Descriptor(
        "bridged ring systems", "two rings of the system share two or more bonds"
    ),
    "rotatable_bonds": Descriptor("rotatable bonds", "RDKit's strict definition, without amides"),
    "fraction_sp3": Descriptor("share of sp³ carbon", "of the carbon atoms; 0 without any", "", 4),
    "molecular_weight": Descriptor("molecular weight", "with hydrogens", "Da", 2),
    "qed": Descriptor("QED", "quantitative estimate of drug-likeness, 0 to 1", "", 4),
    "sa_score": Descriptor("SA score", "synthetic accessibility, 1 (easy) to 10", "", 3, 1.0),
    "logp": Descriptor("logP", "octanol and water, by Wildman and Crippen", "", 3, -np.inf),
    "donors": Descriptor("hydrogen-bond donors", "by RDKit"),
    "acceptors": Descriptor("hydrogen-bond acceptors", "by RDKit"),
    "formal_charge": Descriptor("formal charge", "sum over atoms; perceived bonds have none",
        "", 0, -np.inf),
}  # fmt: skip
"""Descriptors by key, in the order of the columns of `describe`."""


def describe(molecule: Molecule) -> NDArray[np.float32]:
    """Descriptors of a molecule with bonds and explicit hydrogens, (D,).

    Returns
    -------
    One number for each of `DESCRIPTORS`; NaN where RDKit fails, and for the SA score without
    RDKit's file of fragments (`has_sa_score`).
    """
    nothing = np.full(len(DESCRIPTORS), np.nan, np.float32)
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return nothing
    with rdBase.BlockLogs():
        try:
            built = build(molecule)
            Chem.SanitizeMol(built)
            numbers = descriptors(Chem.RemoveHs(built))
        except (ValueError, RuntimeError, ArithmeticError):
            return nothing
    return np.array([numbers[key] for key in DESCRIPTORS], np.float32)


def descriptors(molecule: Chem.Mol) -> dict[str, float]:
    """Descriptors of a sanitised molecule with implicit hydrogens, by key."""
    from rdkit.Chem import QED  # imports much of RDKit

    rings = molecule.GetRingInfo()
    by_size = Counter(map(len, rings.AtomRings()))
    systems = ring_systems(rings.AtomRings(), rings.BondRings())
    properties = QED.properties(molecule)  # type: ignore[no-untyped-call]
    sa_score = _sa_score()
    return {
        "rings": rings.NumRings(),
        **{f"rings_{k}": by_size[k] for k in _SIZES},
        "rings_larger": sum(n for size, n in by_size.items() if size > _SIZES[-1]),
        "ring_systems": len(systems),
        "fused_systems": sum(_FUSED in kinds for kinds in systems),
        "spiro_systems": sum(_SPIRO in kinds for kinds in systems),
        "bridged_systems": sum(_BRIDGED in kinds for kinds in systems),
        "rotatable_bonds": properties.ROTB,
        "fraction_sp3": rdMolDescriptors.CalcFractionCSP3(molecule),
        "molecular_weight": properties.MW,
        "qed": QED.qed(molecule, qedProperties=properties),  # type: ignore[no-untyped-call]
        "sa_score": np.nan if sa_score is None else sa_score(molecule),
        "logp": properties.ALOGP,
        "donors": properties.HBD,
        "acceptors": rdMolDescriptors.CalcNumHBA(molecule),
        "formal_charge": Chem.GetFormalCharge(molecule),
    }


def ring_systems(
    atoms: Sequence[Sequence[int]], bonds: Sequence[Sequence[int]]
) -> list[frozenset[str]]:
    """The kinds of joints in each system of rings that share atoms.

    A joint of two rings is `spiro` if they share one atom, `fused` if one bond, `bridged` if more
    bonds: RDKit's definitions of spiro and bridgehead atoms.

    Parameters
    ----------
    atoms, bonds
        Atoms and bonds of each ring.
    """
    atom_sets, bond_sets = list(map(set, atoms)), list(map(set, bonds))
    system = list(range(len(atoms)))
    joints: list[tuple[int, str]] = []
    for i, j in combinations(range(len(atoms)), 2):
        shared = len(atom_sets[i] & atom_sets[j])
        if not shared:
            continue
        first, second = system[i], system[j]
        system = [first if number == second else number for number in system]
        shared_bonds = len(bond_sets[i] & bond_sets[j])
        if shared_bonds:
            joints.append((i, _FUSED if shared_bonds == 1 else _BRIDGED))
        elif shared == 1:
            joints.append((i, _SPIRO))
    return [
        frozenset(kind for ring, kind in joints if system[ring] == number)
        for number in dict.fromkeys(system)
    ]


def has_sa_score() -> bool:
    """Whether this RDKit brings the program and the fragments of the SA score."""
    return all((_SA_SCORE / name).is_file() for name in ("sascorer.py", "fpscores.pkl.gz"))


@cache
def _sa_score() -> Callable[[Chem.Mol], float] | None:
    """RDKit's function from its folder `Contrib`, which is no package; None where it is absent.

    Its fragments are a pickle: part of RDKit's installation, and trusted as its code is.
    """
    spec = importlib.util.spec_from_file_location("sascorer", _SA_SCORE / "sascorer.py")
    if not has_sa_score() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score: Callable[[Chem.Mol], float] = module.calculateScore
    return score
