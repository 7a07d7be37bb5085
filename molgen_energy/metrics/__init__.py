"""How good samples are. Nothing here needs a network or torch.

Molecules are judged by `molgen_energy.metrics.run`, other systems by what stands in `JUDGES`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molgen_energy.metrics.scores import Scores


def _shapes(path: Path) -> Scores:
    from molgen_energy.metrics.shapes import judge_shapes

    return judge_shapes(path)


def _spins(path: Path) -> Scores:
    from molgen_energy.metrics.spins import judge_spins

    return judge_spins(path)


JUDGES: dict[str, Callable[[Path], Scores]] = {"shapes": _shapes, "spins": _spins}
"""By system, what judges a file of samples."""
