"""Which distances real molecules have from the reference: the range for as many as a file has.

Distances of few molecules are large by themselves. A distance within the range of as many real
molecules does not tell a file from real data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.chemistry.geometry import PERIODS, GeometryTypes, code_of
from molgen_energy.errors import counted
from molgen_energy.metrics.accumulator import JACKKNIFE_GROUPS, MAX_VALUES
from molgen_energy.metrics.distances.comparison import (
    MIN_MOLECULES,
    Comparison,
    compare_moments,
    distance_key,
)
from molgen_energy.metrics.distances.fcd import Moments
from molgen_energy.metrics.distances.mmd import kernel_sums, kernel_width, mmd_of_sums
from molgen_energy.metrics.molecule_values import MoleculeValues, TypeValues
from molgen_energy.metrics.statistics import RealRange

FCD_KEYS = ("fcd", "fcd_infinite")
"""Distances whose size is the number of distinct valid molecules."""
DESCRIPTOR_KEYS = tuple(distance_key("wasserstein", key) for key in DESCRIPTORS)
"""Distances whose size is the number of molecules with descriptors, the complete ones."""

_BLOCKS = 100  # parts of all real molecules that draws are made of
_DRAWS = 200
_FCD_DRAWS = 16  # each takes about half a second
_POINTS_PER_WIDTH = 16  # for kernels; the error of the range is far below its own uncertainty
_PLACES = 500  # where distribution functions are compared


class RealRanges(Protocol):
    """The ranges of all distances for any number of molecules."""

    def at(self, key: str, count: int) -> RealRange | None:
        """The range of a distance for `count` molecules; None where it is not known."""
        ...

    def limits(self, key: str) -> tuple[int, int]:
        """The smallest and the largest number of molecules with a range."""
        ...


@dataclass(frozen=True)
class StoredRanges:
    """Ranges at some numbers of molecules, interpolated linearly in the number's logarithm."""

    counts: NDArray[np.int64]  # (N,), ascending
    ranges: dict[str, NDArray[np.float64]]
    """2.5, 50 and 97.5 % quantiles of each distance, (N, 3); NaN where undefined."""

    def at(self, key: str, count: int) -> RealRange | None:
        """The range of a distance for `count` molecules; None outside of `limits`."""
        least, most = self.limits(key)
        if not least <= count <= most:
            return None
        known = np.isfinite(self.ranges[key]).all(axis=1)
        x = np.log(self.counts[known])
        # Distances fall about as 1/n or 1/√n: their product with √n is closer to a straight line.
        columns = self.ranges[key][known].T * np.exp(x / 2)
        low, median, high = (
            float(np.interp(math.log(count), x, column)) / math.sqrt(count) for column in columns
        )
        return RealRange(median, (low, high))

    @classmethod
    def of(
        cls, real: ResampledRanges, counts: Sequence[int], draws: int, fcd_draws: int
    ) -> StoredRanges:
        """Ranges at some numbers of molecules, from so many draws of each.

        Molecules are divided into new blocks for every 100 draws.
        """
        found: list[dict[str, RealRange]] = []
        for count in counts:
            parts = [real.draw(count, 100, seed) for seed in range(draws // 100)]
            values = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            if count <= real.limits(DESCRIPTOR_KEYS[0])[1]:
                parts = [real.draw_descriptors(count, 100, seed) for seed in range(draws // 100)]
                values |= {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            if count <= real.limits(FCD_KEYS[0])[1]:
                values |= real.draw_fcd(count, fcd_draws)
            found.append(ranges_of_draws(values))
        nothing = RealRange(math.nan, (math.nan, math.nan))
        ranges = {}
        for key in dict.fromkeys(key for at_count in found for key in at_count):
            each = [at_count.get(key, nothing) for at_count in found]
            ranges[key] = np.array([[r.interval[0], r.median, r.interval[1]] for r in each])
        return cls(np.array(counts), ranges)

    def limits(self, key: str) -> tuple[int, int]:
        """The smallest and the largest number of molecules with a range."""
        if key not in self.ranges:
            return 1, 0
        defined = self.counts[np.isfinite(self.ranges[key]).all(axis=1)]
        return (int(defined[0]), int(defined[-1])) if len(defined) else (1, 0)


@dataclass
class ResampledRanges:
    """Ranges by dividing real molecules at random into two sets, as often as asked for.

    The distance of a set of n molecules from a set of as many as the reference has is what a file
    of n real molecules would have: both sets are random, so a file that is real lies within the
    range with a probability of 95 %.
    """

    molecules: MoleculeValues
    """Real molecules, of the reference and others."""
    activations: NDArray[np.float32]
    """ChemNet's activations of real molecules, (V, 512); V may be 0."""
    reference: int
    """Number of molecules of the reference, or of those that are kept."""
    reference_activations: int
    types: GeometryTypes | None
    """Geometry types to compare; None skips geometry."""
    _found: dict[tuple[str, int], dict[str, RealRange]] = field(default_factory=dict)

    def limits(self, key: str) -> tuple[int, int]:
        """The smallest and the largest number of molecules with a range."""
        if key in FCD_KEYS:
            total, reference = len(self.activations), self.reference_activations
        else:
            chosen = np.arange(len(self.molecules))
            if key in DESCRIPTOR_KEYS:
                chosen = self._described
            total, reference = len(chosen), int((chosen < self.reference).sum())
            if len(np.unique(self.molecules.independent[chosen])) < 2 * MIN_MOLECULES:
                return 1, 0
        most = total - reference
        if 4 * reference > total:
            most = max(most, reference * total // (4 * reference - total))
        return MIN_MOLECULES, most

    def at(self, key: str, count: int) -> RealRange | None:
        """The range of a distance for `count` molecules; None outside of `limits`."""
        low, high = self.limits(key)
        if not low <= count <= high:
            return None
        if key in FCD_KEYS:
            draw, draws = self.draw_fcd, _FCD_DRAWS
        else:
            draw, draws = self.draw, _DRAWS
            if key in DESCRIPTOR_KEYS:
                draw = self.draw_descriptors
        name = draw.__name__
        if (name, count) not in self._found:
            self._found[name, count] = ranges_of_draws(draw(count, draws))
        return self._found[name, count].get(key)

    def draw(self, count: int, draws: int, seed: int = 0) -> dict[str, NDArray[np.float64]]:
        """Distances of random sets of `count` real molecules from random references, (draws,).

        All molecules are divided into blocks. A set has the first molecules of some blocks, a
        reference has other blocks, so sums over blocks suffice. MMD has one bandwidth for all
        draws.
        """
        rng = np.random.default_rng(seed)
        count, others = _sizes_of_draws(count, self.reference, len(self.molecules))
        plan = _Plan.random(self.molecules.independent, count, others, draws, rng)
        found = {}
        for kind in () if self.types is None else self.types.types:
            by_type = self.molecules.geometry.get(kind, {})
            parts: dict[str, list[NDArray[np.float64]]] = {}
            for name in self.types.types[kind] if self.types is not None else ():
                values = by_type.get(code_of(kind, name))
                if values is None:
                    continue
                for label, row in _draw_type(values, plan, PERIODS.get(kind), rng).items():
                    parts.setdefault(distance_key(label, kind), []).append(row)
            for key, rows in parts.items():
                found[key] = _mean_of_defined(np.array(rows))
        sizes = np.zeros((len(self.molecules), int(self.molecules.sizes.max()) + 1))
        sizes[np.arange(len(sizes)), self.molecules.sizes] = 1
        difference = plan.difference(plan.sums(sizes))
        found["sizes"] = np.abs(difference.cumsum(axis=1)).sum(axis=1)
        difference = plan.difference(plan.sums(self.molecules.elements.astype(np.float64)))
        found["elements"] = np.abs(difference).sum(axis=1) / 2
        return found

    @cached_property
    def _described(self) -> NDArray[np.int64]:
        """The molecules with descriptors."""
        return np.flatnonzero(np.isfinite(self.molecules.descriptors).any(axis=1))

    def draw_descriptors(
        self, count: int, draws: int, seed: int = 0
    ) -> dict[str, NDArray[np.float64]]:
        """Distances of the descriptors of random sets from random references, (draws,).

        As `draw`, of molecules that have descriptors.
        """
        rng = np.random.default_rng(seed)
        chosen = self._described
        reference = int((chosen < self.reference).sum())
        count, others = _sizes_of_draws(count, reference, len(chosen))
        plan = _Plan.random(self.molecules.independent[chosen], count, others, draws, rng)
        columns = self.molecules.descriptors[chosen].T
        found = {}
        for key, values in zip(DESCRIPTOR_KEYS, columns, strict=True):
            known = np.flatnonzero(np.isfinite(values))
            if len(known):
                of_set = known[plan.is_first[known]]
                value = np.concatenate([values[of_set], values[known]])
                row = np.concatenate([plan.block[of_set], plan.number + plan.block[known]])
                found[key] = _draw_wasserstein(value, row, plan)
        return found

    def draw_fcd(self, count: int, draws: int, seed: int = 0) -> dict[str, NDArray[np.float64]]:
        """FCD and its extrapolation for random sets of `count` from random references, (draws,)."""
        rng = np.random.default_rng(seed)
        count, others = _sizes_of_draws(count, self.reference_activations, len(self.activations))
        found: dict[str, list[float]] = {key: [] for key in FCD_KEYS}
        for _ in range(draws):
            order = rng.permutation(len(self.activations))
            source, target = (
                _moments(self.activations[chosen])
                for chosen in (order[:count], order[count : count + others])
            )
            for key, estimate in compare_moments(source, target).items():
                found[key].append(math.nan if estimate.value is None else estimate.value)
        return {key: np.array(values) for key, values in found.items()}


def _sizes_of_draws(count: int, reference: int, total: int) -> tuple[int, int]:
    """Sizes of the set and of the reference in a draw.

    A reference that has no other real molecules beside it becomes smaller by those of the set. Then
    the set becomes larger, by as much as keeps 1/n + 1/m, which distances of two random sets of
    real molecules depend on.
    """
    if count + reference <= total:
        return count, reference
    harmonic = count * reference / (count + reference)
    size = round(total / 2 - math.sqrt(max(0.0, total**2 / 4 - harmonic * total)))
    return size, total - size


def add_ranges(comparison: Comparison, ranges: RealRanges) -> list[str]:
    """Give every distance the range of as many real molecules; notes on those without."""
    unknown: dict[tuple[int, int, int], None] = {}
    for key, estimate in comparison.estimates.items():
        if estimate.value is None:
            continue
        found = ranges.at(key, estimate.count)
        comparison.estimates[key] = replace(estimate, real=found)
        low, high = ranges.limits(key)
        if low <= high and not low <= estimate.count <= high:
            unknown[estimate.count, low, high] = None
    return [
        f"no range of real molecules for distances of {counted(count, 'molecules')}: the reference "
        f"allows {low:,} to {high:,}"
        for count, low, high in unknown
    ]


def ranges_of_draws(draws: dict[str, NDArray[np.float64]]) -> dict[str, RealRange]:
    """The range of each distance from random draws (D,); none where draws are undefined.

    Of at least 100 draws it is their quantiles, else Student's prediction interval for one more.
    """
    found = {}
    for key, values in draws.items():
        if np.isnan(values).any():
            continue
        middle = float(np.median(values))
        if len(values) >= 100:
            low, high = np.quantile(values, [0.025, 0.975]).tolist()
        else:
            from scipy.special import stdtrit

            spread = float(np.std(values, ddof=1)) * math.sqrt(1 + 1 / len(values))
            half = float(stdtrit(len(values) - 1, 0.975)) * spread
            low, high = middle - half, middle + half
        found[key] = RealRange(middle, (low, high))
    return found


@dataclass(frozen=True)
class _Plan:
    """Random blocks of molecules, and which of them make each of D draws."""

    block: NDArray[np.int64]
    """The block of each molecule, (M,)."""
    is_first: NDArray[np.bool_]
    """Whether a molecule is among the first of its block, which make sets, (M,)."""
    source: NDArray[np.int64]
    """The jackknife group of each block in the set of each draw, or -1, (D, B)."""
    target: NDArray[np.int64]
    """The same in the reference of each draw, (D, B)."""

    @classmethod
    def random(
        cls,
        independent: NDArray[np.uint64],
        count: int,
        reference: int,
        draws: int,
        rng: np.random.Generator,
    ) -> _Plan:
        """Blocks of molecules for sets of `count` and references of `reference`.

        Molecules with equal numbers of `independent` (M,) stand in one block.
        """
        total = len(independent)
        numbers, unit = np.unique(independent, return_inverse=True)
        number = min(_BLOCKS, len(numbers) // 2)
        least = max(min(2 * JACKKNIFE_GROUPS, number // 2), math.ceil(count / (total // number)))
        # As many blocks as divide the number of molecules with the smallest remainder.
        possible = np.arange(least, max(least, number // 2) + 1)
        each = np.rint(count / possible).astype(np.int64)
        best = int(np.abs(each * possible - count).argmin())
        needed, first = int(possible[best]), int(each[best])
        others = min(number - needed, max(1, round(reference * number / total)))
        place = rng.permutation(len(numbers))[unit]
        block = place % number
        # The rank of each molecule within its block.
        ascending = np.lexsort((place, block))
        rank = np.empty(total, np.int64)
        rank[ascending] = np.arange(total) - np.searchsorted(block[ascending], block[ascending])
        order = np.argsort(rng.random((draws, number)), axis=1)
        source, target = np.full((2, draws, number), -1)
        rows = np.arange(draws)[:, None]
        source[rows, order[:, :needed]] = np.arange(needed) % JACKKNIFE_GROUPS
        target[rows, order[:, needed : needed + others]] = np.arange(others) % JACKKNIFE_GROUPS
        return cls(block, rank < first, source, target)

    @property
    def number(self) -> int:
        """How many blocks there are."""
        return int(self.source.shape[1])

    @property
    def shares(self) -> tuple[float, float]:
        """Share of all blocks in a set and in a reference."""
        return float(np.mean(self.source[0] >= 0)), float(np.mean(self.target[0] >= 0))

    @cached_property
    def groups(self) -> NDArray[np.float64]:
        """Which rows make each group of the set and of the reference, 0 or 1, (D, 2·10, 2·B).

        Rows are the first molecules of each block, then all molecules of each block.
        """
        numbers = np.arange(JACKKNIFE_GROUPS)[:, None]
        draws, number = self.source.shape
        found = np.zeros((draws, 2 * JACKKNIFE_GROUPS, 2 * number))
        found[:, :JACKKNIFE_GROUPS, :number] = self.source[:, None] == numbers
        found[:, JACKKNIFE_GROUPS:, number:] = self.target[:, None] == numbers
        return found

    def difference(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Difference of the shares of columns in set and reference, (D, C); NaN for an empty set.

        Parameters
        ----------
        counts
            Of the first molecules of each block, then of all of each block, (2·B, C).
        """
        number = self.source.shape[1]
        ours = (self.source >= 0).astype(np.float64) @ counts[:number]
        theirs = (self.target >= 0).astype(np.float64) @ counts[number:]
        with np.errstate(invalid="ignore"):
            difference: NDArray[np.float64] = ours / ours.sum(axis=1, keepdims=True)
            difference -= theirs / theirs.sum(axis=1, keepdims=True)
        return difference

    def sums(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the rows of `groups`, (2·B, C), of the counts of each molecule, (M, C)."""
        number = self.source.shape[1]
        found = np.zeros((2 * number, counts.shape[1]))
        np.add.at(found, self.block[self.is_first], counts[self.is_first])
        np.add.at(found, number + self.block, counts)
        return found


def _draw_type(
    values: TypeValues, plan: _Plan, period: float | None, rng: np.random.Generator
) -> dict[str, NDArray[np.float64]]:
    """The distances of one geometry type in each draw, (D,); NaN for an empty set."""
    block, is_first = plan.block[values.molecule], plan.is_first[values.molecule]
    # Sets and references have at most `MAX_VALUES` random values.
    share = plan.shares
    chance = rng.random(len(block))
    of_set = is_first & (chance * max(1, is_first.sum()) * share[0] < MAX_VALUES)
    of_reference = chance * len(block) * share[1] < MAX_VALUES
    number = plan.number
    value = np.concatenate([values.value[of_set], values.value[of_reference]])
    row = np.concatenate([block[of_set], number + block[of_reference]])
    groups = plan.groups
    width = kernel_width(values.value)
    of_blocks = kernel_sums(value, row, 2 * number, width, _POINTS_PER_WIDTH)
    smoothed = (groups.reshape(-1, 2 * number) @ of_blocks).reshape(groups.shape)
    sums = smoothed @ groups.transpose(0, 2, 1)
    sizes = groups @ np.bincount(row, minlength=2 * number)
    ours = (np.arange(2 * JACKKNIFE_GROUPS) < JACKKNIFE_GROUPS).astype(np.float64)
    return {
        "mmd": mmd_of_sums(sums, sizes, ours, 1 - ours, biased=True),
        "mmd_reference": mmd_of_sums(sums, sizes, ours, 1 - ours),
        "wasserstein": _draw_wasserstein(value, row, plan, period),
    }


def _draw_wasserstein(
    value: NDArray[np.float32], row: NDArray[np.int64], plan: _Plan, period: float | None = None
) -> NDArray[np.float64]:
    """The first Wasserstein distance in each draw, (D,), of numbers of the rows of blocks, (V,)."""
    place = np.linspace(0, len(value) - 1, _PLACES).astype(np.int64)
    edges = np.unique(np.sort(value)[place]).astype(np.float64)
    column = np.searchsorted(edges, value)
    counts = np.bincount(row * len(edges) + column, minlength=2 * plan.number * len(edges))
    shares = plan.difference(counts.reshape(2 * plan.number, -1).astype(np.float64))
    return _transport(shares.cumsum(axis=1), np.diff(edges), period)


def _transport(
    difference: NDArray[np.float64], gaps: NDArray[np.float64], period: float | None
) -> NDArray[np.float64]:
    """∫|F − G| of differences of distribution functions at some places, (D, E), E - 1 gaps.

    On a circle, the minimum over c of ∫|F − G − c|.
    """
    if period is not None:
        # The rest of the circle, where the difference is zero.
        difference = np.concatenate([difference, np.zeros((len(difference), 1))], axis=1)
        gaps = np.append(gaps, period - gaps.sum())
        weights = np.append(gaps, 0.0) / 2 + np.append(0.0, gaps) / 2
        order = np.argsort(difference, axis=1)
        below = weights[order].cumsum(axis=1)
        middle = np.argmax(below >= weights.sum() / 2, axis=1)[:, None]
        difference = difference - np.take_along_axis(
            difference, np.take_along_axis(order, middle, axis=1), axis=1
        )
    size = np.abs(difference)
    integral: NDArray[np.float64] = ((size[:, 1:] + size[:, :-1]) / 2 * gaps).sum(axis=1)
    return integral


def _mean_of_defined(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over types, (T, D), of those that are defined; NaN where none is."""
    defined = np.isfinite(rows)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.where(defined, rows, 0).sum(axis=0) / defined.sum(axis=0)
    return mean


def _moments(activations: NDArray[np.float32]) -> Moments:
    """Moments of activations (V, 512) in random order, by jackknife group."""
    moments = Moments()
    moments.add(activations.astype(np.float64), np.arange(len(activations)) % JACKKNIFE_GROUPS)
    return moments
