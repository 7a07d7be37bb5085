"""JODO's network: its sizes, adjacency heads, and blocks of pairs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import textbook_jodo
import torch
from states import alike, inputs_of, network

from molgen_energy.models import jodo
from molgen_energy.models.jodo import JODOConfig
from molgen_energy.systems.molecules.fields import MoleculeStatistics, ScalesConfig, build_layout


@pytest.fixture
def make():
    """A network with other weights than the first ones, and inputs, in float64."""

    def make(again=True, **options):
        torch.manual_seed(0)
        model = network("jodo", 32, **options).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        mask = torch.arange(7) < torch.tensor([7, 4, 1, 2])[:, None]
        positions = torch.where(mask[..., None], torch.randn(4, 7, 3), torch.nan).double()
        return model, inputs_of(model, positions, mask, again)

    return make


def test_sizes_are_the_papers():
    """QM9, and the small, medium and large network for GEOM-Drugs."""

    def count(elements, aromatic, **options):
        statistics = MoleculeStatistics(tuple(range(1, elements + 1)), (-2, 3), aromatic)
        layout = build_layout(JODOConfig.fields, ScalesConfig(), statistics)
        with torch.device("meta"):
            model = JODOConfig(**options).build(layout, 0, False)
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(5, False) == 27_538_584  # that of JODO's code
    assert count(16, True, layers=10, feedforward=4) == 36_850_220
    small = count(16, True, layers=6, width=128, feedforward=4)
    large = count(16, True, layers=10, width=384, feedforward=4)
    assert (round(small / 1e6, 1), round(large / 1e6, 1)) == (5.7, 82.8)


@pytest.mark.parametrize("adjacency", ["squared_distance", "distance", "none"])
@pytest.mark.parametrize("signed", [False, True])
def test_adjacency(make, adjacency, signed):
    """By each rule for near atoms, in Å, and by bonds from halfway between no and yes."""
    model, inputs = make(spatial_adjacency=adjacency, cutoff=2.5)
    scales = ScalesConfig(positions=1.7, signed=signed)
    statistics = MoleculeStatistics((1, 6, 7, 8, 9), (-1, 1), aromatic=True)
    model.layout = build_layout(JODOConfig.fields, scales, statistics)
    expected = textbook_jodo.predicted(model, inputs.state, inputs.time, inputs.self_condition)
    for ours, theirs in alike(model(*inputs), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_rules_for_near_atoms_differ(make):
    results = []
    for rule in ("squared_distance", "distance", "none"):
        model, inputs = make(spatial_adjacency=rule, cutoff=2.5)
        results.append(model(*inputs)["positions"])
    assert all(not torch.allclose(a, b) for a, b in pairwise(results))


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_blocks_are_the_whole(make, monkeypatch, rows):
    """Also blocks that begin and end within a molecule, without gradients."""
    model, inputs = make()
    with torch.no_grad():
        expected = model(*inputs)
        monkeypatch.setattr(jodo, "_BLOCK_CPU", 32 * rows)
        assert len(jodo._Pairs(inputs.mask, 32).blocks) > 1
        for ours, theirs in alike(model(*inputs), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_one_noise_level_is_computed_once(make):
    """With the same result as beside samples of another level."""
    model, inputs = make()
    level = torch.full_like(inputs.time, 0.3)
    other = torch.cat([level[:-1], level[-1:] + 1])
    together, apart = (model(*inputs._replace(time=time)) for time in (level, other))
    for ours, theirs in alike(together, apart):
        torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-12, atol=1e-12)
