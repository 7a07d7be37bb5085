"""`molgen-energy train`: from data to a run's folder."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molgen_energy.cli.console import INTERRUPTED, ThrottledLog, progress_bar, say, warn
from molgen_energy.distributed import broadcast, is_main, local_device, process_group, world_size
from molgen_energy.errors import InputError
from molgen_energy.output import check_folder

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from molgen_energy.config import Config
    from molgen_energy.systems.base import System
    from molgen_energy.training.loop import Summary
    from molgen_energy.training.task import Task


def command(
    loss: str | None = typer.Option(
        None,
        "--loss",
        help="energy, mse, mae or kabsch; of spins local_field, cross_entropy, margin or "
        "true_energy.",
    ),
    springs: str | None = typer.Option(
        None,
        "--springs",
        help="Springs of the energy loss: constant, exponential, inverse, inverse_square, "
        "lennard_jones.",
    ),
    edges: str | None = typer.Option(
        None,
        "--edges",
        help="Pairs that springs join: complete, sparse, symmetrized, bonds.",
    ),
    config: str | None = typer.Option(
        None, "--config", help="Name of a shipped configuration or a YAML file; default: quick."
    ),
    assignments: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change a value, such as model.layers=6."
    ),
    data: Path | None = typer.Option(
        None, "--data", help="HDF5 file of `preprocess`; default: as configured."
    ),
    steps: int | None = typer.Option(None, "--steps", help="Length of the run in steps."),
    epochs: int | None = typer.Option(None, "--epochs", help="Length in passes of the data."),
    batch_size: int | None = typer.Option(None, "--batch-size"),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate."),
    seed: int | None = typer.Option(None, "--seed"),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda, cuda:1."),
    output: Path | None = typer.Option(
        None, "-o", "--output", help="Folder of the run; default: a new one under runs/."
    ),
    resume: Path | None = typer.Option(
        None, "--resume", metavar="RUN", help="Go on with a run that was stopped or killed."
    ),
) -> None:
    """Train a diffusion model of molecules, or the model of another physical system.

    With nothing else, `--loss energy` trains a small model on the bundled sample of QM9.
    """
    from molgen_energy.config import parse_assignments
    from molgen_energy.systems.registry import SYSTEMS, load_config, system_named
    from molgen_energy.training.checkpoint import load_checkpoint
    from molgen_energy.training.devices import choose_device
    from molgen_energy.training.loop import TrainingInterrupted, total_steps, train

    length: dict[str, Any] = {"training.steps": steps, "training.epochs": epochs}
    others: dict[str, Any] = {
        "loss.name": loss,
        "loss.springs.family": springs,
        "loss.edges.kind": edges,
        "training.batch_size": batch_size,
        "training.lr": lr,
        "training.seed": seed,
    }
    given = {key: value for key, value in (others | length).items() if value is not None}
    if data is not None:
        given["data.path"] = str(data)
    target = local_device(choose_device(device))
    with process_group(target):
        if resume is not None:
            _only_length(given, config, assignments, output)
            run = resume
            if (run / "state.yaml").is_file():
                raise InputError(
                    f"--resume {run} is a checkpoint; name its run, {run.parent.parent}"
                )
            checkpoint = load_checkpoint(run)
            schema = system_named(checkpoint.system, str(run)).config
            settled = checkpoint.config_as(schema).replaced(given)
        else:
            changes = parse_assignments(assignments)
            shipped = load_config(config or "quick")
            name = changes.get("loss.name") if loss is None else loss
            name = _loss(shipped) if name is None else name
            for option, value in (("--springs", springs), ("--edges", edges)):
                if value is not None and name != "energy":
                    raise InputError(f"{option} goes with --loss energy, not {name}")
            settled = shipped.replaced(changes | given)
            run = output or broadcast(_new_run(settled))
            if is_main():
                _check_new(run)
        system = SYSTEMS[settled.system]
        with _Preparation() as preparation:
            task = system.task(settled, target, preparation)
        steps_in_all = total_steps(task.config.training, task.batches_per_epoch)
        if resume is not None and checkpoint.state["progress"]["step"] >= steps_in_all:
            say(f"{run} is complete at step {steps_in_all:,}; --steps N with more makes it go on")
            return
        _announce(system, task, run, steps_in_all)
        try:
            with progress_bar("loss", "rate") as bar:
                handle = bar.add_task("training", total=steps_in_all, loss="", rate="")
                summary = train(
                    task, run, _BarObserver(bar, handle, system.samples), resume=resume is not None
                )
        except TrainingInterrupted as stopped:
            say(f"{stopped}; go on with: molgen-energy train --resume {shlex.quote(str(run))}")
            sys.exit(INTERRUPTED)
    _conclude(settled, summary)


class _Preparation:
    """A bar that appears when there is something to wait for."""

    def __init__(self) -> None:
        self._bar = progress_bar(transient=True)
        self._handle: TaskID | None = None

    def __enter__(self) -> _Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._handle is None:
            self._bar.start()
            self._handle = self._bar.add_task("finding symmetries", total=total)
        self._bar.update(self._handle, completed=done, total=total)


class _BarObserver:
    def __init__(self, bar: Progress, handle: TaskID, samples: str) -> None:
        self._bar, self._handle, self._log = bar, handle, ThrottledLog()
        self._samples = samples

    def progress(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
        shown, rate = f"loss {loss:.4f}", f"{samples_per_second:,.0f} {self._samples}/s"
        self._bar.update(self._handle, completed=step, loss=shown, rate=rate)
        self._log.say(f"step {step:,} of {steps:,}, {shown}, {rate}")


def _only_length(
    given: dict[str, Any], config: str | None, assignments: list[str], output: Path | None
) -> None:
    allowed = {"training.steps", "training.epochs", "data.path"}
    refused = sorted(given.keys() - allowed)
    if refused or config is not None or assignments or output is not None:
        what = refused[0] if refused else "its configuration or folder"
        raise InputError(
            f"--resume goes on with a run as it was, so {what} cannot change; only --steps, "
            "--epochs, --data (moved) and --device can"
        )


def _new_run(config: Config) -> Path:
    loss, section = _loss(config), getattr(config, "loss", None)
    if section is not None and loss == "energy":
        loss += f"-{section.springs.family}"
        if section.edges.kind != "complete":
            loss += f"-{section.edges.kind}"
    name = f"{config.name}-{loss}-{datetime.now():%Y%m%d-%H%M%S}"
    others = len(list(Path("runs").glob(f"{name}*")))
    return Path("runs") / (f"{name}-{others + 1}" if others else name)


def _check_new(run: Path) -> None:
    if run.is_dir() and any(run.iterdir()):
        raise InputError(f"{run} is not empty; name another --output, or go on with --resume {run}")
    # The folder itself is made when training starts, so that a refused start leaves nothing.
    existing = next(path for path in (run, *run.resolve().parents) if path.exists())
    check_folder(existing)


def _loss(config: Config) -> str:
    """Name of the loss; a system may have no section on it."""
    return str(getattr(getattr(config, "loss", None), "name", "its own"))


def _announce(system: System, task: Task, run: Path, steps: int) -> None:
    data = task.state["data"]
    parameters = sum(p.numel() for p in task.model.parameters())
    say(f"data    {data['source']}: {data['training_samples']:,} training {system.samples}")
    say(f"model   {system.describe(task.config, parameters)}, on {task.device}")
    divided = f", divided among {world_size()} processes" if world_size() > 1 else ""
    batch = task.config.training.batch_size
    say(f"length  {steps:,} steps of {batch} {system.samples}{divided}")
    say(f"run     {run}")


def _conclude(config: Config, summary: Summary) -> None:
    minutes = f"{summary.seconds / 60:.1f} minutes"
    valid = "" if summary.valid_loss is None else f", validation loss {summary.valid_loss:.4g}"
    say(f"trained {summary.steps:,} steps in {minutes}{valid}: {summary.run}")
    if summary.skipped:
        warn(f"{summary.skipped:,} steps were skipped, for loss or gradient were not finite")
    if config.data.path is None and config.system == "molecules":
        say(
            "This was the bundled sample of 1,000 training molecules and a small model, a first "
            "look. To train in full:\n"
            "  molgen-energy preprocess qm9 -o qm9.h5\n"
            "  molgen-energy train --config qm9_gdm_aug --data qm9.h5"
        )
    run = shlex.quote(str(summary.run))
    count = " -n 100" if config.system == "molecules" else ""
    say(f"next    molgen-energy sample{count} --checkpoint {run}")
