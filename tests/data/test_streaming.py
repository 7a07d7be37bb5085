"""Data that does not fit in memory: the guarantees of resident data, in bounded memory."""

from __future__ import annotations

import os
import signal
import threading
import time
import tracemalloc
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import config_of
from runs import CPU, Watcher, assert_same_run, tiny

from molgen_energy.data import batches as batching
from molgen_energy.data import hdf5
from molgen_energy.data.batches import (
    BatchIndex,
    ResidentData,
    StreamedData,
    batches_per_epoch,
    padding,
)
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.formats import limits
from molgen_energy.systems.molecules import task as system
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training import devices
from molgen_energy.training.devices import available_memory
from molgen_energy.training.loop import TrainingInterrupted, train

STREAMED = {"data__in_memory": False, "data__window": 128, "training__batch_size": 64}


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert not [thread.name for thread in set(threading.enumerate()) - before]


def repeated(path: Path, molecules: Molecules, times: int) -> Path:
    """The sample several times over: training, validation and test molecules take turns."""
    with MoleculeWriter(path, source="test") as writer:
        for _ in range(times):
            writer.append(molecules)
        split = (np.arange(writer.count) * 7 % 10 > 7).astype(np.uint8)
        split[::50] = 2
        writer.set_split(split)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory, molecules) -> Path:
    """8,000 molecules in three chunks of HDF5, more than its library keeps in memory."""
    return repeated(tmp_path_factory.mktemp("data") / "large.h5", molecules, 4)


def opened(path: Path, molecules=300, batch_size=16, seed=0, make=None) -> StreamedData:
    """Whose windows are the molecules themselves, with their numbers in the file."""
    return StreamedData(
        MoleculeFile(path),
        make or (lambda molecules, numbers, ranks, check_cancelled: (molecules, numbers, ranks)),
        molecules=molecules,
        batch_size=batch_size,
        seed=seed,
    )


@pytest.mark.parametrize("block", [1 << 20, 100])
@pytest.mark.parametrize(
    ("window", "batch_size"), [(300, 16), (100, 7), (5000, 64), (10**9, 1), (900, 10_000)]
)
def test_an_epoch_shows_every_training_molecule_once(large, monkeypatch, window, batch_size, block):
    monkeypatch.setattr(batching, "_BLOCK", block)
    data = opened(large, window, batch_size)
    with MoleculeFile(large) as file:
        train, sizes = file.split_indices("train"), np.diff(file.offsets)
    for epoch in (0, 3):
        seen = []
        batches = data.epoch(epoch)
        assert len(batches) == batches_per_epoch(len(train), batch_size)
        assert data.starts[epoch + 1] - data.starts[epoch] == len(batches)
        for batch in batches:
            molecules, numbers, ranks = data.window(batch.window)
            assert len(molecules) <= max(window, batch_size)
            assert (batch.sizes == sizes[numbers[batch.which]]).all()
            assert (batch.sizes == molecules.sizes[batch.which]).all()
            assert (train[ranks] == numbers).all()
            seen.append(numbers[batch.which])
        assert sorted(np.concatenate(seen).tolist()) == train.tolist()
        assert sum(len(which) < batch_size for which in seen) <= 1
    data.close()


def listed(batches) -> list[tuple[int, list[int]]]:
    return [(batch.window, batch.which.tolist()) for batch in batches]


def test_order_follows_from_seed_and_epoch(large):
    data, again, other = opened(large), opened(large), opened(large, seed=1)
    epochs = [listed(data.epoch(epoch)) for epoch in range(3)]
    assert listed(again.epoch(2)) == epochs[2]

    def shown(data, epoch):
        """Which molecules the first window holds."""
        return data.window(data.epoch(epoch)[0].window)[1].tolist()

    assert len({tuple(shown(*which)) for which in ((data, 0), (data, 1), (other, 0))}) == 3
    assert len({which for epoch in epochs for _, which in [(0, str(epoch))]}) == 3
    for each in (data, again, other):
        each.close()


def test_a_window_comes_from_all_over_the_file(large):
    data = opened(large, molecules=640)
    _, numbers, _ = data.window(0)
    assert 600 < len(numbers) <= 640
    assert np.ptp(numbers) > 6000
    assert (np.histogram(numbers, 8, (0, 8000))[0] > 0).all()
    data.close()


def test_batches_are_a_sequence(large):
    data = opened(large)
    batches = data.epoch(1)
    every = listed(batches)
    assert listed([batches[k] for k in (-1, 0, 70)]) == [every[k] for k in (-1, 0, 70)]
    assert listed(batches[70:]) == every[70:]
    assert listed(batches[70:][5:40:3]) == every[70:][5:40:3]
    with pytest.raises(IndexError):
        batches[len(batches)]
    data.close()


def test_resuming_reads_no_window_before(large):
    made = []
    data = opened(large, make=lambda molecules, numbers, ranks, check_cancelled: made.append(ranks))
    batches = data.epoch(2)
    place = next(k for k, batch in enumerate(batches) if batch.window == batches[0].window + 3)
    for batch in batches[place : place + 2]:
        data.window(batch.window)
    data.close()
    expected = [data._content(batches[0].window + k)[1].tolist() for k in (3, 4)]
    assert [ranks.tolist() for ranks in made] in (expected, expected[:1])  # 4 is read ahead


def test_any_window_can_be_read(large):
    """A window that was read ahead and is not needed is dropped."""
    data = opened(large)
    for number in (0, 7, 8, 3, 3, 40):
        assert (data.window(number)[1] == data._content(number)[0]).all()
    data.close()


def test_two_windows_are_in_memory(large):
    class Window:
        pass

    alive, most = weakref.WeakSet(), []

    def make(molecules, numbers, ranks, check_cancelled):
        window = Window()
        window.molecules = molecules
        alive.add(window)
        most.append(len(alive))
        return window

    data = opened(large, make=make)
    for window in (*range(12), 20, 30, 3):
        data.window(window)
        data._following[1].result()
    data.close()
    assert max(most) == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, large, molecules, monkeypatch):
    monkeypatch.setattr(hdf5, "_SLICE", 10_000)
    monkeypatch.setattr(batching, "_BLOCK", 1000)

    def peak(path: Path) -> int:
        tracemalloc.start()
        data = opened(path, 500, 20)
        data._file.summarize()
        data.sample(500)
        for batch in data.epoch(0)[::50]:
            data.window(batch.window)
        data.close()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    larger = repeated(tmp_path / "larger.h5", molecules, 16)
    peak(large)  # what is made once
    growth = (peak(larger) - peak(large)) / 24_000
    assert growth < 40  # bytes a molecule; positions take 216


def test_little_padding_of_either_kind(large):
    streamed = opened(large, molecules=2000, batch_size=64)
    with MoleculeFile(large) as file:
        sizes = file.sizes(file.split_indices("train"))
    resident = ResidentData(None, sizes, 64, 0)
    for data in (streamed, resident):
        share = padding(data.epoch(0))
        assert 0 < share.atoms < 0.1
        assert share.atoms < share.pairs < 0.2
    streamed.close()


def test_share_of_padding():
    sizes = np.array([3, 4])
    batches = [BatchIndex(0, np.arange(2), sizes), BatchIndex(0, np.arange(2), sizes[::-1])]
    assert padding(batches) == pytest.approx((1 / 8, 7 / 32))


def test_shards_make_up_a_batch():
    batch = BatchIndex(3, np.arange(10, 17), np.arange(7))
    shards = [batch.shard(rank, 3) for rank in range(3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert {shard.window for shard in shards} == {3}
    assert sorted(np.concatenate([shard.which for shard in shards])) == batch.which.tolist()
    assert (shards[1].sizes == shards[1].which - 10).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"training__augment_rotations": True},
        {"loss__springs__family": "lennard_jones", "loss__springs__distance": "features"},
        {"loss__edges__kind": "symmetrized"},  # a table is as wide as its window needs
    ],
    ids=["exponential", "lennard_jones", "symmetrized"],
)
def test_streamed_molecules_are_the_resident_ones(changes):
    """The same loss, but for the order of sums."""
    changes = {"objective__position_weight": 1.0, "training__batch_size": 64} | changes
    resident = MoleculeTask(tiny(**changes), CPU)
    streamed = MoleculeTask(tiny(**STREAMED | changes), CPU)
    scale = resident.config.loss.springs.scale
    assert streamed.config.loss.springs.scale == pytest.approx(scale, rel=1e-9)
    streamed._objective = resident._objective
    assert streamed.state == resident.state
    for batch in streamed.epoch(1)[3:9:2]:
        found = streamed.loss(resident.model, batch, 1)
        ranks = streamed._train._content(batch.window)[1][batch.which]
        same = BatchIndex(0, ranks, batch.sizes)
        expected = resident.loss(resident.model, same, 1)
        assert found.keys() == expected.keys() == {"loss", *resident.loss_terms}
        for name, values in found.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=0)
    model = resident.model
    assert streamed.validation_loss(model) == resident.validation_loss(model)
    streamed.close()


def test_bonds_of_the_file_are_read_with_a_window(tmp_path, molecules):
    """One bond in each molecule, from its first atom to its last, which would not be perceived."""
    last = (molecules.sizes - 1).astype(np.uint16)
    bonds = hdf5.Bonds(
        np.stack([np.zeros_like(last), last], axis=1), np.ones(2000, "u1"), np.arange(2001)
    )
    with MoleculeWriter(tmp_path / "a.h5", source="test") as writer:
        writer.append(
            Molecules(molecules.positions, molecules.atomic_numbers, molecules.offsets, bonds=bonds)
        )
    changes = STREAMED | {"loss__springs__family": "lennard_jones"}
    task = MoleculeTask(tiny(data__path=str(tmp_path / "a.h5"), **changes), CPU)
    batch = task.epoch(0)[5]
    window = task._train.window(batch.window)
    molecules_of_batch = window.data.batch(batch.which)
    state = task.encode(molecules_of_batch)
    molecule, i, j = window.inputs.of(batch.which, molecules_of_batch, state)["bonds"]
    assert molecule.tolist() == list(range(64))
    assert (i == 0).all()
    assert j.tolist() == (batch.sizes - 1).tolist()
    task.close()


def test_means_are_taken_over_a_sample(large, monkeypatch):
    monkeypatch.setattr(system, "_SAMPLE", 640)
    config = tiny(**STREAMED, data__path=str(large))
    read = []
    whole = MoleculeFile.read

    def counted(file, which, *rest):
        read.append(len(which))
        return whole(file, which, *rest)

    sampled = MoleculeTask(config, CPU)
    monkeypatch.setattr(MoleculeFile, "read", counted)
    again = MoleculeTask(config, CPU)
    monkeypatch.undo()
    assert sampled.config == again.config
    assert sum(read[:-2]) == 8000  # one pass over the file, then validation and the sample
    assert 32 == read[-2] < 500 < read[-1] <= 640
    exact = MoleculeTask(config.replaced({"data.in_memory": True}), CPU)
    scale = exact.config.loss.springs.scale
    assert sampled.config.loss.springs.scale != pytest.approx(scale, rel=1e-9)
    assert sampled.config.loss.springs.scale == pytest.approx(scale, rel=0.05)
    for task in (sampled, again):
        task.close()


@pytest.mark.slow
def test_streamed_it_learns(tmp_path):
    changes = STREAMED | {"training__batch_size": 32, "training__warmup_steps": 10}
    config = tiny(training__steps=150, **changes)
    task = MoleculeTask(config, CPU)
    before = task.validation_loss(task.model)
    assert train(task, tmp_path / "run", Watcher()).valid_loss < 0.6 * before


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """Twenty steps of 8 windows of 2 batches, so that a second epoch is begun."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(MoleculeTask(tiny(training__steps=20, **STREAMED), CPU), run, Watcher())
    return run


@pytest.mark.parametrize("at", [1, 6, 16, 17])
def test_streamed_interrupted_and_resumed_equals_unbroken(unbroken, tmp_path, at):
    run = tmp_path / "run"
    watcher = Watcher({at: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted, match=f"step {at} of 20"):
        train(MoleculeTask(tiny(training__steps=20, **STREAMED), CPU), run, watcher)
    train(
        MoleculeTask(config_of(run), CPU),
        run,
        Watcher(),
        resume=True,
    )
    assert_same_run(unbroken, run)


def test_a_run_stays_resident_or_streamed(tmp_path, monkeypatch):
    """`auto` is resolved once, by a quarter of what is available, where the data is not small."""
    needed = 13 * 1000 * 18
    monkeypatch.setattr(system, "_SMALL", 0)

    def resolved(available, **changes):
        monkeypatch.setattr(system, "available_memory", lambda device: available)
        task = MoleculeTask(tiny(**changes), CPU)
        task.close()
        return task.config.data.in_memory

    assert resolved(None) is resolved(10 * needed) is True
    assert resolved(3 * needed) is resolved(1000) is False
    assert resolved(6 * needed) is True
    assert resolved(6 * needed, loss__edges__kind="bonds") is False  # bonds take more
    assert resolved(10 * needed, loss__edges__kind="symmetrized") is False  # tables even more
    assert resolved(1000, data__in_memory=True) is True
    run = tmp_path / "run"
    train(MoleculeTask(tiny(training__steps=1), CPU), run, Watcher())
    config = config_of(run)
    assert config.data.in_memory is False
    monkeypatch.undo()
    with_memory = MoleculeTask(config, CPU)
    assert with_memory.config.data.in_memory is False
    with_memory.close()


def test_available_memory():
    found = available_memory(CPU)
    assert found is None or 1 << 20 < found < 1 << 60


def poisoned(large: Path, path: Path) -> tuple[Path, MoleculeTask, int]:
    """A task whose file got a NaN after it was opened, and its molecule, of the third window."""
    path.write_bytes(large.read_bytes())
    task = MoleculeTask(
        tiny(training__steps=100, data__path=str(path), **STREAMED | {"data__window": 512}), CPU
    )
    numbers = task._train._content(2)[0]
    molecule = int(numbers[numbers < 3000][5])  # in a chunk that is not in memory
    with h5py.File(large) as file:
        atom = int(file["offsets"][molecule])
        chunk = file["positions"].id.get_chunk_info(0)
    assert atom < 65_536
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset + atom * 12)
        raw.write(np.float32(np.nan).tobytes())
    return path, task, molecule + 1


def test_nan_in_the_third_window_names_the_molecule(tmp_path, large):
    path, task, number = poisoned(large, tmp_path / "a.h5")
    watcher = Watcher()
    with pytest.raises(InputError) as caught:
        train(task, tmp_path / "run", watcher)
    expected = f"{path}: record {number}: data set 'positions': expected finite numbers, found nan"
    assert str(caught.value).startswith(expected)
    assert watcher.steps[-1] == 2 * 512 / 64  # what was whole was trained on
    with pytest.raises(InputError, match=f"record {number}: data set 'positions'"):
        MoleculeTask(config_of(tmp_path / "run"), CPU)


def test_a_file_that_breaks_off_on_the_way(tmp_path, large):
    path = tmp_path / "a.h5"
    path.write_bytes(large.read_bytes())
    config = tiny(training__steps=100, data__path=str(path), **STREAMED)
    watcher = Watcher({4: lambda: os.truncate(path, 100_000)})
    with pytest.raises(InputError, match=r"a\.h5: molecules \d+ to \d+ cannot be read") as caught:
        train(MoleculeTask(config, CPU), tmp_path / "run", watcher)
    assert "\n" not in str(caught.value)
    assert 4 <= watcher.steps[-1] < 10


def test_coincident_atoms_of_a_window_are_named(tmp_path, molecules):
    """By their number in the file, when the window is read."""
    path = repeated(tmp_path / "a.h5", molecules, 1)
    with h5py.File(path, "r+") as file:
        at = int(file["offsets"][1234])
        file["positions"][at] = file["positions"][at + 1]
        file["split"][1234] = 0
    changes = STREAMED | {"loss__edges__kind": "symmetrized", "data__path": str(path)}
    given = {"loss__springs__scale": 10.0, "objective__position_weight": 1.0}  # no sample is read
    task = MoleculeTask(tiny(**changes, **given), CPU)
    windows = {batch.window for batch in task.epoch(0)}
    (broken,) = [window for window in windows if 1234 in task._train._content(window)[0]]
    with pytest.raises(InputError, match=r"a\.h5: molecule 1235: two atoms are closer than"):
        task._train.window(broken)
    task.close()


def slow(monkeypatch, task: MoleculeTask) -> threading.Event:
    """From now on no reading ends by itself; the event says that one has begun."""
    begun, whole = threading.Event(), MoleculeFile.read

    def read(file, which, columns, check_cancelled):
        if threading.current_thread() is threading.main_thread():
            return whole(file, which, columns, check_cancelled)
        begun.set()
        while True:
            check_cancelled()
            time.sleep(0.01)

    monkeypatch.setattr(MoleculeFile, "read", read)
    return begun


def test_interrupted_while_a_window_is_read_it_stops(tmp_path, monkeypatch):
    """Reading ahead is cancelled, not waited for."""
    task = MoleculeTask(tiny(training__steps=20, **STREAMED), CPU)
    task._train.window(0)
    task._train._following[1].result()
    begun = slow(monkeypatch, task)

    def interrupt():
        assert begun.wait(10)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(
        TrainingInterrupted, match="step 3 of 20"
    ):  # the first of window 1; 2 is being read
        train(task, tmp_path / "run", Watcher({3: interrupt}))


def test_ctrl_c_twice_ends_waiting(tmp_path, monkeypatch):
    task = MoleculeTask(tiny(training__steps=20, **STREAMED), CPU)
    begun = slow(monkeypatch, task)

    def interrupt():
        assert begun.wait(10)
        for _ in range(2):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path / "run", Watcher())
    thread.join()


def test_pages_of_files_are_no_memory_in_use(monkeypatch):
    """In a container that has read large files nearly all of its limit counts as used."""
    files = {
        "/proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n",
        "/sys/fs/cgroup/memory.max": "8000000000\n",
        "/sys/fs/cgroup/memory.current": "7900000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1000000000\ninactive_file 6500000000\n",
    }
    monkeypatch.setattr(limits, "system_text", lambda path: files.get(str(path), "").strip())
    assert devices.available_memory(CPU) == 6_600_000_000


def test_small_data_stay_in_memory_whatever_else_runs(monkeypatch):
    monkeypatch.setattr(system, "available_memory", lambda device: 1)
    assert MoleculeTask(tiny(), CPU).config.data.in_memory is True
