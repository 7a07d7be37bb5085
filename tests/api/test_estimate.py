"""`train --dry-run`: the configuration and the cost of a run, without the run."""

from __future__ import annotations

import time

import pytest
import yaml

from molgen_energy.api.train import estimate_training, train
from molgen_energy.cli import app
from molgen_energy.errors import InputError
from molgen_energy.training import loop

TINY = {"model.layers": 1, "model.width": 8, "process.steps": 10, "training.validate_every": 4}


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_cost_is_that_of_the_steps(monkeypatch, tmp_path):
    """Of a clock that only steps and evaluations without gradients move."""
    now = [0.0]

    def slow(task, *arguments, **options):
        loss = task_loss(task, *arguments, **options)
        now[0] += 2.0 if loss["loss"].requires_grad else 0.5
        return loss

    from molgen_energy.systems.molecules.task import MoleculeTask

    task_loss = MoleculeTask.loss
    monkeypatch.setattr(MoleculeTask, "loss", slow)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    cost = estimate_training(changes=TINY, steps=10, batch_size=50)
    assert cost.step == 2.0
    assert cost.measured == 3  # three steps at least, then it is over the five seconds
    assert cost.validation == pytest.approx(0.5 * 200 / 50)  # 200 validation molecules
    assert cost.seconds == pytest.approx(10 * 2.0 + 3 * cost.validation)  # steps 4, 8 and 10
    assert cost.memory is None or cost.memory > 10**7
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_that_of_the_run(tmp_path, capsys):
    settings = [f"{key}={value}" for key, value in TINY.items()]
    words = [part for value in settings for part in ("--set", value)]
    words = ["train", "--steps", "2", "--loss", "mse", "-o", "run", *words]
    with pytest.raises(SystemExit) as ended:
        app([*words, "--dry-run"])
    assert not ended.value.code
    assert list(tmp_path.iterdir()) == []
    stdout, stderr = capsys.readouterr()
    for line in ("length  2 steps of 64 molecules", "time    about ", "memory  about ", "dry run"):
        assert line in stderr
    with pytest.raises(SystemExit) as ended:
        app(words)
    assert not ended.value.code
    assert yaml.safe_load(stdout) == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    with pytest.raises(InputError, match="is not empty; name another --output"):
        estimate_training(output="run")


def test_a_dry_run_says_which_weights_it_takes(capsys):
    train(changes=TINY, steps=1, output="run")
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    elements = ["--set", "data.elements=[H,C,N,O,F,S,Cl]"]
    with pytest.raises(SystemExit) as ended:
        app(["train", "--steps", "1", "--from", "run", *settings, *elements, "--dry-run"])
    assert not ended.value.code
    said = capsys.readouterr().err
    assert "from    run, step 1: " in said
    assert "random ones for elements S, Cl\n" in said


def test_what_is_left_of_a_run(tmp_path):
    """Of a run that is resumed, only the steps that are left; the run stays as it is."""
    train(changes=TINY, steps=2, output="run")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    time.sleep(0.01)
    cost = estimate_training(resume="run", steps=3)
    assert cost.measured == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
