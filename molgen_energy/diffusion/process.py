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
from molgen_energy.diffusion.schedule import CosineSchedule, PolynomialSchedule
from molgen_energy.diffusion.state import State

Denoise = Callable[..., State]
"""A denoiser, called as `denoiser(state, time, mask, condition, self_condition)`."""


MOST_STEPS = 1_000_000
"""Noise levels of a process, or steps of a sampler in continuous time."""
_LEAST_FACTOR = 1e-9  # of α and σ in a logarithm


class ProcessConfig(Section):
    """Base of the sections of processes, told apart by `name`."""

    name: str
    steps: Annotated[Whole, Option(ge=2, le=MOST_STEPS)] = 1000
    """T; noise levels are 0 … T. In continuous time, the steps of samplers by default."""

    def build(self) -> Process:
        """The configured process."""
        raise NotImplementedError


class Process(ABC):
    """x_t = α_t x + σ_t ε for every field, at noise levels 0 … T or times in [0, 1].

    Parameters
    ----------
    steps
        T; of a continuous process, the steps of samplers that are not given another number.
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
    first_level: ClassVar[float]
    """The lowest level that denoisers are trained at."""
    description: ClassVar[str] = ""
    """What a one-line summary says of it, beginning with a comma; or nothing."""
    continuous: ClassVar[bool] = False
    """Whether a level is the time t in [0, 1], a float, rather than an integer 0 … T."""
    ends_clean: ClassVar[bool] = False
    """Whether samples are the last clean prediction of all fields. Otherwise discrete fields are
    those of the last noisy state."""

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

    def log_snr(self, level: Tensor) -> Tensor:
        """The log signal-to-noise ratio λ = log(α²/σ²), float32, finite at all levels."""
        alpha, sigma = self.alpha(level), self.sigma(level)
        return 2 * (alpha.clamp(min=_LEAST_FACTOR).log() - sigma.clamp(min=_LEAST_FACTOR).log())

    @abstractmethod
    def squares(self, level: float) -> tuple[float, float]:
        """α² and σ² at one level, in double precision."""

    def draw_levels(self, uniform: Tensor) -> Tensor:
        """Levels of training, (B,), from numbers in [0, 1)."""
        first = int(self.first_level)
        count = self.steps + 1 - first
        return first + (count * uniform).long().clamp(max=count - 1)

    def add_noise(self, clean: State, noise: State, level: Tensor) -> State:
        """x_t = α_t x + σ_t ε.

        Parameters
        ----------
        clean, noise
            x and ε.
        level
            (B,), int64 or, of a continuous process, float64.
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
            Predicts what `prediction` says. Its `noise_input` says whether it takes the time or
            the log signal-to-noise ratio.
        noisy
            x_t.
        level
            (B,), int64 or, of a continuous process, float64.
        condition
            (B, K), or None.
        self_condition
            The previous clean prediction, or None.
        """
        time = self.log_snr(level) if takes_log_snr(denoiser) else self.time(level)
        output = denoiser(noisy, time, noisy.mask, condition, self_condition)
        return Prediction(self, noisy, level, output)


class VariancePreserving(Process):
    """A process with α² + σ² = 1.

    The squared error of the clean prediction x̂ = (x_t − σ_t ε̂)/α_t with weight (α_t/σ_t)² is that
    of the noise. Equation 2 of Hoogeboom et al., ICML 2022.
    """

    predictions = ("noise", "velocity", "clean")
    target = "noise"

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


class DiffusionConfig(ProcessConfig):
    """Variance-preserving diffusion with EDM's polynomial schedule."""

    name: str = "diffusion"
    precision: Annotated[float, Option(gt=0, lt=0.5)] = 1e-5
    """Noise variance at level 0."""
    prediction: Literal["noise", "velocity", "clean"] = "noise"
    """What the denoiser predicts: ε, α ε − σ x, or x."""

    def build(self) -> Diffusion:
        return Diffusion(self.steps, self.precision, self.prediction)


class Diffusion(VariancePreserving):
    """Variance-preserving diffusion with a polynomial schedule, trained at levels 0 … T.

    Parameters
    ----------
    steps, precision
        T and s of `PolynomialSchedule`.
    prediction
        `noise`, `velocity` or `clean`.
    """

    Config = DiffusionConfig
    name = "diffusion"
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

    def squares(self, level: float) -> tuple[float, float]:
        step = int(level)
        return float(self.schedule.alpha2[step]), float(self.schedule.sigma2[step])


class CosineConfig(ProcessConfig):
    """Variance-preserving diffusion in continuous time with the cosine schedule."""

    name: str = "cosine"
    prediction: Literal["noise", "velocity", "clean"] = "clean"
    """What the denoiser predicts: ε, α ε − σ x, or x."""

    def build(self) -> CosineDiffusion:
        return CosineDiffusion(self.steps, self.prediction)


class CosineDiffusion(VariancePreserving):
    """Variance-preserving diffusion in continuous time, trained at times t in [1e-5, 1).

    A level is the time t, a float. JODO's process (Huang et al., 2023, arXiv:2305.12347).

    Parameters
    ----------
    steps
        Steps of samplers that are not given another number.
    prediction
        `noise`, `velocity` or `clean`.
    """

    Config = CosineConfig
    name = "cosine"
    description = ", cosine schedule"
    first_level = 1e-5
    continuous = True
    ends_clean = True

    def __init__(self, steps: int = 1000, prediction: str = "clean") -> None:
        super().__init__(steps, prediction)
        self.schedule = CosineSchedule()

    def alpha(self, level: Tensor) -> Tensor:
        return self.schedule.alpha(level).float()

    def sigma(self, level: Tensor) -> Tensor:
        return self.schedule.sigma(level).float()

    def squares(self, level: float) -> tuple[float, float]:
        time = torch.tensor(level, dtype=torch.float64)
        return float(self.schedule.alpha(time) ** 2), float(self.schedule.sigma(time) ** 2)

    def time(self, level: Tensor) -> Tensor:
        return level.float()

    def draw_levels(self, uniform: Tensor) -> Tensor:
        return self.first_level + (1 - self.first_level) * uniform.double()


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
    description = ", by flow matching"
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

    def squares(self, level: float) -> tuple[float, float]:
        time = level / self.steps
        return (1 - time) ** 2, time**2

    def noise_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        return noisy + alpha * velocity

    def clean_of_velocity(
        self, noisy: State, velocity: State, alpha: Tensor, sigma: Tensor
    ) -> State:
        return noisy - sigma * velocity


PROCESSES: dict[str, type[Process]] = {
    "diffusion": Diffusion,
    "cosine": CosineDiffusion,
    "flow_matching": FlowMatching,
}


def levels_of(count: int, level: float, device: torch.device) -> Tensor:
    """One level for all of `count` samples, (count,): int64 of an integer, else float64."""
    dtype = torch.long if isinstance(level, int) else torch.float64
    return torch.full((count,), level, dtype=dtype, device=device)


def takes_log_snr(denoiser: object) -> bool:
    """Whether a denoiser takes the log signal-to-noise ratio in place of the time."""
    return getattr(_unwrapped(denoiser), "noise_input", "time") == "log_snr"


def is_self_conditioned(denoiser: object) -> bool:
    """Whether a denoiser takes its previous clean prediction as input."""
    return bool(getattr(_unwrapped(denoiser), "self_conditioned", False))


def _unwrapped(denoiser: object) -> object:
    """The denoiser itself, which may be in wrappers, such as one that distributes its gradients."""
    while hasattr(denoiser, "module"):
        denoiser = denoiser.module
    return denoiser
