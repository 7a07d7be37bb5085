"""States of a diffusion that several tests use."""

from __future__ import annotations

import torch

from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.process import Process
from molgen_energy.diffusion.state import Field, Layout, State


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
