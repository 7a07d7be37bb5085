"""Fine-tuning: `train --from` alone, its plan, validation of few molecules, the best weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_of
from runs import CPU, Watcher, assert_same_run, tiny, weights

import molgen_energy as mg
from molgen_energy.api import train as api
from molgen_energy.config import TrainingConfig
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.task import MoleculeTask, _prepared
from molgen_energy.systems.registry import SYSTEMS, load_config
from molgen_energy.training import loop
from molgen_energy.training.checkpoint import load_checkpoint, store_in_state
from molgen_energy.training.initial import initialise
from molgen_energy.training.loop import TrainingInterrupted, train
from molgen_energy.training.metrics import read_metrics
from molgen_energy.training.plan import planned_values, validation_draws
from molgen_energy.training.pretrained import pretrained_weights

FEW = {"training.steps": 9, "training.validate_every": 2, "training.low_precision": False}
LEVELS = [500, 300, 100]


@pytest.fixture(scope="module")
def source(sample_path, tmp_path_factory) -> Path:
    """A run of two steps that was tuned."""
    run = tmp_path_factory.mktemp("sources") / "source"
    config = tiny(
        data__path=str(written(sample_path, run.parent / "d.h5", 50, 10)), training__steps=2,
        data__elements=[*"HCNOF"], training__augment_rotations=True, training__optimizer="muon",
    )  # fmt: skip
    train(MoleculeTask(config, CPU), run, Watcher())
    store_in_state(load_checkpoint(run), {"sampling": {"sampler": "ddim", "levels": LEVELS}})
    return run


@pytest.fixture(scope="module")
def few(sample_path, tmp_path_factory) -> Path:
    """Twenty molecules, three of them for validation."""
    return written(sample_path, tmp_path_factory.mktemp("data") / "few.h5", 17, 3)


def written(source: Path, path: Path, train: int, valid: int) -> Path:
    with MoleculeFile(source) as file, MoleculeWriter(path, source="few") as writer:
        writer.append(file.slice(100, 100 + train + valid))
        writer.set_split(np.repeat([0, 1], [train, valid]).astype(np.uint8))
    return path


def tuned(source: Path, data: Path, run: Path, callback=None, **changes) -> Path:
    given = FEW | {key.replace("__", "."): value for key, value in changes.items()}
    options = {} if callback is None else {"callback": callback}
    mg.train(initial_weights=source, data=data, changes=given, device="cpu", output=run, **options)
    return run


@pytest.fixture(scope="module")
def unbroken(source, few, tmp_path_factory) -> Path:
    return tuned(source, few, tmp_path_factory.mktemp("tuned") / "unbroken")


def test_it_continues_the_run_of_its_weights(source, unbroken):
    config, theirs = config_of(unbroken), config_of(source)
    for section in ("model", "process", "scales", "loss", "objective", "condition"):
        assert getattr(config, section) == getattr(theirs, section)
    own = config.training
    assert (config.name, own.optimizer, own.augment_rotations) == ("fine_tune", "muon", True)
    factor = load_config("fine_tune").fine_tuning.relative_lr
    assert own.lr == pytest.approx(factor * theirs.training.lr)
    assert own.muon_lr == pytest.approx(factor * theirs.training.muon_lr)
    assert (own.batch_size, own.validation_draws) == (17, 86)  # 86 draws of three molecules
    assert load_checkpoint(unbroken).state["sampling"]["levels"] == LEVELS


def test_the_initial_weights_are_validated_too(source, unbroken):
    rows = list(read_metrics(unbroken / "metrics.csv"))
    assert rows[0]["step"] == "0" and rows[0]["valid_loss"] and not rows[0]["loss"]
    losses = {int(row["step"]): float(row["valid_loss"]) for row in rows if row["valid_loss"]}
    assert [*losses] == [0, 2, 4, 6, 8, 9]
    run = mg.load_run(unbroken)
    within = [k for k in losses if losses[k] < 1.02 * min(v for j, v in losses.items() if j <= k)]
    assert run.best_step == within[-1]
    assert run.best_valid == pytest.approx(losses[run.best_step], rel=1e-5)
    assert f"best {run.best_valid:.4g} at step {run.best_step}" in str(run)


def test_a_fine_tuned_run_goes_on_from_its_own_rates(unbroken, few, tmp_path):
    again = tuned(unbroken, few, tmp_path / "run", training__steps=1)
    assert config_of(again).training.lr == config_of(unbroken).training.lr


def test_samples_are_of_the_best_weights(source, few, tmp_path):
    """Learning rates that spoil the network leave the weights it came with, and end it."""
    run = tuned(
        source, few, tmp_path / "run", fine_tuning__relative_lr=300.0, training__patience=2,
        training__steps=40, training__warmup_steps=0, data__elements=[*"HCNOF"],
    )  # fmt: skip
    found = mg.load_run(run)
    assert (found.steps, found.best_step) == (4, 0)
    assert "no better validation loss since step 0" in (run / "log.txt").read_text()
    best, last = (load_checkpoint(run, which).read_tensors("ema") for which in (None, "last"))
    theirs = weights(source, "ema")
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in best.items())
    assert any(not torch.equal(tensor, theirs[key]) for key, tensor in last.items())
    mg.sample(2, tmp_path / "s.h5", checkpoint=run, device="cpu")
    with MoleculeFile(tmp_path / "s.h5") as file:
        assert file.provenance["checkpoint"].endswith("run, step 0")
        assert file.provenance["sampler"] == "ddim" and file.provenance["steps"] == "3"
    again = mg.train(resume=run, device="cpu")
    assert again.already_complete and again.steps == 4


def test_an_interrupted_run_resumes_to_the_same_numbers(source, few, unbroken, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        tuned(source, few, run, Watcher({5: lambda: os.kill(os.getpid(), signal.SIGINT)}))
    mg.train(resume=run, device="cpu")
    assert_same_run(unbroken, run)
    assert mg.load_run(run).best_step == mg.load_run(unbroken).best_step
    assert load_checkpoint(run).state["sampling"] == load_checkpoint(unbroken).state["sampling"]


def test_every_process_knows_the_loss_of_the_initial_weights(source, few, tmp_path, monkeypatch):
    """One that did not would not end with the others."""
    changes = {"training.initial_weights": str(source), "data.path": str(few)}
    task = MoleculeTask(api._configuration("fine_tune", FEW | changes, {}), CPU)
    initialise(task)
    monkeypatch.setattr(loop, "is_main", lambda: False)
    trainer = loop._Trainer(task, tmp_path / "run", loop.no_callback)
    trainer.start(resume=False)
    assert trainer.at.best_step == 0
    assert trainer.at.best_valid == task.validation_loss(task.model.eval())
    assert not (tmp_path / "run").exists()


def test_without_validation_the_last_weights_stand_for_the_run(source, sample_path, tmp_path):
    data = written(sample_path, tmp_path / "d.h5", 5, 0)
    run = tuned(source, data, tmp_path / "run", training__steps=2)
    assert load_checkpoint(run).path.name == "last" and config_of(run).training.batch_size == 5
    assert "no validation data" in (run / "log.txt").read_text()


def test_the_command_says_what_it_chose(source, sample_path, few, tmp_path, cli_here):
    settings = [f"--set={key}={value}" for key, value in FEW.items()]
    said = cli_here("train", "--from", source, "--data", few, *settings, "--dry-run").stderr
    assert "from    source, step 2: " in said and "length  9 steps of 17 molecules" in said
    rates = "learning rate 0.00015 (matrices 0.0005), 10 steps of warm-up, EMA decay 0.9"
    assert f"plan    muon, {rates}\n" in said
    assert "checks  258 evaluations every 2 steps; ends after 8 without better weights\n" in said
    data = written(sample_path, tmp_path / "d.h5", 5, 0)
    said = cli_here("train", "--from", source, "--data", data, *settings, "-o", "run").stderr
    assert "has no validation molecules, so nothing tells which weights are the best" in said
    assert "preprocess --split 0.9,0.1,0" in said


def test_draws_of_few_validation_molecules(few):
    """The mean over all pairs of molecule and draw, each computed alone."""
    config = tiny(
        data__path=str(few), training__validation_draws=4, objective__stratified_timesteps=True
    )
    task = MoleculeTask(config, CPU)
    model = task.model.eval()
    losses = []
    for number in range(3 * 4):
        which, sample = np.array([number % 3]), torch.tensor([number])
        assert task._valid is not None
        batch = _prepared(task._valid, which, config.training.seed, sample, 12)
        with torch.no_grad():
            terms = task._objective(model, *task._inputs(model, batch, False))
        losses.append(float(terms.total))
    assert task.validation_samples == 12
    assert task.validation_loss(model) == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(set(losses)) == 12


def test_draws_make_few_molecules_precise(few):
    """The spread over seeds of the noise falls about as the root of the number of draws."""

    def spread(draws: int) -> float:
        task = MoleculeTask(tiny(data__path=str(few), training__validation_draws=draws), CPU)
        model = task.model.eval()
        found = []
        for seed in range(8):
            training = task.config.training.model_copy(update={"seed": seed})
            task.config = task.config.model_copy(update={"training": training})
            found.append(task.validation_loss(model))
        return float(np.std(found))

    assert spread(64) < 0.4 * spread(1)


@pytest.mark.parametrize("samples", [1, 20, 45, 450, 5_000, 100_000])
def test_the_plan_suits_the_number_of_samples(samples):
    auto = TrainingConfig(steps="auto", batch_size="auto", ema_decay="auto", validate_every="auto")
    plan = planned_values(auto, samples)
    steps, batch = plan["training.steps"], plan["training.batch_size"]
    assert batch <= samples and steps == round(90 * np.cbrt(samples))
    assert 0.9 <= plan["training.ema_decay"] < 1
    every = plan["training.validate_every"]
    assert every == 20 if steps < 400 else 20 <= steps / every < 22
    fewer = planned_values(auto, max(1, samples // 10))
    assert fewer["training.steps"] <= steps
    # Of fewer samples each is seen more often.
    assert samples < 100 or steps / samples < fewer["training.steps"] / (samples // 10)


def test_a_given_value_stays():
    training = TrainingConfig(steps=400, batch_size=8, ema_decay="auto", validate_every="auto")
    assert planned_values(training, 50) == {
        "training.ema_decay": 0.975, "training.validate_every": 20,
    }  # fmt: skip
    epochs = TrainingConfig(epochs=40, batch_size="auto", validate_every="auto")
    assert planned_values(epochs, 320) == {
        "training.batch_size": 32, "training.validate_every": 20,
    }  # fmt: skip
    assert [validation_draws(n) for n in (0, 1, 5, 255, 256, 999)] == [1, 256, 52, 2, 1, 1]


def test_another_loss_finds_its_own_weight_and_scale(source, few, tmp_path):
    run = tuned(source, few, tmp_path / "run", training__steps=1, loss__name="mse")
    plain = MoleculeTask(tiny(data__path=str(few), loss__name="mse"), CPU).config
    assert config_of(run).loss.name == "mse"
    assert config_of(run).objective.position_weight == plain.objective.position_weight
    springs = MoleculeTask(tiny(data__path=str(few), loss__springs__family="inverse"), CPU).config
    run = tuned(source, few, tmp_path / "b", training__steps=1, loss__springs__family="inverse")
    assert config_of(run).loss == springs.loss


@pytest.mark.parametrize(
    "loss",
    [
        {"loss.name": "score_energy"},
        {"loss.springs.family": "auto"},
        {"loss.name": "score_energy", "loss.springs.family": "constant"},
    ],
)
def test_losses_that_need_not_fall_keep_the_last_weights(source, few, loss):
    given = api._given(initial_weights=source, data=few) | {"loss.edges.kind": "sparse"}
    config = api._configuration(None, FEW, given | loss)
    assert (config.training.sample_from, config.training.patience) == ("last", None)
    assert config.loss.edges.kind == "sparse"
    assert config.loss.springs.scale == "auto"
    kept = api._configuration(None, FEW | {"training.sample_from": "best"}, given | loss)
    assert kept.training.sample_from == "best"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "fine_tune"}, r"^config fine_tune goes on from trained weights; name a run or"),
        ({"initial_weights": "qm9_energi"}, r"^--from qm9_energi does not exist \(did you mean"),
        (
            {"initial_weights": "qm9_energy", "changes": {"model.width": 128}},
            r"^--from qm9_energy was trained with model\.width=256 \(here 128\); set the same",
        ),
        (
            {"initial_weights": "qm9_energy", "changes": {"fine_tuning.relative_lr": -1.0}},
            r"fine_tuning\.relative_lr: .* greater than 0",
        ),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(few, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as refused:
        mg.train(data=few, device="cpu", output=tmp_path / "run", **options)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("state", "system", "message"),
    [
        ({"teacher": {"origin": "t, step 2", "sha256": "0" * 64}}, None, r"its teacher, t, step 2"),
        ({}, "spins", r"^--from .*source is a network of lattices; name its configuration with"),
    ],
)
def test_students_and_other_systems_are_refused(
    source, few, tmp_path, monkeypatch, state, system, message
):
    found = load_checkpoint(source)
    found.state.update(state)
    monkeypatch.setattr(api, "load_checkpoint", lambda *_: found)
    if system is not None:
        monkeypatch.setattr(api, "system_of_checkpoint", lambda _: SYSTEMS[system])
    with pytest.raises(InputError, match=message):
        tuned(source, few, tmp_path / "run")


def test_every_molecule_checkpoint_that_ships_can_be_fine_tuned():
    base = load_config("fine_tune")
    for name, shipped in pretrained_weights().items():
        theirs = load_checkpoint(shipped.path).config_as(type(base))
        config = base.continuing(theirs)
        assert config.model == theirs.model and config.data.elements == "auto", name
        assert config.training.steps == "auto"
