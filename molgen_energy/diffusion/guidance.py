"""The hook through which guidance and constraints enter a sampler."""

from __future__ import annotations

from collections.abc import Sequence

from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.state import State


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
