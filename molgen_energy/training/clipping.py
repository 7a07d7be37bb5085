"""Gradient clipping with a bound from the norms of recent steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_REMEMBERED = 50
_FIRST = 3000.0


class GradientClipper:
    """Clip gradients to a norm of 1.5·mean + 2·std of the last 50 clipped norms, 3000 at first.

    The rule of EDM's code (Hoogeboom et al., ICML 2022). Norms and bound stay on the device, so
    that a step does not wait for them.

    Parameters
    ----------
    highest
        The bound is never above this (JODO: Huang et al., 2023, arXiv:2305.12347).
    """

    def __init__(self, highest: float = math.inf) -> None:
        self._highest = highest
        # The oldest first, after NaN in free places.
        self._norms = torch.full((_REMEMBERED,), math.nan, dtype=torch.float64)
        self._norms[-1] = _FIRST

    def clip(self, parameters: Iterable[Tensor], weight: float | Tensor = 1.0) -> Tensor:
        """Clip in place; returns the norm before clipping, () on the device.

        Clipped gradients are then multiplied by `weight`.
        """
        gradients = gradients_of(parameters)
        norm = total_norm(gradients)
        if self._norms.device != norm.device:
            self._norms = self._norms.to(norm.device)
        known = ~self._norms.isnan()
        count = known.sum()
        mean = torch.where(known, self._norms, 0).sum() / count
        variance = torch.where(known, self._norms - mean, 0).square().sum() / count
        bound = (1.5 * mean + 2 * variance.sqrt()).clamp(max=self._highest)
        factor = ((norm + 1e-6).reciprocal() * bound.to(norm.dtype)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor * weight)
        norms = torch.cat([self._norms[1:], torch.minimum(norm.double(), bound)[None]])
        # In place, for steps that are recorded as a CUDA graph.
        self._norms.copy_(torch.where(norm.isfinite(), norms, self._norms))
        return norm

    def state(self) -> Tensor:
        """The stored norms, for a checkpoint."""
        return self._norms[~self._norms.isnan()].cpu()

    def load(self, state: Tensor) -> None:
        """Restore the norms from a checkpoint."""
        kept = state[-_REMEMBERED:]
        self._norms.fill_(math.nan)
        self._norms[_REMEMBERED - len(kept) :] = kept.to(self._norms.device)


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, ()."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm
