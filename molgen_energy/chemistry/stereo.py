"""Whether positions have the stereochemistry that a molecule specifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

_HANDS = {Chem.ChiralType.CHI_TETRAHEDRAL_CCW: 1, Chem.ChiralType.CHI_TETRAHEDRAL_CW: -1}
_SIDES = {
    Chem.BondStereo.STEREOZ: 1, Chem.BondStereo.STEREOCIS: 1,
    Chem.BondStereo.STEREOE: -1, Chem.BondStereo.STEREOTRANS: -1,
}  # fmt: skip


class StereoMatches(NamedTuple):
    """Which of the specified stereochemistry K sets of positions have."""

    centres: NDArray[np.bool_]
    """(K, C)."""
    mirrored: NDArray[np.bool_]
    """That their mirror images have, (K, C)."""
    double_bonds: NDArray[np.bool_]
    """(K, D); a mirror image has the same."""

    @property
    def all(self) -> NDArray[np.bool_]:
        """Whether all centres and double bonds are as specified, (K,)."""
        return np.logical_and(self.centres.all(axis=1), self.double_bonds.all(axis=1))


@dataclass(frozen=True)
class Stereochemistry:
    """The stereocentres R and S, and the double bonds E and Z, that a molecule specifies.

    They are compared atom by atom, so a labelling of a meso compound that a symmetry of the
    molecule turns into the specified one counts as another.
    """

    centres: NDArray[np.int64]
    """Atom and three of its neighbours, (C, 4)."""
    hands: NDArray[np.int64]
    """Sign of the volume that the three neighbours span about the atom, in their order, (C,)."""
    double_bonds: NDArray[np.int64]
    """The two atoms between two of their neighbours, (D, 4)."""
    sides: NDArray[np.int64]
    """1 where the two neighbours are on the same side, else −1, (D,)."""

    @classmethod
    def of(cls, molecule: Chem.Mol) -> Stereochemistry:
        """Of a molecule with all hydrogens as atoms, such as of a SMILES."""
        given = Chem.Mol(molecule)
        with rdBase.BlockLogs():
            Chem.AssignStereochemistry(given, cleanIt=True, force=True)
        centres, hands, bonds, sides = [], [], [], []
        for atom in given.GetAtoms():
            hand = _HANDS.get(atom.GetChiralTag())
            # Without a label, a centre is relative to others, as in 1,4-dimethylcyclohexane.
            if hand is not None and atom.HasProp("_CIPCode"):
                centre = atom.GetIdx()
                neighbours = [bond.GetOtherAtomIdx(centre) for bond in atom.GetBonds()]
                centres.append([centre, *neighbours[:3]])
                hands.append(hand)
        for bond in given.GetBonds():
            side, ends = _SIDES.get(bond.GetStereo()), list(bond.GetStereoAtoms())
            if side is not None and len(ends) == 2:
                bonds.append([ends[0], bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), ends[1]])
                sides.append(side)
        return cls(
            np.array(centres, np.int64).reshape(-1, 4),
            np.array(hands, np.int64),
            np.array(bonds, np.int64).reshape(-1, 4),
            np.array(sides, np.int64),
        )

    def __len__(self) -> int:
        return len(self.centres) + len(self.double_bonds)

    def matches(self, positions: NDArray[np.floating]) -> StereoMatches:
        """What positions (K, N, 3) have of it; positions that are not finite have none."""
        x = np.asarray(positions, np.float64)
        arms = x[:, self.centres[:, 1:]] - x[:, self.centres[:, :1]]  # (K, C, 3, 3)
        volume = np.einsum("kcx,kcx->kc", arms[:, :, 0], np.cross(arms[:, :, 1], arms[:, :, 2]))
        first, begin, end, last = (x[:, self.double_bonds[:, k]] for k in range(4))
        axis = end - begin
        normals = np.cross(first - begin, axis), np.cross(last - begin, axis)
        same_side = np.einsum("kdx,kdx->kd", *normals)
        return StereoMatches(
            volume * self.hands > 0, volume * self.hands < 0, same_side * self.sides > 0
        )
