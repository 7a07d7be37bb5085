"""The energy loss: springs between the atoms, at rest where the data is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from molgen_energy.losses.springs import SPRINGS, SpringFamily


def pairwise_distances(positions: Tensor, mask: Tensor) -> Tensor:
    """Distances (B, N, N) of positions (B, N, D); padding counts as the origin, gradients as 0.

    The gradient at distance 0 is 0, not NaN.
    """
    inside = torch.where(mask[..., None], positions, 0)
    # The faster route over a matrix product loses the digits that matter at low noise.
    return torch.cdist(inside, inside, compute_mode="donot_use_mm_for_euclid_dist")


def mean_stiffness(
    springs: str | SpringFamily, molecules: Iterable[tuple[Tensor, Tensor]]
) -> float:
    """Mean of f(d_ij) over all pairs of real atoms: the c that makes c·f of mean 1 is its inverse.

    Parameters
    ----------
    springs
        Name of a family, or a function f of distances.
    molecules
        Pieces of the data: positions (B, N, D) and mask (B, N), true at real atoms.

    Returns
    -------
    The mean; 1.0 where there is no pair (single atoms only).
    """
    family = SPRINGS[springs] if isinstance(springs, str) else springs
    total = count = 0.0
    for positions, mask in molecules:
        pairs = _pairs(mask)
        stiffness = family(pairwise_distances(positions.double(), mask))
        total += float(torch.where(pairs, stiffness, 0).sum())
        count += float(pairs.sum())
    return total / count if count else 1.0


class PairwiseEnergy:
    """E(ŷ, y) = Σ_{i≠j} ½ k_ij(y) (‖y_i − y_j‖ − ‖ŷ_i − ŷ_j‖)², with k_ij = (c/n)·f(‖y_i − y_j‖).

    Equation 7 of Kaba et al., NeurIPS 2025, over ordered pairs of real atoms. It does not change
    when the prediction or the data is translated, rotated or mirrored, and is zero exactly where
    all distances agree.

    Parameters
    ----------
    springs
        Name of a family in `SPRINGS`, or a function f of distances.
    scale
        c; the spring constants have mean c·⟨f⟩/n.
    """

    degree = 2
    """The loss grows with this power of a small displacement."""

    def __init__(self, springs: str | SpringFamily = "exponential", scale: float = 1.0) -> None:
        self.family = SPRINGS[springs] if isinstance(springs, str) else springs
        self.scale = scale

    def __call__(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Energy of each sample, (B,).

        Parameters
        ----------
        prediction, target
            (B, N, D); what stands at padding, NaN too, has no effect.
        mask
            (B, N), true at real atoms.
        """
        rest = pairwise_distances(target, mask)
        stiffness = torch.where(_pairs(mask), self.family(rest), 0)
        extension = rest - pairwise_distances(prediction, mask)
        atoms = mask.sum(dim=1).clamp(min=1)
        return 0.5 * self.scale / atoms * (stiffness * extension.square()).sum(dim=(1, 2))


def _pairs(mask: Tensor) -> Tensor:
    """Ordered pairs i ≠ j of real atoms, (B, N, N)."""
    apart = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return mask[:, :, None] & mask[:, None, :] & apart
