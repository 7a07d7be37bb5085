"""Forward processes: how noise is added, and what a denoiser predicts at a noise level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from molgen_energy.config import Section, Whole
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.diffusion.state import State

Denoise = Callable[..., State]
"""A denoiser, called as `denoiser(state, time, mask, condition, self_condition)`."""


class ProcessConfig(Section):
    """Base of the sections of processes, told apart by `name`."""

    name: str
    steps: Annotated[Whole, Option(ge=2, le=1_000_000)] = 1000
    """T; noise levels are 0 … T."""

    def build(self) -> Process:
        """The configured process."""
        raise NotImplementedError


class Process(ABC):
    """x_t = α_t x + σ_t ε for every field, at noise levels 0 … T.

    Parameters
    ----------
    steps
        T.
    prediction
        What the denoiser predicts: `noise`, `velocity` or `clean`.

    Raises
    ------
    ValueError
        The process has no such prediction.
    """

    Config: ClassVar[type[ProcessConfig]]
    """The section that configures it."""
    name: ClassVar[str]
    predictions: ClassVar[tuple[str, ...]]
    """What a denoiser may predict."""
    target: ClassVar[Literal["noise", "velocity"]]
    """The parametrisation whose squared error has equal weight at all levels, see `Objective`."""
    first_level: ClassVar[int]
    """The lowest level that denoisers are trained at."""

    def __init__(self, steps: int, prediction: str) -> None:
        if prediction not in self.predictions:
            raise ValueError(
                f"{self.name} has no prediction '{prediction}' (valid: "
                f"{', '.join(self.predictions)})"
            )
        self.steps, self.prediction = steps, prediction

    @abstractmethod
    def alpha(self, level: Tensor) -> Tensor:
        """α at levels (any shape), float32."""

    @abstractmethod
    def sigma(self, level: Tensor) -> Tensor:
        """σ at levels (any shape), float32."""

    @abstractmethod
    def velocity(self, clean: State, noise: State, alpha: Tensor, sigma: Tensor) -> State:
        """The velocity of clean data and noise."""

    @abstractmethod
    def noise_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        """The noise, from a noisy state and its velocity."""

    @abstractmethod
    def clean_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        """The clean data, from a noisy state and its velocity."""

    def time(self, level: Tensor) -> Tensor:
        """Diffusion time t/T in [0, 1], float32."""
        return level.float() / self.steps

    def add_noise(self, clean: State, noise: State, level: Tensor) -> State:
        """x_t = α_t x + σ_t ε.

        Parameters
        ----------
        clean, noise
            x and ε.
        level
            (B,) int64.
        """
        return self.alpha(level) * clean + self.sigma(level) * noise

    def true_target(self, clean: State, noise: State, level: Tensor) -> State:
        """The `Prediction.target` of a perfect denoiser."""
        if self.target == "noise":
            return noise
        return self.velocity(clean, noise, self.alpha(level), self.sigma(level))

    def predict(
        self,
        denoiser: Denoise,
        noisy: State,
        level: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> Prediction:
        """Evaluate a denoiser at a noisy state.

        Parameters
        ----------
        denoiser
            Predicts what `prediction` says.
        noisy
            x_t.
        level
            (B,) int64.
        condition
            (B, K), or None.
        self_condition
            The previous clean prediction, or None.
        """
        output = denoiser(noisy, self.time(level), noisy.mask, condition, self_condition)
        return Prediction(self, noisy, level, output)


class DiffusionConfig(ProcessConfig):
    """Variance-preserving diffusion with EDM's polynomial schedule."""

    name: str = "diffusion"
    precision: Annotated[float, Option(gt=0, lt=0.5)] = 1e-5
    """Noise variance at level 0."""
    prediction: Literal["noise", "velocity", "clean"] = "noise"
    """What the denoiser predicts: ε, α ε − σ x, or x."""

    def build(self) -> Diffusion:
        return Diffusion(self.steps, self.precision, self.prediction)


class Diffusion(Process):
    """Variance-preserving diffusion, α² + σ² = 1, trained at levels 0 … T.

    The squared error of the clean prediction x̂ = (x_t − σ_t ε̂)/α_t with weight (α_t/σ_t)² is that
    of the noise. Equation 2 of Hoogeboom et al., ICML 2022.

    Parameters
    ----------
    steps, precision
        T and s of `PolynomialSchedule`.
    prediction
        `noise`, `velocity` or `clean`.
    """

    Config = DiffusionConfig
    name = "diffusion"
    predictions = ("noise", "velocity", "clean")
    target = "noise"
    first_level = 0

    def __init__(
        self, steps: int = 1000, precision: float = 1e-5, prediction: str = "noise"
    ) -> None:
        super().__init__(steps, prediction)
        self.schedule = PolynomialSchedule(steps, precision)

    def alpha(self, level: Tensor) -> Tensor:
        return self.schedule.alpha(level)

    def sigma(self, level: Tensor) -> Tensor:
        return self.schedule.sigma(level)

    def velocity(self, clean: State, noise: State, alpha: Tensor, sigma: Tensor) -> State:
        return alpha * noise - sigma * clean

    def noise_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        return sigma * noisy + alpha * velocity

    def clean_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        return alpha * noisy - sigma * velocity


class FlowMatchingConfig(ProcessConfig):
    """Flow matching along straight lines from data to noise."""

    name: str = "flow_matching"
    prediction: Literal["velocity", "clean"] = "velocity"
    """What the denoiser predicts: ε − x, or x."""

    def build(self) -> FlowMatching:
        return FlowMatching(self.steps, self.prediction)


class FlowMatching(Process):
    """x_t = (1 − t) x + t ε, trained at t = 1/T … 1; the velocity is u = ε − x.

    The squared error of the clean prediction x̂ = x_t − t û with weight 1/t² is that of the velocity
    (appendix A.7 of Kaba et al., NeurIPS 2025; Lipman et al., ICLR 2023).
    """

    Config = FlowMatchingConfig
    name = "flow_matching"
    predictions = ("velocity", "clean")
    target = "velocity"
    first_level = 1

    def __init__(self, steps: int = 1000, prediction: str = "velocity") -> None:
        super().__init__(steps, prediction)

    def alpha(self, level: Tensor) -> Tensor:
        return 1 - self.time(level)

    def sigma(self, level: Tensor) -> Tensor:
        return self.time(level)

    def velocity(self, clean: State, noise: State, alpha: Tensor, sigma: Tensor) -> State:
        return noise - clean

    def noise_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        return noisy + alpha * velocity

    def clean_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        return noisy - sigma * velocity


PROCESSES: dict[str, type[Process]] = {"diffusion": Diffusion, "flow_matching": FlowMatching}


def levels_of(count: int, level: int, device: torch.device) -> Tensor:
    """One level for all of `count` samples, (count,) int64."""
    return torch.full((count,), level, dtype=torch.long, device=device)
