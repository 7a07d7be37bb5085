"""The forward process and the training objective."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.losses import Loss
from molgen_energy.models.geometry import centred


class Terms(NamedTuple):
    """The objective of each sample and its two parts, each (B,)."""

    total: Tensor
    positions: Tensor
    features: Tensor


def molecule_noise(mask: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """Standard normal noise (B, N, channels), positions (the first 3) with zero mean; 0 outside."""
    shape = (*mask.shape, channels)
    noise = torch.randn(shape, generator=generator, device=mask.device)
    return on_subspace(noise, mask)


def on_subspace(noise: Tensor, mask: Tensor) -> Tensor:
    """Project (B, N, 3+F) on zero-mean positions, and on zero at padding."""
    features = torch.where(mask[..., None], noise[..., 3:], 0)
    return torch.cat([centred(noise[..., :3], mask), features], dim=-1)


def clean_prediction(noisy: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x̂ = (x_t − σ_t ε̂)/α_t for (B, N, C) and levels (B,)."""
    return (noisy - sigma[:, None, None] * noise) / alpha[:, None, None]


class DiffusionObjective:
    """½·[w·(α_t/(s·σ_t))^p·L(s·x̂, s·x) + ‖ε_feat − ε̂_feat‖² / (n·(3+F))] for each sample.

    Section 4.2 of Kaba et al., NeurIPS 2025: L is a loss on clean positions and p its degree, 2
    for energies and the squared error, for which (α/σ)²·MSE(x̂, x) is the squared error of the
    noise. The scale s takes positions from the diffusion's unit to Å, in which springs are defined.
    The noise level is drawn uniformly from t = 0 … T.

    Parameters
    ----------
    schedule
        Noise levels.
    position_loss
        L, called with clean positions in Å.
    position_weight
        w.
    position_scale
        s, Å in one unit of the diffusion.
    """

    def __init__(
        self,
        schedule: PolynomialSchedule,
        position_loss: Loss,
        position_weight: float,
        position_scale: float = 1.0,
    ) -> None:
        self.schedule = schedule
        self.position_loss = position_loss
        self.position_weight = position_weight
        self.position_scale = position_scale

    def __call__(
        self, model: nn.Module, clean: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Terms:
        """Draw a noise level and noise for each sample, and judge the model's prediction.

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
        """
        schedule = self.schedule
        levels = schedule.steps + 1
        step = torch.randint(levels, (len(clean),), generator=generator, device=clean.device)
        alpha, sigma = schedule.alpha(step), schedule.sigma(step)
        noise = molecule_noise(mask, clean.shape[-1], generator)
        noisy = alpha[:, None, None] * clean + sigma[:, None, None] * noise
        predicted = model(noisy, schedule.time(step), mask)

        position = clean_prediction(noisy[..., :3], predicted[..., :3], alpha, sigma)
        scale = self.position_scale
        weight = self.position_weight * (alpha / (scale * sigma)) ** self.position_loss.degree
        loss = self.position_loss(scale * position, scale * clean[..., :3], mask)
        positions = 0.5 * weight * loss
        difference = torch.where(mask[..., None], predicted[..., 3:] - noise[..., 3:], 0)
        count = mask.sum(dim=1).clamp(min=1) * clean.shape[-1]
        features = 0.5 * difference.square().sum(dim=(1, 2)) / count
        return Terms(positions + features, positions, features)
