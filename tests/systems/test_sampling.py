"""Sampling: what a molecule depends on, exact counts, formats, and that nothing drawn is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CPU, Watcher, tiny

from molgen_energy.chemistry.molfiles import MoleculeReader, MoleculeTextWriter
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules, offsets_from_sizes
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules import sampling
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.systems.molecules.shards import MoleculeShards
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training.checkpoint import load_checkpoint, save_checkpoint
from molgen_energy.training.loop import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A little trained, so that it neither diverges nor copies; 20 diffusion steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(training__steps=60, process__steps=20, training__warmup_steps=5)
    train(MoleculeTask(config, CPU), run, Watcher())
    moved = tmp_path_factory.mktemp("elsewhere") / "checkpoint"
    shutil.copytree(run / "checkpoints" / "last", moved)  # nothing but its own folder
    return load_checkpoint(moved)


@pytest.fixture(autouse=True)
def one_thread():
    """So that interruptions come at a known place."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counter:
    """Of molecules that are drawn; sends a signal to this process when there are so many."""

    def __init__(self, stop_at=None):
        self.total, self.before, self.stop_at = 0.0, 0, stop_at

    def found(self, molecules):
        self.before = molecules

    def interrupted(self, molecules):
        self.kept = molecules

    def advance(self, molecules, share):
        self.total += molecules * share
        if self.stop_at is not None and self.total > self.stop_at:
            self.stop_at = None
            os.kill(os.getpid(), signal.SIGINT)


def draw(checkpoint, path: Path, count=30, batch_size=None, resume=False, **options):
    generator = MoleculeGenerator(checkpoint, CPU, **options)
    counter = Counter()
    outcome = sample_to_file(generator, count, path, counter, batch_size, resume)
    assert counter.total == pytest.approx(count - counter.before)
    assert outcome.drawn == count - counter.before
    return outcome


FEW = {"sampler": "ddim", "steps": 3}


def interrupt(checkpoint, path: Path, at=12, count=30, batch_size=5, **options):
    """Begin, and stop after so many molecules."""
    options = FEW | options
    generator = MoleculeGenerator(checkpoint, CPU, **options)
    return sample_to_file(generator, count, path, Counter(at), batch_size)


def read(path: Path):
    with MoleculeFile(path) as file:
        return file.load()


@pytest.mark.slow
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
    assert torch.equal(model["embed.weight"], checkpoint.read_tensors("ema")["embed.weight"])
    assert not torch.equal(model["embed.weight"], checkpoint.read_tensors("model")["embed.weight"])


def test_molecules_that_diverge_are_counted_and_written(checkpoint, tmp_path):
    generator = MoleculeGenerator(checkpoint, CPU)
    with torch.no_grad():
        generator.model.readout.bias[0] = torch.nan
    outcome = sample_to_file(generator, 4, tmp_path / "a.sdf", Counter())
    assert (outcome.written, outcome.not_finite) == (4, 4)
    assert len(list(MoleculeReader(tmp_path / "a.sdf"))) == 4


@pytest.mark.parametrize("suffix", ["sdf", "xyz", "h5"])
@pytest.mark.parametrize("at", [7, 26])
def test_interrupted_and_resumed_equals_unbroken(checkpoint, tmp_path, monkeypatch, suffix, at):
    monkeypatch.setattr(sampling, "_WINDOW_CPU", 20)
    options = {"sampler": "ddim", "steps": 9, "eta": 0.5, "seed": 3, "sizes": (4, 18)}
    draw(checkpoint, tmp_path / f"whole.{suffix}", batch_size=5, **options)
    path = tmp_path / f"a.{suffix}"
    outcome = interrupt(checkpoint, path, at, **options)
    assert outcome.interrupted
    assert outcome.written == at // 5 * 5
    # What is finished is also there at once, called by its own numbers.
    assert outcome.path == tmp_path / f"a.partial.{suffix}"
    assert sampling._count(outcome.path) == outcome.written
    if suffix == "sdf":
        whole, part = ((tmp_path / name).read_text() for name in ("whole.sdf", "a.partial.sdf"))
        of_whole = {text.partition("\n")[0]: text for text in whole.split("$$$$\n")[1:]}
        for text in part.split("$$$$\n")[1:]:
            assert of_whole[text.partition("\n")[0]] == text
    assert not path.exists()
    monkeypatch.setattr(sampling, "_WINDOW_CPU", 7)  # as it was begun, not as it would be now
    outcome = draw(checkpoint, path, resume=True, **options)
    assert (outcome.written, outcome.drawn) == (30, 30 - at // 5 * 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"whole.{suffix}"]
    assert path.read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_interrupted_before_anything_is_finished_leaves_nothing(checkpoint, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt(checkpoint, tmp_path / "a.sdf", at=2)
    assert not list(tmp_path.iterdir())


def test_interrupted_while_the_file_is_written(checkpoint, tmp_path, monkeypatch):
    """Nothing is drawn again."""
    draw(checkpoint, tmp_path / "whole.sdf", **FEW)
    append = MoleculeTextWriter.append

    def interrupted(*arguments):
        monkeypatch.setattr(MoleculeTextWriter, "append", append)
        raise KeyboardInterrupt

    monkeypatch.setattr(MoleculeTextWriter, "append", interrupted)
    outcome = interrupt(checkpoint, tmp_path / "a.sdf", at=None, batch_size=None)
    assert outcome.interrupted
    assert outcome.written == 30
    assert draw(checkpoint, tmp_path / "a.sdf", resume=True, **FEW).drawn == 0
    assert (tmp_path / "a.sdf").read_bytes() == (tmp_path / "whole.sdf").read_bytes()


DAMAGES = {
    "a flipped bit": lambda content, other: content[:60] + bytes([content[60] ^ 4]) + content[61:],
    "cut off": lambda content, other: content[:-1],
    "empty": lambda content, other: b"",
    "another batch": lambda content, other: other,
    "no digest": lambda content, other: bytes(32) + content[32:],
}


@pytest.mark.parametrize(
    ("damage", "when"), [*((damage, "before") for damage in DAMAGES), ("empty", "while writing")]
)
def test_a_damaged_shard_is_drawn_again(checkpoint, tmp_path, monkeypatch, damage, when):
    draw(checkpoint, tmp_path / "whole.sdf", batch_size=5, **FEW)
    path = tmp_path / "a.sdf"

    def spoil():
        first, second, *_ = sorted((tmp_path / "a.sdf.shards").glob("*.shard"))
        first.write_bytes(DAMAGES[damage](first.read_bytes(), second.read_bytes()))

    interrupt(checkpoint, path)
    write = sampling._SamplingRun._write
    if when == "before":
        spoil()
    else:
        monkeypatch.setattr(
            sampling._SamplingRun, "_write", lambda *a, **k: spoil() or write(*a, **k)
        )
    counter = Counter()
    generator = MoleculeGenerator(checkpoint, CPU, **FEW)
    sample_to_file(generator, 30, path, counter, resume=True)
    assert counter.before == 10
    assert counter.total == pytest.approx(20 + 5)
    assert path.read_bytes() == (tmp_path / "whole.sdf").read_bytes()


def test_shards_of_another_job_are_not_trusted(checkpoint, tmp_path):
    """A shard holds the digest of its manifest."""
    for name, seed in (("a", 0), ("b", 1)):
        interrupt(checkpoint, tmp_path / f"{name}.sdf", seed=seed, sizes=(9, 9))
    for shard in (tmp_path / "b.sdf.shards").glob("*.shard"):
        shutil.copy(shard, tmp_path / "a.sdf.shards")
    counter = Counter()
    generator = MoleculeGenerator(checkpoint, CPU, sizes=(9, 9), **FEW)
    sample_to_file(generator, 30, tmp_path / "a.sdf", counter, resume=True)
    assert counter.total == pytest.approx(30)


def test_other_weights_are_refused(checkpoint, tmp_path):
    interrupt(checkpoint, tmp_path / "a.sdf")
    generator = MoleculeGenerator(checkpoint, CPU, **FEW)
    with torch.no_grad():
        generator.model.readout.bias[0] += 1e-6
    with pytest.raises(InputError, match="holds other weights") as refused:
        sample_to_file(generator, 30, tmp_path / "a.sdf", Counter(), resume=True)
    assert str(checkpoint.path.resolve()) in str(refused.value)
    assert len(list((tmp_path / "a.sdf.shards").glob("*.shard"))) == 2


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("count", {"count": 31}),
        ("seed", {"seed": 1}),
        ("n atoms", {"sizes": (9, 12)}),
        ("sampler", {"sampler": "heun"}),
        ("steps", {"steps": 5}),
        ("batch size", {"batch_size": 6}),
        ("low precision", {"low_precision": True}),
        ("temperature", {"temperature": Temperature(0.9, "score", 0.3, 2.0).options}),
        ("sampler", {"sampler": "dpm++", "ancestral_positions": True}),
        ("steps", {"steps": None, "levels": (20, 6)}),
    ],
)
def test_another_job_is_refused(checkpoint, tmp_path, name, changed):
    interrupt(checkpoint, tmp_path / "a.sdf")
    with pytest.raises(InputError, match=f"was begun with {name} .*, which cannot change to"):
        draw(checkpoint, tmp_path / "a.sdf", resume=True, **(FEW | changed))


@pytest.mark.parametrize("suffix", ["sdf", "xyz", "h5"])
def test_temperature_is_resumed_and_written(checkpoint, tmp_path, suffix):
    """Resumed as the uninterrupted job, and other molecules than without."""
    options = {
        "sampler": "ancestral", "steps": 6, "sizes": (4, 12),
        "temperature": Temperature(0.5, "noise", None, 4.0, final_noise=0.0).options,
    }  # fmt: skip
    draw(checkpoint, tmp_path / f"whole.{suffix}", batch_size=5, **options)
    interrupt(checkpoint, tmp_path / f"a.{suffix}", **options)
    other = options | {"temperature": Temperature(0.5, "noise", None, 5.0, final_noise=0.0).options}
    with pytest.raises(InputError, match=r"temperature range \[None, 4.0\], which cannot change"):
        draw(checkpoint, tmp_path / f"a.{suffix}", resume=True, **other)
    draw(checkpoint, tmp_path / f"a.{suffix}", resume=True, **options)
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    assert (tmp_path / f"a.{suffix}").read_bytes() == whole
    draw(checkpoint, tmp_path / f"plain.{suffix}", **options | {"temperature": None})
    plain = (tmp_path / f"plain.{suffix}").read_bytes()
    assert b"sampling_temperature" in whole and b"sampling_final_noise" in whole
    assert b"sampling_temperature_of" not in whole  # the default
    assert b"sampling_" not in plain
    if suffix == "h5":
        cold, warm = read(tmp_path / "whole.h5"), read(tmp_path / "plain.h5")
        assert not np.array_equal(cold.positions, warm.positions)
    else:
        assert len(list(MoleculeReader(tmp_path / f"whole.{suffix}"))) == 30


def test_chosen_levels_are_resumed_and_written(checkpoint, tmp_path):
    options = {"sampler": "sde-dpm++", "steps": None, "levels": (20, 10, 3)}
    draw(checkpoint, tmp_path / "whole.h5", batch_size=5, **options)
    interrupt(checkpoint, tmp_path / "a.h5", **options)
    with pytest.raises(InputError, match=r"levels .* cannot change to"):
        draw(checkpoint, tmp_path / "a.h5", resume=True, **options | {"levels": (20, 10, 4)})
    draw(checkpoint, tmp_path / "a.h5", resume=True, **options)
    whole = (tmp_path / "whole.h5").read_bytes()
    assert (tmp_path / "a.h5").read_bytes() == whole
    assert b'"levels": "20,10,3"' in whole


STORED = {
    "sampler": "ddim", "levels": [20, 9, 2], "eta": 0.5, "temperature": 0.9,
    "final_noise": 0.5, "spacing": "quadratic",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("ddim", (20, 9, 2), 3, None, 0.5, 0.9, 0.5)),
        ({"temperature": {"temperature": 0.8}}, ("ddim", (20, 9, 2), 3, None, 0.5, 0.8, 0.5)),
        ({"temperature": {"final_noise": 1.0}}, ("ddim", (20, 9, 2), 3, None, 0.5, 0.9, 1)),
        ({"steps": 7}, ("ddim", None, 7, "quadratic", 0.5, 0.9, 0.5)),
        ({"spacing": "log"}, ("ddim", None, 20, None, 0.5, 0.9, 0.5)),
        ({"levels": (20, 5)}, ("ddim", (20, 5), 2, None, 0.5, 0.9, 0.5)),
        ({"eta": 0.1}, ("ddim", (20, 9, 2), 3, None, 0.1, 0.9, 0.5)),
        ({"sampler": "heun"}, ("heun", (20, 9, 2), 3, None, None, 1, 1)),
        ({"sampler": "ddim"}, ("ddim", (20, 9, 2), 3, None, 0.0, 1, 1)),
    ],
)
def test_options_replace_what_a_checkpoint_stores(checkpoint, options, expected):
    """A named sampler also replaces the noise of the stored one, which it may not have."""
    tuned = replace(checkpoint, state=checkpoint.state | {"sampling": STORED})
    generator = MoleculeGenerator(tuned, CPU, **options)
    sampler, noise = generator.sampler, generator.sampler.temperature
    found = (
        generator.sampler_name, sampler.levels, sampler.steps, sampler.spacing, sampler.eta,
        noise.value, noise.final_noise,
    )  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"steps": 5000}, "--steps 5000: the network was trained with 20 steps; choose 1 to 20"),
        ({"levels": [9, 12]}, "--levels 9,12: expected noise levels in descending order"),
        ({"eta": 0.5}, "--eta goes with --sampler ddim"),
    ],
)
def test_what_a_checkpoint_stores_is_refused_with_its_file(checkpoint, stored, message):
    """Options that replace it are not."""
    edited = replace(checkpoint, state=checkpoint.state | {"sampling": stored})
    begin = f"{checkpoint.path / 'state.yaml'}: key 'sampling': {message}"
    with pytest.raises(InputError, match=re.escape(begin)):
        MoleculeGenerator(edited, CPU)
    MoleculeGenerator(edited, CPU, sampler="heun", steps=3)


def test_ancestral_positions_are_resumed_and_written(checkpoint, tmp_path):
    options = {"sampler": "dpm++", "steps": 4, "ancestral_positions": True}
    draw(checkpoint, tmp_path / "whole.h5", batch_size=5, **options)
    interrupt(checkpoint, tmp_path / "a.h5", **options)
    with pytest.raises(InputError, match="ancestral positions True, which cannot change to False"):
        draw(checkpoint, tmp_path / "a.h5", resume=True, sampler="dpm++", steps=4)
    draw(checkpoint, tmp_path / "a.h5", resume=True, **options)
    whole = (tmp_path / "whole.h5").read_bytes()
    assert (tmp_path / "a.h5").read_bytes() == whole
    assert b'"ancestral_positions": "yes"' in whole
    draw(checkpoint, tmp_path / "plain.h5", sampler="dpm++", steps=4)
    assert b"ancestral_positions" not in (tmp_path / "plain.h5").read_bytes()
    mixed, plain = read(tmp_path / "whole.h5"), read(tmp_path / "plain.h5")
    assert not np.array_equal(mixed.positions, plain.positions)


def test_a_job_that_was_begun_without_temperature_is_resumed(checkpoint, tmp_path):
    """Its manifest lacks the options; shards hold the digest of the manifest."""
    draw(checkpoint, tmp_path / "whole.sdf", batch_size=5, **FEW)
    path = tmp_path / "a.sdf"
    generator = MoleculeGenerator(checkpoint, CPU, **FEW)
    job = sampling._job(generator, 30, 5)
    MoleculeShards.create(path, job).close()
    manifest = tmp_path / "a.sdf.shards" / "manifest.yaml"
    text = manifest.read_text()
    start, end = text.index("temperature:"), text.index("units:")
    manifest.write_text(text[:start] + text[end:])
    draw(checkpoint, path, resume=True, **FEW)
    assert path.read_bytes() == (tmp_path / "whole.sdf").read_bytes()


def test_what_was_begun_is_not_begun_again(checkpoint, tmp_path):
    interrupt(checkpoint, tmp_path / "a.sdf")
    with pytest.raises(InputError, match=r"continue with `molgen-energy sample --resume .*a\.sdf`"):
        draw(checkpoint, tmp_path / "a.sdf")
    assert len(list((tmp_path / "a.sdf.shards").glob("*.shard"))) == 2


def test_nothing_to_resume(checkpoint, tmp_path):
    path = tmp_path / "a.sdf"
    with pytest.raises(InputError, match="does not exist; there is nothing to resume"):
        draw(checkpoint, path, resume=True)
    draw(checkpoint, path, count=2)
    with pytest.raises(InputError, match=r"a\.sdf is complete"):
        draw(checkpoint, path, count=2, resume=True)
    (tmp_path / "a.sdf.shards").mkdir()
    with pytest.raises(InputError, match=r"lacks manifest\.yaml"):
        draw(checkpoint, path, resume=True)
    for text in ("{", "count: 3", "[]", "format: 2\n"):
        (tmp_path / "a.sdf.shards" / "manifest.yaml").write_text(text)
        with pytest.raises(InputError, match=r"the manifest is damaged; remove"):
            draw(checkpoint, path, resume=True)


def test_marks_of_processes_of_an_earlier_job_are_removed(checkpoint, tmp_path):
    interrupt(checkpoint, tmp_path / "a.sdf")
    with MoleculeShards.open(tmp_path / "a.sdf", lead=False) as shards:
        shards.mark_done(1)
    with MoleculeShards.open(tmp_path / "a.sdf", lead=False) as shards:
        assert shards.is_done(1)
    with MoleculeShards.open(tmp_path / "a.sdf", lead=True) as shards:
        assert not shards.is_done(1)


def test_one_process_at_a_time(checkpoint, tmp_path):
    pytest.importorskip("fcntl")
    interrupt(checkpoint, tmp_path / "a.sdf")
    with (
        MoleculeShards.open(tmp_path / "a.sdf", lead=True),
        pytest.raises(InputError, match="is in use by another process"),
    ):
        draw(checkpoint, tmp_path / "a.sdf", resume=True, **FEW)
    assert draw(checkpoint, tmp_path / "a.sdf", resume=True, **FEW).written == 30


@pytest.mark.parametrize("suffix", ["sdf", "xyz", "h5"])
def test_a_short_file_is_never_called_finished(checkpoint, tmp_path, monkeypatch, suffix):
    """Should a record be lost on the way to the disk, it is found as the file is read back."""
    if suffix == "h5":
        append = MoleculeWriter.append

        def lossy(self, molecules):
            append(self, molecules.select(np.arange(1, len(molecules))))
            self.count += 1

        monkeypatch.setattr(MoleculeWriter, "append", lossy)
        monkeypatch.setattr(
            MoleculeWriter, "set_split",
            lambda self, split: self._file.create_dataset("split", data=split[1:]),
        )  # fmt: skip
    else:
        append = MoleculeTextWriter.append

        def lossy(self, molecules, numbers):
            append(self, molecules.select(np.arange(1, len(molecules))), numbers[1:])
            self.count += 1

        monkeypatch.setattr(MoleculeTextWriter, "append", lossy)
    with pytest.raises(OSError, match="of 6 molecules 6 were written and 5 can be read back"):
        draw(checkpoint, tmp_path / f"a.{suffix}", count=6)
    assert not (tmp_path / f"a.{suffix}").exists()
    monkeypatch.undo()
    assert draw(checkpoint, tmp_path / f"a.{suffix}", count=6, resume=True).drawn == 0


def test_a_molecule_that_is_lost_or_doubled_is_noticed(checkpoint, tmp_path, monkeypatch):
    def doubled(sizes, job):
        yield np.array([0, 1, 2])
        yield np.array([2, 3, 4])

    monkeypatch.setattr(sampling, "_by_size", doubled)
    for count in (5, 6):
        with pytest.raises(OSError, match=f"of {count} molecules 6 were written"):
            draw_anyway = MoleculeGenerator(checkpoint, CPU)
            sample_to_file(draw_anyway, count, tmp_path / f"{count}.sdf", Counter())


def test_batches_are_full_and_of_one_size(checkpoint, tmp_path):
    """By default some sixty molecules of QM9's sizes, within a window of 1,024, sizes mixed."""
    generator = MoleculeGenerator(checkpoint, CPU)
    job = sampling._job(generator, 3000, None)
    with MoleculeShards.create(tmp_path / "a.sdf", job) as shards:
        run = sampling._SamplingRun(generator, shards, tmp_path / "a.sdf", Counter())
        batches = list(run.in_turn())
    numbers = np.concatenate([batch.numbers for batch in batches])
    assert sorted(numbers.tolist()) == list(range(3000))
    assert np.median([len(batch.numbers) for batch in batches]) > 45
    sizes = [generator.sizes(torch.from_numpy(batch.numbers)).numpy() for batch in batches]
    padded = sum(len(s) * s.max() ** 2 for s in sizes)
    assert padded < 1.15 * sum((s**2).sum() for s in sizes)
    first = np.concatenate(sizes[: len(sizes) // 6])
    assert abs(first.mean() - np.concatenate(sizes).mean()) < 1  # by ascending size it would be 2.5


def test_memory_does_not_grow_with_the_number(checkpoint, tmp_path, monkeypatch):
    """With a network that takes no time: a window of molecules is held, and no more."""
    generator = MoleculeGenerator(checkpoint, CPU)

    def draw_at_once(numbers, advance):
        sizes = generator.sizes(numbers).numpy()
        atoms = int(sizes.sum())
        return Molecules(np.ones((atoms, 3), "f4"), np.ones(atoms, "u1"), offsets_from_sizes(sizes))

    monkeypatch.setattr(generator, "draw", draw_at_once)
    peaks = []
    for count in (2048, 10240):
        tracemalloc.start()
        sample_to_file(generator, count, tmp_path / f"{count}.h5", Counter())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(read(tmp_path / f"{count}.h5")) == count
    assert peaks[1] < 1.5 * peaks[0] + 500_000


def test_a_batch_that_does_not_fit_is_drawn_in_halves(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path / "whole.h5", batch_size=12, **FEW)
    original, drawn = MoleculeGenerator.draw, []

    def draws(self, numbers, advance):
        drawn.append(len(numbers))
        if len(numbers) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, numbers, advance)

    monkeypatch.setattr(MoleculeGenerator, "draw", draws)
    draw(checkpoint, tmp_path / "halves.h5", batch_size=12, **FEW)
    assert drawn[:5] == [12, 6, 3, 3, 6]
    whole, halves = (read(tmp_path / f"{name}.h5") for name in ("whole", "halves"))
    assert np.array_equal(whole.atomic_numbers, halves.atomic_numbers)
    np.testing.assert_allclose(whole.positions, halves.positions, atol=1e-3)


def test_a_batch_may_be_larger_than_a_window(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "_WINDOW_CPU", 8)
    original, drawn = MoleculeGenerator.draw, []

    def draws(self, numbers, advance):
        drawn.append(len(numbers))
        return original(self, numbers, advance)

    monkeypatch.setattr(MoleculeGenerator, "draw", draws)
    draw(checkpoint, tmp_path / "a.xyz", batch_size=20, **FEW)
    assert drawn == [20, 10]


def test_a_checkpoint_that_a_trainer_replaces_is_read_whole(tmp_path):
    """Weights and texts are of one step, though another comes every moment."""
    config, stop = tiny(), threading.Event()

    def save(step):
        weights = {"ema": {"x": torch.full((50_000,), float(step))}}
        save_checkpoint(
            tmp_path / "checkpoints" / "last", config, {"progress": {"step": step}}, weights
        )

    def train():
        step = 1
        while not stop.is_set():
            save(step := step + 1)

    save(1)
    trainer = threading.Thread(target=train)
    trainer.start()
    steps = set()
    try:
        for _ in range(60):
            try:
                loaded = load_checkpoint(tmp_path, weights=["ema"])
            except InputError as error:
                assert "is replaced faster than it can be read" in str(error)
                continue
            steps.add(loaded.state["progress"]["step"])
            assert loaded.read_tensors("ema")["x"][0] == loaded.state["progress"]["step"]
    finally:
        stop.set()
        trainer.join()
    assert len(steps) > 3
    with pytest.raises(InputError, match=r"lacks model\.safetensors"):
        load_checkpoint(tmp_path, weights=["model"])


# From the shell: real signals, real processes, and the file of the unbroken run.
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def start(folder: Path, *arguments, processes=1):
    command = [*(TORCHRUN if processes == 2 else ()), "-m", "molgen_energy", "sample", *arguments]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=folder, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip


def stop_half_way(process, shards: Path, number):
    deadline = time.monotonic() + 120
    while len(list(shards.glob("*.shard"))) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert 3 <= len(list(shards.glob("*.shard"))) < MANY["count"] // MANY["batch_size"]
    return stderr


MANY = {"count": 200, "batch_size": 8, "seed": 2}


@pytest.fixture(scope="module")
def many(checkpoint, tmp_path_factory):
    """Arguments of a job of 25 batches, and the content of its file from an unbroken run."""
    path = tmp_path_factory.mktemp("whole") / "whole.sdf"
    draw(checkpoint, path, **MANY)
    options = ("-n", 200, "--checkpoint", checkpoint.path, "--batch-size", 8, "--seed", 2)
    return options, path.read_bytes()


@pytest.mark.slow
def test_killed_and_finished_by_two_processes(many, tmp_path):
    options, whole = many
    process = start(tmp_path, *options)
    stop_half_way(process, tmp_path / "samples.sdf.shards", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["samples.sdf.shards"]
    done = start(tmp_path, "--resume", "samples.sdf", processes=2)
    stderr = done.communicate(timeout=120)[1]
    assert done.returncode == 0, stderr
    assert "of 200 molecules are finished already" in stderr
    assert stderr.count("200 molecules written to samples.sdf") == 1
    assert (tmp_path / "samples.sdf").read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["samples.sdf"]


@pytest.mark.slow
def test_two_processes_interrupted_and_finished_by_one(checkpoint, many, tmp_path):
    options, whole = many
    process = start(tmp_path, *options, processes=2)
    stderr = stop_half_way(process, tmp_path / "samples.sdf.shards", signal.SIGINT)
    assert process.returncode != 0
    found = re.findall(
        r"interrupted: (\d+) of 200 molecules are finished; continue with: molgen-energy sample "
        r"--resume samples\.sdf\nfinished samples are in samples\.partial\.sdf\n",
        stderr,
    )
    assert len(found) == 1
    assert int(found[0]) >= 16
    outcome = draw(checkpoint, tmp_path / "samples.sdf", resume=True, **MANY)
    assert 0 < outcome.drawn <= 200 - int(found[0])
    assert (tmp_path / "samples.sdf").read_bytes() == whole


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
