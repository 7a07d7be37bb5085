"""Shares, means and medians with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Rate:
    """`count` of `total`.

    ``effect``: the variance of the share is so many times that of independent ones (the design
    effect: L. Kish, *Survey Sampling*, 1965, section 8.2).
    """

    count: int
    total: int
    effect: float = 1.0

    @property
    def value(self) -> float | None:
        """The share in [0, 1]; None of nothing."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval (Wilson, J. Am. Stat. Assoc. 22, 209, 1927); None of nothing.

        Where members of the total are not independent, it is that of a total so much smaller.
        """
        if not self.total:
            return None
        n, p = self.total / self.effect, self.count / self.total
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Clusters:
    """Sums over molecules, for the share of marked atoms and how sure it is.

    Atoms of a molecule are not independent: where one is unstable its neighbours tend to be.
    """

    clusters: int = 0
    marked: int = 0
    total: int = 0
    _marked_squared: int = 0
    _product: int = 0
    _total_squared: int = 0

    def add(self, marked: NDArray[np.int64], total: NDArray[np.int64]) -> None:
        """Molecules with so many marked atoms of so many, (M,) each."""
        self.clusters += len(total)
        self.marked += int(marked.sum())
        self.total += int(total.sum())
        self._marked_squared += int((marked * marked).sum())
        self._product += int((marked * total).sum())
        self._total_squared += int((total * total).sum())

    @property
    def effect(self) -> float:
        r"""The design effect of the share of marked atoms.

        .. math:: \frac{M}{M - 1}\,\frac{\sum_i (u_i - p\,n_i)^2}{p\,(1 - p) \sum_i n_i}

        for u_i marked of n_i atoms and p = Σu/Σn: the variance of a ratio estimator (W. G.
        Cochran, *Sampling Techniques*, 3rd ed., section 6.3) over that of independent atoms, 1 at
        least. Where nothing or everything is marked, or of one molecule, it is not known: atoms of
        a molecule are then taken as all alike, Σn²/Σn.
        """
        m, u, n = self.clusters, self.marked, self.total
        if not n:
            return 1.0
        if m < 2 or u in (0, n):
            return self._total_squared / n
        # In integers, where nothing cancels.
        squares = (
            self._marked_squared * n**2 - 2 * self._product * u * n + self._total_squared * u**2
        )
        return max(1.0, m * squares / ((m - 1) * n * u * (n - u)))

    def unmarked(self) -> Rate:
        """The share of the other atoms."""
        return Rate(self.total - self.marked, self.total, self.effect)


@dataclass(frozen=True)
class Mean:
    """The mean of samples that are independent, with its standard error; NaN where unknown."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: NDArray[Any]) -> Mean:
        """Of numbers (M,)."""
        count = len(values)
        with np.errstate(invalid="ignore"):  # of what is not finite the error is NaN
            deviation = float(values.std(ddof=1)) if count > 1 else math.nan
        error = deviation / math.sqrt(count) if count else math.nan
        return cls(float(values.mean()) if count else math.nan, error, count)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None of less than two numbers."""
        if not math.isfinite(self.error):
            return None
        return self.value - _Z * self.error, self.value + _Z * self.error


def median_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of the median of numbers (V,), from their order; None of fewer than six.

    W. J. Conover, *Practical Nonparametric Statistics*, 3rd ed., section 3.2.
    """
    from scipy.stats import quantile_test

    low, high = quantile_test(values, p=0.5).confidence_interval(0.95)
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None
