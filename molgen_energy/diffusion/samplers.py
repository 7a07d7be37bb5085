"""From noise to molecules, in as many steps as there is time for.

All samplers serve the networks that training makes, at the noise levels t = 0 … T that these were
trained at. With S steps they visit S + 1 of the levels, T first and 0 last, equally far apart in
log(σ/α) for a diffusion and in t for a flow, or as is asked.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.geometry import on_subspace
from molgen_energy.diffusion.noise import SeededNoise
from molgen_energy.diffusion.process import clean_prediction
from molgen_energy.diffusion.schedule import PolynomialSchedule
from molgen_energy.errors import InputError, unknown_name


def spaced_levels(places: Tensor, steps: int) -> list[int]:
    """S + 1 of the levels, T first and 0 last, about equally far apart.

    Where levels lie further apart than the steps, the next free one is taken, so that all differ.

    Parameters
    ----------
    places
        Where the levels lie, ascending, (T+1,) float64.
    steps
        S, 1 to T.
    """
    top = len(places) - 1
    wanted = torch.linspace(float(places[0]), float(places[-1]), steps + 1, dtype=torch.float64)
    above = torch.searchsorted(places, wanted).clamp(1, top)
    nearer_below = wanted - places[above - 1] < places[above] - wanted
    # At least k levels lie below the k-th that is taken, and S − k above.
    k = torch.arange(steps + 1)
    levels = torch.cummax(above - nearer_below.long() - k, dim=0).values + k
    levels = torch.minimum(levels, top - steps + k)
    return [int(level) for level in levels.flip(0)]


def _log_ratios(schedule: PolynomialSchedule) -> Tensor:
    """log(σ_t/α_t)."""
    return (schedule.sigma2 / schedule.alpha2).log() / 2


def _times(schedule: PolynomialSchedule) -> Tensor:
    """t."""
    return torch.arange(schedule.steps + 1, dtype=torch.float64)


def _root_times(schedule: PolynomialSchedule) -> Tensor:
    """√t: levels are t = T·(k/S)²."""
    return _times(schedule).sqrt()


SPACINGS: dict[str, Callable[[PolynomialSchedule], Tensor]] = {
    "log": _log_ratios,
    "even": _times,
    "quadratic": _root_times,
}
"""In what the levels that a sampler visits are equally far apart, (T+1,) ascending, by name."""

# Equally far apart in log(σ/α) is where few steps of a diffusion go furthest with known scores:
# each sampler here comes nearer to the data than with equal or quadratic times.
DEFAULT_SPACINGS = {"diffusion": "log", "flow_matching": "even"}
"""By the process that the network was trained for."""


@dataclass(frozen=True)
class Batch:
    """What samples are drawn from.

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
    top
        T.
    advance
        Called behind each call of the model.
    """

    model: nn.Module
    noise: SeededNoise
    mask: Tensor
    channels: int
    top: int
    advance: Callable[[], None]

    def start(self) -> Tensor:
        """Noise of level T, (B, N, 3+F), the same whatever the sampler."""
        return self.draw(self.top + 1)

    def draw(self, number: int) -> Tensor:
        """Noise (B, N, 3+F) on the subspace, numbered by the level that it is added on leaving."""
        return self.project(self.noise.normal(number, self.mask.shape[1], self.channels))

    def predict(self, x: Tensor, level: int) -> Tensor:
        """What the network says of x (B, N, 3+F) at a level."""
        time = torch.full((len(self.mask),), level / self.top, device=self.mask.device)
        predicted: Tensor = self.model(x, time, self.mask)
        self.advance()
        return predicted

    def project(self, x: Tensor) -> Tensor:
        """x on the subspace: rounding would let the centre drift over the steps."""
        return on_subspace(x, self.mask)


class Sampler(ABC):
    """From noise to samples, with a network that was trained at the levels of a schedule.

    Parameters
    ----------
    schedule
        Of the training.
    process
        What the network was trained for, one of `processes`.
    steps
        S, 1 to T; None takes all levels.
    spacing
        One of `SPACINGS`; None takes the process's own.

    Raises
    ------
    InputError
        There are not so many levels, or no such spacing for the process.
    """

    processes: ClassVar[tuple[str, ...]]
    """Those whose networks it can draw with."""
    eta: float | None = None
    """η, of a sampler that has one."""

    def __init__(
        self,
        schedule: PolynomialSchedule,
        process: str = "diffusion",
        steps: int | None = None,
        spacing: str | None = None,
    ) -> None:
        steps = schedule.steps if steps is None else steps
        if not 1 <= steps <= schedule.steps:
            raise InputError(
                f"--steps {steps}: the network was trained with {schedule.steps:,} steps; ask for "
                f"1 to {schedule.steps:,}"
            )
        self.schedule, self.process, self.steps = schedule, process, steps
        own = DEFAULT_SPACINGS[process]
        serving = [name for name in SPACINGS if name != "log" or own == "log"]
        if spacing is not None and spacing not in serving:
            raise InputError(unknown_name("spacing", spacing, serving))
        spacing = spacing or own
        self.levels = spaced_levels(SPACINGS[spacing](schedule), steps)
        self.spacing = None if steps == schedule.steps else spacing
        """None where all levels are visited."""

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
        """Draw samples (B, N, channels) in the diffusion's scale; parameters as of `Batch`."""
        batch = Batch(model, noise, mask, channels, self.schedule.steps, advance)
        return torch.where(mask[..., None], self._draw(batch), 0)

    @abstractmethod
    def _draw(self, batch: Batch) -> Tensor:
        """Draw samples (B, N, 3+F)."""

    def _finish(self, x: Tensor, batch: Batch, spread: float = 0.0) -> Tensor:
        """The end of a diffusion: positions x̂ + spread·(σ_0/α_0)·ε, features those of x_0 itself.

        What noise is left of the features is far below half a unit of type, and goes as they are
        rounded.
        """
        alpha = float(self.schedule.alpha2[0].sqrt())
        sigma = float(self.schedule.sigma2[0].sqrt())
        levels = x.new_tensor([alpha]), x.new_tensor([sigma])
        positions = clean_prediction(x, batch.predict(x, 0), *levels)
        if spread:
            positions = positions + spread * sigma / alpha * batch.draw(0)
        return torch.cat([positions[..., :3], x[..., 3:]], dim=-1)


class AncestralSampler(Sampler):
    """Ancestral sampling of EDM (Hoogeboom et al., ICML 2022, algorithm 2).

    x_s = x_t/α_{t|s} − σ²_{t|s}/(α_{t|s} σ_t)·ε̂ + (σ_{t|s} σ_s/σ_t)·ε from each level t to the next
    one s, with α_{t|s} = α_t/α_s and σ²_{t|s} = σ²_t − α²_{t|s} σ²_s. At the end positions are
    drawn from N(x̂, σ_0²/α_0²), and features are those of x_0 itself.
    """

    processes = ("diffusion",)

    @property
    def evaluations(self) -> int:
        return self.steps + 1

    def _draw(self, batch: Batch) -> Tensor:
        alpha2, sigma2 = self.schedule.alpha2, self.schedule.sigma2
        x = batch.start()
        for t, s in pairwise(self.levels):
            ratio2 = alpha2[t] / alpha2[s]
            step_variance = sigma2[t] - ratio2 * sigma2[s]
            toward = float(step_variance / (ratio2 * sigma2[t]).sqrt())
            spread = float((step_variance * sigma2[s] / sigma2[t]).sqrt())
            x = x / float(ratio2.sqrt()) - toward * batch.predict(x, t) + spread * batch.draw(t)
            x = batch.project(x)
        return self._finish(x, batch, spread=1.0)


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models (Song, Meng, Ermon, ICLR 2021, equations 12 and 16).

    x_s = α_s x̂ + √(σ_s² − c²)·ε̂ + c·ε with c = η σ_{t|s} σ_s/σ_t and σ_{t|s} as of
    `AncestralSampler`, whose steps come back at η = 1. At η = 0 only the start is random, and the
    steps are Euler's on the probability-flow ODE d(x/α)/d(σ/α) = ε̂: of first order in 1/S. At the
    end positions are x̂, and features those of x_0 itself.

    Parameters
    ----------
    eta
        η in [0, 1]; other parameters as of `Sampler`.
    """

    processes = ("diffusion",)
    eta: float

    def __init__(
        self,
        schedule: PolynomialSchedule,
        process: str = "diffusion",
        steps: int | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
    ) -> None:
        super().__init__(schedule, process, steps, spacing)
        if not 0 <= eta <= 1:
            raise InputError(f"--eta {eta:g}: expected a number from 0 (no noise) to 1 (ancestral)")
        self.eta = eta

    @property
    def evaluations(self) -> int:
        return self.steps + 1

    def _draw(self, batch: Batch) -> Tensor:
        alpha2, sigma2 = self.schedule.alpha2, self.schedule.sigma2
        x = batch.start()
        for t, s in pairwise(self.levels):
            ratio2 = alpha2[t] / alpha2[s]
            spread2 = self.eta**2 * (sigma2[t] - ratio2 * sigma2[s]) * sigma2[s] / sigma2[t]
            toward = float((sigma2[t] / ratio2).sqrt() - (sigma2[s] - spread2).sqrt())
            x = x / float(ratio2.sqrt()) - toward * batch.predict(x, t)
            if self.eta:
                x = x + float(spread2.sqrt()) * batch.draw(t)
            x = batch.project(x)
        return self._finish(x, batch)


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, algorithm 2).

    x_s = (σ_s/σ_t) x_t − α_s (e^{−h} − 1) D with λ = log(α/σ), h = λ_s − λ_t, and
    D = (1 + 1/(2r)) x̂_t − 1/(2r) x̂_{t'}, where t' is the level before t and r = (λ_t − λ_{t'})/h.
    The first step has D = x̂_t. Of second order in 1/S, with one call of the network for each step.
    At the end positions are x̂, and features those of x_0 itself.
    """

    processes = ("diffusion",)

    @property
    def evaluations(self) -> int:
        return self.steps + 1

    def _draw(self, batch: Batch) -> Tensor:
        alpha, sigma = self.schedule.alpha2.sqrt(), self.schedule.sigma2.sqrt()
        log_snr = (alpha / sigma).log()
        x = batch.start()
        before: tuple[Tensor, float] | None = None
        for t, s in pairwise(self.levels):
            h = float(log_snr[s] - log_snr[t])
            clean = (x - float(sigma[t]) * batch.predict(x, t)) / float(alpha[t])
            towards = clean
            if before is not None:
                r = before[1] / h
                towards = clean + (clean - before[0]) / (2 * r)
            x = float(sigma[s] / sigma[t]) * x - float(alpha[s]) * math.expm1(-h) * towards
            x = batch.project(x)
            before = clean, h
        return self._finish(x, batch)


class HeunSampler(Sampler):
    """Heun's method on the probability-flow ODE (Karras et al., NeurIPS 2022, algorithm 1).

    In y = x/α_t and τ = σ_t/α_t the ODE is dy/dτ = ε̂ (equation 4 there, with s(t) = α and
    σ(t) = τ); of a flow y = x, τ = t/T, and dy/dτ = û. A step goes to y + (τ_s − τ_t)·d_t, and then
    from y again with the mean of d_t and the slope there. Of second order in 1/S. Only the start is
    random. A diffusion ends with positions x̂ and features of x_0; a flow's last step, to t = 0
    where the network was never trained, is Euler's.
    """

    processes = ("diffusion", "flow_matching")

    @property
    def evaluations(self) -> int:
        return 2 * self.steps + (1 if self.process == "diffusion" else -1)

    def _draw(self, batch: Batch) -> Tensor:
        diffusion = self.process == "diffusion"
        if diffusion:
            alpha = self.schedule.alpha2.sqrt()
            tau = self.schedule.sigma2.sqrt() / alpha
        else:
            tau = torch.arange(batch.top + 1, dtype=torch.float64) / batch.top
            alpha = torch.ones_like(tau)
        x = batch.start()
        for t, s in pairwise(self.levels):
            scaled, step = float(alpha[s] / alpha[t]) * x, float(alpha[s] * (tau[s] - tau[t]))
            slope = batch.predict(x, t)
            x = batch.project(scaled + step * slope)
            if diffusion or s:
                slope = (slope + batch.predict(x, s)) / 2
                x = batch.project(scaled + step * slope)
        return self._finish(x, batch) if diffusion else x


class EulerSampler(Sampler):
    """dx/dt = û(x, t) from noise at t = 1 to data at t = 0, by Euler's method.

    Equation 1 of Lipman et al., ICLR 2023, with time from data to noise. For networks that were
    trained by flow matching. Of first order in 1/S. Only the start is random.
    """

    processes = ("flow_matching",)

    @property
    def evaluations(self) -> int:
        return self.steps

    def _draw(self, batch: Batch) -> Tensor:
        x = batch.start()
        for t, s in pairwise(self.levels):
            x = batch.project(x - batch.predict(x, t) * (t - s) / batch.top)
        return x


SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "dpm++": DPMSolverSampler,
    "heun": HeunSampler,
    "euler": EulerSampler,
}

DEFAULT_SAMPLERS = {"diffusion": "ancestral", "flow_matching": "euler"}
"""By the process that the network was trained for."""


def samplers_for(process: str) -> list[str]:
    """Names of the samplers that serve a process."""
    return [name for name, sampler in SAMPLERS.items() if process in sampler.processes]


def build_sampler(
    schedule: PolynomialSchedule,
    process: str,
    name: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
) -> Sampler:
    """The sampler of a name; None takes the process's own, all levels, and η = 0.

    Raises
    ------
    InputError
        There is no such sampler for the process, it takes no η, or a number is out of range.
    """
    name = DEFAULT_SAMPLERS[process] if name is None else name
    serving = samplers_for(process)
    if name in SAMPLERS and name not in serving:
        others = " or ".join(SAMPLERS[name].processes)
        raise InputError(
            f"--sampler {name} is for networks of {others}, this one is of {process}; take "
            f"{' or '.join(serving)}"
        )
    if name not in serving:
        raise InputError(unknown_name("sampler", name, serving))
    kind = SAMPLERS[name]
    if issubclass(kind, DDIMSampler):
        return kind(schedule, process, steps, spacing, 0.0 if eta is None else eta)
    if eta is not None:
        raise InputError(f"--eta goes with --sampler ddim, not {name}")
    return kind(schedule, process, steps, spacing)
