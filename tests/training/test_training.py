"""The loop: it learns, it is deterministic, and an interrupted run resumes to the same numbers."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import config_of
from runs import CPU, Watcher, assert_same_run, tiny, weights

from molgen_energy.data.batches import EpochStarts
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.diffusion.geometry import centred
from molgen_energy.diffusion.objective import Terms
from molgen_energy.diffusion.process import PROCESSES
from molgen_energy.errors import InputError, TrainingFailedError
from molgen_energy.losses import EDGES, LOSSES, SPRINGS
from molgen_energy.losses.pointwise import KabschError
from molgen_energy.models import GDM, MODELS
from molgen_energy.output import lock_file
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training import checkpoint as checkpoints
from molgen_energy.training import devices
from molgen_energy.training.checkpoint import load_checkpoint, newest_run, save_checkpoint
from molgen_energy.training.clipping import GradientClipper
from molgen_energy.training.ema import ExponentialMovingAverage
from molgen_energy.training.initial import initialise
from molgen_energy.training.loop import (
    TrainingInterrupted,
    _derived_seed,
    learning_rate,
    total_steps,
    train,
)
from molgen_energy.training.metrics import MetricsLog, read_metrics


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(MoleculeTask(tiny(), CPU), run, Watcher())
    return run


def test_run_directory(unbroken):
    assert {p.name for p in unbroken.iterdir()} >= {"config.yaml", "metrics.csv", "log.txt"}
    names = {"model.safetensors", "ema.safetensors", "config.yaml", "state.yaml"}
    last, best = (unbroken / "checkpoints" / which for which in ("last", "best"))
    assert {p.name for p in last.iterdir()} == names | {"optimizer.safetensors"}
    assert {p.name for p in best.iterdir()} == names
    assert [p.name for p in sorted((unbroken / "checkpoints").iterdir())] == ["best", "last"]
    config = load_config(unbroken / "config.yaml")
    assert config.objective.position_weight == pytest.approx(0.26, rel=0.02)
    assert config.data.elements == ["H", "C", "N", "O", "F"]
    assert isinstance(config.loss.springs.scale, float)
    assert config.data.in_memory is True
    rows = list(read_metrics(unbroken / "metrics.csv"))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [bool(row["valid_loss"]) for row in rows] == [False, True, False, True]
    state = load_checkpoint(unbroken).state
    assert sum(state["size_histogram"].values()) == 1000


def test_same_seed_same_run(unbroken, tmp_path):
    train(MoleculeTask(tiny(), CPU), tmp_path / "again", Watcher())
    assert_same_run(unbroken, tmp_path / "again")


def test_another_seed_another_run(unbroken, tmp_path):
    train(MoleculeTask(tiny(training__seed=1), CPU), tmp_path / "other", Watcher())
    theirs, ours = weights(unbroken, "model"), weights(tmp_path / "other", "model")
    assert not torch.equal(theirs["embed.weight"], ours["embed.weight"])


@pytest.mark.parametrize("at", [1, 4, 5, 11])
def test_interrupted_and_resumed_equals_unbroken(unbroken, tmp_path, at):
    run = tmp_path / "run"
    watcher = Watcher({at: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted, match=f"step {at} of 12"):
        train(MoleculeTask(tiny(), CPU), run, watcher)
    assert watcher.steps[-1] == at
    assert (run / "curves.svg").exists() == (at >= 3)  # from the first row on
    resumed = Watcher()
    train(MoleculeTask(config_of(run), CPU), run, resumed, resume=True)
    assert resumed.steps == list(range(at + 1, 13))
    assert_same_run(unbroken, run)


def test_died_between_checkpoints_and_resumed_equals_unbroken(unbroken, tmp_path):
    """A crash at step 10 goes back to the checkpoint of step 8; rows behind it are dropped."""
    run = tmp_path / "run"

    def crash():
        raise MemoryError

    with pytest.raises(MemoryError):
        train(MoleculeTask(tiny(), CPU), run, Watcher({10: crash}))
    with (run / "metrics.csv").open("a") as file:
        file.write("12,0,0.1")  # half a row, as a kill leaves it
    train(
        MoleculeTask(config_of(run), CPU),
        run,
        Watcher(),
        resume=True,
    )
    assert_same_run(unbroken, run)


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from runs import *
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training.loop import train
train(MoleculeTask(tiny(training__steps=100000, training__checkpoint_every=1), CPU),
      Path(sys.argv[1]), Watcher())
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.13, 0.31])
def test_killed_at_any_moment_it_resumes(tmp_path, delay):
    """SIGKILL while a checkpoint is written at every step: the run goes on from a whole one."""
    run = tmp_path / "run"
    code = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    process = subprocess.Popen([sys.executable, "-c", code, str(run)])
    state = run / "checkpoints" / "last" / "state.yaml"
    while not (run / "checkpoints" / "best").exists():  # at least six checkpoints were written
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.wait()
    assert state.exists() or (run / "checkpoints" / "last.old" / "state.yaml").exists()
    at = load_checkpoint(run).state["progress"]["step"]
    config = config_of(run).replaced({"training.steps": at + 2})
    summary = train(MoleculeTask(config, CPU), run, Watcher(), resume=True)
    assert summary.steps == at + 2
    assert not list((run / "checkpoints").glob("*.tmp"))


def at_step(step: int) -> dict[str, dict[str, int]]:
    return {"progress": {"step": step}}


@pytest.mark.parametrize("moment", range(8))
def test_a_checkpoint_is_old_or_new_at_every_moment(tmp_path, monkeypatch, moment):
    """Stop the writer at each of its operations on files: what is found is whole."""
    path, config = tmp_path / "last", tiny()
    save_checkpoint(path, config, at_step(1), {"model": {"w": torch.ones(3)}})
    count = 0

    class Killed(BaseException):
        pass

    def dying(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed  # and everything that would clean up behind it dies as well
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "write_bytes", dying(Path.write_bytes))
    monkeypatch.setattr(Path, "write_text", dying(Path.write_text))
    monkeypatch.setattr(checkpoints, "flush_to_disk", dying(checkpoints.flush_to_disk))
    monkeypatch.setattr(checkpoints, "remove", dying(checkpoints.remove))
    with contextlib.suppress(Killed):
        save_checkpoint(path, config, at_step(2), {"model": {"w": 2 * torch.ones(3)}})
    monkeypatch.undo()
    found = load_checkpoint(path)
    assert torch.equal(
        found.read_tensors("model")["w"], found.state["progress"]["step"] * torch.ones(3)
    )
    save_checkpoint(path, config, at_step(3), {"model": {"w": 3 * torch.ones(3)}})
    assert load_checkpoint(path).state["progress"]["step"] == 3


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last"
    save_checkpoint(path, tiny(), at_step(1), {"model": {"w": torch.ones(3)}})

    def full(self, *_):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, tiny(), at_step(2), {"model": {"w": torch.ones(3)}})
    assert load_checkpoint(path).state["progress"]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_more_steps_go_on(unbroken, tmp_path):
    run = tmp_path / "run"
    train(MoleculeTask(tiny(training__decay="none"), CPU), run, Watcher())
    longer = config_of(run).replaced({"training.steps": 15})
    assert train(MoleculeTask(longer, CPU), run, Watcher(), resume=True).steps == 15


def test_other_data_is_refused_on_resume(unbroken, tmp_path, sample_path):
    import h5py

    (tmp_path / "other.h5").write_bytes(sample_path.read_bytes())
    with h5py.File(tmp_path / "other.h5", "r+") as file:
        file["split"][:] = 0
    config = config_of(unbroken).replaced({"data.path": str(tmp_path / "other.h5")})
    with pytest.raises(InputError, match="trained on other data"):
        train(MoleculeTask(config, CPU), unbroken, Watcher(), resume=True)


def test_spoilt_weights_stop_the_run_with_the_checkpoint_named(tmp_path):
    task = MoleculeTask(tiny(training__steps=40), CPU)

    def poison():
        with torch.no_grad():
            task.model.embed.weight.fill_(torch.nan)

    expected = r"loss was not finite for 10 steps in a row at step 15; the last good .*last"
    with pytest.raises(TrainingFailedError, match=expected):
        train(task, tmp_path / "run", Watcher({5: poison}))
    assert load_checkpoint(tmp_path / "run").state["progress"]["step"] == 4
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run", "model").values())


def test_spoilt_weights_at_the_end_are_no_result(tmp_path):
    task = MoleculeTask(tiny(), CPU)

    def poison():
        with torch.no_grad():
            task.model.embed.weight.fill_(torch.nan)

    with pytest.raises(
        TrainingFailedError, match="weights are not finite at step 12; the last good"
    ):
        train(task, tmp_path / "run", Watcher({9: poison}))
    assert load_checkpoint(tmp_path / "run").state["progress"]["step"] == 8


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    """The gradient of steps 4 and 5 is NaN: weights and averages stay, and the run goes on."""
    task = MoleculeTask(tiny(), CPU)
    bad, seen = {4, 5}, {}
    watcher = Watcher()

    def spoil(gradient):
        return gradient * torch.nan if len(watcher.steps) + 1 in bad else gradient

    task.model.embed.weight.register_hook(spoil)
    for step in (3, 5, 6):
        copy = lambda step=step: seen.update({step: task.model.embed.weight.detach().clone()})  # noqa: E731
        watcher.at[step] = copy
    summary = train(task, tmp_path / "run", watcher)
    assert torch.equal(seen[3], seen[5])
    assert not torch.equal(seen[5], seen[6])
    assert summary.skipped == 2
    rows = list(read_metrics(tmp_path / "run" / "metrics.csv"))
    assert [row["skipped"] for row in rows] == ["0", "2", "2", "2"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "step 4 skipped: loss" in log and "norm of the gradient nan" in log


@pytest.mark.slow
def test_low_precision_learns_alike(tmp_path):
    """Loss curves with bfloat16 overlap with those without, closer than those of two seeds."""

    def curve(name, **changes):
        config = tiny(training__steps=60, training__log_every=6, **changes)
        train(MoleculeTask(config, CPU), tmp_path / name, Watcher())
        return np.array(
            [float(r["loss"]) for r in list(read_metrics(tmp_path / name / "metrics.csv"))]
        )

    exact = curve("exact")
    rough = curve("rough", training__low_precision=True)
    other = curve("other", training__seed=1)
    difference, usual = np.abs(np.log(rough / exact)), np.abs(np.log(other / exact))
    assert difference.max() < 0.02
    assert difference.mean() < usual.mean() / 5
    assert exact[-1] < 0.8 * exact[0]


def test_no_checkpoint_while_steps_are_not_finite(tmp_path):
    """Weights may be finite and spoilt: the checkpoint from before leads to the same steps."""
    task = MoleculeTask(tiny(training__checkpoint_every=1), CPU)
    seen = {}

    def saved():
        return load_checkpoint(tmp_path / "run").state["progress"]["step"]

    watcher = Watcher(
        {step: lambda step=step: seen.update({step: saved()}) for step in range(1, 13)}
    )
    spoil = lambda g: g * torch.nan if 5 <= len(watcher.steps) < 8 else g  # noqa: E731
    task.model.embed.weight.register_hook(spoil)
    train(task, tmp_path / "run", watcher)
    # What stands at step k, before the checkpoint of that step is written.
    assert [seen[step] for step in range(1, 13)] == [0, 1, 2, 3, 4, 5, 5, 5, 5, 9, 10, 11]


def test_two_trainers_of_one_run_are_kept_apart(unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    config = config_of(run).replaced({"training.steps": 14})
    before = (run / "metrics.csv").read_bytes()
    with (
        lock_file(run / "log.txt", "run"),
        pytest.raises(InputError, match="in use by another process"),
    ):
        train(MoleculeTask(config, CPU), run, Watcher(), resume=True)
    assert (run / "metrics.csv").read_bytes() == before
    assert train(MoleculeTask(config, CPU), run, Watcher(), resume=True).steps == 14


def test_skipped_steps_resume_to_the_same_numbers(tmp_path):
    def broken():
        task = MoleculeTask(tiny(), CPU)
        original = task.loss

        def loss(model, batch, seed, rank=0, world=1):
            terms = original(model, batch, seed, rank, world)
            return terms | {"loss": terms["loss"] * torch.nan} if next(count) == 7 else terms

        task.loss = loss
        return task

    count = itertools.count(1)
    train(broken(), tmp_path / "unbroken", Watcher())
    count = itertools.count(1)
    watcher = Watcher({8: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted):
        train(broken(), tmp_path / "run", watcher)
    train(MoleculeTask(config_of(tmp_path / "run"), CPU), tmp_path / "run",
          Watcher(), resume=True)  # fmt: skip
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


def test_a_row_of_skipped_steps_only(tmp_path):
    task = MoleculeTask(tiny(), CPU)
    watcher = Watcher()
    spoil = lambda g: g * torch.nan if 3 <= len(watcher.steps) < 6 else g  # noqa: E731
    task.model.embed.weight.register_hook(spoil)
    train(task, tmp_path / "run", watcher)
    rows = list(read_metrics(tmp_path / "run" / "metrics.csv"))
    assert [row["loss"] == "" for row in rows] == [False, True, False, False]


@pytest.mark.parametrize(
    ("fits", "message"), [(5, "4 fit: train again with --batch-size 4"), (0, "not even one")]
)
def test_out_of_memory_says_what_fits(tmp_path, fits, message):
    task = MoleculeTask(tiny(), CPU)
    original, tried, failed = task.loss, [], []

    def loss(model, batch, seed, rank=0, world=1):
        if len(watcher.steps) == 5:
            assert not [held for held in failed if held() is not None], "memory is not free"
        if len(watcher.steps) == 5 and len(batch) > fits:
            large = torch.zeros(100)  # of the pass that fails, in its frame
            failed.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if len(watcher.steps) == 5:
            tried.append(batch)
        return original(model, batch, seed, rank, world)

    watcher = Watcher()
    task.loss = loss
    with pytest.raises(
        TrainingFailedError, match=f"out of memory with batches of 16 at step 5.*{message}"
    ):
        train(task, tmp_path / "run", watcher)
    assert [len(batch) for batch in tried] == [4] * (fits > 0)
    assert all((batch.sizes >= 20).all() for batch in tried)  # the largest that meet
    assert load_checkpoint(tmp_path / "run").state["progress"]["step"] == 4


def test_without_clipping(tmp_path):
    config = tiny(training__clip_gradients=False)
    assert train(MoleculeTask(config, CPU), tmp_path / "run", Watcher()).steps == 12


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty"):
        train(MoleculeTask(tiny(), CPU), tmp_path, Watcher())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_validation_molecules_are_drawn_from_the_whole_split(molecules):
    """The bundled sample is sorted by size; the first 32 would be far too small."""
    sizes = MoleculeTask(tiny(), CPU)._valid.data.sizes
    assert len(sizes) == 32
    assert abs(sizes.mean() - molecules.sizes.mean()) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns(tmp_path, loss, process):
    config = tiny(
        training__steps=150,
        training__batch_size=32,
        training__warmup_steps=10,
        loss__name=loss,
        process__name=process,
    )
    task = MoleculeTask(config, CPU)
    before = task.validation_loss(task.model)
    summary = train(task, tmp_path / "run", Watcher())
    # A velocity has a part that nobody can know, at every time; and the springs of score_energy
    # become stiffer as predictions come closer together than noise.
    known = process == "diffusion" and loss != "score_energy"
    assert summary.valid_loss < (0.6 if known else 0.75) * before


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [name for name in MODELS if "bonds" not in MODELS[name].Config.fields]
)
def test_it_learns_with_muon_to_give_velocities(tmp_path, model):
    config = tiny(
        training__steps=80,
        training__batch_size=32,
        training__optimizer="muon",
        training__warmup_steps=10,
        process__prediction="velocity",
        model__name=model,
    )
    task = MoleculeTask(config, CPU)
    before = task.validation_loss(task.model)
    summary = train(task, tmp_path / "run", Watcher())
    assert summary.valid_loss < 0.95 * before  # a velocity of 0 is no bad start


def test_what_auto_stands_for():
    """Softer springs get a larger weight, so that the energy counts as much."""
    auto = MoleculeTask(tiny(), CPU).config
    given = MoleculeTask(tiny(loss__springs__scale=42.0, training__lr="auto"), CPU).config
    products = [c.loss.springs.scale * c.objective.position_weight for c in (auto, given)]
    assert products[0] == pytest.approx(products[1])
    assert given.loss.springs.scale == 42.0
    assert given.training.lr == 4e-4
    mse = MoleculeTask(tiny(loss__name="mse", training__lr="auto"), CPU).config
    assert (mse.objective.position_weight, mse.training.lr) == (1.5, 1e-3)


@pytest.mark.parametrize("springs", SPRINGS)
@pytest.mark.parametrize("edges", EDGES)
def test_auto_is_the_same_pull_whatever_the_springs(springs, edges):
    """w·Σk/n of the configured springs is that of complete exponential ones times the paper's."""
    config = tiny(loss__springs__family=springs, loss__edges__kind=edges, training__lr="auto")
    task = MoleculeTask(config, CPU)
    loss = task._objective.position_loss
    assert type(loss.edges) is EDGES[edges]
    generator = torch.Generator().manual_seed(1)
    forces = pairs = 0.0
    for chunk in task._samples():
        atoms = chunk["mask"].sum(1)
        total = loss.total_stiffness(**chunk, generator=generator).total
        forces += (loss.scale or 1.0) * float((total / atoms).sum())
        pairs += float((atoms - 1).sum())
    published = GDM.Config.published["energy", "exponential" if springs == "auto" else springs]
    weight = task.config.objective.position_weight
    assert weight * forces / pairs == pytest.approx(published.position_weight, rel=0.02)
    assert task.config.training.lr == published.lr


def test_auto_is_a_smaller_weight_of_energies_for_larger_molecules(tmp_path, molecules):
    """An energy grows with the atoms, a mean does not; both are published for QM9."""
    sizes = molecules.sizes
    small = molecules.select(np.flatnonzero(sizes <= np.quantile(sizes, 0.1)))
    path = tmp_path / "small.h5"
    with MoleculeWriter(path, source="test") as writer:
        writer.append(small)
        writer.set_split(np.zeros(len(small), np.uint8))
    weights = {}
    for loss in ("energy", "score_energy", "mse"):
        config = MoleculeTask(tiny(loss__name=loss, data__path=str(path)), CPU).config
        weights[loss] = config.objective.position_weight
    expected = 0.26 * 18.03 / small.sizes.mean()
    assert weights["energy"] == weights["score_energy"] == pytest.approx(expected, rel=1e-3)
    assert weights["mse"] == 1.5


def test_published_scale():
    config = MoleculeTask(tiny(loss__springs__scale="jodo"), CPU).config
    assert config.loss.springs.scale == 24
    with pytest.raises(InputError, match=r"lennard_jones: .*no published scale for 'jodo'"):
        MoleculeTask(tiny(loss__springs__scale="jodo", loss__springs__family="lennard_jones"), CPU)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss__edges__kind": "sparse"},
        {"loss__edges__kind": "symmetrized", "loss__springs__distance": "features"},
        {"loss__springs__family": "lennard_jones", "process__name": "flow_matching"},
        {"loss__name": "kabsch"},
        {"training__optimizer": "muon", "process__prediction": "velocity"},
        {"loss__name": "score_energy", "loss__springs__family": "auto"},
        {"loss__springs__family": "auto", "objective__terms": {"mse": 0.5}},
        {"loss__springs_at": "noisy", "loss__rest": "vector", "process__name": "flow_matching"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_choice_resumes_to_the_same_numbers(tmp_path, changes):
    config = tiny(training__steps=6, training__checkpoint_every=100, **changes)
    train(MoleculeTask(config, CPU), tmp_path / "unbroken", Watcher())
    watcher = Watcher({2: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted):
        train(MoleculeTask(config, CPU), tmp_path / "run", watcher)
    resolved = config_of(tmp_path / "run")
    train(MoleculeTask(resolved, CPU), tmp_path / "run", Watcher(), resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


def test_learnt_springs_are_stored_and_continue(tmp_path):
    """Every checkpoint holds them, and a resumed run starts with them."""
    config = tiny(loss__springs__family="auto")
    train(MoleculeTask(config, CPU), tmp_path / "run", Watcher())
    for which in ("last", "best"):
        state = load_checkpoint(tmp_path / "run", which).read_tensors("springs")
        assert state["pairs"].sum() > 0
    assert int(weights(tmp_path / "run", "springs")["steps"]) == 12
    task = MoleculeTask(config_of(tmp_path / "run").replaced({"training.steps": 13}), CPU)
    train(task, tmp_path / "run", Watcher(), resume=True)
    assert int(task.adaptive.state()["steps"]) == 13
    assert MoleculeTask(tiny(), CPU).adaptive is None


def test_a_skipped_step_teaches_springs_nothing(tmp_path):
    task = MoleculeTask(tiny(loss__springs__family="auto", training__steps=3), CPU)
    loss, calls = task.loss, []

    def spoilt(*arguments):
        terms = loss(*arguments)
        calls.append(terms)
        return terms | {"loss": terms["loss"] * (torch.nan if len(calls) == 2 else 1)}

    task.loss = spoilt
    summary = train(task, tmp_path / "run", Watcher())
    assert summary.skipped == 1
    assert int(task.adaptive.state()["steps"]) == 2


def test_further_terms_add_to_the_loss(tmp_path):
    """They have a column of their own, and the weight that is set."""
    tasks = [
        MoleculeTask(tiny(objective__terms={"mse": weight}), CPU) for weight in (0.0, 1.0, 3.0)
    ]
    model, batch = tasks[0].model, tasks[0].epoch(0)[0]
    without, once, thrice = (task.loss(model, batch, 7) for task in tasks)
    assert tasks[1].loss_terms == (
        "positions_loss", "mse_loss", "elements_loss", "nuclear_charges_loss",
    )  # fmt: skip
    assert (once["mse_loss"] > 0).all()
    torch.testing.assert_close(thrice["mse_loss"], 3 * once["mse_loss"])
    torch.testing.assert_close(once["loss"], without["loss"] + once["mse_loss"])
    alone = MoleculeTask(tiny(loss__name="mse", objective__position_weight=3.0), CPU)
    torch.testing.assert_close(alone.loss(model, batch, 7)["positions_loss"], thrice["mse_loss"])
    train(tasks[1], tmp_path / "run", Watcher())
    assert "mse_loss" in next(read_metrics(tmp_path / "run" / "metrics.csv"))


def test_terms_that_need_bonds_get_them(tmp_path):
    """Also with a loss that needs none, and with the keys of the term."""
    terms = {"torsion": {"weight": 0.5, "rest": "projected"}, "chirality": 0.1}
    task = MoleculeTask(tiny(loss__name="mse", objective__terms=terms), CPU)
    assert task.config.loss_requires == {"bonds"}
    assert task._objective.terms["torsion"].rest == "projected"
    assert task._objective.terms["chirality"].rest == "value"
    losses = task.loss(task.model, task.epoch(0)[0], 3)
    assert losses["torsion_loss"].sum() > 0
    assert losses["chirality_loss"].sum() > 0
    train(task, tmp_path / "run", Watcher())
    assert config_of(tmp_path / "run").objective.terms == terms


def test_terms_are_named_by_their_registry():
    with pytest.raises(InputError, match=r"objective\.terms.*: unknown term 'mes'; did you mean"):
        tiny(objective__terms={"mes": 1.0})
    with pytest.raises(InputError, match=r"terms: mse\.weight: .*greater than or equal to 0"):
        tiny(objective__terms={"mse": -1.0})
    with pytest.raises(InputError, match=r"terms: torsion\.rest: "):
        tiny(objective__terms={"torsion": {"weight": 1.0, "rest": "vector"}})
    with pytest.raises(InputError, match=r"terms: torsion\.stiff: "):
        tiny(objective__terms={"torsion": {"stiff": 1.0}})
    assert tiny(**{"objective.terms.mse": 2.0}).objective.terms == {"mse": 2.0}


def test_the_score_energy_has_the_published_values_of_the_energy():
    config = MoleculeTask(tiny(loss__name="score_energy", training__lr="auto"), CPU).config
    published = GDM.Config.published["energy", "exponential"]
    assert config.training.lr == published.lr
    assert config.objective.position_weight == pytest.approx(published.position_weight, rel=0.02)
    assert (config.loss.springs.scale, config.loss.external) == ("sample", 0.64)
    with pytest.raises(InputError, match="score_energy has the scale sample"):
        tiny(loss__springs__scale=3.0).replaced({"loss.name": "score_energy"})


def test_training_starts_from_the_weights_of_a_run(unbroken, tmp_path):
    """EMA weights of the run, a new optimiser, and another loss."""
    config = tiny(training__initial_weights=str(unbroken), training__steps=1, loss__name="mse")
    task = MoleculeTask(config, CPU)
    train(task, tmp_path / "run", Watcher())
    first = next(read_metrics(tmp_path / "run" / "metrics.csv"))
    expected = MoleculeTask(tiny(loss__name="mse"), CPU)
    load_checkpoint(unbroken).load_weights(expected.model, "ema")
    expected.model.train()
    loss = expected.loss(expected.model, expected.epoch(0)[0], _derived_seed(0, 0))["loss"].mean()
    assert float(first["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    shared = config_of(tmp_path / "run").without_paths()
    assert shared.training.initial_weights == unbroken.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.initial_weights": "qm9_energy_"}, r"--from qm9_energy_ does not exist \(did"),
        (
            {"process.prediction": "velocity"},
            r"was trained with process\.prediction=noise \(here vel",
        ),
        ({"scales.positions": 2.0}, r"was trained with scales\.positions=1\.0 \(here 2\.0\); set"),
        ({"model.width": 24}, r"was trained with model\.width=16 \(here 24\); set"),
        ({"model.normalization": 7.0}, r"was trained with model\.normalization="),
        ({"model.name": "edm"}, r"was trained with model\.name=gdm \(here edm\); set"),
    ],
)
def test_weights_that_do_not_fit_are_refused(unbroken, tmp_path, changes, message):
    config = tiny(**({"training.initial_weights": str(unbroken)} | changes))
    with pytest.raises(InputError, match=message):
        train(MoleculeTask(config, CPU), tmp_path / "run", Watcher())
    assert not (tmp_path / "run").exists()


def test_training_starts_from_weights_of_other_elements(unbroken, tmp_path):
    """State and log say which; a resumed run does not read them."""
    old = tmp_path / "old"
    shutil.copytree(unbroken, old)
    elements = ["H", "C", "N", "O", "F", "P", "S"]
    config = tiny(
        training__initial_weights=str(old), training__steps=1, data__elements=elements,
    )  # fmt: skip
    run = tmp_path / "run"
    train(MoleculeTask(config, CPU), run, Watcher())
    taken = load_checkpoint(run).state["initial_weights"]
    content = (old / "checkpoints" / "last" / "ema.safetensors").read_bytes()
    assert taken["origin"] == "old, step 12"
    assert taken["sha256"] == hashlib.sha256(content).hexdigest()
    assert taken["new"] == ["elements P", "elements S"]
    assert taken["drawn"] == 2 * (16 + 16 + 1)
    lines = (run / "log.txt").read_text().splitlines()
    assert lines[1].endswith("66 random ones for elements P, S")
    task = MoleculeTask(config, CPU)
    initialise(task)
    ours, theirs = task.model.state_dict(), weights(old, "ema")
    kept = [*range(8), 10, 11]  # of positions, elements, nuclear charges, time
    assert torch.equal(ours["embed.weight"][:, kept], theirs["embed.weight"])
    assert torch.equal(ours["readout.bias"][[*range(8), 10]], theirs["readout.bias"])
    shutil.rmtree(old)
    resumed = config_of(run).replaced({"training.steps": 2})
    train(MoleculeTask(resumed, CPU), run, Watcher(), resume=True)
    assert load_checkpoint(run).state["initial_weights"] == taken


def test_networks_that_do_not_name_their_channels_keep_them(unbroken, monkeypatch):
    monkeypatch.setattr(GDM, "channel_axes", classmethod(lambda cls, layout, condition=(): {}))
    initialise(MoleculeTask(tiny(training__initial_weights=str(unbroken)), CPU))
    config = tiny(training__initial_weights=str(unbroken), data__elements=[*"HCNOF", "S"])
    with pytest.raises(
        InputError, match=r"other elements, .* model gdm does not name its channels"
    ):
        initialise(MoleculeTask(config, CPU))


def test_validation_is_the_same_each_time(tmp_path):
    task = MoleculeTask(tiny(), CPU)
    assert task.validation_loss(task.model) == task.validation_loss(task.model)


def test_augmentation_rotates_the_batch():
    """Distances stay, orientations do not."""
    seen = []
    for augment in (False, True):
        task = MoleculeTask(tiny(training__augment_rotations=augment), CPU)

        def objective(model, clean, random, condition, inputs):
            seen.append(clean)
            zero = torch.zeros(len(clean))
            return Terms(zero, dict.fromkeys(clean.layout.fields, zero))

        task._objective = objective
        task.loss(task.model, task.epoch(0)[0], 0)
    plain, turned = seen
    assert torch.equal(plain.mask, turned.mask)
    torch.testing.assert_close(
        torch.cdist(plain["positions"], plain["positions"]),
        torch.cdist(turned["positions"], turned["positions"]),
        rtol=0, atol=1e-4,
    )  # fmt: skip
    assert (plain["positions"] - turned["positions"])[plain.mask].norm(dim=-1).mean() > 1
    for name in ("elements", "nuclear_charges"):
        torch.testing.assert_close(plain[name], turned[name])
    centre = centred(turned["positions"], turned.mask)
    torch.testing.assert_close(turned["positions"], centre, rtol=0, atol=1e-5)


def test_elements(tmp_path):
    with pytest.raises(InputError, match=r"molecule \d+ holds F, which is not among the elements"):
        MoleculeTask(tiny(data__elements=["H", "C", "N", "O"]), CPU)
    wide = MoleculeTask(tiny(data__elements=["S", "H", "C", "N", "O", "F"]), CPU)
    assert wide.layout.fields["elements"].elements == (1, 6, 7, 8, 9, 16)
    assert wide.state["elements"] == ["H", "C", "N", "O", "F", "S"]


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    a, b = (MoleculeTask(tiny(), CPU).model.state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(before, torch.random.get_rng_state())


def test_clipper_follows_the_rule(rng):
    norms = np.exp(rng.standard_normal(120))
    clipper, remembered = GradientClipper(), [3000.0]
    for norm in norms:
        gradient = torch.tensor([float(norm), 0.0]).requires_grad_()
        gradient.grad = gradient.detach().clone()
        bound = 1.5 * np.mean(remembered) + 2 * np.std(remembered)
        assert clipper.clip([gradient]) == pytest.approx(norm, rel=1e-6)
        assert float(gradient.grad.norm()) == pytest.approx(min(norm, bound), rel=1e-5)
        remembered = [*remembered, min(norm, bound)][-50:]
    again = GradientClipper()
    again.load(clipper.state())
    assert again.state().tolist() == clipper.state().tolist() == pytest.approx(remembered)


def test_the_bound_of_the_clipper_is_limited():
    """From the first step, whose bound is else thousands."""
    clipper, remembered = GradientClipper(10.0), [3000.0]
    for norm in (100.0, 2.0, 3.0, 50.0, 4.0):
        gradient = torch.tensor([norm]).requires_grad_()
        gradient.grad = gradient.detach().clone()
        bound = min(10.0, 1.5 * np.mean(remembered) + 2 * np.std(remembered))
        clipper.clip([gradient])
        assert float(gradient.grad) == pytest.approx(min(norm, bound), rel=1e-5)
        remembered.append(min(norm, bound))
    assert clipper.state().tolist() == pytest.approx(remembered)


def test_ema():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = ExponentialMovingAverage(model, 0.9)
    value = 0.0
    for step in range(1, 200):
        model.weight.data.fill_(float(step))
        ema.update(model, torch.tensor(ema.weight(step)))
        decay = min(0.9, (1 + step) / (10 + step))
        value = decay * value + (1 - decay) * step
    assert float(ema.model.weight) == pytest.approx(value, rel=1e-5)


def test_learning_rate():
    config = tiny(training__lr=1.0, training__warmup_steps=10, training__decay="cosine").training
    rates = [learning_rate(config, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    flat = config.model_copy(update={"decay": "none"})
    assert learning_rate(flat, 109, 110) == 1.0


def test_length_of_a_run():
    assert total_steps(tiny().training, EpochStarts(7)) == 12
    epochs = tiny().replaced({"training.epochs": 3})
    assert epochs.training.steps is None
    assert total_steps(epochs.training, EpochStarts(7)) == 21
    assert total_steps(epochs.training, EpochStarts([5, 7, 6].__getitem__)) == 18
    with pytest.raises(InputError, match=r"exactly one of training\.steps and training\.epochs"):
        total_steps(tiny().training.model_copy(update={"epochs": 2}), EpochStarts(7))


def test_checkpoints_that_do_not_fit(unbroken, tmp_path):
    other = MoleculeTask(tiny(model__width=24), CPU)
    with pytest.raises(InputError, match=r"checkpoint of another model: 'embed\.bias' is"):
        load_checkpoint(unbroken).load_weights(other.model, "model")
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    assert newest_run(tmp_path) is None


def test_damaged_checkpoints(unbroken, tmp_path):
    import shutil

    broken = tmp_path / "last"
    shutil.copytree(unbroken / "checkpoints" / "last", broken)
    file = broken / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged: its SHA-256 is not"):
        load_checkpoint(broken).read_tensors("ema")
    file.unlink()
    with pytest.raises(InputError, match=r"lacks ema\.safetensors"):
        load_checkpoint(broken).read_tensors("ema")
    text = (broken / "state.yaml").read_text()
    (broken / "state.yaml").write_text(text.replace("format: 3", "format: 9"))
    with pytest.raises(InputError, match="checkpoint format 9, this version reads 2 to 3; upgrade"):
        load_checkpoint(broken)
    (broken / "state.yaml").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(broken)


def as_format_2(folder: Path) -> None:
    """Rewrite a checkpoint of a velocity prediction as an older version wrote it."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    process, scales, objective = (config.pop(key) for key in ("process", "scales", "objective"))
    del config["condition"]
    config["diffusion"] = {
        "process": process["name"], "prediction": process["prediction"],
        "steps": process["steps"], "precision": process["precision"],
        "time_power": objective["time_power"], "spread_times": objective["stratified_timesteps"],
        "position_scale": scales["positions"], "type_scale": scales["elements"],
        "charge_scale": scales["nuclear_charges"],
    }  # fmt: skip
    config["loss"]["position_weight"] = objective["position_weight"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    state = yaml.safe_load((folder / "state.yaml").read_text()) | {"format": 2}
    del state["statistics"], state["sha256"]
    loss, positions, *others, norm = state["progress"]["sums"]
    state["progress"]["sums"] = [loss, positions, sum(others), norm]
    (folder / "state.yaml").write_text(yaml.safe_dump(state, sort_keys=False))
    for name in ("model", "ema", "optimizer"):
        path = folder / f"{name}.safetensors"
        tensors = safetensors.torch.load_file(path)
        own = {key if key == "clipper/norms" else f"network.{key}": tensors[key] for key in tensors}
        safetensors.torch.save_file(own, path)


def test_a_run_of_format_2_resumes_to_the_same_weights(tmp_path):
    config = tiny(process__prediction="velocity", process__steps=50, scales__elements=3.0)
    train(MoleculeTask(config, CPU), tmp_path / "unbroken")
    run = tmp_path / "run"
    watcher = Watcher({5: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted):
        train(MoleculeTask(config, CPU), run, watcher)
    as_format_2(run / "checkpoints" / "last")
    before = config_of(run)
    assert before == config_of(tmp_path / "unbroken")
    train(MoleculeTask(before, CPU), run, resume=True)
    for name in ("model", "ema", "optimizer"):
        ours, theirs = weights(run, name), weights(tmp_path / "unbroken", name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = list(read_metrics(run / "metrics.csv"))
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]


def test_newest_run(unbroken, tmp_path):
    for name, age in (("old", 100), ("new", 1)):
        folder = tmp_path / name / "checkpoints" / "last"
        folder.mkdir(parents=True)
        (folder / "state.yaml").write_text("format: 1")
        os.utime(folder / "state.yaml", (time.time() - age,) * 2)
    assert newest_run(tmp_path).name == "new"


def test_metrics_are_readable_as_csv(unbroken):
    with (unbroken / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1


def test_metrics_with_other_columns(tmp_path):
    """Rows of a version that had other columns keep the columns that there still are."""
    (tmp_path / "metrics.csv").write_text(
        "step,epoch,loss,position_loss,valid_loss,gradient_norm,lr,samples_per_second,seconds,skipped\n"
        "5,0,1.5,1.2,,2,0.1,300,9,0\n"
    )
    log = MetricsLog(tmp_path, 5, ("positions_loss",))
    log.write(step=6, epoch=0, loss=1.0, samples_per_second=310.0, seconds=10.0, skipped=0)
    log.close()
    rows = list(read_metrics(tmp_path / "metrics.csv"))
    assert [row["samples_per_second"] for row in rows] == ["300", "310"]
    assert [row["loss"] for row in rows] == ["1.5", "1"]
    assert [row["positions_loss"] for row in rows] == ["", ""]
    assert "position_loss" not in rows[0]


@pytest.mark.parametrize(
    ("processor", "capability", "amx", "expected"),
    [
        ("AuthenticAMD", "AVX512", False, "medium"),
        ("AuthenticAMD", "AVX2", False, "highest"),
        ("AuthenticAMD", "AVX512", True, "highest"),  # there it would be bfloat16
        ("GenuineIntel", "AVX512", False, "highest"),
    ],
)
def test_products_by_onednn(monkeypatch, processor, capability, amx, expected):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(devices, "system_text", lambda path: f"vendor_id : {processor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    try:
        torch.set_float32_matmul_precision("highest")
        devices.choose_device("cpu")
        assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_on_this_processor_are_float32():
    before = torch.get_float32_matmul_precision()
    try:
        devices.choose_device("cpu")
        devices.lower_precision(CPU)  # is for GPUs
        left, right = (
            torch.randn(300, 300, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
        )
        exact = left.double() @ right.double()
        assert float((left @ right - exact).abs().max()) < 1e-5 * float(exact.abs().max())
    finally:
        torch.set_float32_matmul_precision(before)


def test_kabsch_is_exact_whatever_products_are_taken():
    before = torch.get_float32_matmul_precision()
    x, y = torch.randn(2, 4, 9, 3, generator=torch.Generator().manual_seed(0))
    seen = []
    product = torch.linalg.svd

    def watched(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return product(*arguments)

    try:
        torch.set_float32_matmul_precision("high")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "svd", watched)
            KabschError()(x, y)
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
