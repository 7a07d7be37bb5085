"""References that ship with the package: their names, both kinds of bonds, and what is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import of_smiles
from rdkit import Chem

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics.bundled import (
    BUNDLED,
    bundled_by_data,
    bundled_of,
    choose_probes,
)
from molgen_energy.metrics.distances.comparison import compare, compare_moments
from molgen_energy.metrics.distances.fcd import FEATURES, Moments
from molgen_energy.metrics.distances.similarity import SIMILARITY_KEYS
from molgen_energy.metrics.evaluation import evaluate_molecules
from molgen_energy.metrics.molecule_evaluation import evaluate_source, hash_smiles
from molgen_energy.metrics.options import EvaluationOptions, with_bonds, with_types
from molgen_energy.metrics.reference import Reference, evaluate_reference
from molgen_energy.metrics.sources import FileSource
from molgen_energy.metrics.statistics import Rate
from molgen_energy.workers import WorkerPool

HERE = WorkerPool(0)
DISTANCES = EvaluationOptions(frozenset({"rates", "geometry", "composition"}))
CCD = "Chemical Component Dictionary of the wwPDB (biotite), ideal"
FAST = {"metrics": "rates", "workers": 0}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """Three molecules of a network that was trained on CCD."""
    path = tmp_path_factory.mktemp("bundled") / "samples.sdf"
    fields = {"created_by": "molgen-energy 1.0", "trained_on": CCD}
    with MoleculeTextWriter(path, fields) as writer:
        writer.append(Molecules.from_list([of_smiles(s) for s in ("CCO", "c1ccncc1", "CC(N)=O")]))
    return path


@pytest.fixture(scope="module")
def both(sample_path, tmp_path_factory) -> tuple[Path, list[Reference]]:
    """A file with the statistics of 500 molecules, with perceived bonds and with given ones."""
    folder = tmp_path_factory.mktemp("both")
    with MoleculeFile(sample_path) as file:
        some = perceive(file.read(np.arange(0, 2000, 4)))
    with MoleculeWriter(folder / "some.h5", source="some") as writer:
        writer.append(some)
    found = []
    for bonds in ("perceived", "given"):
        options = with_bonds(DISTANCES, bonds)
        found.append(evaluate_reference(folder / "some.h5", "some", options, None, None, HERE))
    found[1].training = np.array([3, 5, 2**64 - 1], np.uint64)
    found[1].probes = ["[H]O[H]"]
    tables = {"single": {"edm": {"validity": Rate(1, 500)}}, "given": {"jodo": {}}}
    found[0].save(folder / "a.h5", "a test", found[1:], tables, compact=True)
    return folder / "a.h5", found


def test_each_choice_of_bonds_has_its_statistics(both):
    path, (perceived, given) = both
    for bonds, data in (("perceived", perceived), ("given", given)):
        back = Reference.load(path, bonds)
        assert back.evaluation.bonds == data.evaluation.bonds
        assert back.evaluation.valence == data.evaluation.valence
        assert back.evaluation.rates == data.evaluation.rates
        assert back.types == data.types
        assert back.distances.estimates == data.distances.estimates
    assert Reference.load(path, "perceived").training is None
    assert Reference.load(path, "given").training.tolist() == [3, 5, 2**64 - 1]
    assert Reference.load(path, "given").probes == ["[H]O[H]"]
    # Rates of another table where they are stored, else those that there are.
    assert Reference.load(path, "given", "jodo").evaluation.valence == "jodo"
    assert Reference.load(path, "given", "geom").evaluation.valence == "strict"
    single = Reference.load(path, "single", "edm")
    assert single.evaluation.bonds == "perceived from distances, all taken as single"
    assert single.evaluation.rates["validity"] == Rate(1, 500)
    assert single.evaluation.rates["connected"] == perceived.evaluation.rates["connected"]
    assert single.distances.estimates == perceived.distances.estimates
    given.save(path.with_name("given.h5"), "a test")
    assert Reference.load(path.with_name("given.h5")).evaluation.bonds == "given in the file"


def test_rounded_values_change_distances_by_less_than_a_hundredth_of_their_intervals(
    both, sample_path
):
    path, (perceived, _) = both
    back = Reference.load(path)
    options = with_types(with_bonds(DISTANCES, "perceived"), perceived.types)
    other = evaluate_source("x", FileSource(sample_path, "train"), options, None, HERE)
    exact, rounded = (
        compare(other.distributions, data.distributions, data.types).estimates
        for data in (perceived, back)
    )
    assert len(exact) == 11
    for key, estimate in exact.items():
        width = estimate.interval[1] - estimate.interval[0]
        assert abs(rounded[key].value - estimate.value) < 0.01 * width, key


def test_covariances_in_half_precision_change_fcd_by_less_than_a_hundredth(both, tmp_path, rng):
    _, (perceived, _) = both
    spread = 0.5 ** np.linspace(0, 12, FEATURES)

    def moments(shift: float) -> Moments:
        found = Moments()
        mixed = rng.standard_normal((2000, FEATURES)) @ np.diag(spread) @ mixing
        found.add(mixed + shift, rng.integers(0, 10, 2000))
        return found

    mixing = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0]
    source, target = moments(0.01), moments(0.0)
    data = replace(perceived, distributions=replace(perceived.distributions, moments=target))
    data.save(tmp_path / "a.h5", "a test", compact=True)
    back = Reference.load(tmp_path / "a.h5").distributions.moments
    exact, rounded = (compare_moments(source, each)["fcd"] for each in (target, back))
    width = exact.interval[1] - exact.interval[0]
    assert 0 < abs(rounded.value - exact.value) < 0.01 * width


def test_names_of_references(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert bundled_of(Path("ccd")) is BUNDLED["ccd"]
    with pytest.raises(InputError, match=r"--reference cdd does not exist; .*: qm9, ccd$"):
        bundled_of(Path("cdd"))
    assert bundled_of(Path("mine.h5")) is None  # its reader says that it does not exist
    Path("ccd").mkdir()
    assert bundled_of(Path("ccd")) is None  # a folder of molecules


def test_the_data_that_files_name_choose_the_reference():
    ccd, qm9, other, foreign = (
        {"trained_on": CCD}, {"source": "QM9 (qm9pack)"}, {"trained_on": "pets"}, {},
    )  # fmt: skip
    assert bundled_by_data([ccd, ccd, foreign]) == (BUNDLED["ccd"], [])
    assert bundled_by_data([qm9]) == (BUNDLED["qm9"], [])
    assert bundled_by_data([foreign, {"source": "pets"}]) == (None, [])
    for files, what in (
        ([ccd, qm9], "from different data (CCD; QM9) and are compared with QM9"),
        ([ccd, other], "from different data (CCD; pets)"),
        ([other], "the network was trained on pets, but its samples are compared with QM9"),
    ):
        chosen, (note,) = bundled_by_data(files)
        assert chosen is None and what in note and "--reference" in note


def test_samples_are_compared_with_the_data_of_their_network(samples):
    report = evaluate_molecules([samples], **FAST)
    assert report.summary.startswith("compared with CCD, which the files name as their data; ")
    assert report.reference.name == "CCD test"
    assert report.to_dict()["reference_choice"].startswith("CCD, ")
    supplied = list(Chem.SDMolSupplier(str(samples), sanitize=False, removeHs=False))
    assert evaluate_molecules(supplied, **FAST).reference.name == "CCD test"
    named = evaluate_molecules([samples], reference=Path("qm9"), **FAST)
    assert named.reference.name == "QM9 test"
    assert not named.summary.startswith("compared with")


def test_stability_says_nothing_where_few_real_molecules_are_stable(samples):
    """EDM's table of bond lengths is for molecules of the size of QM9's."""
    report = evaluate_molecules([samples], **FAST)
    data = report.reference.metrics
    shares = [f"{100 * data[key].value:.1f} %" for key in ("molecule_stability", "atom_stability")]
    (note,) = (text for text in report.warnings() if "own molecules" in text)
    assert f"only {shares[0]} of CCD test's own molecules and {shares[1]} of their atoms" in note
    assert "means nothing; --bonds given" in note
    # Three of three are more than 13 %; for atoms, three molecules prove nothing.
    above = [text for text in report.warnings() if "over-regular" in text]
    assert above == [
        "samples.sdf: molecules more often stable than those of real data: over-regular, not "
        "better than the data"
    ]
    by_bonds = evaluate_molecules([samples], bonds="given", **FAST)
    assert not any("own molecules" in text for text in by_bonds.warnings())


@pytest.mark.parametrize("valence", ["edm", "jodo", "geom", "strict"])
@pytest.mark.parametrize("bonds", ["perceived", "given", "single"])
def test_ccd_has_rates_for_every_choice(bonds, valence):
    data = BUNDLED["ccd"].load(bonds, valence)
    assert data.evaluation.molecules == 4639
    assert data.evaluation.valence == valence
    rates = data.evaluation.rates
    assert rates["molecule_stability"].total == rates["validity"].total == 4639
    # Given bonds are those of chemists; distances lead to other ones in most drug-like molecules.
    if bonds == "given" and valence in ("strict", "geom", "jodo"):
        assert rates["molecule_stability"].value > 0.95
    if bonds == "perceived":
        assert rates["molecule_stability"].value < 0.3 < rates["atom_stability"].value
    assert (rates["validity"].value > 0.9) == (bonds != "perceived")
    assert data.distributions.sizes.sum() == 4639
    assert (data.distributions.moments is None) == (bonds == "single")


def test_the_statistics_of_ccd():
    """They are those of the data: real molecules of the training split are at no distance."""
    for bonds, aromatic in (("given", True), ("perceived", False)):
        data = BUNDLED["ccd"].load(bonds)
        lengths = data.types.types["bond length"]
        assert len(lengths) == 8 and ("C12C" in lengths) == aromatic
        middle = {name: np.median(data.distributions.values("bond length", name).value)
                  for name in lengths}  # fmt: skip
        assert middle["H1C"] == pytest.approx(1.09, abs=0.01)
        assert middle["C1C"] == pytest.approx(1.51, abs=0.03)
        for key, estimate in data.distances.estimates.items():
            without_range = ("sizes", "elements", *SIMILARITY_KEYS)
            if estimate.value is not None and key not in without_range:
                assert data.ranges.at(key, 1000) is not None, key
        assert data.ranges.at("fcd", 300).median > data.ranges.at("fcd", 1000).median


def test_training_molecules_of_ccd():
    """By names that RDKit writes for aspirin, nicotinamide, indole, phenol; caffeine, adenine, …"""
    known = BUNDLED["ccd"].training_hashes("given")
    assert 35_000 < len(known) < 37_114
    training = ("CC(=O)Oc1ccccc1C(=O)O", "NC(=O)c1cccnc1", "c1ccc2[nH]ccc2c1", "Oc1ccccc1")
    others = ("Cn1cnc2c1c(=O)n(C)c(=O)n2C", "Nc1ncnc2[nH]cnc12", "O=C(O)CCC(=O)O", "OCCO")
    assert np.isin(hashes_of(*training), known).all()
    assert not np.isin(hashes_of(*others), known).any()  # of the other splits


def test_training_smiles_of_another_rdkit(monkeypatch):
    """Another version is believed only if it writes some of them again as they are."""
    monkeypatch.setattr("rdkit.rdBase.rdkitVersion", "1999.01.1")
    ccd = BUNDLED["ccd"]
    data = ccd.load("given")
    assert len(data.probes) == 32
    assert np.isin(hashes_of(*data.probes), data.training).all()
    assert ccd.training_hashes("given") is not None
    monkeypatch.setattr("molgen_energy.metrics.bundled._rewritten", lambda smiles: "other")
    assert ccd.training_hashes("given") is None


def test_probes_are_smiles_that_are_written_as_they_are():
    assert choose_probes(["[H]O[H]", "OCC", "C1=CC=CC=C1"]) == ["[H]O[H]"]


def hashes_of(*smiles: str) -> np.ndarray:
    """Hashes of the names with all hydrogens."""
    return hash_smiles(Chem.MolToSmiles(Chem.AddHs(Chem.MolFromSmiles(s))) for s in smiles)
