"""Batches in several threads: the same molecules, and failures and interruptions as with one."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import CPU, Watcher, tiny

from molgen_energy.systems.molecules import generate
from molgen_energy.systems.molecules.generate import MoleculeGenerator, samples_in_bfloat16
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.molecules.threads import DrawingThreads
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train
from molgen_energy.training.pretrained import resolve_checkpoint


class Progress:
    """Sums what is reported, and by which threads."""

    def __init__(self):
        self.total, self.threads = 0.0, set()

    def found(self, samples):
        pass

    def interrupted(self, samples):
        pass

    def advance(self, samples, share):
        self.total += samples * share
        self.threads.add(threading.get_ident())


@pytest.fixture
def cores():
    """PyTorch as on a machine with four cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_item_once_and_progress_in_the_own_thread(cores, threads):
    progress, seen = Progress(), []

    def work(item):
        seen.append((item, threading.get_ident(), torch.get_num_threads()))
        for _ in range(4):
            time.sleep(0.001)
            run.advance(item, 0.25)

    run = DrawingThreads(work, progress.advance)
    run.run(iter(range(1, 21)), threads)
    items, identities, shares = zip(*seen, strict=True)
    assert sorted(items) == list(range(1, 21))
    assert len(set(identities)) == threads
    assert set(shares) == {cores // threads}
    assert torch.get_num_threads() == cores
    assert progress.total == pytest.approx(sum(range(1, 21)))
    assert progress.threads == {threading.get_ident()}


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_one_thread_raises_ends_all(cores, failing):
    """Whichever thread has the item: the others stop at their next evaluation."""
    done, together = [], threading.Barrier(3)

    def work(item):
        together.wait(5)
        if item == failing:
            raise OSError("disk full")
        while True:
            time.sleep(0.001)
            run.advance(1, 0.1)
            done.append(item)

    run = DrawingThreads(work, lambda samples, share: None)
    with pytest.raises(OSError, match="disk full"):
        run.run(iter(range(3)), 3)
    assert threading.active_count() == 1 or not any(
        thread.name.endswith("(run_helper)") for thread in threading.enumerate()
    )
    assert torch.get_num_threads() == cores


def test_ctrl_c_ends_all(cores):
    def work(item):
        while True:
            time.sleep(0.001)
            if item == 1:
                os.kill(os.getpid(), signal.SIGINT)
            run.advance(1, 0.1)

    run = DrawingThreads(work, lambda samples, share: None)
    with pytest.raises(KeyboardInterrupt):
        run.run(iter(range(2)), 2)
    assert not any(thread.name.endswith("(run_helper)") for thread in threading.enumerate())


@pytest.mark.parametrize(("name", "pays", "expected"), [
    ("qm9_energy", True, True), ("qm9_energy", False, False), ("ccd_energy", True, False),
])  # fmt: skip
def test_bfloat16_by_default_where_trained_so_and_faster(monkeypatch, name, pays, expected):
    monkeypatch.setattr(
        generate, "is_bfloat16_faster", lambda device, training: pays and not training
    )
    checkpoint = load_checkpoint(resolve_checkpoint(Path(name)))
    assert samples_in_bfloat16(checkpoint, CPU) is expected
    assert not samples_in_bfloat16(checkpoint, torch.device("meta"))


def test_molecules_do_not_depend_on_threads(tmp_path, monkeypatch):
    config = tiny(training__steps=2, process__steps=5)
    train(MoleculeTask(config, CPU), tmp_path / "run", Watcher())
    checkpoint = load_checkpoint(tmp_path / "run")
    before, files = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            path, progress = tmp_path / f"{threads}.sdf", Progress()
            generator = MoleculeGenerator(checkpoint, CPU, sizes=(4, 9))
            sample_to_file(generator, 12, path, progress, batch_size=3)
            assert progress.total == pytest.approx(12)
            files.append(path.read_bytes())
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]
