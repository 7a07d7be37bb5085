"""`molgen-energy sample`: from a checkpoint to a file of molecules."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molgen_energy.cli.console import INTERRUPTED, Occasional, progress_bar, say, warn
from molgen_energy.distributed import from_main, is_main, joined, local_device, world_size
from molgen_energy.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

_COUNT, _SEED, _OUTPUT = 100, 0, Path("samples.sdf")
_SETTINGS = (
    "count", "n_atoms", "seed", "sampler", "steps", "eta", "batch_size", "low_precision",
)  # fmt: skip
"""What settles the molecules, besides the checkpoint; attributes of `parts.Job`."""


def command(
    count: int | None = typer.Option(
        None, "-n", "--count", help=f"How many molecules; default: {_COUNT}."
    ),
    checkpoint: Path | None = typer.Option(
        None, "--checkpoint", help="A run's folder or a checkpoint; default: the newest in runs/."
    ),
    n_atoms: str | None = typer.Option(
        None,
        "--n-atoms",
        metavar="N|A-B",
        help="Atoms of each molecule; default: as often as in the training data.",
    ),
    seed: int | None = typer.Option(
        None,
        "--seed",
        min=0,
        max=2**64 - 1,
        help=f"Another seed, other molecules; default: {_SEED}.",
    ),
    sampler: str | None = typer.Option(
        None,
        "--sampler",
        help="ancestral, ddim, dpm++ or heun; of flow matching euler or heun. Default: the first.",
    ),
    steps: int | None = typer.Option(
        None, "--steps", help="Steps of the sampler; default: as many as in training."
    ),
    eta: float | None = typer.Option(
        None, "--eta", help="Noise of ddim's steps, 0 (the default) to 1 (as ancestral)."
    ),
    output: Path | None = typer.Option(
        None, "-o", "--output", help=f"File to write: .sdf, .xyz or .h5; default: {_OUTPUT}."
    ),
    batch_size: int | None = typer.Option(
        None, "--batch-size", help="Molecules at once; default: what suits size and device."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda, cuda:1."),
    low_precision: bool = typer.Option(
        False, "--low-precision", help="bfloat16 for pairs of atoms: faster, slightly rougher."
    ),
    resume: Path | None = typer.Option(
        None,
        "--resume",
        metavar="FILE",
        help="Go on with a file that was broken off; needs no other option.",
    ),
) -> None:
    """Sample molecules from a trained model into a file of exactly N records.

    Finished batches wait in FILE.parts until all are there, so that nothing is lost when sampling
    is broken off. `torchrun --nproc-per-node K -m molgen_energy sample` shares the work.
    """
    from molgen_energy.parts import parts_folder
    from molgen_energy.sampling import sample_to_file
    from molgen_energy.systems.molecules import MoleculeGenerator
    from molgen_energy.training.checkpoint import load_checkpoint
    from molgen_energy.training.device import choose_device

    values = {
        "count": count,
        "n_atoms": None if n_atoms is None else _sizes(n_atoms),
        "seed": seed,
        "sampler": sampler,
        "steps": steps,
        "eta": eta,
        "batch_size": batch_size,
        "low_precision": low_precision or None,
    }
    given = {name: value for name, value in values.items() if value is not None}
    chosen = local_device(choose_device(device))
    with joined(chosen):
        # The first process decides for all: the newest run may be another one a second later.
        path, asked, again = from_main(
            _asked(given, checkpoint, output, resume) if is_main() else None
        )
        loaded = load_checkpoint(Path(asked["checkpoint"]), weights=["ema"])
        generator = MoleculeGenerator(
            loaded,
            chosen,
            asked["seed"],
            asked["n_atoms"],
            asked["low_precision"],
            asked["sampler"],
            asked["steps"],
            asked["eta"],
        )
        kind, total = generator.sampler, asked["count"]
        shared = "" if world_size() == 1 else f", by {world_size()} processes"
        say(
            f"sampling {total:,} molecules from {generator.origin}: {generator.sampler_name}, "
            f"{kind.steps:,} steps, {kind.evaluations:,} network evaluations each{shared}"
        )
        go_on = f"go on with: molgen-energy sample --resume {shlex.quote(str(path))}"
        began = time.perf_counter()
        try:
            with progress_bar("rate") as bar:
                observer = _BarObserver(bar, total, go_on)
                outcome = sample_to_file(
                    generator, total, path, observer, asked["batch_size"], again
                )
        except (OSError, RuntimeError, MemoryError):
            if parts_folder(path).exists():
                say(f"what is finished stays in {parts_folder(path)}; {go_on}")
            raise
    if not is_main():
        return
    seconds = time.perf_counter() - began
    if not outcome.interrupted:
        say(
            f"{outcome.written:,} molecules written to {outcome.path} in {seconds:.0f} s "
            f"({outcome.drawn / seconds:.2f} molecules/s)"
        )
    elif outcome.path is not None:
        say(f"what is finished can be used already: {outcome.path}")
    if outcome.not_finite:
        warn(f"{outcome.not_finite} molecules diverged; they stand in the file without coordinates")
    if outcome.interrupted:
        sys.exit(INTERRUPTED)
    say(f"next: molgen-energy evaluate {shlex.quote(str(outcome.path))}")


def _asked(
    given: dict[str, Any], checkpoint: Path | None, output: Path | None, resume: Path | None
) -> tuple[Path, dict[str, Any], bool]:
    """The file, all that settles its molecules, and whether they were begun before."""
    from molgen_energy.output import check_writable, through_links
    from molgen_energy.parts import parts_folder, read_job
    from molgen_energy.sampling import check_name
    from molgen_energy.training.checkpoint import newest_run

    if resume is None:
        path = through_links(_OUTPUT if output is None else output)
        check_name(path)
        check_writable(path)
        defaults = {"count": _COUNT, "seed": _SEED, "low_precision": False}
        asked = dict.fromkeys(_SETTINGS) | defaults | given
        found = newest_run(Path("runs")) if checkpoint is None else checkpoint
        return path, asked | {"checkpoint": str(found)}, False
    if output is not None and output != resume:
        raise InputError(f"--resume {resume} names the file itself; leave out -o {output}")
    resume = through_links(resume)
    job = read_job(resume)
    for name, value in given.items():
        there = getattr(job, name)
        if value != there:
            option = {"count": "-n"}.get(name, f"--{name.replace('_', '-')}")
            was = "-".join(map(str, there)) if isinstance(there, tuple) else there
            raise InputError(
                f"{option} cannot change: {parts_folder(resume)} was begun with "
                f"{'the default' if was is None else was}; --resume needs no other option"
            )
    asked = {name: getattr(job, name) for name in (*_SETTINGS, "checkpoint")}
    if checkpoint is not None:
        asked["checkpoint"] = str(checkpoint)
    elif not Path(job.checkpoint).exists():
        raise InputError(f"{job.checkpoint} does not exist; name its new place with --checkpoint")
    return resume, asked, True


class _BarObserver:
    def __init__(self, bar: Progress, total: int, go_on: str) -> None:
        self._bar, self._handle = bar, bar.add_task("sampling", total=max(total, 0), rate="")
        self._total, self._go_on, self._log = total, go_on, Occasional()
        self._began, self._before, self._done = time.perf_counter(), 0, 0.0

    def found(self, molecules: int) -> None:
        self._before = molecules
        say(f"{molecules:,} of {self._total:,} molecules are finished already")

    def interrupted(self, molecules: int) -> None:
        say(f"interrupted: {molecules:,} of {self._total:,} molecules are finished; {self._go_on}")

    def advance(self, molecules: int, share: float) -> None:
        self._done += molecules * share
        rate = self._done / (time.perf_counter() - self._began)
        there = self._before + self._done
        self._bar.update(self._handle, completed=round(there), rate=f"{rate:.2f} molecules/s")
        self._log.say(f"{there:,.0f} molecules, {rate:.2f} molecules/s")


def _sizes(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        low = int(first)
        high = int(last) if dash else low
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high:
        raise InputError(f"--n-atoms {text}: expected a number such as 12, or a range such as 9-18")
    return low, high
