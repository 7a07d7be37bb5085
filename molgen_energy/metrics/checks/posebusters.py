"""PoseBusters' checks of single molecules (M. Buttenschoen et al., Chem. Sci. 15, 3130, 2024)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from rdkit import Chem, rdBase

from molgen_energy.chemistry.rdkit import (
    MAX_NEIGHBOURS,
    build,
    max_neighbours,
    preserved_logs,
)
from molgen_energy.data.molecules import MoleculeChunk
from molgen_energy.metrics.checks.bounds import check_bounds

# The energy check embeds many conformers, which takes more than a second for each molecule.
_EXCLUDED = "energy_ratio"
_BOUNDS = "distance_geometry"


class _Module(NamedTuple):
    """One of PoseBusters' functions, and the names of its checks by those of its results."""

    run: Callable[[Chem.Mol], Mapping[str, Any]]
    names: dict[str, str]


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
def _modules() -> list[_Module]:
    """What PoseBusters' configuration for single molecules lists.

    The functions are called without the class, whose data frames take as long as they do.
    """
    from posebusters import PoseBusters
    from posebusters.posebusters import module_dict

    modules = []
    for module in PoseBusters(config="mol").config["modules"]:
        if module["function"] == _EXCLUDED:
            continue
        parameters = module.get("parameters", {})
        run: Callable[[Chem.Mol], Mapping[str, Any]]
        if module["function"] == _BOUNDS:
            run = partial(check_bounds, parameters=parameters)
        else:
            run = partial(_results, module_dict[module["function"]], parameters)
        renamed = module.get("rename_outputs", {})
        chosen = module.get("chosen_binary_test_output", [])
        names = {key: renamed.get(key, key).lower().replace(" ", "_") for key in chosen}
        modules.append(_Module(run, names))
    return modules


def _results(
    function: Callable[..., dict[str, Any]], parameters: dict[str, Any], molecule: Chem.Mol
) -> Mapping[str, Any]:
    results: Mapping[str, Any] = function(mol_pred=molecule, **parameters)["results"]
    return results


def run_posebusters(chunk: MoleculeChunk) -> list[dict[str, bool]]:
    """Whether each molecule passes each check, by the check's name, with the molecule's bonds."""
    # PoseBusters sends RDKit's messages to Python's logging; the checks contain the same.
    logger = logging.getLogger("rdkit")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with preserved_logs():  # PoseBusters enables all of them
            return [_checks(chunk, k) for k in range(len(chunk))]
    finally:
        logger.setLevel(level)


def posebusters_failed(chunk: MoleculeChunk, reason: str) -> list[dict[str, bool]]:
    """Result for molecules that PoseBusters did not finish: the reason as the failed check."""
    return [{reason: False}] * len(chunk)


def _checks(chunk: MoleculeChunk, k: int) -> dict[str, bool]:
    molecule = chunk.molecules[k]
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return {"sanitization": False}
    built, found = build(molecule, positions=True), {}
    with rdBase.BlockLogs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in _modules():
            results = module.run(built)
            for key, name in module.names.items():
                # One that did not run because an earlier one failed is NaN: it counts as failed.
                passed = results.get(key)
                found[name] = passed is True or passed is np.True_
    return found
