"""Read a run that was trained before."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from molgen_energy.errors import InputError
from molgen_energy.output import named_path
from molgen_energy.systems.registry import system_of_checkpoint
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.run import Run


def load_run(folder: str | PathLike[str]) -> Run:
    """A run of its folder, to look at its curves; also of one that still trains.

    >>> molgen_energy.load_run("runs/mine")  # a notebook shows the curves

    Parameters
    ----------
    folder
        Folder of a run.

    Raises
    ------
    InputError
        The folder is no run, has no checkpoint yet, or is damaged.
    """
    path = named_path(Path(folder))
    if (path / "state.yaml").is_file():
        raise InputError(f"{path} is a checkpoint; name its run, {path.parent.parent}")
    checkpoint = load_checkpoint(path, "last")
    config = checkpoint.config_as(system_of_checkpoint(checkpoint).config)
    return Run.of(path, checkpoint.progress, config)
