"""Weights for networks of other channels: the same output for the data that both know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CPU

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.batches import DeviceMolecules
from molgen_energy.diffusion.state import State
from molgen_energy.errors import InputError
from molgen_energy.models import MODELS
from molgen_energy.systems.molecules.condition import (
    PropertyCondition,
    check_conditions,
    renormalised,
)
from molgen_energy.systems.molecules.fields import MoleculeStatistics, ScalesConfig, build_layout
from molgen_energy.training.channels import fit_weights

QM9 = (1, 6, 7, 8, 9)
PERMUTED = (17, 9, 8, 6, 7, 16, 1)  # with Cl and S


def condition(names, mean, std, unit="eV"):
    values, count = np.zeros((1, len(names))), len(names)
    return PropertyCondition(
        names, (unit,) * count, mean, std, values, (-1.0,) * count, (1.0,) * count
    )


THEIRS = condition(("gap", "mu"), (2.0, 0.5), (0.5, 3.0))
OWN = condition(("size", "mu", "gap"), (9.0, 1.5, 3.0), (1.0, 2.0, 0.25))


def layout_of(name, elements):
    """Only data of the permuted elements have aromatic bonds."""
    statistics = MoleculeStatistics(elements, (-1, 1), aromatic=elements == PERMUTED)
    return build_layout(MODELS[name].Config.fields, ScalesConfig(), statistics)


def network(name, elements, properties, seed=0):
    """A network with random numbers in every parameter, also in those that start at zero."""
    layout = layout_of(name, elements)
    channels = 0 if properties is None else properties.channels
    model = MODELS[name].Config(layers=2, width=16).build(layout, channels, False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def axes_of(model, properties):
    names = () if properties is None else properties.channel_names
    return type(model).channel_axes(model.layout, names)


@pytest.mark.parametrize("name", MODELS)
def test_networks_name_all_axes_of_channels(name):
    """Those, and no others, have another shape for other fields."""
    small, large = network(name, QM9, THEIRS), network(name, PERMUTED, OWN)
    own, other = small.state_dict(), large.state_dict()
    axes, other_axes = axes_of(small, THEIRS), axes_of(large, OWN)
    assert {key for key in own if own[key].shape != other[key].shape} == axes.keys()
    for model, named in ((own, axes), (other, other_axes)):
        for key, (axis, names) in named.items():
            assert model[key].shape[axis] == len(names) == len(set(names))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("conditional", [False, True])
def test_output_is_the_same_for_known_channels(name, conditional, molecules):
    """Elements in another order, two more of them, and properties of another normalisation."""
    theirs, own = (THEIRS, OWN) if conditional else (None, None)
    before, after = network(name, QM9, theirs), network(name, PERMUTED, own, seed=1)
    tensors, axes = before.state_dict(), axes_of(before, theirs)
    if conditional:
        tensors |= {
            key: renormalised(tensors[key], axis, theirs, own) for key, axis in axes.items()
        }
    fitted = fit_weights(tensors, after.state_dict(), axes, axes_of(after, own), seed=3)
    assert set(fitted.new) >= {"elements Cl", "elements S"} and not fitted.left_out
    after.load_state_dict(dict(fitted.tensors))

    few = perceive(molecules.select(np.arange(5, 2000, 400)))
    few = replace(few, formal_charges=np.zeros(len(few.positions), np.int8))
    batch = DeviceMolecules(few, CPU, dense_bonds=True).batch(np.arange(5))
    time = torch.linspace(0.05, 0.95, len(batch.mask))
    generator = torch.Generator().manual_seed(2)
    properties = torch.rand(len(time), 2, generator=generator, dtype=torch.float64)
    properties[1, 0] = torch.nan
    shared_channels = before.layout.channels["atom"]
    outputs, noise = [], 0.3 * torch.randn(*batch.mask.shape, shared_channels, generator=generator)
    for model, given in ((before, theirs), (after, own)):
        layout = model.layout
        values = {key: field.encode(batch.data) for key, field in layout.fields.items()}
        clean = State.from_fields(layout, batch.mask, values)
        atoms = clean.atoms.clone()
        shared = [
            layout.channel_names("atom").index(k) for k in before.layout.channel_names("atom")
        ]
        atoms[..., shared] += noise
        known = None
        if given is not None:
            columns = torch.full((len(time), len(given.names)), torch.nan, dtype=torch.float64)
            columns[:, given.names.index("gap")] = properties[:, 0]
            columns[:, given.names.index("mu")] = properties[:, 1]
            known = given.encode(columns)
        with torch.no_grad():
            predicted = model(clean.with_atoms(atoms).projected(), time, batch.mask, known)
        outputs.append(predicted.atoms[..., shared])
    assert (outputs[1] - outputs[0]).abs().max() < 1e-4 * outputs[0].abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_new_channels_start_small_and_depend_on_the_seed_alone(name):
    before, after = network(name, QM9, None), network(name, PERMUTED, THEIRS)
    axes, own_axes = axes_of(before, None), axes_of(after, THEIRS)

    def fitted(seed):
        return fit_weights(before.state_dict(), after.state_dict(), axes, own_axes, seed)

    weights = fitted(3)
    readout, names = next(
        (key, names)
        for key, (axis, names) in own_axes.items()
        if axis == 0 and "elements S" in names
    )
    rows = weights.tensors[readout][names.index("elements S")]
    others = before.state_dict()[readout]
    assert 0 < float(rows.square().mean().sqrt()) < 0.03 * float(others.square().mean().sqrt())
    # Of a layer that only this network has, inputs are a fifth as large, and the bias is small.
    own = after.state_dict()
    embedded = weights.tensors["embed_condition.weight"]
    torch.testing.assert_close(embedded, 0.2 * own["embed_condition.weight"])
    bias = weights.tensors["embed_condition.bias"]
    torch.testing.assert_close(bias, 0.01 * own["embed_condition.bias"])
    condition_size = sum(
        after.state_dict()[f"embed_condition.{part}"].numel() for part in ("weight", "bias")
    )
    new = sum(
        after.state_dict()[key].movedim(axis, 0)[[n not in axes[key].names for n in names]].numel()
        for key, (axis, names) in own_axes.items()
        if key in axes
    )
    assert weights.drawn == new + condition_size
    same, other = fitted(3).tensors, fitted(4).tensors
    assert all(torch.equal(same[key], value) for key, value in weights.tensors.items())
    embedding = next(key for key, (axis, _) in own_axes.items() if axis == 1)
    assert not torch.equal(other[embedding], weights.tensors[embedding])


def test_channels_that_the_data_do_not_have_are_left_out():
    before, after = network("gdm", QM9, None), network("gdm", (1, 6, 8), None)
    fitted = fit_weights(
        before.state_dict(), after.state_dict(), axes_of(before, None), axes_of(after, None), 0
    )
    assert fitted.left_out == ("elements N", "elements F")
    assert (fitted.new, fitted.drawn) == ((), 0)
    kept = before.state_dict()["embed.weight"][:, [0, 1, 2, 3, 4, 6, 8, 9]]
    assert torch.equal(fitted.tensors["embed.weight"], kept)


def test_conditions_that_do_not_fit():
    where = Path("weights")
    check_conditions(None, OWN, where)
    check_conditions(THEIRS, OWN, where)
    with pytest.raises(
        InputError, match=r"weights has a condition on gap, mu; set condition\.name"
    ):
        check_conditions(THEIRS, None, where)
    with pytest.raises(InputError, match="the property gap in eV, the data in hartree; convert"):
        check_conditions(THEIRS, condition(("gap",), (0.0,), (1.0,), "hartree"), where)


def test_new_inputs_are_as_large_as_the_others_and_new_outputs_small(molecules):
    before, after = network("gdm", QM9, None), network("gdm", PERMUTED, None, seed=1)
    axes, own = axes_of(before, None), axes_of(after, None)
    fitted = fit_weights(before.state_dict(), after.state_dict(), axes, own, seed=3)
    for key, (axis, names) in own.items():
        new = torch.tensor([name not in axes[key].names for name in names])
        values = fitted.tensors[key].movedim(axis, 0)
        ratio = values[new].square().mean().sqrt() / values[~new].square().mean().sqrt()
        assert (0.5 < ratio < 2) if axis == 1 else (0.001 < ratio < 0.1), key
