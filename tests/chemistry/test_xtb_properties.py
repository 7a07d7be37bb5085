"""Orbitals and dipoles by GFN2-xTB, and the calibration of a judge by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import of_smiles

from molgen_energy import preprocess
from molgen_energy.chemistry.xtb_properties import xtb_properties
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics.xtb_predictor import XTBPredictor

pytest.importorskip("tblite")


def test_water_is_that_of_another_interface():
    """Dipole by tblite's calculator of ASE; turned and moved, the numbers stay."""
    ase = pytest.importorskip("ase")
    from ase.units import Debye
    from tblite.ase import TBLite

    water = of_smiles("O")
    found = xtb_properties(water.atomic_numbers, water.positions)
    atoms = ase.Atoms(water.atomic_numbers, water.positions.astype(float))
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    expected = np.linalg.norm(atoms.get_dipole_moment()) / Debye
    assert found["mu"] == pytest.approx(expected, rel=1e-4)
    assert found["gap"] == pytest.approx(found["lumo"] - found["homo"])
    assert -0.5 < found["homo"] < -0.3 and 0.3 < found["gap"] < 0.6  # hartree
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    moved = xtb_properties(water.atomic_numbers, water.positions @ turned + 5)
    assert moved == pytest.approx(found, rel=1e-4)


def test_electrons_must_be_paired():
    methyl = of_smiles("[CH3]")
    with pytest.raises(ValueError, match="electrons is odd"):
        xtb_properties(methyl.atomic_numbers, methyl.positions)
    cation = xtb_properties(methyl.atomic_numbers, methyl.positions, charge=1)
    assert cation["homo"] < -0.5  # a positive charge holds its electrons


def test_the_judge_undoes_a_linear_difference(sample_path, tmp_path):
    """Of data that are 2·x + 0.1 of GFN2-xTB's, it predicts exactly these."""
    with MoleculeFile(sample_path) as file:
        molecules = file.load("valid").select(np.arange(12))
    true = [xtb_properties(m.atomic_numbers, m.positions)["gap"] for m in molecules]
    column = replace(molecules.properties["gap"], values=2 * np.array(true) + 0.1)
    preprocess(replace(molecules, properties={"gap": column}), tmp_path / "a.h5", split="0.5,0.5,0")
    judge = XTBPredictor(tmp_path / "a.h5")
    assert judge.units == {"gap": "hartree"} and "gap = 2.000·x +0.1000" in judge.description
    np.testing.assert_allclose(judge(molecules)["gap"], column.values, atol=1e-6)
    radical = of_smiles("[CH3]")
    assert np.isnan(judge(Molecules.from_list([radical]))["gap"][0])


def test_data_without_such_properties_are_refused(sample_path, tmp_path):
    with MoleculeFile(sample_path) as file:
        molecules = file.load("valid").select(np.arange(4))
    column = replace(molecules.properties["gap"], unit="eV")
    preprocess(replace(molecules, properties={"gap": column}), tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"holds none of homo, lumo, gap, mu in hartree and debye"):
        XTBPredictor(tmp_path / "a.h5")
