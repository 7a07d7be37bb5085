"""GDM: a plain message-passing network on coordinates, not equivariant by construction.

The graph network of "GDM" in Hoogeboom et al., ICML 2022, as Kaba et al., NeurIPS 2025, use it:
width 256 and 9 layers make 3.56 M parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.diffusion.geometry import on_subspace, pair_mask
from molgen_energy.models.pair_network import PairNetwork


class MessageLayer(nn.Module):
    """h_i ← h_i + φ_h(h_i, Σ_{j≠i} g_ij m_ij / c), m_ij = φ_m(h_i, h_j, e_ij).

    The gate is g_ij = σ(w·m_ij + o). φ_m and φ_h are two linear layers with SiLU between; φ_m has
    one behind as well.

    Parameters
    ----------
    width
        Of atoms' states.
    features
        Of pairs.
    normalization
        c.
    """

    def __init__(self, width: int, features: int = 0, normalization: float = 1.0) -> None:
        super().__init__()
        self.normalization = normalization
        self.pairs = PairNetwork(width, features)
        self.update_in = nn.Linear(2 * width, width)
        self.update_out = nn.Linear(width, width)

    def forward(
        self, h: Tensor, pairs: Tensor, features: Tensor | None, low_precision: bool
    ) -> Tensor:
        """Atom states (B, N, W) to new ones; see `PairNetwork.gated_sum` for the rest."""
        gathered = self.pairs.gated_sum(h, pairs, features, low_precision) / self.normalization
        update = self.update_in(torch.cat([h, gathered], dim=-1))
        change: Tensor = self.update_out(F.silu(update))
        return h + change


class GDM(nn.Module):
    """Noise of positions and features, predicted from a noisy molecule.

    Parameters
    ----------
    features
        F, channels of an atom besides its position.
    layers, width
        Depth and width of the network.
    normalization
        Sums over neighbours are divided by it.
    low_precision
        Run the work on pairs in bfloat16; parameters, states and the result stay float32.
    """

    equivariant = False
    """Whether a motion of the molecule is one of the result."""

    def __init__(
        self,
        features: int,
        layers: int = 9,
        width: int = 256,
        normalization: float = 1.0,
        low_precision: bool = False,
    ) -> None:
        super().__init__()
        self.low_precision = low_precision
        self.embed = nn.Linear(3 + features + 1, width)
        self.layers = nn.ModuleList(
            MessageLayer(width, normalization=normalization) for _ in range(layers)
        )
        self.readout = nn.Linear(width, 3 + features)

    def forward(self, noisy: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        noisy
            (B, N, 3+F), positions first; what stands at padding has no effect.
        time
            (B,), diffusion time in [0, 1].
        mask
            (B, N), true at real atoms.

        Returns
        -------
        (B, N, 3+F): the noise, that of the positions with zero mean over the atoms, zero at
        padding.
        """
        noisy = torch.where(mask[..., None], noisy, 0)
        times = time[:, None, None].expand(*mask.shape, 1)
        pairs = pair_mask(mask, noisy.dtype)
        h = self.embed(torch.cat([noisy, times], dim=-1))
        for layer in self.layers:
            h = layer(h, pairs, None, self.low_precision)
        return on_subspace(self.readout(h), mask)
