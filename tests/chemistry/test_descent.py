"""Relaxation from a model of the Hessian, against RDKit's BFGS and numerical derivatives."""

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from molgen_energy.chemistry.descent import SIZES, descend, model_hessian
from molgen_energy.chemistry.relaxation import relax_mmff

IBUPROFEN = "CC(C)Cc1ccc(cc1)C(C)C(=O)O"
ZWITTERION = "[NH3+]CCCC[C@H](NC(=O)c1ccccc1)C(=O)[O-]"


def embedded(smiles: str, noise: float = 0.1) -> Chem.Mol:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(molecule, randomSeed=1) == 0
    conformer = molecule.GetConformer()
    shaken = np.random.default_rng(0).normal(conformer.GetPositions(), noise)
    conformer.SetPositions(shaken)
    return molecule


def field_of(molecule: Chem.Mol):
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    field = rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, properties)
    field.Initialize()
    return field


@pytest.mark.parametrize("smiles", [IBUPROFEN, ZWITTERION])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ends_at_a_minimum(smiles, noise):
    molecule = embedded(smiles, noise)
    assert molecule.GetNumAtoms() in SIZES
    start = Chem.Mol(molecule)
    relaxed = relax_mmff(molecule)
    fresh = field_of(molecule)  # of its own, with nothing kept from the search
    assert np.array_equal(relaxed.positions, molecule.GetConformer().GetPositions())
    assert relaxed.energy == pytest.approx(field_of(start).CalcEnergy() - fresh.CalcEnergy())
    assert np.abs(fresh.CalcGrad()).max() < 0.05
    here = fresh.CalcEnergy()
    assert fresh.Minimize(maxIts=5000) == 0
    assert 0 <= here - fresh.CalcEnergy() < 1e-3


def test_a_molecule_near_its_minimum_goes_where_rdkit_goes():
    molecule = embedded(IBUPROFEN)
    assert field_of(molecule).Minimize(maxIts=5000) == 0
    conformer = molecule.GetConformer()
    conformer.SetPositions(np.random.default_rng(1).normal(conformer.GetPositions(), 0.02))
    by_rdkit = Chem.Mol(molecule)
    energy = field_of(by_rdkit).CalcEnergy()
    field = field_of(by_rdkit)
    field.Minimize(maxIts=5000)
    assert relax_mmff(molecule).energy == pytest.approx(energy - field.CalcEnergy(), abs=1e-3)


def test_two_atoms_in_one_place_leave_finite_positions():
    molecule = embedded(IBUPROFEN)
    positions = molecule.GetConformer().GetPositions()
    positions[1] = positions[0]
    molecule.GetConformer().SetPositions(positions)
    found = descend(field_of(molecule), molecule)
    assert np.isfinite(molecule.GetConformer().GetPositions()).all()
    assert found == (np.abs(field_of(molecule).CalcGrad()).max() < 0.05)


def test_model_is_the_hessian_of_its_springs():
    molecule = embedded("CC=O", 0.0)
    x = molecule.GetConformer().GetPositions()
    apart = Chem.GetDistanceMatrix(molecule)
    rest = np.linalg.norm(x[:, None] - x, axis=2)
    springs = {1: 700.0, 2: 140.0, 3: 6.0}

    def energy(flat):
        y = flat.reshape(-1, 3)
        stretched = sum(
            springs.get(int(apart[i, j]), 0) / 2 * (np.linalg.norm(y[i] - y[j]) - rest[i, j]) ** 2
            for i in range(len(y))
            for j in range(i)
        )
        return stretched + 4 * ((y - x) ** 2).sum()

    step, flat = 1e-3, x.ravel()
    unit = step * np.eye(len(flat))
    numeric = [
        [
            energy(flat + a + b)
            - energy(flat + a - b)
            - energy(flat - a + b)
            + energy(flat - a - b)
            for a in unit
        ]
        for b in unit
    ]
    model = model_hessian(molecule, x)
    assert model == pytest.approx(np.array(numeric) / (4 * step**2), abs=0.05)
    assert np.linalg.eigvalsh(model).min() > 7.9
