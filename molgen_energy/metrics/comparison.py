"""How far the distributions of one set of molecules are from those of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.geometry import PERIODS, GeometryTypes, code_of
from molgen_energy.metrics.distances import (
    jackknife,
    mmd_without,
    total_variation,
    wasserstein_of_counts,
    wasserstein_without,
)
from molgen_energy.metrics.fcd import Moments
from molgen_energy.metrics.findings import GROUPS, EvaluationAccumulator, Geometry, Values

_FEWEST = 2 * GROUPS  # molecules, for an interval


@dataclass(frozen=True)
class Measure:
    """A figure that is no rate: value and 95 % interval, None where it is not known."""

    value: float | None
    interval: tuple[float, float] | None = None
    count: int = 0
    """Molecules that it rests on."""
    note: str = ""
    """Why there is no value, or what restricts it."""


@dataclass
class Distributions:
    """What is compared: samples by type, histograms and moments, by group of molecules."""

    geometry: Geometry
    sizes: NDArray[np.int64]  # (groups, S)
    elements: NDArray[np.int64]  # (groups, 119)
    moments: Moments | None = None

    def values(self, kind: str, name: str) -> Values:
        """The sample of a type; empty where there is none."""
        return self.geometry.get(kind, {}).get(code_of(kind, name), Values())

    @classmethod
    def of(cls, findings: EvaluationAccumulator, moments: Moments | None) -> Distributions:
        """Those of a file."""
        return cls(findings.geometry, findings.sizes, findings.elements, moments)


@dataclass
class Comparison:
    """Distances of one set of molecules from another."""

    measures: dict[str, Measure] = field(default_factory=dict)
    by_type: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """For each kind and type of geometry, MMD and Wasserstein distance."""
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Types of each kind that one side has no instance of; they are in no mean."""


def compare(
    source: Distributions,
    target: Distributions,
    types: GeometryTypes | None,
    composition: bool = True,
    within: NDArray[np.bool_] | None = None,
    against: NDArray[np.bool_] | None = None,
) -> Comparison:
    """Distances of `source` from `target`, with intervals for the sampling of `source`.

    Parameters
    ----------
    types
        Of geometry; None leaves geometry out.
    composition
        Whether sizes and elements are compared.
    within, against
        Groups of the source and the target that count, (groups,); all by default.
    """
    if within is None:
        within = np.ones(len(source.sizes), bool)
    if against is None:
        against = np.ones(len(target.sizes), bool)
    found = Comparison()
    molecules = int(source.sizes[within].sum())
    numbers = np.flatnonzero(within)

    def measure(statistic: Callable[[NDArray[np.bool_]], float | None]) -> Measure:
        value = statistic(within)
        if value is None:
            return Measure(None, note="nothing to compare")
        if molecules < _FEWEST:
            return Measure(value, None, molecules)
        without = []
        for g in numbers:
            kept = within.copy()
            kept[g] = False
            without.append(statistic(kept))
        known = [v for v in without if v is not None]
        interval = jackknife(value, known) if len(known) == len(without) else None
        return Measure(value, interval, molecules)

    for kind in () if types is None else types.types:
        pairs, missing = _pairs(source, target, kind, types, within, against)
        found.missing[kind] = missing
        found.by_type[kind] = {}
        tables = {}
        transport = partial(wasserstein_without, period=PERIODS.get(kind))
        for label, distance in (("mmd", mmd_without), ("wasserstein", transport)):
            # Each type's distance without each group, then their means: a group may hold all
            # instances of a type.
            rows = {
                name: distance(values, group, other, numbers.tolist())
                for name, (values, group, other) in pairs.items()
            }
            tables[label] = {name: row[0] for name, row in rows.items()}
            key = f"{label}_{kind.replace(' ', '_')}"
            found.measures[key] = _mean_of_types(list(rows.values()), molecules)
        found.by_type[kind] = {
            name: (tables["mmd"][name], tables["wasserstein"][name]) for name in pairs
        }
    if composition:
        sizes, elements = target.sizes[against].sum(axis=0), target.elements[against].sum(axis=0)

        def of_sizes(kept: NDArray[np.bool_]) -> float | None:
            ours = source.sizes[kept].sum(axis=0)
            return wasserstein_of_counts(ours, sizes) if ours.sum() and sizes.sum() else None

        def of_elements(kept: NDArray[np.bool_]) -> float | None:
            ours = source.elements[kept].sum(axis=0)
            return total_variation(ours, elements) if ours.sum() and elements.sum() else None

        found.measures["sizes"] = measure(of_sizes)
        found.measures["elements"] = measure(of_elements)
    if source.moments is not None and target.moments is not None:
        found.measures["fcd"] = _fcd(source.moments, target.moments, within, against)
    return found


Pair = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]


def _pairs(
    source: Distributions,
    target: Distributions,
    kind: str,
    types: GeometryTypes | None,
    within: NDArray[np.bool_],
    against: NDArray[np.bool_],
) -> tuple[dict[str, Pair], list[str]]:
    """Values, their groups and the target's values, of each type; and the types that lack some."""
    pairs, missing = {}, []
    for name in () if types is None else types.types[kind]:
        ours, theirs = source.values(kind, name), target.values(kind, name)
        inside, other = within[ours.group], theirs.value[against[theirs.group]]
        if inside.any() and len(other):
            pairs[name] = (ours.value[inside], ours.group[inside], other)
        else:
            missing.append(name)
    return pairs, missing


def _mean_of_types(rows: list[list[float]], molecules: int) -> Measure:
    if not rows:
        return Measure(None, note="no type that both have")
    values = np.array(rows)
    # A type without instances when a group is left out is not in that mean.
    there = np.isfinite(values).any(axis=0)
    means = np.nanmean(values[:, there], axis=0).tolist()
    if molecules < _FEWEST or len(means) < 3 or not there.all():
        return Measure(means[0], None, molecules)
    return Measure(means[0], jackknife(means[0], means[1:]), molecules)


def _fcd(
    source: Moments, target: Moments, within: NDArray[np.bool_], against: NDArray[np.bool_]
) -> Measure:
    if source.count[within].sum() < 2 or target.count[against].sum() < 2:
        return Measure(None, note="fewer than two valid molecules")
    goal = target.gaussian(against)
    value = source.gaussian(within).distance(goal)
    molecules = int(source.count[within].sum())
    if molecules < _FEWEST:
        return Measure(value, None, molecules)
    without = []
    for g in np.flatnonzero(within):
        kept = within.copy()
        kept[g] = False
        without.append(source.gaussian(kept).distance(goal))
    return Measure(value, jackknife(value, without), molecules)
