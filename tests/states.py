"""States of a diffusion that several tests use."""

from __future__ import annotations

from typing import NamedTuple

import torch

from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.process import Process
from molgen_energy.diffusion.state import Field, Layout, State, pairs_inside
from molgen_energy.models import MODELS, Denoiser
from molgen_energy.systems.molecules.fields import MoleculeStatistics, ScalesConfig, build_layout


def layout_of(features: int, scale: float = 1.0) -> Layout:
    """Positions and a discrete field of atoms, `features`."""
    positions = Field("positions", "atom", 3, scale, "zero_mean")
    return Layout([positions, Field("features", "atom", features, discrete=True)])


def atoms_state(layout: Layout, mask: torch.Tensor, atoms: torch.Tensor) -> State:
    """A state of fields of atoms, values (B, N, C), as they are."""
    return State(layout, mask, {"atom": atoms})


def seeded_noise(layout: Layout, mask: torch.Tensor, seed: int = 0) -> State:
    """Standard normal noise on the subspaces of the fields."""
    return RandomNumbers(seed, torch.arange(len(mask))).noise(layout, mask, 0)


class ExactRandomNumbers(RandomNumbers):
    """In float64, so that rounding is far below what is measured."""

    def _normal(self, *arguments):
        return super()._normal(*arguments).double()


def levels_at(process: Process, times: torch.Tensor) -> torch.Tensor:
    """Levels at times in [0, 1]."""
    return times.double() if process.continuous else (times * process.steps).round().long()


def on_atoms(model, atoms: torch.Tensor, time: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The output (B, N, C) of a denoiser of atoms for noisy values (B, N, C)."""
    return model(atoms_state(model.layout, mask, atoms), time, mask).atoms


def network(name: str, width: int, **options: object) -> Denoiser:
    """A registered network of two layers for organic molecules, in evaluation mode.

    For all fields that it predicts, on data with formal charges and aromatic bonds.
    """
    statistics = MoleculeStatistics((1, 6, 7, 8, 9), (-1, 1), aromatic=True)
    section = MODELS[name].Config(name=name, layers=2, width=width, **options)
    layout = build_layout(section.fields, ScalesConfig(), statistics)
    return section.build(layout, 0, False).eval()


class Inputs(NamedTuple):
    """What a network takes."""

    state: State
    time: torch.Tensor
    mask: torch.Tensor
    condition: None = None
    self_condition: State | None = None

    def map(self, function) -> Inputs:
        """With a function applied to states."""
        previous = self.self_condition and function(self.self_condition)
        return self._replace(state=function(self.state), self_condition=previous)

    def select(self, which: torch.Tensor | slice, size: int) -> Inputs:
        """Some samples, with so many atoms."""
        mask = self.mask[which, :size]

        def selected(state: State) -> State:
            atoms = {domain: v[which, :size] for domain, v in state.tensors.items()}
            cut = {d: v[:, :, :size] if d == "pair" else v for d, v in atoms.items()}
            return State(state.layout, mask, cut)

        chosen = self.map(selected)
        return chosen._replace(time=self.time[which], mask=mask)

    def to(self, dtype: torch.dtype) -> Inputs:
        """In another precision."""
        states = self.map(lambda state: state.map(lambda values: values.to(dtype)))
        return states._replace(time=self.time.to(dtype))


CALLS = [
    (name, again)
    for name, kind in MODELS.items()
    for again in ((False, True) if kind.self_conditioned else (False,))
]
"""Every network, and whether it gets its previous prediction."""


def inputs_of(
    model: Denoiser, positions: torch.Tensor, mask: torch.Tensor, self_condition: bool = False
) -> Inputs:
    """Positions (B, N, 3), random values of the other fields and times, and a random prediction.

    NaN at padding and on the diagonal of pairs.
    """
    layout = model.layout

    def state(positions: torch.Tensor) -> State:
        tensors = {
            domain: torch.randn(layout.shape(domain, mask)).to(positions)
            for domain in layout.channels
        }
        tensors["atom"][..., :3] = positions
        if "pair" in tensors:
            tensors["pair"] = tensors["pair"] + tensors["pair"].transpose(1, 2)
        inside = {"atom": mask, "pair": pairs_inside(mask)}
        poisoned = {
            domain: torch.where(inside[domain][..., None], values, torch.nan)
            for domain, values in tensors.items()
        }
        return State(layout, mask, poisoned)

    time = torch.rand(len(mask)).to(positions)
    if model.noise_input == "log_snr":
        time = 12 * time - 6
    noisy = state(positions)
    previous = state(positions + 0.3 * torch.randn(positions.shape).to(positions))
    return Inputs(noisy, time, mask, None, previous if self_condition else None)


def alike(ours: State, others: State):
    """The tensors of two states, side by side."""
    assert list(ours.tensors) == list(others.tensors)
    return zip(ours.tensors.values(), others.tensors.values(), strict=True)
