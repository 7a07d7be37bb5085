"""Fréchet ChemNet distance (K. Preuer et al., J. Chem. Inf. Model. 58, 1736, 2018).

The network is that of the package ``fcd``. Names are those of whole molecules without stereo
marks, each counted once, as JODO does it.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.metrics.findings import GROUPS
from molgen_energy.metrics.judging import name_hash

_AT_ONCE = 512
_WIDTH = 512


class Moments:
    """Count, sum and sum of squares of activations, by group for the jackknife."""

    def __init__(self, groups: int = GROUPS) -> None:
        self.count = np.zeros(groups, np.int64)
        self.first = np.zeros((groups, _WIDTH))
        self.second = np.zeros((groups, _WIDTH, _WIDTH))

    def add(self, activations: NDArray[np.float64], group: NDArray[np.int64]) -> None:
        """Activations (V, 512) and the group of each."""
        for g in np.unique(group):
            part = activations[group == g]
            self.count[g] += len(part)
            self.first[g] += part.sum(axis=0)
            self.second[g] += part.T @ part

    def gaussian(self, kept: NDArray[np.bool_]) -> Gaussian:
        """Mean and covariance of the groups that are kept, (groups,)."""
        count = int(self.count[kept].sum())
        mean = self.first[kept].sum(axis=0) / max(1, count)
        second = self.second[kept].sum(axis=0) - count * np.outer(mean, mean)
        return Gaussian(mean, second / max(1, count - 1), count)


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
        # stable where there are fewer molecules than dimensions.
        inner = eigvalsh(other._root @ self.covariance @ other._root)
        trace = np.trace(self.covariance) + np.trace(other.covariance)
        trace -= 2 * np.sqrt(np.clip(inner, 0, None)).sum()
        return max(0.0, float(((self.mean - other.mean) ** 2).sum() + trace))


class ChemNet:
    """Activations of distinct names, gathered as they come.

    Raises
    ------
    ImportError
        The package fcd is not installed.
    """

    def __init__(self) -> None:
        from fcd.fcd import load_ref_model

        self._model = load_ref_model()
        self._seen: set[int] = set()
        self._waiting: list[str] = []
        self._groups: list[int] = []
        self.moments = Moments()

    def add(self, names: list[str | None]) -> None:
        """Names of molecules; None, and those that were there before, are passed over."""
        for name in names:
            if name is None or (key := name_hash(name)) in self._seen:
                continue
            self._seen.add(key)
            self._waiting.append(name)
            self._groups.append(key % GROUPS)
        while len(self._waiting) >= _AT_ONCE:
            self._run(_AT_ONCE)

    def finish(self) -> Moments:
        """Run what waits."""
        if self._waiting:
            self._run(len(self._waiting))
        return self.moments

    def _run(self, count: int) -> None:
        names, self._waiting = self._waiting[:count], self._waiting[count:]
        groups, self._groups = self._groups[:count], self._groups[count:]
        self.moments.add(activations(self._model, names), np.array(groups))


def activations(model: Any, names: list[str]) -> NDArray[np.float64]:
    """The network's activations for SMILES, (V, 512)."""
    import torch
    from fcd.utils import SmilesDataset

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        data = SmilesDataset(names)
        encoded = torch.stack([torch.as_tensor(data[k]) for k in range(len(names))])
        found = model(encoded.transpose(1, 2).float())
    return np.asarray(found.numpy(), np.float64)
