"""Steps that a GPU records: what they compute, and that none of them waits for the device."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from graph_recorder import ListRecorder, Waits
from runs import CPU, Watcher, tiny, weights

from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training import loop
from molgen_energy.training.graphs import GraphCache
from molgen_energy.training.metrics import read_columns


def test_shapes_that_come_again_are_recorded():
    recorder = ListRecorder()
    graphs, total, calls = GraphCache(recorder, most=2), torch.zeros(()), []

    def add(tensors):
        calls.append(1)
        total.add_(tensors["x"].sum())
        return {"double": 2 * tensors["x"]}

    expected = 0.0
    for size in (3, 3, 2, 3, 2, 2, 1, 1, 1, 3):
        x = torch.rand(size)
        expected += float(x.sum())
        assert torch.equal(graphs(add, {"x": x})["double"], 2 * x)
        assert float(total) == pytest.approx(expected)
    assert recorder.recorded == 2  # of sizes 3 and 2
    assert len(calls) == 2 * 2 + 3  # twice each, and every time of size 1


def test_a_function_that_waits_cannot_be_recorded():
    graphs = GraphCache(ListRecorder())
    graphs(lambda tensors: {"x": tensors["x"] * float(tensors["x"])}, {"x": torch.ones(())})
    with pytest.raises(Waits):
        graphs(lambda tensors: {"x": tensors["x"] * float(tensors["x"])}, {"x": torch.ones(())})


def trained(tmp_path, name, monkeypatch, recorder=None, late=0, **changes):
    """A short run with a recorder, or without, whose outcomes are read so many steps late."""
    fixed = {"training__lr": 2**-10, "training__muon_lr": 2**-7, "training__decay": "none"}
    options = {"training__steps": 12, "training__warmup_steps": 0} | fixed | changes
    config = tiny(training__cuda_graphs=recorder is not None, **options)
    monkeypatch.setattr(loop, "_recorder", lambda task, dropout: recorder)
    task = MoleculeTask(config, CPU)
    split = task._train.window(0)
    first = task.epoch(0)[5].which[0]
    split.data._atoms["positions"][split.data._offsets[first]] = torch.nan
    made = loop._Trainer.__init__

    def make(self, *arguments):
        made(self, *arguments)
        self._most_unread = late

    monkeypatch.setattr(loop._Trainer, "__init__", make)
    summary = loop.train(task, tmp_path / name)
    monkeypatch.undo()
    return summary, weights(tmp_path / name, "model"), weights(tmp_path / name, "ema")


CASES = {
    "muon": {"model__name": "gdm_pairs", "training__optimizer": "muon"},
    "adaptive": {"loss__springs__family": "auto", "loss__edges__kind": "sparse"},
    "pairs": {"training__pairs_per_batch": 4000, "training__batch_size": None},
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_equal_steps(tmp_path, monkeypatch, case):
    """In all bits, for learning rates that float32 holds; a batch with NaN is skipped in both."""
    recorder = ListRecorder()
    plain = trained(tmp_path, "plain", monkeypatch, **CASES[case])
    recorded = trained(tmp_path, "recorded", monkeypatch, recorder, late=1, **CASES[case])
    assert recorder.recorded > 1
    assert plain[0].skipped == recorded[0].skipped == 1
    for before, after in zip(plain[1:], recorded[1:], strict=True):
        assert all(torch.equal(values, after[name]) for name, values in before.items())


@pytest.mark.parametrize(
    "changes", [{"loss__edges__kind": "symmetrized"}, {"loss__springs__family": "lennard_jones"}]
)
def test_a_batch_is_its_tensors(changes):
    """With the bonds and neighbours that losses require."""
    task = MoleculeTask(tiny(**changes), CPU)
    batch, other = (task.prepare(b, 3) for b in task.epoch(0)[:2])
    expected = task.prepared_loss(task.model, batch)["loss"]
    copy = other.with_tensors(batch.tensors())
    assert torch.equal(task.prepared_loss(task.model, copy)["loss"], expected)
    assert {"bonds", "weight"} & batch.tensors().keys()


@pytest.mark.parametrize(
    ("self_conditioned", "message"),
    [
        (False, "training.cuda_graphs is for GPUs, not cpu; leave it out"),
        (True, "training.cuda_graphs: steps with dropout or self-conditioning cannot be recorded"),
    ],
)
def test_what_cannot_be_recorded(tmp_path, self_conditioned, message):
    task = MoleculeTask(tiny(training__cuda_graphs=True), CPU)
    task.model.self_conditioned = self_conditioned
    with pytest.raises(InputError, match=message):
        loop.train(task, tmp_path / "run")


GPU = {"model__name": "gdm_pairs", "model__width": 64, "training__optimizer": "muon"}


@pytest.mark.gpu
def test_a_gpu_repeats_steps(tmp_path):
    """Losses are those of steps that are launched, but for rounding, also after a resumption."""
    found = {}
    for name, recorded, ends in (("launched", False, (40,)), ("recorded", True, (25, 40))):
        for steps in ends:
            config = tiny(
                training__steps=40, training__decay="none", training__cuda_graphs=recorded, **GPU
            )
            task = MoleculeTask(config, torch.device("cuda"))
            stop = Watcher({25: lambda: os.kill(os.getpid(), signal.SIGINT)} if steps == 25 else {})
            try:
                loop.train(task, tmp_path / name, stop, resume=steps > ends[0])
            except loop.TrainingInterrupted:
                assert steps == 25
        found[name] = read_columns(tmp_path / name / "metrics.csv")["loss"]
    assert found["recorded"] == pytest.approx(found["launched"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["exponential", "auto"])
def test_no_step_waits_for_a_gpu(tmp_path, family):
    task = MoleculeTask(tiny(loss__springs__family=family, **GPU), torch.device("cuda"))
    trainer, batches = loop._Trainer(task, tmp_path / "run", loop.no_callback), task.epoch(0)[:8]
    for batch in batches:  # compiles kernels, and makes tables on the device
        trainer._step(batch, threading.Event())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            trainer._step(batch, threading.Event())
    finally:
        torch.cuda.set_sync_debug_mode("default")
