"""Losses between predicted spins and a ground state, in Ising models with given couplings.

A network gives a logit z_i for each site, and with it independent spins ŷ_i = ±1 of mean
m_i = tanh z_i. The energy of a configuration is E(y) = −½ Σ_ij J_ij y_i y_j. Kaba et al., "Energy
Loss Functions for Physical Systems", NeurIPS 2025, section 5.

Losses are called as any other, `prediction` being the logits and `target` the spins ±1; the D
channels of a site are separate configurations under the same couplings. `neighbours` holds the
couplings: `index` the sites that a site is coupled to, `weight` the J_ij, each coupling in the rows
of both its sites (`lattice_couplings` makes the table of a square lattice). Sums run over sites.

A configuration and its flip have the same energy. Where the data does not settle the sign of one
site, `either_gauge` makes a loss take the smaller of the values for y and −y.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from molgen_energy.losses.base import Loss, Neighbours, Samples


class SpinLoss(Loss):
    """A loss of logits z, given spins or couplings; logits without a channel are refused."""

    needs_batch = True


class _LabelledLoss(SpinLoss):
    """A loss that is a sum over sites of something at the logits z, given spins y.

    Parameters
    ----------
    either_gauge
        Take the smaller of the losses for y and −y.
    """

    def __init__(self, either_gauge: bool = False) -> None:
        self.either_gauge = either_gauge

    def of(self, samples: Samples) -> Tensor:
        """Loss of each sample, (B,)."""
        loss = self._with(samples, samples.target)
        if self.either_gauge:
            flipped = self._with(samples, -samples.target)
            # Where both are alike, as at z = 0, half of each gradient would be none at all.
            loss = torch.where(loss <= flipped, loss, flipped)
        return loss.sum(dim=1)

    def _with(self, samples: Samples, spins: Tensor) -> Tensor:
        return _over_sites(self.at_sites(samples, spins), samples)

    @abstractmethod
    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """Its terms, (B, N, D)."""


class CrossEntropy(_LabelledLoss):
    """−log q(y) = Σ_i log(1 + exp(−2 y_i z_i)): the data's negative log-likelihood."""

    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """Its terms, (B, N, D)."""
        return F.softplus(-2 * spins * samples.prediction)


class Margin(_LabelledLoss):
    """Σ_i max(0, μ − y_i z_i): the hinge loss of the logits.

    Parameters
    ----------
    margin
        μ; a site with y_i z_i above it costs nothing.
    either_gauge
        Take the smaller of the losses for y and −y.
    """

    def __init__(self, margin: float = 1.0, either_gauge: bool = False) -> None:
        super().__init__(either_gauge)
        self.margin = margin

    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """Its terms, (B, N, D)."""
        return F.relu(self.margin - spins * samples.prediction)


class LocalField(_LabelledLoss):
    """(1/T)·(E_q[E(ŷ, y)] − T·S[q]) with E(ŷ, y) = −Σ_i h_i ŷ_i, h_i = Σ_j J_ij y_j + h⁰ y_i.

    Each spin in the field of the data around it: y_i·(h_i − h⁰ y_i) is half the energy that its
    flip costs. Convex in m, with its minimum at m_i = tanh(h_i/T), which has the signs of the data
    where every y_i h_i > 0: for h⁰ > 0 at a ground state, and for any y where h⁰ exceeds the sum of
    |J_ij| at each site, 4 on a square lattice with |J| ≤ 1.

    Parameters
    ----------
    offset
        h⁰.
    temperature
        T.
    either_gauge
        Take the smaller of the losses for y and −y.
    """

    def __init__(
        self, offset: float = 1.0, temperature: float = 0.1, either_gauge: bool = False
    ) -> None:
        super().__init__(either_gauge)
        self.offset = offset
        self.temperature = temperature

    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """Its terms, (B, N, D)."""
        field = coupled_sum(spins, samples) + self.offset * spins
        logits = samples.prediction
        return -field * mean_spins(logits) / self.temperature - entropy(logits)


class TrueEnergy(SpinLoss):
    """(1/T)·(E(m) − T·S[q]) with E(m) = −½ Σ_ij J_ij m_i m_j: the variational free energy.

    It asks for no labels: the target is not looked at. The mean of the energy over independent
    spins is the energy of their means, as no site is coupled to itself.

    Parameters
    ----------
    temperature
        T.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        self.temperature = temperature

    def of(self, samples: Samples) -> Tensor:
        """Loss of each sample, (B,)."""
        logits = samples.prediction
        means = mean_spins(logits)
        energy = -0.5 * means * coupled_sum(means, samples)
        return _over_sites(energy / self.temperature - entropy(logits), samples).sum(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of a spin of mean tanh z, in nats, of the shape of the logits z."""
    # −p log p − q log q with log p = −softplus(−2z), log q = −softplus(2z)
    up, down = torch.sigmoid(2 * logits), torch.sigmoid(-2 * logits)
    return up * F.softplus(-2 * logits) + down * F.softplus(2 * logits)


def mean_spins(logits: Tensor) -> Tensor:
    """tanh z, whose gradient does not vanish by rounding where the network is sure."""
    up, down = torch.sigmoid(2 * logits), torch.sigmoid(-2 * logits)
    return torch.where(logits > 0, 1 - 2 * down, 2 * up - 1)


def coupled_sum(values: Tensor, samples: Samples) -> Tensor:
    """Σ_j J_ij v_j of values (B, N, D) at the sites of samples.

    Raises
    ------
    ValueError
        The samples come without couplings.
    """
    table = samples.neighbours
    if table is None or table.weight is None:
        raise ValueError("a loss of coupled spins: give neighbours with their couplings as weights")
    batch, sites, dimension = values.shape
    width = table.index.shape[-1]
    own = torch.arange(sites, device=values.device)[None, :, None]
    coupling = torch.where(table.index == own, 0, table.weight.to(values.dtype))
    at = table.index.reshape(batch, sites * width, 1).expand(-1, -1, dimension)
    others = values.gather(1, at).view(batch, sites, width, dimension)
    return (coupling[..., None] * others).sum(dim=2)


def lattice_couplings(right: Tensor, down: Tensor, periodic: bool = False) -> Neighbours:
    """The table of a square lattice with nearest-neighbour couplings.

    Parameters
    ----------
    right, down
        (B, L, L), the coupling of site (r, c) to (r, c+1) and to (r+1, c). With an open boundary
        those of the last column and the last row have no effect.
    periodic
        Whether the last column is coupled to the first, and the last row; L ≥ 3.

    Returns
    -------
    index and weight (B, L², 4), site (r, c) being number r·L + c.
    """
    batch, size, _ = right.shape
    if periodic and size < 3:
        raise ValueError(f"a periodic lattice of {size} × {size} couples two sites twice")
    site = torch.arange(size * size, device=right.device).view(size, size)
    index, weight = [], []
    for couplings, axis in ((right, 1), (down, 0)):
        ahead, behind = site.roll(-1, axis), site.roll(1, axis)
        forward, backward = couplings, couplings.roll(1, axis + 1)
        if not periodic:
            place = torch.arange(size, device=right.device)
            place = place[None] if axis else place[:, None]
            ahead = torch.where(place == size - 1, site, ahead)
            behind = torch.where(place == 0, site, behind)
        index += [ahead, behind]
        weight += [forward, backward]
    table = torch.stack(index, dim=-1).view(1, size * size, 4).expand(batch, -1, -1)
    values = torch.stack(weight, dim=-1).view(batch, size * size, 4)
    return Neighbours(table, torch.where(table == site.view(1, -1, 1), 0, values))


def _over_sites(values: Tensor, samples: Samples) -> Tensor:
    """Sum over real sites, (B, D)."""
    if samples.mask is not None:
        values = torch.where(samples.mask[..., None], values, 0)
    return values.sum(dim=1)
