"""Noise schedules: factors of signal and noise at each level."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_LEAST_RATIO = 0.001  # of α² from one step to the next, so that no step divides by almost zero


class PolynomialSchedule:
    """x_t = α_t x + σ_t ε with α²(u) = (1 − 2s)·(1 − u²)² + s, u = t/T, α² + σ² = 1.

    The ratio of α² from one level to the next is first clipped to at least 0.001. EDM's schedule
    `polynomial_2` (Hoogeboom et al., ICML 2022).

    Parameters
    ----------
    steps
        T; there are T + 1 noise levels, t = 0 … T.
    precision
        s: the variance of the noise at t = 0, and of the signal at t = T.
    """

    def __init__(self, steps: int, precision: float = 1e-5) -> None:
        self.steps = steps
        u = np.arange(steps + 1) / steps
        alpha2 = (1 - u**2) ** 2
        ratios = np.clip(alpha2[1:] / alpha2[:-1], _LEAST_RATIO, 1.0)
        alpha2 = np.concatenate([[1.0], np.cumprod(ratios)])
        alpha2 = (1 - 2 * precision) * alpha2 + precision
        # float64, since differences between neighbouring levels are small.
        self.alpha2 = torch.from_numpy(alpha2)
        self.sigma2 = torch.from_numpy(1 - alpha2)
        # α and σ on each device: copying them at every step would make a GPU wait.
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def alpha(self, step: Tensor) -> Tensor:
        """α_t of step numbers (any shape) as float32 on their device."""
        return self._on(step.device)[0][step]

    def sigma(self, step: Tensor) -> Tensor:
        """σ_t of step numbers (any shape) as float32 on their device."""
        return self._on(step.device)[1][step]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            alpha, sigma = (squares.sqrt().float() for squares in (self.alpha2, self.sigma2))
            self._tables[device] = alpha.to(device), sigma.to(device)
        return self._tables[device]

    def time(self, step: Tensor) -> Tensor:
        """Diffusion time t/T in [0, 1], float32."""
        return step.float() / self.steps


_OFFSET = 0.008
_FIRST_ANGLE = _OFFSET / (1 + _OFFSET) * math.pi / 2


class CosineSchedule:
    """α(t) = cos((t + s)/(1 + s)·π/2) / cos(s/(1 + s)·π/2), s = 0.008, σ² = 1 − α².

    Nichol and Dhariwal, ICML 2021, equation 17, in continuous time t in [0, 1]. All results are
    float64: α vanishes at t = 1, and σ at t = 0.
    """

    def alpha(self, time: Tensor) -> Tensor:
        """α at times of any shape, at least 1e-9."""
        return (self._angle(time).cos() / math.cos(_FIRST_ANGLE)).clamp(1e-9, 1)

    def sigma(self, time: Tensor) -> Tensor:
        """σ at times of any shape."""
        # 1 − α² without cancellation: sin² of the angle minus that at t = 0, over cos² at t = 0.
        angle = self._angle(time)
        squares = (angle - _FIRST_ANGLE).sin() * (angle + _FIRST_ANGLE).sin()
        return (squares / math.cos(_FIRST_ANGLE) ** 2).clamp(0, 1).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        """The time with λ = log(α²/σ²), float64."""
        alpha = log_snr.double().sigmoid().sqrt()
        angle = (alpha * math.cos(_FIRST_ANGLE)).acos()
        return angle * (2 / math.pi) * (1 + _OFFSET) - _OFFSET

    @staticmethod
    def _angle(time: Tensor) -> Tensor:
        return (time.double() + _OFFSET) / (1 + _OFFSET) * (math.pi / 2)
