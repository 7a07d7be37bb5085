"""The interface of all losses: how samples are passed, what a loss requires, how it is configured.

B samples of N_b atoms in D dimensions come in one of two layouts:

- **padded**: (B, N, D) with a mask (B, N), true at real atoms; without a mask all atoms are real;
- **packed**: (ΣN, D) with `batch` (ΣN,), the ascending number of each atom's sample, as in PyTorch
  Geometric; without `batch` there is one sample.

Values at padding, NaN included, have no effect and get gradient 0. A loss computes in the precision
of the prediction, float32 for half precision, and returns that precision; a gradient has the type
of its input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.config import Section

if TYPE_CHECKING:
    from molgen_energy.losses.adaptive import AdaptiveSprings
    from molgen_energy.losses.edges import Edges


@dataclass(frozen=True)
class Neighbours:
    """Edges of an undirected graph, as a table of the neighbours of each atom.

    index
        (B, N, K) indices of atoms in their sample, or packed (ΣN, K) indices among all atoms. Each
        edge is in the rows of both its atoms; a row with fewer than K is filled with its own atom.
    weight
        Factor of the edge's spring constant, or its coupling; of the same shape. None is 1.
    """

    index: Tensor
    weight: Tensor | None = None


class BondedPairs:
    """The pairs of bonded atoms of padded samples.

    Parameters
    ----------
    samples, atoms
        B and N.
    pairs
        Flat indices (b·N + i)·N + j, (P,) int64, ascending, with both directions of each bond; a
        pair may be repeated.
    """

    def __init__(self, samples: int, atoms: int, pairs: Tensor) -> None:
        self.samples = samples
        self.atoms = atoms
        self.pairs = pairs

    @classmethod
    def from_adjacency(cls, adjacency: Tensor) -> BondedPairs:
        """Of adjacency matrices (B, N, N), nonzero at a bond, in one or both directions."""
        bonded = adjacency != 0
        bonded = bonded | bonded.mT
        samples, atoms = adjacency.shape[:2]
        return cls(samples, atoms, bonded.reshape(-1).nonzero().squeeze(1))

    @classmethod
    def from_edges(
        cls, samples: int, atoms: int, sample: Tensor, i: Tensor, j: Tensor
    ) -> BondedPairs:
        """Of lists of bonds (E,): the sample and both atoms, in one or both directions."""
        sample, i, j = sample.long(), i.long(), j.long()
        directed = torch.cat([(sample * atoms + i) * atoms + j, (sample * atoms + j) * atoms + i])
        return cls(samples, atoms, directed.sort().values)

    def between(self, sample: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether atoms are bonded, bool, for three index tensors of one shape."""
        queries = (sample * self.atoms + i) * self.atoms + j
        if not len(self.pairs):
            return torch.zeros_like(queries, dtype=torch.bool)
        found = torch.searchsorted(self.pairs, queries).clamp(max=len(self.pairs) - 1)
        return self.pairs[found] == queries

    def rows(self, samples: slice, rows: slice) -> Tensor:
        """Rows of the adjacency matrices, (b, r, N) bool.

        Several samples must come with all their rows, so that the block is contiguous.
        """
        n = self.atoms
        shape = (samples.stop - samples.start, rows.stop - rows.start, n)
        first = (samples.start * n + rows.start) * n
        size = shape[0] * shape[1] * n
        pairs = self.pairs
        if size < self.samples * n * n:
            bounds = torch.tensor([first, first + size], device=pairs.device)
            start, stop = torch.searchsorted(pairs, bounds).tolist()
            pairs = pairs[start:stop] - first
        block = torch.zeros(size, dtype=torch.bool, device=pairs.device)
        return block.index_fill_(0, pairs, True).view(shape)

    def neighbours(self) -> Neighbours:
        """The bonds as a table."""
        pairs = torch.unique_consecutive(self.pairs)
        atom, neighbour = pairs // self.atoms, pairs % self.atoms
        degrees = torch.bincount(atom, minlength=self.samples * self.atoms)
        own = torch.arange(self.atoms, device=pairs.device).repeat(self.samples)
        width = int(degrees.max()) if len(atom) else 0
        index = own[:, None].repeat(1, width)
        column = torch.arange(len(atom), device=pairs.device) - (degrees.cumsum(0) - degrees)[atom]
        index[atom, column] = neighbour
        return Neighbours(index.view(self.samples, self.atoms, width))


Randomness = torch.Generator | Tensor | None


@dataclass(frozen=True)
class Samples:
    """Samples in the padded layout, in the precision of the computation; zero at padding."""

    prediction: Tensor
    """(B, N, D)."""
    target: Tensor
    """(B, N, D)."""
    mask: Tensor | None
    """(B, N), true at real atoms; None where all are."""
    features: Tensor | None
    """(B, N, F)."""
    bonds: BondedPairs | None
    neighbours: Neighbours | None
    generator: Randomness
    noisy: Tensor | None = None
    """(B, N, D), the positions of x_t."""
    noise_level: Tensor | None = None
    """(B,), σ/α in the unit of positions."""

    def random_integers(self, high: int) -> Tensor:
        """A random integer in [0, high) for each sample, (B,)."""
        source, device = self.generator, self.prediction.device
        if isinstance(source, Tensor):
            return source.to(device) % high
        drawn_on = device if source is None else source.device
        size = (len(self.prediction),)
        return torch.randint(high, size, generator=source, device=drawn_on).to(device)

    @property
    def counts(self) -> Tensor:
        """Number of atoms of each sample, at least 1, (B,)."""
        batch, atoms = self.prediction.shape[:2]
        if self.mask is None:
            return self.prediction.new_full((batch,), max(1, atoms))
        return self.mask.sum(dim=1).clamp(min=1).to(self.prediction.dtype)


class LossConfig(Section):
    """Base of the section classes of losses. Each has its loss's name as the default of `name`."""

    name: str

    @property
    def requires(self) -> frozenset[str]:
        """The inputs that the loss requires besides positions, see `Loss.requires`."""
        return frozenset()

    @property
    def published_as(self) -> str:
        """Name of the loss whose published learning rates and weights hold for this one."""
        return self.name

    extensive: ClassVar[bool] = False
    """Whether the loss of a molecule grows with its number of atoms, as an energy does, rather than
    being a mean over them."""

    @property
    def variant(self) -> str | None:
        """What published learning rates and weights depend on besides the name, if anything."""
        return None

    def resolve(
        self, samples: Callable[[], Iterable[Mapping[str, Any]]], seed: int
    ) -> ResolvedLoss:
        """Replace every `auto`.

        Parameters
        ----------
        samples
            Returns the training data, or a sample of it, in chunks: keyword arguments of
            `PairwiseEnergy.total_stiffness`. Called only where data are needed, at most twice.
        seed
            Of the graphs that edges draw.

        Raises
        ------
        InputError
            The published value that the section names does not exist.
        """
        return ResolvedLoss(self)

    def build_edges(self, seed: int) -> Edges | None:
        """The edges of the loss, with graphs of a seed; None for a loss without edges."""
        return None

    @abstractmethod
    def build(self, *, seed: int = 0, channels: int | None = None) -> Loss:
        """The loss; for a section without `auto`.

        Parameters
        ----------
        seed
            Of the graphs that edges draw.
        channels
            Over which a pointwise loss averages, see `PointwiseLoss`.
        """

    def describe(self) -> str:
        """What a one-line summary says after the name, beginning with a comma; or nothing."""
        return ""


class ResolvedLoss:
    """A section without `auto`, and the stiffness of its springs.

    Parameters
    ----------
    config
        The section.
    stiffness
        Computes the attribute of that name when it is first read: it may take a pass over data.
    """

    def __init__(self, config: LossConfig, stiffness: Callable[[], float] = lambda: 1.0) -> None:
        self.config = config
        self._stiffness = stiffness

    @cached_property
    def stiffness(self) -> float:
        """Stiffness relative to springs of mean 1 on all pairs; 1 for a loss without springs.

        A position weight that is meant for springs of mean 1 on all pairs is divided by it.
        """
        return self._stiffness()


class Loss(ABC):
    """A loss of each sample between a prediction and a target."""

    Config: ClassVar[type[LossConfig]]
    """The section class of a configuration that names this loss."""
    requires: frozenset[str] = frozenset()
    """Inputs that the loss requires besides positions: of `bonds`, `features`, `neighbours`,
    `noisy` and `noise_level`.

    A loss on positions that names `neighbours` also finds them, see `prepare_neighbours`.
    """
    uses_target: ClassVar[bool] = True
    """Whether the loss depends on the target."""
    adaptive: AdaptiveSprings | None = None
    """Springs that are learnt from the predictions; a training loop ends each step with
    `adaptive.finish_step()` and stores `adaptive.state()`."""
    requires_batch: ClassVar[bool] = False
    """Whether packed samples (ΣN, D) without `batch` are refused, not taken as one sample."""

    def __call__(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        batch: Tensor | None = None,
        features: Tensor | None = None,
        bonds: Tensor | None = None,
        neighbours: Neighbours | None = None,
        noisy: Tensor | None = None,
        noise_level: Tensor | None = None,
        generator: Randomness = None,
        size: int | None = None,
    ) -> Tensor:
        """Loss of each sample, (B,).

        Parameters
        ----------
        prediction, target
            Padded (B, N, D) or packed (ΣN, D), any D ≥ 1.
        mask
            (B, N), true at real atoms; for the padded layout.
        batch
            (ΣN,), ascending; for the packed layout.
        size
            B, for the packed layout; None is one more than the last of `batch`.
        features
            Further channels of an atom, (B, N, F) or (ΣN, F), for springs by feature distance.
        bonds
            Pairs of bonded atoms, in one or both directions. Padded: (3, E), the sample and both
            atoms of each bond, or adjacency matrices (B, N, N), nonzero at a bond. Packed: (2, E),
            indices among all atoms.
        neighbours
            Prepared edges, or the couplings of spins.
        noisy
            The noisy positions x_t that the prediction was made from, of its shape and unit.
        noise_level
            σ/α of x_t in the unit of positions, (B,).
        generator
            Source of randomness where a graph is drawn; None is PyTorch's default generator. Or
            the random numbers themselves, one for each sample, (B,) int64, not negative: then a
            sample's graph does not depend on the rest of the batch.

        Raises
        ------
        ValueError
            Shapes do not match, or an input that the loss requires is missing.
        """
        if self.requires_batch and prediction.ndim == 2 and batch is None:
            raise ValueError(
                f"{tuple(prediction.shape)}: expected (B, N, D), or (ΣN, D) with batch; "
                "one channel is [..., None]"
            )
        with torch.autocast(prediction.device.type, enabled=False):
            samples = as_samples(
                prediction, target, mask, batch, features, bonds, neighbours, noisy, noise_level,
                generator, size,
            )  # fmt: skip
            return self.of(samples)

    @abstractmethod
    def of(self, samples: Samples) -> Tensor:
        """Loss of each sample, (B,)."""

    def prepare_neighbours(
        self,
        positions: Tensor,
        mask: Tensor | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """The argument `neighbours` for padded samples, to be found once for a data set.

        Parameters
        ----------
        positions, mask
            (B, N, D), (B, N).
        numbers
            Numbers of the samples in the data set, (B,), from which each one's graph is chosen.

        Raises
        ------
        ValueError
            The loss does not prepare neighbours, or the positions do not allow it.
        """
        raise ValueError("this loss does not prepare neighbours")


class PositionLoss(Loss):
    """A loss on the positions of atoms."""

    degree: int = 2
    """The loss grows with this power of a small displacement."""


def as_samples(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    batch: Tensor | None = None,
    features: Tensor | None = None,
    bonds: Tensor | None = None,
    neighbours: Neighbours | None = None,
    noisy: Tensor | None = None,
    noise_level: Tensor | None = None,
    generator: Randomness = None,
    size: int | None = None,
) -> Samples:
    """Samples of either layout; parameters and errors are those of `Loss.__call__`."""
    if not prediction.is_floating_point():
        raise ValueError(f"expected a prediction of floating-point numbers, not {prediction.dtype}")
    if features is not None and features.ndim != prediction.ndim:
        raise ValueError(f"expected features of {prediction.ndim} dimensions, not {features.ndim}")
    if target.shape != prediction.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ"
        )
    if noisy is not None and noisy.shape != prediction.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and noisy {tuple(noisy.shape)} differ"
        )
    if prediction.ndim == 3:
        if batch is not None:
            raise ValueError("padded samples (B, N, D) take a mask, not batch")
        samples = _padded(prediction, target, mask, features, bonds, neighbours, noisy, generator)
    elif prediction.ndim == 2:
        if mask is not None:
            raise ValueError("packed samples (ΣN, D) take batch (ΣN,), not a mask")
        packing = Packing.of(batch, len(prediction), prediction.device, size)
        samples = _packed(
            prediction, target, packing, features, bonds, neighbours, noisy, generator
        )
    else:
        raise ValueError(f"expected (B, N, D) or (ΣN, D), not {prediction.ndim} dimensions")
    if noise_level is None:
        return samples
    count = len(samples.prediction)
    if noise_level.shape != (count,):
        raise ValueError(f"expected noise_level {(count,)}, not {tuple(noise_level.shape)}")
    return replace(samples, noise_level=noise_level.to(samples.prediction.dtype))


def _precision(prediction: Tensor) -> torch.dtype:
    half = prediction.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half else prediction.dtype


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask[..., None], values, 0)


def _padded(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    features: Tensor | None,
    bonds: Tensor | None,
    neighbours: Neighbours | None,
    noisy: Tensor | None,
    generator: Randomness,
) -> Samples:
    batch, atoms = prediction.shape[:2]
    if mask is not None:
        if mask.shape != (batch, atoms):
            raise ValueError(f"expected a mask {(batch, atoms)}, not {tuple(mask.shape)}")
        mask = mask.bool()
    if features is not None and features.shape[:2] != (batch, atoms):
        raise ValueError(f"expected features {(batch, atoms)} × F, not {tuple(features.shape)}")
    if neighbours is not None and neighbours.index.shape[:2] != (batch, atoms):
        raise ValueError(
            f"expected neighbours {(batch, atoms)} × K, not {tuple(neighbours.index.shape)}"
        )
    dtype = _precision(prediction)
    return Samples(
        _masked(prediction.to(dtype), mask),
        _masked(target.to(dtype), mask),
        mask,
        None if features is None else _masked(features.to(dtype), mask),
        None if bonds is None else _padded_bonds(bonds, batch, atoms),
        neighbours,
        generator,
        None if noisy is None else _masked(noisy.to(dtype), mask),
    )


def _padded_bonds(bonds: Tensor, batch: int, atoms: int) -> BondedPairs:
    if bonds.shape == (batch, atoms, atoms):
        return BondedPairs.from_adjacency(bonds)
    if bonds.ndim != 2 or len(bonds) != 3:
        raise ValueError(
            f"expected bonds {(batch, atoms, atoms)} or (3, E) for padded samples, not "
            f"{tuple(bonds.shape)}"
        )
    if bonds.is_floating_point() or bonds.dtype == torch.bool:
        raise ValueError(f"expected bonds (3, E) of integers, not {bonds.dtype}")
    if not bonds.is_cuda:  # a GPU would have to wait for the answer
        limits = torch.tensor([batch, atoms, atoms])[:, None]
        if bool(((bonds < 0) | (bonds >= limits)).any()):
            raise ValueError(f"a bond is outside of {batch} samples of {atoms} atoms")
    return BondedPairs.from_edges(batch, atoms, *bonds)


@dataclass(frozen=True)
class Packing:
    """Where packed atoms are in the padded layout."""

    batch: Tensor
    """(ΣN,), the sample of an atom."""
    place: Tensor
    """(ΣN,), its index in the sample."""
    starts: Tensor
    """(B,), the first atom of a sample."""
    counts: Tensor
    """(B,)."""
    atoms: int
    """N, of the largest sample."""

    @classmethod
    def of(
        cls, batch: Tensor | None, total: int, device: torch.device, size: int | None = None
    ) -> Packing:
        """The packing of so many atoms in all."""
        if batch is None:
            batch = torch.zeros(total, dtype=torch.long, device=device)
        if batch.shape != (total,):
            raise ValueError(f"expected batch {(total,)}, not {tuple(batch.shape)}")
        if batch.is_floating_point() or batch.dtype == torch.bool:
            raise ValueError(f"expected batch of integers, not {batch.dtype}")
        if total and (bool((batch[1:] < batch[:-1]).any()) or int(batch[0]) < 0):
            raise ValueError("batch must ascend from 0; sort the atoms by sample")
        counts = torch.bincount(batch, minlength=size or 0)
        if size is not None and len(counts) > size:
            raise ValueError(f"batch names {len(counts)} samples, more than size = {size}")
        starts = counts.cumsum(0) - counts
        place = torch.arange(total, device=device) - starts[batch]
        return cls(batch, place, starts, counts, int(counts.max()) if len(counts) else 0)

    @property
    def mask(self) -> Tensor:
        """(B, N), true at atoms."""
        return torch.arange(self.atoms, device=self.batch.device)[None] < self.counts[:, None]

    def padded(self, values: Tensor) -> Tensor:
        """(ΣN, …) to (B, N, …), zero at padding."""
        if len(self.counts) == 1:
            return values[None]
        empty = values.new_zeros((len(self.counts), self.atoms, *values.shape[1:]))
        return empty.index_put((self.batch, self.place), values)


def _packed(
    prediction: Tensor,
    target: Tensor,
    packing: Packing,
    features: Tensor | None,
    bonds: Tensor | None,
    neighbours: Neighbours | None,
    noisy: Tensor | None,
    generator: Randomness,
) -> Samples:
    """The padded layout of packed samples."""
    total, dtype, atoms = len(prediction), _precision(prediction), packing.atoms
    batch, place = packing.batch, packing.place
    if features is not None and len(features) != total:
        raise ValueError(f"expected features {total} × F, not {tuple(features.shape)}")
    if neighbours is not None and len(neighbours.index) != total:
        raise ValueError(f"expected neighbours {total} × K, not {tuple(neighbours.index.shape)}")
    if bonds is not None and (bonds.ndim != 2 or len(bonds) != 2):
        raise ValueError(
            f"expected bonds (2, E) for packed samples, not {tuple(bonds.shape)}; "
            "transpose a list of pairs"
        )
    local = None
    if neighbours is not None:
        index = neighbours.index - packing.starts[batch, None]
        own = torch.arange(atoms, device=batch.device)[None, :, None]
        table = torch.where(packing.mask[..., None], packing.padded(index), own)
        weight = None if neighbours.weight is None else packing.padded(neighbours.weight)
        local = Neighbours(table, weight)
    pairs = None
    if bonds is not None:
        i, j = bonds.long()
        if bool((batch[i] != batch[j]).any()):
            raise ValueError("a bond joins atoms of two samples")
        pairs = BondedPairs.from_edges(len(packing.counts), atoms, batch[i], place[i], place[j])
    return Samples(
        packing.padded(prediction.to(dtype)),
        packing.padded(target.to(dtype)),
        None if len(packing.counts) == 1 else packing.mask,
        None if features is None else packing.padded(features.to(dtype)),
        pairs,
        local,
        generator,
        None if noisy is None else packing.padded(noisy.to(dtype)),
    )
