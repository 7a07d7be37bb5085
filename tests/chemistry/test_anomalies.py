"""Suspicious molecules by kind: made of good ones, and counted against RDKit and plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase.collections import g2
from ase.data import covalent_radii as cordero
from rdkit import Chem
from rdkit.Chem import AllChem
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from molgen_energy.chemistry import anomalies
from molgen_energy.chemistry.anomalies import (
    KINDS,
    AnomalyCounts,
    Neighbours,
    Repetitions,
    find_anomalies,
    fragments,
    largest_fragments,
)
from molgen_energy.chemistry.convert import from_rdkit
from molgen_energy.data.molecules import Molecule, Molecules, Property

BENZENE = 1.39 * np.array([[np.cos(t), np.sin(t), 0] for t in np.arange(6) * np.pi / 3])


def shares(molecules: Molecules) -> dict[str, float]:
    """Of the molecules that have each kind, where there are any."""
    kinds = find_anomalies(molecules).kinds
    return {kind: float(found.mean()) for kind, found in kinds.items() if found.any()}


def kinds_of(molecule: Molecule) -> set[str]:
    return set(shares(Molecules.from_list([molecule])))


def from_smiles(*smiles: str, hydrogens: bool = True, flat: bool = False) -> Molecules:
    mols = []
    for text in smiles:
        mol = Chem.AddHs(Chem.MolFromSmiles(text))
        if flat:
            AllChem.Compute2DCoords(mol)
        else:
            AllChem.EmbedMolecule(mol, randomSeed=1)
        mols.append(mol if hydrogens else Chem.RemoveAllHs(mol))
    return from_rdkit(mols)


def without(molecules: Molecules, chosen: np.ndarray) -> Molecules:
    """Without some atoms, given bonds and other columns."""
    parts = [slice(a, b) for a, b in zip(molecules.offsets, molecules.offsets[1:], strict=False)]
    return Molecules.from_list(
        [
            Molecule(
                molecules.positions[part][~chosen[part]],
                molecules.atomic_numbers[part][~chosen[part]],
            )
            for part in parts
        ]
    )


def test_radii_are_those_of_cordero():
    np.testing.assert_allclose(anomalies.covalent_radii()[1:97], cordero[1:97], atol=1e-6)


def test_good_molecules_have_no_anomaly(molecules):
    assert shares(molecules) == {}
    counts = AnomalyCounts()
    counts.add(molecules, np.arange(len(molecules)))
    assert counts.notes() == []


@pytest.mark.parametrize(
    ("scale", "unit"), [(1.8897, "bohr"), (0.1, "nm"), (100.0, "pm"), (0.5292, "Å divided")]
)
def test_units(molecules, scale, unit):
    counts = AnomalyCounts()
    some = molecules.select(np.arange(100))
    counts.add(replace(some, positions=some.positions * np.float32(scale)), np.arange(1, 101))
    (note,) = counts.notes({"scale": "convert it"})
    assert note.startswith("100 of 100 molecules have nearest atoms at ")
    assert float(note.split()[8]) == pytest.approx(scale, rel=0.1) and "e+" not in note
    assert unit in note
    assert note.endswith("(records 1, 2, 3, …); convert it")


def test_missing_hydrogens(molecules):
    """By geometry, without given bonds: of all hydrogens, and of those at carbon."""
    some = molecules.select(np.arange(500))
    hydrogen = some.atomic_numbers == 1
    assert shares(without(some, hydrogen))["no_hydrogens"] > 0.97
    at_carbon = np.zeros(len(hydrogen), bool)
    edges = Neighbours(some).edges
    for i, j in np.concatenate([edges, edges[:, ::-1]]):
        at_carbon[i] |= hydrogen[i] and some.atomic_numbers[j] == 6
    found = find_anomalies(without(some, at_carbon)).kinds
    assert (found["no_hydrogens"] | found["few_hydrogens"]).mean() > 0.97


@pytest.mark.parametrize("smiles", ["O=C=O", "ClC(Cl)(Cl)Cl", "C#N", "N#CC#N", "FC(F)=C(F)F"])
@pytest.mark.parametrize("given", [True, False])
def test_complete_molecules_need_no_hydrogens(smiles, given):
    molecules = from_smiles(smiles)
    assert shares(molecules if given else replace(molecules, bonds=None)) == {}


@pytest.mark.parametrize(
    "smiles", ["CCO", "c1ccccc1", "c1cc[nH]c1", "C[NH3+]", "CC(=O)[O-]", "C[N+](=O)[O-]", "C=O"]
)
def test_given_bonds_count_hydrogens_as_rdkit_does(smiles):
    """Where RDKit would add hydrogens, and where not."""
    whole = from_smiles(smiles)
    assert shares(whole) == {}
    assert set(shares(from_smiles(smiles, hydrogens=False))) == {"no_hydrogens"}
    last = np.flatnonzero(whole.atomic_numbers == 1)[-1]
    mol = Chem.RWMol(Chem.AddHs(Chem.MolFromSmiles(smiles)))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    (carbon,) = mol.GetAtomWithIdx(int(last)).GetNeighbors()
    mol.RemoveAtom(int(last))
    if carbon.GetAtomicNum() == 6:
        assert set(shares(from_rdkit([mol]))) == {"few_hydrogens"}


@pytest.mark.parametrize("scale", [1.0, 0.55])
@pytest.mark.parametrize(
    ("smiles", "hydrogens", "given"),
    [
        ("CCO", True, False),
        ("C=O", True, True),
        ("c1ccccc1", True, True),
        ("C", True, False),
        ("CC(=O)N", False, True),
        ("c1ccccc1", False, True),
    ],
)
def test_drawings(smiles, hydrogens, given, scale):
    """Bonds of 1.5 Å, as RDKit draws them, or 0.825, as ChemDraw does."""
    drawn = from_smiles(smiles, flat=True, hydrogens=hydrogens)
    positions = drawn.positions * np.float32(scale)
    drawn = replace(drawn, positions=positions, bonds=drawn.bonds if given else None)
    assert "drawing" in shares(drawn)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_small_molecules_of_every_kind(axis):
    """The set G2 in ASE: lacking hydrogens are radicals, carbenes, the atom C, and CS."""
    names = list(g2.names)
    turned = (np.roll(g2[name].positions, axis, axis=1).astype("f4") for name in names)
    molecules = Molecules.from_list(
        [Molecule(x, g2[name].numbers.astype("u1")) for name, x in zip(names, turned, strict=True)]
    )
    kinds = find_anomalies(molecules).kinds
    found = {k: {names[i] for i in np.flatnonzero(which)} for k, which in kinds.items()}
    assert found.pop("no_hydrogens") == {"CS", "C"}
    assert found.pop("few_hydrogens") == {"CH3CO", "HCO", "CH", "CH2_s1A1d", "CH2_s3B1d"}
    assert not any(found.values())


def test_planar_molecules_are_no_drawings():
    """Benzene with hydrogens, boron trifluoride, and ethyne on an axis."""
    carbons = Molecule(BENZENE.astype("f4"), np.full(6, 6, "u1"))
    ring = np.concatenate([BENZENE, BENZENE * 2.48 / 1.39]).astype("f4")
    assert kinds_of(Molecule(ring, np.repeat(np.array([6, 1], "u1"), 6))) == set()
    assert kinds_of(carbons) == {"drawing", "no_hydrogens"}
    fluoride = np.array([[0, 0, 0], [1.31, 0, 0], [-0.655, 1.134, 0], [-0.655, -1.134, 0]], "f4")
    assert kinds_of(Molecule(fluoride, np.array([5, 9, 9, 9], "u1"))) == set()
    line = np.array([[x, 0, 0] for x in (0, 1.2, -1.06, 2.26)], "f4")
    assert kinds_of(Molecule(line, np.array([6, 6, 1, 1], "u1"))) == set()


def test_atoms_in_one_place(molecules):
    first = molecules[0]
    assert kinds_of(replace(first, positions=first.positions * 0 + 3)) == {"one_place"}
    moved = first.positions.copy()
    moved[3] = moved[1] + np.float32(0.004)
    assert "coincident" in kinds_of(replace(first, positions=moved))
    moved[3] = moved[1] + np.float32([0.3, 0, 0])
    found = kinds_of(replace(first, positions=moved))
    assert "overlapping" in found and "coincident" not in found
    assert "far" in kinds_of(replace(first, positions=first.positions + np.float32(20_000)))
    assert kinds_of(Molecule(np.zeros((1, 3), "f4"), np.array([10], "u1"))) == set()


def test_large_molecules_by_near_pairs(molecules, monkeypatch):
    """The same distances and pairs as from all pairs."""
    some = molecules.select(np.arange(40))
    all_pairs = Neighbours(some)
    monkeypatch.setattr(anomalies, "_LARGE", 8)
    near = Neighbours(some)
    np.testing.assert_allclose(near.closest, all_pairs.closest, rtol=1e-5)
    assert set(map(tuple, near.edges)) == set(map(tuple, all_pairs.edges))
    scaled = replace(some, positions=some.positions * np.float32(0.1))
    assert shares(scaled) == {"scale": 1.0}


def test_fragments_are_connected_components():
    rng = np.random.default_rng(0)
    graphs = []
    for size in rng.integers(1, 60, 50).tolist():
        pairs = rng.integers(0, size, (size, 2))
        pairs = pairs[pairs[:, 0] != pairs[:, 1]].astype("u4")
        positions = (100 * rng.normal(size=(size, 3))).astype("f4")
        graphs.append(
            Molecule(positions, np.full(size, 6, "u1"), None, pairs, np.ones(len(pairs), "u1"))
        )
    molecules = Molecules.from_list(graphs)
    label, count = fragments(molecules)
    edges = Neighbours(molecules).edges
    graph = coo_array((np.ones(len(edges)), tuple(edges.T)), shape=(len(label),) * 2)
    expected, theirs = connected_components(graph, directed=False)
    assert count.sum() == expected == len(set(zip(label.tolist(), theirs.tolist(), strict=True)))


@pytest.mark.parametrize("given", [True, False])
def test_largest_fragment(given):
    """The acetate of its sodium salt, methylamine of its hydrochloride; the first of two equals."""
    salts = from_smiles("[Na+].CC(=O)[O-]", "CN.Cl", "CCO", "CO.OC")
    apart = salts.positions.copy()
    for k, label in enumerate(fragments(salts)[0].tolist()):
        apart[k] += np.float32(20 * label)
    salts = replace(
        salts,
        positions=apart,
        smiles=np.array(["[Na+].CC(=O)[O-]", "CN.Cl", "CCO", "CO.OC"], object),
        properties={"x": Property(np.arange(4.0), "eV")},
        bonds=salts.bonds if given else None,
    )
    assert shares(salts)["fragments"] == 0.75
    kept, changed = largest_fragments(salts)
    assert changed.tolist() == [True, True, False, True]
    assert kept.sizes.tolist() == [7, 7, 9, 6]
    assert kept[0].formal_charges.sum() == -1
    assert kept.smiles.tolist() == ["", "", "CCO", ""]
    assert kept.properties["x"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(kept[3].positions, salts[3].positions[[0, 1, 4, 5, 6, 7]])
    assert (fragments(kept)[1] == 1).all()
    if given:
        for before, after in zip(from_smiles("CC(=O)[O-]", "CN", "CCO", "CO"), kept, strict=True):
            assert sorted(before.bond_order) == sorted(after.bond_order)
            assert after.bond_index.max() < len(after)


def test_repetitions(molecules):
    seen = Repetitions()
    some = molecules.select(np.arange(300))
    assert not seen.add(some).any()
    assert seen.add(molecules.select(np.array([400, 7, 401, 401, 299]))).tolist() == [
        False, True, False, True, True,
    ]  # fmt: skip
    moved = some.positions.copy()
    moved[:, 0] = np.nextafter(moved[:, 0], np.float32(9))
    assert not seen.add(replace(some, positions=moved)).any()
    other = some.atomic_numbers.copy()
    other[some.offsets[:-1]] = 14
    assert not seen.add(replace(some, atomic_numbers=other)).any()


def test_counts_and_types(molecules):
    counts = AnomalyCounts()
    some = molecules.select(np.arange(4))
    flat = replace(some, positions=some.positions * np.float32([1, 1, 0]))
    counts.add(some, np.arange(1, 5), "a.xyz")
    counts.add(flat.select(np.arange(2)), np.array([7, 9]), "b.xyz")
    counts.add(some.select(np.array([2])), np.array([11]), "b.xyz")
    assert counts.counts["drawing"] == 2
    assert "2 of 7 molecules lie flat in z = 0, as 2D drawings do (records b.xyz: 7, b.xyz: 9)" in (
        counts.notes()
    )
    assert counts.notes({"duplicates": "drop it"}, ["duplicates"]) == [
        "1 of 7 molecules repeats the elements and positions of an earlier one (record b.xyz: 11); "
        "drop it"
    ]
    types = AnomalyCounts()
    renumbered = np.array([0, 2, 0, 0, 0, 0, 1, 3, 4, 5], "u1")[molecules.atomic_numbers]
    types.add(replace(molecules, atomic_numbers=renumbered), np.arange(len(molecules)))
    assert types.types() == ["H", "He", "Li", "Be", "B"]
    assert "atom types of LAMMPS; name them" in types.notes({"types": "name them"})[0]
    assert not AnomalyCounts().notes()
    assert set(counts.counts) == set(KINDS)
