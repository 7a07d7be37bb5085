"""Pointwise losses: a spring from each atom to its target position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor

from molgen_energy.losses.base import LossConfig, PositionLoss, Samples
from molgen_energy.losses.derivatives import once_differentiable


class PointwiseLoss(PositionLoss):
    """A mean over real atoms and C channels.

    Parameters
    ----------
    channels
        C; None is the dimension D. EDM's objective is one mean over positions and features, so its
        part of the positions has C = 3 + F.
    """

    def __init__(self, channels: int | None = None) -> None:
        self.channels = channels

    def _mean(self, values: Tensor, samples: Samples) -> Tensor:
        channels = self.channels or values.shape[-1]
        return values.sum(dim=(1, 2)) / (samples.counts * channels)


class MeanSquaredErrorConfig(LossConfig):
    """Mean squared error, see `MeanSquaredError`."""

    name: str = "mse"

    def build(self, *, seed: int = 0, channels: int | None = None) -> MeanSquaredError:
        """The loss, a mean over channels."""
        return MeanSquaredError(channels)


class MeanSquaredError(PointwiseLoss):
    """‖ŷ − y‖² / (n·C): the energy of equally stiff springs from each atom to its target."""

    Config: ClassVar[type[MeanSquaredErrorConfig]] = MeanSquaredErrorConfig

    def of(self, samples: Samples) -> Tensor:
        """Error of each sample, (B,)."""
        return self._mean((samples.prediction - samples.target).square(), samples)


class MeanAbsoluteErrorConfig(LossConfig):
    """Mean absolute error, see `MeanAbsoluteError`."""

    name: str = "mae"

    def build(self, *, seed: int = 0, channels: int | None = None) -> MeanAbsoluteError:
        """The loss, a mean over channels."""
        return MeanAbsoluteError(channels)


class MeanAbsoluteError(PointwiseLoss):
    """Σ|ŷ − y| / (n·C), over atoms and coordinates."""

    Config: ClassVar[type[MeanAbsoluteErrorConfig]] = MeanAbsoluteErrorConfig
    degree = 1

    def of(self, samples: Samples) -> Tensor:
        """Error of each sample, (B,)."""
        return self._mean((samples.prediction - samples.target).abs(), samples)


class KabschErrorConfig(LossConfig):
    """Squared error after a superposition, see `KabschError`."""

    name: str = "kabsch"
    align: Literal["prediction", "noisy"] = "prediction"
    """What the target is rotated onto: the prediction, or the noisy positions (JODO)."""

    @property
    def requires(self) -> frozenset[str]:
        """The noisy positions, if the target is rotated onto them."""
        return frozenset({"noisy"} if self.align == "noisy" else ())

    def describe(self) -> str:
        """What the target is aligned with, if not with the prediction."""
        return "" if self.align == "prediction" else ", aligned with the noisy positions"

    def build(self, *, seed: int = 0, channels: int | None = None) -> KabschError:
        """The loss, a mean over channels."""
        return KabschError(channels, self.align)


class KabschError(PointwiseLoss):
    """‖ŷ − (R y + s)‖² / (n·C) after a superposition of the target.

    R is a proper rotation, so the loss of a mirror image is not 0. It is found by the singular
    value decomposition of Kabsch (Acta Crystallographica A 32, 1976) and treated as a constant.
    R and s minimise the error by default. This gives the gradient of the minimum (envelope
    theorem), which is finite where R is not unique, as for planar and linear molecules. The second
    derivative would need that of R, so it is refused, as a gradient to the target is.

    Parameters
    ----------
    channels
        C, see `PointwiseLoss`.
    align
        `prediction`: R y is closest to the prediction. `noisy`: to the noisy positions, which are
        required then (JODO: Huang et al., 2023, arXiv:2305.12347).
    """

    Config: ClassVar[type[KabschErrorConfig]] = KabschErrorConfig

    def __init__(
        self, channels: int | None = None, align: Literal["prediction", "noisy"] = "prediction"
    ) -> None:
        super().__init__(channels)
        self.align = align
        self.requires = frozenset({"noisy"} if align == "noisy" else ())

    def of(self, samples: Samples) -> Tensor:
        """Error of each sample, (B,)."""
        samples = once_differentiable(samples, "the Kabsch loss", ["target"])
        prediction = _centred(samples.prediction, samples)
        with torch.no_grad(), _exact_products():
            target = _centred(samples.target, samples)
            # `no_grad` alone leaves the derivatives of forward mode.
            goal = prediction.detach()
            if self.align == "noisy":
                assert samples.noisy is not None
                goal = _centred(samples.noisy.detach(), samples)
            aligned = target @ best_rotation(target, goal)
        return self._mean((prediction - aligned).square(), samples)


def best_rotation(source: Tensor, goal: Tensor) -> Tensor:
    """The proper rotations R (B, D, D) that minimise ‖goal − source·R‖.

    Parameters
    ----------
    source, goal
        (B, N, D), centred, zero at padding.
    """
    covariance = torch.nan_to_num(source.transpose(1, 2) @ goal)  # the loss itself stays NaN
    left, _, right = torch.linalg.svd(covariance)
    improper = torch.linalg.det(left @ right) < 0
    sign = torch.ones_like(left[:, 0])
    sign[:, -1] = torch.where(improper, -1.0, 1.0)
    rotation: Tensor = (left * sign[:, None]) @ right
    return rotation


@contextmanager
def _exact_products() -> Iterator[None]:
    """Matrix products in full float32, whatever precision networks use."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def _centred(values: Tensor, samples: Samples) -> Tensor:
    centred = values - values.sum(dim=1, keepdim=True) / samples.counts[:, None, None]
    return centred if samples.mask is None else torch.where(samples.mask[..., None], centred, 0)
