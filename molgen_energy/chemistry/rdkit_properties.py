"""RDKit's descriptors as properties of molecules, such as `logp=rdkit:MolLogP`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, build, max_neighbours
from molgen_energy.data.molecules import Molecule, Molecules, Property
from molgen_energy.errors import InputError, unknown_name

_PREFIX = "rdkit:"
_UNITS = {
    "MolWt": "Da", "ExactMolWt": "Da", "HeavyAtomMolWt": "Da",
    "TPSA": "Å^2", "LabuteASA": "Å^2",
}  # fmt: skip
"""Of descriptors that have one."""
_WHERE = "names are those of rdkit.Chem.Descriptors, such as MolLogP, qed, TPSA, MolWt, RingCount"
_FAILURES = (ValueError, RuntimeError, ArithmeticError, OverflowError)


class DescriptorProperty(NamedTuple):
    """A property that is a descriptor of RDKit."""

    name: str
    descriptor: str
    """Name of a function of `rdkit.Chem.Descriptors`."""

    @property
    def unit(self) -> str:
        """Unit of the values, empty where the descriptor has none."""
        return _UNITS.get(self.descriptor, "")


def parse_descriptors(texts: Sequence[str]) -> tuple[DescriptorProperty, ...]:
    """Properties of texts such as `logp=rdkit:MolLogP`.

    Raises
    ------
    InputError
        A text is something else, names no descriptor of RDKit, or repeats a name.
    """
    found: dict[str, DescriptorProperty] = {}
    for text in texts:
        name, equals, source = map(str.strip, text.partition("="))
        if not name or not equals or not source.startswith(_PREFIX):
            raise InputError(
                f"--property {text}: expected NAME=rdkit:DESCRIPTOR, such as logp=rdkit:MolLogP"
            )
        if "/" in name or name in (".", ".."):
            raise InputError(f"--property {text}: '{name}' cannot be the name of a property")
        if name in found:
            raise InputError(f"--property {text}: there are two properties of the name '{name}'")
        descriptor = source.removeprefix(_PREFIX).strip()
        if descriptor not in _functions():
            near = unknown_name("descriptor of RDKit", descriptor, _functions())
            raise InputError(f"--property {text}: {near.partition(' (valid')[0]} ({_WHERE})")
        found[name] = DescriptorProperty(name, descriptor)
    return tuple(found.values())


def add_descriptors(molecules: Molecules, wanted: Sequence[DescriptorProperty]) -> Molecules:
    """The molecules with descriptors as further properties, NaN where RDKit fails.

    Bonds are the given ones; without any, those of the SMILES, and without that, those perceived
    from distances.

    Raises
    ------
    InputError
        The molecules have a property of such a name already.
    """
    for each in wanted:
        if each.name in molecules.properties:
            raise InputError(
                f"--property {each.name}={_PREFIX}{each.descriptor}: the data have a property "
                f"{each.name} already; choose another name"
            )
    functions = [_functions()[each.descriptor] for each in wanted]
    given = molecules.bonds is not None
    smiles = None if given else molecules.smiles
    bonded = molecules if given else perceive(molecules)
    values = np.full((len(molecules), len(wanted)), np.nan)
    with rdBase.BlockLogs():
        for k, molecule in enumerate(bonded):
            text = "" if smiles is None else smiles[k]
            values[k] = _values(molecule, text, functions)
    values[~np.isfinite(values)] = np.nan
    added = {each.name: Property(values[:, k].copy(), each.unit) for k, each in enumerate(wanted)}
    return replace(molecules, properties={**molecules.properties, **added})


def _values(
    molecule: Molecule, smiles: str, functions: Sequence[Callable[[Chem.Mol], float]]
) -> NDArray[np.float64]:
    """Descriptors (D,) of a molecule with bonds, or of its SMILES if that is not empty."""
    values = np.full(len(functions), np.nan)
    try:
        if smiles:
            built = Chem.MolFromSmiles(smiles)
        elif max_neighbours(molecule) > MAX_NEIGHBOURS:
            built = None
        else:
            built = build(molecule)
            Chem.SanitizeMol(built)
            built = Chem.RemoveHs(built)
    except _FAILURES:
        built = None
    if built is not None:
        values[:] = [_value(function, built) for function in functions]
    return values


def _value(function: Callable[[Chem.Mol], float], molecule: Chem.Mol) -> float:
    """A descriptor of a molecule, NaN where RDKit cannot tell."""
    try:
        return float(function(molecule))
    except _FAILURES:
        return np.nan


@cache
def _functions() -> Mapping[str, Callable[[Chem.Mol], float]]:
    """RDKit's descriptors of bonds and elements, by name."""
    from rdkit.Chem import Descriptors  # imports much of RDKit

    return dict(Descriptors.descList)
