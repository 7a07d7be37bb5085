"""Samplers: from noise to samples, in any number of steps.

A sampler evaluates the denoiser at some of the noise levels of its training, see
`molgen_energy.diffusion.spacing`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import (
    MOST_STEPS,
    Process,
    VariancePreserving,
    is_self_conditioned,
    levels_of,
)
from molgen_energy.diffusion.spacing import (
    VisitedLevel,
    chosen_levels,
    levels_below,
    noise_levels,
    visited_levels,
)
from molgen_energy.diffusion.state import Layout, State
from molgen_energy.diffusion.temperature import Temperature
from molgen_energy.errors import InputError, unknown_name

_STREAMS = MOST_STEPS + 2
"""Above all streams of levels; a repeat of a step takes its numbers from further blocks of them."""
MOST_REPEATS = 1000
"""Of a step; all blocks of streams are then below those of `Stream`."""


class SamplerContext:
    """A batch of samples in a sampler: the denoiser, its inputs, and the random numbers.

    Parameters
    ----------
    model
        Denoiser, called as model(state, time, mask, condition, self_condition). If its attribute
        `self_conditioned` is true, it gets the previous clean prediction; in the first evaluation
        there is none.
    sampler
        Has the process of its training, the levels, the temperature, which changes the noise of
        steps or the predictions before the hook, and the passes of self-conditioning.
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
    clean
        Samples to begin with, at the noise of the first level; None begins with pure noise.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: Sampler,
        random: RandomNumbers,
        layout: Layout,
        mask: Tensor,
        condition: Tensor | None = None,
        hook: SamplingHook | None = None,
        advance: Callable[[], None] = lambda: None,
        clean: State | None = None,
    ) -> None:
        self.model, self.process, self.random = model, sampler.process, random
        self.layout, self.mask, self.condition = layout, mask, condition
        self.ends_clean = sampler.ends_clean
        self.hook = hook
        self.advance = advance
        self._first, self._clean = sampler.visited[0], clean
        self._passes = sampler.self_condition_passes
        self._previous: State | None = None
        visited, temperature = sampler.visited, sampler.temperature
        number = torch.float64 if self.process.continuous else torch.long
        levels = torch.tensor([at.level for at in visited], dtype=number)
        ratios = noise_levels(self.process, layout, levels)
        self._noise_factors = dict(zip(visited, temperature.noise_factors(ratios), strict=True))
        self._score_factors = dict(zip(visited, temperature.score_factors(ratios), strict=True))

    def start(self) -> State:
        """The state at the first level: pure noise, or noisy samples; the same for all samplers."""
        # In continuous time it is also the same for every number of steps.
        stream = Stream.START if self.process.continuous else self.process.steps + 1
        noise = self.random.noise(self.layout, self.mask, stream)
        if self._clean is None:
            return noise
        return _sqrt(self._first.alpha2) * self._clean + _sqrt(self._first.sigma2) * noise

    def noise(self, at: VisitedLevel, repeat: int = 0) -> State:
        """Normal noise for the step that starts at a level, standard but for the temperature."""
        noise = self.random.noise(self.layout, self.mask, at.stream + 2 * repeat * _STREAMS)
        factor = self._noise_factors[at]
        return noise if factor == 1 else factor * noise

    def back(self, state: State, s: VisitedLevel, t: VisitedLevel, repeat: int) -> State:
        """x_t drawn from q(x_t | x_s) for the repeat of a step from t to s, counted from 1."""
        ratio2 = t.alpha2 / s.alpha2
        stream = t.stream + (2 * repeat - 1) * _STREAMS
        noise = self.random.noise(self.layout, self.mask, stream)
        return _sqrt(ratio2) * state + _sqrt(t.sigma2 - ratio2 * s.sigma2) * noise

    def predict(self, state: State, at: VisitedLevel) -> Prediction:
        """The prediction at a level, for which the model is evaluated once for each pass."""
        levels = levels_of(len(self.mask), at.level, self.mask.device)
        for _ in range(self._passes - 1):
            self._previous = self._guided(self._evaluate(state, levels), at).clean.projected()
        evaluated, factor = self._evaluate(state, levels), self._score_factors[at]
        used = evaluated if factor == 1 else evaluated.with_noise_times(factor)
        prediction = self._guided(used, at)
        if is_self_conditioned(self.model):  # as in training, without the temperature
            next_input = prediction if factor == 1 else self._guided(evaluated, at)
            self._previous = next_input.clean.projected()
        return prediction

    def _guided(self, prediction: Prediction, at: VisitedLevel) -> Prediction:
        if self.hook is None:
            return prediction
        return self.hook.after_prediction(prediction, at.level)

    def _evaluate(self, state: State, levels: Tensor) -> Prediction:
        prediction = self.process.predict(self.model, state, levels, self.condition, self._previous)
        self.advance()
        return prediction

    def finish_step(self, state: State, level: float) -> State:
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
        S; None is that of the process. See `visited_levels`.
    spacing
        One of `SPACINGS`; None takes the default of the process.
    temperature
        None changes nothing. `build_sampler` checks that it suits the sampler.
    self_condition_passes
        Evaluations of a self-conditioned denoiser for each prediction. Each gets the clean
        prediction of the one before, the first that of the level before.
    levels
        The noise levels to visit, in place of steps and spacing; see `chosen_levels`.
    resample
        How often each step is taken, from 1. Between two of them the state goes back by
        q(x_t | x_s) with new noise, so that generated parts come to fit fixed ones (RePaint:
        Lugmayr et al., CVPR 2022, algorithm 1, with jumps of one step).
    strength
        Share of the time t/T, in (0, 1], at which sampling begins; below 1 it begins with samples,
        the parameter `clean` of `sample`. See `levels_below`.

    Raises
    ------
    InputError
        A number is out of range, the spacing is not defined for the process, or there are levels
        beside steps or spacing.
    """

    processes: ClassVar[tuple[str, ...]]
    """Processes whose denoisers it can use."""
    eta: float | None = None
    """η, for samplers that have one."""
    ancestral_positions: bool = False
    """Whether positions take ancestral steps, other than the other fields."""
    ends_clean: bool
    """Whether samples are the clean prediction of all fields at the last level, as of a process
    that ends so, and of chosen levels that do not end at 0."""
    levels: tuple[float, ...] | None
    """The levels that were chosen; None where steps and spacing give them."""
    can_resample: ClassVar[bool] = False
    """Whether steps can be repeated: they are random and use no later state."""

    def __init__(
        self,
        process: Process,
        steps: int | None = None,
        spacing: str | None = None,
        temperature: Temperature | None = None,
        self_condition_passes: int = 1,
        levels: Sequence[float] | None = None,
        resample: int = 1,
        strength: float = 1.0,
    ) -> None:
        self.process = process
        self.ends_clean = process.ends_clean
        self.levels: tuple[float, ...] | None = None
        if levels is None:
            self.steps = process.steps if steps is None else steps
            self.visited, self.spacing = visited_levels(process, self.steps, spacing)
        else:
            for option, value in (("--steps", steps), ("--spacing", spacing)):
                if value is not None:
                    raise InputError(f"--levels names every noise level; leave out {option}")
            self.visited, self.spacing = chosen_levels(process, levels), None
            self.levels = tuple(at.level for at in self.visited)
            self.ends_clean |= self.levels[-1] > 0
            self.steps = len(self.visited) - (not self.ends_clean)
        if strength != 1:
            self.visited = levels_below(process, self.visited, strength)
        if not 1 <= resample <= MOST_REPEATS:
            raise InputError(f"--resample {resample}: expected a number from 1 to {MOST_REPEATS:,}")
        self.resample, self.strength = resample, strength
        self.temperature = Temperature() if temperature is None else temperature
        if self_condition_passes < 1:
            raise InputError(
                f"--self-condition-passes {self_condition_passes}: expected a number from 1"
            )
        self.self_condition_passes = self_condition_passes

    @property
    def adds_noise(self) -> bool:
        """Whether steps are random."""
        return False

    @property
    def evaluations(self) -> int:
        """Evaluations of the model for each sample."""
        return self._predictions * self.self_condition_passes

    @property
    @abstractmethod
    def _predictions(self) -> int:
        """Predictions for each sample."""

    def check_model(self, model: nn.Module) -> None:
        """Raise `InputError` if a model that is not self-conditioned should have passes."""
        if self.self_condition_passes > 1 and not is_self_conditioned(model):
            raise InputError(
                f"--self-condition-passes {self.self_condition_passes} is for self-conditioned "
                "networks, which this one is not; leave it out"
            )

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
        clean: State | None = None,
    ) -> State:
        """Draw samples in the units of the state; for the parameters see `SamplerContext`."""
        if (clean is None) != (self.strength == 1):
            raise ValueError("samples to begin with go with a strength below 1")
        self.check_model(model)
        drawn = self._sample(
            SamplerContext(model, self, random, layout, mask, condition, hook, advance, clean)
        )
        return drawn if hook is None else hook.after_sampling(drawn)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """α and σ at the visited levels, (V,) float64."""
        squares = [(at.alpha2, at.sigma2) for at in self.visited]
        alpha2, sigma2 = torch.tensor(squares, dtype=torch.float64).T.contiguous()
        return alpha2.sqrt(), sigma2.sqrt()

    @abstractmethod
    def _sample(self, context: SamplerContext) -> State:
        """Draw the samples."""


def _sqrt(square: float) -> float:
    # That of PyTorch may differ from `math.sqrt` in the last bit, and samples of a seed must not.
    return float(torch.tensor(square, dtype=torch.float64).sqrt())


class DiffusionSampler(Sampler):
    """Base of the samplers for denoisers that were trained by diffusion."""

    processes = ("diffusion", "cosine")

    @property
    def _predictions(self) -> int:
        return (len(self.visited) - 1) * self.resample + 1


def last_step(x: State, at: VisitedLevel, context: SamplerContext, spread: float = 0.0) -> State:
    """The end of a diffusion, from the last level to data.

    If the sampler ends with clean predictions, x̂ of all fields. Otherwise x̂ + spread·(σ/α)·ε for
    continuous fields, and x itself for discrete ones: their remaining noise is far below half a
    unit, so rounding removes it.
    """
    clean = context.predict(x, at).clean
    if context.ends_clean:
        return context.finish_step(clean, 0.0)
    if spread:
        ratio = _sqrt(at.sigma2) / _sqrt(at.alpha2)
        clean = clean + spread * ratio * context.noise(at)
    names = [name for name, field in x.layout.fields.items() if not field.discrete]
    return context.finish_step(x.replace(**{name: clean[name] for name in names}), at.level)


def ancestral_step(
    x: State,
    noise: State,
    t: VisitedLevel,
    s: VisitedLevel,
    context: SamplerContext,
    repeat: int = 0,
) -> State:
    """x_s drawn from q(x_s | x_t, x̂), given x_t and the predicted noise; see `AncestralSampler`."""
    ratio2 = t.alpha2 / s.alpha2
    step_variance = t.sigma2 - ratio2 * s.sigma2
    toward = step_variance / _sqrt(ratio2 * t.sigma2)
    spread = _sqrt(step_variance * s.sigma2 / t.sigma2)
    return x / _sqrt(ratio2) - toward * noise + spread * context.noise(t, repeat)


class AncestralSampler(DiffusionSampler):
    """Ancestral sampling of EDM (Hoogeboom et al., ICML 2022, algorithm 2).

    x_s = x_t/α_{t|s} − σ²_{t|s}/(α_{t|s} σ_t)·ε̂ + (σ_{t|s} σ_s/σ_t)·ε from each level t to the next
    level s, with α_{t|s} = α_t/α_s and σ²_{t|s} = σ²_t − α²_{t|s} σ²_s. At the end positions are
    drawn from N(x̂, σ_0²/α_0²), and discrete fields are those of x_0 itself. In continuous time the
    end is x̂ of all fields, the mean of the step to t = 0 (JODO: Huang et al., 2023).
    """

    can_resample = True

    @property
    def adds_noise(self) -> bool:
        return True

    def _sample(self, context: SamplerContext) -> State:
        x = context.start()
        for t, s in pairwise(self.visited):
            for repeat in range(self.resample):
                if repeat:
                    x = context.back(x, s, t, repeat)
                x = ancestral_step(x, context.predict(x, t).noise, t, s, context, repeat)
                x = context.finish_step(x, s.level)
        return last_step(x, self.visited[-1], context, spread=1.0)


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
        self_condition_passes: int = 1,
        levels: Sequence[float] | None = None,
        resample: int = 1,
        strength: float = 1.0,
    ) -> None:
        super().__init__(
            process, steps, spacing, temperature, self_condition_passes, levels, resample, strength
        )
        if not 0 <= eta <= 1:
            raise InputError(f"--eta {eta:g}: expected a number from 0 (no noise) to 1 (ancestral)")
        self.eta = eta

    @property
    def adds_noise(self) -> bool:
        return self.eta > 0

    def _sample(self, context: SamplerContext) -> State:
        x = context.start()
        for t, s in pairwise(self.visited):
            ratio2 = t.alpha2 / s.alpha2
            spread2 = self.eta**2 * (t.sigma2 - ratio2 * s.sigma2) * s.sigma2 / t.sigma2
            toward = _sqrt(t.sigma2 / ratio2) - _sqrt(s.sigma2 - spread2)
            x = x / _sqrt(ratio2) - toward * context.predict(x, t).noise
            if self.eta:
                x = x + _sqrt(spread2) * context.noise(t)
            x = context.finish_step(x, s.level)
        return last_step(x, self.visited[-1], context)


def _extrapolated(
    clean: State, before: tuple[State, float] | None, h: float, least: float = 0.0
) -> State:
    """D of DPM-Solver++(2M) for a step h in log(α/σ), r at least `least`; see `DPMSolverSampler`.

    `before` has the clean prediction and the length of the step before.
    """
    if before is None:
        return clean
    r = max(before[1] / h, least)
    return clean + (clean - before[0]) / (2 * r)


class DPMSolverSampler(DiffusionSampler):
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, algorithm 2).

    x_s = (σ_s/σ_t) x_t − α_s (e^{−h} − 1) D with λ = log(α/σ), h = λ_s − λ_t, and
    D = (1 + 1/(2r)) x̂_t − 1/(2r) x̂_{t'}, where t' is the level before t and r = (λ_t − λ_{t'})/h.
    The first step has D = x̂_t. Of second order in 1/S, with one prediction for each step. The end
    is that of `DDIMSampler`.

    Parameters
    ----------
    ancestral_positions
        Whether positions take the steps of `AncestralSampler` instead, with its end; for the other
        parameters see `Sampler`.
    """

    def __init__(
        self,
        process: Process,
        steps: int | None = None,
        spacing: str | None = None,
        temperature: Temperature | None = None,
        self_condition_passes: int = 1,
        ancestral_positions: bool = False,
        levels: Sequence[float] | None = None,
        resample: int = 1,
        strength: float = 1.0,
    ) -> None:
        super().__init__(
            process, steps, spacing, temperature, self_condition_passes, levels, resample, strength
        )
        self.ancestral_positions = ancestral_positions

    @property
    def adds_noise(self) -> bool:
        return self.ancestral_positions

    def _sample(self, context: SamplerContext) -> State:
        alpha, sigma = self._factors()
        log_ratio = (alpha / sigma).log()
        x = context.start()
        before: tuple[State, float] | None = None
        for k, (t, s) in enumerate(pairwise(self.visited)):
            h = float(log_ratio[k + 1] - log_ratio[k])
            prediction = context.predict(x, t)
            clean = prediction.clean
            toward = _extrapolated(clean, before, h)
            new = float(sigma[k + 1] / sigma[k]) * x - float(alpha[k + 1]) * math.expm1(-h) * toward
            if self.ancestral_positions:
                drawn = ancestral_step(x, prediction.noise, t, s, context)
                new = new.replace(positions=drawn["positions"])
            x = context.finish_step(new, s.level)
            before = clean, h
        return last_step(x, self.visited[-1], context, float(self.ancestral_positions))


# Of the step before to this one, in log(α/σ). A step much longer than the one before, such as the
# last one of even times, would extrapolate too far.
_LEAST_RATIO = 0.5


class StochasticDPMSolverSampler(DiffusionSampler):
    """SDE-DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, section 5): noise at every step.

    x_s = (σ_s/σ_t) e^{−h} x_t + α_s (1 − e^{−2h}) D + σ_s √(1 − e^{−2h}) ε with h and D as in
    `DPMSolverSampler`, but r at least 1/2. With D = x̂_t, as in the first step, this is the step of
    `AncestralSampler`, and so is the end. Steps that are repeated have D = x̂_t: their states are
    drawn anew, so that the difference to the prediction before is noise, which would add up.
    """

    can_resample = True

    @property
    def adds_noise(self) -> bool:
        return True

    def _sample(self, context: SamplerContext) -> State:
        alpha, sigma = self._factors()
        log_ratio = (alpha / sigma).log()
        x = context.start()
        before: tuple[State, float] | None = None
        for k, (t, s) in enumerate(pairwise(self.visited)):
            h = float(log_ratio[k + 1] - log_ratio[k])
            removed = -math.expm1(-2 * h)
            kept = float(sigma[k + 1] / sigma[k]) * math.exp(-h)
            for repeat in range(self.resample):
                if repeat:
                    x = context.back(x, s, t, repeat)
                clean = context.predict(x, t).clean
                toward = clean
                if self.resample == 1:
                    toward = _extrapolated(clean, before, h, _LEAST_RATIO)
                x = kept * x + float(alpha[k + 1]) * removed * toward
                x = x + float(sigma[k + 1]) * math.sqrt(removed) * context.noise(t, repeat)
                x = context.finish_step(x, s.level)
            before = clean, h
        return last_step(x, self.visited[-1], context, spread=1.0)


class HeunSampler(Sampler):
    """Heun's method on the probability-flow ODE (Karras et al., NeurIPS 2022, algorithm 1).

    In y = x/α_t and τ = σ_t/α_t the ODE is dy/dτ = ε̂ (equation 4 there, with s(t) = α and
    σ(t) = τ); for flow matching y = x, τ = t/T, and dy/dτ = û. A step first goes to
    y + (τ_s − τ_t)·d_t. It is repeated from y with the mean of d_t and the slope at that point. Of
    second order in 1/S. Only the start is random. A diffusion ends as with `DDIMSampler`. The last
    step of a flow, to t = 0 where the network is not trained, is Euler's.
    """

    processes = ("diffusion", "cosine", "flow_matching")

    @property
    def _predictions(self) -> int:
        steps = len(self.visited) - 1
        ends_with_prediction = self.ends_clean or isinstance(self.process, VariancePreserving)
        return 2 * steps + (1 if ends_with_prediction else -1)

    def _sample(self, context: SamplerContext) -> State:
        process = self.process
        if isinstance(process, VariancePreserving):
            alpha, sigma = self._factors()
            tau = sigma / alpha
        else:
            tau = torch.tensor([at.level for at in self.visited]).double() / process.steps
            alpha = torch.ones_like(tau)
        x = context.start()
        for k, (t, s) in enumerate(pairwise(self.visited)):
            scaled = float(alpha[k + 1] / alpha[k]) * x
            step = float(alpha[k + 1] * (tau[k + 1] - tau[k]))
            slope = context.predict(x, t).target
            x = context.finish_step(scaled + step * slope, s.level)
            if s.level >= process.first_level:
                slope = (slope + context.predict(x, s).target) / 2
                x = context.finish_step(scaled + step * slope, s.level)
        if self.ends_clean or isinstance(process, VariancePreserving):
            return last_step(x, self.visited[-1], context)
        return x


class EulerSampler(Sampler):
    """dx/dt = û(x, t) from noise at t = 1 to data at t = 0, by Euler's method.

    Equation 1 of Lipman et al., ICLR 2023, with time from data to noise. For denoisers that were
    trained by flow matching. Of first order in 1/S. Only the start is random.
    """

    processes = ("flow_matching",)

    @property
    def _predictions(self) -> int:
        return self.steps

    def _sample(self, context: SamplerContext) -> State:
        x = context.start()
        for t, s in pairwise(self.visited):
            step = (t.level - s.level) / self.process.steps
            x = context.finish_step(x - context.predict(x, t).velocity * step, s.level)
        return last_step(x, self.visited[-1], context) if self.ends_clean else x


SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "dpm++": DPMSolverSampler,
    "sde-dpm++": StochasticDPMSolverSampler,
    "heun": HeunSampler,
    "euler": EulerSampler,
}

DEFAULT_SAMPLERS = {"diffusion": "ancestral", "flow_matching": "euler", "cosine": "ancestral"}
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
    ancestral_positions: bool = False,
    self_condition_passes: int = 1,
    levels: Sequence[float] | None = None,
    resample: int = 1,
    strength: float = 1.0,
) -> Sampler:
    """The named sampler; None selects the defaults of the process, η = 0, and τ = 1.

    Raises
    ------
    InputError
        The process has no such sampler, the sampler has no η or cannot take ancestral steps or
        repeat its steps, the temperature does not suit it, or a number is out of range.
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
    own: dict[str, Any] = {}
    if issubclass(kind, DDIMSampler):
        own["eta"] = 0.0 if eta is None else eta
    elif eta is not None:
        raise InputError(f"--eta goes with --sampler ddim, not {name}")
    if issubclass(kind, DPMSolverSampler):
        own["ancestral_positions"] = ancestral_positions
    elif ancestral_positions:
        raise InputError(f"--ancestral-positions goes with --sampler dpm++, not {name}")
    if resample > 1 and not kind.can_resample:
        able = [other for other in valid if SAMPLERS[other].can_resample]
        others = f"choose --sampler {' or '.join(able)}, or " if able else ""
        raise InputError(
            f"--resample {resample} repeats random steps, and {name} takes none; {others}leave it "
            "out"
        )
    sampler = kind(
        process,
        steps,
        spacing,
        temperature=temperature,
        self_condition_passes=self_condition_passes,
        levels=levels,
        resample=resample,
        strength=strength,
        **own,
    )
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
    if isinstance(sampler, DPMSolverSampler):
        others.append("--ancestral-positions")
    if "ancestral" in samplers_for(sampler.process.name):
        others.append("--sampler ancestral")
    if others:
        remedies.append(f"use {' or '.join(others)}")
    raise InputError(f"{option}, and {name} adds none; {', or '.join(remedies)}")
