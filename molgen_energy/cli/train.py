"""`molgen-energy train`: train a model on data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molgen_energy.cli.common import checkpoints, imports, one_of
from molgen_energy.cli.console import (
    INTERRUPTED,
    ThrottledLog,
    duration,
    progress_bar,
    say,
    show,
    time_left,
    warn,
)
from molgen_energy.distributed import world_size
from molgen_energy.errors import counted
from molgen_energy.resources import resource_directory

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from molgen_energy.api.train import TrainingRun
    from molgen_energy.training.loop import TrainingCost
    from molgen_energy.training.run import Run

_WHAT, _HOW, _RUN = "Loss, model and data", "Length and optimisation", "Run"  # panels of the help
# Names for the help and for completion, without importing PyTorch; a test compares the registries.
_LOSSES = ("energy", "score_energy", "mse", "mae", "kabsch")
_SPIN_LOSSES = ("local_field", "cross_entropy", "margin", "true_energy")
_SPRINGS = ("constant", "exponential", "inverse", "inverse_square", "lennard_jones")
_EDGES = ("complete", "sparse", "symmetrized", "bonds")
EXAMPLES = """
molgen-energy train --loss energy
molgen-energy train --loss mse --data mine.h5 --epochs 200 -o runs/mine
molgen-energy train --config qm9_gdm_aug --dry-run
molgen-energy train --from qm9_energy --data mine.h5
molgen-energy train --data qm9.h5 --condition gap,alpha -o runs/gap
molgen-energy train --config distil --teacher qm9_energy --data qm9.h5
molgen-energy train --resume runs/mine
"""


def _configurations(incomplete: str) -> list[str]:
    """For completion: the names of the shipped configurations."""
    names = sorted(path.stem for path in resource_directory("configs").glob("*.yaml"))
    return [name for name in names if name.startswith(incomplete)]


def command(
    loss: str | None = typer.Option(
        None,
        "--loss",
        metavar="NAME",
        rich_help_panel=_WHAT,
        autocompletion=one_of(*_LOSSES, *_SPIN_LOSSES),
        help=f"{', '.join(_LOSSES[:-1])} or {_LOSSES[-1]}; for spins "
        f"{', '.join(_SPIN_LOSSES[:-1])} or {_SPIN_LOSSES[-1]}.",
    ),
    springs: str | None = typer.Option(
        None,
        "--springs",
        metavar="NAME",
        rich_help_panel=_WHAT,
        autocompletion=one_of(*_SPRINGS, "auto"),
        help=f"Springs of the energy loss: {', '.join(_SPRINGS)}, or auto, learnt from errors.",
    ),
    edges: str | None = typer.Option(
        None,
        "--edges",
        metavar="NAME",
        rich_help_panel=_WHAT,
        autocompletion=one_of(*_EDGES),
        help=f"Pairs with springs: {', '.join(_EDGES)}.",
    ),
    config: str | None = typer.Option(
        None,
        "--config",
        metavar="NAME|FILE",
        rich_help_panel=_WHAT,
        autocompletion=_configurations,
        help="A shipped configuration (`molgen-energy info` lists them) or a YAML file; default: "
        "quick, with --from fine_tune.",
    ),
    assignments: list[str] = typer.Option(
        [],
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_WHAT,
        help="Change a value, such as model.layers=6.",
    ),
    data: Path | None = typer.Option(
        None,
        "--data",
        metavar="FILE.h5",
        rich_help_panel=_WHAT,
        help="HDF5 file of `preprocess`; default: that of the configuration.",
    ),
    condition: str | None = typer.Option(
        None,
        "--condition",
        metavar="NAMES",
        rich_help_panel=_WHAT,
        help="Properties of the data, such as gap,alpha, which `sample --where` can then ask for.",
    ),
    initial_weights: Path | None = typer.Option(
        None,
        "--from",
        metavar="RUN|NAME",
        rich_help_panel=_WHAT,
        autocompletion=checkpoints,
        help="Start from the weights of a run, a checkpoint, or the name of pretrained weights. "
        "Without --config this fine-tunes them: all settings suit few molecules.",
    ),
    teacher: Path | None = typer.Option(
        None,
        "--teacher",
        metavar="RUN|NAME",
        rich_help_panel=_WHAT,
        autocompletion=checkpoints,
        help="With --config distil: the run, checkpoint, or name of pretrained weights that a "
        "student learns from. The student samples in 8 evaluations of the network.",
    ),
    steps: int | None = typer.Option(
        None, "--steps", metavar="N", rich_help_panel=_HOW, help="Length of the run in steps."
    ),
    epochs: int | None = typer.Option(
        None, "--epochs", metavar="N", rich_help_panel=_HOW, help="Length of the run in epochs."
    ),
    batch_size: int | None = typer.Option(
        None, "--batch-size", metavar="N", rich_help_panel=_HOW, help="Samples in a batch."
    ),
    lr: float | None = typer.Option(
        None, "--lr", metavar="X", rich_help_panel=_HOW, help="Learning rate."
    ),
    seed: int | None = typer.Option(
        None, "--seed", metavar="N", rich_help_panel=_HOW, help="Seed of the run."
    ),
    device: str = typer.Option(
        "auto",
        "--device",
        metavar="NAME",
        rich_help_panel=_HOW,
        autocompletion=one_of("auto", "cpu", "cuda"),
        help="auto, cpu, cuda, cuda:1.",
    ),
    output: Path | None = typer.Option(
        None,
        "-o",
        "--output",
        metavar="FOLDER",
        rich_help_panel=_RUN,
        help="Folder of the run; default: a new one under runs/.",
    ),
    resume: Path | None = typer.Option(
        None,
        "--resume",
        metavar="RUN",
        rich_help_panel=_RUN,
        help="Continue an interrupted run.",
    ),
    dry_run: bool = typer.Option(
        False,
        "--dry-run",
        rich_help_panel=_RUN,
        help="Do not train: print the configuration, and the time and memory that training "
        "needs, measured over a few steps.",
    ),
) -> None:
    """Train a diffusion model of molecules, or the model of another physical system.

    Without a configuration, `--loss energy` trains a small model on the bundled sample of QM9.
    """
    with imports():
        from molgen_energy.api.train import estimate_training, train
        from molgen_energy.config import parse_assignments
        from molgen_energy.training.loop import TrainingInterrupted

    options: dict[str, Any] = {
        "data": data,
        "loss": loss,
        "springs": springs,
        "edges": edges,
        "condition": condition,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "initial_weights": initial_weights,
        "teacher": teacher,
        "changes": parse_assignments(assignments),
        "device": device,
        "output": output,
        "resume": resume,
    }
    with _Bars() as bars:
        options["progress"] = bars.prepare
        if dry_run:
            _show_cost(estimate_training(config, **options, on_start=bars.announce))
            return
        try:
            summary = train(config, **options, callback=bars.step, on_start=bars.start)
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

    def announce(self, run: TrainingRun) -> None:
        """For a dry run: its configuration, which is the result, and what it is, in words."""
        self.stop()
        show(run.task.config.to_yaml().rstrip("\n"))
        _announce(run)

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
        self._log.say(f"step {step:,} of {steps:,}, {shown}, {rate}{time_left(self._bar)}")


def _show_cost(cost: TrainingCost) -> None:
    say(
        f"time    about {duration(cost.seconds)}: {cost.step:.3g} s a step, measured over "
        f"{counted(cost.measured, 'steps')}, and about {duration(cost.validation)} a validation"
    )
    if cost.memory is not None:
        say(f"memory  about {cost.memory / 2**30:.2f} GiB")
    say("dry run: nothing was written; leave out --dry-run to train")


def _announce(run: TrainingRun) -> None:
    from molgen_energy.config import resolved
    from molgen_energy.training.initial import describe_initial_weights
    from molgen_energy.training.plan import describe_plan

    task, samples = run.task, run.system.samples
    data = task.state["data"]
    parameters = sum(p.numel() for p in task.model.parameters())
    count = counted(data["training_samples"], f"training {samples}")
    say(f"data    {data['source']}: {count}")
    say(f"model   {run.system.describe(task.config, parameters)}, on {task.device}")
    shared = f", shared by {world_size()} processes" if world_size() > 1 else ""
    length = counted(run.steps, "steps")
    initial = describe_initial_weights(task.state)
    if initial:
        say(f"from    {initial}")
    if "teacher" in task.state:
        say(f"teacher {task.state['teacher']['origin']}")
    size = counted(resolved(task.config.training.batch_size) or 0, samples)
    if (pairs := task.config.training.pairs_per_batch) is not None:
        mean = data["training_samples"] / task.starts[1]
        size = f"at most {pairs:,} pairs of atoms, {mean:,.3g} {samples} on average"
    say(f"length  {length} of {size}{shared}")
    if getattr(getattr(task.config, "fine_tuning", None), "relative_lr", None) is not None:
        for line in describe_plan(task):
            say(line)
    if task.config.training.sample_from == "best" and not task.validation_samples:
        warn(
            f"{data['source']} has no validation {samples}, so nothing tells which weights are the "
            "best: the last ones are kept; make the file with `preprocess --split 0.9,0.1,0`"
        )
    say(f"run     {run.folder}")


def _conclude(summary: Run) -> None:
    from molgen_energy.systems.registry import SYSTEMS
    from molgen_energy.training.state import has_stalled

    if summary.already_complete:
        complete = f"{summary.folder} is complete at step {summary.steps:,}"
        if has_stalled(summary.config.training, summary.steps, summary.best_step):
            say(f"{complete}: no better validation loss since step {summary.best_step:,}")
            return
        say(f"{complete}; a larger --steps N continues it")
        return
    valid = "" if summary.valid_loss is None else f", validation loss {summary.valid_loss:.4g}"
    if summary.best_valid is not None and summary.config.training.sample_from == "best":
        valid += (
            f", {summary.best_valid:.4g} of the best weights, those of step {summary.best_step:,}"
        )
    say(
        f"trained {counted(summary.steps, 'steps')} in {duration(summary.seconds)}{valid}: "
        f"{summary.folder}"
    )
    if summary.skipped:
        warn(f"skipped {counted(summary.skipped, 'steps')} whose loss or gradient was not finite")
    system = SYSTEMS[summary.config.system]
    for line in system.after_training(summary.config).splitlines():
        say(line)
    run = shlex.quote(str(summary.folder))
    say(f"next    {system.next_command(summary.config, run)}")
