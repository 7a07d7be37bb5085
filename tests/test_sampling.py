"""Sampling: what a molecule depends on, exact counts, formats, and no data set."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import CPU, Watcher, tiny

from molgen_energy import sampling
from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.errors import InputError
from molgen_energy.sampling import sample_to_file
from molgen_energy.systems.molecules import MoleculeGenerator, MoleculeTask
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A little trained, so that it neither diverges nor copies; 20 diffusion steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(training__steps=60, diffusion__steps=20, training__warmup_steps=5)
    train(MoleculeTask(config, CPU), run, Watcher())
    moved = tmp_path_factory.mktemp("elsewhere") / "checkpoint"
    shutil.copytree(run / "checkpoints" / "last", moved)  # nothing but its own folder
    return load_checkpoint(moved)


class Counter:
    def __init__(self):
        self.total = 0.0

    def advance(self, molecules, share):
        self.total += molecules * share


def draw(checkpoint, path: Path, count=30, batch_size=None, **options):
    generator = MoleculeGenerator(checkpoint, CPU, **options)
    counter = Counter()
    outcome = sample_to_file(generator, count, path, counter, batch_size)
    assert counter.total == pytest.approx(count)
    return outcome


def read(path: Path):
    with MoleculeFile(path) as file:
        return file.load()


def test_a_molecule_depends_on_seed_and_number_only(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path / "a.h5")
    monkeypatch.setattr(sampling, "_WINDOW_CPU", 7)
    draw(checkpoint, tmp_path / "b.h5", batch_size=4)
    draw(checkpoint, tmp_path / "c.h5", count=9, batch_size=1)
    a, b, c = (read(tmp_path / f"{name}.h5") for name in "abc")
    assert (a.offsets == b.offsets).all()
    assert (a.atomic_numbers == b.atomic_numbers).all()
    np.testing.assert_allclose(a.positions, b.positions, atol=1e-3)
    first = a.select(np.arange(9))
    assert (first.atomic_numbers == c.atomic_numbers).all()
    np.testing.assert_allclose(first.positions, c.positions, atol=1e-3)


def test_same_seed_same_bytes_other_seed_other_molecules(checkpoint, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw(checkpoint, tmp_path / f"{name}.sdf", count=5, seed=seed)
    a, b, c = ((tmp_path / f"{name}.sdf").read_text() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("suffix", ["sdf", "xyz", "h5"])
def test_exactly_n_records(checkpoint, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sampling, "_WINDOW_CPU", 5)
    path = tmp_path / f"a.{suffix}"
    outcome = draw(checkpoint, path, count=13)
    assert outcome.written == 13
    assert (len(read(path)) if suffix == "h5" else len(list(MoleculeReader(path)))) == 13
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_formats_hold_the_same_molecules(checkpoint, tmp_path):
    for suffix in ("sdf", "xyz", "h5"):
        draw(checkpoint, tmp_path / f"a.{suffix}", count=6)
    exact = read(tmp_path / "a.h5")
    for suffix, digits in (("sdf", 1e-4), ("xyz", 1e-6)):
        for theirs, ours in zip(MoleculeReader(tmp_path / f"a.{suffix}"), exact, strict=True):
            assert (theirs.atomic_numbers == ours.atomic_numbers).all()
            np.testing.assert_allclose(theirs.positions, ours.positions, atol=digits)


def test_sizes(checkpoint, tmp_path):
    draw(checkpoint, tmp_path / "a.h5", sizes=(12, 12))
    assert set(read(tmp_path / "a.h5").sizes.tolist()) == {12}
    generator = MoleculeGenerator(checkpoint, CPU, sizes=(9, 18))
    sizes = generator.sizes(torch.arange(4000)).numpy()
    counts = np.bincount(sizes, minlength=19)[9:]
    assert counts.sum() == 4000
    assert counts.min() > 320
    histogram = checkpoint.state["size_histogram"]
    drawn = MoleculeGenerator(checkpoint, CPU).sizes(torch.arange(20_000)).numpy()
    expected = np.zeros(30)
    expected[list(histogram)] = list(histogram.values())
    share = np.bincount(drawn, minlength=30)[:30] / 20_000
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.012)


def test_ema_weights_are_used(checkpoint):
    model = MoleculeGenerator(checkpoint, CPU).model.state_dict()
    assert torch.equal(model["embed.weight"], checkpoint.tensors("ema")["embed.weight"])
    assert not torch.equal(model["embed.weight"], checkpoint.tensors("model")["embed.weight"])


def test_molecules_that_diverge_are_counted_and_written(checkpoint, tmp_path):
    generator = MoleculeGenerator(checkpoint, CPU)
    with torch.no_grad():
        generator.model.readout.bias[0] = torch.nan
    outcome = sample_to_file(generator, 4, tmp_path / "a.sdf", Counter())
    assert (outcome.written, outcome.not_finite) == (4, 4)
    assert len(list(MoleculeReader(tmp_path / "a.sdf"))) == 4


def test_interrupted_keeps_what_is_finished(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "_WINDOW_CPU", 5)

    class Interrupting(Counter):
        def advance(self, molecules, share):
            super().advance(molecules, share)
            if self.total > 12:
                os.kill(os.getpid(), signal.SIGINT)

    generator = MoleculeGenerator(checkpoint, CPU)
    outcome = sample_to_file(generator, 30, tmp_path / "a.sdf", Interrupting())
    assert outcome.interrupted
    assert outcome.path.name == "a.partial.sdf"
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.sdf"]
    assert len(list(MoleculeReader(outcome.path))) == outcome.written == 10


def test_bad_requests(checkpoint, tmp_path):
    generator = MoleculeGenerator(checkpoint, CPU)
    for count in (0, -3):
        with pytest.raises(InputError, match="at least one molecule"):
            sample_to_file(generator, count, tmp_path / "a.sdf", Counter())
    with pytest.raises(InputError, match="batch holds at least one"):
        sample_to_file(generator, 3, tmp_path / "a.sdf", Counter(), batch_size=0)
    with pytest.raises(InputError, match=r"must end in \.sdf"):
        sample_to_file(generator, 3, tmp_path / "a.pdb", Counter())
    with pytest.raises(InputError, match="does not exist"):
        sample_to_file(generator, 3, tmp_path / "no" / "a.sdf", Counter())
    with pytest.raises(InputError, match="1 or more atoms"):
        MoleculeGenerator(checkpoint, CPU, sizes=(0, 3))
    assert not list(tmp_path.iterdir())
