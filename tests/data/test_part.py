"""Parts of the training molecules of a file."""

from __future__ import annotations

import numpy as np
import pytest

from molgen_energy import preprocess
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError


def test_parts_share_no_training_molecule_and_all_others(sample_path, tmp_path):
    with MoleculeFile(sample_path) as whole:
        train = whole.load("train").properties["index"].values
        held_out = {split: whole.load(split) for split in SPLITS[1:]}
    found = []
    for number in (1, 2, 3):
        path = tmp_path / f"{number}.h5"
        result = preprocess("part", path, files=(sample_path,), part=f"{number}/3", seed=5)
        assert result.counts["valid"] == len(held_out["valid"])
        with MoleculeFile(path) as file:
            assert f"part {number}/3" in file.source
            part = file.load("train")
            found.append(part.properties["index"].values)
            for split, molecules in held_out.items():
                np.testing.assert_array_equal(file.load(split).positions, molecules.positions)
        assert (np.diff(found[-1]) > 0).all()  # in the order of the file
    joined = np.concatenate(found)
    assert len(np.unique(joined)) == len(joined) == len(train)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    # Random, and the same again.
    assert abs(float(np.median(found[0])) - float(np.median(train))) < np.ptp(train) / 5
    preprocess("part", tmp_path / "again.h5", files=(sample_path,), part="1/3", seed=5)
    with MoleculeFile(tmp_path / "again.h5") as file:
        np.testing.assert_array_equal(file.load("train").properties["index"].values, found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "3/2"}, "--part 3/2: expected K/N such as 1/2"),
        ({"part": "half"}, "--part half: expected K/N"),
        ({"part": "1/900"}, "training molecules, too few for --part 1/900"),
        ({"files": ()}, "name one HDF5 file"),
        ({"files": ("nothing.h5",)}, "nothing.h5 does not exist"),
    ],
)
def test_bad_parts_are_refused(sample_path, tmp_path, options, message):
    small = tmp_path / "small.h5"
    if options.get("part") == "1/900":
        with MoleculeFile(sample_path) as file:
            preprocess(file.load("train").select(np.arange(300)), small, split="1,0,0")
        options = options | {"files": (small,)}
    with pytest.raises(InputError, match=message):
        preprocess("part", tmp_path / "out.h5", **{"files": (sample_path,)} | options)
    assert not (tmp_path / "out.h5").exists()
