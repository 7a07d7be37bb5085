"""From noise to molecules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.noise import SeededNoise
from molgen_energy.diffusion.process import clean_prediction, on_subspace
from molgen_energy.diffusion.schedule import PolynomialSchedule


class Sampler(ABC):
    """From noise to samples, with a network that was trained at the times of a schedule."""

    def __init__(self, schedule: PolynomialSchedule) -> None:
        self.schedule = schedule

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Calls of the network for each sample."""

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        noise: SeededNoise,
        mask: Tensor,
        channels: int,
        advance: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draw samples (B, N, channels) in the diffusion's scale.

        Parameters
        ----------
        model
            Called as model(noisy, time, mask), returns what it was trained to predict.
        noise
            Source of randomness, one stream for each sample.
        mask
            (B, N), true at real atoms.
        channels
            3 + F.
        advance
            Called behind each call of the model.
        """
        return self._draw(model, noise, mask, channels, advance)

    @abstractmethod
    def _draw(
        self,
        model: nn.Module,
        noise: SeededNoise,
        mask: Tensor,
        channels: int,
        advance: Callable[[], None],
    ) -> Tensor:
        """Draw samples; parameters as of `sample`."""


class AncestralSampler(Sampler):
    """Ancestral sampling of EDM (Hoogeboom et al., ICML 2022, algorithm 2).

    x_s = x_t/α_{t|s} − σ²_{t|s}/(α_{t|s} σ_t)·ε̂ + (σ_{t|s} σ_s/σ_t)·ε for t = T … 1, s = t − 1,
    with α_{t|s} = α_t/α_s and σ²_{t|s} = σ²_t − α²_{t|s} σ²_s. At the end positions are drawn from
    N(x̂, σ_0²/α_0²), and features are those of x_0 itself.
    """

    @property
    def evaluations(self) -> int:
        return self.schedule.steps + 1

    def _draw(
        self,
        model: nn.Module,
        noise: SeededNoise,
        mask: Tensor,
        channels: int,
        advance: Callable[[], None],
    ) -> Tensor:
        schedule = self.schedule
        alpha2, sigma2 = schedule.alpha2, schedule.sigma2
        atoms = mask.shape[1]

        def draw(step: int) -> Tensor:
            return on_subspace(noise.normal(step, atoms, channels), mask)

        def predict(x: Tensor, step: int) -> Tensor:
            time = torch.full((len(mask),), step / schedule.steps, device=mask.device)
            predicted: Tensor = model(x, time, mask)
            advance()
            return predicted

        # Noise is numbered by the step that it leads to; T + 1 is the start.
        x = draw(schedule.steps + 1)
        for t in range(schedule.steps, 0, -1):
            s = t - 1
            ratio2 = alpha2[t] / alpha2[s]
            step_variance = sigma2[t] - ratio2 * sigma2[s]
            toward = float(step_variance / (ratio2 * sigma2[t]).sqrt())
            spread = float((step_variance * sigma2[s] / sigma2[t]).sqrt())
            x = x / float(ratio2.sqrt()) - toward * predict(x, t) + spread * draw(t)
            x = on_subspace(x, mask)  # rounding would let the centre drift over the steps
        alpha, sigma = float(alpha2[0].sqrt()), float(sigma2[0].sqrt())
        levels = x.new_tensor([alpha]), x.new_tensor([sigma])
        positions = clean_prediction(x, predict(x, 0), *levels) + sigma / alpha * draw(0)
        return torch.cat([positions[..., :3], x[..., 3:]], dim=-1)


class EulerSampler(Sampler):
    """dx/dt = û(x, t) from noise at t = 1 to data at t = 0, in T equal steps of Euler's method.

    For networks that were trained by flow matching. Only the start is random.
    """

    @property
    def evaluations(self) -> int:
        return self.schedule.steps

    def _draw(
        self,
        model: nn.Module,
        noise: SeededNoise,
        mask: Tensor,
        channels: int,
        advance: Callable[[], None],
    ) -> Tensor:
        steps = self.schedule.steps
        x = on_subspace(noise.normal(steps + 1, mask.shape[1], channels), mask)
        for step in range(steps, 0, -1):
            time = torch.full((len(mask),), step / steps, device=mask.device)
            x = on_subspace(x - model(x, time, mask) / steps, mask)
            advance()
        return x


SAMPLERS: dict[str, type[Sampler]] = {
    "diffusion": AncestralSampler,
    "flow_matching": EulerSampler,
}
"""By the process that the network was trained for."""
