"""Shares and medians with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Rate:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """The share in [0, 1]; None of nothing."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval (Wilson, J. Am. Stat. Assoc. 22, 209, 1927); None of nothing."""
        if not self.total:
            return None
        n, p = self.total, self.count / self.total
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


def median_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of the median of numbers (V,), from their order; None of fewer than six.

    W. J. Conover, *Practical Nonparametric Statistics*, 3rd ed., section 3.2.
    """
    from scipy.stats import quantile_test

    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None
