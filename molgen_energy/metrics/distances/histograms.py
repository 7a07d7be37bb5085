"""Distances between histograms of counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def wasserstein_of_counts(source: NDArray[np.int64], target: NDArray[np.int64]) -> float:
    """First Wasserstein distance of two histograms over 0, 1, 2, …; neither is empty."""
    p, q = _shares(source, target)
    return float(np.abs(np.cumsum(p - q)).sum())


def total_variation(source: NDArray[np.int64], target: NDArray[np.int64]) -> float:
    """Half the summed difference of two histograms' shares, in [0, 1]; neither is empty."""
    p, q = _shares(source, target)
    return float(np.abs(p - q).sum() / 2)


def _shares(
    source: NDArray[np.int64], target: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both histograms normalised to sum 1 and padded to one length."""
    length = max(len(source), len(target))
    p, q = (np.pad(h / h.sum(), (0, length - len(h))) for h in (source, target))
    return p, q
