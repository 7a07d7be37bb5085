"""A fast way to a minimum of a force field: BFGS that starts from the stiffness of the bonds.

RDKit's own BFGS starts from an identity matrix. Bonds are a hundred times stiffer than torsions, so
it takes about as many steps as there are coordinates to learn what the bonds imply from the start.
A model of the Hessian as a start: M. Mones, C. Ortner, G. Csányi, Sci. Rep. 8, 13991 (2018).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

SIZES = range(30, 501)
"""Numbers of atoms for which this is faster. RDKit's BFGS takes few steps for a smaller molecule;
the inverse of the model of a larger one takes longer than it saves."""

# kcal/(mol Å²), by the number of bonds between two atoms, from 1: along bonds, across angles,
# across torsions. Stretching a C–C bond in MMFF94 takes 5 mdyn/Å = 720 of this unit.
_SPRINGS = (700.0, 140.0, 6.0)
_SHIFT = 8.0  # of all coordinates, for what springs do not resist, such as bending out of a plane
_MAX_FORCE = 0.05  # kcal/(mol Å), of any coordinate
_MAX_MOVE = 0.3  # Å, of any coordinate in one step
_MAX_STEPS = 1000
_SHORTEST = 1e-8  # of a step, as a fraction
_DECREASE = 1e-4  # of what the slope promises (L. Armijo, Pacific J. Math. 16, 1, 1966)


def descend(field: Any, molecule: Chem.Mol, conformer: int = -1) -> bool:
    """Move a conformer to a minimum of its force field, in place.

    Parameters
    ----------
    field
        Of RDKit, initialised, for this conformer of the molecule.

    Returns
    -------
    Whether all forces are below 0.05 kcal/(mol Å). If not, the conformer is where the search ended.
    """
    from scipy.linalg.blas import dsymv, dsyr2

    moved = molecule.GetConformer(conformer)
    start: NDArray[np.float64] = moved.GetPositions()
    inverse = np.asfortranarray(np.linalg.inv(model_hessian(molecule, start)))
    x, places = start.ravel(), start.ravel().tolist()
    # Without positions, `CalcEnergy` would take the distances of its last call.
    energy, gradient = field.CalcEnergy(places), np.array(field.CalcGrad(places))
    found = False
    for _ in range(_MAX_STEPS):
        largest = max(gradient.max(), -gradient.min())
        if not largest >= _MAX_FORCE:
            found = bool(np.isfinite(largest))
            break
        step = dsymv(-1.0, inverse, gradient)
        step *= min(1.0, _MAX_MOVE / max(step.max(), -step.min()))
        slope, fraction, before = float(step @ gradient), 1.0, energy
        while fraction > _SHORTEST:
            places = (x + step).tolist()
            energy = field.CalcEnergy(places)
            if energy <= before + _DECREASE * fraction * slope:
                break
            shorter = _shorter(energy - before, fraction * slope)
            fraction *= shorter
            step *= shorter
        else:
            break
        x = x + step
        after = np.array(field.CalcGrad(places))
        change, gradient = after - gradient, after
        curvature = float(step @ change)
        if curvature > 0:
            turned = dsymv(1.0, inverse, change)
            other = (0.5 * (1 + change @ turned / curvature) * step - turned) / curvature
            dsyr2(1.0, step, other, a=inverse, overwrite_a=True)
    moved.SetPositions(x.reshape(-1, 3))
    field.Initialize()  # it keeps the distances of its last call
    return found


def _shorter(rise: float, promised: float) -> float:
    """The factor of a step to the minimum of the parabola through its slope and its end."""
    if not np.isfinite(rise):
        return 0.1
    return min(0.5, max(0.1, promised / (2 * (promised - rise))))


def model_hessian(molecule: Chem.Mol, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """A positive definite matrix (3N, 3N) that resembles the second derivatives of a force field.

    Springs between atoms one, two and three bonds apart, in kcal/(mol Å²).

    Parameters
    ----------
    positions
        (N, 3) in Å.
    """
    springs = np.zeros(len(positions) + 1)
    springs[1 : len(_SPRINGS) + 1] = _SPRINGS[: len(positions)]
    separation = np.minimum(Chem.GetDistanceMatrix(molecule), len(positions)).astype(np.int64)
    difference = positions[:, None] - positions
    squared = (difference**2).sum(axis=2)
    weight = springs[separation] / np.where(squared > 0, squared, np.inf)
    blocks = -(weight[..., None] * difference)[..., None] * difference[:, :, None]
    atoms = np.arange(len(positions))
    blocks[atoms, atoms] = _SHIFT * np.eye(3) - blocks.sum(axis=1)
    size = 3 * len(positions)
    hessian: NDArray[np.float64] = blocks.transpose(0, 2, 1, 3).reshape(size, size)
    return hessian
