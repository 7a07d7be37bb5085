"""The numbers of atoms of drawn molecules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class SizeDistribution:
    """A distribution of numbers of atoms.

    Parameters
    ----------
    histogram
        Weights of each number of atoms, not all 0.
    """

    def __init__(self, histogram: Mapping[int, int]) -> None:
        self.histogram = histogram
        self._sizes = torch.tensor(list(histogram))
        counts = torch.tensor(list(histogram.values()), dtype=torch.float64)
        self._cumulated = counts.cumsum(0) / counts.sum()

    @classmethod
    def uniform(cls, low: int, high: int) -> SizeDistribution:
        """All numbers from `low` to `high`, equally frequent."""
        return cls(dict.fromkeys(range(low, high + 1), 1))

    @property
    def largest(self) -> int:
        """The largest number of atoms that is drawn."""
        return max(size for size, count in self.histogram.items() if count)

    def at_least(self, low: int) -> SizeDistribution | None:
        """Its part from `low` atoms; None if there is none."""
        some = {size: count for size, count in self.histogram.items() if size >= low and count}
        return SizeDistribution(some) if some else None

    def draw(self, uniform: Tensor) -> Tensor:
        """Numbers of atoms, (B,) int64, from numbers in [0, 1), (B,)."""
        place = torch.searchsorted(self._cumulated, uniform.cpu().double(), right=True)
        return self._sizes[place.clamp(max=len(self._sizes) - 1)]
