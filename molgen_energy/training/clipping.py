"""Gradient clipping with a bound from the norms of recent steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_REMEMBERED = 50
_FIRST = 3000.0


class GradientClipper:
    """Clip gradients to a norm of 1.5·mean + 2·std of the last 50 clipped norms, 3000 at first.

    The rule of EDM's code (Hoogeboom et al., ICML 2022).

    Parameters
    ----------
    highest
        The bound is never above this (JODO: Huang et al., 2023, arXiv:2305.12347).
    """

    def __init__(self, highest: float = math.inf) -> None:
        self._highest = highest
        self._norms: deque[float] = deque([_FIRST], maxlen=_REMEMBERED)

    def clip(self, parameters: Iterable[Tensor]) -> float:
        """Clip in place; returns the norm before clipping."""
        recent = 1.5 * float(np.mean(self._norms)) + 2 * float(np.std(self._norms))
        bound = min(recent, self._highest)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, bound))
        if math.isfinite(norm):
            self._norms.append(min(norm, bound))
        return norm

    def state(self) -> Tensor:
        """The stored norms, for a checkpoint."""
        return torch.tensor(list(self._norms), dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Restore the norms from a checkpoint."""
        self._norms = deque(state.tolist(), maxlen=_REMEMBERED)
