"""Batches of a number of pairs of atoms: resident, streamed, and in training."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_of
from runs import CPU, TINY, Watcher, assert_same_run, tiny, weights

from molgen_energy.api.preprocess import preprocess
from molgen_energy.api.train import estimate_training
from molgen_energy.data.batches import (
    EpochStarts,
    PairBudget,
    ResidentData,
    StreamedData,
    TrainingData,
    padding,
)
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError, TrainingFailedError
from molgen_energy.progress import no_progress
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import SYSTEMS, load_config
from molgen_energy.training import loop
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import TrainingInterrupted, train
from molgen_energy.training.metrics import read_metrics

BUDGET = 5000
BY_PAIRS = {"training__batch_size": None, "training__pairs_per_batch": BUDGET}


@pytest.fixture(scope="module")
def drugs(tmp_path_factory) -> Path:
    """800 molecules of 2 to 100 atoms, the larger ones with more pairs than the budget."""
    sizes = np.random.default_rng(3).integers(2, 101, 800)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    path = tmp_path_factory.mktemp("data") / "drugs.h5"
    with MoleculeWriter(path, source="test") as writer:
        atoms = int(offsets[-1])
        writer.append(Molecules(np.zeros((atoms, 3), "f4"), np.ones(atoms, "u1"), offsets))
        writer.set_split((np.arange(800) % 8 > 6).astype(np.uint8))
    return path


@pytest.fixture(params=["resident", "streamed"])
def data(request, drugs):
    file = MoleculeFile(drugs)
    if request.param == "resident":
        made = ResidentData(None, file.sizes(file.split_indices("train")), PairBudget(BUDGET), 5)
        file.close()
    else:
        made = StreamedData(
            file, lambda molecules, numbers, ranks, check_cancelled: ranks,
            molecules=100, batch_size=PairBudget(BUDGET), seed=5,
        )  # fmt: skip
    yield made
    made.close()


def numbers_of(data: TrainingData, batch) -> np.ndarray:
    ranks = data.window(batch.window)
    return batch.which if ranks is None else ranks[batch.which]


def test_an_epoch_shows_every_molecule_once_within_the_budget(drugs, data):
    with MoleculeFile(drugs) as file:
        sizes = file.sizes(file.split_indices("train"))
    for epoch in (0, 4):
        batches = data.epoch(epoch)
        seen = [numbers_of(data, batch) for batch in batches]
        assert sorted(np.concatenate(seen).tolist()) == list(range(700))
        for which, batch in zip(seen, batches, strict=True):
            assert (sizes[which] == batch.sizes).all()
            assert len(batch) == 1 or len(batch) * batch.sizes.max() ** 2 <= BUDGET
        assert sum(batch.sizes.max() > 70 for batch in batches) == (sizes > 70).sum()
        full = sum((batch.sizes**2).sum() for batch in batches if len(batch) > 1)
        most = sum(len(batch) > 1 for batch in batches) * BUDGET
        assert full > 0.6 * most  # padding, and what a last molecule would not fit in
    assert padding(data.epoch(0)).pairs < 0.3


def test_batches_follow_from_seed_and_epoch(data):
    first, again, other = (
        [(batch.window, batch.which.tolist()) for batch in data.epoch(epoch)] for epoch in (2, 2, 3)
    )
    assert first == again != other


def test_steps_of_epochs_of_different_lengths(data):
    """Asked in any order, the place of a step is that in a plain list of all batches."""
    places = [(epoch, k) for epoch in range(6) for k in range(len(data.epoch(epoch)))]
    lengths = {b - a for a, b in pairwise(data.starts[epoch] for epoch in range(7))}
    assert len(lengths) > 1
    assert data.starts[6] == len(places)
    fresh = EpochStarts(lambda epoch: len(data.epoch(epoch)))
    for step in np.random.default_rng(0).permutation(len(places)).tolist()[:50]:
        epoch = fresh.epoch_of(step)
        assert (epoch, step - fresh[epoch]) == places[step]


def test_weighted_means_of_an_epoch_are_the_mean_over_molecules(data):
    losses = np.random.default_rng(1).normal(size=700) + np.arange(700)
    batches = data.epoch(1)
    means = [batch.weight * losses[numbers_of(data, batch)].mean() for batch in batches]
    assert np.mean(means) == pytest.approx(losses.mean(), rel=1e-12)
    assert {batch.shard(1, 3).weight for batch in batches} == {batch.weight for batch in batches}


# -- training -----------------------------------------------------------------------------------


def test_interrupted_and_resumed_equals_unbroken(tmp_path):
    """In the second of two epochs of different lengths, with streamed molecules."""
    changes = BY_PAIRS | {
        "data__in_memory": False, "data__window": 128, "training__pairs_per_batch": 30_000,
        "training__steps": None, "training__epochs": 2, "training__validate_every": 1000,
        "training__checkpoint_every": 1000, "model__layers": 1,
    }  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    task = MoleculeTask(tiny(**changes), CPU)
    first, steps = task.starts[1], task.starts[2]
    assert first * 2 != steps
    assert train(task, whole, Watcher()).steps == steps
    rows = list(read_metrics(whole / "metrics.csv"))
    assert [int(row["epoch"]) for row in rows] == [int(int(row["step"]) > first) for row in rows]
    watcher = Watcher({first + 3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted, match=f"step {first + 3} of {steps}"):
        train(MoleculeTask(tiny(**changes), CPU), run, watcher)
    assert load_checkpoint(run).state["epoch"] == 1
    train(MoleculeTask(config_of(run), CPU), run, Watcher(), resume=True)
    assert_same_run(whole, run)


def test_a_step_weighs_the_gradient_of_its_batch(tmp_path):
    """After one step the first moment of AdamW is a tenth of the weighted gradient."""
    config = tiny(**BY_PAIRS, training__steps=1)
    task = MoleculeTask(config, CPU)
    batch = task.epoch(0)[0]
    assert abs(batch.weight - 1) > 0.05
    seen = []

    def loss(*arguments, **options):
        seen.append(original(*arguments, **options))
        return seen[-1]

    original, task.loss = task.loss, loss
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    train(task, tmp_path / "run", Watcher())
    again = MoleculeTask(config, CPU)
    again.model.load_state_dict(before)
    values = again.loss(again.model, batch, loop._derived_seed(0, 0))["loss"]
    assert torch.equal(values, seen[0]["loss"])
    (values.mean() * batch.weight).backward()
    moments = weights(tmp_path / "run", "optimizer")
    name, parameter = next(
        (name, p) for name, p in again.model.named_parameters() if name == "embed.weight"
    )
    torch.testing.assert_close(moments[f"{name}/exp_avg"], 0.1 * parameter.grad)
    (row,) = read_metrics(tmp_path / "run" / "metrics.csv")
    assert float(row["loss"]) == pytest.approx(values.mean().item(), rel=1e-5)


def test_processes_share_batches_of_any_number():
    """Three processes have the losses of one, also of a batch of two molecules."""
    task = MoleculeTask(tiny(**BY_PAIRS | {"training__pairs_per_batch": 800}), CPU)
    batches = {len(batch): batch for batch in task.epoch(0)}
    for count in (2, max(batches)):
        whole = task.loss(task.model, batches[count], 1)["loss"]
        for rank in range(min(3, count)):
            part = task.loss(task.model, batches[count], 1, rank, 3)["loss"]
            torch.testing.assert_close(part, whole[rank::3])


def test_a_budget_that_fits_is_named(tmp_path):
    task = MoleculeTask(tiny(**BY_PAIRS), CPU)
    original, failed = task.loss, []

    def loss(model, batch, *arguments):
        if failed and len(batch) > failed[0] // 2:
            raise torch.OutOfMemoryError
        if len(failed) == 0 and len(batch) > 4:
            failed.append(len(batch))
            raise torch.OutOfMemoryError
        return original(model, batch, *arguments)

    task.loss = loss
    with pytest.raises(TrainingFailedError, match=(
        r"out of memory with batches of 5,000 pairs of atoms .*"
        r"fit: train again with --set training\.pairs_per_batch=\d+"
    )) as error:  # fmt: skip
        train(task, tmp_path / "run", Watcher())
    assert 1000 < int(str(error.value).rpartition("=")[2]) <= 2500


def test_a_dry_run_says_pairs_and_molecules(tmp_path, cli_here):
    settings = [f"{key}={value}" for key, value in TINY.items() if key != "training.batch_size"]
    words = [part for value in settings for part in ("--set", value)]
    done = cli_here("train", "--dry-run", "--set", "training.pairs_per_batch=20000", *words)
    mean = 1000 / MoleculeTask(
        tiny(**BY_PAIRS | {"training__pairs_per_batch": 20_000}), CPU
    ).starts[1]  # fmt: skip
    assert f"steps of at most 20,000 pairs of atoms, {mean:.3g} molecules on average" in done.stderr
    assert "pairs_per_batch: 20000" in done.stdout


def test_the_cost_of_a_validation_is_that_of_mean_batches(monkeypatch, tmp_path):
    """Batches of as many pairs take one second each, however many molecules they hold."""
    now = [0.0]

    def slow(task, *arguments, **options):
        now[0] += 1.0
        return task_loss(task, *arguments, **options)

    task_loss = MoleculeTask.loss
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MoleculeTask, "loss", slow)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    config = tiny(**BY_PAIRS)
    cost = estimate_training(config)
    batches = MoleculeTask(config, CPU).starts[1]
    assert cost.validation == pytest.approx(32 * batches / 1000)


def test_only_molecules_have_pairs(tmp_path):
    data = tmp_path / "shapes.h5"
    preprocess("shapes", data, count=40)
    config = load_config("shapes_energy").replaced(
        {"training.pairs_per_batch": 100, "data.path": str(data)}
    )
    with pytest.raises(InputError, match=r"pairs_per_batch: only molecules .*training\.batch_size"):
        SYSTEMS["shapes"].task(config, CPU, no_progress)
