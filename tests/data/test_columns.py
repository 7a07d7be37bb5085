"""Every column of molecules: concatenated, as arrays, in HDF5, and in groups of the split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load, save

from molgen_energy.data import hdf5
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Bonds, Molecules, Property, offsets_from_sizes
from molgen_energy.data.splits import random_split
from molgen_energy.errors import InputError


def full(count: int, seed: int = 0) -> Molecules:
    """Random molecules with every column."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, count)
    bonds = rng.integers(0, sizes)  # of a chain of atoms, in either direction
    pairs = [rng.permuted([[k, k + 1] for k in range(n)], axis=1) for n in bonds if n]
    index = np.concatenate(pairs)
    gap = rng.standard_normal(count)
    gap[::5] = np.nan
    return Molecules(
        rng.standard_normal((sizes.sum(), 3)).astype("f4"),
        rng.integers(1, 9, sizes.sum()).astype("u1"),
        offsets_from_sizes(sizes),
        rng.integers(-2, 3, sizes.sum()).astype("i1"),
        Bonds(
            index.astype("u4"),
            rng.choice([1, 2, 3, 12], bonds.sum()).astype("u1"),
            offsets_from_sizes(bonds),
        ),
        np.array([f"C{'é' * (i % 3)}#{i}" for i in range(count)], object),
        {"gap": Property(gap, "hartree"), "mu": Property(rng.standard_normal(count), "debye")},
        rng.integers(0, 4, count),
    )


def assert_equal(a: Molecules, b: Molecules) -> None:
    """Every column, with its type and units."""
    ours, theirs = a.to_arrays(), b.to_arrays()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    assert a.units == b.units


ALL = {"formal_charges", "bonds", "smiles", "group", "properties/gap", "properties/mu"}


def test_single_molecules_keep_every_column():
    molecules = full(7)
    assert_equal(Molecules.from_list(list(molecules)), molecules)
    some = np.array([3, 0, 3])
    assert_equal(molecules.select(some), Molecules.from_list([molecules[i] for i in some]))


def test_concatenation_keeps_every_column():
    molecules = full(9)
    parts = [molecules.select(np.arange(*ends)) for ends in ((0, 4), (4, 4), (4, 9))]
    assert_equal(Molecules.concatenate(parts), molecules)
    assert len(Molecules.concatenate([])) == 0
    assert_equal(Molecules.concatenate(parts[:1]), parts[0])


def test_what_only_some_have_is_filled_or_refused():
    a, b = full(3), full(2, seed=1)
    b = replace(b, smiles=None, properties={"mu": b.properties["mu"]})
    both = Molecules.concatenate([a, b])
    assert both.smiles.tolist() == [*a.smiles, "", ""]
    assert np.isnan(both.properties["gap"].values[3:]).all()
    assert both.units == {"gap": "hartree", "mu": "debye"}
    assert_equal(both, Molecules.from_list([*a, *b]))
    for lacking, what in (("formal_charges", "charges"), ("bonds", "bonds"), ("groups", "groups")):
        with pytest.raises(ValueError, match=f"only some of the molecules have.*{what}"):
            Molecules.concatenate([a, replace(b, **{lacking: None})])
    eV = replace(b, properties={"mu": Property(np.zeros(2), "C m")})
    with pytest.raises(ValueError, match="property mu has two units, 'debye' and 'C m'"):
        Molecules.concatenate([a, eV])


def test_arrays_of_safetensors_hold_every_column():
    molecules = full(6)
    arrays = load(save(molecules.to_arrays(encode_text=True)))
    assert_equal(Molecules.from_arrays(arrays, molecules.units), molecules)
    assert_equal(Molecules.from_arrays(molecules.to_arrays(), molecules.units), molecules)
    bare = Molecules(molecules.positions, molecules.atomic_numbers, molecules.offsets)
    assert_equal(Molecules.from_arrays(bare.to_arrays(encode_text=True)), bare)


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file of 40 molecules with every column, written in three calls, read in short slices."""
    monkeypatch.setattr(hdf5, "_SLICE", 20)
    monkeypatch.setattr(hdf5, "_GAP", 4)
    molecules = full(40)
    with MoleculeWriter(tmp_path / "a.h5", source="test") as writer:
        for start, stop in ((0, 11), (11, 12), (12, 40)):
            writer.append(molecules.select(np.arange(start, stop)))
        writer.set_split((np.arange(40) % 3).astype("u1"))
    with MoleculeFile(tmp_path / "a.h5") as file:
        yield file, molecules


def test_a_file_keeps_every_column(stored):
    file, molecules = stored
    assert file.columns == ALL
    assert file.property_units == {"gap": "hartree", "mu": "debye"}
    assert_equal(file.load(), molecules)
    assert_equal(file.load("valid"), molecules.select(file.split_indices("valid")))
    assert_equal(file.slice(5, 17), molecules.select(np.arange(5, 17)))
    chunks = [chunk.molecules for chunk in file.chunks(7)]
    assert_equal(Molecules.concatenate(chunks), molecules)


@pytest.mark.parametrize("columns", [set(), *({name} for name in sorted(ALL)), ALL])
def test_exactly_the_named_columns_are_read(stored, columns, rng):
    file, molecules = stored
    which = np.flatnonzero(rng.random(40) < 0.4)
    some, read = molecules.select(which), file.read(which, columns)
    assert (read.formal_charges is not None) == ("formal_charges" in columns)
    assert (read.bonds is not None) == ("bonds" in columns)
    assert (read.smiles is not None) == ("smiles" in columns)
    assert (read.groups is not None) == ("group" in columns)
    assert {f"properties/{name}" for name in read.properties} == {
        name for name in columns if name.startswith("properties/")
    }
    expected = some.to_arrays()
    for name, array in read.to_arrays().items():
        np.testing.assert_array_equal(array, expected[name])


def test_reading_can_be_cancelled_and_names_absent_columns(stored):
    file, _ = stored
    calls = []

    def cancel():
        calls.append(1)
        if len(calls) == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        file.read(np.arange(40), ALL, cancel)
    with pytest.raises(InputError, match=r"a\.h5 has no column 'properties/zpve' .*properties/gap"):
        file.read(np.arange(3), ["properties/zpve"])


def test_columns_may_come_and_go_between_calls(tmp_path):
    a, b, c = full(3), full(2, seed=1), full(4, seed=2)
    a = replace(a, smiles=None, properties={})
    c = replace(c, smiles=None, properties={"mu": c.properties["mu"]})
    with MoleculeWriter(tmp_path / "a.h5", source="test") as writer:
        for part in (a, b, c):
            writer.append(part)
    with MoleculeFile(tmp_path / "a.h5") as file:
        assert_equal(file.load(), Molecules.concatenate([a, b, c]))


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    molecules = full(3)
    properties = {"gap": Property(np.zeros(3), "eV")}
    for bad, message in (
        (replace(molecules, bonds=None), "molecules 4 to 6 have no bonds, those before have;"),
        (replace(molecules, groups=None), "have no groups, those before have"),
        (replace(molecules, formal_charges=None), "have no formal charges"),
        (replace(molecules, properties=properties), "property gap is in 'eV', before in 'hartree'"),
        (replace(molecules, properties={"a/b": Property(np.zeros(3), "")}), "'a/b' cannot be the"),
    ):
        with (
            pytest.raises(InputError, match=message),
            MoleculeWriter(tmp_path / "a.h5", source="") as writer,
        ):
            writer.append(molecules)
            writer.append(bad)
        assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize("name", ["formal_charges", "group", "smiles", "bonds/index"])
def test_columns_of_other_lengths_are_refused(tmp_path, name):
    path = tmp_path / "a.h5"
    with MoleculeWriter(path, source="test") as writer:
        writer.append(full(5))
    with h5py.File(path, "r+") as file:
        file[name].resize(2, axis=0)
    with pytest.raises(InputError, match=r"data set '.*': expected .* = \d+, found .*\(\d,"):
        MoleculeFile(path)


def test_more_atoms_than_16_bits_count(tmp_path):
    size = 70_000
    index = np.array([[0, size - 1]], "u4")
    chain = Molecules(
        np.zeros((size, 3), "f4"),
        np.full(size, 6, "u1"),
        np.array([0, size]),
        bonds=Bonds(index, np.ones(1, "u1"), np.array([0, 1])),
    )
    with MoleculeWriter(tmp_path / "a.h5", source="test") as writer:
        writer.append(chain)
    with MoleculeFile(tmp_path / "a.h5") as file:
        assert file.load().bonds.index.tolist() == [[0, size - 1]]


def test_files_of_before_are_read(tmp_path, stored):
    """Bond indices had 16 bits, and there were no groups."""
    file, molecules = stored
    path = tmp_path / "old.h5"
    path.write_bytes(file.path.read_bytes())
    with h5py.File(path, "r+") as old:
        index = old["bonds/index"][:].astype("u2")
        del old["bonds/index"], old["group"]
        old["bonds/index"] = index
    with MoleculeFile(path) as old:
        assert old.columns == ALL - {"group"}
        assert_equal(old.load(), replace(molecules, groups=None))


def test_groups_stay_together():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 300, 2000)
    labels = random_split(2000, (0.8, 0.1, 0.1), 0, groups)
    assert all(len(set(labels[groups == group])) == 1 for group in np.unique(groups))
    shares = np.bincount(labels, minlength=3) / 2000
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.01)
    assert (labels == random_split(2000, (0.8, 0.1, 0.1), 0, groups)).all()
    assert (labels != random_split(2000, (0.8, 0.1, 0.1), 1, groups)).any()
    alone = random_split(2000, (0.8, 0.1, 0.1), 0, np.arange(2000))
    assert np.bincount(alone).tolist() == [1600, 200, 200]
    assert random_split(5, (0.1, 0.5, 0.4), 0, np.zeros(5, int)).tolist() == [0] * 5
    assert random_split(0, (0.8, 0.1, 0.1), 0, np.zeros(0, int)).tolist() == []
