"""The hook through which guidance and constraints enter a sampler."""

from __future__ import annotations

from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.state import State


class SamplingHook:
    """Changes predictions and states while a sampler runs. This base class changes neither.

    Guidance overrides `after_prediction`, for example to add the gradient of a function of the
    clean prediction. Inpainting overrides `after_step` to set fixed atoms to their values with the
    noise of the level. The sampler projects what a hook returns onto the subspaces of the fields.

    A level is its number in training, 0 … T; in continuous time it is the time, and that of the
    samples themselves is 0.
    """

    def after_prediction(self, prediction: Prediction, level: float) -> Prediction:
        """Return the prediction that the sampler uses at a level."""
        return prediction

    def after_step(self, state: State, level: float) -> State:
        """Return the state from which the sampler continues after a step to a level."""
        return state
