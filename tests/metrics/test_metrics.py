"""Perception, stability, rates and bad molecules, against computations written another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import dense_orders, of_smiles
from rdkit import Chem
from rdkit.Chem import AllChem
from scipy import special, stats

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.rdkit import build, sanitize
from molgen_energy.chemistry.valence import (
    EDM_VALENCES,
    GEOM_VALENCES,
    JODO_VALENCES,
    stable_atoms,
    valences,
)
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError
from molgen_energy.metrics.bundled import BUNDLED
from molgen_energy.metrics.checks.chunk import CheckSettings, check_chunk
from molgen_energy.metrics.molecule_evaluation import (
    evaluate_source,
    hash_smiles,
    is_over_regular,
)
from molgen_energy.metrics.options import (
    BOND_DESCRIPTIONS,
    METRIC_GROUPS,
    EvaluationOptions,
    make_options,
    parse_metrics,
)
from molgen_energy.metrics.sources import FileSource
from molgen_energy.metrics.statistics import Clusters, Rate, median_interval
from molgen_energy.workers import WorkerPool

# The lengths in pm that matter for QM9, from the tables that EDM uses, by hand.
LENGTHS = {
    ("H", "H"): (74,), ("C", "H"): (109,), ("H", "N"): (101,), ("H", "O"): (96,), ("F", "H"): (92,),
    ("C", "C"): (154, 134, 120), ("C", "N"): (147, 129, 116), ("C", "O"): (143, 120, 113),
    ("C", "F"): (135,), ("N", "N"): (145, 125, 110), ("N", "O"): (140, 121), ("F", "N"): (136,),
    ("O", "O"): (148, 121), ("F", "O"): (142,), ("F", "F"): (142,),
}  # fmt: skip

RATES_ONLY = EvaluationOptions(frozenset({"rates"}), CheckSettings(type_codes={}))
GIVEN = EvaluationOptions(frozenset({"rates"}), CheckSettings("given", "strict", type_codes={}))
HERE = WorkerPool(0)


class ListSource:
    """A source of molecules in memory."""

    def __init__(self, *parts: Molecules) -> None:
        self._parts = parts

    def chunks(self):
        first = 1
        for part in self._parts:
            yield MoleculeChunk(np.arange(first, first + len(part)), part)
            first += len(part)


def rates_of(*parts: Molecules, training=None, options=RATES_ONLY):
    return evaluate_source("x", ListSource(*parts), options, training, HERE)


def naive_order(a: str, b: str, distance: float) -> int:
    order = 0
    for k, length in enumerate(LENGTHS[tuple(sorted((a, b)))]):
        if 100 * distance < length + (10, 5, 3)[k]:
            order = k + 1
    return order


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_perception_and_stability_against_pair_loops(molecules, rng, noise):
    some = molecules.select(np.arange(0, 2000, 40))
    shift = noise * rng.standard_normal(some.positions.shape)
    some = perceive(replace(some, positions=(some.positions + shift).astype("f4")))
    stable, sums = stable_atoms(some), valences(some)
    for k, molecule in enumerate(some):
        names = [symbol(int(z)) for z in molecule.atomic_numbers]
        size = len(molecule)
        expected = np.zeros((size, size), int)
        for i in range(size):
            for j in range(i):
                distance = float(np.linalg.norm(molecule.positions[i] - molecule.positions[j]))
                expected[i, j] = expected[j, i] = naive_order(names[i], names[j], distance)
        found = np.zeros_like(expected)
        for (i, j), order in zip(molecule.bond_index, molecule.bond_order, strict=True):
            assert i < j
            found[i, j] = found[j, i] = order
        np.testing.assert_array_equal(found, expected)
        atoms = slice(some.offsets[k], some.offsets[k + 1])
        assert sums[atoms].tolist() == expected.sum(axis=0).tolist()
        wanted = [expected[i].sum() in EDM_VALENCES[names[i]] for i in range(size)]
        assert stable[atoms].tolist() == wanted


def test_perception_in_bounded_pieces_and_of_large_molecules(molecules, monkeypatch):
    whole = perceive(molecules)
    monkeypatch.setattr("molgen_energy.chemistry.bonds._PAIRS_AT_ONCE", 5000)
    monkeypatch.setattr("molgen_energy.chemistry.bonds._LARGE", 20)  # beyond, by near pairs
    again = perceive(molecules)
    assert (molecules.sizes > 20).sum() > 100
    for field in ("index", "order", "offsets"):
        np.testing.assert_array_equal(getattr(again.bonds, field), getattr(whole.bonds, field))


def test_perception_replaces_bonds_and_charges():
    molecule = replace(of_smiles("C"), formal_charges=np.ones(5, "i1"))
    given = replace(molecule, bond_index=np.array([[1, 2]], "u2"), bond_order=np.array([3], "u1"))
    found = perceive(Molecules.from_list([given]))
    assert found.formal_charges is None
    assert found.bonds.order.tolist() == [1, 1, 1, 1]


def test_real_qm9_scores_what_is_published(molecules):
    """95.2 % and 99.0 % are published for QM9; 2,000 molecules know them to about a point."""
    found = rates_of(molecules)
    low, high = found.rates["molecule_stability"].interval
    assert low < 0.952 < high + 0.005
    assert found.rates["atom_stability"].value == pytest.approx(0.992, abs=0.004)
    assert found.rates["validity"].value == pytest.approx(0.979, abs=0.01)


def test_every_rate_by_hand():
    """Ethane twice, ethanol, two fragments, an invalid crowd, and a radical."""
    crowd = Molecule(np.outer(np.arange(6), [0.06, 0, 0]).astype("f4"), np.full(6, 6, "u1"))
    ethane = of_smiles("CC")
    radical = Molecule(ethane.positions[:-1], ethane.atomic_numbers[:-1])
    two = of_smiles("CCO", "O", shift=20)
    these = [ethane, ethane, of_smiles("CCO"), two, crowd, radical]
    training = hash_smiles(["[H]OC([H])([H])C([H])([H])[H]"])
    found = rates_of(Molecules.from_list(these), training=training)
    expected = {
        "molecule_stability": (4, 6),
        # all but the crowd's six and the radical's one carbon
        "atom_stability": (8 + 8 + 9 + 12 + 0 + 6, 8 + 8 + 9 + 12 + 6 + 7),
        "validity": (5, 6),
        "uniqueness": (3, 5),  # the largest fragment of the pair is ethanol
        "novelty": (2, 3),  # ethanol is known
        "connected": (5, 6),
        "complete": (4, 6),
        "valid_unique": (3, 6),
        "valid_unique_novel": (2, 6),
        "hydrogens_assumed": (1, 6),
        "good": (3, 6),
    }
    found_rates = {k: (r.count, r.total) for k, r in found.rates.items() if r is not None}
    assert found_rates == expected
    assert [w.record for w in found.worst] == [5, 6]
    assert found.worst[0].what == "6 of 6 atoms unstable"
    assert found.accumulator.invalid_reasons == {"C with valence 15": 1}
    assert found.accumulator.first_records == {"C with valence 15": 5}
    assert found.accumulator.unstable_valences == {("C", 15): 6, ("C", 3): 1}


def test_unstable_atoms_have_the_bonds_of_the_file():
    """RDKit's clean-up, which gives N+ and four bonds, does not count."""
    rdkit = Chem.AddHs(Chem.MolFromSmiles("O=[N+]([O-])c1ccccc1"))
    AllChem.EmbedMolecule(rdkit, randomSeed=7)
    nitro = molecule_from_rdkit(rdkit)
    numbers = nitro.atomic_numbers[nitro.bond_index]
    written = replace(
        nitro,
        formal_charges=np.zeros(len(nitro), "i1"),
        bond_order=np.where((numbers > 6).all(axis=1), 2, nitro.bond_order).astype("u1"),
    )
    chunk = MoleculeChunk(np.array([1]), Molecules.from_list([written]))
    found = check_chunk(chunk, CheckSettings("given", "strict", type_codes={}))
    assert found.valid.all()
    assert found.unstable_valences == {("N", 5): 1}


def test_nothing_valid_is_no_division_by_zero():
    crowd = Molecule(np.zeros((6, 3), "f4"), np.full(6, 6, "u1"))
    rates = rates_of(Molecules.from_list([crowd]), training=hash_smiles([])).rates
    assert rates["uniqueness"].value is None
    assert rates["novelty"].interval is None


def test_sanitize_agrees_with_rdkit_alone(molecules):
    for molecule in perceive(molecules.select(np.arange(0, 2000, 50))):
        checked = sanitize(molecule, whole_smiles=True)
        plain = build(molecule)
        assert checked.valid == (Chem.SanitizeMol(plain, catchErrors=True) == 0)
        assert checked.fragments == len(Chem.GetMolFrags(plain))
        if checked.valid and checked.fragments == 1:
            assert checked.smiles == Chem.MolToSmiles(plain)
            again = Chem.MolFromSmiles(checked.smiles)
            assert again.GetNumAtoms() <= len(molecule)
            assert checked.whole_smiles == Chem.MolToSmiles(again, isomericSmiles=False)


def test_an_overbonded_molecule_is_checked_at_once():
    """RDKit takes minutes over the rings of sixty atoms that are all bonded."""
    crowd = perceive(
        Molecules.from_list([Molecule(np.zeros((500, 3), "f4"), np.full(500, 6, "u1"))])
    )
    assert len(crowd.bonds.order) == 500 * 499 // 2
    assert sanitize(crowd[0]).reason == "an atom has more than 12 bonds"


# Known bugs of the field, each with the molecule that shows it.


def embedded(smiles: str, aromatic: bool = False) -> Molecule:
    """A molecule with the bonds and charges that RDKit gives it."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if not aromatic:
        Chem.Kekulize(molecule, clearAromaticFlags=True)
    return as_molecule(molecule)


def as_molecule(molecule: Chem.Mol) -> Molecule:
    """Atoms and bonds of an RDKit molecule, the atoms far apart."""
    orders = {
        Chem.BondType.SINGLE: 1, Chem.BondType.DOUBLE: 2, Chem.BondType.TRIPLE: 3,
        Chem.BondType.AROMATIC: 12,
    }  # fmt: skip
    bonds = list(molecule.GetBonds())
    return Molecule(
        np.random.default_rng(0).normal(size=(molecule.GetNumAtoms(), 3)).astype("f4") * 50,
        np.array([a.GetAtomicNum() for a in molecule.GetAtoms()], "u1"),
        np.array([a.GetFormalCharge() for a in molecule.GetAtoms()], "i1"),
        np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in bonds], "u2").reshape(-1, 2),
        np.array([orders[b.GetBondType()] for b in bonds], "u1"),
    )


def unstable(*these: Molecule, valence: str = "strict") -> list[int]:
    chunk = MoleculeChunk(np.arange(len(these)) + 1, Molecules.from_list(these))
    checks = check_chunk(chunk, CheckSettings("given", valence, type_codes={}))
    return checks.unstable_atoms.tolist()


@pytest.mark.parametrize(
    "smiles", ["c1ccccc1", "c1cc[nH]c1", "c1ccncc1", "c1cnc2[nH]cnc2c1", "C[N+](=O)[O-]", "C[NH3+]"]
)
def test_aromatic_bonds_are_no_integers(smiles):
    """1.5 twice is 3, and 1 + 1 in an array of integers is 2: Kekulise first."""
    assert unstable(embedded(smiles, aromatic=True)) == [0]
    assert unstable(embedded(smiles)) == [0]


def test_aromatic_bonds_that_cannot_be_kekulised_are_unstable():
    """A ring of five CH has no alternating bonds."""
    ring = [(k, (k + 1) % 5) for k in range(5)]
    spokes = [(k, k + 5) for k in range(5)]
    radical = Molecule(
        np.arange(30).reshape(10, 3).astype("f4"),
        np.array([6] * 5 + [1] * 5, "u1"),
        np.zeros(10, "i1"),
        np.array(ring + spokes, "u2"),
        np.array([12] * 5 + [1] * 5, "u1"),
    )
    assert all(
        (orders == radical.bond_order).all() for orders in sanitize(radical, forms=True).forms
    )
    assert unstable(radical) == [5]
    assert unstable(radical, valence="jodo") == [0]  # 1 + 1 + 1 = 3, which it takes for stable


CASES = [
    # Number of unstable atoms by strict, geom and jodo.
    ("C", 0, 0, 0),
    ("[CH3]", 1, 1, 0),  # a neutral carbon with three bonds, which JODO allows
    ("C[NH]", 1, 1, 0),  # a neutral nitrogen with two
    ("[CH3+]", 0, 0, 0),
    ("[CH2-2]", 0, 1, 1),  # isoelectronic with water
    ("[NH4+]", 0, 0, 0),
    ("C[NH3+]", 0, 0, 0),
    ("C[NH2+]", 1, 1, 0),  # ammonium without its hydrogen
    ("C[NH+]", 1, 1, 0),
    ("[OH3+]", 0, 0, 0),
    ("[OH2+2]", 1, 1, 0),  # a charge that is not in the table counts as 0 with JODO
    ("C[S-]", 0, 0, 1),  # thiolate
    ("CS(C)=O", 0, 1, 1),  # sulfoxide, S with four bonds
    ("C[S+](C)[O-]", 0, 0, 0),  # the same with charges
    ("CS(C)(=O)=O", 0, 0, 0),
    ("C[SH+]", 1, 1, 0),
    ("C[S-](C)C", 1, 1, 0),  # in JODO's table in place of thiolate
    ("F[B-](F)(F)F", 0, 0, 1),
    ("F[P-](F)(F)(F)(F)F", 0, 1, 1),
    ("C[I+]C", 0, 0, 1),
    ("C[Se]C", 0, 1, 0),
    ("[O-][Cl+3]([O-])([O-])[O-]", 0, 1, 1),
    ("[Na+]", 0, 1, 1),
    ("[IH+]", 1, 1, 0),  # elements with one entry ignore the charge with JODO
]


@pytest.mark.parametrize(("smiles", "strict", "geom", "jodo"), CASES)
def test_valence_models(smiles, strict, geom, jodo):
    """Chemistry that RDKit accepts as written is stable, an atom that lacks hydrogens is not."""
    molecule = embedded(smiles)
    found = [unstable(molecule, valence=model) for model in ("strict", "geom", "jodo")]
    assert found == [[strict], [geom], [jodo]]


def test_strict_stability_is_that_of_rdkit_as_written():
    """No radical, no implicit hydrogen, sanitised: compared with RDKit on the SMILES itself."""
    for smiles, strict, _, _ in CASES:
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        lacking = [a.GetNumRadicalElectrons() or a.GetTotalNumHs() for a in molecule.GetAtoms()]
        sulfuranide = molecule.HasSubstructMatch(Chem.MolFromSmarts("[S-]([#6])([#6])[#6]"))
        assert sum(map(bool, lacking)) + sulfuranide == strict, smiles
    # RDKit's clean-up accepts a nitro group with five bonds at N; as written it is no valence.
    nitro = Chem.MolFromSmiles("CN(=O)=O", sanitize=False)
    nitro.UpdatePropertyCache(strict=False)
    assert unstable(as_molecule(Chem.AddHs(nitro))) == [1]
    # Bonds of a metal to an atom that has no valence left are dative, as RDKit makes them.
    cisplatin = Chem.MolFromSmiles("[NH3][Pt](Cl)(Cl)[NH3]", sanitize=False)
    cisplatin.UpdatePropertyCache(strict=False)
    assert unstable(as_molecule(Chem.AddHs(cisplatin))) == [0]


def star(z: int, charge: int, aromatic: int, single: int) -> Molecules:
    """An atom with aromatic and single bonds to hydrogens."""
    total = aromatic + single
    return Molecules.from_list(
        [
            Molecule(
                np.zeros((total + 1, 3), "f4"),
                np.array([z] + [1] * total, "u1"),
                np.array([charge] + [0] * total, "i1"),
                np.array([(0, k + 1) for k in range(total)], "u2").reshape(-1, 2),
                np.array([12] * aromatic + [1] * single, "u1"),
            )
        ]
    )


def test_the_tables_of_valences():
    """Every entry is stable, and nothing else with a charge from -3 to 3."""
    for name, by_charge in JODO_VALENCES.items():
        for charge in range(-3, 4):
            allowed = by_charge
            if isinstance(by_charge, dict):
                allowed = by_charge.get(charge, by_charge[0])
            for total in range(9):
                some = star(atomic_number(name), charge, 0, total)
                assert stable_atoms(some, "jodo")[0] == (total in allowed)
    for name, by_charge in GEOM_VALENCES.items():
        for charge in range(-3, 4):
            for aromatic in range(5):
                for single in range(7):
                    some = star(atomic_number(name), charge, aromatic, single)
                    expected = (aromatic, single) in by_charge.get(charge, ())
                    assert stable_atoms(some, "geom")[0] == expected


def test_the_molecule_is_sanitised_before_its_fragment_is_chosen():
    """A small bad fragment makes the molecule invalid, however good the large one is."""
    good = of_smiles("CCCC")
    crowd = Molecule(np.zeros((3, 3), "f4") + 50, np.full(3, 9, "u1"))
    both = Molecule(
        np.concatenate([good.positions, crowd.positions]),
        np.concatenate([good.atomic_numbers, crowd.atomic_numbers]),
    )
    found = rates_of(Molecules.from_list([good, both])).rates
    assert (found["validity"].count, found["connected"].count) == (1, 1)


def test_missing_hydrogens_are_counted():
    """RDKit accepts carbon alone as methane; it is counted as valid, and as such."""
    carbon = Molecule(np.zeros((1, 3), "f4"), np.array([6], "u1"))
    found = rates_of(Molecules.from_list([carbon])).rates
    assert found["validity"].count == found["hydrogens_assumed"].count == 1
    assert found["molecule_stability"].count == found["good"].count == 0


def test_rates_do_not_depend_on_chunks_or_padding(molecules):
    """A small molecule beside a large one is checked as it is alone."""
    training = hash_smiles(["CC"])
    whole = rates_of(molecules, training=training)
    parts = [molecules.select(np.arange(k, 2000, 7)) for k in range(7)]
    assert whole.rates == rates_of(*parts, training=training).rates
    atoms = whole.accumulator.counts.unstable_atoms.total
    assert atoms == len(molecules.atomic_numbers) < 2000 * molecules.sizes.max()


def test_an_element_without_valence_is_named():
    salt = Molecule(np.array([[0, 0, 0], [0, 0, 2.4]], "f4"), np.array([11, 17], "u1"))
    parts = [Molecules.from_list([of_smiles("CC")]), Molecules.from_list([of_smiles("C"), salt])]
    with pytest.raises(InputError, match="record 3 holds Na, whose bonds can be given"):
        rates_of(*parts)
    ions = replace(salt, bond_index=np.zeros((0, 2), "u4"), bond_order=np.zeros(0, "u1"))
    by_bonds = Molecules.from_list([ions])
    for valence in ("geom", "jodo", "edm"):
        checks = replace(GIVEN.checks, valence=valence)
        with pytest.raises(InputError, match=f"Na, whose valences --valence {valence} does not"):
            rates_of(by_bonds, options=replace(GIVEN, checks=checks))
    assert rates_of(by_bonds, options=GIVEN).molecules == 1
    found = rates_of(*parts, options=replace(RATES_ONLY, skip_bad=True))
    assert (found.molecules, found.skipped) == (2, 1)
    assert found.notes == ["molecules with elements without known valences are left out: Na (1)"]
    with pytest.raises(InputError, match=r"no usable molecule is left .*Na \(1\)"):
        rates_of(Molecules.from_list([salt]), options=replace(RATES_ONLY, skip_bad=True))


def test_coincident_atoms_are_no_molecule():
    """By its bonds methanol is right, but two of its atoms, or all, are in one place."""
    whole = embedded("CO")
    twins = whole.positions.copy()
    twins[5] = twins[4] + np.float32(0.001)
    these = [whole, *(replace(whole, positions=p) for p in (twins, np.zeros_like(twins)))]
    found = rates_of(Molecules.from_list(these), options=GIVEN)
    assert {k: found.rates[k].count for k in ("validity", "good", "molecule_stability")} == {
        "validity": 1, "good": 1, "molecule_stability": 1,
    }  # fmt: skip
    assert found.rates["atom_stability"].count == 6 + 4
    assert found.accumulator.invalid_reasons == {
        "two atoms in one place": 1, "all atoms in one place": 1,
    }  # fmt: skip
    assert any("has all atoms in one place (record 3)" in note for note in found.notes)


def test_given_bonds_are_required(molecules):
    with pytest.raises(InputError, match="record 1 has no bonds; leave out --bonds given"):
        rates_of(molecules, options=GIVEN)


def test_given_bonds_are_checked():
    """Ethane whose file says that its carbons are not bonded is two fragments then."""
    bonded = perceive(Molecules.from_list([of_smiles("CC")]))
    cut = bonded.bonds.index[(bonded.bonds.index > 1).any(axis=1)]
    one = Molecule(
        bonded.positions,
        bonded.atomic_numbers,
        np.zeros(8, "i1"),
        cut,
        np.ones(len(cut), "u1"),
    )
    both = Molecules.from_list([one])
    seen = rates_of(both).rates
    assert (seen["molecule_stability"].count, seen["connected"].count) == (1, 1)
    found = rates_of(both, options=GIVEN)
    assert found.rates["connected"].count == found.rates["molecule_stability"].count == 0
    assert found.rates["atom_stability"].count == 6
    assert found.rates["hydrogens_assumed"].count == 1
    assert found.bonds == "given in the file"
    acetate = Molecules.from_list([embedded("CC(=O)[O-]")])  # its atoms lie far apart
    assert rates_of(acetate).rates["good"].count == 0
    assert rates_of(acetate, options=GIVEN).rates["good"].count == 1


def test_single_bonds_only_as_edm_does_on_geom():
    """Ethene is unstable, and valid only since RDKit adds hydrogens: the order is forgotten."""
    single = EvaluationOptions(frozenset({"rates"}), CheckSettings(bonds="single", type_codes={}))
    found = rates_of(Molecules.from_list([of_smiles("C=C")]), options=single)
    assert found.rates["molecule_stability"].count == 1  # with the orders, as EDM
    assert found.rates["hydrogens_assumed"].count == 1
    assert found.accumulator.smiles.hashes.tolist() == hash_smiles(["[H]C([H])C([H])[H]"]).tolist()


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (3, 7), (9520, 10000)])
def test_wilson_interval_against_scipy(count, total):
    expected = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert Rate(count, total).interval == pytest.approx((expected.low, expected.high))


def test_intervals_hold_rates_of_none_and_of_all():
    for total in range(1, 100):
        for count, bound in ((0, 0), (total, 1)):
            interval = Rate(count, total).interval
            assert interval is not None and interval[bound] == bound


def bootstrap(marked, total, rng) -> tuple[float, float]:
    """95 % interval of the share of unmarked atoms, from drawing molecules again."""
    drawn = rng.integers(0, len(total), (4000, len(total)))
    shares = 1 - marked[drawn].sum(axis=1) / total[drawn].sum(axis=1)
    return tuple(np.quantile(shares, [0.025, 0.975]))


@pytest.mark.parametrize(("noise", "wider"), [(0.0, 1.5), (0.05, 1.2), (0.1, 1.0)])
def test_atom_stability_is_as_sure_as_molecules_are_many(molecules, rng, noise, wider):
    """Its interval is that of drawing molecules again; that of independent atoms is narrower."""
    shift = noise * rng.standard_normal(molecules.positions.shape)
    noisy = replace(molecules, positions=(molecules.positions + shift).astype("f4"))
    marked = np.add.reduceat(~stable_atoms(perceive(noisy)), noisy.offsets[:-1], dtype=np.int64)
    sums = Clusters()
    for part in np.array_split(np.arange(2000), 7):
        sums.add(marked[part], noisy.sizes[part])
    rate = sums.unmarked()
    assert (rate.count, rate.total) == (
        int((noisy.sizes - marked).sum()),
        len(noisy.molecule_index),
    )
    assert rate == rates_of(noisy).rates["atom_stability"]
    low, high = bootstrap(marked, noisy.sizes, rng)
    ours = rate.interval
    assert ours == pytest.approx((low, high), abs=0.15 * (high - low))
    naive = Rate(rate.count, rate.total).interval
    assert ours[1] - ours[0] > wider * (naive[1] - naive[0])


def test_the_interval_of_atom_stability_covers(rng):
    """The truth is in it in 95 of 100 files, where that of independent atoms often lacks it."""
    inside = np.zeros(2)
    for _ in range(400):
        sizes = rng.integers(10, 25, 200)
        marked = rng.binomial(sizes, rng.beta(0.6, 5.4, 200))
        sums = Clusters()
        sums.add(marked, sizes)
        for k, rate in enumerate(
            (sums.unmarked(), Rate(int(sizes.sum() - marked.sum()), int(sizes.sum())))
        ):
            low, high = rate.interval
            inside[k] += low <= 0.9 <= high
    assert 0.92 <= inside[0] / 400 <= 0.98
    assert inside[1] / 400 < 0.8


def test_atom_stability_at_its_ends():
    sizes = np.array([10, 20, 30])
    for marked in (0 * sizes, sizes):
        sums = Clusters()
        sums.add(marked, sizes)
        rate = sums.unmarked()
        assert rate.effect == pytest.approx(1400 / 60)  # as if atoms of a molecule were all alike
        low, high = rate.interval
        assert (high == 1 and low < 0.5) if rate.count else (low == 0 and high > 0.5)
    assert Clusters().unmarked().interval is None
    one = Clusters()
    one.add(np.array([3]), np.array([12]))
    assert one.unmarked().effect == 12
    even = Clusters()
    even.add(np.array([1, 1, 1]), np.array([4, 4, 4]))
    assert even.unmarked().effect == 1


def test_interval_of_the_median(rng):
    """It holds the true median in about 95 of 100 samples."""
    inside = 0
    for _ in range(300):
        low, high = median_interval(rng.exponential(size=50))
        inside += low <= np.log(2) <= high
    assert 270 <= inside <= 300
    assert median_interval(np.arange(5.0)) is None


@pytest.mark.parametrize("count", [1, 5, 6, 7, 100, 1001])
def test_interval_of_the_median_is_that_of_scipy(rng, count):
    values = rng.normal(size=count)
    low, high = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert median_interval(values) == (None if np.isnan([low, high]).any() else (low, high))


def test_ranks_of_the_median_are_binomial_for_all_counts():
    for count in (*range(6, 400), 1000, 12_345, 200_000):
        tails = special.bdtr(np.arange(count + 1), count, 0.5)
        rank = int((tails < 0.025).sum())
        assert median_interval(np.arange(count, dtype=float)) == (rank - 1, count - rank)


def test_over_regular(molecules):
    data = rates_of(molecules)
    better = rates_of(molecules)
    assert not is_over_regular(better, data)
    better.rates["molecule_stability"] = Rate(2000, 2000)
    assert is_over_regular(better, data)
    # Rates that mean different things are not compared.
    assert is_over_regular(replace(better, bonds=BOND_DESCRIPTIONS["single"]), data)
    assert not is_over_regular(replace(better, bonds=BOND_DESCRIPTIONS["given"]), data)
    assert not is_over_regular(replace(better, valence="jodo"), data)


def test_bundled_training_smiles(sample_path):
    training = BUNDLED["qm9"].training_hashes()
    assert training is not None
    assert 90_000 < len(training) < 100_000
    novelty = {
        split: evaluate_source(
            split, FileSource(sample_path, split), RATES_ONLY, training, HERE
        ).rates["novelty"]
        for split in ("train", "test")
    }
    assert novelty["train"].value == 0
    assert novelty["test"].value > 0.98


def test_bundled_smiles_of_another_rdkit(monkeypatch):
    """Another version is believed only if it names the sample as the list does."""
    monkeypatch.setattr("rdkit.rdBase.rdkitVersion", "1999.01.1")
    assert BUNDLED["qm9"].training_hashes() is not None
    monkeypatch.setattr(
        "molgen_energy.metrics.bundled.collect_smiles_hashes",
        lambda *arguments: hash_smiles(["named otherwise"]),
    )
    assert BUNDLED["qm9"].training_hashes() is None


def test_names_of_metrics():
    assert parse_metrics("all") == set(METRIC_GROUPS)
    assert parse_metrics(" FCD, strain ") == {"rates", "fcd", "strain"}
    with pytest.raises(InputError, match="did you mean 'geometry'"):
        parse_metrics("geometri")


def test_elements():
    table = Chem.GetPeriodicTable()
    for z in range(1, 119):
        assert symbol(z) == table.GetElementSymbol(z)
        assert atomic_number(symbol(z)) == z
    with pytest.raises(ValueError, match="no chemical element"):
        atomic_number("Xx")


def test_dense_orders_of_the_tests(molecules):
    """The tests' own view of bonds, padded."""
    some = molecules.select(np.array([3, 400, 9]))
    orders = dense_orders(*some.padded())
    for k, molecule in enumerate(perceive(some)):
        assert orders[k].sum() == 2 * molecule.bond_order.sum()


def test_molecules_of_rdkit(molecules):
    """What `build` writes, `molecule_from_rdkit` reads."""
    for molecule in perceive(molecules.select(np.arange(0, 2000, 100))):
        charged = replace(molecule, formal_charges=np.ones(len(molecule), "i1"))
        back = molecule_from_rdkit(build(charged, positions=True))
        for name in ("atomic_numbers", "positions", "formal_charges", "bond_index", "bond_order"):
            np.testing.assert_array_equal(getattr(back, name), getattr(charged, name))


@pytest.mark.parametrize(
    ("smiles", "message"),
    [("", "no atoms"), ("C*", "atom 2 is no chemical element"), ("CC", "no conformer")],
)
def test_molecules_of_rdkit_that_cannot_be_used(smiles, message):
    with pytest.raises(ValueError, match=message):
        molecule_from_rdkit(Chem.MolFromSmiles(smiles))


def test_bonds_of_rdkit_that_cannot_be_used():
    molecule = Chem.MolFromSmiles("N->[Fe]")
    molecule.AddConformer(Chem.Conformer(2))
    with pytest.raises(ValueError, match=r"bond of atoms 1 and 2 has no order .* dative"):
        molecule_from_rdkit(molecule)


def test_names_of_options():
    assert make_options(["fcd"], bonds="single").metrics == {"rates", "fcd"}
    with pytest.raises(InputError, match="unknown choice of --valence 'lax'"):
        make_options(valence="lax")
