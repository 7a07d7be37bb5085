"""Charges, bonds and properties from a file through training and sampling to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CPU, assert_same_run, tiny
from torch import nn

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.molfiles import MoleculeReader, writer
from molgen_energy.chemistry.rdkit import bond_forms
from molgen_energy.data.batches import DeviceMolecules
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import AROMATIC, Molecules, Property
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.state import State
from molgen_energy.errors import InputError
from molgen_energy.models import MODELS
from molgen_energy.models.gdm import GDM, GDMConfig
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.molecules.condition import PropertyCondition
from molgen_energy.systems.molecules.fields import (
    MOLECULE_FIELDS,
    MoleculeStatistics,
    ScalesConfig,
    build_layout,
    field_columns,
)
from molgen_energy.systems.molecules.generate import MoleculeGenerator, bonds_of
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train


def with_columns(molecules: Molecules) -> Molecules:
    """Perceived bonds, some of them aromatic, random charges, and two properties."""
    molecules = perceive(molecules)
    rng = np.random.default_rng(0)
    order = np.where(rng.random(len(molecules.bonds.order)) < 0.1, AROMATIC, molecules.bonds.order)
    gap = 0.2 + 0.05 * rng.standard_normal(len(molecules))
    gap[::7] = np.nan
    return replace(
        molecules,
        formal_charges=rng.integers(-1, 3, len(molecules.atomic_numbers)).astype(np.int8),
        bonds=replace(molecules.bonds, order=order.astype(np.uint8)),
        properties={
            "gap": Property(gap, "hartree"),
            "size": Property(molecules.sizes.astype(np.float64), ""),
        },
    )


@pytest.fixture(scope="module")
def rich(molecules) -> Molecules:
    return with_columns(molecules.select(np.arange(0, 2000, 10)))


@pytest.fixture(scope="module")
def rich_file(rich, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rich.h5"
    with MoleculeWriter(path, source="rich") as writer:
        writer.append(rich)
        split = np.zeros(len(rich), np.uint8)
        split[::10] = 1
        writer.set_split(split)
    return path


STATISTICS = MoleculeStatistics((1, 6, 7, 8, 9), (-1, 2), aromatic=True)
SIGNED = ScalesConfig(bonds=1.0, signed=True)


def test_every_field_there_and_back(rich):
    """Noise far below half a unit is rounded away."""
    layout = build_layout(tuple(MOLECULE_FIELDS), ScalesConfig(), STATISTICS)
    assert layout.channels == {"atom": 3 + 5 + 1 + 1, "pair": 3}
    assert field_columns(layout) == {"formal_charges", "bonds"}
    which = np.arange(0, 200, 20)
    batch = DeviceMolecules(rich, CPU, dense_bonds=True).batch(which)
    values = {name: field.encode(batch.data) for name, field in layout.fields.items()}
    clean = State.from_fields(layout, batch.mask, values)
    noise = RandomNumbers(0, torch.arange(10)).noise(layout, batch.mask, 0)
    found = (clean + 0.01 * noise).decode()
    chosen, mask = rich.select(which), batch.mask
    assert np.array_equal(found["atomic_numbers"][mask].numpy(), chosen.atomic_numbers)
    assert np.array_equal(found["formal_charges"][mask].numpy(), chosen.formal_charges)
    bonds = bonds_of(found["bond_orders"], mask)
    assert np.array_equal(bonds.offsets, chosen.bonds.offsets)
    assert (bonds.order == AROMATIC).any()
    for k in range(len(which)):
        one = slice(bonds.offsets[k], bonds.offsets[k + 1])
        ours = {
            (*sorted(map(int, i)), int(o))
            for i, o in zip(bonds.index[one], bonds.order[one], strict=True)
        }
        index, order = chosen.bonds.index[one], chosen.bonds.order[one]
        assert ours == {(*sorted(map(int, i)), int(o)) for i, o in zip(index, order, strict=True)}
    assert (found["bond_orders"].diagonal(dim1=1, dim2=2) == 0).all()


def test_bonds_are_jodos_compressed_edges():
    """Whether there is a bond, a third of its order, whether it is aromatic; as −1 … 1."""
    field = build_layout(("positions", "bonds"), SIGNED, STATISTICS).fields["bonds"]
    orders = torch.tensor([0, 1, 2, 3, AROMATIC]).view(5, 1, 1)
    encoded = field.encode({"bond_orders": orders, "positions": torch.zeros(1)})
    expected = [[-1, -1, -1], [1, -1 / 3, -1], [1, 1 / 3, -1], [1, 1, -1], [1, -1, 1]]
    torch.testing.assert_close(encoded.view(5, 3), torch.tensor(expected))
    # Existence, order and kind of doubtful bonds: limits ½, and ½, 1.5 and 2.5 of the order.
    values = [
        ([0.49, 1.0, 0.0], 0), ([0.5, 0.34, 0.0], 1), ([0.9, 0.16, 0.4], 0),
        ([0.9, 0.17, 0.9], 1), ([0.9, 0.16, 0.5], AROMATIC), ([0.9, 0.51, 0.9], 2),
        ([0.9, 2.0, 0.0], 3), ([0.4, 0.0, 1.0], 0),
    ]  # fmt: skip
    pair = torch.zeros(len(values), 2, 2, 3)
    pair[:, 0, 1] = pair[:, 1, 0] = 2 * torch.tensor([v for v, _ in values]) - 1
    decoded = field.decode(pair)["bond_orders"]
    assert decoded[:, 0, 1].tolist() == decoded[:, 1, 0].tolist() == [o for _, o in values]


def test_signed_elements():
    field = build_layout(("positions", "elements"), SIGNED, STATISTICS).fields["elements"]
    numbers = torch.tensor([[6, 9]])
    encoded = field.encode({"atomic_numbers": numbers, "positions": torch.zeros(1)})
    expected = torch.tensor([[[-1, 1, -1, -1, -1], [-1, -1, -1, -1, 1]]]) / 4
    torch.testing.assert_close(encoded, expected)
    assert torch.equal(field.decode(encoded)["atomic_numbers"], numbers.to(torch.uint8))


def test_decoded_values_stay_within_those_of_the_data():
    layout = build_layout(tuple(MOLECULE_FIELDS), ScalesConfig(), STATISTICS)
    mask = torch.ones(4, 5, dtype=torch.bool)
    noise = RandomNumbers(0, torch.arange(4)).noise(layout, mask, 0)
    for state in (100 * noise, noise.map(lambda values: torch.full_like(values, torch.nan))):
        found = state.decode()
        assert set(found["atomic_numbers"].unique().tolist()) <= {1, 6, 7, 8, 9}
        assert set(found["formal_charges"].unique().tolist()) <= {-1, 0, 1, 2}
        assert set(found["bond_orders"].unique().tolist()) <= {0, 1, 2, 3, AROMATIC}


def test_layouts_that_are_not_possible():
    for names in ((), ("elements", "positions")):
        with pytest.raises(InputError, match="must begin with positions"):
            build_layout(names, ScalesConfig(), STATISTICS)
    with pytest.raises(InputError, match=r"unknown field 'charges'"):
        build_layout(("positions", "charges"), ScalesConfig(), STATISTICS)


class EverythingConfig(GDMConfig):
    """All fields of a molecule."""

    name: str = "everything"
    fields = tuple(MOLECULE_FIELDS)

    def build(self, layout, condition_channels, low_precision):
        return Everything(
            layout, self.layers, self.width, self.normalization, low_precision, condition_channels
        )


class Everything(GDM):
    """GDM, with bonds from its predictions for the two atoms and the noisy bond."""

    Config = EverythingConfig

    def __init__(self, layout, *arguments):
        super().__init__(layout, *arguments)
        channels = layout.channels["pair"]
        self.bonds = nn.Linear(layout.channels["atom"] + channels, channels)

    def forward(self, state, time, mask, condition=None, self_condition=None):
        atoms = super().forward(state, time, mask, condition).atoms
        pairs = torch.cat([atoms[:, :, None] + atoms[:, None], state.tensors["pair"]], dim=-1)
        return State(state.layout, mask, {"atom": atoms, "pair": self.bonds(pairs)}).projected()


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setitem(MODELS, "everything", Everything)


def changed(path: Path, **changes):
    return tiny(model__name="everything", data__path=str(path), process__steps=10, **changes)


def test_charges_and_bonds_are_learned_and_written(everything, rich_file, tmp_path, monkeypatch):
    # A network that has learned little joins more atoms than an SDF of molecules would hold.
    monkeypatch.setattr(writer, "MAX_NEIGHBOURS", 99)
    task = MoleculeTask(changed(rich_file, objective__field_weights={"bonds": 2.0}), CPU)
    assert task.loss_terms == tuple(f"{name}_loss" for name in MOLECULE_FIELDS)
    statistics = task.state["statistics"]
    assert (statistics["charges"], statistics["aromatic"]) == ([-1, 2], True)
    train(task, tmp_path / "run")
    generator = MoleculeGenerator(load_checkpoint(tmp_path / "run"), CPU)
    for suffix in ("h5", "sdf"):
        sample_to_file(generator, 9, tmp_path / f"a.{suffix}", NoCallback())
    with MoleculeFile(tmp_path / "a.h5") as file:
        drawn = file.load()
    assert file.columns >= {"formal_charges", "bonds"}
    assert drawn.formal_charges.min() >= -1 and drawn.formal_charges.max() <= 2
    assert len(np.unique(drawn.formal_charges)) > 1
    assert len(drawn.bonds.order) and set(drawn.bonds.order) <= {1, 2, 3, AROMATIC}
    assert (drawn.bonds.index[:, 0] < drawn.bonds.index[:, 1]).all()
    read = Molecules.from_list(list(MoleculeReader(tmp_path / "a.sdf")))
    assert np.array_equal(read.formal_charges, drawn.formal_charges)
    assert np.array_equal(read.bonds.offsets, drawn.bonds.offsets)
    kekule = np.concatenate(
        [bond_forms(one).kekule if AROMATIC in one.bond_order else one.bond_order for one in drawn]
    )
    assert np.array_equal(np.sort(read.bonds.order), np.sort(kekule))


def test_streamed_fields_are_the_resident_ones(everything, rich_file, tmp_path):
    changes = {"training__batch_size": 90, "objective__position_weight": 1.0}
    tasks = [
        MoleculeTask(changed(rich_file, data__in_memory=memory, data__window=90, **changes), CPU)
        for memory in (True, False)
    ]
    resident, streamed = tasks
    streamed._objective = resident._objective
    batch = streamed.epoch(0)[1]
    ranks = streamed._train._content(batch.window)[1][batch.which]
    same = replace(batch, window=0, which=ranks)
    found = streamed.loss(resident.model, batch, 3)
    expected = resident.loss(resident.model, same, 3)
    for name in ("loss", *resident.loss_terms):
        torch.testing.assert_close(found[name], expected[name])
    streamed.close()


def test_the_shards_of_a_batch_are_the_batch(everything, rich_file):
    """With rotations, stratified timesteps and withheld properties, for every field."""
    config = changed(
        rich_file, training__augment_rotations=True, objective__stratified_timesteps=True,
        condition__name="properties", condition__properties=["gap", "size"],
        condition__dropout=0.5,
    )  # fmt: skip
    task = MoleculeTask(config, CPU)
    batch = task.epoch(0)[0]
    whole = task.loss(task.model, batch, 5)
    for world in (2, 3):
        for rank in range(world):
            shard = task.loss(task.model, batch, 5, rank, world)
            for name, values in whole.items():
                torch.testing.assert_close(shard[name], values[rank::world], rtol=1e-4, atol=1e-5)


def test_missing_columns_are_named(everything, rich_file, sample_path):
    with pytest.raises(InputError, match="has no column bonds, which model everything generates"):
        MoleculeTask(changed(sample_path), CPU)
    condition = {"condition__name": "properties", "condition__properties": ["gup"]}
    with pytest.raises(InputError, match=r"unknown property 'gup'; did you mean 'gap'"):
        MoleculeTask(changed(rich_file, **condition), CPU)
    for weights in ({"cell": 1.0}, {"positions": 2.0}):
        with pytest.raises(InputError, match=rf"field_weights: {next(iter(weights))} is none of"):
            MoleculeTask(changed(rich_file, objective__field_weights=weights), CPU)


# -- conditions ----------------------------------------------------------------------------------


def condition_of(values, dropout=0.0, single_dropout=0.0):
    atoms = np.arange(len(values)) % 7 + 3
    return PropertyCondition.fit(
        ["gap", "mu"], ["hartree", "debye"], values, atoms, 0, dropout, single_dropout
    )


def test_conditions_are_normalised_and_missing_values_are_marked():
    rng = np.random.default_rng(0)
    values = rng.normal((0.2, 3.0), (0.05, 1.5), (2000, 2))
    values[::9, 1] = np.nan
    condition = condition_of(values)
    assert condition.channels == 4
    assert condition.values.shape == (1000, 2)
    encoded = condition.encode(torch.from_numpy(values))
    known = ~np.isnan(values)
    assert np.array_equal(encoded[:, 2:].numpy(), known)
    for k in range(2):
        numbers = encoded[:, k].numpy()[known[:, k]]
        assert numbers.mean() == pytest.approx(0, abs=1e-5)
        assert numbers.std() == pytest.approx(1, abs=1e-5)
        assert (encoded[:, k].numpy()[~known[:, k]] == 0).all()
    again = PropertyCondition.from_dict(condition.to_dict())
    assert torch.equal(again.encode(torch.from_numpy(values)), encoded)


def test_conditions_are_withheld_as_often_as_set():
    values = np.random.default_rng(0).normal(size=(4000, 2))
    encoded = condition_of(values, 0.3).encode(
        torch.from_numpy(values), RandomNumbers(0, torch.arange(4000))
    )
    withheld = encoded[:, 2] == 0
    assert float(withheld.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert (encoded[withheld] == 0).all()  # all properties of a molecule together
    assert (encoded[~withheld, 2:] == 1).all()


def test_single_properties_are_withheld_independently_of_each_other():
    values = np.random.default_rng(0).normal(size=(4000, 2))
    encoded = condition_of(values, 0.2, 0.4).encode(
        torch.from_numpy(values), RandomNumbers(0, torch.arange(4000))
    )
    gap, mu = (encoded[:, 2:] == 1).T
    shares = [float(x.float().mean()) for x in (gap & mu, gap & ~mu, ~gap & mu, ~gap & ~mu)]
    # None with probability 0.2; else each is withheld with probability 0.4.
    assert shares == pytest.approx(
        [0.8 * 0.36, 0.8 * 0.24, 0.8 * 0.24, 0.2 + 0.8 * 0.16], abs=0.025
    )
    # The numbers of a molecule do not depend on its batch.
    alone = condition_of(values, 0.2, 0.4).encode(
        torch.from_numpy(values[70:75]), RandomNumbers(0, torch.arange(70, 75))
    )
    assert torch.equal(alone, encoded[70:75])


def test_a_single_property_is_withheld_by_the_joint_dropout_alone():
    values = np.random.default_rng(0).normal(size=(50, 1))
    condition = PropertyCondition.fit(["gap"], ["hartree"], values, np.full(50, 9), 0, 0.0, 0.5)
    encoded = condition.encode(torch.from_numpy(values), RandomNumbers(0, torch.arange(50)))
    assert (encoded[:, 1] == 1).all()


def test_conditions_know_the_range_of_the_training_molecules():
    values = np.random.default_rng(0).normal(size=(3000, 2))
    values[5, 1] = np.nan
    condition = condition_of(values)
    assert condition.lowest == tuple(np.nanmin(values, axis=0))
    assert condition.highest == tuple(np.nanmax(values, axis=0))
    state = condition.to_dict()
    assert PropertyCondition.from_dict(state).highest == condition.highest
    older = {key: part for key, part in state.items() if key not in ("lowest", "highest")}
    stored = condition.values  # a thousand of the molecules
    assert PropertyCondition.from_dict(older).lowest == tuple(stored.min(axis=0))


def test_constant_properties_are_refused():
    values = np.stack([np.arange(9.0), np.full(9, 3.0)], axis=1)
    with pytest.raises(InputError, match="mu has no two different values"):
        condition_of(values)
    with pytest.raises(InputError, match="mu has no two different values"):
        condition_of(np.stack([np.arange(9.0), np.full(9, np.nan)], axis=1))
    apart = np.full((4, 2), np.nan)
    apart[:2, 0] = apart[2:, 1] = 0, 1
    with pytest.raises(InputError, match="no training molecule has all of gap, mu"):
        condition_of(apart)


@pytest.mark.parametrize("model", MODELS)
def test_conditional_models_train_and_sample(rich_file, tmp_path, model):
    """The condition changes the molecules, and is written beside them."""
    config = tiny(
        model__name=model, data__path=str(rich_file), process__steps=10,
        condition__name="properties", condition__properties=["gap", "size"], training__lr=1e-2,
    )  # fmt: skip
    train(MoleculeTask(config, CPU), tmp_path / "run")
    train(MoleculeTask(config, CPU), tmp_path / "again")
    assert_same_run(tmp_path / "run", tmp_path / "again")
    checkpoint = load_checkpoint(tmp_path / "run")
    drawn = {}
    for name, given in (
        ("low", {"gap": (0.1, 0.1)}),
        ("high", {"gap": (0.3, 0.3)}),
        ("data", None),
    ):
        generator = MoleculeGenerator(checkpoint, CPU, sizes=(9, 9), where=given)
        drawn[name] = generator.draw(torch.arange(4))
    low, high, data = drawn["low"], drawn["high"], drawn["data"]
    assert not np.allclose(low.positions, high.positions)
    assert (low.properties["condition_gap"].values == 0.1).all()
    assert np.isnan(low.properties["condition_size"].values).all()
    assert low.properties["condition_gap"].unit == "hartree"
    assert np.isfinite(data.properties["condition_gap"].values).all()
    with pytest.raises(InputError, match=r"unknown property 'mass' \(valid: gap, size\)"):
        MoleculeGenerator(checkpoint, CPU, where={"mass": (1.0, 1.0)})
    for suffix in ("sdf", "xyz", "h5"):
        path = tmp_path / f"a.{suffix}"
        sample_to_file(generator, 3, path, NoCallback())
    with MoleculeFile(tmp_path / "a.h5") as file:
        assert file.load().properties["condition_gap"].unit == "hartree"
    selection = MoleculeReader(tmp_path / "a.sdf").detect_fields()
    first = next(iter(MoleculeReader(tmp_path / "a.sdf", selection=selection)))
    assert first.properties["condition_gap"] == pytest.approx(
        float(data.properties["condition_gap"].values[0])
    )


def test_a_condition_of_a_model_without_one(tmp_path):
    train(MoleculeTask(tiny(process__steps=10, training__steps=1), CPU), tmp_path / "run")
    with pytest.raises(InputError, match="was trained without properties; leave out --where"):
        MoleculeGenerator(load_checkpoint(tmp_path / "run"), CPU, where={"gap": (1.0, 1.0)})
