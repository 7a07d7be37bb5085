"""PoseBusters' checks of single molecules (M. Buttenschoen et al., Chem. Sci. 15, 3130, 2024)."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import numpy as np
from rdkit import rdBase

from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, build, max_neighbours
from molgen_energy.data.molecules import MoleculeChunk

# The energy check embeds many conformers, which takes more than a second for each molecule.
_EXCLUDED = "energy_ratio"


@cache
def _posebusters() -> Any:
    from posebusters import PoseBusters

    checker = PoseBusters(config="mol")
    modules = [m for m in checker.config["modules"] if m["function"] != _EXCLUDED]
    checker.config["modules"] = modules
    return checker


def run_posebusters(chunk: MoleculeChunk) -> list[list[str]]:
    """Names of the checks that each molecule fails, with its bonds; empty if it passes all."""
    return [_failed_checks(chunk, k) for k in range(len(chunk))]


def posebusters_failed(chunk: MoleculeChunk, reason: str) -> list[list[str]]:
    """Result for molecules that PoseBusters did not finish: the reason as the failed check."""
    return [[reason]] * len(chunk)


def _failed_checks(chunk: MoleculeChunk, k: int) -> list[str]:
    molecule = chunk.molecules[k]
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return ["sanitization"]
    # PoseBusters sends RDKit's messages to Python's logging; the checks contain the same.
    logging.getLogger("rdkit").setLevel(logging.CRITICAL)
    with rdBase.BlockLogs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = _posebusters().bust([build(molecule, positions=True)], None, None)
    row = table.iloc[0]
    # A check that did not run because an earlier one failed is NaN: it counts as failed.
    return [str(name) for name, passed in row.items() if not (passed is True or passed is np.True_)]
