"""First Wasserstein distance of two samples of numbers or angles."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray


def wasserstein(source: NDArray[np.floating[Any]], target: NDArray[np.floating[Any]]) -> float:
    """First Wasserstein distance of two samples, in their unit; neither is empty."""
    return wasserstein_leave_groups_out(source, np.zeros(len(source), np.uint8), target, [])[0]


def wasserstein_leave_groups_out(
    source: NDArray[np.floating[Any]],
    group: NDArray[np.uint8],
    target: NDArray[np.floating[Any]],
    left_out: Iterable[int],
    period: float | None = None,
) -> list[float]:
    """`wasserstein` of the whole source, then without each of some groups, for the jackknife.

    The distance is ∫|F − G|, computed from one sorting of all numbers. On a circle it is the
    minimum of ∫|F − G − c| over c (J. Delon, J. Salomon, A. Sobolevski, SIAM J. Appl. Math. 70,
    2239, 2010), where the best c is a median of F − G.

    Parameters
    ----------
    source, group
        Numbers and the group of each, (n,).
    target
        (m,).
    left_out
        Groups to leave out, one at a time.
    period
        Circumference of the circle, for angles. All numbers lie within one period.

    Returns
    -------
    One value more than `left_out`; NaN where no number remains.
    """
    both = np.concatenate([source, target]).astype(np.float64)
    order = np.argsort(both, kind="stable")
    gaps = np.diff(both[order])
    from_source = order < len(source)
    whole = np.cumsum(from_source)[:-1]
    target_share = (np.arange(1, len(both)) - whole) / len(target)
    if period is None:
        integral = _integral
    else:
        integral = partial(_integral_on_circle, rest=period - float(gaps.sum()))
    found = [integral(whole / len(source) - target_share, gaps)]
    label = np.full(len(both), -1, np.int16)
    label[from_source] = group[order[from_source]]
    for g in left_out:
        inside = np.cumsum(label == g)
        rest = len(source) - int(inside[-1])
        share = (whole - inside[:-1]) / max(1, rest)
        found.append(integral(share - target_share, gaps) if rest else math.nan)
    return found


def _integral(difference: NDArray[np.float64], gaps: NDArray[np.float64]) -> float:
    """∫|F − G| of step functions.

    Not a BLAS product, which would wait for its threads longer than it computes.
    """
    return float((np.abs(difference) * gaps).sum())


def _integral_on_circle(
    difference: NDArray[np.float64], gaps: NDArray[np.float64], rest: float
) -> float:
    """Minimum over c of ∫|F − G − c|; F − G is zero on the `rest` of the circle."""
    difference, gaps = np.append(difference, 0.0), np.append(gaps, rest)
    order = np.argsort(difference)
    below = np.cumsum(gaps[order])
    median = difference[order[np.searchsorted(below, below[-1] / 2)]]
    return _integral(difference - median, gaps)
