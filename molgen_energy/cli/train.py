"""`molgen-energy train`: train a model on data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.console import INTERRUPTED, ThrottledLog, progress_bar, say, warn
from molgen_energy.distributed import world_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from molgen_energy.api.train import TrainingRun
    from molgen_energy.training.loop import TrainingSummary


def command(
    loss: str | None = typer.Option(
        None,
        "--loss",
        help="energy, score_energy, mse, mae or kabsch; for spins local_field, cross_entropy, "
        "margin or true_energy.",
    ),
    springs: str | None = typer.Option(
        None,
        "--springs",
        help="Springs of the energy loss: constant, exponential, inverse, inverse_square, "
        "lennard_jones, or auto, learnt from errors.",
    ),
    edges: str | None = typer.Option(
        None,
        "--edges",
        help="Pairs with springs: complete, sparse, symmetrized, bonds.",
    ),
    config: str | None = typer.Option(
        None, "--config", help="Name of a shipped configuration or a YAML file; default: quick."
    ),
    assignments: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change a value, such as model.layers=6."
    ),
    data: Path | None = typer.Option(
        None, "--data", help="HDF5 file of `preprocess`; default: that of the configuration."
    ),
    steps: int | None = typer.Option(None, "--steps", help="Length of the run in steps."),
    epochs: int | None = typer.Option(None, "--epochs", help="Length of the run in epochs."),
    batch_size: int | None = typer.Option(None, "--batch-size", help="Samples in a batch."),
    lr: float | None = typer.Option(None, "--lr", help="Learning rate."),
    seed: int | None = typer.Option(None, "--seed", help="Seed of the run."),
    init: Path | None = typer.Option(
        None,
        "--init",
        metavar="RUN|NAME",
        help="Start from the weights of a run, a checkpoint, or the name of pretrained weights.",
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda, cuda:1."),
    output: Path | None = typer.Option(
        None, "-o", "--output", help="Folder of the run; default: a new one under runs/."
    ),
    resume: Path | None = typer.Option(
        None, "--resume", metavar="RUN", help="Continue an interrupted run."
    ),
) -> None:
    """Train a diffusion model of molecules, or the model of another physical system.

    Without a configuration, `--loss energy` trains a small model on the bundled sample of QM9.
    """
    from molgen_energy.api.train import train
    from molgen_energy.config import parse_assignments
    from molgen_energy.training.loop import TrainingInterrupted

    with _Bars() as bars:
        try:
            summary = train(
                config,
                data=data,
                loss=loss,
                springs=springs,
                edges=edges,
                steps=steps,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                seed=seed,
                init=init,
                changes=parse_assignments(assignments),
                device=device,
                output=output,
                resume=resume,
                callback=bars.step,
                progress=bars.prepare,
                on_start=bars.start,
            )
        except TrainingInterrupted as interrupted:
            bars.stop()
            run = shlex.quote(str(interrupted.run))
            say(f"{interrupted}; continue with: molgen-energy train --resume {run}")
            sys.exit(INTERRUPTED)
    _conclude(summary)


class _Bars:
    """A bar for preparing data, if that takes long, then one for training."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._handle: TaskID | None = None
        self._log, self._samples = ThrottledLog(), ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def prepare(self, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = progress_bar(transient=True)
            self._bar.start()
            self._handle = self._bar.add_task("finding symmetries", total=total)
        assert self._handle is not None
        self._bar.update(self._handle, completed=done, total=total)

    def start(self, run: TrainingRun) -> None:
        self.stop()
        _announce(run)
        self._samples = run.system.samples
        self._bar = progress_bar("loss", "rate")
        self._bar.start()
        self._handle = self._bar.add_task("training", total=run.steps, loss="", rate="")

    def step(self, step: int, steps: int, loss: float, samples_per_second: float) -> None:
        assert self._bar is not None and self._handle is not None
        shown, rate = f"loss {loss:.4f}", f"{samples_per_second:,.0f} {self._samples}/s"
        self._bar.update(self._handle, completed=step, loss=shown, rate=rate)
        self._log.say(f"step {step:,} of {steps:,}, {shown}, {rate}")


def _announce(run: TrainingRun) -> None:
    task, samples = run.task, run.system.samples
    data = task.state["data"]
    parameters = sum(p.numel() for p in task.model.parameters())
    say(f"data    {data['source']}: {data['training_samples']:,} training {samples}")
    say(f"model   {run.system.describe(task.config, parameters)}, on {task.device}")
    shared = f", shared by {world_size()} processes" if world_size() > 1 else ""
    batch = task.config.training.batch_size
    say(f"length  {run.steps:,} steps of {batch} {samples}{shared}")
    say(f"run     {run.folder}")


def _conclude(summary: TrainingSummary) -> None:
    from molgen_energy.systems.registry import SYSTEMS

    if summary.already_complete:
        say(f"{summary.run} is complete at step {summary.steps:,}; a larger --steps N continues it")
        return
    minutes = f"{summary.seconds / 60:.1f} minutes"
    valid = "" if summary.valid_loss is None else f", validation loss {summary.valid_loss:.4g}"
    say(f"trained {summary.steps:,} steps in {minutes}{valid}: {summary.run}")
    if summary.skipped:
        warn(f"skipped {summary.skipped:,} steps whose loss or gradient was not finite")
    system = SYSTEMS[summary.config.system]
    for line in system.after_training(summary.config).splitlines():
        say(line)
    count = system.sampling.get("count")
    option = "" if count is None else f" -n {count}"
    say(f"next    molgen-energy sample{option} --checkpoint {shlex.quote(str(summary.run))}")
