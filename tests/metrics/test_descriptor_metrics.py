"""Descriptors in an evaluation, changes on relaxation, and PoseBusters by check."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import of_smiles
from rdkit import Chem
from rdkit.Chem import AllChem, Descriptors, rdMolTransforms
from scipy.stats import t, wasserstein_distance

import molgen_energy as mg
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import from_rdkit, to_rdkit
from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.chemistry.geometry import KINDS, GeometryTypes
from molgen_energy.chemistry.rdkit import build
from molgen_energy.chemistry.relaxation import Relaxed, relax_mmff
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.metrics import molecule_evaluation
from molgen_energy.metrics.accumulator import (
    JACKKNIFE_GROUPS,
    EvaluationAccumulator,
    jackknife_group,
)
from molgen_energy.metrics.checks import strain
from molgen_energy.metrics.checks.chunk import CheckSettings, check_chunk
from molgen_energy.metrics.checks.posebusters import CHECKS
from molgen_energy.metrics.distances.comparison import Comparison, Distributions, compare
from molgen_energy.metrics.evaluation import evaluate_molecules
from molgen_energy.metrics.molecule_evaluation import MoleculeEvaluation, descriptor_means
from molgen_energy.metrics.molecule_table import MoleculeTable
from molgen_energy.metrics.options import make_options
from molgen_energy.metrics.reference import MAX_STORED, Reference
from molgen_energy.metrics.report.distributions import histograms, plot_svg
from molgen_energy.metrics.report.molecules import molecule_report
from molgen_energy.metrics.report.table import metric_text
from molgen_energy.metrics.results import evaluate_inputs
from molgen_energy.metrics.statistics import Estimate, ratio_interval
from molgen_energy.workers import WorkerPool

HERE = WorkerPool(0)


@pytest.fixture(scope="module")
def files(molecules, tmp_path_factory):
    """Ninety molecules of QM9 and eighty others, with perceived bonds as given ones."""
    folder = tmp_path_factory.mktemp("descriptors")
    parts = (np.arange(0, 1800, 20), np.arange(7, 1607, 20))
    made = []
    for name, part in zip(("samples", "real"), parts, strict=True):
        built = to_rdkit(perceive(molecules.select(part)))
        made.append((mg.MoleculeList(built).save(folder / f"{name}.sdf"), built))
    return made


@pytest.fixture(scope="module")
def results(files):
    (path, _), (reference, _) = files
    options = make_options("descriptors", "given", "edm")
    return evaluate_inputs(
        [path], reference, None, None, options, HERE, table=MoleculeTable(descriptors=True)
    )


@pytest.fixture(scope="module")
def report(results):
    return molecule_report(results, lambda: HERE)


def numbers(built: list[Chem.Mol], descriptor) -> dict[int, float]:
    """A descriptor of the molecules that RDKit sanitises, by record; all of them are connected."""
    found = {}
    for record, molecule in enumerate(built, start=1):
        copy = Chem.Mol(molecule)
        if Chem.SanitizeMol(copy, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE:
            found[record] = descriptor(Chem.MolFromSmiles(Chem.MolToSmiles(copy)))
    return found


def rings_of_three(molecule: Chem.Mol) -> int:
    return sum(len(ring) == 3 for ring in molecule.GetRingInfo().AtomRings())


@pytest.mark.parametrize(
    ("key", "descriptor"),
    [("logp", Descriptors.MolLogP), ("rings_3", rings_of_three)],
)
def test_means_and_distances_against_plain_loops(files, report, key, descriptor):
    ours, theirs = (numbers(built, descriptor) for _, built in files)
    assert 70 < len(ours) < 90  # some perceived bonds are invalid, and not counted
    metrics = report.files[0].metrics
    mean, distance = metrics[f"mean_{key}"], metrics[f"wasserstein_{key}"]
    values, real = np.array([*ours.values()]), [*theirs.values()]
    group = jackknife_group(np.array([*ours]))
    assert mean.count == distance.count == len(values)
    for estimate, statistic, least in (
        (mean, np.mean, DESCRIPTORS[key].least),
        (distance, lambda part: wasserstein_distance(part, real), 0),
    ):
        assert estimate.value == pytest.approx(statistic(values), abs=1e-5)
        without = [statistic(values[group != g]) for g in np.unique(group)]
        n = len(without)
        half = t.ppf(0.975, n - 1) * math.sqrt((n - 1) * np.var(without))
        low, high = estimate.value - half, estimate.value + half
        assert estimate.interval == pytest.approx((max(least, low), high), abs=1e-5)
    data = report.reference.metrics[f"mean_{key}"]
    assert data.value == pytest.approx(np.mean(real), abs=1e-5)


def test_descriptors_in_table_and_columns(files, report, tmp_path):
    rows = [row for row in report.molecules if row["logp"] is not None]
    expected = numbers(files[0][1], Descriptors.MolWt)
    assert [row["record"] for row in rows] == list(expected)
    for row in rows:
        assert row["molecular_weight"] == pytest.approx(expected[row["record"]], rel=1e-5)
    incomplete = [row for row in report.molecules if row["logp"] is None]
    assert incomplete and all(row[key] is None for row in incomplete for key in DESCRIPTORS)
    assert not any(row["valid"] for row in incomplete)
    with report.molecules.save(tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert set(DESCRIPTORS) < set(next(csv.DictReader(file)))
    text = report.table()
    assert "descriptors, mean over complete molecules" in text
    assert "share of sp³ carbon, Wasserstein" in text


def test_histograms(files, results):
    """Bins of whole numbers are centred on them; every share is of all molecules."""
    plots = {plot.title: plot for plot in histograms(results)["descriptors"]}
    assert set(plots) == {descriptor.label for descriptor in DESCRIPTORS.values()}
    rings = plots["rings of 3 atoms"]
    assert (rings.edges % 1 == 0.5).all()
    for (_, built), shares in zip(files, (rings.files[0], rings.reference), strict=True):
        counts = np.bincount([*numbers(built, rings_of_three).values()])
        assert shares[: len(counts)] == pytest.approx(100 * counts / counts.sum())
        assert shares.sum() == pytest.approx(100)
    assert 98 < plots["logP"].files[0].sum() <= 100
    assert "logP" in plot_svg(plots["logP"])


def test_stored_descriptors(tmp_path, rng):
    """Means and distances of a file of statistics, whose numbers are rounded and bounded."""
    count = MAX_STORED + 1500
    accumulator = EvaluationAccumulator(0)
    checks = check_chunk(
        MoleculeChunk(np.arange(1, 3), perceive(Molecules.from_list([of_smiles("C")] * 2))),
        CheckSettings("given", descriptors=True),
    )
    accumulator.add(checks)
    many = np.resize(checks.descriptors, (count, len(DESCRIPTORS)))
    many[:, list(DESCRIPTORS).index("logp")] = rng.normal(2, 1.5, count)
    molecules = Molecules.from_list([checks.chunk.molecules[0]] * count)
    more = replace(
        checks, chunk=MoleculeChunk(np.arange(3, count + 3), molecules), descriptors=many
    )
    accumulator._add_descriptors(more)
    distributions = Distributions.of(accumulator, None)
    evaluation = MoleculeEvaluation(
        "a", 2, accumulator.counts.rates(), descriptor_means(accumulator), distributions
    )
    types = GeometryTypes("none", dict.fromkeys(KINDS, ()))
    reference = Reference("a", evaluation, distributions, Comparison(), types)
    reference.save(tmp_path / "a.h5", "a test")
    back = Reference.load(tmp_path / "a.h5")
    assert back.evaluation.estimates == evaluation.estimates
    stored = back.distributions.descriptors["logp"]
    assert len(stored.value) == MAX_STORED and stored.count == count + 2
    np.testing.assert_allclose(stored.value, np.round(stored.value, 3), atol=1e-6)
    assert set(stored.group) == set(range(JACKKNIFE_GROUPS))
    found = compare(distributions, back.distributions, None, composition=False).estimates
    assert found["wasserstein_logp"].value < 0.05
    assert found["wasserstein_rings"].value == 0


def test_a_mean_without_spread_or_molecules_has_no_interval(monkeypatch):
    molecules = perceive(Molecules.from_list([of_smiles("CC")] * 30))
    settings = CheckSettings("given", descriptors=True)
    accumulator = EvaluationAccumulator(0)
    assert descriptor_means(accumulator)["mean_qed"].note == "no complete molecules"
    accumulator.add(check_chunk(MoleculeChunk(np.arange(30), molecules), settings))
    means = descriptor_means(accumulator)
    assert means["mean_rings"] == Estimate(0, None, 30)
    monkeypatch.setattr(molecule_evaluation, "has_sa_score", lambda: False)
    assert "Contrib/SA_Score" in descriptor_means(EvaluationAccumulator(0))["mean_sa_score"].note


def test_a_reference_without_descriptors_is_named(files):
    options = make_options("descriptors", "single")
    results = evaluate_inputs([files[0][0]], None, None, None, options, HERE)
    assert any("have no descriptors" in note for note in results.samples[0].notes)
    assert results.samples[0].estimates["mean_qed"].value > 0.2
    assert "wasserstein_qed" not in results.samples[0].comparison.estimates


def test_without_the_metric_no_descriptors_are_computed(files):
    report = mg.evaluate(files[0][0], metrics="rates", workers=0)
    assert report.files[0].metrics["mean_qed"] is None
    assert "QED" not in report.table() and "qed" not in report.molecules.columns


def test_changes_on_relaxation():
    """Lengths and angles of one molecule by RDKit, before and after its own relaxation."""
    molecules = perceive(Molecules.from_list([of_smiles("C"), of_smiles("CC(C)=O")]))
    shift = np.random.default_rng(3).normal(0, 0.05, molecules.positions.shape)
    molecules = replace(molecules, positions=(molecules.positions + shift).astype("f4"))
    _, found = strain.strain_mmff(MoleculeChunk(np.arange(2), molecules))
    built = build(molecules[1], positions=True)
    before = Chem.Conformer(built.GetConformer())
    Chem.SanitizeMol(built)
    relax_mmff(built)
    after = built.GetConformer()
    for kind, smarts, function in (
        ("bond length", "*~*", rdMolTransforms.GetBondLength),
        ("angle", "*~*~*", rdMolTransforms.GetAngleDeg),
    ):
        chains = built.GetSubstructMatches(Chem.MolFromSmarts(smarts))
        expected = sum(abs(function(after, *c) - function(before, *c)) for c in chains)
        changes = found.changes[kind]
        assert changes.number.sum() == len(chains)
        assert changes.total.sum() == pytest.approx(expected, rel=0.02)


def test_xtb_takes_the_sum_of_the_formal_charges(monkeypatch):
    """Also of an ion of one atom, which has no bonds to change."""
    charges = []

    def relax(numbers, positions, charge):
        charges.append(charge)
        return Relaxed(positions + 0.1 * len(charges), 2.0)

    monkeypatch.setattr(strain, "relax_xtb", relax)
    built = [
        Chem.AddHs(Chem.MolFromSmiles(s)) for s in ("CC(=O)[O-]", "[Ca+2]", "[NH3+]CC(=O)[O-]")
    ]
    for molecule in built:
        AllChem.EmbedMolecule(molecule, randomSeed=1)
    found = strain.strain_xtb(MoleculeChunk(np.arange(3), from_rdkit(built)))
    assert charges == [-1, 2, 0]
    for relaxation, molecule in zip(found, built, strict=True):
        assert (relaxation.strain, relaxation.rmsd) == (2.0, pytest.approx(0, abs=2e-3))
        lengths = relaxation.changes["bond length"]
        assert lengths.number.sum() == molecule.GetNumBonds()
        assert lengths.total.sum() == pytest.approx(0, abs=1e-4)


def test_the_interval_of_a_ratio_against_bootstrap(rng):
    """Means over bonds of molecules that differ in size and in how much they change."""
    counts = rng.integers(5, 60, 300)
    sums = counts * rng.gamma(2, 0.01 + counts / 4000)
    low, high = ratio_interval(sums, counts)
    drawn = rng.integers(0, 300, (4000, 300))
    ratios = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    expected = np.quantile(ratios, [0.025, 0.975])
    assert (low, high) == pytest.approx(tuple(expected), abs=0.1 * np.ptp(expected))
    assert ratio_interval(sums[:1], counts[:1]) is None


def test_posebusters_by_check(files, monkeypatch):
    """A check that did not run, or did not finish, counts as failed."""
    passed = dict.fromkeys(CHECKS, True)

    def run(chunk):
        found = [passed] * len(chunk)
        for k, record in enumerate(chunk.records.tolist()):
            if record == 5:
                found[k] = passed | {"bond_lengths": False}
            elif record == 6:
                found[k] = {"sanitization": False}
            elif record == 7:
                found[k] = {"not finished within 20 s": False}
        return found

    available = {"rates", "posebusters"}
    monkeypatch.setattr(
        "molgen_energy.metrics.options.is_missing", lambda name: name not in available
    )
    monkeypatch.setattr(molecule_evaluation, "run_posebusters", run)
    options = {"metrics": "posebusters", "bonds": "given", "workers": 0}
    report = evaluate_molecules([files[0][0]], **options)
    rates = {
        key.removeprefix("posebusters_"): rate
        for key, rate in report.files[0].metrics.items()
        if key.startswith("posebusters")
    }
    whole = rates.pop("posebusters")
    assert (whole.count, whole.total) == (87, 90)
    assert set(rates) == set(CHECKS)
    missed = {name: rate.total - rate.count for name, rate in rates.items()}
    assert missed == dict.fromkeys(CHECKS, 2) | {"bond_lengths": 3}
    assert "PoseBusters by check" in report.table()
    assert report.to_dict()["files"][0]["metrics"]["posebusters_no_radicals"]["count"] == 88


def test_numbers_with_many_digits_before_the_point():
    assert metric_text(Estimate(367.1, (364.3, 369.8))) == "367 [364, 370]"
    assert metric_text(Estimate(1234.5, (1234.1, 1234.9))) == "1234.5 [1234, 1235]"
    assert metric_text(Estimate(3e9, (2e9, 4e9))) == "3e+09 [2e+09, 4e+09]"
