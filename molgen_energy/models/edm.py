"""EDM: a message-passing network on distances that moves atoms along their differences.

The E(3)-equivariant network of EDM (Hoogeboom et al., ICML 2022), after EGNN (Satorras et al., ICML
2021): width 256 and 9 layers make 5.34 M parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.geometry import centred, pair_mask
from molgen_energy.models.gdm import MessageLayer
from molgen_energy.models.pair_network import PairNetwork

_LEAST = 1e-8  # Å², so that the root has a gradient where atoms coincide


class EquivariantLayer(nn.Module):
    """A message layer, then x_i ← x_i + Σ_{j≠i} (x_i − x_j)/(d_ij + 1)·R·tanh φ_x,ij / c.

    φ_x,ij = φ_x(h_i, h_j, e_ij), and e_ij are d_ij² = ‖x_i − x_j‖² as they are at this layer and as
    they were at the input. φ_x is three linear layers with SiLU between; the last starts near zero
    and has no bias.
    """

    def __init__(self, width: int, reach: float, normalization: float) -> None:
        super().__init__()
        self.reach = reach
        self.normalization = normalization
        self.message = MessageLayer(width, features=2, normalization=normalization)
        self.shift = PairNetwork(width, features=2, offset=False)
        nn.init.xavier_uniform_(self.shift.read.weight, gain=0.001)

    def forward(
        self, h: Tensor, x: Tensor, squares_in: Tensor, pairs: Tensor, low_precision: bool
    ) -> tuple[Tensor, Tensor]:
        """States (B, N, W) and positions (B, N, 3) to new ones, both.

        `squares_in` (B, N, N) are the squared distances at the network's input.
        """
        apart = x[:, :, None] - x[:, None, :]
        squares = apart.square().sum(dim=-1)
        features = torch.stack([squares, squares_in], dim=-1)
        h = self.message(h, pairs, features, low_precision)
        factor = self.reach * torch.tanh(self.shift.values(h, features, low_precision)) * pairs
        factor = factor / ((squares + _LEAST).sqrt() + 1)
        moved = (factor[..., None] * apart).sum(dim=2) / self.normalization
        return h, x + moved


class EDM(nn.Module):
    """Noise of positions and features, predicted from a noisy molecule.

    Rotating, reflecting or translating the positions rotates or reflects the predicted noise of
    the positions and leaves that of the features as it is.

    Parameters
    ----------
    features
        F, channels of an atom besides its position.
    layers, width
        Depth and width of the network.
    normalization
        Sums over neighbours are divided by it.
    low_precision
        Run the work on pairs in bfloat16; parameters, states, positions and the result stay
        float32.
    reach
        R. EDM's code divides it by the number of layers, then does not use the quotient.
    """

    equivariant = True

    def __init__(
        self,
        features: int,
        layers: int = 9,
        width: int = 256,
        normalization: float = 1.0,
        low_precision: bool = False,
        reach: float = 15.0,
    ) -> None:
        super().__init__()
        self.low_precision = low_precision
        self.embed = nn.Linear(features + 1, width)
        self.layers = nn.ModuleList(
            EquivariantLayer(width, reach, normalization) for _ in range(layers)
        )
        self.readout = nn.Linear(width, features)

    def forward(self, noisy: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """Predict the noise; parameters and result as of `GDM.forward`."""
        atoms = mask[..., None]
        noisy = torch.where(atoms, noisy, 0)
        start, features = noisy[..., :3], noisy[..., 3:]
        times = time[:, None, None].expand(*mask.shape, 1)
        pairs = pair_mask(mask, noisy.dtype)
        h = self.embed(torch.cat([features, times], dim=-1))
        squares = (start[:, :, None] - start[:, None, :]).square().sum(dim=-1)
        x = start
        for layer in self.layers:
            h, x = layer(h, x, squares, pairs, self.low_precision)
        return torch.cat([centred(x - start, mask), torch.where(atoms, self.readout(h), 0)], dim=-1)
