"""Bond lengths, angles and dihedrals against RDKit, and distances of distributions."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from conftest import of_smiles
from rdkit.Chem import rdMolTransforms
from scipy import stats

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.geometry import (
    GEOM_TYPES,
    KINDS,
    QM9_TYPES,
    code_of,
    measure,
    type_name,
)
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.molecules import Bonds, Molecule, Molecules, offsets_from_sizes
from molgen_energy.errors import InputError
from molgen_energy.metrics.distances import (
    jackknife,
    mmd,
    mmd_without,
    total_variation,
    wasserstein,
    wasserstein_of_counts,
    wasserstein_without,
)


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


def naive_mmd(source, target) -> float:
    """The double sum over all pairs, in float64."""
    both = np.concatenate([source, target]).astype(np.float64)
    n = len(both)
    squared = (both[:, None] - both[None]) ** 2
    width = squared.sum() / (n * n - n) / 4
    kernel = sum(np.exp(-squared / (width * 2**i)) for i in range(5))
    m = len(source)
    return kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2 * kernel[:m, m:].mean()


@pytest.mark.parametrize("outlier", [0.0, 100.0, 1e5])
@pytest.mark.parametrize(("m", "n", "shift"), [(300, 500, 0.0), (1, 400, 2.0), (2, 1, 0.1)])
def test_mmd_against_the_double_sum(rng, m, n, shift, outlier):
    source, target = rng.normal(size=m) + shift, rng.normal(size=n)
    target[0] += outlier
    assert mmd(source, target) == pytest.approx(naive_mmd(source, target), rel=1e-7, abs=1e-7)


def test_mmd_without_groups(rng):
    """As the double sum over what is left, with the kernels of all."""
    source, target = rng.normal(size=300), rng.normal(0.3, 1, size=200)
    group = rng.integers(0, 4, 300).astype("u1")
    both = np.concatenate([source, target])
    squared = (both[:, None] - both[None]) ** 2
    width = squared.sum() / (500 * 499) / 4
    kernel = sum(np.exp(-squared / (width * 2**i)) for i in range(5))
    expected = []
    for g in (None, 0, 3):
        kept = np.concatenate([np.ones(300, bool) if g is None else group != g])
        weight = np.concatenate([kept / kept.sum(), np.full(200, -1 / 200)])
        expected.append(weight @ kernel @ weight)
    assert mmd_without(source, group, target, [0, 3]) == pytest.approx(expected, abs=1e-7)
    assert np.isnan(mmd_without(source, group * 0, target, [0])[1])
    whole, without = wasserstein_without(source, group, target, [2])
    assert whole == pytest.approx(stats.wasserstein_distance(source, target))
    assert without == pytest.approx(stats.wasserstein_distance(source[group != 2], target))


def test_wasserstein_around_a_circle(rng):
    """The least of the distances on a line, over all places to cut the circle."""
    zero = np.zeros(1, "u1")
    assert wasserstein_without(np.array([179.0]), zero, np.array([-179.0]), [], 360) == [2]
    assert wasserstein_without(np.array([10.0]), zero, np.array([-80.0]), [], 360) == [90]
    for _ in range(5):
        source = rng.vonmises(3, 2, 40) * 180 / np.pi
        target = rng.vonmises(-2.5, 1, 55) * 180 / np.pi
        group = rng.integers(0, 3, 40).astype("u1")
        cuts = np.concatenate([source, target])

        def cut_open(ours, theirs, cuts=cuts):
            return min(
                stats.wasserstein_distance((ours - cut) % 360, (theirs - cut) % 360) for cut in cuts
            )

        whole, without = wasserstein_without(source, group, target, [1], 360)
        assert whole == pytest.approx(cut_open(source, target))
        assert without == pytest.approx(cut_open(source[group != 1], target))
        turned = (wrapped(source + 100), group, wrapped(target + 100))
        assert wasserstein_without(*turned, [], 360)[0] == pytest.approx(whole)
        assert whole <= wasserstein(source, target) + 1e-12


def wrapped(degrees):
    return (degrees + 180) % 360 - 180


def test_mmd_of_equal_values():
    assert mmd(np.ones(3), np.ones(4)) == 0
    values = np.random.default_rng(0).normal(size=1000)
    assert mmd(values, values) == pytest.approx(0, abs=1e-12)


def test_memory_of_mmd():
    rng = np.random.default_rng(0)
    tracemalloc.start()
    mmd(rng.normal(size=20_000), rng.normal(size=20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_wasserstein_and_total_variation(rng):
    a, b = rng.integers(0, 9, 400), rng.integers(2, 12, 300)
    expected = stats.wasserstein_distance(a, b)
    assert wasserstein(a, b) == pytest.approx(expected)
    counts = np.bincount(a), np.bincount(b)
    assert wasserstein_of_counts(*counts) == pytest.approx(expected)
    assert total_variation(np.array([1, 1]), np.array([0, 0, 3])) == 1
    assert total_variation(np.array([2, 2]), np.array([1, 1])) == 0
    assert total_variation(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)


def test_the_jackknife_of_a_mean_is_the_interval_of_a_mean(rng):
    """For means of groups of one size it is Student's interval exactly."""
    groups = rng.normal(10, 1, size=(10, 40)).mean(axis=1)
    without = [np.delete(groups, g).mean() for g in range(10)]
    low, high = jackknife(groups.mean(), without)
    expected = stats.t.interval(0.95, 9, groups.mean(), stats.sem(groups))
    assert (low, high) == pytest.approx(expected)
    assert jackknife(0.1, [0.0, 0.3])[0] == 0
