"""Exponential moving average of a model's parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """θ̄ ← d·θ̄ + (1 − d)·θ, with d rising as (1 + t)/(10 + t) to `decay`.

    With the rise, the average of a short run does not keep its random initialisation.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def weight(self, step: int) -> float:
        """1 − d after `step` updates."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, weight: Tensor) -> None:
        """Update the average with the model's parameters, for a weight () on their device."""
        averages: list[Tensor] = [*self.model.parameters()]
        parameters: list[Tensor] = [*model.parameters()]
        if weight.device.type == "cpu":
            torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
        else:  # where a list of weights would take a launch for each parameter
            changes = list(torch._foreach_sub(parameters, averages))
            torch._foreach_mul_(changes, weight)
            torch._foreach_add_(averages, changes)
