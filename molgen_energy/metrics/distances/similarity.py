"""Similarity to the reference by fingerprints, fragments and scaffolds, as MOSES defines it.

D. Polykovskiy et al., "Molecular Sets (MOSES): A Benchmarking Platform for Molecular Generation
Models", Frontiers in Pharmacology 11, 565644 (2020). As in JODO, the molecules are the distinct
SMILES of all fragments without stereochemistry.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.substructures import (
    FINGERPRINT_BITS,
    Substructures,
    substructures_of,
)
from molgen_energy.metrics.accumulator import JACKKNIFE_GROUPS
from molgen_energy.metrics.checks.chunk import smiles_hash
from molgen_energy.metrics.statistics import Estimate, jackknife_interval
from molgen_energy.workers import WorkerPool

SIMILARITY_KEYS = ("snn", "fragments", "scaffolds")
"""Nearest neighbour, fragments and scaffolds."""

_PAIRS_AT_ONCE = 1 << 23  # similarities in memory, 32 MB
_SMILES_AT_ONCE = 250  # SMILES that a worker process gets


class SubstructureCounts:
    """Fingerprints of distinct molecules, and counts of their fragments and scaffolds.

    Parameters
    ----------
    keep_smiles
        Whether to keep the SMILES, to store them.
    """

    def __init__(self, keep_smiles: bool = False) -> None:
        self.smiles: list[str] = []
        """Of the distinct molecules, if they are kept."""
        self._keep = keep_smiles
        self._seen: set[int] = set()
        self._fingerprints: list[bytes] = []
        self._group: list[int] = []
        self.fragments: list[Counter[str]] = [Counter() for _ in range(JACKKNIFE_GROUPS)]
        """Number of each fragment, by jackknife group."""
        self.scaffolds: list[Counter[str]] = [Counter() for _ in range(JACKKNIFE_GROUPS)]
        """Number of molecules with each scaffold, by jackknife group."""

    def __len__(self) -> int:
        return len(self._group)

    def add(
        self,
        smiles: Sequence[str | None],
        found: Sequence[Substructures | None],
        names: Sequence[str | None] | None = None,
    ) -> None:
        """Add molecules; None is ignored, and a molecule whose name was there before.

        Parameters
        ----------
        names
            What tells molecules apart; by default their SMILES.
        """
        for text, parts, name in zip(smiles, found, names or smiles, strict=True):
            if text is None or parts is None or name is None:
                continue
            key = smiles_hash(name)
            if key in self._seen:
                continue
            self._seen.add(key)
            group = smiles_hash(text) % JACKKNIFE_GROUPS
            self._group.append(group)
            self._fingerprints.append(parts.fingerprint)
            self.fragments[group].update(parts.fragments)
            if parts.scaffold:
                self.scaffolds[group][parts.scaffold] += 1
            if self._keep:
                self.smiles.append(text)

    @classmethod
    def of_smiles(cls, smiles: Sequence[str], workers: WorkerPool) -> SubstructureCounts:
        """Those of stored SMILES, each a molecule of its own."""
        counts = cls()
        items = [smiles[k : k + _SMILES_AT_ONCE] for k in range(0, len(smiles), _SMILES_AT_ONCE)]
        for texts, found in workers.map(_find_all, items, _found_none):
            counts.add(texts, found, [f"{len(counts)} {k}" for k in range(len(texts))])
        return counts

    @cached_property
    def fingerprints(self) -> NDArray[np.uint8]:
        """Packed bits of the distinct molecules, (V, 128); to be read when all are added."""
        joined = np.frombuffer(b"".join(self._fingerprints), np.uint8)
        return joined.reshape(-1, FINGERPRINT_BITS // 8)

    @property
    def group(self) -> NDArray[np.int64]:
        """The jackknife group of each distinct molecule, (V,)."""
        return np.array(self._group, np.int64)

    def select(self, included: NDArray[np.bool_]) -> SubstructureCounts:
        """The molecules of some jackknife groups, (groups,)."""
        chosen = SubstructureCounts()
        kept = included[self.group]
        chosen._group = self.group[kept].tolist()
        chosen._fingerprints = [row.tobytes() for row in self.fingerprints[kept]]
        for g in np.flatnonzero(included).tolist():
            chosen.fragments[g], chosen.scaffolds[g] = self.fragments[g], self.scaffolds[g]
        return chosen


def _find_all(smiles: Sequence[str]) -> list[Substructures | None]:
    return [substructures_of(text) for text in smiles]


def _found_none(smiles: Sequence[str], _: str) -> list[Substructures | None]:
    """Result for SMILES on which RDKit does not finish."""
    return [None] * len(smiles)


def compare_substructures(
    source: SubstructureCounts, target: SubstructureCounts
) -> dict[str, Estimate]:
    """Similarity of `source` to `target` from 0 to 1, with intervals for the sampling of `source`.

    - `snn`: the largest Tanimoto similarity to a molecule of the target, mean over the source;
    - `fragments`, `scaffolds`: cosine of the angle between the counts of both sets.
    """
    count = len(source)
    if not count or not len(target):
        nothing = Estimate(None, note="no valid molecules")
        return dict.fromkeys(SIMILARITY_KEYS, nothing)
    nearest = nearest_similarity(source.fingerprints, target.fingerprints)
    groups = np.unique(source.group).tolist()
    kept = [source.group != g for g in groups]
    means = [float(nearest.mean()), *(float(nearest[k].mean()) for k in kept if k.any())]
    found = {"snn": _with_jackknife(means, count)}
    for key in SIMILARITY_KEYS[1:]:
        values = cosines_without_groups(getattr(source, key), getattr(target, key))
        found[key] = Estimate(None, note=_NONE[key])
        if values:
            found[key] = _with_jackknife([values[0], *(values[1 + g] for g in groups)], count)
    return found


_NONE = {"fragments": "no fragments", "scaffolds": "no scaffold of two rings"}


def _with_jackknife(values: list[float], count: int) -> Estimate:
    """A similarity, first of all groups and then without each, with its interval."""
    if count < 2 * JACKKNIFE_GROUPS or not np.isfinite(values).all() or len(set(values)) < 2:
        return Estimate(values[0], None, count)
    low, high = jackknife_interval(values[0], values[1:])
    return Estimate(values[0], (low, min(1.0, high)), count)


def nearest_similarity(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The largest Tanimoto similarity of each source to a target, (V,).

    Two fingerprints without a bit have similarity 1, as in MOSES.

    Parameters
    ----------
    source, target
        Packed bits, (V, B) and (W, B); W is not 0.
    """
    theirs = np.unpackbits(target, axis=1).astype(np.float32)
    of_target = theirs.sum(axis=1)
    best = np.empty(len(source))
    step = max(1, _PAIRS_AT_ONCE // len(theirs))
    for start in range(0, len(source), step):
        ours = np.unpackbits(source[start : start + step], axis=1).astype(np.float32)
        common = ours @ theirs.T  # exact: at most 1,024
        either = ours.sum(axis=1)[:, None] + of_target - common
        common[either == 0] = 1
        either[either == 0] = 1
        best[start : start + step] = (common / either).max(axis=1)
    return best


def cosines_without_groups(source: list[Counter[str]], target: list[Counter[str]]) -> list[float]:
    """Cosine of the counts of all groups of the source and the target, then without each group.

    Empty where one of both has no counts; NaN without a group that has them all.
    """
    theirs: Counter[str] = Counter()
    for counts in target:
        theirs.update(counts)
    place = {name: k for k, name in enumerate(dict.fromkeys(n for c in source for n in c))}
    if not place or not theirs:
        return []
    by_group = np.zeros((len(source), len(place)))
    for row, counts in zip(by_group, source, strict=True):
        row[[place[name] for name in counts]] = list(counts.values())
    of_target = np.array([theirs[name] for name in place], np.float64)
    norm = math.sqrt(sum(number**2 for number in theirs.values()))
    whole = by_group.sum(axis=0)
    rows = np.concatenate([whole[None], whole - by_group])
    with np.errstate(invalid="ignore"):
        cosines = rows @ of_target / np.linalg.norm(rows, axis=1) / norm
    return [float(cosine) for cosine in cosines]
