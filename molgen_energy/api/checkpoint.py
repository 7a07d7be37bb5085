"""Load a checkpoint."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.checkpoint import load_checkpoint as load
from molgen_energy.training.pretrained import resolve_checkpoint


def load_checkpoint(checkpoint: str | PathLike[str], which: str | None = None) -> Checkpoint:
    """Load the checkpoint of a run or of pretrained weights; weights are read on demand.

    Parameters
    ----------
    checkpoint
        A run or its folder, a checkpoint's folder, or the name of pretrained weights.
    which
        `last` or `best` of a run; by default the one that stands for it: `best` of a fine-tuned
        run, `last` of others.

    Raises
    ------
    InputError
        There is none, or it is damaged.
    """
    return load(resolve_checkpoint(Path(checkpoint)), which)
