"""EDM: a message-passing network on distances that moves atoms along their differences.

The E(3)-equivariant network of EDM (Hoogeboom et al., ICML 2022), after EGNN (Satorras et al., ICML
2021): width 256 and 9 layers make 5.34 M parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from molgen_energy.diffusion.state import Layout, State
from molgen_energy.models.base import (
    AtomNetworkConfig,
    ChannelAxis,
    Denoiser,
    Published,
    add_condition,
    atom_network_channels,
    embed_condition,
    pair_mask,
)
from molgen_energy.models.gdm import MessageLayer
from molgen_energy.models.pair_network import PairNetwork

_EPSILON = 1e-8  # Å², so that the root has a gradient at coincident atoms


class EquivariantLayer(nn.Module):
    """A message layer, then x_i ← x_i + Σ_{j≠i} (x_i − x_j)/(d_ij + 1)·R·tanh φ_x,ij / c.

    φ_x,ij = φ_x(h_i, h_j, e_ij), and e_ij are the squared distances ‖x_i − x_j‖² at this layer
    and at the input. φ_x is three linear layers with SiLU between; the last starts near zero
    and has no bias.
    """

    def __init__(self, width: int, coordinate_range: float, normalization: float) -> None:
        super().__init__()
        self.coordinate_range = coordinate_range
        self.normalization = normalization
        self.message = MessageLayer(width, features=2, normalization=normalization)
        self.shift = PairNetwork(width, features=2, offset=False)
        nn.init.xavier_uniform_(self.shift.read.weight, gain=0.001)

    def forward(
        self, h: Tensor, x: Tensor, input_squares: Tensor, pairs: Tensor, low_precision: bool
    ) -> tuple[Tensor, Tensor]:
        """New states (B, N, W) and positions (B, N, 3).

        `input_squares` (B, N, N) are the squared distances at the network's input.
        """
        relative_positions = x[:, :, None] - x[:, None, :]
        squares = relative_positions.square().sum(dim=-1)
        features = torch.stack([squares, input_squares], dim=-1)
        h = self.message(h, pairs, features, low_precision)
        factor = (
            self.coordinate_range
            * torch.tanh(self.shift.values(h, features, low_precision))
            * pairs
        )
        factor = factor / ((squares + _EPSILON).sqrt() + 1)
        shift_sum = (factor[..., None] * relative_positions).sum(dim=2) / self.normalization
        return h, x + shift_sum


# Kaba et al., NeurIPS 2025, for 9 layers of width 256 and batches of 400; see `PUBLISHED_GDM` for
# the weights. Inverse-square springs have w = 0.1 there.
PUBLISHED_EDM = {
    ("energy", "exponential"): Published(1e-4, 0.26),
    ("energy", "inverse"): Published(1e-4, 0.15),
    ("energy", "inverse_square"): Published(1e-4, 0.45),
    ("energy", "constant"): Published(1e-4, 0.08),
    ("energy", "lennard_jones"): Published(1.6e-4, 0.15),
    ("mse", None): Published(3e-4, 1.0),
    ("mae", None): Published(3e-4, 1.0),
    ("kabsch", None): Published(3e-4, 0.8),
}


class EDMConfig(AtomNetworkConfig):
    """EDM's equivariant network (Hoogeboom et al., ICML 2022), 9×256 in the paper."""

    name: str = "edm"
    conditional = True
    published = PUBLISHED_EDM

    def build(self, layout: Layout, condition_channels: int, low_precision: bool) -> EDM:
        return EDM(
            layout, self.layers, self.width, self.normalization, low_precision, condition_channels
        )


class EDM(Denoiser):
    """EDM's network for all fields of atoms, E(3)-equivariant.

    Rotating, reflecting or translating the positions rotates or reflects the prediction of the
    positions and leaves that of the other fields unchanged.

    Parameters
    ----------
    layout
        Fields, all of atoms, positions first.
    layers, width
        Depth and width of the network.
    normalization
        Sums over neighbours are divided by it.
    low_precision
        Run the work on pairs in bfloat16; parameters, states, positions and the result stay
        float32.
    condition_channels
        K, channels of a condition.
    coordinate_range
        R. EDM's code divides it by the number of layers, but does not use the quotient.
    """

    Config = EDMConfig
    equivariant = True

    def __init__(
        self,
        layout: Layout,
        layers: int = 9,
        width: int = 256,
        normalization: float = 1.0,
        low_precision: bool = False,
        condition_channels: int = 0,
        coordinate_range: float = 15.0,
    ) -> None:
        super().__init__(layout)
        features = layout.channels["atom"] - 3
        self.low_precision = low_precision
        self.embed = nn.Linear(features + 1, width)
        self.embed_condition = embed_condition(condition_channels, width)
        self.layers = nn.ModuleList(
            EquivariantLayer(width, coordinate_range, normalization) for _ in range(layers)
        )
        self.readout = nn.Linear(width, features)

    @classmethod
    def channel_axes(
        cls, layout: Layout, condition: Sequence[str] = ()
    ) -> Mapping[str, ChannelAxis]:
        features = layout.channel_names("atom")[3:]
        return atom_network_channels((*features, "time"), features, condition)

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        noisy = torch.where(mask[..., None], state.atoms, 0)
        start, features = noisy[..., :3], noisy[..., 3:]
        times = time[:, None, None].expand(*mask.shape, 1)
        pairs = pair_mask(mask, noisy.dtype)
        h = self.embed(torch.cat([features, times], dim=-1))
        h = add_condition(h, self.embed_condition, condition)
        squares = (start[:, :, None] - start[:, None, :]).square().sum(dim=-1)
        x = start
        for layer in self.layers:
            h, x = layer(h, x, squares, pairs, self.low_precision)
        return state.with_atoms(torch.cat([x - start, self.readout(h)], dim=-1)).projected()
