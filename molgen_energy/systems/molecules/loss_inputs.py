"""What losses on molecules are called with besides positions, found once for a whole data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.molecules import Molecules, batch_by_size
from molgen_energy.errors import InputError
from molgen_energy.losses import Neighbours, PositionLoss
from molgen_energy.losses.base import BondedPairs

Progress = Callable[[int, int], None]

_PAIRS_AT_ONCE = 300_000
_MOLECULES_AT_ONCE = 5_000

# Molecules by number, and for each of their atoms the neighbours and their weights, (b, n, k).
MoleculeChunk = tuple[NDArray[np.int64], NDArray[np.integer[Any]], NDArray[np.float32] | None]


class LossInputs:
    """Bonds, features and symmetrized edges of molecules, as far as a loss asks for them.

    Parameters
    ----------
    loss
        Whose needs are met.
    molecules
        Their bonds, where the data has none, are perceived from distances.
    device
        Where tables are kept.
    name, numbers
        Of the data, and of the molecules in it, for messages.
    ranks
        Numbers of the molecules among all of their kind (M,), by which symmetrized edges choose
        their graphs; None is 0, 1, 2 and so on.
    progress
        Told how many of how many molecules are done, where symmetries are searched for.
    go_on
        Called now and then; may raise, so that no more is done.

    Raises
    ------
    InputError
        Symmetries are asked for, and two atoms of a molecule coincide.
    """

    def __init__(
        self,
        loss: PositionLoss,
        molecules: Molecules,
        device: torch.device,
        name: str = "data",
        numbers: NDArray[np.int64] | None = None,
        ranks: NDArray[np.int64] | None = None,
        progress: Progress = lambda done, total: None,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        self._features = "features" in loss.requires
        self._bonds: Tensor | None = None
        self._neighbours: Neighbours | None = None
        if needs_bonds(loss):
            self._bonds = torch.from_numpy(_bond_table(molecules, go_on)).to(device)
        if "neighbours" in loss.requires:
            order = np.arange(len(molecules))
            index, weight = _symmetrized_table(
                loss,
                molecules,
                name,
                order if numbers is None else numbers,
                order if ranks is None else ranks,
                progress,
                go_on,
            )
            self._neighbours = Neighbours(
                torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device)
            )

    def of(self, which: NDArray[np.int64], features: Tensor) -> dict[str, Any]:
        """Arguments of the loss for molecules of these numbers, given their features (B, N, F)."""
        atoms = features.shape[1]
        given: dict[str, Any] = {}
        at = torch.from_numpy(which).to(features.device)
        if self._features:
            given["features"] = features
        if self._bonds is not None:
            other = self._bonds[at, :atoms].long().clamp(max=max(0, atoms - 1))
            adjacency = torch.zeros(len(at), atoms, atoms, dtype=torch.bool, device=at.device)
            adjacency.scatter_(2, other, True)
            own = torch.arange(atoms, device=at.device)
            adjacency[:, own, own] = False  # stands where a row has fewer bonds
            given["bonds"] = adjacency
        if self._neighbours is not None:
            index, weight = self._neighbours.index[at, :atoms], self._neighbours.weight
            assert weight is not None
            weight = weight[at, :atoms]
            given["neighbours"] = Neighbours(index.long().clamp(max=max(0, atoms - 1)), weight)
        return given


def needs_bonds(loss: PositionLoss) -> bool:
    """Whether a loss asks which atoms are bonded."""
    return "bonds" in loss.requires


def table_bytes(loss: PositionLoss, molecules: int, largest: int) -> int:
    """Memory that `LossInputs` may take while it is made, for molecules of at most so many atoms.

    Symmetries may join an atom to all others, a number of 1 byte and a weight of 4 each; few atoms
    have more than 8 bonds. Tables are there twice while pieces are put together.
    """
    row = 8 if needs_bonds(loss) else 0
    if "neighbours" in loss.requires:
        row += 5 * largest
    return 2 * row * molecules * largest


def _index_type(molecules: Molecules) -> type[np.integer[Any]]:
    return np.uint8 if molecules.sizes.max(initial=0) < 256 else np.int16


def _bond_table(molecules: Molecules, go_on: Callable[[], None]) -> NDArray[np.integer[Any]]:
    """Atoms bonded to each atom, (M, N, K), its own number where there are fewer than K."""
    pieces: list[MoleculeChunk] = []
    for start in range(0, len(molecules), _MOLECULES_AT_ONCE):
        go_on()
        which = np.arange(start, min(start + _MOLECULES_AT_ONCE, len(molecules)))
        index = _bonded(molecules.select(which))
        pieces.append((which, index.astype(_index_type(molecules)), None))
    return _together(molecules, pieces)


def _bonded(molecules: Molecules) -> NDArray[np.int64]:
    """As `_bond_table`, of molecules that are few."""
    atoms = int(molecules.sizes.max(initial=0))
    bonds = molecules.bonds or perceive(molecules).bonds
    assert bonds is not None
    molecule = np.repeat(np.arange(len(molecules)), np.diff(bonds.offsets))
    i, j = bonds.index.astype(np.int64).T
    triples = np.concatenate(
        [np.stack([molecule, i, j], axis=1), np.stack([molecule, j, i], axis=1)]
    )
    pairs = np.unique((triples[:, 0] * atoms + triples[:, 1]) * atoms + triples[:, 2])
    table = BondedPairs(len(molecules), atoms, torch.from_numpy(pairs)).neighbours()
    found: NDArray[np.int64] = table.index.numpy()
    return found


def _symmetrized_table(
    loss: PositionLoss,
    molecules: Molecules,
    name: str,
    numbers_in_data: NDArray[np.int64],
    ranks: NDArray[np.int64],
    progress: Progress,
    go_on: Callable[[], None],
) -> tuple[NDArray[np.integer[Any]], NDArray[np.float32]]:
    """Neighbours and weights of each atom, (M, N, K)."""
    pieces: list[MoleculeChunk] = []
    done = 0
    for which in batch_by_size(molecules.sizes, _PAIRS_AT_ONCE):
        go_on()
        positions, numbers = molecules.select(which).padded()
        mask = torch.from_numpy(numbers > 0)
        try:
            table = loss.prepare_neighbours(torch.from_numpy(positions), mask, ranks[which])
        except ValueError as error:
            at = _first_too_close(loss, molecules, which)
            where = name if at is None else f"{name}: molecule {numbers_in_data[at] + 1}"
            raise InputError(
                f"{where}: {error} (loss.edges.tolerance); leave it out, or lower that"
            ) from None
        assert table.weight is not None
        index = table.index.numpy().astype(_index_type(molecules))
        pieces.append((which, index, table.weight.numpy()))
        done += len(which)
        progress(done, len(molecules))
    indices = _together(molecules, pieces)
    weights = np.zeros(indices.shape, np.float32)
    for which, index, weight in pieces:
        weights[which, : index.shape[1], : index.shape[2]] = weight
    return indices, weights


def _together(molecules: Molecules, pieces: list[MoleculeChunk]) -> NDArray[np.integer[Any]]:
    """One table of neighbours, (M, N, K); an atom with fewer than K stands there itself."""
    atoms = int(molecules.sizes.max(initial=0))
    width = max((index.shape[2] for _, index, _ in pieces), default=0)
    own = np.arange(atoms, dtype=_index_type(molecules))[None, :, None]
    indices = np.broadcast_to(own, (len(molecules), atoms, width)).copy()
    for which, index, _ in pieces:
        indices[which, : index.shape[1], : index.shape[2]] = index
    return indices


def _first_too_close(
    loss: PositionLoss, molecules: Molecules, which: NDArray[np.int64]
) -> int | None:
    """The first of these molecules that holds two atoms too close to tell symmetries apart."""
    for number in which.tolist():
        try:
            loss.prepare_neighbours(torch.from_numpy(molecules[number].positions)[None])
        except ValueError:  # noqa: PERF203
            return int(number)
    return None
