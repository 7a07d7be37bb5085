"""Losses that compare each atom with itself: a spring from every atom to its place in space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from molgen_energy.losses.base import PositionLoss, Samples


class PointwiseLoss(PositionLoss):
    """A mean over real atoms and C channels.

    Parameters
    ----------
    channels
        C; None is the dimension D. EDM's objective takes one mean over positions and features
        together, C = 3 + F, of which this is the positions' part.
    """

    def __init__(self, channels: int | None = None) -> None:
        self.channels = channels

    def _mean(self, values: Tensor, samples: Samples) -> Tensor:
        channels = self.channels or values.shape[-1]
        return values.sum(dim=(1, 2)) / (samples.counts * channels)


class MeanSquaredError(PointwiseLoss):
    """‖ŷ − y‖² / (n·C): an energy of springs of equal strength that hold each atom in place."""

    def of(self, samples: Samples) -> Tensor:
        """Error of each sample, (B,)."""
        return self._mean((samples.prediction - samples.target).square(), samples)


class MeanAbsoluteError(PointwiseLoss):
    """Σ|ŷ − y| / (n·C), over atoms and coordinates."""

    degree = 1

    def of(self, samples: Samples) -> Tensor:
        """Error of each sample, (B,)."""
        return self._mean((samples.prediction - samples.target).abs(), samples)


class KabschError(PointwiseLoss):
    """min over R, s of ‖ŷ − (R y + s)‖² / (n·C): the squared error behind the best superposition.

    R is a proper rotation, so a mirror image is not the same; it is found by the singular value
    decomposition of Kabsch (Acta Crystallographica A 32, 1976) and taken as a constant: that is the
    gradient of the minimum (envelope theorem), and nothing blows up where R is not unique, as for
    planar and linear molecules.
    """

    def of(self, samples: Samples) -> Tensor:
        """Error of each sample, (B,)."""
        prediction = _centred(samples.prediction, samples)
        with torch.no_grad():
            target = _centred(samples.target, samples)
            with _exact_products():
                aligned = target @ best_rotation(target, prediction)
        return self._mean((prediction - aligned).square(), samples)


def best_rotation(source: Tensor, goal: Tensor) -> Tensor:
    """The proper rotations R (B, D, D) that bring ‖goal − source·R‖ to its least.

    Parameters
    ----------
    source, goal
        (B, N, D), centred, zero at padding.
    """
    covariance = torch.nan_to_num(source.transpose(1, 2) @ goal)  # the loss itself stays NaN
    left, _, right = torch.linalg.svd(covariance)
    mirrored = torch.linalg.det(left @ right) < 0
    sign = torch.ones_like(left[:, 0])
    sign[:, -1] = torch.where(mirrored, -1.0, 1.0)
    rotation: Tensor = (left * sign[:, None]) @ right
    return rotation


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of matrices in full float32, whatever networks take."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _centred(values: Tensor, samples: Samples) -> Tensor:
    moved = values - values.sum(dim=1, keepdim=True) / samples.counts[:, None, None]
    return moved if samples.mask is None else torch.where(samples.mask[..., None], moved, 0)
