"""A network from elements and positions to numbers that no rigid motion changes.

Messages between all pairs of atoms depend on their distance. Each atom also sums unit vectors to
the others, and takes the scalar products of these sums: they hold the angles between its
neighbours, as in PaiNN (Schütt, Unke, Gastegger, ICML 2021), without vectors that pass from layer
to layer. The scalar products of C vectors of the whole molecule, made of charges and of the atoms'
vectors, hold such numbers as the size of a dipole.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.config import Layers, PositiveFloat, PositiveInt, Section
from molgen_energy.models.base import pair_mask
from molgen_energy.models.gdm_pairs import EPSILON, LAST_CENTRE, DistanceGaussians
from molgen_energy.models.pair_network import PairNetwork

_DISTANCES = 16  # Gaussians of the distance
_DIRECTIONS = 8  # C, vectors of an atom and of a molecule


class InvariantConfig(Section):
    """Invariant network on pairs of atoms, see `InvariantNetwork`."""

    name: str = "invariant"
    layers: Layers = 4
    width: PositiveInt = 96
    normalization: PositiveFloat = 5.0
    """Sums over an atom's neighbours are divided by it, those over all atoms by its square."""
    learning_rate: ClassVar[float] = 2e-3
    """`training.lr: auto`."""

    def build(self, elements: int, outputs: int) -> InvariantNetwork:
        """The network with random weights; parameters are those of `InvariantNetwork`."""
        return InvariantNetwork(elements, outputs, self.layers, self.width, self.normalization)


class _Layer(nn.Module):
    """h_i ← h_i + φ(x_i, Σ_j g_ij m_ij, v_i·v_iᵀ), with x_i = rms(h_i) and v_i = Σ_j s_ij ⊗ u_ij.

    Messages m_ij and gates g_ij are those of `PairNetwork`, the C numbers s_ij are linear in m_ij,
    and u_ij are unit vectors. φ is two linear layers with SiLU in between, the last zero at first.
    """

    def __init__(self, width: int, normalization: float) -> None:
        super().__init__()
        self._factor = 1 / normalization
        self.pairs = PairNetwork(width, _DISTANCES + 2, channels=_DIRECTIONS)
        self.update_in = nn.Linear(2 * width + _DIRECTIONS**2, width)
        self.update_out = nn.Linear(width, width)
        nn.init.zeros_(self.update_out.weight)
        nn.init.zeros_(self.update_out.bias)

    def forward(
        self, h: Tensor, pairs: Tensor, features: Tensor, unit_vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New states (B, N, W), and the vectors v (B, N, C, 3)."""
        x = F.rms_norm(h, h.shape[-1:])
        summed, coefficients = self.pairs.gated_sum_and_channels(x, pairs, features)
        vectors = self._factor * torch.matmul(coefficients.transpose(2, 3), unit_vectors)
        products = torch.matmul(vectors, vectors.transpose(2, 3)).flatten(2)
        update = self.update_in(torch.cat([x, self._factor * summed, products], dim=-1))
        return h + self.update_out(F.silu(update)), vectors


class InvariantNetwork(nn.Module):
    """P numbers of each molecule, invariant under E(3), permutations and the rest of the batch.

    The numbers are a linear function of the composition, plus what the network adds, times a scale:
    see `fit`.

    Parameters
    ----------
    elements
        E, number of elements.
    outputs
        P.
    layers, width
        Depth and width of the network.
    normalization
        Of sums, see `InvariantConfig`.
    """

    Config: ClassVar[type[InvariantConfig]] = InvariantConfig
    composition: Tensor
    scale: Tensor

    def __init__(
        self,
        elements: int,
        outputs: int,
        layers: int = 4,
        width: int = 96,
        normalization: float = 5.0,
    ) -> None:
        super().__init__()
        self._factor = normalization**-2
        self.gaussians = DistanceGaussians(_DISTANCES)
        self.embed = nn.Embedding(elements, width)
        self.layers = nn.ModuleList(_Layer(width, normalization) for _ in range(layers))
        self.read = nn.Linear(width, 2 * width)
        self.charges = nn.Linear(width, 2 * _DIRECTIONS)
        self.hidden = nn.Linear(2 * width + _DIRECTIONS**2 + _DIRECTIONS, 2 * width)
        self.output = nn.Linear(2 * width, outputs)
        self.register_buffer("composition", torch.zeros(elements + 1, outputs))
        self.register_buffer("scale", torch.ones(outputs))

    def fit(self, counts: Tensor, values: Tensor) -> None:
        """Set the linear part by least squares, and the scale to the deviation from it.

        Parameters
        ----------
        counts
            Atoms of each element, (M, E).
        values
            Of the molecules, (M, P) float64, NaN where missing.
        """
        rows = torch.cat([counts.double(), counts.new_ones(len(counts), 1).double()], dim=1)
        for k, column in enumerate(values.T):
            known = column.isfinite()
            # The least norm of all solutions, also where an element always occurs with another.
            found = torch.linalg.lstsq(rows[known], column[known, None], driver="gelsd").solution
            rest = column[known] - (rows[known] @ found)[:, 0]
            self.composition[:, k] = found[:, 0]
            self.scale[k] = rest.std(correction=0).clamp_min(1e-12)

    def forward(self, elements: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """The numbers, (B, P).

        Parameters
        ----------
        elements
            Places of the atoms' elements, (B, N) from 0 to E − 1; anything at padding.
        positions
            (B, N, 3) in Å; anything at padding.
        mask
            (B, N), true at real atoms.
        """
        elements = torch.where(mask, elements, 0)
        positions = torch.where(mask[..., None], positions, 0)
        real = mask[..., None].to(positions.dtype)
        pairs = pair_mask(mask, positions.dtype)
        relative = positions[:, :, None] - positions[:, None]
        distances = (relative.square().sum(dim=-1) + EPSILON).sqrt()[..., None]
        features = torch.cat(
            [self.gaussians(distances), 1 / (1 + distances), distances / LAST_CENTRE], dim=-1
        )
        unit_vectors = relative / distances * pairs[..., None]
        h = self.embed(elements)
        for layer in self.layers:
            h, vectors = layer(h, pairs, features, unit_vectors)
        x = F.rms_norm(h, h.shape[-1:])
        summed, averaged = (F.silu(self.read(x)) * real).sum(dim=1).chunk(2, dim=-1)
        atoms = real.sum(dim=1)
        products, lengths = self._of_molecule(x, positions, vectors, real, atoms)
        numbers = [self._factor * summed, averaged / atoms, products, lengths]
        added = self.output(F.silu(self.hidden(torch.cat(numbers, dim=-1))))
        counts = F.one_hot(elements, len(self.composition) - 1).to(positions.dtype) * real
        rows = torch.cat([counts.sum(dim=1), torch.ones_like(atoms)], dim=1)
        predicted: Tensor = rows @ self.composition + self.scale * added
        return predicted

    def _of_molecule(
        self, x: Tensor, positions: Tensor, vectors: Tensor, real: Tensor, atoms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scalar products (B, C²) and lengths (B, C) of vectors of the molecule.

        They are Σ_i q_i r_i + Σ_i w_i v_i with charges q whose sum is zero, so that no translation
        changes them.
        """
        charges, weights = (self.charges(x) * real).chunk(2, dim=-1)
        charges = (charges - charges.sum(dim=1, keepdim=True) / atoms[:, None]) * real
        moments = torch.matmul(charges.transpose(1, 2), positions)
        moments = moments + (weights[..., None] * vectors).sum(dim=1)
        products = torch.matmul(moments, moments.transpose(1, 2))
        lengths = (products.diagonal(dim1=1, dim2=2) + EPSILON).sqrt()
        return products.flatten(1), lengths
