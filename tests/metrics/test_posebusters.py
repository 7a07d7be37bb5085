"""PoseBusters' checks one by one, against its own class."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.rdkit import build, preserved_logs
from molgen_energy.data.molecules import MoleculeChunk, Molecules

with preserved_logs():  # its import enables them
    posebusters = pytest.importorskip("posebusters")

SMILES = (
    "C",
    "[H][H]",
    "OC(=O)c1ccccc1C=C",
    "[O-]C(=O)CC([NH3+])C(N)=O",  # conjugated ends of both kinds
    "C1CCCCC1C1CC1",
    "OS(=O)(=O)c1ccc[nH]1",
    "[CH2]C=C",
)


@pytest.fixture(scope="module")
def busted():
    """What PoseBusters' class says of a molecule, without the check of the energy."""
    checker = posebusters.PoseBusters(config="mol")
    checker.config["modules"] = [
        module for module in checker.config["modules"] if module["function"] != "energy_ratio"
    ]
    logger = logging.getLogger("rdkit")
    level = logger.level
    logger.setLevel(logging.CRITICAL)

    def bust(molecule):
        with preserved_logs(), rdBase.BlockLogs():
            row = checker.bust([build(molecule, positions=True)], None, None).iloc[0]
        return {name: passed is True or passed is np.True_ for name, passed in row.items()}

    yield bust
    logger.setLevel(level)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("smiles", SMILES)
def test_every_check_agrees_with_its_class(busted, smiles):
    from molgen_energy.metrics.checks.posebusters import run_posebusters

    made = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(made, randomSeed=1) == 0
    molecule = molecule_from_rdkit(made)
    rng = np.random.default_rng(len(smiles))
    for noise in (0.0, 0.15, 0.4):
        moved = rng.normal(molecule.positions, noise).astype(np.float32)
        shaken = replace(molecule, positions=moved)
        chunk = MoleculeChunk(np.array([1]), Molecules.from_list([shaken]))
        assert list(run_posebusters(chunk)[0].items()) == list(busted(shaken).items())


def test_invalid_molecules_agree_too(busted):
    from molgen_energy.metrics.checks.posebusters import run_posebusters

    made = Chem.AddHs(Chem.MolFromSmiles("CC(=O)N"))
    rdDistGeom.EmbedMolecule(made, randomSeed=1)
    molecule = molecule_from_rdkit(made)
    five = replace(molecule, bond_order=np.full_like(molecule.bond_order, 2))
    chunk = MoleculeChunk(np.array([1]), Molecules.from_list([five]))
    found = run_posebusters(chunk)[0]
    assert list(found.items()) == list(busted(five).items())
    assert not found["sanitization"] and not found["bond_lengths"]


def test_logs_of_rdkit_stay_enabled_or_disabled():
    from molgen_energy.metrics.checks.posebusters import run_posebusters

    made = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    rdDistGeom.EmbedMolecule(made, randomSeed=1)
    molecules = Molecules.from_list([molecule_from_rdkit(made)])
    logger = logging.getLogger("rdkit")
    before = rdBase.LogStatus(), logger.level
    run_posebusters(MoleculeChunk(np.array([1]), molecules))
    assert (rdBase.LogStatus(), logger.level) == before
