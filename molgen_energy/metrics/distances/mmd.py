"""Squared maximum mean discrepancy of two samples of numbers.

`mmd` follows JODO's protocol: kernels that depend on both samples, and the biased estimate.
`mmd_between_groups` has the kernels of the reference alone, and no bias from the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KERNELS = 5
_POINTS_PER_WIDTH = 64  # grid points for each standard deviation of the narrowest kernel
_REACH = 16  # kernels are below 1e-7 beyond this many square roots of the width w
_MAX_POINTS = 1 << 22  # of a grid; more would take gigabytes


def mmd(source: NDArray[np.floating[Any]], target: NDArray[np.floating[Any]]) -> float:
    r"""Squared maximum mean discrepancy of two samples, with five Gaussian kernels.

    .. math:: \overline{K}(x, x) + \overline{K}(y, y) - 2\,\overline{K}(x, y), \qquad
              K(a, b) = \sum_{i=0}^{4} \exp\Bigl(-\frac{(a - b)^2}{2^i\,w}\Bigr)

    where each mean is over all pairs (the biased estimate) and w is the mean squared difference of
    distinct members of both samples together, divided by 4 (JODO: Huang et al., 2023; A. Gretton et
    al., J. Mach. Learn. Res. 13, 723, 2012).

    The sums over pairs are a convolution: both samples are spread over a grid by cubic
    interpolation and the kernel is applied by fast Fourier transform. That takes O(n) memory and
    differs from the double sum by less than 1e-7.

    Parameters
    ----------
    source, target
        (n,) and (m,), neither empty.
    """
    return mmd_leave_groups_out(source, np.zeros(len(source), np.uint8), target, [])[0]


def mmd_leave_groups_out(
    source: NDArray[np.floating[Any]],
    group: NDArray[np.uint8],
    target: NDArray[np.floating[Any]],
    left_out: Iterable[int],
) -> list[float]:
    """`mmd` of the whole source, then without each of some groups, for the jackknife.

    Parameters
    ----------
    source, group
        Numbers and the group of each, (n,).
    target
        (m,).
    left_out
        Groups to leave out, one at a time. The kernel widths stay those of all numbers.

    Returns
    -------
    One value more than `left_out`; NaN where no number remains.
    """
    left_out = list(left_out)
    both = np.concatenate([source, target]).astype(np.float64)
    count = len(both)
    both -= both.mean()
    spread = 2 * float(both @ both) / (count - 1) if count > 1 else 0.0
    width = spread / 2 ** (_KERNELS // 2)
    if width <= 0 or np.ptp(both) == 0:
        return [0.0] + [0.0 if (group != g).any() else math.nan for g in left_out]
    step = math.sqrt(width / 2) / _POINTS_PER_WIDTH
    places = (both - both.min()) / step
    size = int(places.max()) + 4
    source_places, target_places = places[: len(source)], places[len(source) :]
    whole = _spread(source_places, size)
    density = _spread(target_places, size) / len(target)
    lag = (np.arange(size) * step) ** 2
    kernel = sum(np.exp(-lag / (width * 2**i)) for i in range(_KERNELS))
    found = [_quadratic_form(whole / len(source) - density, kernel)]
    for g in left_out:
        inside = group == g
        rest = len(source) - int(inside.sum())
        if rest == 0:
            found.append(math.nan)
            continue
        remaining = (whole - _spread(source_places[inside], size)) / rest
        found.append(_quadratic_form(remaining - density, kernel))
    return found


def mmd_between_groups(
    source: NDArray[np.floating[Any]],
    group: NDArray[np.uint8],
    target: NDArray[np.floating[Any]],
    target_group: NDArray[np.uint8],
    left_out: Iterable[int],
) -> list[float]:
    r"""Squared maximum mean discrepancy with the kernels of the target, without bias.

    The kernels are those of `mmd`, with the mean squared difference of members of the target alone
    as 4 w: all sources are compared by one measure. Means of K within a sample are over pairs of
    different groups (an unbiased estimate: A. Gretton et al., J. Mach. Learn. Res. 13, 723, 2012,
    eq. 3, where groups stand for single numbers). Groups are independent of each other, and numbers
    of one molecule, which are not, stand in one group. It can be negative. Two samples of the same
    numbers are not independent; they are at distance 0.

    Parameters
    ----------
    source, group
        Numbers and the group of each, (n,).
    target, target_group
        The same of the target, (m,). If all are of one group, pairs are of distinct numbers.
    left_out
        Groups of the source to leave out, one at a time.

    Returns
    -------
    One value more than `left_out`; NaN where no number remains.
    """
    left_out = list(left_out)
    if np.array_equal(np.sort(source), np.sort(target)):
        return [0.0] * (1 + len(left_out))
    numbers, source_row = np.unique(group, return_inverse=True)
    target_row = np.unique(target_group, return_inverse=True)[1]
    row = np.concatenate([source_row, len(numbers) + target_row])
    sizes = np.bincount(row).astype(np.float64)
    both = np.concatenate([source, target])
    sums = kernel_sums(both, row, len(sizes), kernel_width(target))
    ours = np.arange(len(sums)) < len(numbers)
    padded = np.append(numbers.astype(np.int64), np.full(len(sums) - len(numbers), -1))
    kept = np.array([ours, *(ours & (padded != g) for g in left_out)], np.float64)
    found: list[float] = mmd_of_sums(sums, sizes, kept, (~ours).astype(np.float64)).tolist()
    return found


def mmd_of_sums(
    sums: NDArray[np.float64],
    sizes: NDArray[np.float64],
    source: NDArray[np.float64],
    target: NDArray[np.float64],
    biased: bool = False,
) -> NDArray[np.float64]:
    """Estimates, (D,), from sums of kernels over pairs of groups.

    Parameters
    ----------
    sums, sizes
        Σ K(a, b) over a of group i and b of group j, (R, R) or (D, R, R); members, (R,) or (D, R).
    source, target
        Which groups make the source, and which the target, 0 or 1, (D, R) or (R,).
    biased
        Take means over all pairs, as JODO does, not over those of different groups.

    Returns
    -------
    NaN where a mean has no pair.
    """

    def mean(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        total: NDArray[np.float64] = np.einsum("...i,...ij,...j->...", a, sums, b)
        pairs = (a * sizes).sum(axis=-1) * (b * sizes).sum(axis=-1)
        if not biased and a is b:
            alone = np.count_nonzero(a * sizes, axis=-1) == 1
            within = np.einsum("...ii->...i", sums)
            # Of a single group, leave out each number's pair with itself: K(a, a) = 5.
            left_out = np.where(alone[..., None], _KERNELS * sizes, within)
            pairs_left_out = np.where(alone[..., None], sizes, sizes**2)
            total, pairs = (
                total - (a * left_out).sum(axis=-1), pairs - (a * pairs_left_out).sum(axis=-1)
            )  # fmt: skip
        found: NDArray[np.float64] = np.where(pairs > 0, total / pairs, np.nan)
        return found

    with np.errstate(divide="ignore", invalid="ignore"):
        return mean(source, source) + mean(target, target) - 2 * mean(source, target)


def kernel_width(values: NDArray[np.floating[Any]]) -> float:
    """w of the kernels for a sample alone: a quarter of the mean squared difference of members."""
    return 2 * float(np.var(values, dtype=np.float64, ddof=1)) / 4 if len(values) > 1 else 0.0


def kernel_sums(
    values: NDArray[np.floating[Any]],
    row: NDArray[np.int64],
    rows: int,
    width: float,
    points: int = _POINTS_PER_WIDTH,
) -> NDArray[np.float64]:
    """Σ K(a, b) over a of row i and b of row j, (R, R), by convolution on a grid.

    Parameters
    ----------
    values, row
        Numbers and the row of each, (V,).
    rows
        R, the number of rows.
    width
        w of the kernels. Without a width, K is 5 for equal numbers and else 0.
    points
        Grid points for each standard deviation of the narrowest kernel.
    """
    if width <= 0:
        _, place = np.unique(values, return_inverse=True)
        counts = np.zeros((rows, place.max() + 1))
        np.add.at(counts, (row, place), 1)
        return _KERNELS * counts @ counts.T
    close = _close_gaps(values, _REACH * math.sqrt(width))
    step = max(math.sqrt(width / 2) / points, np.ptp(close) / _MAX_POINTS)
    places = close / step
    length = int(places.max()) + 4
    densities = _spread(places + length * row, rows * length).reshape(rows, length)
    size = _transform_length(2 * length)
    lag = step * np.minimum(np.arange(size), size - np.arange(size))
    kernel = np.fft.rfft(sum(np.exp(-(lag**2) / (width * 2**i)) for i in range(_KERNELS)))
    smooth = np.fft.irfft(np.fft.rfft(densities, size) * kernel, size)[:, :length]
    sums: NDArray[np.float64] = densities @ smooth.T
    return sums


def _close_gaps(values: NDArray[np.floating[Any]], longest: float) -> NDArray[np.float64]:
    """Numbers (V,) from 0 on, with gaps between neighbours of at most `longest`.

    A kernel is zero across such a gap, so outliers need no longer grid.
    """
    order = np.argsort(values, kind="stable")
    gaps = np.diff(values[order].astype(np.float64))
    close = np.zeros(len(values))
    close[order[1:]] = np.cumsum(np.minimum(gaps, longest))
    return close


def _quadratic_form(difference: NDArray[np.float64], kernel: NDArray[np.float64]) -> float:
    """Σ_ab w_a w_b K(a − b) for a difference of densities w on a grid (G,), K by lag (G,)."""
    size = _transform_length(2 * len(difference))
    correlation = np.fft.irfft(np.abs(np.fft.rfft(difference, size)) ** 2, size)[: len(difference)]
    return float(correlation[0] * kernel[0] + 2 * (correlation[1:] @ kernel[1:]))


def _transform_length(least: int) -> int:
    """The least product of powers of 2, 3 and 5 from a length on: others take longer."""
    odd: list[int] = [3**a * 5**b for a, b in product(range(32), range(20))]
    return min(part << (-(-least // part) - 1).bit_length() for part in odd if part < 2 * least)


def _spread(places: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Counts on a grid (size,) of points at `places`, in grid steps from 0.

    Each point is distributed over four grid points with Lagrange weights.
    """
    below = places.astype(np.int64)
    f = places - below
    weights = (
        -f * (f - 1) * (f - 2) / 6,
        (f + 1) * (f - 1) * (f - 2) / 2,
        -(f + 1) * f * (f - 2) / 2,
        (f + 1) * f * (f - 1) / 6,
    )
    grid = np.zeros(size)
    for k, weight in enumerate(weights):
        grid += np.bincount(below + k, weight, size)
    return grid
