"""Fréchet ChemNet distance (K. Preuer et al., J. Chem. Inf. Model. 58, 1736, 2018).

The network is that of the package ``fcd``. As in JODO, it gets the distinct SMILES of whole
molecules without stereochemistry.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.metrics.accumulator import JACKKNIFE_GROUPS
from molgen_energy.metrics.checks.chunk import smiles_hash
from molgen_energy.metrics.statistics import Estimate, jackknife_interval

MIN_EXTRAPOLATED = 250
"""Molecules for `extrapolate`: with fewer, the bias is not linear in 1/n."""

_BATCH_SIZE = 512
FEATURES = 512
"""Number of activations of a molecule."""


class Moments:
    """Count, sum and sum of squares of activations, for each jackknife group."""

    def __init__(self, groups: int = JACKKNIFE_GROUPS) -> None:
        self.count = np.zeros(groups, np.int64)
        self.first = np.zeros((groups, FEATURES))
        self.second = np.zeros((groups, FEATURES, FEATURES))

    def add(self, activations: NDArray[np.float64], group: NDArray[np.int64]) -> None:
        """Add activations (V, 512) with the group of each, (V,)."""
        for g in np.unique(group):
            part = activations[group == g]
            self.count[g] += len(part)
            self.first[g] += part.sum(axis=0)
            self.second[g] += part.T @ part

    def gaussian(self, included: NDArray[np.bool_] | None = None) -> Gaussian:
        """Mean and covariance over the included groups, (groups,); all by default."""
        if included is None:
            included = np.ones(len(self.count), bool)
        count = int(self.count[included].sum())
        mean = self.first[included].sum(axis=0) / max(1, count)
        second = self.second[included].sum(axis=0) - count * np.outer(mean, mean)
        return Gaussian(mean, second / max(1, count - 1), count)

    def without_groups(self) -> Iterator[Gaussian]:
        """Of all groups, then without each group that has members."""
        yield self.gaussian()
        for g in np.flatnonzero(self.count):
            yield self.gaussian(np.arange(len(self.count)) != g)

    def halves(self) -> list[Gaussian]:
        """Of every second group, and of the others; none for a single group."""
        even = np.arange(len(self.count)) % 2 == 0
        if min(self.count[even].sum(), self.count[~even].sum()) < 2:
            return []
        return [self.gaussian(even), self.gaussian(~even)]

    @classmethod
    def of_gaussians(cls, gaussians: list[Gaussian]) -> Moments:
        """Moments with a group for each Gaussian."""
        moments = cls(groups=len(gaussians))
        for g, part in enumerate(gaussians):
            moments.count[g] = part.count
            moments.first[g] = part.mean * part.count
            outer = part.count * np.outer(part.mean, part.mean)
            moments.second[g] = part.covariance * (part.count - 1) + outer
        return moments


class Gaussian:
    """Mean (512,) and covariance (512, 512) of `count` activations."""

    def __init__(
        self, mean: NDArray[np.float64], covariance: NDArray[np.float64], count: int
    ) -> None:
        self.mean, self.covariance, self.count = mean, covariance, count

    @cached_property
    def _root(self) -> NDArray[np.float64]:
        """The symmetric square root of the covariance."""
        from scipy.linalg import eigh

        values, vectors = eigh(self.covariance)
        root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        return root

    def distance(self, other: Gaussian) -> float:
        """Fréchet distance: ‖μ − μ'‖² + tr(Σ + Σ' − 2 (ΣΣ')^½)."""
        from scipy.linalg import eigvalsh

        # (ΣΣ')^½ has the eigenvalues of (√Σ' Σ √Σ')^½, which is symmetric: no complex roots, and
        # stable with fewer molecules than dimensions.
        inner = eigvalsh(other._root @ self.covariance @ other._root)
        trace = np.trace(self.covariance) + np.trace(other.covariance)
        trace -= 2 * np.sqrt(np.clip(inner, 0, None)).sum()
        return max(0.0, float(((self.mean - other.mean) ** 2).sum() + trace))


def extrapolate(values: list[float], of_halves: list[float], count: int) -> Estimate:
    r"""The distance of sets of infinite size, from those of all molecules and of parts.

    The bias of a set of n molecules is c/n for large n (M. J. Chong, D. Forsyth, CVPR 2020), so

    .. math:: D_\infty = D + (g - 1)\,(D - \overline{D_{-i}}) + (D - \overline{D_{1/2}})

    from the distances D₋ᵢ without each of g groups of the source, and those from the halves of the
    reference. Each molecule is left out equally often, so the terms linear in the molecules, which
    make most of the error, cancel in the differences; with random subsets, as in the paper, they do
    not. The interval is the jackknife's for D, moved. It can be negative.

    Parameters
    ----------
    values
        The distance of all groups, then without each.
    of_halves
        Distances from the halves of the reference; empty if it has a single group.
    count
        Number of molecules of the source.
    """
    value, *without = values
    infinite = value + (len(without) - 1) * (value - float(np.mean(without)))
    if of_halves:
        infinite += value - float(np.mean(of_halves))
    low, high = jackknife_interval(value, without, -math.inf)
    return Estimate(infinite, (low + infinite - value, high + infinite - value), count)


class ChemNet:
    """Accumulates the network's activations for distinct SMILES, in batches.

    Parameters
    ----------
    kept
        Number of random molecules whose activations are kept, 2 kB each.

    Raises
    ------
    ImportError
        The package fcd is not installed.
    """

    def __init__(self, kept: int = 0) -> None:
        from fcd.fcd import load_ref_model

        self._model = load_ref_model()
        self._seen: set[int] = set()
        self._pending: list[str] = []
        self._keys: list[int] = []
        self._limit = kept
        self._kept: list[NDArray[np.float32]] = []
        self._kept_keys: list[NDArray[np.uint64]] = []
        self.moments = Moments()

    def add(self, smiles: list[str | None], names: list[str | None] | None = None) -> None:
        """Add molecules; None is ignored, and a molecule whose name was there before.

        Parameters
        ----------
        names
            What tells molecules apart; by default their SMILES.
        """
        for text, name in zip(smiles, names or smiles, strict=True):
            if text is None or name is None or (key := smiles_hash(name)) in self._seen:
                continue
            self._seen.add(key)
            self._pending.append(text)
            self._keys.append(smiles_hash(text))
        while len(self._pending) >= _BATCH_SIZE:
            self._run(_BATCH_SIZE)

    def finish(self) -> Moments:
        """Run the last, incomplete batch and return the moments."""
        if self._pending:
            self._run(len(self._pending))
        return self.moments

    def kept(self) -> NDArray[np.float32]:
        """Activations of at most `kept` random molecules, (V, 512)."""
        self._shrink()
        return self._kept[0] if self._kept else np.zeros((0, FEATURES), np.float32)

    def _run(self, count: int) -> None:
        smiles, self._pending = self._pending[:count], self._pending[count:]
        keys, self._keys = np.array(self._keys[:count], np.uint64), self._keys[count:]
        found = activations(self._model, smiles)
        self.moments.add(found, (keys % np.uint64(JACKKNIFE_GROUPS)).astype(np.int64))
        if self._limit:
            self._kept.append(found.astype(np.float32))
            self._kept_keys.append(keys)
            if sum(map(len, self._kept)) > 2 * self._limit:
                self._shrink()

    def _shrink(self) -> None:
        """Keep the activations with the smallest hashes, which are random."""
        if self._kept:
            key = np.concatenate(self._kept_keys)
            chosen = np.argsort(key, kind="stable")[: self._limit]
            self._kept, self._kept_keys = [np.concatenate(self._kept)[chosen]], [key[chosen]]


def activations(model: Any, smiles: list[str]) -> NDArray[np.float64]:
    """The network's activations for V SMILES, (V, 512)."""
    import torch
    from fcd.utils import SmilesDataset

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        data = SmilesDataset(smiles)
        encoded = torch.stack([torch.as_tensor(data[k]) for k in range(len(smiles))])
        found = model(encoded.transpose(1, 2).float())
    return np.asarray(found.numpy(), np.float64)
