"""The commands as a user runs them: the main job, and every kind of bad input."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from runs import rewrite_weights, run_command

from molgen_energy.cli import app
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.systems.molecules import sampling

TINY = (
    "--set", "model.layers=2", "--set", "model.width=16", "--set", "process.steps=10",
    "--batch-size", "32", "--set", "training.checkpoint_every=10",
)  # fmt: skip
WATER = "3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"


@pytest.mark.slow
def test_the_main_job(cli, cli_here, tmp_path):
    """Train on the bundled sample, sample from the newest run, evaluate."""
    trained = cli_here("train", "--loss", "energy", "--steps", "20", *TINY)
    assert "1,000 training molecules" in trained.stderr
    assert "qm9_gdm_aug" in trained.stderr  # how to train in full
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("quick-energy-exponential-")
    sampled = cli_here("sample", "-n", "12")
    assert "12 molecules written to samples.sdf" in sampled.stderr
    assert "molecules/s" in sampled.stderr
    assert (tmp_path / "samples.sdf").read_text().count("$$$$") == 12
    shown = cli("evaluate", "samples.sdf").stdout
    for words in (
        "molecule stability",
        "novelty",
        "data: QM9 test",
        "samples.sdf",
        "95.2 [94.8, 95.6]",
    ):
        assert words in shown
    found = json.loads(cli_here("evaluate", "samples.sdf", "--json", "-", "--workers", "0").stdout)
    assert found["files"][0]["molecules"] == 12
    assert found["reference"]["metrics"]["molecule_stability"]["value"] > 0.9


@pytest.mark.slow
def test_options_of_train(cli_here, tmp_path, sample_path):
    cli_here("train", "--loss", "mse", "--epochs", "1", "--data", sample_path, "--lr", "1e-3",
        "--seed", "5", "--device", "cpu", "-o", "mine", *TINY)  # fmt: skip
    with (tmp_path / "mine" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == 32  # 1,000 molecules in batches of 32
    text = (tmp_path / "mine" / "config.yaml").read_text()
    assert "seed: 5" in text
    assert "lr: 0.001" in text
    assert "name: mse" in text
    assert "is complete" in cli_here("train", "--resume", "mine").stderr
    cli_here("train", "--resume", "mine", "--steps", "34")
    cli_here("train", "--springs", "inverse", "--steps", "1", "-o", "inverse", *TINY)
    assert "family: inverse" in (tmp_path / "inverse" / "config.yaml").read_text()
    cli_here("train", "--springs", "lennard_jones", "--edges", "sparse", "--steps", "1", "-o", "lj",
        "--set", "process.name=flow_matching", *TINY)  # fmt: skip
    text = (tmp_path / "lj" / "config.yaml").read_text()
    assert "kind: sparse" in text
    cli_here("sample", "-n", "2", "--checkpoint", "lj")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_from_the_shell(cli_here, tmp_path, number):
    command = ["train", "--steps", "100000", "-o", "run", *TINY, "--set", "training.log_every=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "molgen_energy", *command],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert "Traceback" not in stderr
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "continue with: molgen-energy train --resume run" in stderr
    step = int(metrics.read_text().splitlines()[-1].split(",")[0])
    cli_here("train", "--resume", "run", "--steps", str(step + 20))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_sampling_that_is_stopped_at_once_leaves_nothing(cli_here, tmp_path, number):
    cli_here("train", "--steps", "1", *TINY, "--set", "process.steps=500")
    process = subprocess.Popen(
        [sys.executable, "-m", "molgen_energy", "sample", "-n", "500", "--batch-size", "500"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "samples.sdf.shards").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The folder that a run of ten steps, nearly untrained, lies in."""
    folder = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_command(["train", "--steps", "1", "-o", "runs/run", *TINY], patch) == 0
    return folder


@pytest.fixture
def here(tiny_run, tmp_path, monkeypatch, capfd):
    """Run a command in this process, beside the run: exit code and standard error."""
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    terminate = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        capfd.readouterr()
        try:
            app([*map(str, arguments)])
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, terminate)
        return code, capfd.readouterr().err

    return run


@pytest.mark.slow
def test_samplers_of_sample(here, tmp_path):
    code, stderr = here("sample", "-n", 3, "--sampler", "dpm++", "--steps", 4)
    assert code == 0
    assert "step 1: dpm++, 4 steps of log spacing, 5 network evaluations each" in stderr
    text = (tmp_path / "samples.sdf").read_text()
    assert text.count(">  <sampler>\ndpm++\n\n>  <steps>\n4\n\n>  <spacing>\nlog\n") == 3
    assert "<eta>" not in text
    spaced = ("--spacing", "quadratic", "--steps", 3, "-o", "spaced.sdf")
    code, stderr = here("sample", "-n", 1, *spaced)
    assert "ancestral, 3 steps of quadratic spacing, 4 network evaluations each" in stderr
    assert ">  <spacing>\nquadratic\n" in (tmp_path / "spaced.sdf").read_text()
    for name, more in (("heun", ()), ("ddim", ("--eta", 0.5)), ("ancestral", ("--steps", 3))):
        path = tmp_path / f"{name}.h5"
        assert here("sample", "-n", 2, "--sampler", name, *more, "-o", path)[0] == 0
        with h5py.File(path) as file:
            origin = json.loads(file.attrs["provenance"])
        assert origin["sampler"] == name
        assert origin["steps"] == ("3" if more[:1] == ("--steps",) else "10")
        assert origin.get("spacing") == ("log" if more[:1] == ("--steps",) else None)
        assert origin.get("eta") == ("0.5" if name == "ddim" else None)
    code, stderr = here("sample", "-n", 1, "--levels", "10,4,1", "-o", "levels.sdf")
    assert "ancestral, 3 noise levels, 3 network evaluations each" in stderr
    assert ">  <levels>\n10,4,1\n" in (tmp_path / "levels.sdf").read_text()
    cold = ("--temperature", "0.8", "--temperature-range", ":5", "--final-noise", 0, "-o", "c.sdf")
    code, stderr = here("sample", "-n", 1, *cold)
    assert (
        "10 steps, 11 network evaluations each, temperature 0.8 of the noise to 5 Å, final noise 0"
        in stderr
    )
    text = (tmp_path / "c.sdf").read_text()
    assert ">  <sampling_temperature_range>\n:5\n" in text
    assert ">  <sampling_final_noise>\n0\n" in text
    mixed = ("--sampler", "dpm++", "--ancestral-positions", "--temperature", 0.9, "-o", "mixed.sdf")
    code, stderr = here("sample", "-n", 1, *mixed)
    assert "dpm++ with ancestral positions, 10 steps, 11 network evaluations each, temp" in stderr
    assert ">  <ancestral_positions>\nyes\n" in (tmp_path / "mixed.sdf").read_text()
    (tmp_path / "a.xyz").symlink_to("target.xyz")
    stderr = here("sample", "-n", 1, "-o", "a.xyz")[1]
    assert (tmp_path / "a.xyz").is_symlink()
    assert (tmp_path / "target.xyz").is_file()
    assert "step 1: ancestral, 10 steps, 11 network evaluations each" in stderr
    assert "sampler='ancestral' steps='10'" in (tmp_path / "a.xyz").read_text()


BAD_SAMPLE = {
    "unknown sampler": (("--sampler", "ancestor"), "unknown sampler 'ancestor'; did you mean"),
    "of another process": (("--sampler", "euler"), "euler is for networks trained with flow"),
    "too many steps": (("--steps", "11"), "--steps 11: the network was trained with 10 steps"),
    "no steps": (("--steps", "0"), "--steps 0: the network was trained with 10 steps"),
    "eta of another": (("--eta", "1"), "--eta goes with --sampler ddim, not ancestral"),
    "eta too large": (("--sampler", "ddim", "--eta", "2"), "--eta 2: expected a number from 0"),
    "no mixed steps": (("--ancestral-positions",), "goes with --sampler dpm++, not ancestral"),
    "no passes": (("--self-condition-passes", "0"), "passes 0: expected a number from 1"),
    "passes of another": (("--self-condition-passes", "2"), "2 is for self-conditioned networks"),
    "no temperature": (("--temperature", "-1"), "--temperature -1: expected a number from 0 (no"),
    "no noise": (("--sampler", "heun", "--temperature", "0.9"), "use --temperature-of score with"),
    "no such temperature": (
        ("--temperature", "2", "--temperature-of", "scor"), "of 'scor'; did you mean 'score'?",
    ),
    "no range": (("--temperature-range", "0.3"), "range 0.3: expected LOW:HIGH in Å, such as 0"),
    "range alone": (("--temperature-range", "1:2"), "-range has no effect without --temperature"),
    "kind alone": (("--temperature-of", "score"), "-of has no effect without --temperature"),
    "range of words": (("--temperature-range", "a:b"), "range a:b: expected LOW:HIGH in Å, such"),
    "range reversed": (
        ("--temperature", "2", "--temperature-range", "2:1"),
        "range 2:1: expected two ascending noise",
    ),
    "no final noise": (("--sampler", "dpm++", "--final-noise", "0"), "dpm++ adds none; leave it"),
    "no name": (("-o", ".sdf"), ".sdf: the name must end in .sdf, .xyz, .h5"),
    "no device": (("--device", "meta"), "--device meta is not available here"),
    "none": (("-n", "0"), "-n 0: ask for at least one molecule"),
    "begun before": ((), "or remove that folder"),
    "another seed": (("--resume", "samples.sdf", "--seed", "1"), "--seed cannot change: samples."),
    "another count": (("--resume", "samples.sdf", "-n", "9"), "-n cannot change: samples.sdf.sha"),
    "other steps": (("--resume", "samples.sdf", "--steps", "9"), "was begun with 10; --resume"),
    "other spacing": (("--resume", "samples.sdf", "--spacing", "even"), "--spacing cannot change"),
    "warmer": (("--resume", "samples.sdf", "--temperature", "2"), "was begun with 1.0; --resume"),
    "positions": (("--resume", "samples.sdf", "--ancestral-positions"), "-positions cannot change"),
    "more passes": (
        ("--resume", "samples.sdf", "--self-condition-passes", "2"), "was begun with 1; --resume",
    ),
    "other range": (("--resume", "samples.sdf", "--temperature-range", ":"), "was begun with 0.3:"),
    "levels of words": (("--levels", "ten,1"), "--levels ten,1: expected numbers with commas"),
    "levels and steps": (("--levels", "10,1", "--steps", "2"), "every noise level; leave out --s"),
    "other levels": (("--resume", "samples.sdf", "--levels", "10,1"), "begun with the default; -"),
    "no such spacing": (("--spacing", "evn"), "unknown spacing 'evn'; did you mean 'even'?"),
    "other sizes": (("--resume", "samples.sdf", "--n-atoms", "9"), "with the default; --resume"),
    "rougher": (("--resume", "samples.sdf", "--low-precision"), "was begun without it; --resume"),
    "another output": (("--resume", "samples.sdf", "-o", "b.sdf"), "leave out -o b.sdf"),
    "nothing begun": (("--resume", "b.sdf"), "b.sdf.shards does not exist; there is nothing to re"),
    "weights changed": (("--resume", "samples.sdf"), "holds other weights (run, step 1)"),
    "weights damaged": (("--resume", "samples.sdf"), "is damaged: its SHA-256 is not the one that"),
    "checkpoint gone": (("--resume", "samples.sdf"), "does not exist; name its new place with --"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD_SAMPLE)
def test_bad_requests_of_sample_are_one_line_and_exit_code_2(here, tmp_path, monkeypatch, what):
    arguments, message = BAD_SAMPLE[what]
    if what == "begun before" or "--resume" in arguments:
        shards = tmp_path / "samples.sdf.shards"
        with monkeypatch.context() as broken:
            broken.setattr(sampling._SamplingRun, "_write", failing)
            code, stderr = here("sample", "-n", 2)
        assert code == 2
        assert f"finished samples stay in {shards.name}; continue with: molgen" in stderr
        assert len(list(shards.glob("*.shard"))) == 1
    last = tmp_path / "runs" / "run" / "checkpoints" / "last"
    if what == "weights changed":
        rewrite_weights(last, "ema", lambda tensors: next(iter(tensors.values())).add_(1))
    if what == "weights damaged":
        spoiled = bytearray((last / "ema.safetensors").read_bytes())
        spoiled[-1] ^= 1
        (last / "ema.safetensors").write_bytes(spoiled)
    if what == "checkpoint gone":
        last.rename(tmp_path / "moved")
    before = sorted(tmp_path.rglob("*"))
    code, stderr = here("sample", *arguments)
    stderr = "".join(line for line in stderr.splitlines(True) if not line.startswith("sampling"))
    assert code == 2
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    if what == "checkpoint gone":
        assert here("sample", "--resume", "samples.sdf", "--checkpoint", "moved")[0] == 0
        assert (tmp_path / "samples.sdf").read_text().count("$$$$") == 2


def failing(*_, **__):
    raise OSError(28, "No space left on device", "samples.sdf")


@pytest.mark.slow
def test_preprocess_own_molecules(cli_here, tmp_path, molecules):
    frames = []
    for molecule in molecules.select(np.arange(50)):
        atoms = [f"{z} {x} {y} {w}" for z, (x, y, w) in
                 zip(molecule.atomic_numbers, molecule.positions, strict=True)]  # fmt: skip
        frames.append("\n".join([str(len(molecule)), "", *atoms]) + "\n")
    (tmp_path / "mols.xyz").write_text("".join(frames))
    done = cli_here(
        "preprocess", "mols.xyz", "-o", "mine.h5", "--split", "0.6,0.2,0.2", "--seed", "1"
    )
    assert "50 molecules written to mine.h5" in done.stderr
    assert "train 30, valid 10, test 10" in done.stderr
    with h5py.File(tmp_path / "mine.h5") as file:
        assert file.attrs["schema"] == 1
        assert np.bincount(file["split"][:]).tolist() == [30, 10, 10]
    cli_here("train", "--data", "mine.h5", "--steps", "3", "-o", "run", *TINY)
    cli_here("sample", "-n", "2", "--n-atoms", "5-6", "--checkpoint", "run", "-o", "s.xyz")
    cli_here("evaluate", "s.xyz", "--train", "mine.h5", "--reference", "mine.h5")
    cli_here("preprocess", "mols.xyz")
    assert (tmp_path / "mols.h5").exists()


def test_skip_bad(cli_here, tmp_path):
    (tmp_path / "a.xyz").write_text(WATER + "1\n\nQq 0 0 0\n" + WATER)
    done = cli_here("preprocess", "a.xyz", "-o", "a.h5", "--skip-bad")
    assert "left out record 2 (line 6): atom 1 of 1: 'Qq' is no chemical element" in done.stderr
    found = json.loads(cli_here("evaluate", "a.xyz", "--skip-bad", "--json", "-").stdout)
    assert found["files"][0]["molecules"] == 2
    assert found["files"][0]["skipped"] == 1


BAD = {
    "molecules for training": (("train", "--data", "good.xyz"), "energy preprocess good.xyz`"),
    "unknown loss": (("train", "--loss", "enrgy"), "did you mean 'energy'"),
    "unknown springs": (("train", "--springs", "soft"), "unknown spring family 'soft'"),
    "springs without energy": (("train", "--loss", "mse", "--springs", "inverse"), "goes with"),
    "unknown key": (("train", "--set", "model.depth=3"), "unknown config key 'model.depth'"),
    "unknown config": (("train", "--config", "qm8"), "unknown config 'qm8'"),
    "no data": (("train", "--config", "qm9_gdm"), "make it with `molgen-energy preprocess qm9 -o"),
    "no bonds": (("train", "--config", "qm9_jodo"), "`molgen-energy preprocess qm9 --bonds -o qm"),
    "no ligands": (("train", "--config", "ccd_jodo"), "`molgen-energy preprocess ccd -o ccd.h5`"),
    "no such device": (("train", "--device", "abacus"), "--device abacus is not available"),
    "no steps": (("train", "--steps", "0"), "training.steps"),
    "no run to resume": (("train", "--resume", "nothing"), "does not exist"),
    "change on resume": (("train", "--resume", "nothing", "--lr", "1"), "cannot change"),
    "no such checkpoint": (("sample", "--checkpoint", "nothing"), "nothing does not exist; name a"),
    "almost a name": (("sample", "--checkpoint", "qm9_enrgy"), "did you mean 'qm9_energy'?"),
    "no atoms": (("sample", "--n-atoms", "0"), "--n-atoms 0: expected"),
    "descending": (("sample", "--n-atoms", "9-3"), "--n-atoms 9-3: expected"),
    "words for atoms": (("sample", "--n-atoms", "few"), "--n-atoms few: expected"),
    "missing file": (("evaluate", "nothing.sdf"), "nothing.sdf does not exist"),
    "empty file": (("evaluate", "empty.sdf"), "empty.sdf holds no molecule"),
    "another format": (("evaluate", "a.pdb"), "no SDF or XYZ file"),
    "broken record": (("evaluate", "bad.xyz"), "bad.xyz: record 2 (line 6): "),
    "truncated": (("evaluate", "cut.h5"), "cut.h5 is cut off"),
    "no table": (("evaluate", "salt.xyz"), "record 1 holds Na"),
    "part of a dataset's name": (("preprocess", "geom"), "did you mean `preprocess geom-drugs`?"),
    "bad split": (("preprocess", "good.xyz", "--split", "0.5,0.1"), "expected three shares"),
    "bad shares": (("preprocess", "good.xyz", "--split", "0.5,0.1,0.1"), "add up to 1"),
    "foreign element": (("preprocess", "good.xyz", "--elements", "H,C"), "record 1: it holds O"),
    "no such element": (("preprocess", "good.xyz", "--elements", "H,Xx"), "no chemical element"),
    "nan": (("preprocess", "nan.xyz"), "record 1 (line 1): the coordinates of atom 2"),
    "no source": (("preprocess", "qm9", "--source", "nothing"), "nothing does not exist"),
    "no hdf5 name": (("preprocess", "good.xyz", "-o", "good.xyz"), "must end in .h5"),
    "nan share": (("preprocess", "good.xyz", "--split", "nan,0,1"), "add up to 1"),
    "spin loss": (("train", "--loss", "margin"), "'margin' is a loss on spins"),
    "edges of mse": (("train", "--loss", "mse", "--edges", "sparse"), "--edges goes with"),
    "no published scale": (
        ("train", "--springs", "lennard_jones", "--set", "loss.springs.scale=jodo"),
        "no published scale for 'jodo'",
    ),
    "coincident atoms": (
        ("train", "--data", "twins.h5", "--edges", "symmetrized"),
        "twins.h5: molecule 1: two atoms are closer than",
    ),
    "huge seed": (("train", "--seed", "99999999999999999999"), "training.seed"),
    "missing second file": (("evaluate", "good.xyz", "nothing.sdf"), "nothing.sdf does not exist"),
    "missing reference": (("evaluate", "good.xyz", "--reference", "no.h5"), "no.h5 does not exist"),
    "unknown metric": (("evaluate", "good.xyz", "--metrics", "fdc"), "did you mean 'fcd'"),
    "unknown valence": (("evaluate", "good.xyz", "--valence", "lax"), "(valid: strict, geom,"),
    "no bonds given": (("evaluate", "good.xyz", "--bonds", "given"), "has no bonds; leave out"),
    "report is a file": (("evaluate", "good.xyz", "--report", "a.pdb"), "a.pdb is a file"),
    "report nowhere": (("evaluate", "good.xyz", "--report", "no/out"), "no does not exist"),
    "cut gzip": (("evaluate", "cut.xyz.gz"), "the file is cut off (Compressed file ended"),
    "wrong counts": (("evaluate", "count.xyz"), "count.xyz: record 2 (line 6): the file ends"),
    "nan in hdf5": (("evaluate", "nan.h5"), "nan.h5: record 2: data set 'positions': expected"),
    "checkpoint for a run": (("train", "--resume", "checkpoint"), "is a checkpoint; name its run"),
    "no folder": (("preprocess", "good.xyz", "-o", "no/a.h5"), "no does not exist; make it first"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_exit_code_2(cli_here, tmp_path, what, sample_path):
    (tmp_path / "empty.sdf").touch()
    (tmp_path / "a.pdb").touch()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.yaml").touch()
    (tmp_path / "good.xyz").write_text(WATER * 5)
    (tmp_path / "bad.xyz").write_text(WATER + "4\n" + WATER)
    (tmp_path / "nan.xyz").write_text("2\n\nH 0 0 0\nH nan 0 0\n")
    (tmp_path / "salt.xyz").write_text("2\n\nNa 0 0 0\nCl 0 0 2.4\n")
    (tmp_path / "cut.h5").write_bytes(sample_path.read_bytes()[:100_000])
    (tmp_path / "count.xyz").write_text(WATER + "4\nwater\nO 0 0 0\nH 0.96 0 0\n")
    (tmp_path / "cut.xyz.gz").write_bytes(gzip.compress(WATER.encode() * 500, mtime=0)[:-20])
    if "nan.h5" in BAD[what][0]:
        (tmp_path / "nan.h5").write_bytes(sample_path.read_bytes())
        with h5py.File(tmp_path / "nan.h5", "r+") as file:
            file["positions"][int(file["offsets"][1]), 2] = np.nan
    if "twins.h5" in BAD[what][0]:
        positions = np.array([[0, 0, 0], [0, 0, 0.001], [1, 0, 0]], np.float32)
        twins = [Molecule(positions, np.array([1, 1, 8], np.uint8))] * 9
        with MoleculeWriter(tmp_path / "twins.h5", source="test") as writer:
            writer.append(Molecules.from_list(twins))
            writer.set_split(np.repeat(np.array([0, 1, 2], np.uint8), [7, 1, 1]))
    before = sorted(tmp_path.rglob("*"))
    arguments, message = BAD[what]
    stderr = cli_here(*arguments, code=2).stderr
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluation_goes_on_behind_bad_records(cli_here, tmp_path, sample_path):
    """With --skip-bad: a cut gzip file, NaN in HDF5, foreign elements; numbers stay those of
    the file."""
    (tmp_path / "cut.xyz.gz").write_bytes(gzip.compress(WATER.encode() * 500, mtime=0)[:-20])
    done = cli_here("evaluate", "cut.xyz.gz", "--skip-bad", "--json", "-", "--metrics", "rates")
    (found,) = json.loads(done.stdout)["files"]
    assert 0 < found["molecules"] <= 500
    assert found["skipped"] == 1
    assert "the file is cut off" in done.stderr
    (tmp_path / "nan.h5").write_bytes(sample_path.read_bytes())
    with h5py.File(tmp_path / "nan.h5", "r+") as file:
        file["positions"][int(file["offsets"][1]), 2] = np.nan
    lines = "1\n\nNa 0 0 0\n" + "2\n\nH 0 0 0\nH 0 0 9\n" + WATER
    (tmp_path / "salt.xyz").write_text(lines)
    done = cli_here(
        "evaluate", "nan.h5", "salt.xyz", "--skip-bad", "--json", "-", "--metrics", "rates",
        "--workers", "1",
    )  # fmt: skip
    nan, salt = json.loads(done.stdout)["files"]
    assert (nan["molecules"], nan["skipped"]) == (1999, 1)
    assert (salt["molecules"], salt["skipped"]) == (2, 1)
    assert salt["worst"][0]["record"] == 2


@pytest.mark.slow
def test_odd_files_are_evaluated(cli_here, tmp_path):
    """One molecule; nothing valid; three hundred atoms in one place and on a line."""
    (tmp_path / "one.xyz").write_text(WATER)
    (tmp_path / "crowd.xyz").write_text(
        "300\n\n" + "".join(f"C {0.1 * k} 0 0\n" for k in range(300))
    )
    line = "".join(f"C {1.5 * k} 0 0\n" for k in range(300))
    (tmp_path / "line.xyz").write_text("300\n\n" + line)
    files = ("one.xyz", "crowd.xyz", "line.xyz")
    done = cli_here("evaluate", *files, "--json", "-", "--workers", "0")
    one, crowd, chain = json.loads(done.stdout)["files"]
    assert one["metrics"]["molecule_stability"]["value"] == 1
    assert one["metrics"]["mmd_bond_length"]["interval"] is None
    assert crowd["metrics"]["validity"]["value"] == 0
    assert crowd["metrics"]["uniqueness"]["value"] is None
    assert crowd["invalid"][0]["reason"] == "an atom has more than 12 bonds"
    assert chain["metrics"]["complete"]["value"] == 1
    cli_here("evaluate", *files, "--report", "out", "--metrics", "rates", "--workers", "0")
    assert "RDKit cannot draw it" in (tmp_path / "out" / "report.html").read_text()
    table = cli_here("evaluate", "crowd.xyz", "--metrics", "rates", "--workers", "0").stdout
    assert "n/a" in table


def test_a_run_is_never_overwritten(cli_here, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    assert "is not empty" in cli_here("train", "-o", "run", *TINY, code=2).stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written(cli_here, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in cli_here("train", "-o", "file/run", *TINY, code=2).stderr
    (tmp_path / "good.xyz").write_text(WATER)
    assert "folder" in cli_here("preprocess", "good.xyz", "-o", tmp_path, code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["preprocess", "sample.sdf", "sample.h5", "train"])
def test_a_disk_that_takes_no_more(cli_here, tiny_run, tmp_path, command):
    """Files beyond 60 kB fail as on a full disk: one line, exit code 2, nothing half-written."""
    resource = pytest.importorskip("resource")
    (tmp_path / "good.xyz").write_text(WATER * 2000)
    if command.startswith("sample"):
        shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    before = sorted(tmp_path.rglob("*"))
    arguments = {
        "preprocess": ("preprocess", "good.xyz"),
        "sample.sdf": ("sample", "-n", "40", "-o", "a.sdf"),
        "sample.h5": ("sample", "-n", "40", "-o", "a.h5"),
        "train": ("train", "--steps", "5", *TINY, "--set", "model.width=64", "-o", "run"),
    }[command]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        stderr = cli_here(*arguments, code=2).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    name = {"preprocess": "good.h5", "train": "last"}.get(command, command.replace("sample", "a"))
    assert re.search(rf"^error: File too large: .*{name}$", stderr.splitlines()[-1])
    if command.startswith("sample"):  # finished samples stay, and are enough
        assert f"continue with: molgen-energy sample --resume {name}" in stderr
        cli_here("sample", "--resume", name)
        (tmp_path / name).unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_help_is_quick_and_names_the_commands(cli, cli_here):
    began = time.monotonic()
    shown = cli("--help").stdout
    assert time.monotonic() - began < 20
    for command in ("preprocess", "train", "sample", "evaluate"):
        assert command in shown
        assert "--help" in cli_here(command, "--help").stdout
    assert cli_here("--version").stdout.startswith("molgen-energy ")


NEVER_IMPORTED = {
    "molgen_energy.cli": ["torch", "rdkit", "h5py"],
    "molgen_energy.api.evaluate": ["torch", "rdkit", "h5py"],
    "molgen_energy.systems.shapes.metrics": ["torch", "rdkit"],
    "molgen_energy.systems.spins.metrics": ["torch", "rdkit"],
    "molgen_energy.metrics.evaluation": ["torch"],
    "molgen_energy.systems.molecules.sampling": ["molgen_energy.training.loop"],
}
"""Modules in the order of their import by one process; what one must not import, those before it
must not either."""


def test_what_commands_do_not_import():
    code = f"""
import importlib, sys
for module, never in {NEVER_IMPORTED}.items():
    importlib.import_module(module)
    print(module, [name for name in never if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in NEVER_IMPORTED]
