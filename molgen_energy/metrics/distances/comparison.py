"""Distances between the distributions of two sets of molecules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.geometry import PERIODS, GeometryTypes, code_of
from molgen_energy.metrics.accumulator import (
    JACKKNIFE_GROUPS,
    EvaluationAccumulator,
    GeometrySamples,
    ValueSample,
)
from molgen_energy.metrics.distances.fcd import Moments
from molgen_energy.metrics.distances.histograms import total_variation, wasserstein_of_counts
from molgen_energy.metrics.distances.mmd import mmd_leave_groups_out
from molgen_energy.metrics.distances.wasserstein import wasserstein_leave_groups_out
from molgen_energy.metrics.statistics import Estimate, jackknife_interval

_MIN_MOLECULES = 2 * JACKKNIFE_GROUPS  # for an interval


@dataclass
class Distributions:
    """Geometry, composition and FCD moments of a set of molecules, by jackknife group."""

    geometry: GeometrySamples
    sizes: NDArray[np.int64]
    """Histogram of the numbers of atoms, (groups, S)."""
    elements: NDArray[np.int64]
    """Histogram of atomic numbers, (groups, 119)."""
    moments: Moments | None = None

    def values(self, kind: str, name: str) -> ValueSample:
        """The sample of a geometry type; empty if there is none."""
        return self.geometry.get(kind, {}).get(code_of(kind, name), ValueSample())

    @classmethod
    def of(cls, accumulator: EvaluationAccumulator, moments: Moments | None) -> Distributions:
        """The distributions that were accumulated from a file."""
        return cls(accumulator.geometry, accumulator.sizes, accumulator.elements, moments)


@dataclass
class Comparison:
    """Distances of one set of molecules from another."""

    estimates: dict[str, Estimate] = field(default_factory=dict)
    by_type: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """MMD and Wasserstein distance for each kind and type of geometry."""
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Types of each kind without instances in one of the sets; the means exclude them."""


def compare(
    source: Distributions,
    target: Distributions,
    types: GeometryTypes | None,
    composition: bool = True,
    source_groups: NDArray[np.bool_] | None = None,
    target_groups: NDArray[np.bool_] | None = None,
) -> Comparison:
    """Distances of `source` from `target`, with jackknife intervals for the sampling of `source`.

    Parameters
    ----------
    types
        Geometry types to compare; None skips geometry.
    composition
        Whether to compare sizes and elements.
    source_groups, target_groups
        Jackknife groups to include, (groups,); all by default.
    """
    if source_groups is None:
        source_groups = np.ones(len(source.sizes), bool)
    if target_groups is None:
        target_groups = np.ones(len(target.sizes), bool)
    result = Comparison()
    molecules = int(source.sizes[source_groups].sum())
    group_numbers = np.flatnonzero(source_groups)
    for kind in () if types is None else types.types:
        pairs, missing = _common_types(source, target, kind, types, source_groups, target_groups)
        result.missing[kind] = missing
        result.by_type[kind] = {}
        tables = {}
        transport = partial(wasserstein_leave_groups_out, period=PERIODS.get(kind))
        for label, distance in (("mmd", mmd_leave_groups_out), ("wasserstein", transport)):
            # Distances of each type without each group first, then their means over types, since
            # one group may contain all instances of a type.
            rows = {
                name: distance(values, group, other, group_numbers.tolist())
                for name, (values, group, other) in pairs.items()
            }
            tables[label] = {name: row[0] for name, row in rows.items()}
            key = f"{label}_{kind.replace(' ', '_')}"
            result.estimates[key] = _mean_over_types(list(rows.values()), molecules)
        result.by_type[kind] = {
            name: (tables["mmd"][name], tables["wasserstein"][name]) for name in pairs
        }
    if composition:
        target_sizes = target.sizes[target_groups].sum(axis=0)
        target_elements = target.elements[target_groups].sum(axis=0)

        def sizes_distance(included: NDArray[np.bool_]) -> float | None:
            counts = source.sizes[included].sum(axis=0)
            if not counts.sum() or not target_sizes.sum():
                return None
            return wasserstein_of_counts(counts, target_sizes)

        def elements_distance(included: NDArray[np.bool_]) -> float | None:
            counts = source.elements[included].sum(axis=0)
            if not counts.sum() or not target_elements.sum():
                return None
            return total_variation(counts, target_elements)

        result.estimates["sizes"] = _jackknife(sizes_distance, source_groups, molecules)
        result.estimates["elements"] = _jackknife(elements_distance, source_groups, molecules)
    if source.moments is not None and target.moments is not None:
        result.estimates["fcd"] = _fcd(source.moments, target.moments, source_groups, target_groups)
    return result


def _jackknife(
    statistic: Callable[[NDArray[np.bool_]], float | None],
    groups: NDArray[np.bool_],
    molecules: int,
) -> Estimate:
    """A statistic of the included groups with its interval from leaving out one at a time."""
    value = statistic(groups)
    if value is None:
        return Estimate(None, note="nothing to compare")
    if molecules < _MIN_MOLECULES:
        return Estimate(value, None, molecules)
    without = []
    for g in np.flatnonzero(groups):
        included = groups.copy()
        included[g] = False
        without.append(statistic(included))
    defined = [v for v in without if v is not None]
    interval = jackknife_interval(value, defined) if len(defined) == len(without) else None
    return Estimate(value, interval, molecules)


TypeSamples = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]
"""Values of the source, the group of each, and values of the target."""


def _common_types(
    source: Distributions,
    target: Distributions,
    kind: str,
    types: GeometryTypes | None,
    source_groups: NDArray[np.bool_],
    target_groups: NDArray[np.bool_],
) -> tuple[dict[str, TypeSamples], list[str]]:
    """Samples of each type that both sets have, and the names of the other types."""
    pairs, missing = {}, []
    for name in () if types is None else types.types[kind]:
        ours, theirs = source.values(kind, name), target.values(kind, name)
        inside, other = source_groups[ours.group], theirs.value[target_groups[theirs.group]]
        if inside.any() and len(other):
            pairs[name] = (ours.value[inside], ours.group[inside], other)
        else:
            missing.append(name)
    return pairs, missing


def _mean_over_types(rows: list[list[float]], molecules: int) -> Estimate:
    if not rows:
        return Estimate(None, note="no common type")
    values = np.array(rows)
    # The mean without a group excludes types that have no instance in the other groups.
    defined = np.isfinite(values).any(axis=0)
    means = np.nanmean(values[:, defined], axis=0).tolist()
    if molecules < _MIN_MOLECULES or len(means) < 3 or not defined.all():
        return Estimate(means[0], None, molecules)
    return Estimate(means[0], jackknife_interval(means[0], means[1:]), molecules)


def _fcd(
    source: Moments,
    target: Moments,
    source_groups: NDArray[np.bool_],
    target_groups: NDArray[np.bool_],
) -> Estimate:
    if source.count[source_groups].sum() < 2 or target.count[target_groups].sum() < 2:
        return Estimate(None, note="fewer than two valid molecules")
    reference = target.gaussian(target_groups)
    return _jackknife(
        lambda included: source.gaussian(included).distance(reference),
        source_groups,
        int(source.count[source_groups].sum()),
    )
