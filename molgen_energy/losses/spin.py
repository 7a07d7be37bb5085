"""Losses between predicted spins and a ground state, in Ising models with known couplings.

A network predicts a logit z_i for each site, which defines independent spins ŷ_i = ±1 of mean
m_i = tanh z_i. The energy of a configuration is E(y) = −½ Σ_ij J_ij y_i y_j. Kaba et al., "Energy
Loss Functions for Physical Systems", NeurIPS 2025, section 5.

In a call, `prediction` is the logits and `target` the spins ±1; the D channels of a site are
separate configurations under the same couplings. `neighbours` holds the couplings: `index` the
sites that a site is coupled to, `weight` the J_ij, each coupling in the rows of both its sites
(`lattice_couplings` builds the table of a square lattice). Sums run over sites.

A configuration y and its flip −y have the same energy. With `either_gauge` a loss is the smaller of
its values for y and −y, for data without a convention for the sign.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from molgen_energy.config import PositiveFloat
from molgen_energy.losses.base import Loss, LossConfig, Neighbours, Samples

Gauge = Literal["fixed", "either"]


class SpinLoss(Loss):
    """A loss of logits z and of spins or couplings; logits without a channel are refused."""

    requires_batch = True


class LabelledLossConfig(LossConfig):
    """Settings of a loss that compares with a ground state."""

    gauge: Gauge = "either"
    """`either`: the smaller of the losses for the ground state and its flip; `fixed`: the loss for
    the one whose middle spin is +1, a site that the network's input marks."""


class _LabelledLoss(SpinLoss):
    """A loss that is a sum over sites of a function of the logits z and the spins y.

    Parameters
    ----------
    either_gauge
        Return the smaller of the losses for y and −y.
    """

    def __init__(self, either_gauge: bool = False) -> None:
        self.either_gauge = either_gauge

    def of(self, samples: Samples) -> Tensor:
        """Loss of each sample, (B,)."""
        loss = self._with(samples, samples.target)
        if self.either_gauge:
            flipped = self._with(samples, -samples.target)
            # Where both are equal, as at z = 0, the mean of their gradients would be 0.
            loss = torch.where(loss <= flipped, loss, flipped)
        return loss.sum(dim=1)

    def _with(self, samples: Samples, spins: Tensor) -> Tensor:
        return _over_sites(self.at_sites(samples, spins), samples)

    @abstractmethod
    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """The terms of the sum, (B, N, D)."""


class CrossEntropyConfig(LabelledLossConfig):
    """Cross-entropy of the spins, see `CrossEntropy`."""

    name: str = "cross_entropy"

    def build(self, *, seed: int = 0, channels: int | None = None) -> CrossEntropy:
        """The loss."""
        return CrossEntropy(self.gauge == "either")


class CrossEntropy(_LabelledLoss):
    """−log q(y) = Σ_i log(1 + exp(−2 y_i z_i)): the negative log-likelihood of the data."""

    Config: ClassVar[type[CrossEntropyConfig]] = CrossEntropyConfig

    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """The terms of the sum, (B, N, D)."""
        return F.softplus(-2 * spins * samples.prediction)


class MarginConfig(LabelledLossConfig):
    """Hinge loss of the logits, see `Margin`."""

    name: str = "margin"
    margin: PositiveFloat = 1.0
    """μ."""

    def build(self, *, seed: int = 0, channels: int | None = None) -> Margin:
        """The loss."""
        return Margin(self.margin, self.gauge == "either")


class Margin(_LabelledLoss):
    """Σ_i max(0, μ − y_i z_i): the hinge loss of the logits.

    Parameters
    ----------
    margin
        μ; the term of a site with y_i z_i ≥ μ is 0.
    either_gauge
        Return the smaller of the losses for y and −y.
    """

    Config: ClassVar[type[MarginConfig]] = MarginConfig

    def __init__(self, margin: float = 1.0, either_gauge: bool = False) -> None:
        super().__init__(either_gauge)
        self.margin = margin

    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """The terms of the sum, (B, N, D)."""
        return F.relu(self.margin - spins * samples.prediction)


class LocalFieldConfig(LabelledLossConfig):
    """Energy of each spin in the field of the data, see `LocalField`."""

    name: str = "local_field"
    offset: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """h⁰."""
    temperature: PositiveFloat = 0.1
    """T."""

    @property
    def requires(self) -> frozenset[str]:
        """Couplings."""
        return LocalField.requires

    def build(self, *, seed: int = 0, channels: int | None = None) -> LocalField:
        """The loss."""
        return LocalField(self.offset, self.temperature, self.gauge == "either")


class LocalField(_LabelledLoss):
    """(1/T)·(E_q[E(ŷ, y)] − T·S[q]) with E(ŷ, y) = −Σ_i h_i ŷ_i, h_i = Σ_j J_ij y_j + h⁰ y_i.

    The energy of each spin in the field of the data around it: y_i·(h_i − h⁰ y_i) is half the
    energy of its flip. The loss is convex in m. Its minimum is m_i = tanh(h_i/T), which has the
    signs of the data where every y_i h_i > 0: at a ground state for h⁰ > 0, and at any y if h⁰
    exceeds the sum of |J_ij| at each site, 4 on a square lattice with |J| ≤ 1.

    Parameters
    ----------
    offset
        h⁰.
    temperature
        T.
    either_gauge
        Return the smaller of the losses for y and −y.
    """

    Config: ClassVar[type[LocalFieldConfig]] = LocalFieldConfig
    requires = frozenset({"neighbours"})

    def __init__(
        self, offset: float = 1.0, temperature: float = 0.1, either_gauge: bool = False
    ) -> None:
        super().__init__(either_gauge)
        self.offset = offset
        self.temperature = temperature

    def at_sites(self, samples: Samples, spins: Tensor) -> Tensor:
        """The terms of the sum, (B, N, D)."""
        field = coupled_sum(spins, samples) + self.offset * spins
        logits = samples.prediction
        return -field * mean_spins(logits) / self.temperature - entropy(logits)


class TrueEnergyConfig(LossConfig):
    """Variational free energy, see `TrueEnergy`."""

    name: str = "true_energy"
    temperature: PositiveFloat = 0.1
    """T."""

    @property
    def requires(self) -> frozenset[str]:
        """Couplings."""
        return TrueEnergy.requires

    def build(self, *, seed: int = 0, channels: int | None = None) -> TrueEnergy:
        """The loss."""
        return TrueEnergy(self.temperature)


class TrueEnergy(SpinLoss):
    """(1/T)·(E(m) − T·S[q]) with E(m) = −½ Σ_ij J_ij m_i m_j: the variational free energy.

    It uses no labels: the target has no effect. The mean energy of independent spins is the energy
    of their means, as no site is coupled to itself.

    Parameters
    ----------
    temperature
        T.
    """

    Config: ClassVar[type[TrueEnergyConfig]] = TrueEnergyConfig
    requires = frozenset({"neighbours"})
    uses_target = False

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
    """tanh z, with a gradient that does not round to 0 at large |z|."""
    up, down = torch.sigmoid(2 * logits), torch.sigmoid(-2 * logits)
    return torch.where(logits > 0, 1 - 2 * down, 2 * up - 1)


def coupled_sum(values: Tensor, samples: Samples) -> Tensor:
    """Σ_j J_ij v_j of values (B, N, D) at the sites of samples.

    Raises
    ------
    ValueError
        The samples have no couplings.
    """
    table = samples.neighbours
    if table is None or table.weight is None:
        raise ValueError("a loss of coupled spins: give neighbours with their couplings as weights")
    batch, sites, dimension = values.shape
    width = table.index.shape[-1]
    own = torch.arange(sites, device=values.device)[None, :, None]
    coupling = torch.where(table.index == own, 0, table.weight.to(values.dtype))
    index = table.index.reshape(batch, sites * width, 1).expand(-1, -1, dimension)
    gathered = values.gather(1, index).view(batch, sites, width, dimension)
    return (coupling[..., None] * gathered).sum(dim=2)


def lattice_couplings(right: Tensor, down: Tensor, periodic: bool = False) -> Neighbours:
    """The table of a square lattice with nearest-neighbour couplings.

    Parameters
    ----------
    right, down
        (B, L, L), the coupling of site (r, c) to (r, c+1) and to (r+1, c). With an open boundary
        those of the last column and of the last row have no effect.
    periodic
        Whether the last column is coupled to the first, and the last row; L ≥ 3.

    Returns
    -------
    `index` and `weight` (B, L², 4); site (r, c) has index r·L + c.

    Raises
    ------
    ValueError
        A periodic lattice has less than three sites a side.
    """
    batch, size, _ = right.shape
    if periodic and size < 3:
        raise ValueError(f"a periodic lattice of {size} × {size} couples two sites twice")
    site = torch.arange(size * size, device=right.device).view(size, size)
    index, weight = [], []
    for couplings, axis in ((right, 1), (down, 0)):
        following, previous = site.roll(-1, axis), site.roll(1, axis)
        forward, backward = couplings, couplings.roll(1, axis + 1)
        if not periodic:
            line = torch.arange(size, device=right.device)
            line = line[None] if axis else line[:, None]
            following = torch.where(line == size - 1, site, following)
            previous = torch.where(line == 0, site, previous)
        index += [following, previous]
        weight += [forward, backward]
    table = torch.stack(index, dim=-1).view(1, size * size, 4).expand(batch, -1, -1)
    values = torch.stack(weight, dim=-1).view(batch, size * size, 4)
    return Neighbours(table, torch.where(table == site.view(1, -1, 1), 0, values))


def _over_sites(values: Tensor, samples: Samples) -> Tensor:
    """Sum over real sites, (B, D)."""
    if samples.mask is not None:
        values = torch.where(samples.mask[..., None], values, 0)
    return values.sum(dim=1)
