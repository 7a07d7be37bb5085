"""Rates, means, medians and distances with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054  # two-sided 95 % of the normal distribution
# The same of Student's t with 1 to 9 degrees of freedom. `scipy.special` has them, but its import
# takes longer than all distances of an evaluation.
_T = (
    12.706204736174694, 4.302652729749462, 3.1824463052837078, 2.7764451051977934,
    2.5705818356363146, 2.4469118511449786, 2.364624251592784, 2.306004135204166,
    2.262157162798205,
)  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """The share `count` / `total`."""

    count: int
    total: int
    effect: float = 1.0
    """Design effect: the variance of the share over that of independent members (L. Kish, *Survey
    Sampling*, 1965, section 8.2)."""

    @property
    def value(self) -> float | None:
        """The share in [0, 1]; None if the total is 0."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval (Wilson, J. Am. Stat. Assoc. 22, 209, 1927).

        None if the total is 0. With members that are not independent, the total is divided by the
        design effect.
        """
        if not self.total:
            return None
        n, p = self.total / self.effect, self.count / self.total
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        # Rounding must not put the bound of no and of all members inside the range.
        low = max(0.0, centre - half) if self.count else 0.0
        return low, min(1.0, centre + half) if self.count < self.total else 1.0


@dataclass(frozen=True)
class RealRange:
    """Median and 95 % range of a distance, of as many real molecules."""

    median: float
    interval: tuple[float, float]

    def place(self, value: float) -> str:
        """Where a value lies: `above`, `like` or `below` real molecules."""
        if value > self.interval[1]:
            return "above"
        return "like" if value >= self.interval[0] else "below"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; None where unknown."""

    value: float | None
    interval: tuple[float, float] | None = None
    count: int = 0
    """Number of samples that it was computed from."""
    note: str = ""
    """Why there is no value, or its restriction."""
    real: RealRange | None = None
    """The range of as many real molecules, for distances."""


@dataclass
class Clusters:
    """Sums over molecules, for the share of marked atoms and its design effect.

    Atoms of a molecule are not independent: neighbours of an unstable atom tend to be unstable.
    """

    clusters: int = 0
    marked: int = 0
    total: int = 0
    _marked_squared: int = 0
    _product: int = 0
    _total_squared: int = 0

    def add(self, marked: NDArray[np.int64], total: NDArray[np.int64]) -> None:
        """Add molecules: the number of marked atoms and of all atoms of each, (M,)."""
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
        Cochran, *Sampling Techniques*, 3rd ed., section 6.3) over that of independent atoms, at
        least 1. It cannot be estimated if no or all atoms are marked, or from one molecule: then
        it is Σn²/Σn, as if all atoms of a molecule were equal.
        """
        m, u, n = self.clusters, self.marked, self.total
        if not n:
            return 1.0
        if m < 2 or u in (0, n):
            return self._total_squared / n
        # In exact integers, without cancellation.
        squares = (
            self._marked_squared * n**2 - 2 * self._product * u * n + self._total_squared * u**2
        )
        return max(1.0, m * squares / ((m - 1) * n * u * (n - u)))

    def unmarked(self) -> Rate:
        """The share of atoms that are not marked."""
        return Rate(self.total - self.marked, self.total, self.effect)


@dataclass(frozen=True)
class Mean:
    """Mean of independent samples with its standard error; NaN where undefined."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: NDArray[Any]) -> Mean:
        """Mean of numbers (M,)."""
        count = len(values)
        with np.errstate(invalid="ignore"):  # the error of infinite numbers is NaN
            deviation = float(values.std(ddof=1)) if count > 1 else math.nan
        error = deviation / math.sqrt(count) if count else math.nan
        return cls(float(values.mean()) if count else math.nan, error, count)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None for fewer than two numbers."""
        if not math.isfinite(self.error):
            return None
        return self.value - _Z * self.error, self.value + _Z * self.error


def ratio_interval(
    sums: NDArray[np.float64], counts: NDArray[np.int64]
) -> tuple[float, float] | None:
    """95 % interval of Σ sums / Σ counts over independent molecules (M,); None for fewer than two.

    The ratio estimator of W. G. Cochran, *Sampling Techniques*, 3rd ed., section 6.3. Numbers that
    are not negative are assumed: the lower bound is at least zero.
    """
    molecules, total = len(counts), counts.sum()
    if molecules < 2 or not total:
        return None
    ratio = float(sums.sum() / total)
    squares = float(((sums - ratio * counts) ** 2).sum())
    half = _Z * math.sqrt(molecules / (molecules - 1) * squares) / float(total)
    return max(0.0, ratio - half), ratio + half


def median_interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of the median of numbers (V,) from order statistics; None for fewer than six.

    W. J. Conover, *Practical Nonparametric Statistics*, 3rd ed., section 3.2.
    """
    count = len(values)
    # How many numbers are below the median is binomial: the tails have 2.5 % each.
    below = np.arange(count)
    logarithm = np.cumsum(np.log((count - below) / (below + 1))) - count * math.log(2)
    tails = np.cumsum(np.exp(np.append(-count * math.log(2), logarithm)))
    left_out = int((tails < 0.025).sum())
    if not left_out:
        return None
    ascending = np.sort(values)
    low, high = float(ascending[left_out - 1]), float(ascending[count - left_out])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def jackknife_interval(
    value: float, without: list[float], least: float = 0.0
) -> tuple[float, float]:
    """95 % interval of a statistic from its values without each of g groups of samples.

    The grouped jackknife (J. W. Tukey, 1958): variance (g−1)/g Σ(θ_i − θ̄)², and Student's t with
    g − 1 degrees of freedom, for two to ten groups. The lower bound is at least `least`: zero, for
    distances.
    """
    groups = len(without)
    variance = (groups - 1) * float(np.var(without))
    half = _T[groups - 2] * math.sqrt(variance)
    return max(least, value - half), value + half
