"""Further inputs of losses on molecules, prepared once for a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.batches import MoleculeBatch
from molgen_energy.data.molecules import Molecules, batch_by_size
from molgen_energy.diffusion.state import State
from molgen_energy.errors import InputError
from molgen_energy.losses import Edges, LossConfig, Neighbours
from molgen_energy.progress import ProgressCallback, no_progress

_PAIRS_AT_ONCE = 300_000

# Molecules by number, and for each of their atoms the neighbours and their weights, (b, n, k).
_Table = tuple[NDArray[np.int64], NDArray[np.integer[Any]], NDArray[np.float32]]


def with_required_bonds(molecules: Molecules, requires: frozenset[str]) -> Molecules:
    """The molecules, with perceived bonds if losses require bonds and they have none."""
    if "bonds" in requires and molecules.bonds is None:
        return perceive(molecules)
    return molecules


class LossInputs:
    """Inputs of losses besides positions: bonds, features, or tables of neighbours.

    Parameters
    ----------
    loss
        The loss on positions, whose edges tables of neighbours hold.
    requires
        Inputs that it and the terms beside it require.
    seed
        Seed of the random graphs of the edges.
    molecules
        The molecules of the data set.
    device
        Device of the tables.
    name, numbers
        Name of the data, and numbers of the molecules in it, for messages.
    ranks
        Numbers of the molecules among all training molecules (M,), which select their random
        graphs; None is 0, 1, 2 and so on.
    progress
        Called with the number of molecules whose symmetries are found.
    check_cancelled
        Called between steps; may raise to stop.

    Raises
    ------
    InputError
        The loss uses symmetries, and two atoms of a molecule coincide.
    """

    def __init__(
        self,
        loss: LossConfig,
        requires: frozenset[str],
        seed: int,
        molecules: Molecules,
        device: torch.device,
        name: str = "data",
        numbers: NDArray[np.int64] | None = None,
        ranks: NDArray[np.int64] | None = None,
        progress: ProgressCallback = no_progress,
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> None:
        self._requires = requires
        self._neighbours: Neighbours | None = None
        if "neighbours" in loss.requires:
            order = np.arange(len(molecules))
            edges = loss.build_edges(seed)
            assert edges is not None
            index, weight = _neighbour_table(
                edges,
                molecules,
                name,
                order if numbers is None else numbers,
                order if ranks is None else ranks,
                progress,
                check_cancelled,
            )
            self._neighbours = Neighbours(
                torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device)
            )

    def of(self, which: NDArray[np.int64], batch: MoleculeBatch, state: State) -> dict[str, Any]:
        """Arguments of the loss for a batch of the molecules with these numbers (B,)."""
        atoms = batch.mask.shape[1]
        inputs: dict[str, Any] = {}
        if "features" in self._requires:
            inputs["features"] = state.atoms[..., state.layout.fields["positions"].channels :]
        if "bonds" in self._requires:
            inputs["bonds"] = batch.bonds
        if self._neighbours is not None:
            at = torch.from_numpy(which).to(batch.mask.device)
            index, weight = self._neighbours.index[at, :atoms], self._neighbours.weight
            assert weight is not None
            # Indices at padding may exceed the largest molecule of the batch.
            index = index.long().clamp(max=max(0, atoms - 1))
            inputs["neighbours"] = Neighbours(index, weight[at, :atoms])
        return inputs


def table_bytes(loss: LossConfig, molecules: int, largest: int) -> int:
    """Memory that `LossInputs` takes at most, for molecules of at most `largest` atoms.

    Symmetries may connect an atom with all others, with an index of 1 byte and a weight of 4 bytes
    each. The table is in memory twice while it is built.
    """
    return 2 * 5 * molecules * largest**2 if "neighbours" in loss.requires else 0


def _index_type(molecules: Molecules) -> type[np.integer[Any]]:
    return np.uint8 if molecules.sizes.max(initial=0) < 256 else np.int16


def _neighbour_table(
    edges: Edges,
    molecules: Molecules,
    name: str,
    numbers_in_data: NDArray[np.int64],
    ranks: NDArray[np.int64],
    progress: ProgressCallback,
    check_cancelled: Callable[[], None],
) -> tuple[NDArray[np.integer[Any]], NDArray[np.float32]]:
    """Neighbours and weights of each atom, (M, N, K); free places hold the atom itself."""
    tables: list[_Table] = []
    done = 0
    for which in batch_by_size(molecules.sizes, _PAIRS_AT_ONCE):
        check_cancelled()
        positions, numbers = molecules.select(which).padded()
        mask = torch.from_numpy(numbers > 0)
        try:
            table = edges.prepare_neighbours(torch.from_numpy(positions), mask, ranks[which])
        except ValueError as error:
            raise _too_close(molecules, which, name, numbers_in_data, edges, error) from None
        assert table.weight is not None
        index = table.index.numpy().astype(_index_type(molecules))
        tables.append((which, index, table.weight.numpy()))
        done += len(which)
        progress(done, len(molecules))
    atoms = int(molecules.sizes.max(initial=0))
    width = max((index.shape[2] for _, index, _ in tables), default=0)
    own = np.arange(atoms, dtype=_index_type(molecules))[None, :, None]
    indices = np.broadcast_to(own, (len(molecules), atoms, width)).copy()
    weights = np.zeros(indices.shape, np.float32)
    for which, index, weight in tables:
        indices[which, : index.shape[1], : index.shape[2]] = index
        weights[which, : index.shape[1], : index.shape[2]] = weight
    return indices, weights


def _too_close(
    molecules: Molecules,
    which: NDArray[np.int64],
    name: str,
    numbers_in_data: NDArray[np.int64],
    edges: Edges,
    error: ValueError,
) -> InputError:
    """The error of the first molecule whose neighbours cannot be found."""
    where = name
    for number in which.tolist():
        positions = torch.from_numpy(molecules[number].positions)[None]
        mask = torch.ones(positions.shape[:2], dtype=torch.bool)
        try:
            edges.prepare_neighbours(positions, mask, np.zeros(1, np.int64))
        except ValueError as own:
            where, error = f"{name}: molecule {numbers_in_data[number] + 1}", own
            break
    return InputError(f"{where}: {error} (loss.edges.tolerance); remove it, or lower the tolerance")
