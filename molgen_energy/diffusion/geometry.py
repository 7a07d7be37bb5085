"""Operations on masked coordinates that models and the diffusion process share."""

from __future__ import annotations

import torch
from torch import Tensor


def centred(positions: Tensor, mask: Tensor) -> Tensor:
    """Positions (B, N, D) minus the mean over real atoms; zero at padding, whatever stood there."""
    atoms = mask[..., None]
    inside = torch.where(atoms, positions, 0)
    count = mask.sum(dim=1).clamp(min=1)[:, None, None]
    return torch.where(atoms, inside - inside.sum(dim=1, keepdim=True) / count, 0)


def on_subspace(noise: Tensor, mask: Tensor) -> Tensor:
    """Project (B, N, 3+F) on zero-mean positions, and on zero at padding."""
    features = torch.where(mask[..., None], noise[..., 3:], 0)
    return torch.cat([centred(noise[..., :3], mask), features], dim=-1)


def pair_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, N) from (B, N): 1 where two different real atoms meet, else 0."""
    apart = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return (mask[:, :, None] & mask[:, None, :] & apart).to(dtype)


def rotated(positions: Tensor, rotations: Tensor) -> Tensor:
    """Positions (B, N, 3) turned by rotations (B, 3, 3), each x ↦ R·x.

    As sums of products, so that it is exact where products of matrices are taken in TF32.
    """
    return (positions[:, :, None] * rotations[:, None]).sum(dim=-1)


def random_rotations(count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Proper rotations (count, 3, 3), uniform (Haar), as unit quaternions drawn from a Gaussian."""
    quaternions = torch.randn(count, 4, generator=generator, device=like.device, dtype=like.dtype)
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=1).view(count, 3, 3)
