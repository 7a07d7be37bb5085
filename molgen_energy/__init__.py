"""Train, sample and evaluate generative models of 3D molecules with energy losses.

>>> import molgen_energy as mg
>>> molecules = mg.sample(100, checkpoint="qm9_energy", seed=0)  # RDKit molecules
>>> print(mg.evaluate(molecules))
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molgen_energy.api.checkpoint import load_checkpoint
    from molgen_energy.api.conformers import compare_conformers
    from molgen_energy.api.evaluate import evaluate
    from molgen_energy.api.molecule_list import MoleculeList
    from molgen_energy.api.preprocess import preprocess
    from molgen_energy.api.run import load_run
    from molgen_energy.api.sample import sample
    from molgen_energy.api.show import MoleculeView, show
    from molgen_energy.api.train import train
    from molgen_energy.api.tune import tune
    from molgen_energy.errors import InputError
    from molgen_energy.metrics.report.model import Report
    from molgen_energy.training.run import Run

__version__ = "0.1.0"

_MODULES = {
    "InputError": "errors",
    "MoleculeList": "api.molecule_list",
    "MoleculeView": "api.show",
    "Report": "metrics.report.model",
    "Run": "training.run",
    "compare_conformers": "api.conformers",
    "evaluate": "api.evaluate",
    "load_checkpoint": "api.checkpoint",
    "load_run": "api.run",
    "preprocess": "api.preprocess",
    "sample": "api.sample",
    "show": "api.show",
    "train": "api.train",
    "tune": "api.tune",
}
"""Modules of the public names, imported when first used: PyTorch and RDKit take a second."""

__all__ = [
    "InputError",
    "MoleculeList",
    "MoleculeView",
    "Report",
    "Run",
    "__version__",
    "compare_conformers",
    "evaluate",
    "load_checkpoint",
    "load_run",
    "preprocess",
    "sample",
    "show",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import the module of a public name."""
    if name not in _MODULES:
        message = f"module 'molgen_energy' has no attribute '{name}'"
        # With both, Python's traceback says which name was probably meant.
        raise AttributeError(message, name=name, obj=sys.modules[__name__])
    value = getattr(import_module(f"molgen_energy.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return __all__
