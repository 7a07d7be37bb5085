"""Distances between the distributions of two sets of molecules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.geometry import PERIODS, GeometryTypes, code_of
from molgen_energy.metrics.accumulator import (
    JACKKNIFE_GROUPS,
    EvaluationAccumulator,
    GeometrySamples,
    ValueSample,
)
from molgen_energy.metrics.distances.fcd import MIN_EXTRAPOLATED, Moments, extrapolate
from molgen_energy.metrics.distances.histograms import total_variation, wasserstein_of_counts
from molgen_energy.metrics.distances.mmd import mmd_between_groups, mmd_leave_groups_out
from molgen_energy.metrics.distances.similarity import (
    SubstructureCounts,
    compare_substructures,
)
from molgen_energy.metrics.distances.wasserstein import wasserstein_leave_groups_out
from molgen_energy.metrics.statistics import Estimate, jackknife_interval

MIN_MOLECULES = 2 * JACKKNIFE_GROUPS
"""For an interval."""


@dataclass
class Distributions:
    """Geometry, composition, descriptors, FCD moments and substructures, by jackknife group."""

    geometry: GeometrySamples
    sizes: NDArray[np.int64]
    """Histogram of the numbers of atoms, (groups, S)."""
    elements: NDArray[np.int64]
    """Histogram of atomic numbers, (groups, 119)."""
    moments: Moments | None = None
    descriptors: dict[str, ValueSample] = field(default_factory=dict)
    """By key; empty where they were not computed."""
    substructures: SubstructureCounts | None = None

    @property
    def groups(self) -> list[int]:
        """The jackknife groups with molecules."""
        return np.flatnonzero(self.sizes.any(axis=1)).tolist()

    def values(self, kind: str, name: str) -> ValueSample:
        """The sample of a geometry type; empty if there is none."""
        return self.geometry.get(kind, {}).get(code_of(kind, name), ValueSample())

    def select(self, included: NDArray[np.bool_]) -> Distributions:
        """The distributions of some jackknife groups, without FCD moments.

        Parameters
        ----------
        included
            (groups,).
        """
        geometry = {
            kind: {code: sample.select(included) for code, sample in by_type.items()}
            for kind, by_type in self.geometry.items()
        }
        kept = included[:, None]
        descriptors = {key: part.select(included) for key, part in self.descriptors.items()}
        parts = self.substructures
        return Distributions(
            geometry,
            self.sizes * kept,
            self.elements * kept,
            descriptors=descriptors,
            substructures=None if parts is None else parts.select(included),
        )

    @classmethod
    def of(
        cls,
        accumulator: EvaluationAccumulator,
        moments: Moments | None,
        substructures: SubstructureCounts | None = None,
    ) -> Distributions:
        """The distributions that were accumulated from a file."""
        return cls(
            accumulator.geometry,
            accumulator.sizes,
            accumulator.elements,
            moments,
            accumulator.descriptors,
            substructures,
        )


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
) -> Comparison:
    """Distances of `source` from `target`, with jackknife intervals for the sampling of `source`.

    Parameters
    ----------
    types
        Geometry types to compare; None skips geometry.
    composition
        Whether to compare sizes and elements.
    """
    result = Comparison()
    molecules = int(source.sizes.sum())
    for kind in () if types is None else types.types:
        pairs, missing = _common_types(source, target, kind, types)
        result.missing[kind] = missing
        tables = {}
        for label, distance in _DISTANCES.items():
            # Distances of each type without each group first, then their means over types, since
            # one group may contain all instances of a type.
            rows = {
                name: distance(samples, source.groups, PERIODS.get(kind))
                for name, samples in pairs.items()
            }
            tables[label] = {name: row[0] for name, row in rows.items()}
            least = -math.inf if label == "mmd_reference" else 0.0
            estimate = _mean_over_types(list(rows.values()), molecules, least)
            result.estimates[distance_key(label, kind)] = estimate
        result.by_type[kind] = {
            name: (tables["mmd"][name], tables["wasserstein"][name]) for name in pairs
        }
    if composition:
        for key, distance_of in _COMPOSITION.items():
            ours: NDArray[np.int64] = getattr(source, key)
            whole, theirs = ours.sum(axis=0), getattr(target, key).sum(axis=0)
            if not whole.sum() or not theirs.sum():
                result.estimates[key] = Estimate(None, note="nothing to compare")
                continue
            without = [whole - ours[g] for g in source.groups]
            values = [distance_of(counts, theirs) for counts in (whole, *without) if counts.sum()]
            result.estimates[key] = _with_jackknife(values, molecules)
    for key, sample in source.descriptors.items():
        other = target.descriptors.get(key)
        if other is not None:
            groups = np.unique(sample.group).tolist()
            values = wasserstein_leave_groups_out(sample.value, sample.group, other.value, groups)
            result.estimates[distance_key("wasserstein", key)] = _with_jackknife(
                values, sample.count
            )
    if source.moments is not None and target.moments is not None:
        result.estimates |= compare_moments(source.moments, target.moments)
    if source.substructures is not None and target.substructures is not None:
        result.estimates |= compare_substructures(source.substructures, target.substructures)
    return result


def wasserstein_distance(
    source: Distributions, target: Distributions, kind: str, types: GeometryTypes
) -> Estimate:
    """The Wasserstein distance of a kind of geometry, as of `compare`, and nothing else."""
    pairs, _ = _common_types(source, target, kind, types)
    rows = [_wasserstein(pair, source.groups, PERIODS.get(kind)) for pair in pairs.values()]
    return _mean_over_types(rows, int(source.sizes.sum()), 0.0)


def _with_jackknife(values: list[float], molecules: int) -> Estimate:
    """A statistic, first of all groups and then without each, with its interval."""
    if molecules < MIN_MOLECULES or len(values) < 3:
        return Estimate(values[0], None, molecules)
    return Estimate(values[0], jackknife_interval(values[0], values[1:]), molecules)


_COMPOSITION = {"sizes": wasserstein_of_counts, "elements": total_variation}


class TypeSamples(NamedTuple):
    """Values of one geometry type, and the group of each."""

    source: NDArray[np.float32]
    group: NDArray[np.uint8]
    target: NDArray[np.float32]
    target_group: NDArray[np.uint8]


def _mmd(samples: TypeSamples, left_out: list[int], _: float | None) -> list[float]:
    return mmd_leave_groups_out(samples.source, samples.group, samples.target, left_out)


def _mmd_reference(samples: TypeSamples, left_out: list[int], _: float | None) -> list[float]:
    return mmd_between_groups(*samples, left_out)


def _wasserstein(samples: TypeSamples, left_out: list[int], period: float | None) -> list[float]:
    return wasserstein_leave_groups_out(
        samples.source, samples.group, samples.target, left_out, period
    )


_DISTANCES = {"mmd": _mmd, "mmd_reference": _mmd_reference, "wasserstein": _wasserstein}


def distance_key(label: str, kind: str) -> str:
    """The key of a distance (`mmd`, `mmd_reference`, `wasserstein`) of a kind of geometry or, for
    `wasserstein`, a descriptor."""
    return f"{label}_{kind.replace(' ', '_')}"


def _common_types(
    source: Distributions, target: Distributions, kind: str, types: GeometryTypes | None
) -> tuple[dict[str, TypeSamples], list[str]]:
    """Samples of each type that both sets have, and the names of the other types."""
    pairs, missing = {}, []
    for name in () if types is None else types.types[kind]:
        ours, theirs = source.values(kind, name), target.values(kind, name)
        if len(ours.value) and len(theirs.value):
            pairs[name] = TypeSamples(ours.value, ours.group, theirs.value, theirs.group)
        else:
            missing.append(name)
    return pairs, missing


def _mean_over_types(rows: list[list[float]], molecules: int, least: float) -> Estimate:
    values = np.array(rows)
    if not np.isfinite(values).any():
        return Estimate(None, note="no common type")
    # The mean without a group excludes types that have no instance in the other groups.
    defined = np.isfinite(values).any(axis=0)
    means = np.nanmean(values[:, defined], axis=0).tolist()
    if molecules < MIN_MOLECULES or len(means) < 3 or not defined.all():
        return Estimate(means[0], None, molecules)
    return Estimate(means[0], jackknife_interval(means[0], means[1:], least), molecules)


def compare_moments(source: Moments, target: Moments) -> dict[str, Estimate]:
    """FCD as it is, and extrapolated to sets of infinite size.

    The extrapolation is for independent sets; a set is at distance 0 from itself.
    """
    molecules = int(source.count.sum())
    if molecules < 2 or target.count.sum() < 2:
        nothing = Estimate(None, note="fewer than two valid molecules")
        return {"fcd": nothing, "fcd_infinite": nothing}
    reference = target.gaussian()
    values = [part.distance(reference) for part in source.without_groups()]
    found = {"fcd": _with_jackknife(values, molecules)}
    if molecules < MIN_EXTRAPOLATED:
        note = f"fewer than {MIN_EXTRAPOLATED} valid molecules"
        return found | {"fcd_infinite": Estimate(None, note=note)}
    whole = source.gaussian()
    if whole.count == reference.count and np.allclose(whole.mean, reference.mean, atol=1e-12):
        return found | {"fcd_infinite": Estimate(0.0, None, molecules)}
    of_halves = [whole.distance(half) for half in target.halves()]
    return found | {"fcd_infinite": extrapolate(values, of_halves, molecules)}
