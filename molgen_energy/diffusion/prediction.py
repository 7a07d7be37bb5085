"""What a network gives, turned into the noise that objectives and samplers work with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.schedule import PolynomialSchedule


class VelocityPrediction(nn.Module):
    """ε̂ = σ_t x_t + α_t v̂ of a network that gives v̂, for v = α_t ε − σ_t x.

    Salimans and Ho, ICLR 2022. Then x̂ = α_t x_t − σ_t v̂: almost without noise, a network that gives
    nothing leaves the sample as it is, and almost without signal it gives the data itself. One that
    gives ε̂ has to give back x_t there, and its errors come out multiplied by σ_t/α_t.

    Parameters
    ----------
    network
        Called as network(noisy, time, mask).
    schedule
        Of the training.
    """

    def __init__(self, network: nn.Module, schedule: PolynomialSchedule) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule

    def forward(self, noisy: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """The noise (B, N, 3+F), zero at padding; `time` (B,) is one of the schedule's.

        That of positions has zero mean where they have.
        """
        step = (time * self.schedule.steps).round().long()
        alpha = self.schedule.alpha(step).to(noisy.dtype)[:, None, None]
        sigma = self.schedule.sigma(step).to(noisy.dtype)[:, None, None]
        velocity: Tensor = self.network(noisy, time, mask)
        return torch.where(mask[..., None], sigma * noisy + alpha * velocity, 0)
