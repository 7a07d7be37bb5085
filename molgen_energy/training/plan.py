"""Length, batches and intervals that suit the number of training samples.

They replace `auto` of `training.steps`, `batch_size`, `ema_decay` and `validate_every`. The laws
were chosen for fine-tuning on tens to thousands of molecules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molgen_energy.config import TrainingConfig, resolved
from molgen_energy.errors import counted
from molgen_energy.training.task import Task

_BATCH = 32
_VALIDATIONS = 20  # in a run, at most
_BETWEEN = 20  # steps between validations, at least, since one takes as long as about three
_EVALUATIONS = 256  # of the network in a validation, at least


def planned_values(training: TrainingConfig, samples: int) -> dict[str, Any]:
    """Values for every `auto` of the plan of a run on some training samples, by dotted key.

    Steps grow with the cube root of the number of samples, so that each of few samples is seen more
    often than each of many. The average of weights goes over about a tenth of the run.
    """
    values: dict[str, Any] = {}
    batch = min(_BATCH, samples) if training.batch_size == "auto" else training.batch_size
    steps = round(90 * samples ** (1 / 3)) if training.steps == "auto" else training.steps
    if training.epochs is not None:
        steps = training.epochs * max(1, round(samples / (batch or _BATCH)))
    if training.batch_size == "auto":
        values["batch_size"] = batch
    if training.steps == "auto":
        values["steps"] = steps
    if training.ema_decay == "auto":
        values["ema_decay"] = min(max(0.9, 1 - 10 / (steps or 1)), 0.9999)
    if training.validate_every == "auto":
        values["validate_every"] = max(_BETWEEN, (steps or 1) // _VALIDATIONS)
    return {f"training.{key}": value for key, value in values.items()}


def validation_draws(samples: int) -> int:
    """Noises of each of some validation samples, in place of `auto`."""
    return -(-_EVALUATIONS // samples) if samples else 1


def describe_plan(task: Task) -> Iterator[str]:
    """What fine-tuning has chosen, in lines of a name and its values."""
    training = task.config.training
    muon = f" (matrices {training.muon_lr:.2g})" if training.optimizer == "muon" else ""
    every = resolved(training.validate_every)
    yield (
        f"plan    {training.optimizer}, learning rate {resolved(training.lr):.2g}{muon}, "
        f"{training.warmup_steps} steps of warm-up, EMA decay {training.ema_decay:.4g}"
    )
    if task.validation_samples:
        patience = training.patience
        end = "" if patience is None else f"; ends after {patience} without better weights"
        count = f"{task.validation_samples:,} evaluations"
        yield f"checks  {count} every {counted(every, 'steps')}{end}"
