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


CHECKS = {
    "mol_pred_loaded": "it can be read",
    "sanitization": "RDKit sanitises it",
    "inchi_convertible": "it has an InChI",
    "all_atoms_connected": "one fragment",
    "no_radicals": "no atom has radical electrons",
    "bond_lengths": "within 25 % of the bounds of distance geometry",
    "bond_angles": "1,3-distances within 25 % of the bounds of distance geometry",
    "internal_steric_clash": "other distances above 70 % of the lower bound of distance geometry",
    "aromatic_ring_flatness": "atoms within 0.25 Å of a plane",
    "non-aromatic_ring_non-flatness": "rings of six with an atom at least 0.05 Å from the plane",
    "double_bond_flatness": "neighbours within 0.25 Å of a plane",
}
"""What a molecule passes, by the name of the check; heavy atoms alone count."""


@cache
def _posebusters() -> Any:
    from posebusters import PoseBusters

    checker = PoseBusters(config="mol")
    modules = [m for m in checker.config["modules"] if m["function"] != _EXCLUDED]
    checker.config["modules"] = modules
    return checker


def run_posebusters(chunk: MoleculeChunk) -> list[dict[str, bool]]:
    """Whether each molecule passes each check, by the check's name, with the molecule's bonds."""
    return [_checks(chunk, k) for k in range(len(chunk))]


def posebusters_failed(chunk: MoleculeChunk, reason: str) -> list[dict[str, bool]]:
    """Result for molecules that PoseBusters did not finish: the reason as the failed check."""
    return [{reason: False}] * len(chunk)


def _checks(chunk: MoleculeChunk, k: int) -> dict[str, bool]:
    molecule = chunk.molecules[k]
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return {"sanitization": False}
    # PoseBusters sends RDKit's messages to Python's logging; the checks contain the same.
    logging.getLogger("rdkit").setLevel(logging.CRITICAL)
    with rdBase.BlockLogs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = _posebusters().bust([build(molecule, positions=True)], None, None)
    row = table.iloc[0]
    # A check that did not run because an earlier one failed is NaN: it counts as failed.
    return {str(name): passed is True or passed is np.True_ for name, passed in row.items()}
