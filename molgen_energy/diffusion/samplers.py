"""Samplers: from noise to samples, in any number of steps up to the training's.

A sampler evaluates the denoiser at noise levels t = 0 … T of its training. With S steps it visits
S + 1 of the levels, T first and 0 last, equally far apart in log(σ/α) for a diffusion and in t for
flow matching, or with another spacing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import Diffusion, Process, levels_of
from molgen_energy.diffusion.state import Layout, State
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.errors import InputError, unknown_name


def spaced_levels(places: Tensor, steps: int) -> list[int]:
    """S + 1 of the levels, T first and 0 last, about equally far apart.

    Where several would round to the same level, the next free ones are used, so that all differ.

    Parameters
    ----------
    places
        The quantity that is evenly spaced, at each level, ascending, (T+1,) float64.
    steps
        S, 1 to T.
    """
    top = len(places) - 1
    wanted = torch.linspace(float(places[0]), float(places[-1]), steps + 1, dtype=torch.float64)
    above = torch.searchsorted(places, wanted).clamp(1, top)
    nearer_below = wanted - places[above - 1] < places[above] - wanted
    # At least k levels are below the k-th chosen one, and S − k above.
    k = torch.arange(steps + 1)
    levels = torch.cummax(above - nearer_below.long() - k, dim=0).values + k
    levels = torch.minimum(levels, top - steps + k)
    return [int(level) for level in levels.flip(0)]


def _log_ratios(process: Process) -> Tensor:
    """log(σ_t/α_t)."""
    assert isinstance(process, Diffusion)
    return (process.schedule.sigma2 / process.schedule.alpha2).log() / 2


def _times(process: Process) -> Tensor:
    """t."""
    return torch.arange(process.steps + 1, dtype=torch.float64)


def _root_times(process: Process) -> Tensor:
    """√t: levels are t = T·(k/S)²."""
    return _times(process).sqrt()


SPACINGS: dict[str, Callable[[Process], Tensor]] = {
    "log": _log_ratios,
    "even": _times,
    "quadratic": _root_times,
}
"""The quantity in which the visited levels are equally far apart, (T+1,), by name."""

# With exact scores, equal steps in log(σ/α) are best for few steps of a diffusion: every sampler
# here comes closer to the data than with even or quadratic spacing.
DEFAULT_SPACINGS = {"diffusion": "log", "flow_matching": "even"}
"""By the process that the denoiser was trained with."""


def noise_levels(process: Process, layout: Layout) -> Tensor:
    """σ/α in the unit of the positions at each level, (T+1,) float64, ascending.

    At t = 1 of flow matching it is infinite.
    """
    level = torch.arange(process.steps + 1)
    ratios = process.sigma(level).double() / process.alpha(level).double()
    return ratios * layout.fields["positions"].scale


class SamplerContext:
    """A batch of samples in a sampler: the denoiser, its inputs, and the random numbers.

    Parameters
    ----------
    model
        Denoiser, called as model(state, time, mask, condition, self_condition). If its attribute
        `self_conditioned` is true, it gets the previous clean prediction.
    process
        The process of its training.
    random
        Random numbers of the samples.
    layout
        Fields of the states.
    mask
        (B, N), true at real atoms.
    condition
        (B, K), or None.
    hook
        Guidance and constraints.
    advance
        Called after each evaluation of the model.
    temperature
        Changes the noise of steps, or the predictions after the hook.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        random: RandomNumbers,
        layout: Layout,
        mask: Tensor,
        condition: Tensor | None = None,
        hook: SamplingHook | None = None,
        advance: Callable[[], None] = lambda: None,
        temperature: Temperature | None = None,
    ) -> None:
        self.model, self.process, self.random = model, process, random
        self.layout, self.mask, self.condition = layout, mask, condition
        self.hook = hook
        self.advance = advance
        self._previous: State | None = None
        temperature = Temperature() if temperature is None else temperature
        ratios = noise_levels(process, layout)
        self._noise_factors = temperature.noise_factors(ratios)
        self._score_factors = temperature.score_factors(ratios)

    def start(self) -> State:
        """The state at level T: pure noise, the same for every sampler."""
        return self.random.noise(self.layout, self.mask, self.process.steps + 1)

    def noise(self, level: int) -> State:
        """Normal noise for the step that starts at a level, standard but for the temperature."""
        noise, factor = self.random.noise(self.layout, self.mask, level), self._noise_factors[level]
        return noise if factor == 1 else factor * noise

    def predict(self, state: State, level: int) -> Prediction:
        """Evaluate the model at a level."""
        levels = levels_of(len(self.mask), level, self.mask.device)
        prediction = self.process.predict(self.model, state, levels, self.condition, self._previous)
        self.advance()
        if self.hook is not None:
            prediction = self.hook.after_prediction(prediction, level)
        if getattr(self.model, "self_conditioned", False):
            self._previous = prediction.clean.projected()
        factor = self._score_factors[level]
        return prediction if factor == 1 else prediction.with_noise_times(factor)

    def finish_step(self, state: State, level: int) -> State:
        """The state after a step, projected: rounding would move the centre over many steps."""
        state = state.projected()
        return state if self.hook is None else self.hook.after_step(state, level).projected()


class Sampler(ABC):
    """Draws samples from noise with a denoiser that was trained with a process.

    Parameters
    ----------
    process
        The process of the training.
    steps
        S, 1 to T; None visits all levels.
    spacing
        One of `SPACINGS`; None takes the default of the process.
    temperature
        None changes nothing. `build_sampler` checks that it suits the sampler.

    Raises
    ------
    InputError
        S is out of range, or the spacing is not defined for the process.
    """

    processes: ClassVar[tuple[str, ...]]
    """Processes whose denoisers it can use."""
    eta: float | None = None
    """η, for samplers that have one."""

    def __init__(
        self,
        process: Process,
        steps: int | None = None,
        spacing: str | None = None,
        temperature: Temperature | None = None,
    ) -> None:
        steps = process.steps if steps is None else steps
        if not 1 <= steps <= process.steps:
            raise InputError(
                f"--steps {steps}: the network was trained with {process.steps:,} steps; choose "
                f"1 to {process.steps:,}"
            )
        self.process, self.steps = process, steps
        default = DEFAULT_SPACINGS[process.name]
        valid = [name for name in SPACINGS if name != "log" or default == "log"]
        if spacing is not None and spacing not in valid:
            raise InputError(unknown_name("spacing", spacing, valid))
        spacing = spacing or default
        self.levels = spaced_levels(SPACINGS[spacing](process), steps)
        self.spacing = None if steps == process.steps else spacing
        """None if all levels are visited."""
        self.temperature = Temperature() if temperature is None else temperature

    @property
    def adds_noise(self) -> bool:
        """Whether steps are random."""
        return False

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Evaluations of the model for each sample."""

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        random: RandomNumbers,
        layout: Layout,
        mask: Tensor,
        condition: Tensor | None = None,
        hook: SamplingHook | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> State:
        """Draw samples in the units of the state; for the parameters see `SamplerContext`."""
        context = SamplerContext(
            model, self.process, random, layout, mask, condition, hook, advance, self.temperature
        )
        return self._sample(context)

    @abstractmethod
    def _sample(self, context: SamplerContext) -> State:
        """Draw the samples."""


class DiffusionSampler(Sampler):
    """Base of the samplers for denoisers that were trained by diffusion."""

    processes = ("diffusion",)
    process: Diffusion

    @property
    def evaluations(self) -> int:
        return self.steps + 1

    def _last_step(self, x: State, context: SamplerContext, spread: float = 0.0) -> State:
        """x̂ + spread·(σ_0/α_0)·ε for continuous fields, and x_0 itself for discrete ones.

        The remaining noise of discrete fields is far below half a unit, so rounding removes it.
        """
        return last_step(self.process, x, context, spread)


def last_step(process: Diffusion, x: State, context: SamplerContext, spread: float) -> State:
    """The end of a diffusion, from level 0 to data; see `DiffusionSampler`."""
    clean = context.predict(x, 0).clean
    if spread:
        schedule = process.schedule
        ratio = float(schedule.sigma2[0].sqrt()) / float(schedule.alpha2[0].sqrt())
        clean = clean + spread * ratio * context.noise(0)
    names = [name for name, field in x.layout.fields.items() if not field.discrete]
    return context.finish_step(x.replace(**{name: clean[name] for name in names}), 0)


class AncestralSampler(DiffusionSampler):
    """Ancestral sampling of EDM (Hoogeboom et al., ICML 2022, algorithm 2).

    x_s = x_t/α_{t|s} − σ²_{t|s}/(α_{t|s} σ_t)·ε̂ + (σ_{t|s} σ_s/σ_t)·ε from each level t to the next
    level s, with α_{t|s} = α_t/α_s and σ²_{t|s} = σ²_t − α²_{t|s} σ²_s. At the end positions are
    drawn from N(x̂, σ_0²/α_0²), and discrete fields are those of x_0 itself.
    """

    @property
    def adds_noise(self) -> bool:
        return True

    def _sample(self, context: SamplerContext) -> State:
        alpha2, sigma2 = self.process.schedule.alpha2, self.process.schedule.sigma2
        x = context.start()
        for t, s in pairwise(self.levels):
            ratio2 = alpha2[t] / alpha2[s]
            step_variance = sigma2[t] - ratio2 * sigma2[s]
            toward = float(step_variance / (ratio2 * sigma2[t]).sqrt())
            spread = float((step_variance * sigma2[s] / sigma2[t]).sqrt())
            noise = context.predict(x, t).noise
            x = x / float(ratio2.sqrt()) - toward * noise + spread * context.noise(t)
            x = context.finish_step(x, s)
        return self._last_step(x, context, spread=1.0)


class DDIMSampler(DiffusionSampler):
    """Denoising diffusion implicit models (Song, Meng, Ermon, ICLR 2021, equations 12 and 16).

    x_s = α_s x̂ + √(σ_s² − c²)·ε̂ + c·ε with c = η σ_{t|s} σ_s/σ_t and σ_{t|s} as in
    `AncestralSampler`, which has the same steps at η = 1. At η = 0 only the start is random, and
    the steps are Euler's for the probability-flow ODE d(x/α)/d(σ/α) = ε̂: of first order in 1/S. At
    the end positions are x̂, and discrete fields are those of x_0 itself.

    Parameters
    ----------
    eta
        η in [0, 1]; for the other parameters see `Sampler`.
    """

    eta: float

    def __init__(
        self,
        process: Process,
        steps: int | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        temperature: Temperature | None = None,
    ) -> None:
        super().__init__(process, steps, spacing, temperature)
        if not 0 <= eta <= 1:
            raise InputError(f"--eta {eta:g}: expected a number from 0 (no noise) to 1 (ancestral)")
        self.eta = eta

    @property
    def adds_noise(self) -> bool:
        return self.eta > 0

    def _sample(self, context: SamplerContext) -> State:
        alpha2, sigma2 = self.process.schedule.alpha2, self.process.schedule.sigma2
        x = context.start()
        for t, s in pairwise(self.levels):
            ratio2 = alpha2[t] / alpha2[s]
            spread2 = self.eta**2 * (sigma2[t] - ratio2 * sigma2[s]) * sigma2[s] / sigma2[t]
            toward = float((sigma2[t] / ratio2).sqrt() - (sigma2[s] - spread2).sqrt())
            x = x / float(ratio2.sqrt()) - toward * context.predict(x, t).noise
            if self.eta:
                x = x + float(spread2.sqrt()) * context.noise(t)
            x = context.finish_step(x, s)
        return self._last_step(x, context)


class DPMSolverSampler(DiffusionSampler):
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, algorithm 2).

    x_s = (σ_s/σ_t) x_t − α_s (e^{−h} − 1) D with λ = log(α/σ), h = λ_s − λ_t, and
    D = (1 + 1/(2r)) x̂_t − 1/(2r) x̂_{t'}, where t' is the level before t and r = (λ_t − λ_{t'})/h.
    The first step has D = x̂_t. Of second order in 1/S, with one evaluation of the model for each
    step. At the end positions are x̂, and discrete fields are those of x_0 itself.
    """

    def _sample(self, context: SamplerContext) -> State:
        alpha = self.process.schedule.alpha2.sqrt()
        sigma = self.process.schedule.sigma2.sqrt()
        log_snr = (alpha / sigma).log()
        x = context.start()
        before: tuple[State, float] | None = None
        for t, s in pairwise(self.levels):
            h = float(log_snr[s] - log_snr[t])
            clean = context.predict(x, t).clean
            toward = clean
            if before is not None:
                r = before[1] / h
                toward = clean + (clean - before[0]) / (2 * r)
            x = float(sigma[s] / sigma[t]) * x - float(alpha[s]) * math.expm1(-h) * toward
            x = context.finish_step(x, s)
            before = clean, h
        return self._last_step(x, context)


class HeunSampler(Sampler):
    """Heun's method on the probability-flow ODE (Karras et al., NeurIPS 2022, algorithm 1).

    In y = x/α_t and τ = σ_t/α_t the ODE is dy/dτ = ε̂ (equation 4 there, with s(t) = α and
    σ(t) = τ); for flow matching y = x, τ = t/T, and dy/dτ = û. A step first goes to
    y + (τ_s − τ_t)·d_t. It is repeated from y with the mean of d_t and the slope at that point. Of
    second order in 1/S. Only the start is random. A diffusion ends with positions x̂ and discrete
    fields of x_0. The last step of a flow, to t = 0 where the network is not trained, is Euler's.
    """

    processes = ("diffusion", "flow_matching")

    @property
    def evaluations(self) -> int:
        return 2 * self.steps + (1 if isinstance(self.process, Diffusion) else -1)

    def _sample(self, context: SamplerContext) -> State:
        process = self.process
        if isinstance(process, Diffusion):
            alpha = process.schedule.alpha2.sqrt()
            tau = process.schedule.sigma2.sqrt() / alpha
        else:
            tau = torch.arange(process.steps + 1, dtype=torch.float64) / process.steps
            alpha = torch.ones_like(tau)
        x = context.start()
        for t, s in pairwise(self.levels):
            scaled, step = float(alpha[s] / alpha[t]) * x, float(alpha[s] * (tau[s] - tau[t]))
            slope = context.predict(x, t).target
            x = context.finish_step(scaled + step * slope, s)
            if s >= process.first_level:
                slope = (slope + context.predict(x, s).target) / 2
                x = context.finish_step(scaled + step * slope, s)
        return last_step(process, x, context, 0.0) if isinstance(process, Diffusion) else x


class EulerSampler(Sampler):
    """dx/dt = û(x, t) from noise at t = 1 to data at t = 0, by Euler's method.

    Equation 1 of Lipman et al., ICLR 2023, with time from data to noise. For denoisers that were
    trained by flow matching. Of first order in 1/S. Only the start is random.
    """

    processes = ("flow_matching",)

    @property
    def evaluations(self) -> int:
        return self.steps

    def _sample(self, context: SamplerContext) -> State:
        x = context.start()
        for t, s in pairwise(self.levels):
            step = (t - s) / self.process.steps
            x = context.finish_step(x - context.predict(x, t).velocity * step, s)
        return x


SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "dpm++": DPMSolverSampler,
    "heun": HeunSampler,
    "euler": EulerSampler,
}

DEFAULT_SAMPLERS = {"diffusion": "ancestral", "flow_matching": "euler"}
"""By the process that the denoiser was trained with."""


def samplers_for(process: str) -> list[str]:
    """Names of the samplers for a process."""
    return [name for name, sampler in SAMPLERS.items() if process in sampler.processes]


def build_sampler(
    process: Process,
    name: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    spacing: str | None = None,
    temperature: Temperature | None = None,
) -> Sampler:
    """The named sampler; None selects the default of the process, all levels, η = 0, and τ = 1.

    Raises
    ------
    InputError
        The process has no such sampler, the sampler has no η, the temperature does not suit it, or
        a number is out of range.
    """
    name = DEFAULT_SAMPLERS[process.name] if name is None else name
    valid = samplers_for(process.name)
    if name in SAMPLERS and name not in valid:
        others = " or ".join(SAMPLERS[name].processes)
        raise InputError(
            f"--sampler {name} is for networks trained with {others}; this one was trained with "
            f"{process.name}; choose {' or '.join(valid)}"
        )
    if name not in valid:
        raise InputError(unknown_name("sampler", name, valid))
    kind = SAMPLERS[name]
    if issubclass(kind, DDIMSampler):
        sampler: Sampler = kind(process, steps, spacing, 0.0 if eta is None else eta, temperature)
    elif eta is not None:
        raise InputError(f"--eta goes with --sampler ddim, not {name}")
    else:
        sampler = kind(process, steps, spacing, temperature)
    _check_temperature(sampler, name)
    return sampler


def _check_temperature(sampler: Sampler, name: str) -> None:
    """Raise `InputError` if the temperature has no effect on the named sampler, or too much."""
    temperature = sampler.temperature
    if sampler.adds_noise:
        return
    if temperature.changes_score and temperature.high is None:
        # An ODE with the score times 1/τ from level r down to q scales noise by (q/r)^{1/τ}, not
        # by q/r. Where steps add noise, its spread stays near that of the level.
        raise InputError(
            f"--temperature-of score: {name} adds no noise, so high noise levels would change the "
            "size of molecules; give --temperature-range an upper end, such as 0.3:2"
        )
    if not temperature.changes_noise:
        return
    if temperature.final_noise == 1:
        option = f"--temperature {temperature.value:g} is that of the noise of steps"
        others, remedies = ["--temperature-of score with --temperature-range 0.3:2"], []
    else:
        option = f"--final-noise {temperature.final_noise:g} scales the noise of steps"
        others, remedies = [], ["leave it out"]
    if isinstance(sampler, DDIMSampler):
        others.append("an --eta above 0")
    if sampler.process.name == "diffusion":
        others.append("--sampler ancestral")
    if others:
        remedies.append(f"use {' or '.join(others)}")
    raise InputError(f"{option}, and {name} adds none; {', or '.join(remedies)}")
