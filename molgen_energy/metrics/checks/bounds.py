"""PoseBusters' checks of bond lengths, angles and clashes, with arrays in place of its data frames.

The definitions are those of its module `distance_geometry` (M. Buttenschoen et al., Chem. Sci. 15,
3130, 2024), which takes nine tenths of its time: distances of heavy atoms are compared with the
bounds that RDKit's distance geometry has for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem.rdDistGeom import GetMoleculeBoundsMatrix

_LENGTHS, _ANGLES, _CLASH = (
    "bond_lengths_within_bounds", "bond_angles_within_bounds", "no_internal_clash"
)  # fmt: skip

# Ends of conjugated groups, such as both oxygens of a carboxylate, with their bond.
_ENDS = "[O,N;D1;$([O,N;D1]-[*]=[O,N;D1]),$([O,N;D1]=[*]-[O,N;D1])]~[*]"


def check_bounds(molecule: Chem.Mol, parameters: Mapping[str, Any]) -> dict[str, bool]:
    """Whether bond lengths and angles are within their bounds, and no atoms clash, by name.

    Parameters
    ----------
    molecule
        With one conformer.
    parameters
        Those of `distance_geometry` in PoseBusters' configuration: how far values may be beyond
        their bounds, as a fraction, and how RDKit finds the bounds.

    Returns
    -------
    PoseBusters' names with the results: all false where RDKit cannot sanitise the molecule or find
    bounds.
    """
    if molecule.GetNumAtoms() == 1:
        return dict.fromkeys((_LENGTHS, _ANGLES, _CLASH), True)
    checked = Chem.Mol(molecule)
    try:
        Chem.SanitizeMol(checked)
        bounds = GetMoleculeBoundsMatrix(checked, **parameters["bound_matrix_params"])
    except (ValueError, RuntimeError):
        return dict.fromkeys((_LENGTHS, _ANGLES, _CLASH), False)
    bonds = np.array(
        [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in _bonds(checked)], np.int64
    ).reshape(-1, 2)
    separation = _bond_separation(len(bounds), bonds)
    numbers = np.array([checked.GetAtomWithIdx(k).GetAtomicNum() for k in range(len(bounds))])
    low, high = bounds.T.copy(), bounds.copy()  # both in the upper triangle
    _share_bounds_of_ends(checked, numbers, low, high)
    i, j = np.triu_indices(len(bounds), k=1)
    if parameters["ignore_hydrogens"]:
        heavy = (numbers[i] != 1) & (numbers[j] != 1)
        i, j = i[heavy], j[heavy]
    positions = checked.GetConformer().GetPositions()
    distance = np.linalg.norm(positions[i] - positions[j], axis=1)
    low, high, separation = low[i, j], high[i, j], separation[i, j]
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.where(distance < low, (distance - low) / low, 0.0)
        above = np.where(distance > high, (distance - high) / high, 0.0)
    length, angle = parameters["threshold_bad_bond_length"], parameters["threshold_bad_angle"]
    bad_length = (separation == 1) & ((below < -length) | (above > length))
    bad_angle = (separation == 2) & ((below < -angle) | (above > angle))
    clash = (separation == 0) & (below < -parameters["threshold_clash"])
    bad = {_LENGTHS: bad_length, _ANGLES: bad_angle, _CLASH: clash}
    return {name: not which.any() for name, which in bad.items()}


@cache
def _ends() -> Chem.Mol:
    return Chem.MolFromSmarts(_ENDS)


def _bonds(molecule: Chem.Mol) -> list[Chem.Bond]:
    return [molecule.GetBondWithIdx(k) for k in range(molecule.GetNumBonds())]


def _bond_separation(size: int, bonds: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 for bonded atoms, 2 for others with a common neighbour, else 0, (N, N)."""
    bonded = np.zeros((size, size), np.int64)
    bonded[bonds[:, 0], bonds[:, 1]] = bonded[bonds[:, 1], bonds[:, 0]] = 1
    separation: NDArray[np.int64] = np.where(bonded == 1, 1, np.where(bonded @ bonded > 0, 2, 0))
    return separation


def _share_bounds_of_ends(
    molecule: Chem.Mol, numbers: NDArray[Any], low: NDArray[Any], high: NDArray[Any]
) -> None:
    """Give the bonds of conjugated ends the widest bounds among those of the same two elements."""
    matches = np.sort(
        np.array(molecule.GetSubstructMatches(_ends()), np.int64).reshape(-1, 2), axis=1
    )
    if not len(matches):
        return
    i, j = matches.T
    _, kind = np.unique(np.sort(numbers[matches], axis=1), axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    widest = np.full((2, kind.max() + 1), np.inf)
    np.minimum.at(widest[0], kind, low[i, j])
    np.minimum.at(widest[1], kind, -high[i, j])
    low[i, j], high[i, j] = widest[0, kind], -widest[1, kind]
