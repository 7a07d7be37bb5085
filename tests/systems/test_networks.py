"""The memory of networks, counted before they are built."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from molgen_energy.errors import InputError
from molgen_energy.models import MODELS, SHAPE_MODELS, SPIN_MODELS
from molgen_energy.systems import networks
from molgen_energy.systems.molecules.fields import MoleculeStatistics, ScalesConfig, build_layout
from molgen_energy.systems.networks import build_network, check_network_memory

ORGANIC = MoleculeStatistics((1, 6, 7, 8, 9))


def cases() -> list[tuple]:
    """Every network with the arguments that build it."""
    of_molecules = [
        (kind.Config(), build_layout(kind.Config.fields, ScalesConfig(), ORGANIC), 2, False)
        for kind in MODELS.values()
    ]
    of_points = [(kind.Config(), 1, 20, 2) for kind in SHAPE_MODELS.values()]
    return of_molecules + of_points + [(kind.Config(), 3, True) for kind in SPIN_MODELS.values()]


CASES = pytest.mark.parametrize("case", cases(), ids=lambda case: case[0].name)


@CASES
@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_the_parameters_are_those_of_the_network(monkeypatch, case, layers):
    section, *arguments = case
    section = section.model_copy(update={"layers": layers, "width": 24})
    sizes = []
    monkeypatch.setattr(networks, "check_memory", lambda size, *_: sizes.append(size))
    network = build_network(section, 0, *arguments)
    assert sizes == [8 * sum(parameter.numel() for parameter in network.parameters())]


@CASES
@pytest.mark.parametrize("width", [10**6, 10**9, 10**12, 2**63 - 1, 10**30])
def test_networks_beyond_the_memory_are_refused_at_once(monkeypatch, case, width):
    monkeypatch.setattr(networks, "_BYTES", 4000)  # also for a network as small as an MLP
    section, *arguments = case
    section = section.model_copy(update={"width": width, "layers": 1000})
    began = time.perf_counter()
    with pytest.raises(InputError, match=r"parameters takes .* lower model\.width"):
        build_network(section, 0, *arguments)
    assert time.perf_counter() - began < 1


@CASES
def test_weights_depend_on_the_seed_alone(case):
    section, *arguments = case
    section = section.model_copy(update={"layers": 3, "width": 16})
    torch.manual_seed(5)
    one = build_network(section, 7, *arguments)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(7)
    other = section.build(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Reading(nn.Module):
    """A network that reads a value of its own while it is built."""

    name = "reading"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        assert float(self.weight.detach().sum()) == 3

    def model_copy(self, update):
        return self

    def build(self):
        return Reading()


def test_a_network_that_cannot_be_built_without_memory_is_built():
    check_network_memory(Reading())
    assert len(list(build_network(Reading(), 0).parameters())) == 1
