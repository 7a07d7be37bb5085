"""Bond lengths, angles and dihedrals against RDKit."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import of_smiles
from rdkit import Chem
from rdkit.Chem import rdMolTransforms

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.geometry import (
    GEOM_TYPES,
    KINDS,
    QM9_TYPES,
    absolute_changes,
    code_of,
    measure,
    type_name,
)
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.molecules import Bonds, Molecule, Molecules, offsets_from_sizes
from molgen_energy.errors import InputError


def by_rdkit(molecules: Molecules) -> dict[str, Counter]:
    """Every length, angle and dihedral by loops over RDKit's bonds, with its type, rounded."""
    found = {kind: Counter() for kind in KINDS}
    for molecule in molecules:
        built = build(molecule, positions=True)
        conformer = built.GetConformer()

        def label(*atoms, built=built):
            text = []
            for i, j in itertools.pairwise(atoms):
                order = int(built.GetBondBetweenAtoms(i, j).GetBondType())
                ends = [built.GetAtomWithIdx(k).GetSymbol() for k in (i, j)]
                text.append(f"{ends[0]}{order}{ends[1]}")
            return "-".join(text)

        for bond in built.GetBonds():
            i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            length = rdMolTransforms.GetBondLength(conformer, i, j)
            found["bond length"][code_of("bond length", label(i, j)), round(length, 3)] += 1
            for h in (a.GetIdx() for a in bond.GetBeginAtom().GetNeighbors()):
                for k in (a.GetIdx() for a in bond.GetEndAtom().GetNeighbors()):
                    if h in (j, k) or k == i:
                        continue
                    value = rdMolTransforms.GetDihedralDeg(conformer, h, i, j, k)
                    code = code_of("dihedral", label(h, i, j, k))
                    found["dihedral"][code, round(value, 1)] += 1
        for atom in built.GetAtoms():
            around = [a.GetIdx() for a in atom.GetNeighbors()]
            for n, i in enumerate(around):
                for k in around[n + 1 :]:
                    value = rdMolTransforms.GetAngleDeg(conformer, i, atom.GetIdx(), k)
                    code = code_of("angle", label(i, atom.GetIdx(), k))
                    found["angle"][code, round(value, 1)] += 1
    return found


def test_geometry_against_rdkit(molecules):
    """The same values of the same types; a tenth may round to the other side."""
    some = perceive(molecules.select(np.arange(0, 2000, 50)))
    expected = by_rdkit(some)
    for kind, measured in measure(some).items():
        digits = 3 if kind == "bond length" else 1
        ours = Counter(
            (int(code), round(float(value), digits))
            for code, value in zip(measured.code, measured.value, strict=True)
        )
        assert sum(ours.values()) == sum(expected[kind].values())
        different = sum((ours - expected[kind]).values())
        assert different <= 0.004 * sum(ours.values())


def test_changes_against_rdkit(rng):
    """Nitrile and alkyne have no dihedral about a bond at an atom of the triple bond."""
    start = perceive(Molecules.from_list([of_smiles("CC#CCC(O)C#N"), of_smiles("CC(=O)NC")]))
    moved = start.positions + rng.normal(0, 0.4, start.positions.shape).astype("f4")
    measured = absolute_changes(start, moved)
    expected: dict[str, list[tuple[int, int, float]]] = {kind: [] for kind in KINDS}
    for number, molecule in enumerate(start):
        atoms = slice(start.offsets[number], start.offsets[number + 1])
        pair = [build(molecule, True), build(replace(molecule, positions=moved[atoms]), True)]
        before, after = (built.GetConformer() for built in pair)
        functions = {
            "bond length": rdMolTransforms.GetBondLength,
            "angle": rdMolTransforms.GetAngleDeg,
            "dihedral": rdMolTransforms.GetDihedralDeg,
        }
        # A bond between atoms without a triple bond, neither of them at an end.
        middle = pair[0].GetSubstructMatches(Chem.MolFromSmarts("[!$(*#*)&!D1]~[!$(*#*)&!D1]"))
        chains = {
            "bond length": "*~*",
            "angle": "*~*~*",
            "dihedral": "*~*~*~*",
        }
        for kind, smarts in chains.items():
            for chain in pair[0].GetSubstructMatches(Chem.MolFromSmarts(smarts)):
                if kind == "dihedral" and not {chain[1:3], chain[2:0:-1]} & set(middle):
                    continue
                change = abs(functions[kind](after, *chain) - functions[kind](before, *chain))
                types = [pair[0].GetAtomWithIdx(k).GetSymbol() for k in chain]
                orders = [
                    int(pair[0].GetBondBetweenAtoms(i, j).GetBondType())
                    for i, j in itertools.pairwise(chain)
                ]
                ends = zip(orders, itertools.pairwise(types), strict=True)
                name = "-".join(f"{a}{order}{b}" for order, (a, b) in ends)
                if kind == "dihedral":
                    change = min(change, 360 - change)
                expected[kind].append((number, code_of(kind, name), change))
    for kind, found in measured.items():
        ours = zip(found.molecule.tolist(), found.code.tolist(), found.value.tolist(), strict=True)
        ours, theirs = sorted(ours), sorted(expected[kind])
        assert [row[:2] for row in ours] == [row[:2] for row in theirs]
        assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], abs=2e-3)


def test_dihedrals_are_signed():
    """A mirror image has the other signs, and the same angles."""
    chiral = of_smiles("C[C@H](O)F")
    mirror = Molecule(chiral.positions * np.array([1, 1, -1], "f4"), chiral.atomic_numbers)
    ours, theirs = (measure(perceive(Molecules.from_list([m]))) for m in (chiral, mirror))
    np.testing.assert_allclose(ours["dihedral"].value, -theirs["dihedral"].value, atol=1e-3)
    assert (ours["dihedral"].value < -1).any()
    np.testing.assert_allclose(ours["angle"].value, theirs["angle"].value, atol=1e-3)


def test_rings_of_three_have_no_dihedral_from_an_atom_to_itself():
    ring = perceive(Molecules.from_list([of_smiles("C1CC1")]))
    carbons = code_of("dihedral", "C1C-C1C-C1C")
    assert not (measure(ring)["dihedral"].code == carbons).any()
    jodo = measure(ring, counting="jodo")["dihedral"]
    assert jodo.value[jodo.code == carbons] == pytest.approx([0, 0, 0], abs=1e-5)


def test_molecules_do_not_mix(molecules):
    """Values are those of each molecule alone, under its number."""
    some = perceive(molecules.select(np.array([5, 900, 17])))
    together = measure(some)
    for k in range(3):
        alone = measure(some.select(np.array([k])))
        for kind in KINDS:
            mine = together[kind].molecule == k
            np.testing.assert_array_equal(together[kind].value[mine], alone[kind].value)


def test_coincident_atoms_leave_angles_out():
    positions = np.array([[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]], "f4")
    bonds = Bonds(
        np.array([[0, 1], [1, 2], [2, 3]], "u2"), np.ones(3, "u1"), offsets_from_sizes([3])
    )
    found = measure(Molecules(positions, np.full(4, 6, "u1"), offsets_from_sizes([4]), bonds=bonds))
    assert found["bond length"].value.tolist() == [0, 1, 1]
    assert found["angle"].value.tolist() == [90]
    assert len(found["dihedral"].value) == 0


def test_no_bonds_at_all():
    lonely = Molecules(np.zeros((1, 3), "f4"), np.array([2], "u1"), offsets_from_sizes([1]))
    for measured in measure(perceive(lonely)).values():
        assert len(measured.value) == 0


@pytest.mark.parametrize("types", [QM9_TYPES, GEOM_TYPES], ids=lambda t: t.name)
def test_names_of_types(types):
    for kind, names in types.types.items():
        assert len({code_of(kind, name) for name in names}) == len(names) == 8
        for name in names:
            assert code_of(kind, type_name(kind, code_of(kind, name))) == code_of(kind, name)
    assert code_of("angle", "C1N-N2O") != code_of("angle", "C2N-N1O")
    assert code_of("bond length", "Cl1C") == code_of("bond length", "C1Cl")


@pytest.mark.parametrize("name", ["C1", "CC", "C1C-C1C", "C1Xx", "1C1"])
def test_names_that_are_no_type(name):
    with pytest.raises(InputError):
        code_of("bond length", name)
    with pytest.raises(InputError, match="no type of angle"):
        code_of("angle", "C1C-O1C")
