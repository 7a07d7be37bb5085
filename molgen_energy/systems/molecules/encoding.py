"""Molecules as points of the space that the diffusion runs in, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from molgen_energy.diffusion.geometry import centred


@dataclass(frozen=True)
class MoleculeEncoding:
    """An atom is (position/s_x, one-hot of its element/s_h, atomic number/s_z), 3 + F channels.

    F is the number of elements plus one. Small features keep the noise at t = 0 far below half a
    unit of type, so that rounding gives the types back (EDM, Hoogeboom et al., ICML 2022).
    """

    elements: tuple[int, ...]
    position_scale: float = 1.0
    type_scale: float = 4.0
    charge_scale: float = 10.0

    @property
    def features(self) -> int:
        """F, the number of channels besides positions."""
        return len(self.elements) + 1

    def encode(self, positions: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """Positions (B, N, 3) in Å and indices into `elements` (B, N) to (B, N, 3+F)."""
        one_hot = F.one_hot(types.long(), len(self.elements)).to(positions.dtype)
        charges = torch.tensor(self.elements, dtype=positions.dtype, device=positions.device)[types]
        features = [one_hot / self.type_scale, charges[..., None] / self.charge_scale]
        encoded = [centred(positions, mask) / self.position_scale, *features]
        return torch.where(mask[..., None], torch.cat(encoded, dim=-1), 0)

    def decode(self, clean: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, 3+F) to positions (B, N, 3) in Å and atomic numbers (B, N), 0 at padding."""
        types = clean[..., 3 : 3 + len(self.elements)].argmax(dim=-1)
        numbers = torch.tensor(self.elements, dtype=torch.uint8, device=clean.device)[types]
        return clean[..., :3] * self.position_scale, torch.where(mask, numbers, 0)

    def type_lookup(self) -> Tensor:
        """Index into `elements` by atomic number, (256,), −1 for a foreign element."""
        lookup = torch.full((256,), -1, dtype=torch.long)
        lookup[list(self.elements)] = torch.arange(len(self.elements))
        return lookup


def vocabulary(atomic_numbers: Sequence[int]) -> tuple[int, ...]:
    """The distinct atomic numbers, ascending."""
    return tuple(sorted(set(atomic_numbers)))
