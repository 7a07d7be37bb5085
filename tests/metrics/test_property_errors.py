"""Properties that samples were asked for, and those that a predictor finds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from conftest import of_smiles
from scipy import stats

from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules, Property
from molgen_energy.errors import InputError
from molgen_energy.metrics.property_errors import (
    Comparison,
    compare_asked,
    property_metrics,
    real_comparisons,
)


@dataclass
class Judge:
    """Predicts twice the number of atoms, and cannot tell of molecules of 3 atoms."""

    units: dict[str, str] = field(default_factory=lambda: {"w": "u"})
    limit: int | None = None
    description: str = "twice the number of atoms"

    def __call__(self, molecules):
        return dict.fromkeys(
            self.units, np.where(molecules.sizes == 3, np.nan, 2.0 * molecules.sizes)
        )


@pytest.fixture
def asked() -> Molecules:
    """Seven molecules, some of which were asked for a weight."""
    found = Molecules.from_list([of_smiles(s) for s in ("C", "CC", "O", "CO", "N", "CCC", "CN")])
    values = np.array([10.0, 12, 6, np.nan, 9, 25, 14])
    other = Property(np.arange(7.0), "")
    return replace(found, properties={"condition_w": Property(values, "u"), "w": other})


def test_metrics_by_hand(rng):
    x, y = rng.normal(size=50), rng.normal(size=50)
    y += x
    x[3], y[7] = np.nan, np.nan
    by_atoms = rng.normal(size=50)
    found = property_metrics("w", Comparison(x, y, by_atoms))
    known = [k for k in range(50) if k not in (3, 7)]
    errors = [abs(x[k] - y[k]) for k in known]
    assert found["property_w_error"].value == pytest.approx(np.mean(errors))
    half = 1.96 * np.std(errors, ddof=1) / len(errors) ** 0.5
    assert found["property_w_error"].interval[1] == pytest.approx(np.mean(errors) + half, rel=1e-4)
    assert found["property_w_error"].count == 48
    assert found["property_w_by_atoms"].value == pytest.approx(np.mean(np.abs(x - by_atoms)[known]))
    expected = stats.pearsonr(x[known], y[known])
    correlation = found["property_w_correlation"]
    assert correlation.value == pytest.approx(expected.statistic)
    assert correlation.interval == pytest.approx(tuple(expected.confidence_interval()))
    # Values in random order: about the mean over all pairs.
    every = np.abs(x[known][:, None] - y[known][None]).mean()
    assert found["property_w_shuffled"].value == pytest.approx(every, rel=0.25)


def test_metrics_of_nothing():
    found = property_metrics("w", Comparison(np.array([np.nan, 1]), np.array([1, np.nan])))
    assert all(each.value is None and each.note for each in found.values())


@pytest.mark.parametrize("kind", ["h5", "sdf", "rdkit"])
def test_asked_values_are_read_of_every_kind(asked, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "h5":
        with MoleculeWriter(path, source="some") as writer:
            writer.append(asked)
    elif kind == "sdf":
        with MoleculeTextWriter(path, {}) as writer:
            writer.append(asked)
    source = path
    if kind == "rdkit":
        source = to_rdkit(asked)
        for molecule, value in zip(source, asked.properties["condition_w"].values, strict=True):
            if np.isfinite(value):
                molecule.SetProp("condition_w", str(value))
    found = compare_asked("a", source, Judge())
    assert [*found] == ["w"]
    np.testing.assert_array_equal(found["w"].asked, asked.properties["condition_w"].values)
    expected = [10, 16, np.nan, 12, 8, 22, 14]
    np.testing.assert_array_equal(found["w"].predicted, expected)
    first = compare_asked("a", source, Judge(limit=3))
    np.testing.assert_array_equal(first["w"].predicted, expected[:3])


def test_other_properties_are_kept_without_a_prediction(asked):
    both = {**asked.properties, "condition_z": Property(np.arange(7.0), "")}
    molecules = to_rdkit(asked)
    for k, molecule in enumerate(molecules):
        molecule.SetProp("condition_z", str(float(both["condition_z"].values[k])))
    found = compare_asked("a", molecules, Judge())
    assert np.isnan(found["z"].predicted).all() and np.isfinite(found["z"].asked).all()


def test_another_unit_is_refused(asked, tmp_path):
    with MoleculeWriter(tmp_path / "a.h5", source="some") as writer:
        writer.append(asked)
    with pytest.raises(InputError, match=r"a: condition_w is in u, the predictor's w in kg"):
        compare_asked("a", tmp_path / "a.h5", Judge({"w": "kg"}))


def test_medians_by_atoms_are_of_the_training_molecules(sample_path):
    found = real_comparisons(sample_path, Judge({"gap": "hartree", "mu": "eÅ"}, 40), ["gap", "mu"])
    assert [*found] == ["gap"]  # mu is in debye there
    values = found["gap"]
    assert len(values.asked) == 40
    with MoleculeFile(sample_path) as file:
        train = file.load("train")
    gaps = train.properties["gap"].values
    for atoms, told in zip(values.predicted / 2, values.by_atoms, strict=True):
        alike = gaps[train.sizes == atoms]
        assert told == pytest.approx(np.median(alike if len(alike) else gaps))
