"""The teacher of a student: its weights, and what the student's configuration must agree in."""

from __future__ import annotations

from molgen_energy.errors import InputError
from molgen_energy.models import MODELS
from molgen_energy.paths import expand_home
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.state import MoleculeState
from molgen_energy.training.checkpoint import Checkpoint, load_checkpoint
from molgen_energy.training.initial import check_same_function
from molgen_energy.training.pretrained import resolve_checkpoint

_OF_DATA = frozenset({"bonds", "features", "neighbours"})
"""Inputs of losses that belong to a molecule of the data, where a student draws another one."""


def load_teacher(config: MoleculeConfig) -> Checkpoint:
    """The teacher of a student's configuration, with its EMA weights.

    Raises
    ------
    InputError
        The configuration names none, there is none, its weights mean something else there, it is a
        student itself, or its network or loss cannot teach.
    """
    given = config.distillation.teacher
    if given is None:
        raise InputError(
            f"config {config.name} trains a student: name a run or pretrained weights that it "
            "learns from, such as --teacher qm9_energy"
        )
    option = f"--teacher {given}"
    checkpoint = load_checkpoint(
        resolve_checkpoint(expand_home(given), "--teacher"), weights=["ema"]
    )
    check_same_function(checkpoint, config, option)
    taught = checkpoint.state_as(MoleculeState).teacher
    if taught is not None:
        raise InputError(f"{option} is itself a student, of {taught.origin}; name another one")
    if MODELS[config.model.name].self_conditioned:
        raise InputError(
            f"{option}: {config.model.name} takes its previous prediction as input, and such "
            "networks cannot be distilled; name another teacher"
        )
    if config.training.cuda_graphs and config.distillation.student_share < 1:
        raise InputError(
            "training.cuda_graphs: steps that do not all change the student cannot be recorded; "
            "leave it out, or set distillation.student_share=1"
        )
    needed = sorted(config.loss_requires & _OF_DATA)
    if needed:
        raise InputError(
            f"{option}: the loss needs {' and '.join(needed)} of the data, and a student draws "
            "other molecules; choose a loss without, such as --edges complete"
        )
    return checkpoint
