"""Train a model: `molgen-energy train` as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from molgen_energy.config import Config
from molgen_energy.display.progress import NotebookProgress, in_notebook
from molgen_energy.distributed import broadcast, is_main, local_device, process_group, world_size
from molgen_energy.errors import InputError
from molgen_energy.losses import LOSSES, SPRINGS
from molgen_energy.output import check_folder, real_path
from molgen_energy.paths import expand_home, find_again, portable_path
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.systems.base import System
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.registry import (
    DEFAULT_SYSTEM,
    SYSTEMS,
    load_config,
    system_of_checkpoint,
)
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.devices import choose_device
from molgen_energy.training.initial import initialise
from molgen_energy.training.loop import (
    TrainingCallback,
    TrainingCost,
    measure_cost,
    no_callback,
    total_steps,
)
from molgen_energy.training.loop import train as run_loop
from molgen_energy.training.pretrained import checkpoint_name, resolve_checkpoint
from molgen_energy.training.run import Run
from molgen_energy.training.state import Progress, has_stalled
from molgen_energy.training.task import Task

_TEACHER = "distillation.teacher"
_WEIGHTS = "training.initial_weights"
_FINE_TUNING = "fine_tune"  # the configuration that goes with weights


@dataclass(frozen=True)
class TrainingRun:
    """A run that is about to start."""

    folder: Path
    system: System
    task: Task
    steps: int
    """Length of the whole run."""
    progress: Progress | None = None
    """That of the checkpoint which is resumed; None of a new run."""

    @property
    def finished(self) -> int:
        """Steps that a resumed run has taken before."""
        return 0 if self.progress is None else self.progress.step

    @property
    def complete(self) -> bool:
        """Whether a resumed run has no step left."""
        if self.progress is None:
            return False
        training = self.task.config.training
        stalled = has_stalled(training, self.finished, self.progress.best_step)
        return self.finished >= self.steps or stalled


def train(
    config: str | Path | Config | None = None,
    *,
    data: str | PathLike[str] | None = None,
    loss: str | None = None,
    springs: str | None = None,
    edges: str | None = None,
    condition: str | Sequence[str] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    initial_weights: str | PathLike[str] | None = None,
    teacher: str | PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    output: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    callback: TrainingCallback = no_callback,
    progress: ProgressCallback = no_progress,
    on_start: Callable[[TrainingRun], None] = lambda run: None,
) -> Run:
    """Train a model, or resume an interrupted run.

    Parameters
    ----------
    config
        Name of a shipped configuration, a YAML file, or a configuration; by default `quick`, with
        `initial_weights` `fine_tune`.
    data
        HDF5 file of `preprocess`.
    loss, springs, edges
        Names of the loss, and of the springs and edges of an energy.
    condition
        Names of properties of the data that the network learns to be asked for, such as
        ``["gap", "alpha"]``; `sample(where={"gap": 0.2})` then asks for values.
    steps, epochs
        Length of the run; set one of them.
    batch_size
        Samples in a batch.
    lr
        Learning rate.
    seed
        Seed of the run.
    initial_weights
        A run, a checkpoint, or the name of pretrained weights to start from, also of other
        elements; by default random weights. Without a configuration, model, process, loss and
        optimiser are those of the weights, and length and learning rates suit few molecules.
    teacher
        With the configuration `distil`: a run, a checkpoint, or the name of pretrained weights,
        from which the student learns.
    changes
        Other values by dotted key, such as ``{"model.layers": 6}``.
    device
        `auto`, `cpu`, `cuda` or `cuda:1`.
    output
        Folder of the run; by default a new one under `runs/`.
    resume
        Folder of a run to continue; only `steps`, `epochs`, `data`, `teacher` and `device` can be
        set then.
    callback
        Called after each step; by default a notebook shows a bar.
    progress
        Called with the number of prepared samples, if preparing data takes long.
    on_start
        Called when data and model are ready.

    Returns
    -------
    The run: its folder, length, training time, validation loss and curves. `print` and a notebook
    show it; `sample(checkpoint=run)` takes it.

    Raises
    ------
    InputError
        An option, the configuration, the data or the checkpoint is not valid.
    TrainingInterrupted
        SIGINT or SIGTERM stopped the run after a checkpoint; `resume` continues it.
    TrainingFailedError
        Training diverged or ran out of memory.
    """
    given = _given(
        data, loss, springs, edges, condition,
        steps, epochs, batch_size, lr, seed, initial_weights, teacher,
    )  # fmt: skip
    with _prepared(config, given, changes, device, output, resume, progress) as run:
        if run.complete:
            assert run.progress is not None
            run.task.close()
            return Run.of(run.folder, run.progress, run.task.config, already_complete=True)
        on_start(run)
        with _notebook_bar(callback) as shown:
            return run_loop(run.task, run.folder, shown, resume=resume is not None)


def estimate_training(
    config: str | Path | Config | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    output: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    progress: ProgressCallback = no_progress,
    on_start: Callable[[TrainingRun], None] = lambda run: None,
    **options: Any,
) -> TrainingCost:
    """Estimate time and memory of `train` with the same arguments, by taking a few steps.

    Parameters
    ----------
    options
        `data`, `loss`, `springs`, `edges`, `condition`, `steps`, `epochs`, `batch_size`, `lr`,
        `seed`, `initial_weights` and `teacher` of `train`.

    Returns
    -------
    What the run needs; nothing is written.

    Raises
    ------
    InputError
        As of `train`; and in a job of several processes, which would share the work.
    """
    if world_size() > 1:
        raise InputError("--dry-run measures one process; run it without torchrun")
    given = _given(**options)
    with _prepared(config, given, changes, device, output, resume, progress) as run:
        on_start(run)
        left = max(1, run.steps - run.finished)
        return measure_cost(run.task, run.folder, left)


def _given(
    data: str | PathLike[str] | None = None,
    loss: str | None = None,
    springs: str | None = None,
    edges: str | None = None,
    condition: str | Sequence[str] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    initial_weights: str | PathLike[str] | None = None,
    teacher: str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """The options that are not None, by the dotted keys of the configuration."""
    options = {
        "loss.name": loss,
        "loss.springs.family": springs,
        "loss.edges.kind": edges,
        "condition.name": None if condition is None else "properties",
        "condition.properties": None if condition is None else _names(condition),
        "training.batch_size": batch_size,
        "training.lr": lr,
        "training.seed": seed,
        _WEIGHTS: (
            None if initial_weights is None else _stored_name(Path(initial_weights), "--from")
        ),
        _TEACHER: None if teacher is None else _stored_name(Path(teacher), "--teacher"),
        "training.steps": steps,
        "training.epochs": epochs,
        "data.path": None if data is None else str(Path(data)),
    }
    return {key: value for key, value in options.items() if value is not None}


def _names(condition: str | Sequence[str]) -> list[str]:
    """Names of properties, given as a sequence or as a text with commas."""
    parts = condition.split(",") if isinstance(condition, str) else condition
    names = [part.strip() for part in parts]
    if not names or not all(names) or len(set(names)) < len(names):
        raise InputError(
            f"--condition {','.join(parts)}: expected different names of properties, such as "
            "gap,alpha"
        )
    return names


@contextmanager
def _prepared(
    config: str | Path | Config | None,
    given: dict[str, Any],
    changes: Mapping[str, Any] | None,
    device: str,
    output: str | PathLike[str] | None,
    resume: str | PathLike[str] | None,
    progress: ProgressCallback,
) -> Iterator[TrainingRun]:
    """The run that the arguments describe, with its task, in the process group of its job."""
    target = local_device(choose_device(device))
    with process_group(target):
        progress_of_run: Progress | None = None
        if resume is not None:
            run = Path(resume)
            _check_resumable(given, run, config, changes, output)
            checkpoint = load_checkpoint(run, "last")
            system = system_of_checkpoint(checkpoint)
            begun = checkpoint.config_as(system.config)
            checkpoint.state_as(system.state)
            if "data.path" not in given and begun.data.path is not None:
                found = find_again(begun.data.path, run)
                if not found.exists():
                    raise InputError(
                        f"{found}, the data of {run}, does not exist; name it with --data FILE"
                    )
                given["data.path"] = str(found)
            taught_by = getattr(getattr(begun, "distillation", None), "teacher", None)
            if _TEACHER not in given and taught_by is not None:
                found = find_again(taught_by, run)
                if found.exists():
                    given[_TEACHER] = _stored_name(found, "--teacher")
            settings: Config = begun.replaced(given)
            progress_of_run = checkpoint.progress
        else:
            settings = _configuration(config, dict(changes or {}), given)
            system = SYSTEMS[settings.system]
            run = Path(output) if output is not None else broadcast(_new_folder(settings))
            if is_main():
                _check_new(run)
        task = system.task(settings, target, progress)
        try:
            if resume is None:
                initialise(task)
            total = total_steps(task.config.training, task.starts)
        except BaseException:
            task.close()
            raise
        yield TrainingRun(run, system, task, total, progress_of_run)


@contextmanager
def _notebook_bar(callback: TrainingCallback) -> Iterator[TrainingCallback]:
    """The callback; where there is none and this is a notebook, one that shows a bar."""
    if callback is not no_callback or not in_notebook():
        yield callback
        return
    with closing(NotebookProgress("training", "steps")) as bar:
        yield lambda step, steps, loss, _: bar(step, steps, f"loss {loss:.4f}")


def _configuration(
    config: str | Path | Config | None, changes: dict[str, Any], options: dict[str, Any]
) -> Config:
    """A configuration with changes, and options that take precedence over them."""
    if isinstance(config, Config):
        base = config
    elif config is None and _WEIGHTS in options:
        base = load_config(_FINE_TUNING)
    else:
        base = load_config(config or str(SYSTEMS[DEFAULT_SYSTEM].default_config))
    teacher = next(
        (values[_TEACHER] for values in (options, changes) if values.get(_TEACHER)),
        getattr(getattr(base, "distillation", None), "teacher", None),
    )
    if teacher is not None:
        base = _of_student(base, str(teacher), changes)
    if isinstance(base, MoleculeConfig) and base.fine_tuning.relative_lr is not None:
        base = _fine_tuned(base, changes | options)
    loss = options.get("loss.name", changes.get("loss.name", loss_name(base)))
    for name, key in (("springs", "loss.springs.family"), ("edges", "loss.edges.kind")):
        section = key.split(".")[1]
        losses = [own for own, kind in LOSSES.items() if section in kind.Config.model_fields]
        if key in options and loss not in losses:
            raise InputError(f"--{name} goes with --loss {' or '.join(losses)}, not {loss}")
    return base.replaced(changes | options)


def _of_student(base: Config, teacher: str, changes: Mapping[str, Any]) -> MoleculeConfig:
    """The configuration of a student, with what it has of its teacher."""
    if not isinstance(base, MoleculeConfig):
        raise InputError(f"--teacher is for networks of molecules, not of {base.system}")
    if changes.get("distillation.evaluations", base.distillation.evaluations) is None:
        raise InputError(
            f"--teacher goes with a configuration that trains a student, such as --config distil; "
            f"{base.name} does not"
        )
    checkpoint = load_checkpoint(resolve_checkpoint(expand_home(teacher), "--teacher"))
    return base.with_values_of(checkpoint.config_as(MoleculeConfig))


def _fine_tuned(base: MoleculeConfig, changes: Mapping[str, Any]) -> MoleculeConfig:
    """The configuration of fine-tuning, with what it has of the run of the weights."""
    name = changes.get(_WEIGHTS, base.training.initial_weights)
    if name is None:
        raise InputError(
            f"config {base.name} goes on from trained weights; name a run or pretrained weights, "
            "such as --from qm9_energy"
        )
    checkpoint = load_checkpoint(resolve_checkpoint(expand_home(name), "--from"))
    system = system_of_checkpoint(checkpoint)
    if system.name != base.system:
        raise InputError(
            f"--from {name} is a network of {system.samples}; name its configuration with --config"
        )
    teacher = checkpoint.state.get("teacher")
    if teacher is not None:
        raise InputError(
            f"--from {name} is a student, which cannot be trained on data; name its teacher, "
            f"{teacher['origin']}"
        )
    key = "fine_tuning.relative_lr"
    if key in changes:
        base = base.replaced({key: changes[key]})
    config = base.continuing(checkpoint.config_as(MoleculeConfig))
    loss = changes.get("loss.name", config.loss.name)
    if loss in LOSSES and any(key.startswith("loss.") for key in changes):
        # Another loss has another weight and another scale than those that the source found.
        found = {"loss.name": loss, "objective.position_weight": "auto"}
        if "springs" in LOSSES[loss].Config.model_fields:
            found["loss.springs.scale"] = "auto"
        config = config.replaced(found)
    springs = getattr(config.loss, "springs", None)
    family = changes.get("loss.springs.family", None if springs is None else springs.family)
    if loss == "score_energy" or getattr(SPRINGS.get(family), "adaptive", False):
        # Their loss need not fall as the network improves.
        config = config.replaced({"training.sample_from": "last", "training.patience": None})
    return config


def _check_resumable(
    given: Mapping[str, Any],
    run: Path,
    config: str | Path | Config | None,
    changes: Mapping[str, Any] | None,
    output: str | PathLike[str] | None,
) -> None:
    refused = sorted(given.keys() - {"training.steps", "training.epochs", "data.path", _TEACHER})
    if refused or config is not None or changes or output is not None:
        what = refused[0] if refused else "its configuration or folder"
        raise InputError(
            f"--resume continues a run as it is, so {what} cannot change; only --steps, --epochs, "
            "--data and --teacher (if they were moved) and --device can"
        )
    if (run / "state.yaml").is_file():
        raise InputError(f"--resume {run} is a checkpoint; name its run, {run.parent.parent}")


def _stored_name(name: Path, option: str) -> str:
    """The name of weights in a configuration, for the value of an option."""
    found = checkpoint_name(resolve_checkpoint(name, option))
    return portable_path(Path(found)) if Path(found).is_absolute() else found


def _new_folder(config: Config) -> Path:
    """A new folder under `runs/`, named after configuration, loss and time."""
    section = getattr(config, "loss", None)
    parts = [config.name, loss_name(config)]
    springs = getattr(section, "springs", None)
    if springs is not None:
        parts.append(springs.family)
    edges = getattr(section, "edges", None)
    if edges is not None and edges.kind != "complete":
        parts.append(edges.kind)
    name = "-".join([*parts, f"{datetime.now():%Y%m%d-%H%M%S}"])
    others = len(list(Path("runs").glob(f"{name}*")))
    return Path("runs") / (f"{name}-{others + 1}" if others else name)


def _check_new(run: Path) -> None:
    if run.is_symlink() and not run.exists():
        raise InputError(f"{run} is a link to {run.readlink()}, which does not exist; remove it")
    if run.is_dir() and any(run.iterdir()):
        raise InputError(
            f"{run} is not empty; name another --output, or continue with --resume {run}"
        )
    # The folder is made when training starts, so that a start that fails leaves nothing.
    existing = next(path for path in (run, *real_path(run).parents) if path.exists())
    check_folder(existing)


def loss_name(config: Config) -> str:
    """Name of the loss; a system may have no section for it."""
    return str(getattr(getattr(config, "loss", None), "name", "custom"))
