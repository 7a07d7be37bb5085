"""What a denoiser predicts, converted between noise, velocity and clean data."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from molgen_energy.diffusion.state import State

if TYPE_CHECKING:
    from molgen_energy.diffusion.process import Process


class Prediction:
    """A denoiser's output for a noisy state x_t = α_t x + σ_t ε, as each of three parametrisations.

    ε̂ is the noise, x̂ the clean data and v̂ the velocity: v = α_t ε − σ_t x for diffusion (Salimans
    and Ho, ICLR 2022), v = ε − x for flow matching. Each is computed when it is first used.

    Parameters
    ----------
    process
        The process of the training.
    noisy
        x_t.
    level
        Noise levels, (B,) int64.
    output
        What the denoiser returned.
    kind
        The parametrisation of the output: `noise`, `velocity` or `clean`; None is
        `process.prediction`.
    """

    def __init__(
        self,
        process: Process,
        noisy: State,
        level: Tensor,
        output: State,
        kind: str | None = None,
    ) -> None:
        self.process, self.noisy, self.level, self.output = process, noisy, level, output
        self._kind = process.prediction if kind is None else kind
        self._alpha, self._sigma = process.alpha(level), process.sigma(level)

    @cached_property
    def noise(self) -> State:
        """ε̂."""
        if self._kind == "noise":
            return self.output
        if self._kind == "velocity":
            return self.process.noise_of_velocity(self.noisy, self.output, self._alpha, self._sigma)
        return (self.noisy - self._alpha * self.output) / self._sigma

    @cached_property
    def clean(self) -> State:
        """x̂ = (x_t − σ_t ε̂)/α_t."""
        if self._kind == "clean":
            return self.output
        if self._kind == "velocity":
            return self.process.clean_of_velocity(self.noisy, self.output, self._alpha, self._sigma)
        return (self.noisy - self._sigma * self.output) / self._alpha

    @cached_property
    def velocity(self) -> State:
        """v̂."""
        if self._kind == "velocity":
            return self.output
        return self.process.velocity(self.clean, self.noise, self._alpha, self._sigma)

    @property
    def target(self) -> State:
        """The parametrisation whose error has the same weight at all levels, `Process.target`."""
        return self.noise if self.process.target == "noise" else self.velocity

    def with_noise_times(self, factor: float) -> Prediction:
        """The prediction with ε̂, and so the score −ε̂/σ, multiplied by a factor; α is not 0."""
        return Prediction(self.process, self.noisy, self.level, factor * self.noise, "noise")
