"""Students: a run that learns from a teacher, resumes, and samples in a few evaluations."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import config_of, imported_script, torchrun_to_end
from graph_recorder import ListRecorder
from runs import CPU, TINY, Watcher, assert_same_run, rewrite_weights, tiny, weights

import molgen_energy as mg
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training import loop, pretrained
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import TrainingInterrupted, train
from molgen_energy.training.metrics import read_metrics
from molgen_energy.training.pretrained import pretrained_weights

CHANGES = {name: value for name, value in TINY.items() if name.startswith("training.")} | {
    "distillation.evaluations": 4,
    "distillation.auxiliary_lr": 2.0,
    "distillation.student_share": 0.75,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("teachers") / "teacher"
    config = tiny(training__steps=2, training__augment_rotations=True, data__elements=list("HCNOF"))
    train(MoleculeTask(config, CPU), run, Watcher())
    return run


def student(teacher: Path, run: Path, data: Path, **changes) -> Path:
    given = CHANGES | {key.replace("__", "."): value for key, value in changes.items()}
    mg.train("distil", teacher=teacher, data=data, changes=given, device="cpu", output=run)
    return run


@pytest.fixture(scope="module")
def unbroken(teacher, sample_path, tmp_path_factory) -> Path:
    return student(teacher, tmp_path_factory.mktemp("students") / "unbroken", sample_path)


def test_a_student_samples_in_its_evaluations(unbroken, teacher, tmp_path):
    config, theirs = config_of(unbroken), config_of(teacher)
    for section in ("model", "process", "scales", "loss", "objective", "condition"):
        assert getattr(config, section) == getattr(theirs, section)
    assert config.training.augment_rotations and config.training.adam_betas == (0.5, 0.99)
    state = load_checkpoint(unbroken).state
    assert state["teacher"]["origin"] == "teacher, step 2"
    assert state["teacher"]["sha256"] == load_checkpoint(teacher).state["sha256"]["ema"]
    assert (unbroken / "log.txt").read_text().count("student of teacher, step 2") == 1
    levels = state["sampling"]["levels"]
    assert len(levels) == 4 and levels[0] == 500
    last = unbroken / "checkpoints" / "last"
    assert (last / "auxiliary.safetensors").is_file() and not last.with_name("best").exists()
    rows = list(read_metrics(unbroken / "metrics.csv"))
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]
    for row in rows:
        parts = float(row["student_loss"]) + float(row["auxiliary_loss"])
        assert parts == pytest.approx(float(row["loss"]), rel=1e-4)
        assert float(row["teacher_distance"]) > float(row["moment_distance"]) > 0
        assert not row["valid_loss"]
    for other in (last, shutil.copytree(last, tmp_path / "released")):
        (tmp_path / "released" / "auxiliary.safetensors").unlink(missing_ok=True)
        mg.sample(3, tmp_path / "s.h5", checkpoint=other, device="cpu")
        with MoleculeFile(tmp_path / "s.h5") as file:
            assert file.provenance["levels"] == ",".join(f"{level:.0f}" for level in levels)
            assert (file.provenance["sampler"], file.provenance["steps"]) == ("ancestral", "4")


def test_in_the_first_step_only_the_auxiliary_network_learns(teacher, sample_path, tmp_path):
    """By its own rate, which is the length of AdamW's first step; both begin as the teacher."""
    run = student(teacher, tmp_path / "run", sample_path, training__steps=1)
    theirs = weights(teacher, "ema")
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in weights(run, "model").items())
    moved = [(t - theirs[key]).abs().max() for key, t in weights(run, "auxiliary").items()]
    assert float(max(moved)) == pytest.approx(2.0 * 1e-4 / 30, rel=2e-2)  # warm-up of 30 steps


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_student_resumes_to_the_same_numbers(
    teacher, sample_path, unbroken, tmp_path, optimizer
):
    changes = {"training.optimizer": optimizer}
    if optimizer == "muon":
        unbroken = student(teacher, tmp_path / "unbroken", sample_path, **changes)
    run = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        mg.train(
            "distil", teacher=teacher, data=sample_path, changes=CHANGES | changes, device="cpu",
            output=run, callback=Watcher({5: lambda: os.kill(os.getpid(), signal.SIGINT)}),
        )  # fmt: skip
    mg.train(resume=run, device="cpu")
    assert_same_run(unbroken, run)
    for key, tensor in weights(unbroken, "auxiliary").items():
        assert torch.equal(tensor, weights(run, "auxiliary")[key])


def test_a_student_resumes_with_its_teacher_alone(teacher, sample_path, tmp_path, monkeypatch):
    """It is found again in a moved project, or named, and must have the same weights."""
    project = tmp_path / "project"
    shutil.copytree(teacher, project / "runs" / "teacher")
    monkeypatch.chdir(project)
    student(Path("runs/teacher"), Path("runs/s"), sample_path)
    assert config_of(Path("runs/s")).distillation.teacher == "runs/teacher"
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert mg.train(resume=moved / "runs" / "s", steps=13).steps == 13
    (moved / "runs" / "teacher").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"--teacher .*teacher does not exist"):
        mg.train(resume=moved / "runs" / "s", steps=14)
    assert mg.train(resume=moved / "runs" / "s", steps=14, teacher="away").steps == 14
    rewrite_weights(
        tmp_path / "away" / "checkpoints" / "last", "ema", lambda t: t["embed.weight"].mul_(2)
    )
    with pytest.raises(InputError, match=r"is a student of .*, step 2, whose weights have changed"):
        mg.train(resume=moved / "runs" / "s", steps=15, teacher="away")


@pytest.mark.parametrize(
    ("config", "taught", "changes", "message"),
    [
        ("distil", False, {}, r"^config distil trains a student: name a run or pretrained weights"),
        ("quick", True, {}, r"^--teacher goes with a configuration that trains a student, such as"),
        ("spins_margin", True, {}, r"^--teacher is for networks of molecules, not of spins$"),
        ("distil", "nothing", {}, r"^--teacher nothing does not exist; name a run's folder"),
        ("distil", True, {"model.width": 8}, r"was trained with model\.width=16 \(here 8\)"),
        ("distil", True, {"process.name": "flow_matching"}, r"process\.name=diffusion \(here flow"),
        ("distil", True, {"distillation.lowest": 9.0}, r"lowest 9 is not below highest 2\.5"),
        ("distil", True, {"distillation.evaluations": 2}, r"evaluations: .* 3 \(it is 2\)"),
        (
            "distil",
            True,
            {"training.cuda_graphs": True},
            r"be recorded; leave it out, or set",
        ),
        ("distil", True, {"loss.edges.kind": "bonds"}, r"needs bonds of the data, and a student"),
        ("distil", True, {"data.elements": [*"HCNO"]}, r"holds F, .*; name data without it, or an"),
        (
            "distil",
            True,
            {"data.elements": [*"HCNOFS"]},
            r"does not know elements S; nam",
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    teacher, sample_path, tmp_path, config, taught, changes, message
):
    chosen = {True: teacher, False: None}.get(taught, taught)
    with pytest.raises(InputError, match=message) as refused:
        mg.train(
            config, teacher=chosen, data=sample_path, changes=CHANGES | changes
            if config == "distil" else changes, output=tmp_path / "run", device="cpu",
        )  # fmt: skip
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_students_and_self_conditioned_networks_teach_nothing(unbroken, sample_path, tmp_path):
    with pytest.raises(
        InputError, match=r"is itself a student, of teacher, step 2; name another one"
    ):
        student(unbroken, tmp_path / "s", sample_path)
    taught = load_config("distil").replaced(CHANGES | {"distillation.teacher": str(unbroken)})
    assert taught.without_paths().distillation.teacher == "unbroken"


def test_the_command_says_who_teaches(teacher, cli_here, sample_path):
    steps = [f"--set={name}={value}" for name, value in CHANGES.items()]
    done = cli_here(
        "train", "--config", "distil", "--teacher", teacher, "--data", sample_path, *steps,
        "--steps", 2, "--dry-run",
    )  # fmt: skip
    assert "teacher teacher, step 2" in done.stderr + done.stdout
    assert "a student of 4 evaluations" in done.stderr + done.stdout


@pytest.mark.slow
def test_two_processes_distil_as_one(teacher, unbroken, sample_path, tmp_path):
    steps = [f"--set={name}={value}" for name, value in CHANGES.items()]
    done = torchrun_to_end(
        tmp_path, "train", "--config", "distil", "--teacher", teacher, "--data", sample_path,
        *steps, "-o", "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [list(read_metrics(run / "metrics.csv")) for run in (unbroken, tmp_path / "run")]
    for name in ("student_loss", "auxiliary_loss", "moment_distance", "gradient_norm"):
        ours, theirs = ([float(row[name]) for row in part] for part in rows)
        assert ours == pytest.approx(theirs, rel=1e-3)
    for name in ("ema", "auxiliary"):
        one, two = weights(unbroken, name), weights(tmp_path / "run", name)
        # A coordinate whose mean is taken away has no gradient but rounding.
        for key in one.keys() - {"readout.bias"}:
            assert float((one[key] - two[key]).norm() / one[key].norm()) < 1e-3, key


def test_recorded_steps_of_a_student_equal_steps(teacher, sample_path, tmp_path, monkeypatch):
    """In all bits, for learning rates that float32 holds; none of them waits for the device."""
    exact = {
        "training__lr": 2**-10, "training__warmup_steps": 0, "training__decay": "none",
        "distillation__student_share": 1.0,
    }  # fmt: skip
    recorder = ListRecorder()
    monkeypatch.setattr(loop, "_recorder", lambda task, dropout: recorder)
    # It runs what it records, of samples that are not set yet and have no place in an order.
    monkeypatch.setattr(RandomNumbers, "stratified", RandomNumbers.uniform)
    runs = [
        student(teacher, tmp_path / f"{graphs}", sample_path, training__cuda_graphs=graphs, **exact)
        for graphs in (False, True)
    ]
    assert recorder.recorded > 1
    for name in ("model", "ema", "auxiliary"):
        plain, recorded = (weights(run, name) for run in runs)
        assert all(torch.equal(values, recorded[key]) for key, values in plain.items())


def test_a_released_student_has_a_card_beside_its_teacher(unbroken, tmp_path, monkeypatch):
    folder, shipped = tmp_path / "weights", pretrained_weights()["qm9_energy"]
    monkeypatch.setattr(pretrained, "weights_directory", lambda: folder)
    with imported_script("release_weights") as releasing:
        monkeypatch.setattr(releasing, "weights_directory", lambda: folder)
        monkeypatch.setattr(sys, "argv", [
            "release", str(unbroken), "qm9_student", "--hardware", "a core", "--command", "train",
        ])  # fmt: skip
        releasing.main()
    released, rows = folder / "qm9_student", ["3", "6", "9", "12"]
    with (released / "training.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == rows
    with imported_script("measure_weights") as measuring:
        report = measuring.report(shipped)
        (released / "report.json").write_text(json.dumps(report))
        student = pretrained.PretrainedWeights("qm9_student", released)
        alone = measuring.card(student)
        assert 'summary: "student of teacher, 4 evaluations; gdm 2×16 with the energy' in alone
        assert "| | samples | data |" in alone and "| teacher | teacher, step 2; SHA" in alone
        assert "| optimiser | AdamW (0.0001), 30 steps" in alone
        monkeypatch.setattr(measuring, "teacher_of", lambda weights: shipped)
        assert "| | samples | teacher, 101 | data |" in measuring.card(student)
    mg.sample(2, tmp_path / "s.h5", checkpoint=released, device="cpu")
    with MoleculeFile(tmp_path / "s.h5") as file:
        assert file.provenance["steps"] == "4"
