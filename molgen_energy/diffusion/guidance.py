"""The hook through which guidance and constraints enter a sampler, and two ways of guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.state import State
from molgen_energy.errors import InputError

GuidanceFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f(positions (B, N, 3) in Å, mask (B, N), atomic numbers (B, N)) -> (B,), an energy in units of
k_B T; both are zero at padding."""

_LONGEST_NAME = 200  # characters, as in the manifest of a job


def guidance_name(guidance: float | GuidanceFunction) -> float | str:
    """A scale of guidance as it is, and the module and name of a function.

    Raises
    ------
    InputError
        It is neither.
    """
    if isinstance(guidance, str):
        raise InputError(f"guidance: expected a number or a function, found '{guidance[:60]}'")
    if not callable(guidance):
        return guidance
    named = guidance if hasattr(guidance, "__qualname__") else type(guidance)
    return f"function {named.__module__}.{named.__qualname__}"[:_LONGEST_NAME]


class SamplingHook:
    """Changes predictions and states while a sampler runs. This base class changes neither.

    Guidance overrides `after_prediction`, for example to add the gradient of a function of the
    clean prediction; so do fixed values (`molgen_energy.diffusion.inpainting`). The sampler
    projects what a hook returns onto the subspaces of the fields, but for `after_sampling`.

    A level is its number in training, 0 … T; in continuous time it is the time, and that of the
    samples themselves is 0.
    """

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        """Return the prediction that the sampler uses at a level.

        Called with a prediction that the temperature has changed already. Of a self-conditioned
        network it is also called with those that are its next input.
        """
        return prediction

    def after_step(self, state: State, level: float) -> State:
        """Return the state from which the sampler continues after a step to a level."""
        return state

    def after_sampling(self, state: State) -> State:
        """Return the samples, once, in place of those that the sampler ends with."""
        return state


class Hooks(SamplingHook):
    """Several hooks; each gets what the one before returned, so that the last one decides."""

    def __init__(self, hooks: Sequence[SamplingHook]) -> None:
        self.hooks = tuple(hooks)

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        for hook in self.hooks:
            prediction = hook.after_prediction(prediction, level)
        return prediction

    def after_step(self, state: State, level: float) -> State:
        for hook in self.hooks:
            state = hook.after_step(state, level)
        return state

    def after_sampling(self, state: State) -> State:
        for hook in self.hooks:
            state = hook.after_sampling(state)
        return state


def chained(hooks: Sequence[SamplingHook]) -> SamplingHook | None:
    """One hook for several; None for none."""
    if len(hooks) > 1:
        return Hooks(hooks)
    return hooks[0] if hooks else None


class FunctionGuidance(SamplingHook):
    """Guidance by a differentiable function of the positions: samples of p(x)·exp(−f(x)).

    x̂ ← x̂ − r²·∇f(x̂), with r² = s²τ²/(s² + τ²) and τ = σ/α in Å. Since x̂ = (x_t + σ²·∇log p_t)/α
    (Tweedie), a further factor exp(−f(x̂)) of the density adds −Cov(x|x_t)·∇f to x̂ (Chung et al.,
    ICLR 2023, arXiv:2209.14687); r² is that covariance for data of variance s² (Song et al., ICLR
    2023, "Pseudoinverse-guided diffusion models"). No gradient goes through the network. The root
    mean square of a molecule's shift is at most r, so that a steep function does not overshoot by
    more than what is undecided at the level.

    Parameters
    ----------
    function
        See `GuidanceFunction`. The value of a molecule must not depend on the others of a batch.
    spread
        s in Å.
    """

    def __init__(self, function: GuidanceFunction, spread: float = 1.0) -> None:
        self.function, self.spread = function, spread

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        """The prediction with positions that the function prefers.

        Raises
        ------
        InputError
            The function does not return one finite number for each molecule that depends on
            positions.
        """
        clean = prediction.clean.projected()
        scale = clean.layout.fields["positions"].scale
        alpha2, sigma2 = prediction.process.squares(level)
        spread2, noise2 = self.spread**2, sigma2 * scale**2
        variance = spread2 * noise2 / (spread2 * alpha2 + noise2)
        shift = -variance * self._gradient(clean["positions"] * scale, clean)
        positions = clean["positions"] + _limited(shift, clean.mask, variance**0.5) / scale
        guided = clean.replace(positions=positions).projected()
        return Prediction(prediction.process, prediction.noisy, prediction.level, guided, "clean")

    def _gradient(self, positions: Tensor, clean: State) -> Tensor:
        """The gradient in 1/Å, (B, N, 3), at positions in Å."""
        mask, data = clean.mask, clean.decode()
        numbers = data.get("atomic_numbers", torch.zeros_like(mask, dtype=torch.uint8))
        numbers = numbers.masked_fill(~mask, 0)
        with torch.enable_grad():
            positions = positions.detach().requires_grad_()
            values = self.function(positions, mask, numbers)
            if not isinstance(values, Tensor) or values.shape != (len(mask),):
                found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InputError(
                    f"guidance: expected a tensor of one number for each of {len(mask)} molecules, "
                    f"found {found}"
                )
            if values.is_complex():
                raise InputError("guidance: expected real numbers, found complex ones")
            gradient = None
            if values.requires_grad:
                (gradient,) = torch.autograd.grad(values.sum(), positions, allow_unused=True)
            if gradient is None:
                raise InputError("guidance: the function does not depend on the positions")
        # At padding all positions are zero, where roots have no finite gradient.
        gradient = torch.where(mask[..., None], gradient, 0)
        whole = clean["positions"].isfinite().all(dim=(1, 2))  # others diverged before
        wrong = whole & ~(values.isfinite() & gradient.isfinite().all(dim=(1, 2)))
        if wrong.any():
            atoms = int(mask[wrong][0].sum())
            raise InputError(
                f"guidance: the function or its gradient is not finite at a molecule of {atoms} "
                "atoms; let it be finite everywhere, also while noise is high"
            )
        return gradient


def _limited(shift: Tensor, mask: Tensor, most: float) -> Tensor:
    """Shifts (B, N, 3), those of a molecule with a root mean square of at most `most`."""
    squares = torch.where(mask[..., None], shift, 0).square().sum(dim=(1, 2))
    root_mean_square = (squares / (3 * mask.sum(dim=1))).sqrt()
    factor: Tensor = (most / root_mean_square.clamp(min=1e-12)).clamp(max=1)
    return shift * factor[:, None, None]


class ClassifierFreeGuidance(nn.Module):
    """A denoiser whose prediction is u + S·(c − u), c with the condition and u without.

    Ho, Salimans, 2022, arXiv:2207.12598, equation 6 with S = 1 + w. Noise, velocity and clean data
    are affine functions of each other, so that it does not matter which of them is predicted.

    Parameters
    ----------
    denoiser
        Trained with conditions that are zero where nothing is known.
    scale
        S: 1 is the conditional network, 0 the unconditional one.
    """

    evaluations = 2
    """Of the denoiser, for each prediction."""

    def __init__(self, denoiser: nn.Module, scale: float) -> None:
        super().__init__()
        self.module, self.scale = denoiser, scale

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        """The guided prediction, as of `Denoiser.forward`; for this, two evaluations."""
        assert condition is not None
        known = self._evaluate(state, time, mask, condition, self_condition)
        unknown = self._evaluate(state, time, mask, torch.zeros_like(condition), self_condition)
        return unknown + self.scale * (known - unknown)

    def _evaluate(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor,
        self_condition: State | None,
    ) -> State:
        result: State = self.module(state, time, mask, condition, self_condition)
        return result
