"""Ising spin glasses on square lattices as arrays: shapes and energy.

M lattices of L × L sites:

======  =========  =======  =====================================================================
right   (M, L, L)  float32  coupling of site (r, c) to (r, c+1)
down    (M, L, L)  float32  coupling of site (r, c) to (r+1, c)
spins   (M, L, L)  int8     ±1, a configuration each; optional
======  =========  =======  =====================================================================

Indices are taken modulo L with a periodic boundary. With an open one the last column of `right` and
the last row of `down` have no effect. A configuration y has the energy

.. math:: E(y) = -\\tfrac12 \\sum_{ij} J_{ij} y_i y_j = -\\sum_{\\langle ij \\rangle} J_{ij} y_i y_j

in units of the couplings, and the same energy as its flip −y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from molgen_energy.errors import InputError

BOUNDARIES = ("open", "periodic")
Spins = NDArray[np.int8]
Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Lattices:
    """Spin glasses, optionally with a configuration each; see the module for shapes.

    The arrays are not checked; `checked` is for arrays from outside.
    """

    right: NDArray[np.float32]
    down: NDArray[np.float32]
    periodic: bool
    spins: Spins | None = None

    @classmethod
    def checked(
        cls,
        right: ArrayLike,
        down: ArrayLike,
        periodic: bool,
        spins: ArrayLike | None = None,
        origin: str = "lattices",
    ) -> Lattices:
        """Lattices of arrays from outside, after a check.

        Couplings beyond an open boundary are set to zero.

        Parameters
        ----------
        origin
            Of the arrays, the beginning of messages.

        Raises
        ------
        InputError
            Shapes do not match, a size is not valid, or a lattice has couplings that are not finite
            or all zero, or spins other than ±1. Records are counted from 1.
        """
        with np.errstate(over="ignore"):
            arrays = [np.array(values, dtype=np.float32) for values in (right, down)]
        lattices = cls(arrays[0], arrays[1], periodic, None if spins is None else np.asarray(spins))
        lattices.check(origin)
        if not periodic:
            arrays[0][:, :, -1] = 0
            arrays[1][:, -1, :] = 0
        if lattices.spins is None:
            return lattices
        return lattices.with_spins(lattices.spins.astype(np.int8))

    def check(self, origin: str = "lattices") -> None:
        """Raise `InputError` if the arrays are not valid; see `checked`."""
        _check_shapes(self.right.shape, self.down.shape, self.periodic, origin)
        couplings = self.couplings()
        for k in _first(~np.isfinite(couplings).all(axis=(1, 2, 3))):
            raise InputError(
                f"{origin}: record {k + 1} has couplings that are not finite numbers of float32; "
                "correct or remove it"
            )
        for k in _first((couplings == 0).all(axis=(1, 2, 3))):
            raise InputError(
                f"{origin}: record {k + 1} has couplings that are all zero, so that every "
                "configuration is a ground state; remove it"
            )
        if self.spins is None:
            return
        if self.spins.shape != self.right.shape:
            raise InputError(
                f"{origin}: spins of shape {self.spins.shape} do not match couplings of shape "
                f"{self.right.shape}; give a configuration for each lattice"
            )
        for k in _first((np.abs(self.spins) != 1).any(axis=(1, 2))):
            raise InputError(f"{origin}: record {k + 1} has spins other than 1 and -1; correct it")

    def __len__(self) -> int:
        return len(self.right)

    @property
    def size(self) -> int:
        """L."""
        return int(self.right.shape[-1])

    @property
    def bonds(self) -> int:
        """Number of pairs of neighbours in a lattice."""
        return 2 * self.size * (self.size if self.periodic else self.size - 1)

    @property
    def strongest(self) -> Reals:
        """The largest |J| of each lattice, (M,)."""
        largest: Reals = np.abs(self.couplings()).max(axis=(1, 2, 3), initial=0.0)
        return largest

    def couplings(self) -> Reals:
        """`right` and `down`, (M, 2, L, L), zero beyond an open boundary."""
        both = np.stack([self.right, self.down], axis=1).astype(np.float64)
        if not self.periodic:
            both[:, 0, :, -1] = 0
            both[:, 1, -1, :] = 0
        return both

    def select(self, which: slice | Sequence[int] | NDArray[np.generic]) -> Lattices:
        """The lattices of a slice, of indices or of a mask (M,)."""
        chosen = which if isinstance(which, slice) else np.asarray(which)
        if not isinstance(chosen, slice) and not chosen.size:
            chosen = slice(0)
        spins = None if self.spins is None else self.spins[chosen]
        return Lattices(self.right[chosen], self.down[chosen], self.periodic, spins)

    def with_spins(self, spins: Spins) -> Lattices:
        """The same couplings with configurations (M, L, L)."""
        return replace(self, spins=spins)

    def energies(self, spins: NDArray[np.generic] | None = None) -> Reals:
        """E of configurations; of its own without `spins`.

        Parameters
        ----------
        spins
            (M, L, L), one for each lattice, or (M, K, L, L).

        Returns
        -------
        (M,) or (M, K). Exact if couplings are integer multiples of a number that is not tiny beside
        them, as those of `draw_couplings` are.
        """
        configurations, several = self._configurations(spins)
        couplings = self.couplings()
        energies = np.zeros(configurations.shape[:2])
        for kind, axis in ((0, 3), (1, 2)):
            pairs = configurations * np.roll(configurations, -1, axis)
            energies -= np.einsum("mrc,mkrc->mk", couplings[:, kind], pairs)
        return energies if several else energies[:, 0]

    def fields(self, spins: NDArray[np.generic] | None = None) -> Reals:
        """Local fields h_i = Σ_j J_ij y_j, of the shape of the spins; as `energies`.

        y_i h_i is half the energy of a flip of site i.
        """
        configurations, several = self._configurations(spins)
        couplings = self.couplings()
        fields = np.zeros(configurations.shape)
        for kind, axis in ((0, 3), (1, 2)):
            to_next = couplings[:, None, kind]
            fields += to_next * np.roll(configurations, -1, axis)
            fields += np.roll(to_next * configurations, 1, axis)
        return fields if several else fields[:, 0]

    def _configurations(self, spins: NDArray[np.generic] | None) -> tuple[Reals, bool]:
        """Spins as (M, K, L, L), and whether they had this shape."""
        if spins is None:
            if self.spins is None:
                raise ValueError("these lattices have no spins: give spins")
            spins = self.spins
        several = spins.ndim == 4
        if not several:
            spins = spins[:, None]
        if spins.ndim != 4 or (len(spins), *spins.shape[2:]) != self.right.shape:
            raise ValueError(f"spins of shape {spins.shape} for lattices {self.right.shape}")
        return spins.astype(np.float64), several


def fix_gauge(spins: Spins, site: int = 0) -> Spins:
    """Configurations (..., L, L), flipped where the spin at site (s, s) is −1."""
    return spins * spins[..., site : site + 1, site : site + 1]


def check_size(size: int, periodic: bool, origin: str = "lattices") -> None:
    """Raise `InputError` if a lattice cannot have a size."""
    if size < 2:
        raise InputError(f"{origin}: a size of {size} has no neighbours; choose at least 2")
    if periodic and size < 4:
        raise InputError(
            f"{origin}: periodic lattices must have an even size of at least 4, not {size}; choose "
            "size 4 or --boundary open"
        )
    if periodic and size % 2:
        raise InputError(
            f"{origin}: periodic lattices must have an even size of at least 4, not {size}; choose "
            f"size {size - 1} or {size + 1}, or --boundary open"
        )


def _check_shapes(
    right: tuple[int, ...], down: tuple[int, ...], periodic: bool, origin: str
) -> None:
    if right != down:
        raise InputError(
            f"{origin}: 'right' has shape {right} and 'down' {down}; both must be (M, L, L)"
        )
    if len(right) != 3 or right[1] != right[2]:
        raise InputError(
            f"{origin}: couplings of shape {right} are not those of square lattices; expected "
            "(M, L, L)"
        )
    check_size(right[1], periodic, origin)


def _first(wrong: NDArray[np.bool_] | np.bool_) -> list[int]:
    """The index of the first wrong record of (M,), or nothing."""
    return [int(wrong.argmax())] if wrong.any() else []
