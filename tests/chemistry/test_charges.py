"""Kinds of atoms by charge and bonds, and the charges that fit: RDKit and plain loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.charges import (
    HIGHEST_SUM,
    MOST_AROMATIC,
    NONE_FITS,
    AtomKind,
    count_atoms,
    nearest_charges,
    without_radicals,
)
from molgen_energy.chemistry.convert import from_rdkit

SMILES = [
    "C[NH3+]", "CC([O-])=O", "c1cc[nH]c1", "c1cc[nH+]cc1", "[CH3]", "CS(=O)(=O)C",
    "F[B-](F)(F)F",
]  # fmt: skip


def molecules():
    built = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in SMILES]
    for molecule in built:
        rdDistGeom.EmbedMolecule(molecule, randomSeed=1)
    return built


def test_atoms_are_counted_as_rdkit_counts_them():
    expected = Counter()
    for molecule in molecules():
        for atom in molecule.GetAtoms():
            orders = [bond.GetBondTypeAsDouble() for bond in atom.GetBonds()]
            aromatic = orders.count(1.5)
            kind = AtomKind(
                atom.GetAtomicNum(), atom.GetFormalCharge(), aromatic,
                int(sum(orders) - 1.5 * aromatic),
            )  # fmt: skip
            expected[kind] += 1
    assert count_atoms(from_rdkit(molecules())) == expected
    assert expected[AtomKind(7, 0, 2, 1)] == expected[AtomKind(7, 1, 2, 1)] == 1


def test_radicals_do_not_fit():
    """Those of the methyl radical alone, of all molecules."""
    found = count_atoms(from_rdkit(molecules()))
    kept = without_radicals(found)
    assert set(found) - set(kept) == {AtomKind(6, 0, 0, 3)}


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ((7, 1, 0, 4), True), ((7, 0, 0, 4), False), ((8, -1, 0, 1), True), ((8, 0, 0, 1), False),
        ((16, 0, 0, 6), True), ((6, -1, 0, 3), True), ((6, 1, 0, 3), True), ((1, 0, 0, 2), False),
        ((6, 0, 3, 0), True), ((8, 0, 2, 0), True), ((7, 0, 2, 0), True), ((7, 1, 2, 1), True),
        ((6, 0, 2, 0), False), ((15, 0, 0, 5), True), ((9, 0, 0, 1), True),
        ((1, 1, 0, 1), False), ((1, 1, 0, 0), True),
    ],
)  # fmt: skip
def test_closed_shells(kind, fits):
    assert (without_radicals([AtomKind(*kind)]) != []) is fits


def test_the_nearest_charge_fits():
    """Against a plain search over all kinds; ties by distance from 0, number of atoms, sign."""
    rng = np.random.default_rng(0)
    kinds = Counter(
        {
            AtomKind(z, charge, aromatic, others): int(rng.integers(1, 4))
            for z in (6, 7)
            for charge in range(-3, 4)
            for aromatic in range(MOST_AROMATIC + 1)
            for others in range(HIGHEST_SUM + 1)
            if rng.random() < 0.2
        }
    )
    table = nearest_charges(kinds, -2, 3)
    assert table.shape == (119, 6, MOST_AROMATIC + 1, HIGHEST_SUM + 1)
    for (z, before, aromatic, others), found in np.ndenumerate(table):
        if z not in (6, 7):
            assert found == NONE_FITS
            continue
        charge = before - 2
        fitting = [
            (abs(c - charge), abs(c), -kinds[AtomKind(z, c, aromatic, others)], -c)
            for c in range(-3, 4)
            if AtomKind(z, c, aromatic, others) in kinds
        ]
        assert found == (-min(fitting)[3] if fitting else NONE_FITS)
    assert (table[6] != NONE_FITS).any()
