"""A plain transformer on atoms, without states of pairs.

Tokens are the atoms and one register of the noise level; attention weights depend on the distances
of the noisy positions through a bias, and each head reads the mean position of the atoms that it
attends to beside its values. TABASCO (Vonessen et al., 2025, arXiv:2507.00899), ADiT (Joshi et al.,
ICML 2025, arXiv:2503.03965) and UAE-3D (Luo et al., 2025, arXiv:2503.15567) use such networks, with
the adaptive normalisation of DiT (Peebles, Xie, ICCV 2023). All products are over atoms, so that a
molecule of n atoms costs about 12·n·W² multiplications a layer, where `gdm_pairs` takes n²·W².
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field as Option
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.config import Layers, PositiveInt
from molgen_energy.diffusion.state import Layout, State
from molgen_energy.models.base import (
    ChannelAxis,
    Denoiser,
    DenoiserConfig,
    add_condition,
    atom_network_channels,
    embed_condition,
)
from molgen_energy.models.gdm import PUBLISHED_GDM
from molgen_energy.models.gdm_pairs import (
    EPSILON,
    LAST_CENTRE,
    AdaRMSNorm,
    DistanceGaussians,
    TimeEmbedding,
)

_READ = 4  # channels of values that hold a position, and 1 for atoms
_FEEDFORWARD = 4  # width of the hidden layer over that of states


def _normed(values: Tensor, norm: nn.RMSNorm) -> Tensor:
    """The norm in the precision of the values, which autocast leaves to the caller."""
    return F.rms_norm(values, norm.normalized_shape, norm.weight.to(values.dtype))


class TransformerLayer(nn.Module):
    """h ← h + O·[a(x), r, c], then h ← h + φ(x), each with its own x = AdaRMSNorm(h).

    a is attention of several heads, with normalised queries and keys (Henry et al., EMNLP 2020).
    With the attention w_ij of a head, c_i = Σ_j w_ij is over atoms without the register, so that a
    head can count, and r_i = Σ_j w_ij (p_j − p_i). φ is two linear layers with SiLU in between.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.attention_norm, self.update_norm = AdaRMSNorm(width), AdaRMSNorm(width)
        self.query, self.key = nn.Linear(width, inner), nn.Linear(width, inner)
        self.value = nn.Linear(width, inner - heads * _READ)
        self.query_norm, self.key_norm = nn.RMSNorm(head_width), nn.RMSNorm(head_width)
        self.output = nn.Linear(inner, width)
        self.update_in = nn.Linear(width, _FEEDFORWARD * width)
        self.update_out = nn.Linear(_FEEDFORWARD * width, width)
        for layer in (self.output, self.update_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, time: Tensor, bias: Tensor, places: Tensor) -> Tensor:
        """New states (B, T, W) of T tokens.

        Parameters
        ----------
        h
            States, (B, T, W).
        time
            Embedded noise level, (B, W).
        bias
            (B, H, T, T), added to the logits of attention; −∞ at padding.
        places
            (B, T, 4): position and 1 of atoms, zero for the register and padding.
        """
        x = self.attention_norm(h, time)
        query = _normed(self._split(self.query(x)), self.query_norm)
        key = _normed(self._split(self.key(x)), self.key_norm)
        value = self._split(self.value(x))
        own = places[:, None].expand(-1, self.heads, -1, -1)
        value = torch.cat([own.to(value.dtype), value], dim=-1)
        read = F.scaled_dot_product_attention(query, key, value, bias)
        moved = read[..., :3] - read[..., 3:_READ] * own[..., :3]
        read = torch.cat([moved, read[..., 3:]], dim=-1).transpose(1, 2).flatten(2)
        h = h + self.output(read)
        update: Tensor = self.update_out(F.silu(self.update_in(self.update_norm(h, time))))
        return h + update

    def _split(self, values: Tensor) -> Tensor:
        """(B, H, T, C) from (B, T, H·C)."""
        return values.view(*values.shape[:2], self.heads, -1).transpose(1, 2)


class TransformerConfig(DenoiserConfig):
    """A plain transformer on atoms."""

    name: str = "transformer"
    layers: Layers = 12
    width: PositiveInt = 256
    head_width: Annotated[PositiveInt, Option(ge=8)] = 16
    """Channels of a head of attention; there are width/head_width heads."""
    conditional = True
    published = PUBLISHED_GDM  # values of GDM; not measured for this network

    def build(self, layout: Layout, condition_channels: int, low_precision: bool) -> Transformer:
        return Transformer(
            layout, self.layers, self.width, self.head_width, low_precision, condition_channels
        )


class Transformer(Denoiser):
    """A plain transformer for all fields of atoms, not equivariant.

    Parameters
    ----------
    layout
        Fields, all of atoms, positions first.
    layers, width
        Depth and width of the network.
    head_width
        Channels of each of the H = W/head_width heads of attention.
    low_precision
        Run the layers in bfloat16; parameters, states and the result stay float32.
    condition_channels
        K, channels of a condition.
    distances
        Number of Gaussians of the distance that the bias of attention is linear in, besides
        1/(1 + d), d and a number for the register.
    """

    Config = TransformerConfig

    def __init__(
        self,
        layout: Layout,
        layers: int = 12,
        width: int = 256,
        head_width: int = 16,
        low_precision: bool = False,
        condition_channels: int = 0,
        distances: int = 16,
    ) -> None:
        super().__init__(layout)
        channels = layout.channels["atom"]
        self.low_precision = low_precision
        self.heads = heads = max(1, width // head_width)
        self.gaussians = DistanceGaussians(distances)
        self.time = TimeEmbedding(width)
        self.embed = nn.Linear(channels, width)
        self.embed_time = nn.Linear(width, width)
        self.embed_condition = embed_condition(condition_channels, width)
        self.register = nn.Parameter(torch.randn(width))
        self.bias = nn.Linear(distances + 3, layers * heads, bias=False)
        self._init_bias(layers)
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, head_width) for _ in range(layers)
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
        places = torch.cat([noisy[..., :3], mask[..., None].to(noisy.dtype)], dim=-1)
        places = F.pad(places, (0, 0, 1, 0))  # the register is the first token
        biases = self._biases(places)
        embedded_time = self.time(time)
        register = self.register.expand(len(mask), 1, -1)
        h = (
            torch.cat([register, self.embed(noisy)], dim=1)
            + self.embed_time(embedded_time)[:, None]
        )
        h = add_condition(h, self.embed_condition, condition)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.low_precision):
            for layer, bias in zip(self.layers, biases, strict=True):
                h = layer(h, embedded_time, bias, places)
        h = self.norm(h[:, 1:], embedded_time)
        return state.with_atoms(self.readout(h)).projected()

    @torch.no_grad()
    def _init_bias(self, layers: int) -> None:
        """Add −s·d to the first biases, s from 2 to 1/8 Å⁻¹ over the heads (ALiBi).

        Press, Smith, Lewis, ICLR 2022.
        """
        slopes = torch.logspace(1, -3, self.heads, base=2.0, device=self.bias.weight.device)
        self.bias.weight[:, -2] -= LAST_CENTRE * slopes.repeat(layers)

    def _biases(self, places: Tensor) -> Sequence[Tensor]:
        """For each layer the bias of attention (B, H, T, T), −∞ for keys that are padding."""
        positions, atoms = places[..., :3], places[..., 3]
        squares = (positions[:, :, None] - positions[:, None]).square().sum(dim=-1)
        d = (squares + EPSILON).sqrt()[:, None]
        between = (atoms[:, :, None] * atoms[:, None])[:, None]
        further = torch.cat([self.gaussians(d, 1), 1 / (1 + d), d / LAST_CENTRE], dim=1) * between
        features = torch.cat([further, 1 - between], dim=1)  # (B, K, T, T)
        bias = torch.matmul(self.bias.weight, features.flatten(2))
        bias = bias.view(len(places), len(self.layers), self.heads, *features.shape[2:])
        padding = atoms == 0
        padding[:, 0] = False
        return bias.masked_fill(padding[:, None, None, None], -torch.inf).unbind(dim=1)
