"""Operations on masked coordinates."""

from __future__ import annotations

import torch
from torch import Tensor


def centred(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions (B, N, D) minus the mean over real atoms; zero at padding, even if it holds NaN."""
    atoms = mask[..., None]
    inside = torch.where(atoms, positions, 0)
    count = mask.sum(dim=1).clamp(min=1)[:, None, None]
    return torch.where(atoms, inside - inside.sum(dim=1, keepdim=True) / count, 0)


def rotated(positions: Tensor, rotations: Tensor) -> Tensor:
    """Positions (B, N, 3) rotated by matrices R (B, 3, 3), each x ↦ R·x.

    Computed elementwise, so that the result has full precision where matrix products use TF32.
    """
    return (positions[:, :, None] * rotations[:, None]).sum(dim=-1)


def rotations_from_quaternions(quaternions: Tensor) -> Tensor:
    """Proper rotation matrices (B, 3, 3) of quaternions (B, 4) of any length.

    Quaternions with independent standard normal components give uniform (Haar) rotations.
    """
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=1).view(len(quaternions), 3, 3)
