"""The core is open: a model with bonds, charges, a condition and self-conditioning, defined here.

Nothing in the package knows this model. It goes from an SDF through `preprocess`, `train`, `sample`
and `evaluate`, with the bonds and charges that it generates in the file of samples.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem, Crippen
from torch import Tensor, nn

import molgen_energy
from molgen_energy.chemistry.rdkit import sanitize
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import AROMATIC
from molgen_energy.diffusion.state import Layout, State
from molgen_energy.models import MODELS, Denoiser
from molgen_energy.models.base import DenoiserConfig, pair_mask
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config

WIDTH = 24
SMILES = (
    "C[NH3+]", "CC(=O)[O-]", "c1ccccc1", "CCO", "C[N+](C)(C)C", "c1ccncc1", "N#CC", "OC=O",
    "[NH4+]", "CC#C", "c1cc[nH]c1", "C[O-]",
)  # fmt: skip


class BondNetConfig(DenoiserConfig):
    name: str = "bond_net"
    fields = ("positions", "elements", "formal_charges", "bonds")
    conditional = True
    layers: int = 1
    width: int = WIDTH

    def build(self, layout: Layout, condition_channels: int, low_precision: bool) -> BondNet:
        return BondNet(layout, self.width, condition_channels)


class BondNet(Denoiser):
    """One message-passing layer on atoms and bonds that predicts clean data."""

    Config = BondNetConfig
    self_conditioned = True

    def __init__(self, layout: Layout, width: int, condition_channels: int) -> None:
        super().__init__(layout)
        atoms, bonds = layout.channels["atom"] - 3, layout.channels["pair"]
        self.node = nn.Linear(2 * atoms + 1 + condition_channels, width)
        self.edge = nn.Linear(2 * bonds + 2, width)
        self.message = nn.Linear(2 * width, width)
        self.shift = nn.Linear(width, 1)
        self.atoms, self.bonds = nn.Linear(width, atoms), nn.Linear(width, bonds)
        nn.init.constant_(self.bonds.bias, 0.5)  # it generates bonds after a few steps too
        self.calls: list[bool] = []

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        self.calls.append(self_condition is not None)
        previous = state * 0.0 if self_condition is None else self_condition
        assert condition is not None
        x = state["positions"]
        extra = torch.cat([time[:, None], condition], dim=1)[:, None].expand(-1, mask.shape[1], -1)
        h = self.node(torch.cat([state.atoms[..., 3:], previous.atoms[..., 3:], extra], dim=-1))
        relative = x[:, :, None] - x[:, None]
        distances = [
            (p[:, :, None] - p[:, None]).square().sum(dim=-1, keepdim=True)
            for p in (x, previous["positions"])
        ]
        e = self.edge(torch.cat([state["bonds"], previous["bonds"], *distances], dim=-1))
        pairs = pair_mask(mask, x.dtype)[..., None]
        message = self.message(torch.cat([h[:, None].expand_as(e), e], dim=-1)).tanh() * pairs
        h = (h + message.sum(dim=2)).tanh()
        shift = (self.shift(message).tanh() * relative / (1 + distances[0])).sum(dim=2)
        edges = (e + h[:, :, None] + h[:, None]).tanh()
        values = torch.cat([x + shift, self.atoms(h)], dim=-1)
        return State(self.layout, mask, {"atom": values, "pair": self.bonds(edges)}).projected()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An SDF with charged and aromatic molecules, and a property of each."""
    path = tmp_path / "mine.sdf"
    with Chem.SDWriter(str(path)) as writer:
        for turn in range(4):
            for smiles in SMILES:
                molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
                AllChem.EmbedMolecule(molecule, randomSeed=turn + 1)
                molecule.SetProp("logp", f"{Crippen.MolLogP(molecule) + 0.1 * turn:.4f}")
                writer.write(molecule)
    return path


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "bond_net", BondNet)


CHANGES = {
    "model.name": "bond_net",
    "process.prediction": "clean",
    "process.steps": 20,
    "condition.name": "properties",
    "condition.properties": ["logp"],
    "training.validate_every": 4,
    "training.log_every": 2,
    "training.checkpoint_every": 3,
}


def test_from_an_sdf_to_generated_bonds_and_charges(tmp_path, monkeypatch, data, registered):
    monkeypatch.chdir(tmp_path)
    molgen_energy.preprocess(data, "mine.h5")
    with MoleculeFile(Path("mine.h5")) as file:
        assert file.columns >= {"bonds", "formal_charges", "properties/logp"}
        stored = file.load()
    assert stored.formal_charges is not None and stored.bonds is not None
    assert set(np.unique(stored.formal_charges)) == {-1, 0, 1}

    summary = molgen_energy.train(
        "quick", data="mine.h5", steps=6, batch_size=8, lr=1e-3, seed=3, output="run",
        changes=CHANGES | {"objective.position_weight": 1.0},
    )  # fmt: skip
    assert summary.steps == 6 and np.isfinite(summary.valid_loss)
    header = Path("run/metrics.csv").read_text().splitlines()[0]
    for name in BondNetConfig.fields:
        assert f"{name}_loss" in header

    molgen_energy.sample(9, "samples.sdf", checkpoint="run", where={"logp": 1.5}, seed=1)
    molgen_energy.sample(9, "samples.h5", checkpoint="run", where={"logp": 1.5}, seed=1)
    with MoleculeFile(Path("samples.h5")) as file:
        drawn = file.load()
    assert drawn.bonds is not None and drawn.formal_charges is not None
    assert len(drawn.bonds.order) > 0
    assert drawn.properties["condition_logp"].values == pytest.approx(1.5)
    records = list(Chem.SDMolSupplier("samples.sdf", sanitize=False, removeHs=False))
    assert len(records) == 9
    for record, molecule in zip(records, drawn, strict=True):
        assert molecule.bond_index is not None and molecule.bond_order is not None
        bonds = {
            tuple(sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())))
            for bond in record.GetBonds()
        }
        generated = {tuple(sorted(pair)) for pair in molecule.bond_index.tolist()}
        assert bonds == generated or record.GetProp("status").startswith("an atom has more")
        charges = [atom.GetFormalCharge() for atom in record.GetAtoms()]
        assert charges == molecule.formal_charges.tolist()
        assert float(record.GetProp("condition_logp")) == pytest.approx(1.5)

    # A self-conditioned network in two passes, which a resumed job keeps.
    passes = {"steps": 3, "self_condition_passes": 2, "seed": 1, "where": {"logp": 1.5}}
    molgen_energy.sample(2, "passes.sdf", checkpoint="run", **passes)
    assert Path("passes.sdf").read_text().count(">  <self_condition_passes>\n2\n") == 2
    once = molgen_energy.sample(2, checkpoint="run", **passes | {"self_condition_passes": 1})
    twice = molgen_energy.sample(2, checkpoint="run", **passes)
    one, two = (drawn[0].GetConformer().GetPositions() for drawn in (once, twice))
    assert one.shape == two.shape and not np.array_equal(one, two)

    # Without a condition, its values are those of training molecules.
    molgen_energy.sample(9, "free.h5", checkpoint="run")
    with MoleculeFile(Path("free.h5")) as file:
        values = file.load().properties["condition_logp"].values
    assert np.isin(values, stored.properties["logp"].values).all() and len(set(values)) > 1

    report = molgen_energy.evaluate("samples.sdf", reference="mine.h5", train="mine.h5", workers=0)
    assert "9" in str(report)
    _check_consistent_charges()


def _check_consistent_charges() -> None:
    """The same molecules with other charges, counted in each record and in the notes."""
    options: dict[str, Any] = {"checkpoint": "run", "seed": 1, "steps": 4, "batch_size": 3}
    molgen_energy.sample(9, "plain.h5", **options)
    options["consistent_charges"] = True
    result = molgen_energy.sample(9, "charges.h5", **options)
    with MoleculeFile(Path("plain.h5")) as file:
        drawn = file.load()
    with MoleculeFile(Path("charges.h5")) as file:
        found, origin = file.load(), file.provenance
    assert origin["consistent_charges"] == "yes"
    assert found.bonds is not None and drawn.bonds is not None
    assert np.array_equal(found.bonds.order, drawn.bonds.order)
    changed = found.formal_charges != drawn.formal_charges
    per_molecule = np.bincount(found.molecule_index[changed], minlength=9)
    assert found.properties["charges_changed"].values.tolist() == per_molecule.tolist()
    without = found.properties["charges_without_fit"].values
    (note,) = [text for text in result.notes if "--consistent-charges" in text]
    assert f"of {changed.sum():,} atom" in note and f"of {int(without.sum()):,} atom" in note
    invalid = sum(not sanitize(molecule).valid for molecule in found)
    assert any(f"RDKit cannot sanitise {invalid} of 9 molecules" in text for text in result.notes)

    # An interrupted job writes what is finished, and goes on to the same file.
    molgen_energy.sample(9, "whole.sdf", **options)
    stopped = molgen_energy.sample(9, "parts.sdf", callback=_Interruption(), **options)
    assert stopped.interrupted and 0 < stopped.written < 9
    assert any(f"of {stopped.written} molecule" in text for text in stopped.notes)
    assert molgen_energy.sample(resume="parts.sdf").notes == result.notes
    assert Path("parts.sdf").read_bytes() == Path("whole.sdf").read_bytes()
    for record, count in zip(
        Chem.SDMolSupplier("parts.sdf", sanitize=False, removeHs=False), per_molecule, strict=True
    ):
        assert float(record.GetProp("charges_changed")) == count
    assert molgen_energy.preprocess("parts.sdf", "again.h5", split="1,0,0").count == 9
    for output, message in (("a.h5", "--aromatic is for SDF"), (None, "aromatic is for an SDF")):
        with pytest.raises(ValueError, match=message):
            molgen_energy.sample(1, output, checkpoint="run", aromatic=True)


class _Interruption(NoCallback):
    """Interrupts when a batch is finished and the next one has begun."""

    done = 0.0

    def advance(self, samples: int, share: float) -> None:
        self.done += samples * share
        if self.done > 4:
            raise KeyboardInterrupt


def test_the_model_is_self_conditioned(tmp_path, monkeypatch, data, registered):
    monkeypatch.chdir(tmp_path)
    molgen_energy.preprocess(data, "mine.h5")
    changes = CHANGES | {"data.path": "mine.h5", "objective.position_weight": 1.0}
    for probability, expected in ((0.0, {False}), (1.0, {False, True})):
        config = load_config("quick").replaced(
            changes | {"objective.self_condition_probability": probability}
        )
        task = MoleculeTask(config, torch.device("cpu"))
        batch = task.epoch(0)[0]
        terms = task.loss(task.model, batch, seed=5)
        assert isinstance(task.model, BondNet)
        assert set(task.model.calls) == expected
        # A batch in shards has the losses of the whole batch.
        for rank in range(3):
            shard = task.loss(task.model, batch, 5, rank, 3)
            for name, values in shard.items():
                torch.testing.assert_close(values, terms[name][rank::3], rtol=1e-4, atol=1e-5)


def test_a_missing_column_is_named(tmp_path, registered):
    config = load_config("quick").replaced(CHANGES)
    with pytest.raises(ValueError, match=r"no column bonds, .* bond_net .* preprocess qm9 --bonds"):
        MoleculeTask(config, torch.device("cpu"))


def test_fields_hold_charges_and_bonds_of_validation_molecules(tmp_path, registered):
    molecules = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in ("CO", "C[NH3+]", "CC", "CO")]
    for molecule in molecules:
        AllChem.EmbedMolecule(molecule, randomSeed=1)
        molecule.SetDoubleProp("logp", len(molecule.GetAtoms()))
    given = molgen_energy.preprocess(molecules, tmp_path / "a.h5", split="1,0,0").path
    with MoleculeFile(given) as file:
        whole = file.load()
    assert whole.bonds is not None and whole.formal_charges is not None
    order, charges = whole.bonds.order.copy(), whole.formal_charges.copy()
    order[whole.bonds.offsets[3]] = AROMATIC
    charges[whole.offsets[3]] = 3
    with MoleculeWriter(tmp_path / "b.h5", source="test") as writer:
        writer.append(
            replace(whole, bonds=replace(whole.bonds, order=order), formal_charges=charges)
        )
        writer.set_split(np.array([0, 0, 1, 1], np.uint8))
    changes = {"data.path": str(tmp_path / "b.h5"), "objective.position_weight": 1.0}
    task = MoleculeTask(load_config("quick").replaced(CHANGES | changes), torch.device("cpu"))
    assert task.state["statistics"]["charges"] == [0, 3]
    assert task.state["statistics"]["aromatic"]


def test_auto_without_published_values_says_what_to_set(tmp_path, monkeypatch, data, registered):
    monkeypatch.chdir(tmp_path)
    molgen_energy.preprocess(data, "mine.h5")
    config = load_config("quick").replaced(CHANGES | {"data.path": "mine.h5"})
    with pytest.raises(
        ValueError, match=r"objective\.position_weight: there is no published value"
    ):
        MoleculeTask(config, torch.device("cpu"))


def test_a_model_without_conditions_refuses_one(tmp_path, monkeypatch, data, registered):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BondNetConfig, "conditional", False)
    molgen_energy.preprocess(data, "mine.h5")
    changes = CHANGES | {"data.path": "mine.h5", "objective.position_weight": 1.0}
    with pytest.raises(ValueError, match="bond_net accepts no condition"):
        MoleculeTask(load_config("quick").replaced(changes), torch.device("cpu"))
