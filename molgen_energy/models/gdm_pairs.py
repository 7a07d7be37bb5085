"""GDM that is told distances and directions of pairs, for short training.

GDM finds out from coordinates how far apart atoms are; a small one takes most of its training to
learn it. Here every layer is given the distances of the noisy positions, and gathers directions to
other atoms, so that it can say where an atom is to move. It is still no equivariant network: the
coordinates themselves go in as well, and the states of atoms depend on them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.diffusion.geometry import on_subspace, pair_mask
from molgen_energy.models.pair_network import PairNetwork

_LEAST = 1e-8  # Å², so that the root has a gradient where atoms coincide
_NEAREST, _FURTHEST = 0.5, 5.0  # Å, the first and the last of the distances that Gaussians are at
_FREQUENCIES = 16  # k/4, less than one period apart over all times
_GATHERED = 0.25  # what sums over neighbours are multiplied by
_LATEST = 7.0  # log of t/(1 − t), at most


class TimeEmbedding(nn.Module):
    """Times (B,) to features (B, W): sin and cos of k/4·log(t/(1−t)), a linear layer, SiLU.

    The logarithm goes with that of the ratio of noise and signal, at which a network has different
    things to do at t = 0.01 and 0.02.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.arange(1, _FREQUENCIES + 1) / 4
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear = nn.Linear(2 * _FREQUENCIES + 1, width)

    def forward(self, time: Tensor) -> Tensor:
        log_ratio = torch.logit(time.double(), eps=1e-6).to(time.dtype)
        angles = log_ratio.clamp(-_LATEST, _LATEST)[:, None] * self.frequencies
        features = torch.cat([angles.sin(), angles.cos(), time[:, None]], dim=-1)
        return F.silu(self.linear(features))


class AdaRMSNorm(nn.Module):
    """x/rms(x), times 1 + a and plus b, where a and b are linear in features of the time."""

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
    """h_i ← h_i + φ_h(x_i, Σ_j g_ij m_ij, Σ_j s_ij ⊗ u_ij), with x_i = TimedNorm(h_i).

    m_ij and g_ij are as in `MessageLayer`, of x and the features of pairs; s_ij are C numbers,
    linear in m_ij, and u_ij = (p_i − p_j)/(1 + d_ij) of the positions p. Both sums are multiplied
    by 1/(4c). φ_h starts at zero.
    """

    def __init__(self, width: int, features: int, directions: int, normalization: float) -> None:
        super().__init__()
        self.factor = _GATHERED / normalization
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
        towards: Tensor,
        low_precision: bool,
    ) -> Tensor:
        """States (B, N, W) to new ones.

        `time` are features of it (B, W), `pairs` and `features` as of `PairNetwork.gated_sum`, and
        `towards` u (B, N, N, 3), zero where there is no pair.
        """
        x = self.norm(h, time)
        gathered, numbers = self.pairs.gated_sum_and_channels(x, pairs, features, low_precision)
        vectors = torch.matmul(numbers.transpose(2, 3), towards).flatten(2)
        update = self.update_in(torch.cat([x, self.factor * gathered, self.factor * vectors], -1))
        change: Tensor = self.update_out(F.silu(update))
        return h + change


class GDMPairs(nn.Module):
    """Noise (or what else is to be predicted) of positions and features, from a noisy molecule.

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
    distances
        Gaussians of the distance that a layer is told, besides 1/(1 + d) and d.
    directions
        C, of directions that an atom gathers in a layer.
    """

    equivariant = False
    centres: Tensor

    def __init__(
        self,
        features: int,
        layers: int = 9,
        width: int = 256,
        normalization: float = 1.0,
        low_precision: bool = False,
        distances: int = 10,
        directions: int = 8,
    ) -> None:
        super().__init__()
        self.low_precision = low_precision
        centres = torch.linspace(_NEAREST, _FURTHEST, distances)
        self.register_buffer("centres", centres, persistent=False)
        self.spread = (_FURTHEST - _NEAREST) / max(1, distances - 1)
        self.time = TimeEmbedding(width)
        self.embed = nn.Linear(3 + features, width)
        self.embed_time = nn.Linear(width, width)
        self.layers = nn.ModuleList(
            PairLayer(width, distances + 2, directions, normalization) for _ in range(layers)
        )
        self.norm = AdaRMSNorm(width)
        self.readout = nn.Linear(width, 3 + features)
        # Small, so that training starts from a prediction of almost nothing.
        nn.init.normal_(self.readout.weight, std=1e-3)
        nn.init.zeros_(self.readout.bias)

    def forward(self, noisy: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """Predict the noise; parameters and result as of `GDM.forward`."""
        noisy = torch.where(mask[..., None], noisy, 0)
        pairs = pair_mask(mask, noisy.dtype)
        apart = noisy[:, :, None, :3] - noisy[:, None, :, :3]
        distances = (apart.square().sum(dim=-1) + _LEAST).sqrt()
        features = self._radial(distances)
        towards = apart * (pairs / (1 + distances))[..., None]
        timed = self.time(time)
        h = self.embed(noisy) + self.embed_time(timed)[:, None]
        for layer in self.layers:
            h = layer(h, timed, pairs, features, towards, self.low_precision)
        return on_subspace(self.readout(self.norm(h, timed)), mask)

    def _radial(self, distances: Tensor) -> Tensor:
        """What a layer is told of distances (B, N, N): (B, N, N, K)."""
        d = distances[..., None]
        gaussians = torch.exp(-0.5 * ((d - self.centres) / self.spread).square())
        return torch.cat([gaussians, 1 / (1 + d), d / _FURTHEST], dim=-1)
