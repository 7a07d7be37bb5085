"""Consistent charges of generated molecules, and what the state of a checkpoint knows of them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.charges import NONE_FITS, AtomKind, count_atoms, without_radicals
from molgen_energy.chemistry.convert import from_rdkit
from molgen_energy.data.molecules import AROMATIC
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.fields import (
    MoleculeStatistics,
    ScalesConfig,
    build_layout,
)
from molgen_energy.systems.molecules.generate import ConsistentCharges
from molgen_energy.systems.molecules.state import StatisticsState

CPU = torch.device("cpu")
SMILES = ["C[NH3+]", "CC([O-])=O", "c1cc[nH]c1", "C[N+](C)([O-])C", "CCO", "c1ccncc1"]
FIELDS = ("positions", "elements", "formal_charges", "bonds")


def real():
    built = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in SMILES]
    for molecule in built:
        rdDistGeom.EmbedMolecule(molecule, randomSeed=1)
    return from_rdkit(built)


def statistics_of(molecules):
    counts = count_atoms(molecules)
    known = Counter({kind: counts[kind] for kind in without_radicals(counts)})
    elements = tuple(np.unique(molecules.atomic_numbers).tolist())
    return MoleculeStatistics(elements, (-1, 1), True, known)


def decoded(molecules):
    """As `State.decode` gives them; padding holds other charges and bonds."""
    sizes = molecules.sizes
    mask = torch.arange(int(sizes.max()) + 1)[None] < torch.from_numpy(sizes)[:, None]
    shape = (len(molecules), mask.shape[1])
    numbers = torch.full(shape, 7, dtype=torch.uint8)
    charges = torch.ones(shape, dtype=torch.int8)
    orders = torch.full((*shape, shape[1]), 3, dtype=torch.uint8)
    numbers[mask] = torch.from_numpy(molecules.atomic_numbers)
    charges[mask] = torch.from_numpy(molecules.formal_charges)
    for k, molecule in enumerate(molecules):
        n = len(molecule)
        orders[k, :n, :n] = 0
        i, j = torch.from_numpy(molecule.bond_index.astype(np.int64).T)
        orders[k, i, j] = orders[k, j, i] = torch.from_numpy(molecule.bond_order)
    return {"atomic_numbers": numbers, "formal_charges": charges, "bond_orders": orders}, mask


def consistent(statistics, names=FIELDS):
    layout = build_layout(names, ScalesConfig(), statistics)
    return ConsistentCharges(layout, statistics, SimpleNamespace(path="run"), CPU)


def test_spoilt_charges_of_real_molecules_are_found_again():
    molecules = real()
    data, mask = decoded(molecules)
    repair = consistent(statistics_of(molecules))
    same, counts = repair.apply(data, mask)
    assert torch.equal(same["formal_charges"], data["formal_charges"])
    assert counts.tolist() == [[0] * len(SMILES)] * 2
    for spoilt in (-1, 0, 1):
        given = torch.full_like(data["formal_charges"], spoilt)
        found, counts = repair.apply(data | {"formal_charges": given}, mask)
        assert torch.equal(found["formal_charges"][mask], data["formal_charges"][mask])
        assert torch.equal(found["formal_charges"][~mask], given[~mask])
        wrong = (data["formal_charges"] != spoilt) & mask
        assert counts.tolist() == [wrong.sum(dim=1).tolist(), [0] * len(SMILES)]


def test_random_bonds_against_a_plain_loop():
    """Atoms that no charge fits, or whose charge fits, stay; the others get the nearest one."""
    generator = torch.Generator().manual_seed(0)
    statistics = statistics_of(real())
    numbers = torch.tensor([1, 6, 7, 8], dtype=torch.uint8)
    kinds = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, AROMATIC], dtype=torch.uint8)
    batch, n = 40, 7
    upper = torch.randint(0, len(kinds), (batch, n, n), generator=generator).triu(1)
    data = {
        "atomic_numbers": numbers[torch.randint(0, 4, (batch, n), generator=generator)],
        "formal_charges": torch.randint(-1, 2, (batch, n), generator=generator).to(torch.int8),
        "bond_orders": kinds[upper + upper.transpose(1, 2)],
    }
    mask = torch.arange(n)[None] < torch.randint(2, n + 1, (batch, 1), generator=generator)
    found, counts = consistent(statistics).apply(data, mask)
    expected = [[0] * batch, [0] * batch]
    for k, i in mask.nonzero().tolist():
        row = [order for j, order in enumerate(data["bond_orders"][k, i].tolist()) if mask[k, j]]
        aromatic = row.count(AROMATIC)
        others = sum(order for order in row if order != AROMATIC)
        before, z = int(data["formal_charges"][k, i]), int(data["atomic_numbers"][k, i])
        fits = [c for c in (-1, 0, 1) if AtomKind(z, c, aromatic, others) in statistics.atoms]
        after = int(found["formal_charges"][k, i])
        assert after in fits if fits else after == before
        if before in fits:
            assert after == before
        expected[0][k] += after != before
        expected[1][k] += not fits
    assert counts.tolist() == expected
    assert counts.sum(dim=1).min() > 10
    assert not (found["formal_charges"] == NONE_FITS).any()


def test_statistics_in_a_checkpoint():
    statistics = statistics_of(real())
    stored = StatisticsState.model_validate(statistics.to_dict())
    state = SimpleNamespace(elements=["H", "C", "N", "O"], statistics=stored)
    assert MoleculeStatistics.of_state(state) == statistics
    old = StatisticsState.model_validate({"charges": [-1, 1], "aromatic": False})
    state = SimpleNamespace(elements=["H", "C", "N", "O"], statistics=old)
    assert MoleculeStatistics.of_state(state).atoms is None
    for wrong in ([[0, 4]], [[9, 0, 1]], [[0, 99, 1]]):
        atoms = [{"element": "C", "charge": 0, "bonds": wrong}]
        with pytest.raises(ValueError, match="three numbers"):
            StatisticsState.model_validate({"charges": [0, 0], "aromatic": True, "atoms": atoms})
    atoms = [{"element": "C", "charge": 2, "bonds": [[0, 4, 1]]}]
    with pytest.raises(ValueError, match="a charge that is not from -1 to 1"):
        StatisticsState.model_validate({"charges": [-1, 1], "aromatic": True, "atoms": atoms})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("positions", "elements"), "run generates no formal charges and no bonds; leave it out"),
        (("positions", "elements", "bonds"), "generates no formal charges; leave"),
        (FIELDS, "does not hold which charges fit which bonds"),
    ],
)
def test_models_without_charges_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        consistent(MoleculeStatistics((1, 6)), names)
