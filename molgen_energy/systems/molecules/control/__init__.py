"""Control of sampling: what a user asks of drawn molecules, one kind a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.control.base import Control, Controls
from molgen_energy.systems.molecules.control.composition import AllowedElements, Composition
from molgen_energy.systems.molecules.control.conformers import Conformers
from molgen_energy.systems.molecules.control.fragments import Fragments
from molgen_energy.systems.molecules.control.variants import DEFAULT_STRENGTH, Variants

CONTROLS: dict[str, type[Control]] = {
    "elements": AllowedElements,
    "formula": Composition,
    "keep": Fragments,
    "like": Variants,
    "smiles": Conformers,
}
"""By the option of `sample` that asks for them. Of what two of a job fix, the last one decides."""

_EXCLUDE: dict[str, tuple[str, ...]] = {
    "formula": ("n_atoms", "like", "smiles"),
    "keep": ("like", "smiles"),
    "like": ("smiles", "n_atoms"),
    "smiles": ("n_atoms", "elements", "consistent_charges"),
}
"""Options that do not go with one."""
_NEED = {"keep_smarts": ("keep",), "strength": ("like",)}
"""Options of which one needs another."""


def read_controls(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a user in the form that a job stores: texts are parsed, and files are read.

    Raises
    ------
    InputError
        Options do not go together, or one is not valid.
    """
    given = {name for name, value in options.items() if value is not None}
    for name, others in _EXCLUDE.items():
        if name in given and (wrong := given.intersection(others)):
            both = f"{_option(name)} does not go with {_option(min(wrong))}"
            raise InputError(f"{both}; leave one of them out")
    for name, others in _NEED.items():
        if name in given and not given.intersection(others):
            raise InputError(f"{_option(name)} needs {' or '.join(map(_option, others))}")
    if (options.get("resample") or 1) > 1 and not given.intersection(CONTROLS):
        fixing = ", ".join(map(_option, CONTROLS))
        raise InputError(f"--resample has no effect without fixed values; add one of {fixing}")
    read = {name: CONTROLS[name].read(options[name], options) for name in CONTROLS if name in given}
    if "like" in given and "strength" not in given:
        read["strength"] = DEFAULT_STRENGTH
    return {**options, **read}


def build_control(options: Mapping[str, Any]) -> Control | None:
    """The control that the options of a job ask for, `count` molecules for each input record."""
    controls = [
        kind.of_options(options)
        for name, kind in CONTROLS.items()
        # With fixed atoms a formula counts them.
        if options[name] is not None and not (name == "formula" and options["keep"] is not None)
    ]
    if not controls:
        return None
    control = controls[0] if len(controls) == 1 else Controls(controls)
    control.each = options["count"]
    return control


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
