"""Ragged molecules, the HDF5 store, batches."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from molgen_energy.data import hdf5
from molgen_energy.data.batches import DeviceMolecules, epoch_batches
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import (
    Molecule,
    Molecules,
    Property,
    batch_by_size,
    batch_with_least_work,
)
from molgen_energy.data.splits import random_split
from molgen_energy.errors import InputError


@pytest.fixture
def bonded() -> Molecules:
    """Three molecules with bonds and charges, one without any bond."""

    def one(size, edges):
        rng = np.random.default_rng(size)
        return Molecule(
            rng.standard_normal((size, 3)).astype("f4"),
            rng.integers(1, 9, size).astype("u1"),
            rng.integers(-1, 2, size).astype("i1"),
            np.array(edges, "u2").reshape(-1, 2),
            np.arange(1, len(edges) + 1).astype("u1"),
        )

    return Molecules.from_list([one(3, [(0, 1), (1, 2)]), one(1, []), one(2, [(0, 1)])])


def assert_same(a: Molecules, b: Molecules) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in vars(x):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))


def test_select_keeps_everything(bonded):
    order = np.array([2, 0, 2])
    assert_same(bonded.select(order), Molecules.from_list([bonded[i] for i in order]))


def test_padded(bonded):
    positions, numbers = bonded.padded()
    assert positions.shape == (3, 3, 3)
    assert (numbers[1] > 0).tolist() == [True, False, False]
    np.testing.assert_array_equal(positions[2, :2], bonded[2].positions)
    assert (positions[1, 1:] == 0).all()


def test_store_round_trip_in_pieces(tmp_path, bonded):
    path = tmp_path / "a.h5"
    with MoleculeWriter(path, source="test") as writer:
        writer.append(bonded)
        writer.append(bonded.select(np.array([1, 2])))
        writer.set_split(np.array([0, 0, 1, 2, 0], "u1"))
    with MoleculeFile(path) as file:
        assert file.source == "test"
        everything = bonded.select(np.array([0, 1, 2, 1, 2]))
        assert_same(file.load(), everything)
        assert_same(file.load("train"), everything.select(np.array([0, 1, 4])))
        assert_same(file.slice(2, 4), everything.select(np.array([2, 3])))
        pieces = list(file.chunks(2, "train"))
        assert [len(piece) for piece in pieces] == [2, 1]


def test_store_carries_properties_with_units(sample_path):
    with MoleculeFile(sample_path) as file:
        methane_like = file.load().properties["gap"]
        assert methane_like.unit == "hartree"
        assert 0.1 < methane_like.values.mean() < 0.4
        assert [len(file.split_indices(s)) for s in ("train", "valid", "test")] == [1000, 200, 800]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failed_write_leaves_the_old_file(tmp_path, bonded, error):
    path = tmp_path / "a.h5"
    path.write_bytes(b"old")
    with pytest.raises(error), MoleculeWriter(path, source="x") as writer:
        writer.append(bonded)
        raise error
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_is_a_system_error():
    file = hdf5.DeferredErrorFile(Path("/dev/full"))
    file.check()
    assert file.write(b"12345") == 5
    with pytest.raises(OSError, match="No space left") as caught:
        file.check()
    assert caught.value.errno == errno.ENOSPC


def edited(path: Path, sample_path: Path, edit) -> Path:
    path.write_bytes(sample_path.read_bytes())
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def _newer(file):
    file.attrs["schema"] = 99


def _foreign(file):
    del file.attrs["schema"]


def _other_system(file):
    file.attrs["system"] = "spins"


def _no_positions(file):
    del file["positions"]


def _short(file):
    file["positions"].resize(100, axis=0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_newer, "schema 99, this version reads schema 1; upgrade"),
        (_foreign, "not written by molgen-energy"),
        (_other_system, "holds spins, not molecules"),
        (_no_positions, "lacks the data set 'positions'"),
        (_short, r"'positions': expected .* with N_total = 35953, found float32 \(100, 3\)"),
    ],
)
def test_unfit_files_are_refused(tmp_path, sample_path, edit, message):
    with pytest.raises(InputError, match=message):
        MoleculeFile(edited(tmp_path / "a.h5", sample_path, edit))


def test_truncated_missing_and_foreign_files(tmp_path, sample_path):
    path = tmp_path / "a.h5"
    with pytest.raises(InputError, match="does not exist; make it with"):
        MoleculeFile(path)
    path.write_bytes(sample_path.read_bytes()[:200_000])
    with pytest.raises(InputError, match="is cut off"):
        MoleculeFile(path)
    path.write_text("hello")
    with pytest.raises(InputError, match="not a readable HDF5"):
        MoleculeFile(path)


def test_nan_names_the_molecule(tmp_path, sample_path):
    def poison(file):
        file["positions"][int(file["offsets"][41])] = np.nan

    path = edited(tmp_path / "a.h5", sample_path, poison)
    with (
        MoleculeFile(path) as file,
        pytest.raises(InputError, match=r"record 42: .*'positions'"),
    ):
        file.load()


@pytest.fixture
def pieced(tmp_path, bonded, monkeypatch):
    """Sixty molecules with bonds, read by slices of at most 20 atoms."""
    monkeypatch.setattr(hdf5, "_SLICE", 20)
    monkeypatch.setattr(hdf5, "_GAP", 4)
    everything = bonded.select(np.random.default_rng(0).integers(0, 3, 60))
    with MoleculeWriter(tmp_path / "a.h5", source="test") as writer:
        writer.append(everything)
        writer.set_split((np.arange(60) % 4 == 3).astype("u1"))
    with MoleculeFile(tmp_path / "a.h5") as file:
        yield file, everything


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_reading_some_is_selecting_them(pieced, rng, share):
    file, everything = pieced
    which = np.flatnonzero(rng.random(60) < share)
    some, with_bonds = everything.select(which), file.read(which, columns=["bonds"])
    assert_same(replace(with_bonds, formal_charges=some.formal_charges), some)
    assert file.read(which).bonds is None
    assert file.sizes(which).tolist() == some.sizes.tolist()


def test_a_run_is_one_slice_of_each_data_set(sample_path, monkeypatch):
    """So are its training molecules, with others between them."""
    slices = []
    with MoleculeFile(sample_path) as file:
        fill = MoleculeFile._fill
        monkeypatch.setattr(
            MoleculeFile, "_fill", lambda *given: slices.append(given[2]) or fill(*given)
        )
        file.read(np.arange(100, 900))
        file.read(np.arange(100, 900, 3))
        assert slices == ["positions", "atomic_numbers"] * 2
        file.read(np.array([3, 1999]))
        assert slices[4:] == ["positions", "atomic_numbers"] * 2


def test_survey(pieced, monkeypatch):
    file, everything = pieced
    summary = file.summarize()
    train = everything.select(file.split_indices("train"))
    assert summary.training_molecules == 45
    assert summary.size_histogram == {
        size: int((train.sizes == size).sum()) for size in np.unique(train.sizes)
    }
    for element, atom in summary.first_atoms.items():
        assert atom == np.flatnonzero(everything.atomic_numbers == element)[0]
    assert set(summary.first_atoms) == set(everything.atomic_numbers)
    monkeypatch.setattr(hdf5, "_SLICE", 7)
    assert file.summarize() == summary  # wherever pieces are cut


def test_the_fingerprint_is_of_training_molecules(tmp_path, pieced):
    file, _ = pieced
    before = file.summarize().fingerprint

    def after(number):
        def edit(h5):
            h5["positions"][int(h5["offsets"][number]), 1] += 1e-3

        with MoleculeFile(edited(tmp_path / "b.h5", file.path, edit)) as other:
            return other.summarize().fingerprint

    assert after(3) == before  # of validation
    assert after(4) != before


def test_what_cannot_be_read_is_named(tmp_path, sample_path):
    path = tmp_path / "a.h5"
    path.write_bytes(sample_path.read_bytes())
    with MoleculeFile(path) as file:
        chunk = file._file["positions"].id.get_chunk_info(0)
        with path.open("r+b") as raw:  # the sample is compressed
            raw.seek(chunk.byte_offset)
            raw.write(bytes(100))
        with pytest.raises(InputError, match=r"molecules 1 to 2000 cannot be read .*damaged"):
            file.read(np.arange(2000))
        with pytest.raises(InputError, match=r"molecules 1 to 2000 cannot be read .*damaged"):
            file.load()


def test_a_file_that_is_cut_off_while_open(tmp_path, molecules):
    """The HDF5 library would go on with zeros, or fail in one of many ways."""
    path = tmp_path / "a.h5"
    with MoleculeWriter(path, source="test") as writer:
        writer.append(molecules)
    with MoleculeFile(path) as file:
        os.truncate(path, path.stat().st_size // 2)
        for read in (lambda: file.read(np.arange(10, 20)), lambda: file.slice(10, 20)):
            with pytest.raises(InputError, match=r"molecules 11 to 20 cannot be read: .* cut off"):
                read()


def test_random_split():
    labels = random_split(1000, (0.8, 0.1, 0.1), 0)
    assert np.bincount(labels).tolist() == [800, 100, 100]
    assert (labels == random_split(1000, (0.8, 0.1, 0.1), 0)).all()
    assert (labels != random_split(1000, (0.8, 0.1, 0.1), 1)).any()
    assert random_split(1, (0.8, 0.1, 0.1), 0).tolist() == [0]


def test_an_epoch_shows_every_molecule_once(molecules):
    batches = epoch_batches(molecules.sizes, 64, seed=0, epoch=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(2000))
    assert [len(b) for b in batches].count(64) == 31
    again = epoch_batches(molecules.sizes, 64, seed=0, epoch=3)
    other = epoch_batches(molecules.sizes, 64, seed=0, epoch=4)
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(batches, other, strict=True))


def test_little_padding(molecules):
    batches = epoch_batches(molecules.sizes, 64, seed=0, epoch=0)
    padded = sum(molecules.sizes[b].max() * len(b) for b in batches)
    assert 1 - molecules.sizes.sum() / padded < 0.1


def test_pieces_by_size_hold_all_within_the_bound():
    sizes = np.random.default_rng(0).integers(1, 40, 500)
    pieces = list(batch_by_size(sizes, 2000))
    assert sorted(np.concatenate(pieces).tolist()) == list(range(500))
    assert all(len(p) * sizes[p].max() ** 2 <= 2000 for p in pieces)
    assert [p.tolist() for p in batch_by_size(np.array([100, 3]), 50)] == [[1], [0]]


def test_batches_with_least_work(molecules):
    """Of all ways to cut nine molecules, tried one by one; and that padding nearly disappears."""
    random = np.random.default_rng(0)
    for pairs, overhead in ((40, 5), (100, 30), (1000, 0), (1, 7)):
        sizes = random.integers(1, 9, 9)
        ascending = np.sort(sizes)
        works = []
        for cuts in range(2**8):
            ends = [k + 1 for k in range(8) if cuts >> k & 1]
            parts = np.split(ascending, ends)
            if all(len(part) == 1 or len(part) * part[-1] ** 2 <= pairs for part in parts):
                works.append(sum(len(part) * part[-1] ** 2 + overhead for part in parts))
        pieces = list(batch_with_least_work(sizes, pairs, overhead))
        assert sorted(np.concatenate(pieces).tolist()) == list(range(9))
        assert sum(len(p) * sizes[p].max() ** 2 + overhead for p in pieces) == min(works)
    sizes = molecules.sizes[:100]
    padding = [
        sum(len(p) * sizes[p].max() ** 2 for p in pieces) / (sizes**2).sum() - 1
        for pieces in (batch_by_size(sizes, 4000), batch_with_least_work(sizes, 4000, 250))
    ]
    assert padding[1] < 0.05 < padding[0]


def test_a_batch_on_the_device_is_the_molecules(molecules):
    on_device = DeviceMolecules(molecules, torch.device("cpu"))
    which = list(batch_by_size(molecules.sizes, 16_000))[7]
    batch = on_device.batch(which)
    assert batch.mask.sum(1).tolist() == molecules.sizes[which].tolist()
    for k, i in enumerate(which):
        n = len(molecules[i])
        np.testing.assert_array_equal(batch.data["positions"][k, :n], molecules[i].positions)
        numbers = batch.data["atomic_numbers"][k, :n]
        assert numbers.tolist() == molecules[i].atomic_numbers.tolist()
    assert (batch.data["positions"][~batch.mask] == 0).all()
    assert batch.data["atomic_numbers"].dtype == torch.uint8
    assert batch.bonds is None and "formal_charges" not in batch.data


def test_a_batch_on_the_device_has_every_column(bonded):
    """Charges, bonds as a list and dense, properties, groups and SMILES."""
    gap = Property(np.array([0.1, np.nan, 0.3]), "hartree")
    every = replace(
        bonded,
        properties={"gap": gap},
        groups=np.array([3, 7, 5]),
        smiles=np.array(["a", "b", ""], dtype=object),
    )
    which = np.array([2, 0, 1])
    batch = DeviceMolecules(every, torch.device("cpu"), dense_bonds=True).batch(which)
    assert batch.groups is not None and batch.groups.tolist() == [5, 3, 7]
    assert batch.smiles is not None and batch.smiles.tolist() == ["", "a", "b"]
    np.testing.assert_array_equal(batch.properties["gap"], [0.3, 0.1, np.nan])
    assert batch.bonds is not None
    molecule, first, second = batch.bonds
    for k, i in enumerate(which.tolist()):
        one, n = every[i], len(every[i])
        assert batch.data["formal_charges"][k, :n].tolist() == one.formal_charges.tolist()
        pairs = torch.stack([first, second], dim=1)[molecule == k].tolist()
        assert pairs == one.bond_index.tolist()
        dense = np.zeros(batch.mask.shape[1:] * 2, int)
        for (a, b), order in zip(one.bond_index.tolist(), one.bond_order.tolist(), strict=True):
            dense[a, b] = dense[b, a] = order
        np.testing.assert_array_equal(batch.data["bond_orders"][k], dense)
    assert (batch.data["formal_charges"][~batch.mask] == 0).all()
