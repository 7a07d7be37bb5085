"""The forward processes and their training objectives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.geometry import on_subspace
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.losses import PositionLoss

_DRAWS = 1 << 62  # graphs are taken modulo their number


class Terms(NamedTuple):
    """The objective of each sample and its two parts, each (B,)."""

    total: Tensor
    positions: Tensor
    features: Tensor


class Share(NamedTuple):
    """The samples of a batch that a process has: `first`, `first` + `every`, … of all.

    Random numbers are drawn for the whole batch and the own ones taken, so that several processes
    together do what one would do.
    """

    samples: int
    """Of the whole batch."""
    atoms: int
    """N of the whole batch."""
    first: int = 0
    every: int = 1

    def integers(self, below: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Random numbers of the own samples, (B,) int64."""
        drawn = torch.randint(below, (self.samples,), generator=generator, device=device)
        return drawn[self.first :: self.every]

    def uniform(self, generator: torch.Generator, device: torch.device, spread: bool) -> Tensor:
        """Random numbers in [0, 1) of the own samples, (B,).

        Where they are spread, one of the whole batch lies in each B-th of the interval.
        """
        drawn = torch.rand(self.samples, generator=generator, device=device)
        if spread:
            order = torch.randperm(self.samples, generator=generator, device=device)
            drawn = (order + drawn) / self.samples
        return drawn[self.first :: self.every]

    def normal(self, atoms: int, channels: int, generator: torch.Generator) -> Tensor:
        """Standard normal numbers of the own samples, (B, atoms, channels)."""
        shape = (self.samples, self.atoms, channels)
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn[self.first :: self.every, :atoms]


class Times(NamedTuple):
    """How often a network is trained at which noise levels.

    Level number ⌊levels·u^power⌋ for u uniform in [0, 1): with a power above 1, little noise is
    more frequent than much.
    """

    power: float = 1.0
    spread: bool = False
    """Whether the u of a batch are spread evenly; their mean loss varies less then."""

    def draw(
        self, levels: int, share: Share, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        """Numbers of levels, from 0, of the own samples, (B,) int64."""
        if self == Times():
            return share.integers(levels, generator, device)
        uniform = share.uniform(generator, device, self.spread)
        return (levels * uniform**self.power).long().clamp(max=levels - 1)


def molecule_noise(
    mask: Tensor, channels: int, generator: torch.Generator, share: Share | None = None
) -> Tensor:
    """Standard normal noise (B, N, channels), positions (the first 3) with zero mean; 0 outside."""
    share = share or Share(*mask.shape)
    return on_subspace(share.normal(mask.shape[1], channels, generator), mask)


def clean_prediction(noisy: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x̂ = (x_t − σ_t ε̂)/α_t for (B, N, C) and levels (B,)."""
    return (noisy - sigma[:, None, None] * noise) / alpha[:, None, None]


class Objective(ABC):
    """½·[w·W(t)·L(s·x̂, s·x) + Σ|h − ĥ|^p / (n·(3+F))] for each sample, p the degree of L.

    Section 4.2 of Kaba et al., NeurIPS 2025. L is a loss on clean positions and ĥ what the network
    predicts of the features. The weight W makes a small error of the network's prediction cost the
    same at every time, as it does with the squared error of the prediction itself. The scale s
    takes positions from the diffusion's unit to Å, in which springs are defined.

    Parameters
    ----------
    schedule
        Times that the network is trained at.
    position_loss
        L, called with clean positions in Å; one degree for a squared error, an absolute one for 1.
    position_weight
        w.
    position_scale
        s, Å in one unit of the diffusion.
    times
        How often which level is taken.
    """

    def __init__(
        self,
        schedule: PolynomialSchedule,
        position_loss: PositionLoss,
        position_weight: float,
        position_scale: float = 1.0,
        times: Times | None = None,
    ) -> None:
        self.schedule = schedule
        self.position_loss = position_loss
        self.position_weight = position_weight
        self.position_scale = position_scale
        self.times = Times() if times is None else times

    def __call__(
        self,
        model: nn.Module,
        clean: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        given: Mapping[str, Any] = MappingProxyType({}),
        share: Share | None = None,
    ) -> Terms:
        """Draw a time and noise for each sample, and judge the model's prediction.

        Parameters
        ----------
        model
            Called as model(noisy, time, mask).
        clean
            (B, N, 3+F), positions with zero mean first.
        mask
            (B, N), true at real atoms.
        generator
            Source of randomness, on the device of the data.
        given
            What else the loss is to be called with, such as bonds.
        share
            Which samples of a larger batch these are; None where they are all.
        """
        share = share or Share(*mask.shape)
        guess = self._guess(model, clean, mask, generator, share)
        draws = share.integers(_DRAWS, generator, clean.device)
        scale, degree = self.position_scale, self.position_loss.degree
        loss = self.position_loss(
            scale * guess.clean, scale * clean[..., :3], mask, generator=draws, **given
        )
        weight = self.position_weight * (guess.weight / scale) ** degree
        positions = 0.5 * weight * loss
        difference = torch.where(mask[..., None], guess.features - guess.wanted, 0)
        error = difference.square() if degree == 2 else difference.abs() ** degree
        count = mask.sum(dim=1).clamp(min=1) * clean.shape[-1]
        features = 0.5 * error.sum(dim=(1, 2)) / count
        return Terms(positions + features, positions, features)

    @abstractmethod
    def _guess(
        self,
        model: nn.Module,
        clean: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        share: Share,
    ) -> Guess:
        """What the model predicts at random times."""


class Guess(NamedTuple):
    """A prediction of the network."""

    clean: Tensor
    """Clean positions (B, N, 3)."""
    weight: Tensor
    """√W or, for a loss of degree p, W^(1/p), (B,)."""
    features: Tensor
    """Predicted noise or velocity of the features, (B, N, F)."""
    wanted: Tensor
    """What it should be."""


class DiffusionObjective(Objective):
    """x_t = α_t x + σ_t ε; the network predicts ε, x̂ = (x_t − σ_t ε̂)/α_t and W = (α_t/σ_t)^p.

    Then W·MSE(x̂, x) is the squared error of the noise. The time is drawn from the steps t = 0 … T,
    uniformly unless `times` say otherwise.
    """

    def _guess(
        self,
        model: nn.Module,
        clean: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        share: Share,
    ) -> Guess:
        schedule = self.schedule
        levels = schedule.steps + 1
        step = self.times.draw(levels, share, generator, clean.device)
        alpha, sigma = schedule.alpha(step), schedule.sigma(step)
        noise = molecule_noise(mask, clean.shape[-1], generator, share)
        noisy = alpha[:, None, None] * clean + sigma[:, None, None] * noise
        predicted = model(noisy, schedule.time(step), mask)
        position = clean_prediction(noisy[..., :3], predicted[..., :3], alpha, sigma)
        return Guess(position, alpha / sigma, predicted[..., 3:], noise[..., 3:])


class FlowMatchingObjective(Objective):
    """x_t = (1−t) x + t ε; the network predicts u = ε − x, x̂ = x_t − t û and W = 1/t^p.

    Appendix A.7 of Kaba et al., NeurIPS 2025. Then W·MSE(x̂, x) is the squared error of the
    velocity. The time is drawn from the steps t/T = 1/T … 1, uniformly unless `times` say
    otherwise.
    """

    def _guess(
        self,
        model: nn.Module,
        clean: Tensor,
        mask: Tensor,
        generator: torch.Generator,
        share: Share,
    ) -> Guess:
        steps = self.schedule.steps
        step = self.times.draw(steps, share, generator, clean.device)
        time = self.schedule.time(step + 1)
        noise = molecule_noise(mask, clean.shape[-1], generator, share)
        part = time[:, None, None]
        noisy = (1 - part) * clean + part * noise
        velocity = model(noisy, time, mask)
        position = noisy[..., :3] - part * velocity[..., :3]
        return Guess(position, 1 / time, velocity[..., 3:], (noise - clean)[..., 3:])


PROCESSES: dict[str, type[Objective]] = {
    "diffusion": DiffusionObjective,
    "flow_matching": FlowMatchingObjective,
}
