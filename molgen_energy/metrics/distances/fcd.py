"""Fréchet ChemNet distance (K. Preuer et al., J. Chem. Inf. Model. 58, 1736, 2018).

The network is that of the package ``fcd``. As in JODO, it gets the distinct SMILES of whole
molecules without stereochemistry.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.metrics.accumulator import JACKKNIFE_GROUPS
from molgen_energy.metrics.checks.chunk import smiles_hash

_BATCH_SIZE = 512
_FEATURES = 512


class Moments:
    """Count, sum and sum of squares of activations, for each jackknife group."""

    def __init__(self, groups: int = JACKKNIFE_GROUPS) -> None:
        self.count = np.zeros(groups, np.int64)
        self.first = np.zeros((groups, _FEATURES))
        self.second = np.zeros((groups, _FEATURES, _FEATURES))

    def add(self, activations: NDArray[np.float64], group: NDArray[np.int64]) -> None:
        """Add activations (V, 512) with the group of each, (V,)."""
        for g in np.unique(group):
            part = activations[group == g]
            self.count[g] += len(part)
            self.first[g] += part.sum(axis=0)
            self.second[g] += part.T @ part

    def gaussian(self, included: NDArray[np.bool_]) -> Gaussian:
        """Mean and covariance over the included groups, (groups,)."""
        count = int(self.count[included].sum())
        mean = self.first[included].sum(axis=0) / max(1, count)
        second = self.second[included].sum(axis=0) - count * np.outer(mean, mean)
        return Gaussian(mean, second / max(1, count - 1), count)

    @classmethod
    def of_gaussian(
        cls, mean: NDArray[np.float64], covariance: NDArray[np.float64], count: int
    ) -> Moments:
        """Moments of a single group with a given mean (512,) and covariance (512, 512)."""
        moments = cls(groups=1)
        moments.count[0] = count
        moments.first[0] = mean * count
        moments.second[0] = covariance * (count - 1) + count * np.outer(mean, mean)
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


class ChemNet:
    """Accumulates the network's activations for distinct SMILES, in batches.

    Raises
    ------
    ImportError
        The package fcd is not installed.
    """

    def __init__(self) -> None:
        from fcd.fcd import load_ref_model

        self._model = load_ref_model()
        self._seen: set[int] = set()
        self._pending: list[str] = []
        self._groups: list[int] = []
        self.moments = Moments()

    def add(self, smiles: list[str | None]) -> None:
        """Add molecules; None and SMILES added before are ignored."""
        for text in smiles:
            if text is None or (key := smiles_hash(text)) in self._seen:
                continue
            self._seen.add(key)
            self._pending.append(text)
            self._groups.append(key % JACKKNIFE_GROUPS)
        while len(self._pending) >= _BATCH_SIZE:
            self._run(_BATCH_SIZE)

    def finish(self) -> Moments:
        """Run the last, incomplete batch and return the moments."""
        if self._pending:
            self._run(len(self._pending))
        return self.moments

    def _run(self, count: int) -> None:
        smiles, self._pending = self._pending[:count], self._pending[count:]
        groups, self._groups = self._groups[:count], self._groups[count:]
        self.moments.add(activations(self._model, smiles), np.array(groups))


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
