"""Whether two sets of bonds agree, by hand and against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem

from molgen_energy.chemistry.agreement import compare_bonds
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.molecules import AROMATIC, Bonds, Molecule, Molecules

RING = {(k, (k + 1) % 6): 1 + k % 2 for k in range(6)}
OTHER_KEKULE = {pair: 3 - order for pair, order in RING.items()}
CYCLOBUTADIENE = {(0, 1): 2, (1, 2): 1, (2, 3): 2, (3, 0): 1}
CATION = [6] * 5 + [7]


def molecule(bonds: dict[tuple[int, int], int], elements: list[int], charge: int = 0) -> Molecule:
    charges = np.zeros(len(elements), "i1")
    charges[-1] = charge
    return Molecule(
        np.zeros((len(elements), 3), "f4"), np.array(elements, "u1"), charges,
        np.array(list(bonds), "u2").reshape(-1, 2), np.array(list(bonds.values()), "u1"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "elements", "same", "connected", "only", "other_only"),
    [
        (RING, {(j, i): order for (i, j), order in reversed(RING.items())}, 6, True, True, 0, 0),
        (RING, OTHER_KEKULE, 6, True, True, 0, 0),
        (dict.fromkeys(RING, AROMATIC), OTHER_KEKULE, 6, True, True, 0, 0),
        (RING, dict.fromkeys(RING, 1), 6, False, True, 0, 0),
        # Alternating bonds that are not aromatic are of one structure.
        (CYCLOBUTADIENE, {pair: 3 - order for pair, order in CYCLOBUTADIENE.items()}, 4, False,
         True, 0, 0),
        (RING, {pair: order for pair, order in RING.items() if 0 not in pair}, 6, False, False, 2,
         0),
        ({(0, 1): 1}, {(1, 2): 1, (2, 3): 1}, 4, False, False, 1, 2),
        ({}, {}, 2, True, True, 0, 0),
    ],
)  # fmt: skip
def test_by_hand(one, other, elements, same, connected, only, other_only):
    first, second = (
        Molecules.from_list([molecule(bonds, [6] * elements)] * 2) for bonds in (one, other)
    )
    found = compare_bonds(first, second)
    for name, expected in (
        ("same_bonds", same), ("same_connectivity", connected), ("only", only),
        ("other_only", other_only), ("bonds", len(one)), ("other_bonds", len(other)),
    ):  # fmt: skip
        assert getattr(found, name).tolist() == [expected] * 2, name


def test_both_have_the_charges_of_the_first():
    """Perceived bonds have none: a pyridinium ring would not be aromatic."""
    pyridinium = Molecules.from_list([molecule(RING | {(5, 6): 1}, [*CATION, 1])])
    pyridinium.formal_charges[5] = 1
    other = Molecules.from_list([molecule(OTHER_KEKULE | {(5, 6): 1}, [*CATION, 1])])
    assert compare_bonds(pyridinium, other).same_bonds.tolist() == [True]
    assert compare_bonds(pyridinium, other, with_rdkit=False).same_bonds.tolist() == [False]


def test_against_a_loop(molecules, rng):
    """Bonds with random changes, in random order, against sets of pairs and RDKit's flags."""
    one = perceive(molecules.select(np.arange(60)))
    order = one.bonds.order.copy()
    changed = rng.random(len(order)) < 0.05
    order[changed] = rng.integers(1, 4, changed.sum())
    kept = rng.random(len(order)) > 0.02
    owner = np.repeat(np.arange(60), np.diff(one.bonds.offsets))
    shuffled = np.flatnonzero(kept)[np.lexsort((rng.random(kept.sum()), owner[kept]))]
    offsets = np.append(0, np.bincount(owner[kept], minlength=60).cumsum())
    bonds = Bonds(one.bonds.index[shuffled][:, ::-1], order[shuffled], offsets)
    other = Molecules(one.positions, one.atomic_numbers, one.offsets, bonds=bonds)
    found = compare_bonds(one, other)

    def by_pair(single: Molecule) -> dict[frozenset[int], object]:
        built = Chem.RWMol()
        for z in single.atomic_numbers.tolist():
            built.AddAtom(Chem.Atom(z))
        for (i, j), order in zip(
            single.bond_index.tolist(), single.bond_order.tolist(), strict=True
        ):
            built.AddBond(i, j, Chem.BondType.values[order])
        built.UpdatePropertyCache(strict=False)
        Chem.FastFindRings(built)
        Chem.SetAromaticity(built)
        return {
            frozenset((b.GetBeginAtomIdx(), b.GetEndAtomIdx())): b.GetBondType()
            for b in built.GetBonds()
        }

    for k in range(60):
        a, b = by_pair(one[k]), by_pair(other[k])
        assert found.same_connectivity[k] == (set(a) == set(b))
        assert found.same_bonds[k] == (a == b), k
        assert (found.only[k], found.other_only[k]) == (len(set(a) - set(b)), len(set(b) - set(a)))
    assert 0 < found.same_bonds.sum() < found.same_connectivity.sum() < 60
