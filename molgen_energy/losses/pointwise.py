"""Losses that compare each atom with itself: a spring from every atom to its place in space."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanSquaredError:
    """‖ŷ − y‖² / (n·C): the mean over real atoms and C channels.

    Parameters
    ----------
    channels
        C; None is the dimension D. EDM's objective takes one mean over positions and features
        together, C = 3 + F, of which this is the positions' part.
    """

    degree = 2

    def __init__(self, channels: int | None = None) -> None:
        self.channels = channels

    def __call__(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Error of each sample, (B,), of tensors (B, N, D) with mask (B, N); padding is ignored."""
        difference = torch.where(mask[..., None], prediction - target, 0)
        channels = self.channels or prediction.shape[-1]
        count = mask.sum(dim=1).clamp(min=1) * channels
        return difference.square().sum(dim=(1, 2)) / count
