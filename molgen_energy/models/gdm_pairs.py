"""GDM with pair distances and directions as features, for short training.

GDM has to learn the distances between atoms from their coordinates, which takes a small network
most of its training. Here every layer takes the distances of the noisy positions as features of
pairs, and sums directions to other atoms. The network is not equivariant: coordinates are inputs as
well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.diffusion.state import Layout, State
from molgen_energy.models.base import (
    AtomNetworkConfig,
    ChannelAxis,
    Denoiser,
    add_condition,
    atom_network_channels,
    embed_condition,
    pair_mask,
)
from molgen_energy.models.gdm import PUBLISHED_GDM
from molgen_energy.models.pair_network import PairNetwork

EPSILON = 1e-8  # Å², so that the root has a gradient at coincident atoms
_FIRST_CENTRE, LAST_CENTRE = 0.5, 5.0  # Å, of the Gaussians of the distance
_FREQUENCIES = 16  # k/4, less than one period apart over all times
_SUM_SCALE = 0.25  # factor of sums over neighbours
_LARGEST_LOGIT = 7.0  # of the time, in absolute value


class DistanceGaussians(nn.Module):
    """exp(−((d − c_k)/s)²/2) of distances d in Å, for K centres c_k from 0.5 to 5 Å, s apart."""

    centres: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        # On the CPU, also while memory is estimated on `meta`, where arithmetic is slow to import.
        centres = torch.linspace(_FIRST_CENTRE, LAST_CENTRE, count, device="cpu")
        self.register_buffer("centres", centres, persistent=False)
        self.spread = (LAST_CENTRE - _FIRST_CENTRE) / max(1, count - 1)

    def forward(self, distances: Tensor, dim: int = -1) -> Tensor:
        """Gaussians of distances (…, 1, …), whose one value in dimension `dim` becomes K."""
        shape = [1] * distances.ndim
        shape[dim] = -1
        scaled = (distances - self.centres.view(shape)) / self.spread
        return torch.exp(-0.5 * scaled.square())


class TimeEmbedding(nn.Module):
    """Times (B,) to features (B, W): sin and cos of k/4·log(t/(1−t)), a linear layer, SiLU.

    The logit follows the logarithm of the noise-to-signal ratio, which resolves small times.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # On the CPU, also while memory is estimated on `meta`, where arithmetic is slow to import.
        frequencies = torch.arange(1, _FREQUENCIES + 1, device="cpu") / 4
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear = nn.Linear(2 * _FREQUENCIES + 1, width)

    def forward(self, time: Tensor) -> Tensor:
        log_ratio = torch.logit(time.double(), eps=1e-6).to(time.dtype)
        angles = log_ratio.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos(), time[:, None]], dim=-1)
        return F.silu(self.linear(features))


class AdaRMSNorm(nn.Module):
    """(1 + a)·x/rms(x) + b, with a and b linear in features of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timed = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.timed.weight)
        nn.init.zeros_(self.timed.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """States (B, N, W) and features of the time (B, W)."""
        scale, shift = self.timed(time)[:, None].chunk(2, dim=-1)
        normed: Tensor = F.rms_norm(h, h.shape[-1:]) * (1 + scale) + shift
        return normed


class PairLayer(nn.Module):
    """h_i ← h_i + φ_h(x_i, Σ_j g_ij m_ij, Σ_j s_ij ⊗ u_ij), with x_i = AdaRMSNorm(h_i).

    m_ij and g_ij are as in `MessageLayer`, of x and the features of pairs; s_ij are C numbers,
    linear in m_ij, and u_ij = (p_i − p_j)/(1 + d_ij) of the positions p. Both sums are multiplied
    by 1/(4c). φ_h starts at zero.
    """

    def __init__(self, width: int, features: int, directions: int, normalization: float) -> None:
        super().__init__()
        self.factor = _SUM_SCALE / normalization
        self.norm = AdaRMSNorm(width)
        self.pairs = PairNetwork(width, features, channels=directions)
        self.update_in = nn.Linear(2 * width + 3 * directions, width)
        self.update_out = nn.Linear(width, width)
        nn.init.zeros_(self.update_out.weight)
        nn.init.zeros_(self.update_out.bias)

    def forward(
        self,
        h: Tensor,
        time: Tensor,
        pairs: Tensor,
        features: Tensor,
        unit_vectors: Tensor,
        low_precision: bool,
    ) -> Tensor:
        """New states (B, N, W).

        `time` is the embedded time (B, W), `pairs` and `features` are those of
        `PairNetwork.gated_sum`, and `unit_vectors` is u (B, N, N, 3), zero where there is no pair.
        """
        x = self.norm(h, time)
        summed, coefficients = self.pairs.gated_sum_and_channels(x, pairs, features, low_precision)
        vectors = torch.matmul(coefficients.transpose(2, 3), unit_vectors).flatten(2)
        update = self.update_in(torch.cat([x, self.factor * summed, self.factor * vectors], -1))
        change: Tensor = self.update_out(F.silu(update))
        return h + change


class GDMPairsConfig(AtomNetworkConfig):
    """GDM with distances and directions of pairs."""

    name: str = "gdm_pairs"
    conditional = True
    published = PUBLISHED_GDM  # values of GDM; not measured for this network

    def build(self, layout: Layout, condition_channels: int, low_precision: bool) -> GDMPairs:
        return GDMPairs(
            layout, self.layers, self.width, self.normalization, low_precision, condition_channels
        )


class GDMPairs(Denoiser):
    """GDM with pair distances and directions as features, for all fields of atoms.

    Parameters
    ----------
    layout
        Fields, all of atoms, positions first.
    layers, width
        Depth and width of the network.
    normalization
        Sums over neighbours are divided by it.
    low_precision
        Run the work on pairs in bfloat16; parameters, states and the result stay float32.
    condition_channels
        K, channels of a condition.
    distances
        Number of Gaussians of the distance among the features of a pair, besides 1/(1 + d) and d.
    directions
        C, number of direction vectors that a layer sums for each atom.
    """

    Config = GDMPairsConfig

    def __init__(
        self,
        layout: Layout,
        layers: int = 9,
        width: int = 256,
        normalization: float = 1.0,
        low_precision: bool = False,
        condition_channels: int = 0,
        distances: int = 10,
        directions: int = 8,
    ) -> None:
        super().__init__(layout)
        channels = layout.channels["atom"]
        self.low_precision = low_precision
        self.gaussians = DistanceGaussians(distances)
        self.time = TimeEmbedding(width)
        self.embed = nn.Linear(channels, width)
        self.embed_time = nn.Linear(width, width)
        self.embed_condition = embed_condition(condition_channels, width)
        self.layers = nn.ModuleList(
            PairLayer(width, distances + 2, directions, normalization) for _ in range(layers)
        )
        self.norm = AdaRMSNorm(width)
        self.readout = nn.Linear(width, channels)
        # Small, so that the first predictions are close to zero.
        nn.init.normal_(self.readout.weight, std=1e-3)
        nn.init.zeros_(self.readout.bias)

    @classmethod
    def channel_axes(
        cls, layout: Layout, condition: Sequence[str] = ()
    ) -> Mapping[str, ChannelAxis]:
        atoms = layout.channel_names("atom")
        return atom_network_channels(atoms, atoms, condition)

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        noisy = torch.where(mask[..., None], state.atoms, 0)
        pairs = pair_mask(mask, noisy.dtype)
        relative_positions = noisy[:, :, None, :3] - noisy[:, None, :, :3]
        distances = (relative_positions.square().sum(dim=-1) + EPSILON).sqrt()
        features = self._radial_basis(distances)
        directions = relative_positions * (pairs / (1 + distances))[..., None]
        embedded_time = self.time(time)
        h = self.embed(noisy) + self.embed_time(embedded_time)[:, None]
        h = add_condition(h, self.embed_condition, condition)
        for layer in self.layers:
            h = layer(h, embedded_time, pairs, features, directions, self.low_precision)
        return state.with_atoms(self.readout(self.norm(h, embedded_time))).projected()

    def _radial_basis(self, distances: Tensor) -> Tensor:
        """Features (B, N, N, K) of distances (B, N, N)."""
        d = distances[..., None]
        return torch.cat([self.gaussians(d), 1 / (1 + d), d / LAST_CENTRE], dim=-1)
