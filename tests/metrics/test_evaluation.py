"""From files to a report: workers, references, slow metrics, the page."""

from __future__ import annotations

import html.parser
import io
import json
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
from rdkit.Chem import rdForceFieldHelpers, rdMolAlign
from rich.console import Console

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.geometry import KINDS, QM9_TYPES, code_of
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.errors import InputError, PeerLostError
from molgen_energy.metrics.comparison import Distributions, Measure, compare
from molgen_energy.metrics.distances import mmd
from molgen_energy.metrics.evaluation import Options, evaluate, settings_for
from molgen_energy.metrics.findings import MOST_VALUES, Draw, EvaluationAccumulator, Values, keys
from molgen_energy.metrics.html import write_report
from molgen_energy.metrics.judging import Settings, judge_piece
from molgen_energy.metrics.reference import (
    MoleculeSource,
    Reference,
    bundled_reference,
    reference_of,
)
from molgen_energy.metrics.relaxation import relax_mmff, rmsd
from molgen_energy.metrics.report import as_json, figure_text, tables
from molgen_energy.metrics.run import run
from molgen_energy.workers import WorkerError, WorkerPool

HERE = WorkerPool(0)
EVERYTHING_FAST = Options(drawn=40)
RATES = Options(frozenset({"rates"}))


def numbered(molecules: Molecules) -> MoleculeChunk:
    return MoleculeChunk(np.arange(1, len(molecules) + 1), molecules)


def noisy(molecules: Molecules, noise: float) -> Molecules:
    shift = noise * np.random.default_rng(1).standard_normal(molecules.positions.shape)
    return replace(molecules, positions=(molecules.positions + shift).astype("f4"))


@pytest.fixture(scope="module")
def samples(molecules, tmp_path_factory) -> Path:
    """Sixty molecules of QM9 with some noise, as `sample` writes them."""
    path = tmp_path_factory.mktemp("samples") / "a <b> $x$.sdf"
    with MoleculeTextWriter(path, {"seed": "7"}, {"config": "model:\n  layers: 3"}) as writer:
        writer.append(noisy(molecules.select(np.arange(0, 2000, 34)), 0.04))
    return path


def hanging(piece: MoleculeChunk) -> list[int]:
    if 7 in piece.records:
        time.sleep(600)
    return piece.records.tolist()


def dying(piece: MoleculeChunk) -> list[int]:
    if 7 in piece.records:
        os._exit(11)
    return piece.records.tolist()


def given_up(piece: MoleculeChunk, reason: str) -> tuple[int, str]:
    return int(piece.records[0]), reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "trouble"),
    [(hanging, "not finished within 0.7 s"), (dying, "the worker process died (exit code 11)")],
)
def test_a_molecule_that_hangs_or_kills_is_named_and_the_rest_goes_on(molecules, work, trouble):
    piece = numbered(molecules.select(np.arange(30)))
    with WorkerPool(2, 0.7) as workers:
        results = [result for _, result in workers.map(work, piece.parts(12), given_up)]
    assert (7, trouble) in results
    done = [record for result in results if isinstance(result, list) for record in result]
    assert done == [k for k in range(1, 31) if k != 7]


def test_processes_that_are_killed_are_replaced(molecules):
    """Killed from outside, at work or idle: the run ends, with every molecule once."""
    piece = numbered(molecules.select(np.arange(0, 2000, 4)))
    settings = Settings(codes={})
    with WorkerPool(2, 60) as workers:
        results = []
        for k, (part, found) in enumerate(
            workers.map(partial(judge_piece, settings=settings), piece.parts(20), given_up)
        ):
            results += found.valid.tolist() if not isinstance(found, tuple) else [None]
            assert len(part) <= 20
            if k in (2, 9):
                workers._workers[0].process.kill()
    whole = judge_piece(piece, settings).valid.tolist()
    assert len(results) == len(whole)
    assert sum(a != b for a, b in zip(results, whole, strict=True)) <= 2


def failing(piece: MoleculeChunk) -> None:
    raise KeyError("what happened")


def test_work_that_raises_ends_the_run(molecules):
    with (
        WorkerPool(1, 60) as workers,
        pytest.raises(WorkerError, match="KeyError: 'what happened'"),
    ):
        list(workers.map(failing, numbered(molecules).parts(1000), given_up))


def test_workers_change_nothing(molecules):
    """The same findings in this process and in two, and for other pieces."""
    some = numbered(molecules.select(np.arange(0, 2000, 8)))
    options = replace(EVERYTHING_FAST, settings=settings_for(QM9_TYPES, EVERYTHING_FAST))

    class Source:
        def __init__(self, size: int) -> None:
            self._size = size

        def pieces(self):
            return some.parts(self._size)

    here = evaluate("x", Source(100), options, None, HERE)
    with WorkerPool(2, 60) as workers:
        there = evaluate("x", Source(17), options, None, workers)
    assert here.rates == there.rates
    assert here.measures == there.measures
    assert here.worst == there.worst
    assert [s.record for s in here.findings.shown_good] == [
        s.record for s in there.findings.shown_good
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


def process_of(piece: MoleculeChunk) -> int:
    return os.getpid()


@pytest.mark.parametrize(("here", "there"), [(1, 1), (0, 0)])
def test_processes_of_a_job_share_the_work_in_order(molecules, here, there):
    piece = numbered(molecules.select(np.arange(120)))
    settings = Settings(codes={})
    with with_another(here, there, 60) as workers:
        for _ in range(2):
            results = []
            for part, found in workers.map(partial(judge_piece, settings=settings), piece.parts(7)):
                assert part.records[0] == len(results) + 1
                results += found.valid.tolist()
            did = {pid for _, pid in workers.map(process_of, piece.parts(1))}
            assert len(did) == max(1, here + there)
    assert results == judge_piece(piece, settings).valid.tolist()


def test_a_molecule_that_kills_a_process_of_another_member_is_found(molecules):
    piece = numbered(molecules.select(np.arange(6, 14)))
    piece = replace(piece, records=piece.records + 6)
    with with_another(1, 1, 60) as workers:  # the other is given the first piece
        results = [result for _, result in workers.map(dying, piece.parts(2), given_up)]
    assert results[0] == (7, "the worker process died (exit code 11)")
    assert [record for result in results[1:] for record in result] == list(range(8, 15))


def test_work_that_raises_in_another_member_ends_the_run(molecules):
    with (
        pytest.raises(WorkerError, match="KeyError: 'what happened'"),
        with_another(0, 1, 60) as workers,
    ):
        list(workers.map(failing, numbered(molecules).parts(1000), given_up))


def test_another_member_that_ends_is_noticed(molecules):
    ours, theirs = Pipe()
    theirs.send(1)
    with WorkerPool(0, 60, [ours]) as workers, pytest.raises(PeerLostError, match="has ended"):
        theirs.close()
        list(workers.map(process_of, numbered(molecules).parts(500), given_up))


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
    options = replace(EVERYTHING_FAST, drawn=25)
    report = run([tmp_path / "a.xyz"], None, None, None, options, HERE)
    done = torchrun_to_end(
        tmp_path, "evaluate", "a.xyz", "--json", "--subset", "25", "--workers", "1"
    )
    assert done.returncode == 0, done.stderr
    # Sums depend on the number of threads in their last digit.
    ours, theirs = flat(json.loads(done.stdout)), flat(json.loads(json.dumps(as_json(report))))
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
    values = rng.normal(size=5 * MOST_VALUES).astype("f4")
    key = keys(np.arange(len(values)), np.zeros(len(values), np.int64))
    sample = Values()
    for part in np.array_split(np.arange(len(values)), 37):
        sample.add(values[part], key[part], np.zeros(len(part), np.uint8))
    assert sample.count == len(values)
    assert len(sample.value) == MOST_VALUES
    assert set(sample.value.tolist()) == set(values[np.argsort(key)[:MOST_VALUES]].tolist())
    assert abs(sample.value.mean()) < 4 / np.sqrt(MOST_VALUES)
    assert len(np.unique(key)) == len(key)


def test_a_draw_takes_the_same_molecules_whatever_the_pieces(molecules):
    piece = numbered(molecules.select(np.arange(300)))
    drawn = []
    for size in (300, 7):
        draw = Draw(20)
        for part in piece.parts(size):
            draw.offer(part, part.records % 3 == 0, None)
        drawn.append([s.record for s in draw])
        assert all(s.molecule.positions.base is None for s in draw)  # no piece is kept in memory
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 20
    assert all(record % 3 == 0 for record in drawn[0])


def distributions(molecules: Molecules) -> Distributions:
    settings = settings_for(QM9_TYPES, EVERYTHING_FAST)
    findings = EvaluationAccumulator(0)
    findings.add(judge_piece(numbered(molecules), settings))
    return Distributions.of(findings, None)


def test_distances_are_means_over_types_with_those_missing_named(molecules):
    data = distributions(molecules.select(np.arange(1000, 2000)))
    ours = distributions(noisy(molecules.select(np.arange(400)), 0.02))
    found = compare(ours, data, QM9_TYPES)
    by_hand = {
        name: mmd(ours.values("angle", name).value, data.values("angle", name).value)
        for name in QM9_TYPES.types["angle"]
    }
    assert found.missing["angle"] == []
    assert found.measures["mmd_angle"].value == pytest.approx(np.mean(list(by_hand.values())))
    low, high = found.measures["mmd_angle"].interval
    assert 0 <= low < found.measures["mmd_angle"].value < high
    water = distributions(Molecules.from_list([of_smiles("O")] * 30))
    few = compare(water, data, QM9_TYPES)
    assert few.missing["bond length"] == [n for n in QM9_TYPES.types["bond length"] if n != "O1H"]
    assert len(few.missing["dihedral"]) == 8
    assert few.measures["mmd_dihedral"].value is None
    assert few.measures["elements"].value > 0.3


def test_intervals_of_distances_cover(molecules):
    """The distance of a third of the molecules lies in the interval from another third."""
    data = distributions(molecules.select(np.arange(0, 2000, 3)))
    found = compare(distributions(molecules.select(np.arange(1, 2000, 3))), data, QM9_TYPES)
    other = compare(distributions(molecules.select(np.arange(2, 2000, 3))), data, QM9_TYPES)
    inside = [
        measure.interval[0] <= other.measures[key].value <= measure.interval[1]
        for key, measure in found.measures.items()
    ]
    assert np.mean(inside) >= 0.75


def test_the_bundled_reference_is_the_test_split(sample_path):
    """800 of its 13,083 molecules are at hand: what they give must fit."""
    data = bundled_reference()
    assert data.row.molecules == 13_083
    assert data.distributions.sizes.sum() == 13_083
    assert data.row.rates["molecule_stability"].value == pytest.approx(0.952, abs=0.002)
    options = replace(EVERYTHING_FAST, settings=settings_for(QM9_TYPES, EVERYTHING_FAST))
    found = evaluate("x", MoleculeSource(sample_path, "test"), options, None, HERE)
    near = compare(found.distributions, data.distributions, QM9_TYPES)
    assert near.measures["mmd_bond_length"].value < 0.01
    assert near.measures["sizes"].value < 0.3
    for key in ("molecule_stability", "validity", "connected", "hydrogens_assumed"):
        low, high = found.rates[key].interval
        assert low - 0.01 <= data.row.rates[key].value <= high + 0.01
    for key in ("strain_energy", "strain_rmsd", "xtb_energy"):
        assert data.row.measures[key].value > 0
    assert data.distances.measures["fcd"].value < 0.1
    assert data.row.rates["posebusters"].value > 0.9


def test_a_reference_is_read_back_as_it_was_saved(sample_path, tmp_path):
    options = EVERYTHING_FAST
    data = reference_of(sample_path, "sample", options, QM9_TYPES, None, HERE)
    data.save(tmp_path / "a.h5", "a test")
    back = Reference.load(tmp_path / "a.h5")
    assert back.row.rates == data.row.rates
    assert back.row.measures == data.row.measures
    assert back.distances.measures == data.distances.measures
    assert back.types == data.types
    ours = distributions(noisy(back_molecules(sample_path), 0.03))
    first = compare(ours, data.distributions, QM9_TYPES).measures
    second = compare(ours, back.distributions, QM9_TYPES).measures
    for key, measure in first.items():
        assert second[key].value == pytest.approx(measure.value, abs=1e-12)


def back_molecules(path: Path) -> Molecules:
    with MoleculeFile(path) as file:
        return file.load("train").select(np.arange(200))


def test_a_reference_without_splits_is_halved(samples, molecules, tmp_path):
    path = tmp_path / "mine.sdf"
    with MoleculeTextWriter(path, {}) as writer:
        writer.append(molecules.select(np.arange(400)))
    found = run([samples], path, None, None, EVERYTHING_FAST, HERE)
    assert any("one half of it from the other" in note for note in found.reference.row.notes)
    assert found.reference.row.molecules == 400
    assert 0 < found.reference.distances.measures["sizes"].value < 2
    assert found.reference.types.name == "the 8 most frequent of each kind"
    code = code_of("bond length", "C1H")
    assert code in {code_of("bond length", t) for t in found.reference.types.types["bond length"]}


def test_options_that_the_bundled_statistics_cannot_serve(samples, sample_path):
    jodo = replace(EVERYTHING_FAST, settings=Settings(counting="jodo"))
    with pytest.raises(InputError, match="count every angle once; name real molecules"):
        run([samples], None, None, None, jodo, HERE)
    with pytest.raises(InputError, match="hold the types of QM9 only"):
        run([samples], None, None, "geom", EVERYTHING_FAST, HERE)
    with pytest.raises(InputError, match="unknown list of types 'qm8'"):
        run([samples], None, None, "qm8", EVERYTHING_FAST, HERE)
    assert run([samples], sample_path, None, "qm9", jodo, HERE).samples[0].molecules == 59
    with pytest.raises(InputError, match="carries no bonds of its own"):
        given = replace(EVERYTHING_FAST, settings=Settings(bonds="given"))
        run([samples], None, None, None, given, HERE)


def test_bonds_that_a_file_carries_are_judged_beside(tmp_path, molecules):
    """The same molecules with and without the word that their bonds were perceived."""
    some = molecules.select(np.arange(40))
    with MoleculeTextWriter(tmp_path / "own.sdf", {}) as writer:
        writer.append(some)
    text = (tmp_path / "own.sdf").read_text()
    assert ">  <bonds>\nperceived\n" in text
    (tmp_path / "other.sdf").write_text(text.replace(">  <bonds>\nperceived\n\n", ""))
    report = run(
        [tmp_path / "own.sdf", tmp_path / "other.sdf"], None, None, None, EVERYTHING_FAST, HERE
    )
    own, other = report.samples
    assert own.rates["carried_validity"] is None
    # All are neutral, so by their bonds they are as stable as by distances.
    assert other.rates["carried_molecule_stability"] == other.rates["molecule_stability"]
    assert other.rates["carried_validity"] == other.rates["validity"]
    labels = [section.title for section in report.sections()]
    assert "rates by the bonds in the file, %" in labels
    with MoleculeWriter(tmp_path / "a.h5", source="bonds") as writer:
        writer.append(perceive(some))
    given = replace(EVERYTHING_FAST, settings=Settings(bonds="given"))
    found = run([tmp_path / "a.h5"], None, tmp_path / "a.h5", None, given, HERE)
    assert found.samples[0].rates["novelty"].count == 0
    assert any("those of the files are given in the file" in note for note in found.notes)


def test_each_record_says_whose_bonds_it_carries(tmp_path, molecules):
    """Records of both kinds in one file: those with bonds of their own are judged by them."""
    with MoleculeTextWriter(tmp_path / "a.sdf", {}) as writer:
        writer.append(molecules.select(np.arange(40)))
    records = (tmp_path / "a.sdf").read_text().split("$$$$\n")[:-1]
    own = [record.replace(">  <bonds>\nperceived\n\n", "") for record in records]
    mixed = [own[k] if k % 4 == 1 else record for k, record in enumerate(records)]
    (tmp_path / "mixed.sdf").write_text("".join(f"{record}$$$$\n" for record in mixed))
    (tmp_path / "own.sdf").write_text("".join(f"{record}$$$$\n" for record in own[1::4]))
    report = run(
        [tmp_path / "mixed.sdf", tmp_path / "own.sdf"], None, None, None, EVERYTHING_FAST, HERE
    )
    found, alone = report.samples
    assert found.molecules == 40
    for key in ("molecule_stability", "atom_stability", "validity", "complete"):
        assert found.rates[f"carried_{key}"] == alone.rates[f"carried_{key}"]
    assert found.rates["carried_validity"].total == 10
    assert any("10 of 40 molecules carry bonds of their own" in note for note in found.notes)
    assert not any("of their own" in note for note in alone.notes)
    with pytest.raises(InputError, match=r"mixed.sdf: record 1 carries no bonds of its own"):
        given = replace(EVERYTHING_FAST, settings=Settings(bonds="given"))
        run([tmp_path / "mixed.sdf"], None, None, None, given, HERE)


def test_names_of_files_that_are_no_utf8(molecules, tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"caf\xe9.xyz")
    with MoleculeTextWriter(tmp_path / "a.xyz", {}) as writer:
        writer.append(molecules.select(np.arange(30)))
    try:
        (tmp_path / "a.xyz").rename(path)
    except OSError:
        pytest.skip("the file system takes no such name")
    report = run([path], path, path, None, RATES, HERE)
    write_report(report, tmp_path / "out", [path], HERE)
    assert "caf\ufffd.xyz" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    json.dumps(as_json(report), ensure_ascii=False).encode()
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
    given = replace(EVERYTHING_FAST, settings=Settings(bonds="given"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        paths = [tmp_path / "far.xyz"]
        write_report(run(paths, None, None, None, RATES, HERE), tmp_path / "a", paths, HERE)
        paths = [tmp_path / "far.h5"]
        report = run(paths, paths[0], paths[0], "qm9", given, HERE)
        write_report(report, tmp_path / "b", paths, HERE)
        with pytest.raises(InputError, match="atom 3 are not finite"):
            run([tmp_path / "beyond.xyz"], None, None, None, EVERYTHING_FAST, HERE)


def test_files_that_hold_nothing_are_told_from_those_that_are_none(tmp_path):
    with MoleculeWriter(tmp_path / "none.h5", source="nothing"):
        pass
    for arguments in ([tmp_path / "none.h5"], None), ([], tmp_path / "none.h5"):
        with pytest.raises(InputError, match=r"none.h5 holds no molecule$"):
            run(*arguments, None, None, EVERYTHING_FAST, HERE)
    with pytest.raises(InputError, match="null is a device or a pipe; name a file"):
        MoleculeSource(Path("/dev/null"))
    with pytest.raises(InputError, match="is a folder"):
        MoleculeSource(tmp_path)


def test_a_table_of_many_files_keeps_its_words(samples, sample_path):
    report = run([samples], None, None, None, EVERYTHING_FAST, HERE)
    report.samples = [replace(report.samples[0], name=f"{k}.sdf") for k in range(6)]
    labels = [row.label for section in report.sections() for row in section.rows]
    for width, count in ((400, 1), (140, 2), (80, 6)):
        console = Console(width=width, file=io.StringIO(), legacy_windows=False)
        shown = tables(report, console)
        assert len(shown) == count
        for table in shown:
            console.print(table)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for name in (
            *(f"{k}.sdf" for k in range(6)),
            *(w for label in labels for w in label.split()),
        ):
            assert name in text


def test_mmff_strain_against_rdkit(molecules):
    some = perceive(molecules.select(np.arange(0, 200, 10)))
    for molecule, relaxed in zip(some, relax_mmff(numbered(some)), strict=True):
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
    from molgen_energy.metrics.plausibility import bust

    ethane, pair = of_smiles("CC"), of_smiles("C", "C", shift=20)
    squeezed = replace(of_smiles("CCCCC"), positions=of_smiles("CCCCC").positions * 0.7)
    crowd = Molecule(np.zeros((20, 3), "f4"), np.full(20, 6, "u1"))
    made = perceive(Molecules.from_list([ethane, pair, squeezed, crowd]))
    good, two, small, many = bust(numbered(made))
    assert good == []
    assert "all_atoms_connected" in two
    assert small
    assert many == ["sanitization"]


def test_xtb():
    pytest.importorskip("tblite")
    pytest.importorskip("ase")
    from molgen_energy.metrics.relaxation import relax_xtb

    water = of_smiles("O")
    stretched = replace(water, positions=water.positions * 1.1)
    near, far = relax_xtb(numbered(Molecules.from_list([water, stretched])))
    assert 0 <= near.strain < 2
    assert far.strain > near.strain + 3
    assert far.rmsd > near.rmsd


def test_fcd_against_the_package(molecules):
    fcd = pytest.importorskip("fcd")
    from molgen_energy.metrics.fcd import ChemNet

    names = [
        Chem.MolToSmiles(Chem.MolFromSmiles(name))
        for name in judge_piece(numbered(molecules.select(np.arange(50))), Settings()).names
        if name
    ]
    first, second = names[:24], names[24:]
    gaussians = []
    for part in (first, second):
        net = ChemNet()
        net.add([*part, None, part[0]])  # each counts once
        moments = net.finish()
        assert moments.count.sum() == len(set(part))
        gaussians.append(moments.gaussian(np.ones(10, bool)))
    expected = fcd.get_fcd(sorted(set(first)), sorted(set(second)), device="cpu")
    assert gaussians[0].distance(gaussians[1]) == pytest.approx(expected, rel=1e-3)
    assert gaussians[0].distance(gaussians[0]) == pytest.approx(0, abs=1e-5)


def test_metrics_that_are_not_installed_say_how_to_get_them(samples, monkeypatch):
    monkeypatch.setattr("molgen_energy.metrics.evaluation.lacking", lambda m: m in EXTRA)
    monkeypatch.setattr("molgen_energy.metrics.report.lacking", lambda m: m in EXTRA)
    options = replace(EVERYTHING_FAST, metrics=frozenset({"rates", *EXTRA}))
    report = run([samples], None, None, None, options, HERE)
    hints = {row.key: report.hint(row) for section in report.sections() for row in section.rows}
    for metric, key in (("fcd", "fcd"), ("posebusters", "posebusters"), ("xtb", "xtb_energy")):
        assert hints[key] == f"pip install 'molgen-energy[{metric}]'"
    assert as_json(report)["files"][0]["metrics"]["fcd"] is None


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
    report = run([samples], None, None, None, EVERYTHING_FAST, HERE)
    report.samples[0].provenance["note"] = "<script>alert(1)</script>"
    page = write_report(report, tmp_path / "out", [samples], HERE)
    text = page.read_text(encoding="utf-8")
    outside = Outside()
    outside.feed(text)
    assert outside.loads == []
    assert outside.open == []
    assert not re.search(r"@import|url\((?!['\"]?#)|https?://(?!www\.w3\.org)", text)
    assert "<script>alert" not in text
    assert "a <b> $x$.sdf" not in text  # names are escaped
    assert "a &lt;b&gt; $x$.sdf" in text
    found = report.samples[0].findings
    shown = len(list(found.shown_good)) + len(found.bad_specimens())
    assert outside.count["canvas"] == shown == 24
    assert outside.count["svg"] >= 24 + shown - 2  # panels and drawings
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert referred <= set(ids)
    models = json.loads(re.search(r'id="models">(.*?)</script>', text, re.DOTALL)[1])
    assert len(models) == shown
    for model in models:
        assert len(model["p"]) == len(model["e"])
        assert all(0 <= i < len(model["e"]) for i in model["w"])
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


def test_stability_that_hides_something_is_told(samples, molecules):
    report = run([samples], None, None, None, EVERYTHING_FAST, HERE)
    (found,) = report.samples
    found.notes.clear()
    report.judge()
    assert not any("far from them" in note for note in found.notes)  # 59 molecules prove nothing
    found.molecules = 3000
    found.rates["molecule_stability"] = report.reference.row.rates["molecule_stability"]
    report.judge()
    assert any("far from them in bond lengths, MMD" in note for note in found.notes)


def test_figures_as_text():
    assert figure_text(None) == "n/a"
    assert figure_text(Measure(None, note="none to relax")) == "n/a (none to relax)"
    assert figure_text(Measure(0.12345, (0.1, 0.2)), "Å") == "0.123 [0.1, 0.2]"
    assert figure_text(Measure(2.0)) == "2"
