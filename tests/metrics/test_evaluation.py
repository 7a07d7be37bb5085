"""From files to a report: workers, references, slow metrics, the page."""

from __future__ import annotations

import html.parser
import io
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from conftest import of_smiles, torchrun_to_end
from rdkit import Chem
from rdkit.Chem import AllChem, rdDetermineBonds, rdForceFieldHelpers, rdMolAlign
from rich.console import Console

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.geometry import KINDS, QM9_TYPES, code_of, rmsd
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.errors import InputError, PeerLostError
from molgen_energy.metrics.accumulator import (
    MAX_VALUES,
    EvaluationAccumulator,
    RandomSubset,
    ValueSample,
    hash_numbers,
)
from molgen_energy.metrics.bundled import BUNDLED
from molgen_energy.metrics.checks.chunk import CheckSettings, check_chunk
from molgen_energy.metrics.checks.strain import strain_mmff
from molgen_energy.metrics.distances.comparison import Distributions, compare
from molgen_energy.metrics.distances.mmd import mmd
from molgen_energy.metrics.molecule_evaluation import evaluate_source
from molgen_energy.metrics.options import (
    DEFAULT_METRICS,
    EvaluationOptions,
    parse_metrics,
    with_types,
)
from molgen_energy.metrics.reference import Reference, evaluate_reference
from molgen_energy.metrics.report.model import Report
from molgen_energy.metrics.report.molecules import molecule_report
from molgen_energy.metrics.report.table import metric_text, real_text, tables
from molgen_energy.metrics.results import MoleculeResults, evaluate_inputs
from molgen_energy.metrics.sources import FileSource
from molgen_energy.metrics.statistics import Estimate, Mean, Rate, RealRange
from molgen_energy.workers import WorkerError, WorkerPool

HERE = WorkerPool(0)
EVERYTHING_FAST = EvaluationOptions(subset=40)
RATES = EvaluationOptions(frozenset({"rates"}))


def run(paths, reference=None, train=None, types=None, options=EVERYTHING_FAST) -> MoleculeResults:
    """Evaluate in this process."""
    return evaluate_inputs(paths, reference, train, types, options, HERE)


def report_of(results: MoleculeResults) -> Report:
    return molecule_report(results, lambda: HERE)


def numbered(molecules: Molecules) -> MoleculeChunk:
    return MoleculeChunk(np.arange(1, len(molecules) + 1), molecules)


def noisy(molecules: Molecules, noise: float) -> Molecules:
    shift = noise * np.random.default_rng(1).standard_normal(molecules.positions.shape)
    return replace(molecules, positions=(molecules.positions + shift).astype("f4"))


@pytest.fixture(scope="module")
def samples(molecules, tmp_path_factory) -> Path:
    """Sixty molecules of QM9 with some noise, as `sample` writes them."""
    path = tmp_path_factory.mktemp("samples") / "a <b> $x$.sdf"
    fields = {"created_by": "molgen-energy 1.0", "seed": "7"}
    with MoleculeTextWriter(path, fields, {"config": "model:\n  layers: 3"}) as writer:
        writer.append(noisy(molecules.select(np.arange(0, 2000, 34)), 0.04))
    return path


def hanging(chunk: MoleculeChunk) -> list[int]:
    if 7 in chunk.records:
        time.sleep(600)
    return chunk.records.tolist()


def dying(chunk: MoleculeChunk) -> list[int]:
    if 7 in chunk.records:
        os._exit(11)
    return chunk.records.tolist()


def failed(chunk: MoleculeChunk, reason: str) -> tuple[int, str]:
    return int(chunk.records[0]), reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "trouble"),
    [(hanging, "not finished within 0.7 s"), (dying, "the worker process died (exit code 11)")],
)
def test_a_molecule_that_hangs_or_kills_is_named_and_the_rest_goes_on(molecules, work, trouble):
    chunk = numbered(molecules.select(np.arange(30)))
    with WorkerPool(2, 0.7) as workers:
        results = [result for _, result in workers.map(work, chunk.parts(12), failed)]
    assert (7, trouble) in results
    done = [record for result in results if isinstance(result, list) for record in result]
    assert done == [k for k in range(1, 31) if k != 7]


def test_processes_that_are_killed_are_replaced(molecules):
    """Killed from outside, at work or idle: the run ends, with every molecule once."""
    chunk = numbered(molecules.select(np.arange(0, 2000, 4)))
    settings = CheckSettings(type_codes={})
    with WorkerPool(2, 60) as workers:
        results = []
        for k, (part, found) in enumerate(
            workers.map(partial(check_chunk, settings=settings), chunk.parts(20), failed)
        ):
            results += found.valid.tolist() if not isinstance(found, tuple) else [None]
            assert len(part) <= 20
            if k in (2, 9):
                workers._workers[0].process.kill()
    whole = check_chunk(chunk, settings).valid.tolist()
    assert len(results) == len(whole)
    assert sum(a != b for a, b in zip(results, whole, strict=True)) <= 2


def failing(chunk: MoleculeChunk) -> None:
    raise KeyError("what happened")


def test_work_that_raises_ends_the_run(molecules):
    with (
        WorkerPool(1, 60) as workers,
        pytest.raises(WorkerError, match="KeyError: 'what happened'"),
    ):
        list(workers.map(failing, numbered(molecules).parts(1000), failed))


def test_workers_change_nothing(molecules):
    """The same results in this process and in two, and for other chunks."""
    some = numbered(molecules.select(np.arange(0, 2000, 8)))
    options = with_types(EVERYTHING_FAST, QM9_TYPES)

    class Source:
        def __init__(self, size: int) -> None:
            self._size = size

        def chunks(self):
            return some.parts(self._size)

    here = evaluate_source("x", Source(100), options, None, HERE)
    with WorkerPool(2, 60) as workers:
        there = evaluate_source("x", Source(17), options, None, workers)
    assert here.rates == there.rates
    assert here.estimates == there.estimates
    assert here.worst == there.worst
    assert [s.record for s in here.accumulator.gallery_passing] == [
        s.record for s in there.accumulator.gallery_passing
    ]
    for kind in KINDS:
        for name in QM9_TYPES.types[kind]:
            ours, theirs = (e.distributions.values(kind, name) for e in (here, there))
            np.testing.assert_array_equal(ours.value, theirs.value)
            np.testing.assert_array_equal(ours.group, theirs.group)


@contextmanager
def with_another(here: int, there: int, seconds: float) -> Iterator[WorkerPool]:
    """A pool of so many processes, and of so many of another member of the job."""
    ours, theirs = Pipe()

    def serve() -> None:
        with WorkerPool(there, seconds) as workers:
            workers.serve(theirs)
        theirs.close()

    thread = Thread(target=serve)
    thread.start()
    try:
        with WorkerPool(here, seconds, [ours]) as workers:
            yield workers
    finally:
        ours.close()
        thread.join(30)
        assert not thread.is_alive()


def process_of(chunk: MoleculeChunk) -> int:
    return os.getpid()


@pytest.mark.parametrize(("here", "there"), [(1, 1), (0, 0)])
def test_processes_of_a_job_share_the_work_in_order(molecules, here, there):
    chunk = numbered(molecules.select(np.arange(120)))
    settings = CheckSettings(type_codes={})
    with with_another(here, there, 60) as workers:
        for _ in range(2):
            results = []
            for part, found in workers.map(partial(check_chunk, settings=settings), chunk.parts(7)):
                assert part.records[0] == len(results) + 1
                results += found.valid.tolist()
            did = {pid for _, pid in workers.map(process_of, chunk.parts(1))}
            assert len(did) == max(1, here + there)
    assert results == check_chunk(chunk, settings).valid.tolist()


def test_a_molecule_that_kills_a_process_of_another_member_is_found(molecules):
    chunk = numbered(molecules.select(np.arange(6, 14)))
    chunk = replace(chunk, records=chunk.records + 6)
    with with_another(1, 1, 60) as workers:  # the other is given the first chunk
        results = [result for _, result in workers.map(dying, chunk.parts(2), failed)]
    assert results[0] == (7, "the worker process died (exit code 11)")
    assert [record for result in results[1:] for record in result] == list(range(8, 15))


def test_work_that_raises_in_another_member_ends_the_run(molecules):
    with (
        pytest.raises(WorkerError, match="KeyError: 'what happened'"),
        with_another(0, 1, 60) as workers,
    ):
        list(workers.map(failing, numbered(molecules).parts(1000), failed))


def test_another_member_that_ends_is_noticed(molecules):
    ours, theirs = Pipe()
    theirs.send(1)
    with WorkerPool(0, 60, [ours]) as workers, pytest.raises(PeerLostError, match="has ended"):
        theirs.close()
        list(workers.map(process_of, numbered(molecules).parts(500), failed))


def flat(value: object, place: str = "") -> dict[str, object]:
    """The values of nested dictionaries and lists by their places."""
    if not isinstance(value, (dict, list)) or not value:
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in items for k, v in flat(inner, f"{place}/{key}").items()}


@pytest.mark.slow
def test_torchrun_prints_what_one_process_does(molecules, tmp_path):
    """The same JSON, once; and of a bad record in the middle one line, without waiting."""
    with MoleculeTextWriter(tmp_path / "a.xyz", {}) as writer:
        writer.append(noisy(molecules.select(np.arange(600)), 0.03))
    report = report_of(run([tmp_path / "a.xyz"], options=replace(EVERYTHING_FAST, subset=25)))
    done = torchrun_to_end(
        tmp_path, "evaluate", "a.xyz", "--json", "-", "--subset", "25", "--workers", "1"
    )
    assert done.returncode == 0, done.stderr
    # Sums depend on the number of threads in their last digit.
    ours, theirs = flat(json.loads(done.stdout)), flat(json.loads(json.dumps(report.to_dict())))
    assert ours.keys() == theirs.keys()
    for place, value in theirs.items():
        exact = not isinstance(value, float)
        assert ours[place] == (value if exact else pytest.approx(value, rel=1e-12)), place
    lines = (tmp_path / "a.xyz").read_text().splitlines()
    lines[[k for k, line in enumerate(lines) if line.startswith("molecule=")][550] + 1] = "X"
    (tmp_path / "bad.xyz").write_text("\n".join(lines))
    start = time.monotonic()
    done = torchrun_to_end(tmp_path, "evaluate", "bad.xyz", "--workers", "1")
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "rror: " in line and "bad.xyz" in line]
    assert len(said) == 1
    assert "record 551 (line " in said[0]
    assert "process 1 of 2" not in done.stderr


def test_a_sample_of_values_is_bounded_and_fair():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5 * MAX_VALUES).astype("f4")
    key = hash_numbers(np.arange(len(values)), np.zeros(len(values), np.int64))
    sample = ValueSample()
    for part in np.array_split(np.arange(len(values)), 37):
        sample.add(values[part], key[part], np.zeros(len(part), np.uint8))
    assert sample.count == len(values)
    assert len(sample.value) == MAX_VALUES
    assert set(sample.value.tolist()) == set(values[np.argsort(key)[:MAX_VALUES]].tolist())
    assert abs(sample.value.mean()) < 4 / np.sqrt(MAX_VALUES)
    assert len(np.unique(key)) == len(key)


def test_a_random_subset_does_not_depend_on_the_chunks(molecules):
    chunk = numbered(molecules.select(np.arange(300)))
    drawn = []
    for size in (300, 7):
        subset = RandomSubset(20)
        parts = list(chunk.parts(size))
        for part in parts:
            subset.add(part, part.records % 3 == 0)
        drawn.append([s.record for s in subset])
        for s in subset:  # no chunk is kept in memory
            arrays = [part.molecules.positions for part in parts]
            assert not any(np.shares_memory(s.molecule.positions, array) for array in arrays)
            assert np.array_equal(s.molecule.positions, molecules[s.record - 1].positions)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 20
    assert all(record % 3 == 0 for record in drawn[0])


def distributions(molecules: Molecules) -> Distributions:
    accumulator = EvaluationAccumulator(0)
    settings = with_types(EVERYTHING_FAST, QM9_TYPES).checks
    accumulator.add(check_chunk(numbered(molecules), settings))
    return Distributions.of(accumulator, None)


def test_distances_are_means_over_types_with_those_missing_named(molecules):
    data = distributions(molecules.select(np.arange(1000, 2000)))
    ours = distributions(noisy(molecules.select(np.arange(400)), 0.02))
    found = compare(ours, data, QM9_TYPES)
    by_hand = {
        name: mmd(ours.values("angle", name).value, data.values("angle", name).value)
        for name in QM9_TYPES.types["angle"]
    }
    assert found.missing["angle"] == []
    assert found.estimates["mmd_angle"].value == pytest.approx(np.mean(list(by_hand.values())))
    low, high = found.estimates["mmd_angle"].interval
    assert 0 <= low < found.estimates["mmd_angle"].value < high
    water = distributions(Molecules.from_list([of_smiles("O")] * 30))
    few = compare(water, data, QM9_TYPES)
    assert few.missing["bond length"] == [n for n in QM9_TYPES.types["bond length"] if n != "O1H"]
    assert len(few.missing["dihedral"]) == 8
    assert few.estimates["mmd_dihedral"].value is None
    assert few.estimates["elements"].value > 0.3


def test_intervals_of_distances_cover(molecules):
    """The distance of a third of the molecules lies in the interval from another third."""
    data = distributions(molecules.select(np.arange(0, 2000, 3)))
    found = compare(distributions(molecules.select(np.arange(1, 2000, 3))), data, QM9_TYPES)
    other = compare(distributions(molecules.select(np.arange(2, 2000, 3))), data, QM9_TYPES)
    inside = [
        estimate.interval[0] <= other.estimates[key].value <= estimate.interval[1]
        for key, estimate in found.estimates.items()
    ]
    assert np.mean(inside) >= 0.75


def test_the_bundled_reference_is_the_test_split(sample_path):
    """800 of its 13,083 molecules are at hand: what they give must fit."""
    data = BUNDLED["qm9"].load()
    assert data.evaluation.molecules == 13_083
    assert data.distributions.sizes.sum() == 13_083
    assert data.evaluation.rates["molecule_stability"].value == pytest.approx(0.952, abs=0.002)
    options = with_types(EVERYTHING_FAST, QM9_TYPES)
    found = evaluate_source("x", FileSource(sample_path, "test"), options, None, HERE)
    near = compare(found.distributions, data.distributions, QM9_TYPES)
    assert near.estimates["mmd_bond_length"].value < 0.01
    assert near.estimates["sizes"].value < 0.3
    for key in ("molecule_stability", "validity", "connected", "hydrogens_assumed"):
        low, high = found.rates[key].interval
        assert low - 0.01 <= data.evaluation.rates[key].value <= high + 0.01
    for key in ("strain_energy", "strain_rmsd", "xtb_energy"):
        assert data.evaluation.estimates[key].value > 0
    assert data.distances.estimates["fcd"].value < 0.1
    assert data.evaluation.rates["posebusters"].value > 0.9


def test_a_reference_is_read_back_as_it_was_saved(sample_path, tmp_path):
    options = EVERYTHING_FAST
    data = evaluate_reference(sample_path, "sample", options, QM9_TYPES, None, HERE)
    data.save(tmp_path / "a.h5", "a test")
    back = Reference.load(tmp_path / "a.h5")
    assert back.evaluation.rates == data.evaluation.rates
    assert back.evaluation.estimates == data.evaluation.estimates
    assert back.distances.estimates == data.distances.estimates
    assert back.types == data.types
    ours = distributions(noisy(back_molecules(sample_path), 0.03))
    first = compare(ours, data.distributions, QM9_TYPES).estimates
    second = compare(ours, back.distributions, QM9_TYPES).estimates
    for key, estimate in first.items():
        assert second[key].value == pytest.approx(estimate.value, abs=1e-12)


def back_molecules(path: Path) -> Molecules:
    with MoleculeFile(path) as file:
        return file.load("train").select(np.arange(200))


def test_a_reference_without_splits_is_halved(samples, molecules, tmp_path):
    path = tmp_path / "mine.sdf"
    with MoleculeTextWriter(path, {}) as writer:
        writer.append(molecules.select(np.arange(400)))
    found = run([samples], path)
    assert any("one half of it from the other" in note for note in found.reference.evaluation.notes)
    assert found.reference.evaluation.molecules == 400
    assert 0 < found.reference.distances.estimates["sizes"].value < 2
    assert found.reference.types.name == "the 8 most frequent of each kind"
    code = code_of("bond length", "C1H")
    assert code in {code_of("bond length", t) for t in found.reference.types.types["bond length"]}


def test_options_that_the_bundled_statistics_cannot_serve(samples, sample_path, tmp_path):
    jodo = replace(EVERYTHING_FAST, checks=CheckSettings(counting="jodo"))
    with pytest.raises(InputError, match="count every angle once; name real molecules"):
        run([samples], options=jodo)
    with pytest.raises(InputError, match="of QM9 contain no other geometry types than qm9; name"):
        run([samples], types="geom")
    with pytest.raises(InputError, match="unknown list of types 'qm8'"):
        run([samples], types="qm8")
    assert run([samples], sample_path, None, "qm9", jodo).samples[0].molecules == 59
    with MoleculeTextWriter(tmp_path / "a.xyz", {}) as writer:
        writer.append(Molecules.from_list([of_smiles("CC")]))
    with pytest.raises(InputError, match="has no bonds; leave out --bonds given"):
        run([tmp_path / "a.xyz"], options=replace(EVERYTHING_FAST, bonds="given"))


def sdf_texts(molecules: Molecules, path: Path) -> tuple[list[str], list[str]]:
    """Records whose bonds are declared as perceived, and the same without that declaration."""
    with MoleculeTextWriter(path, {}) as writer:
        writer.append(molecules)
    records = [f"{record}$$$$\n" for record in path.read_text().split("$$$$\n")[:-1]]
    declared = ">  <bonds>\nperceived\n\n"
    assert all(declared in record for record in records)
    return records, [record.replace(declared, "") for record in records]


def test_given_bonds_are_those_of_all_checks(tmp_path, molecules):
    """Where every record has bonds of its own, everything is judged by them."""
    some = molecules.select(np.arange(40))
    _, own = sdf_texts(some, tmp_path / "perceived.sdf")
    (tmp_path / "own.sdf").write_text("".join(own))
    perceived = run([tmp_path / "perceived.sdf"])
    assert perceived.samples[0].bonds == "perceived from distances"
    assert not perceived.bonds_unused
    given = run([tmp_path / "own.sdf"])
    assert given.samples[0].bonds == "given in the file"
    assert given.options.checks.valence == "strict"
    # All are neutral and stable by their bonds as by distances.
    assert given.samples[0].rates == perceived.samples[0].rates
    # In one table all files are judged alike, and the other choice is named.
    both = run([tmp_path / "own.sdf", tmp_path / "perceived.sdf"])
    assert {sample.bonds for sample in both.samples} == {"perceived from distances"}
    assert both.bonds_unused
    assert any("another file has none; evaluate own.sdf alone" in note for note in both.notes)
    rows = {row.key: row for section in report_of(both).sections for row in section.rows}
    assert rows["strain_energy"].note == rows["posebusters"].note != ""
    assert rows["validity"].note == ""
    with MoleculeWriter(tmp_path / "a.h5", source="bonds") as writer:
        writer.append(perceive(some))
    found = run([tmp_path / "a.h5"], train=tmp_path / "a.h5")
    assert found.samples[0].rates["novelty"].count == 0
    assert any("those of the samples are given in the file" in note for note in found.notes)


def test_files_with_some_given_bonds(tmp_path, molecules):
    """`auto` takes given bonds only where every record has them, and names the first without."""
    declared, own = sdf_texts(molecules.select(np.arange(40)), tmp_path / "a.sdf")
    mixed = [own[k] if k % 4 == 1 else record for k, record in enumerate(declared)]
    (tmp_path / "mixed.sdf").write_text("".join(mixed))
    found = run([tmp_path / "mixed.sdf"])
    assert found.samples[0].bonds == "perceived from distances"
    assert any("since record 1 has none; --bonds given takes" in note for note in found.notes)
    given = run(
        [tmp_path / "mixed.sdf"],
        train=tmp_path / "mixed.sdf",
        options=replace(EVERYTHING_FAST, bonds="given"),
    )
    assert given.samples[0].molecules == 40
    assert any("novelty: record 1 of" in note and "of its own" in note for note in given.notes)
    other = run([tmp_path / "mixed.sdf"], options=replace(EVERYTHING_FAST, valence="jodo"))
    assert any("by --valence edm, that of the samples by jodo" in note for note in other.notes)
    given = run([tmp_path / "a.sdf"], options=replace(EVERYTHING_FAST, bonds="given"))
    assert given.samples[0].bonds == "given in the file"
    assert any("their bonds come from distances" in note for note in given.notes)


def test_what_notes_say_of_other_data(tmp_path, molecules):
    """Novelty against the reference's own training split, sizes that differ, absent elements."""
    some = replace(molecules.select(np.arange(60)), smiles=None, properties={})
    with MoleculeWriter(tmp_path / "mine.h5", source="mine") as writer:
        writer.append(some)
        writer.set_split(np.repeat(np.array([0, 2], np.uint8), 30))
    for name, part in (("old", slice(0, 30)), ("new", slice(30, 50))):
        with MoleculeWriter(tmp_path / f"{name}.h5", source=name) as writer:
            writer.append(some.select(np.arange(60)[part]))
    hydrogen_bromide = Molecule(np.array([[0, 0, 0], [0, 0, 1.41]], "f4"), np.array([1, 35], "u1"))
    with MoleculeTextWriter(tmp_path / "hbr.xyz", {}) as writer:
        writer.append(Molecules.from_list([hydrogen_bromide]))
    paths = [tmp_path / name for name in ("old.h5", "new.h5", "hbr.xyz")]
    found = run(paths, tmp_path / "mine.h5")
    assert found.novelty_against.startswith("the training split of ")
    assert [s.rates["novelty"].count for s in found.samples[:2]] == [
        0, found.samples[1].rates["novelty"].total,
    ]  # fmt: skip
    assert any("different numbers of molecules" in note for note in found.notes)
    assert any("has no Br; compare with" in note for note in found.samples[2].notes)
    found = run(paths[:1], paths[1])
    assert found.samples[0].rates["novelty"] is None
    assert any("has no training split; pass --train" in note for note in found.notes)


def test_metrics_by_name():
    assert parse_metrics("default,fcd") == {*DEFAULT_METRICS, "fcd"}
    assert parse_metrics(["strain"]) == {"rates", "strain"}
    with pytest.raises(InputError, match="did you mean 'default'"):
        parse_metrics("defualt")


def test_provenance_is_of_this_package_only(tmp_path, molecules, samples):
    """Fields of another program, though of the same names, do not describe how a file was made."""
    with MoleculeTextWriter(tmp_path / "a.sdf", {"seed": "7", "PUBCHEM_CID": "1"}) as writer:
        writer.append(molecules.select(np.arange(3)))
    assert run([tmp_path / "a.sdf"]).samples[0].provenance == {}
    assert set(run([samples]).samples[0].provenance) == {"created_by", "seed", "config"}


def test_bonds_that_another_program_replaced_are_given(tmp_path):
    """RDKit's SDWriter keeps the field that declares bonds as perceived."""
    benzene = Chem.AddHs(Chem.MolFromSmiles("c1ccccc1"))
    AllChem.EmbedMolecule(benzene, randomSeed=0)
    some = Molecules.from_list([molecule_from_rdkit(benzene)] * 3)
    sdf_texts(replace(some, bonds=None), tmp_path / "a.sdf")
    assert run([tmp_path / "a.sdf"]).samples[0].bonds == "perceived from distances"
    with Chem.SDWriter(str(tmp_path / "b.sdf")) as writer:
        for molecule in Chem.SDMolSupplier(str(tmp_path / "a.sdf"), removeHs=False, sanitize=False):
            alone = Chem.MolFromXYZBlock(Chem.MolToXYZBlock(molecule))
            rdDetermineBonds.DetermineBonds(alone)
            for name in molecule.GetPropNames():
                alone.SetProp(name, molecule.GetProp(name))
            writer.write(alone)
    found = run([tmp_path / "b.sdf"]).samples[0]
    assert found.bonds == "given in the file"
    assert found.rates["good"].count == 3


def test_aromatic_and_kekule_forms_are_at_distance_zero(tmp_path):
    """The same molecules in both dialects, in every row, with every list of types."""
    smiles = ["c1ccccc1C", "c1ccncc1O", "c1cc[nH]c1", "Cc1ccccc1C(=O)O", "c1ccc2ccccc2c1"] * 5
    mols = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in smiles]
    for k, molecule in enumerate(mols):
        AllChem.EmbedMolecule(molecule, randomSeed=k)
    molecules = Molecules.from_list([molecule_from_rdkit(m) for m in mols])
    kekule = []
    for molecule in mols:
        Chem.Kekulize(molecule, clearAromaticFlags=True)
        kekule.append(molecule_from_rdkit(molecule))
    for name, these in (("aromatic", molecules), ("kekule", Molecules.from_list(kekule))):
        with MoleculeWriter(tmp_path / f"{name}.h5", source=name) as writer:
            writer.append(these)
    aromatic = tmp_path / "aromatic.h5"
    assert (molecules.bonds.order == 12).any()
    for types in ("frequent", "qm9", "geom"):
        found = run([tmp_path / "kekule.h5"], aromatic, aromatic, types)
        for key, estimate in found.samples[0].comparison.estimates.items():
            assert estimate.value == pytest.approx(0, abs=1e-12), (types, key)
        assert found.samples[0].rates["novelty"].count == 0
        codes = found.reference.types.types["bond length"]
        assert any("12" in code for code in codes) == (types != "qm9")


def test_names_of_files_that_are_no_utf8(molecules, tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"caf\xe9.xyz")
    with MoleculeTextWriter(tmp_path / "a.xyz", {}) as writer:
        writer.append(molecules.select(np.arange(30)))
    try:
        (tmp_path / "a.xyz").rename(path)
    except OSError:
        pytest.skip("the file system takes no such name")
    report = report_of(run([path], path, path, None, RATES))
    report.save(tmp_path / "out")
    assert "caf\ufffd.xyz" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    json.dumps(report.to_dict(), ensure_ascii=False).encode()
    for table in tables(report, Console(width=200)):
        Console().print(table)
    assert "caf\ufffd.xyz" in capsys.readouterr().out


def test_coordinates_that_are_out_of_this_world(tmp_path):
    """Nothing is said of them by NumPy: they are far, or where float32 ends, not finite."""
    water = "3\n\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"
    (tmp_path / "far.xyz").write_text(
        water + water.replace("0.93", "-2e38").replace("0.96", "2e38")
    )
    (tmp_path / "beyond.xyz").write_text(water.replace("0.93", "1e39"))
    far = of_smiles("CCO")
    far = perceive(Molecules.from_list([far] * 30))
    far = replace(far, positions=far.positions * np.float32(5e37))
    with MoleculeWriter(tmp_path / "far.h5", source="far") as writer:
        writer.append(far)
    given = replace(EVERYTHING_FAST, bonds="given")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        paths = [tmp_path / "far.xyz"]
        report_of(run(paths, options=RATES)).save(tmp_path / "a")
        paths = [tmp_path / "far.h5"]
        report_of(run(paths, paths[0], paths[0], "qm9", given)).save(tmp_path / "b")
        with pytest.raises(InputError, match="atom 3 are not finite"):
            run([tmp_path / "beyond.xyz"])


def test_empty_files_and_paths_that_are_not_files(tmp_path):
    with MoleculeWriter(tmp_path / "none.h5", source="nothing"):
        pass
    for arguments in ([tmp_path / "none.h5"], None), ([], tmp_path / "none.h5"):
        with pytest.raises(InputError, match=r"none.h5 holds no molecules; make it again"):
            run(*arguments)
    with pytest.raises(InputError, match="null is a device or a pipe; name a file"):
        FileSource(Path("/dev/null"))
    with pytest.raises(InputError, match="holds no molecule file"):
        FileSource(tmp_path)


def test_a_table_of_many_files_keeps_its_words(samples, sample_path):
    report = report_of(run([samples]))
    report.files = [replace(report.files[0], name=f"{k}.sdf") for k in range(6)]
    labels = [row.heading for section in report.sections for row in section.rows]
    for width, count in ((400, 1), (160, 2), (80, 6), (60, 6)):
        console = Console(width=width, file=io.StringIO(), legacy_windows=False)
        shown = tables(report, console)
        assert len(shown) == count
        for table in shown:
            console.print(table)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        metrics = [m for m in report.files[0].metrics.values() if m is not None]
        for interval in re.findall(r"\[.*?\]", " ".join(map(metric_text, metrics))):
            assert interval in text  # in one line
        if width >= 80:
            assert all(re.search(rf"{re.escape(label)} *[│ ]", text) for label in labels)
        for name in (
            *(f"{k}.sdf" for k in range(6)),
            *(w for label in labels for w in label.split()),
        ):
            assert name in text


def test_mmff_strain_against_rdkit(molecules):
    some = perceive(molecules.select(np.arange(0, 200, 10)))
    for molecule, relaxed in zip(some, strain_mmff(numbered(some)), strict=True):
        built = Chem.Mol(build(molecule, positions=True))
        if Chem.SanitizeMol(built, catchErrors=True) or relaxed.strain is None:
            assert relaxed.strain is None
            assert relaxed.reason
            continue
        properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(built)
        before = rdForceFieldHelpers.MMFFGetMoleculeForceField(built, properties).CalcEnergy()
        moved = Chem.Mol(built)
        assert rdForceFieldHelpers.MMFFOptimizeMolecule(moved, maxIters=5000) == 0
        after = rdForceFieldHelpers.MMFFGetMoleculeForceField(moved, properties).CalcEnergy()
        assert relaxed.strain == pytest.approx(before - after, abs=1e-4)
        same = [(k, k) for k in range(len(molecule))]
        assert relaxed.rmsd == pytest.approx(
            rdMolAlign.AlignMol(moved, built, atomMap=same), abs=1e-4
        )
        assert relaxed.strain >= 0


def test_rmsd_forbids_mirrors_and_forgives_motion(rng):
    points = rng.normal(size=(9, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    assert rmsd(points, points @ turn + 5) == pytest.approx(0, abs=1e-6)
    assert rmsd(points, points * [1, 1, -1]) > 0.1
    assert rmsd(points[:1], points[1:2]) == 0


def test_posebusters():
    pytest.importorskip("posebusters")
    from molgen_energy.metrics.checks.posebusters import run_posebusters

    ethane, pair = of_smiles("CC"), of_smiles("C", "C", shift=20)
    squeezed = replace(of_smiles("CCCCC"), positions=of_smiles("CCCCC").positions * 0.7)
    crowd = Molecule(np.zeros((20, 3), "f4"), np.full(20, 6, "u1"))
    made = perceive(Molecules.from_list([ethane, pair, squeezed, crowd]))
    good, two, small, many = run_posebusters(numbered(made))
    assert all(good.values()) and len(good) > 5
    assert two.keys() == small.keys() == good.keys()
    assert two["all_atoms_connected"] is False
    assert not all(small.values())
    assert many == {"sanitization": False}


def test_xtb():
    pytest.importorskip("tblite")
    pytest.importorskip("ase")
    from molgen_energy.metrics.checks.strain import strain_xtb

    water = of_smiles("O")
    stretched = replace(water, positions=water.positions * 1.1)
    near, far = strain_xtb(numbered(Molecules.from_list([water, stretched])))
    assert 0 <= near.strain < 2
    assert far.strain > near.strain + 3
    assert far.rmsd > near.rmsd


def test_fcd_against_the_package(molecules):
    fcd = pytest.importorskip("fcd")
    from molgen_energy.metrics.distances.fcd import ChemNet

    names = [
        Chem.MolToSmiles(Chem.MolFromSmiles(name))
        for name in check_chunk(numbered(molecules.select(np.arange(50))), CheckSettings()).smiles
        if name
    ]
    first, second = names[:24], names[24:]
    gaussians = []
    for part in (first, second):
        net = ChemNet(kept=len(part))
        net.add([*part, None, part[0]])  # each counts once
        moments = net.finish()
        kept = net.kept()
        assert kept.sum(axis=0) == pytest.approx(moments.first.sum(axis=0), rel=1e-5, abs=1e-4)
        assert moments.count.sum() == len(set(part))
        gaussians.append(moments.gaussian(np.ones(10, bool)))
    expected = fcd.get_fcd(sorted(set(first)), sorted(set(second)), device="cpu")
    assert gaussians[0].distance(gaussians[1]) == pytest.approx(expected, rel=1e-3)
    assert gaussians[0].distance(gaussians[0]) == pytest.approx(0, abs=1e-5)


def test_metrics_that_are_not_installed_say_how_to_get_them(samples, monkeypatch):
    monkeypatch.setattr("molgen_energy.metrics.options.is_missing", lambda m: m in EXTRA)
    monkeypatch.setattr("molgen_energy.metrics.report.molecules.is_missing", lambda m: m in EXTRA)
    options = replace(EVERYTHING_FAST, metrics=frozenset({"rates", *EXTRA}))
    report = report_of(run([samples], options=options))
    hints = {row.key: row.hint for section in report.sections for row in section.rows}
    for metric, key in (("fcd", "fcd"), ("posebusters", "posebusters"), ("xtb", "xtb_energy")):
        assert hints[key] == f"pip install 'molgen-energy[{metric}]'"
    assert report.to_dict()["files"][0]["metrics"]["fcd"] is None


EXTRA = ("fcd", "posebusters", "xtb")


class Outside(html.parser.HTMLParser):
    """Notes everything that a page would load from elsewhere, and tags that are left open."""

    EMPTY = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.count = {"canvas": 0, "svg": 0, "h3": 0}

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        for name in ("src", "href", "xlink:href", "data", "action"):
            if (values.get(name) or "#")[0] != "#":
                self.loads.append(values[name])
        if tag in self.count:
            self.count[tag] += 1
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(samples, tmp_path):
    results = run([samples])
    report = report_of(results)
    report.files[0].provenance["note"] = "<script>alert(1)</script>"
    page = report.save(tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    outside = Outside()
    outside.feed(text)
    assert outside.loads == []
    assert outside.open == []
    assert not re.search(r"@import|url\((?!['\"]?#)|https?://(?!www\.w3\.org)", text)
    assert "<script>alert" not in text
    assert "a <b> $x$.sdf" not in text  # names are escaped
    assert "a &lt;b&gt; $x$.sdf" in text
    found = results.samples[0].accumulator
    shown = len(list(found.gallery_passing)) + len(found.gallery_failing())
    assert outside.count["canvas"] == shown == 24
    assert outside.count["svg"] >= 24 + shown - 2  # panels and drawings
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert referred <= set(ids)
    models = json.loads(re.search(r"const models = (.*?);\n", text)[1])
    assert len(models) == shown
    for model in models:
        assert len(model["positions"]) == len(model["elements"])
        assert all(0 <= i < len(model["elements"]) for i in model["unstable"])
    for word in ("layers: 3", "SHA-256", "RDKit", "molecule stability", "farthest from the data"):
        assert word in text
    names = {p.name for p in page.parent.iterdir()}
    assert names == {
        "report.html", "report.json", "bond_lengths.png", "angles.png", "dihedrals.png",
        "composition.png",
    }  # fmt: skip
    for name in names:
        if name.endswith(".png"):
            assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((page.parent / "report.json").read_text())
    assert stored["files"][0]["provenance"]["seed"] == "7"
    assert stored["files"][0]["metrics"]["mmd_angle"]["interval"] is not None


def test_a_note_on_stable_samples_far_from_the_data(samples):
    results = run([samples])
    (found,) = results.samples
    found.rates["molecule_stability"] = results.reference.evaluation.rates["molecule_stability"]
    real = RealRange(0.05, (0.02, 0.08))
    for low, noted in ((0.2, False), (0.3, True)):
        estimate = Estimate(0.4, (low, 0.5), 59, real=real)
        found.comparison.estimates = {"mmd_bond_length": estimate}
        notes = report_of(results).files[0].notes
        assert any("far from them in bond lengths, MMD (×8)" in note for note in notes) == noted


def test_figures_as_text():
    assert metric_text(None) == "n/a"
    assert metric_text(Estimate(None, note="none to relax")) == "n/a (none to relax)"
    assert metric_text(Estimate(0.12345, (0.1, 0.2))) == "0.123 [0.1, 0.2]"
    assert metric_text(Estimate(17.874, (17.78, 17.98))) == "17.87 [17.8, 18]"
    assert metric_text(Estimate(0.0, (0.0, 0.0))) == "0 [0, 0]"
    assert metric_text(Estimate(2.0)) == "2"
    real = RealRange(0.4, (0.123, 0.789))
    assert real_text(Estimate(0.5, real=real)) == "like real [0.12, 0.79]"
    assert real_text(Estimate(0.9, real=real)) == "above real [0.12, 0.79]"
    assert real_text(Estimate(0.1, real=real)) == "below real [0.12, 0.79]"
    assert real_text(Estimate(None, real=real)) == real_text(Estimate(0.5)) == ""
    assert metric_text(Rate(1, 4)) == "25.0 [4.6, 69.9]"
    assert metric_text(Mean(1.23456, 0.0123, 9)) == "1.235 ± 0.012"
    assert metric_text(Mean(1.5, math.nan, 1)) == "1.5"
