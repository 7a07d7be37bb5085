"""PoseBusters' checks of one molecule (M. Buttenschoen et al., Chem. Sci. 15, 3130, 2024)."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import numpy as np
from rdkit import rdBase

from molgen_energy.chemistry.rdkit import CROWD, build, most_neighbours
from molgen_energy.data.molecules import MoleculeChunk

# Its check of the energy embeds many conformers: a second and more for each molecule.
_TOO_SLOW = "energy_ratio"


@cache
def _buster() -> Any:
    from posebusters import PoseBusters

    buster = PoseBusters(config="mol")
    modules = [m for m in buster.config["modules"] if m["function"] != _TOO_SLOW]
    buster.config["modules"] = modules
    return buster


def bust(piece: MoleculeChunk) -> list[list[str]]:
    """The checks that each molecule fails, with its bonds; none for a plausible one."""
    return [_failed(piece, k) for k in range(len(piece))]


def given_up(piece: MoleculeChunk, reason: str) -> list[list[str]]:
    """Molecules that came to no end."""
    return [[reason]] * len(piece)


def _failed(piece: MoleculeChunk, k: int) -> list[str]:
    molecule = piece.molecules[k]
    if most_neighbours(molecule) > CROWD:
        return ["sanitization"]
    # It routes RDKit's messages through Python's logging; what they say is in the checks.
    logging.getLogger("rdkit").setLevel(logging.CRITICAL)
    with rdBase.BlockLogs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = _buster().bust([build(molecule, positions=True)], None, None)
    row = table.iloc[0]
    # What could not be looked at, because an earlier check failed, is NaN: not passed.
    return [str(name) for name, passed in row.items() if not (passed is True or passed is np.True_)]
