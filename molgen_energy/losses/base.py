"""What every loss shares: how samples are given, padded or packed, and what a loss may look at.

B samples of N_b atoms in D dimensions come in one of two layouts:

- **padded**: (B, N, D) with a mask (B, N), true at real atoms; no mask means that all are real;
- **packed**: (ΣN, D) with `batch` (ΣN,), the ascending number of the sample that an atom belongs
  to, as PyTorch Geometric holds it; no `batch` means one sample.

What stands at padding has no effect, NaN neither, and gets gradient 0. The calculation is done in
the precision of the prediction, float32 for half precision, and so is the result returned; a
gradient has the type of its input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbours:
    """Edges of an undirected graph, seen from each atom.

    index
        (B, N, K) numbers of atoms in their sample, or packed (ΣN, K) numbers among all atoms. Each
        edge stands in the rows of both its ends; a row with fewer names its own atom instead.
    weight
        Factor of the edge's spring constant, or its coupling; of the same shape. None is 1.
    """

    index: Tensor
    weight: Tensor | None = None


class Bonds:
    """Which pairs of atoms are bonded: an adjacency (B, N, N), or sorted pairs without one."""

    def __init__(self, atoms: int, adjacency: Tensor | None, pairs: Tensor | None) -> None:
        self.atoms = atoms
        self._adjacency = adjacency
        self._pairs = pairs  # sorted numbers (b·N + i)·N + j, both directions

    def between(self, sample: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Whether atoms are bonded, a bool for each of three index tensors of one shape."""
        if self._adjacency is not None:
            return self._adjacency[sample, first, second]
        assert self._pairs is not None
        wanted = (sample * self.atoms + first) * self.atoms + second
        if not len(self._pairs):
            return torch.zeros_like(wanted, dtype=torch.bool)
        at = torch.searchsorted(self._pairs, wanted).clamp(max=len(self._pairs) - 1)
        return self._pairs[at] == wanted

    def rows(self, samples: slice, rows: slice) -> Tensor:
        """Adjacency of some atoms of some samples to all, (b, r, N)."""
        if self._adjacency is not None:
            return self._adjacency[samples, rows]
        assert self._pairs is not None
        atom, second = self._pairs // self.atoms, self._pairs % self.atoms
        sample, first = atom // self.atoms, atom % self.atoms
        keep = (sample >= samples.start) & (sample < samples.stop)
        keep &= (first >= rows.start) & (first < rows.stop)
        shape = (samples.stop - samples.start, rows.stop - rows.start, self.atoms)
        result = torch.zeros(shape, dtype=torch.bool, device=self._pairs.device)
        at = sample[keep] - samples.start, first[keep] - rows.start, second[keep]
        return result.index_put_(at, torch.ones((), dtype=torch.bool, device=result.device))

    def neighbours(self, samples: int) -> Neighbours:
        """The bonds as a table."""
        if self._adjacency is not None:
            flat = self._adjacency.reshape(-1).nonzero().squeeze(1)
        else:
            assert self._pairs is not None
            flat = self._pairs
        atom, second = flat // self.atoms, flat % self.atoms
        degrees = torch.bincount(atom, minlength=samples * self.atoms)
        own = torch.arange(self.atoms, device=flat.device).repeat(samples)
        width = int(degrees.max()) if len(atom) else 0
        index = own[:, None].repeat(1, width)
        place = torch.arange(len(atom), device=flat.device) - (degrees.cumsum(0) - degrees)[atom]
        index[atom, place] = second
        return Neighbours(index.view(samples, self.atoms, width))


Randomness = torch.Generator | Tensor | None


@dataclass(frozen=True)
class Samples:
    """Samples in the padded layout, in the precision of the calculation; zero at padding."""

    prediction: Tensor
    """(B, N, D)."""
    target: Tensor
    """(B, N, D)."""
    mask: Tensor | None
    """(B, N), true at real atoms; None where all are."""
    features: Tensor | None
    """(B, N, F)."""
    bonds: Bonds | None
    neighbours: Neighbours | None
    generator: Randomness

    def choice(self, count: int) -> Tensor:
        """A random number below `count` for each sample, (B,)."""
        source, device = self.generator, self.prediction.device
        if isinstance(source, Tensor):
            return source.to(device) % count
        where = device if source is None else source.device
        size = (len(self.prediction),)
        return torch.randint(count, size, generator=source, device=where).to(device)

    @property
    def counts(self) -> Tensor:
        """Number of atoms of each sample, at least 1, (B,)."""
        batch, atoms = self.prediction.shape[:2]
        if self.mask is None:
            return self.prediction.new_full((batch,), max(1, atoms))
        return self.mask.sum(dim=1).clamp(min=1).to(self.prediction.dtype)


class Loss(ABC):
    """A loss of each sample between a prediction and a target."""

    needs_batch = False
    """Whether (ΣN, D) without `batch` is refused rather than taken as one sample."""

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
            Which atoms are bonded, for what depends on it, in one or both directions: padded
            (B, N, N), not zero where there is a bond, or packed (2, E), atoms among all.
        neighbours
            Edges or couplings that were found before, for what takes them.
        generator
            Source of randomness where a graph is drawn; None is PyTorch's own. Or the random
            numbers themselves, one of each sample, (B,) int64 and not negative: with them a
            sample's graph does not depend on what else is in the batch.

        Raises
        ------
        ValueError
            Shapes do not fit each other, or something that this loss needs is missing.
        """
        if self.needs_batch and prediction.ndim == 2 and batch is None:
            raise ValueError(
                f"{tuple(prediction.shape)}: expected (B, N, D), or (ΣN, D) with batch; "
                "one channel is [..., None]"
            )
        with torch.autocast(prediction.device.type, enabled=False):
            samples = as_samples(
                prediction, target, mask, batch, features, bonds, neighbours, generator, size
            )
            return self.of(samples)

    @abstractmethod
    def of(self, samples: Samples) -> Tensor:
        """Loss of each sample, (B,)."""


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
    generator: Randomness = None,
    size: int | None = None,
) -> Samples:
    """Samples of either layout; arguments and errors as when a loss is called."""
    if not prediction.is_floating_point():
        raise ValueError(f"expected a prediction of floating-point numbers, not {prediction.dtype}")
    if features is not None and features.ndim != prediction.ndim:
        raise ValueError(f"expected features of {prediction.ndim} dimensions, not {features.ndim}")
    if target.shape != prediction.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ"
        )
    if prediction.ndim == 3:
        if batch is not None:
            raise ValueError("padded samples (B, N, D) take a mask, not batch")
        return _padded(prediction, target, mask, features, bonds, neighbours, generator)
    if prediction.ndim == 2:
        if mask is not None:
            raise ValueError("packed samples (ΣN, D) take batch (ΣN,), not a mask")
        packing = Packing.of(batch, len(prediction), prediction.device, size)
        return _packed(prediction, target, packing, features, bonds, neighbours, generator)
    raise ValueError(f"expected (B, N, D) or (ΣN, D), not {prediction.ndim} dimensions")


def _precision(prediction: Tensor) -> torch.dtype:
    half = prediction.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half else prediction.dtype


def _inside(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask[..., None], values, 0)


def _padded(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None,
    features: Tensor | None,
    bonds: Tensor | None,
    neighbours: Neighbours | None,
    generator: Randomness,
) -> Samples:
    batch, atoms = prediction.shape[:2]
    if mask is not None:
        if mask.shape != (batch, atoms):
            raise ValueError(f"expected a mask {(batch, atoms)}, not {tuple(mask.shape)}")
        mask = mask.bool()
    if features is not None and features.shape[:2] != (batch, atoms):
        raise ValueError(f"expected features {(batch, atoms)} × F, not {tuple(features.shape)}")
    if bonds is not None and bonds.shape != (batch, atoms, atoms):
        raise ValueError(
            f"expected bonds {(batch, atoms, atoms)} for padded samples, not {tuple(bonds.shape)}"
        )
    if neighbours is not None and neighbours.index.shape[:2] != (batch, atoms):
        raise ValueError(
            f"expected neighbours {(batch, atoms)} × K, not {tuple(neighbours.index.shape)}"
        )
    dtype = _precision(prediction)
    adjacency = None if bonds is None else bonds != 0
    return Samples(
        _inside(prediction.to(dtype), mask),
        _inside(target.to(dtype), mask),
        mask,
        None if features is None else _inside(features.to(dtype), mask),
        None if adjacency is None else Bonds(atoms, adjacency | adjacency.mT, None),
        neighbours,
        generator,
    )


@dataclass(frozen=True)
class Packing:
    """Where packed atoms stand when they are padded."""

    batch: Tensor
    """(ΣN,), the sample of an atom."""
    place: Tensor
    """(ΣN,), its number in its sample."""
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
        first, second = torch.cat([bonds, bonds.flip(0)], dim=1).long()
        if bool((batch[first] != batch[second]).any()):
            raise ValueError("a bond joins atoms of two samples")
        pairs = (batch[first] * atoms + place[first]) * atoms + place[second]
        pairs = torch.unique(pairs)
    return Samples(
        packing.padded(prediction.to(dtype)),
        packing.padded(target.to(dtype)),
        None if len(packing.counts) == 1 else packing.mask,
        None if features is None else packing.padded(features.to(dtype)),
        None if pairs is None else Bonds(atoms, None, pairs),
        local,
        generator,
    )
