"""GFN2-xTB as a judge of properties, calibrated on real molecules.

Its orbital energies are not those of the density functional of the data. A linear function of each,
fitted on real molecules, takes the systematic part of the difference away.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.xtb_properties import XTB_UNITS, xtb_properties
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics.options import install_command
from molgen_energy.metrics.property_errors import random_molecules

CALIBRATED_ON = 300
"""Molecules of the linear fit; real molecules are drawn for other figures from another split."""


class XTBPredictor:
    """HOMO, LUMO, gap and dipole by GFN2-xTB, each put through a line that real molecules give.

    Parameters
    ----------
    real
        File of real molecules with such properties. The fit is on its validation split, else on its
        training split.
    limit
        How many molecules of a file it judges, the first ones. One of QM9 takes about 20 ms.

    Raises
    ------
    InputError
        tblite is not installed, or the file has none of the properties in the unit of GFN2-xTB.
    """

    def __init__(self, real: Path, limit: int = 1000) -> None:
        if importlib.util.find_spec("tblite") is None:
            raise InputError(f"--predictor xtb needs tblite: {install_command('xtb')}")
        with MoleculeFile(real) as file:
            there = file.property_units
            units = {name: unit for name, unit in XTB_UNITS.items() if there.get(name) == unit}
            if not units:
                raise InputError(
                    f"--predictor xtb: {real} holds none of {', '.join(XTB_UNITS)} in hartree and "
                    "debye; name real molecules that do with --reference"
                )
            split = "valid" if len(file.split_indices("valid")) else "train"
            molecules = random_molecules(file, split, CALIBRATED_ON, units)
        found = _compute(molecules)
        self.units: Mapping[str, str] = units
        self.limit: int | None = limit
        self._lines: dict[str, tuple[float, float]] = {}
        for name in units:
            true = molecules.properties[name].values
            known = np.isfinite(true) & np.isfinite(found[name])
            if known.sum() < 3 or np.ptp(found[name][known]) == 0:
                raise InputError(
                    f"--predictor xtb: too few molecules of {real} have a {name} to fit a line"
                )
            slope, offset = np.polyfit(found[name][known], true[known], 1)
            self._lines[name] = float(slope), float(offset)
        lines = ", ".join(
            f"{name} = {slope:.3f}·x {offset:+.4f}" for name, (slope, offset) in self._lines.items()
        )
        self.description = f"GFN2-xTB, calibrated on {len(molecules)} molecules: {lines}"

    def __call__(self, molecules: Molecules) -> dict[str, NDArray[np.float64]]:
        """Each property of molecules, (M,), NaN where GFN2-xTB fails or electrons are unpaired."""
        found = _compute(molecules)
        return {name: slope * found[name] + offset for name, (slope, offset) in self._lines.items()}


def _compute(molecules: Molecules) -> dict[str, NDArray[np.float64]]:
    """Properties of molecules by name, (M,) each, NaN where there are none."""
    values = {name: np.full(len(molecules), np.nan) for name in XTB_UNITS}
    finite = molecules.finite()
    for k, molecule in enumerate(molecules):
        charges = molecule.formal_charges
        charge = 0 if charges is None else int(charges.sum())
        if not finite[k]:
            continue
        try:
            found = xtb_properties(molecule.atomic_numbers, molecule.positions, charge)
        except ValueError:
            continue
        for name, value in found.items():
            values[name][k] = value
    return values
