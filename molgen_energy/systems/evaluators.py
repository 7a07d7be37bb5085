"""What evaluates a file of samples, by physical system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molgen_energy.metrics.scores import Scores


def _shapes(path: Path) -> Scores:
    from molgen_energy.systems.shapes.metrics import evaluate_shapes

    return evaluate_shapes(path)


def _spins(path: Path) -> Scores:
    from molgen_energy.systems.spins.metrics import evaluate_spins

    return evaluate_spins(path)


EVALUATORS: dict[str, Callable[[Path], Scores]] = {"shapes": _shapes, "spins": _spins}
"""Molecules are evaluated by `molgen_energy.metrics.run`."""
