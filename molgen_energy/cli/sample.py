"""`molgen-energy sample`: from a checkpoint to a file of molecules."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.console import INTERRUPTED, Occasional, progress_bar, say, warn
from molgen_energy.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def command(
    count: int = typer.Option(100, "-n", "--count", help="How many molecules."),
    checkpoint: Path | None = typer.Option(
        None, "--checkpoint", help="A run's folder or a checkpoint; default: the newest in runs/."
    ),
    n_atoms: str | None = typer.Option(
        None,
        "--n-atoms",
        metavar="N|A-B",
        help="Atoms of each molecule; default: as often as in the training data.",
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Another seed, other molecules."),
    output: Path = typer.Option(
        Path("samples.sdf"), "-o", "--output", help="File to write: .sdf, .xyz or .h5."
    ),
    batch_size: int | None = typer.Option(
        None, "--batch-size", help="Molecules at once; default: what suits size and device."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda, cuda:1."),
    low_precision: bool = typer.Option(
        False, "--low-precision", help="bfloat16 for pairs of atoms: faster, slightly rougher."
    ),
) -> None:
    """Sample molecules from a trained model into a file of exactly N records."""
    from molgen_energy.output import check_writable
    from molgen_energy.sampling import sample_to_file
    from molgen_energy.systems.molecules import MoleculeGenerator
    from molgen_energy.training.checkpoint import load_checkpoint, newest_run
    from molgen_energy.training.device import choose_device

    sizes = None if n_atoms is None else _sizes(n_atoms)
    check_writable(output)
    loaded = load_checkpoint(checkpoint or newest_run(Path("runs")))
    generator = MoleculeGenerator(loaded, choose_device(device), seed, sizes, low_precision)
    step = loaded.state["progress"]["step"]
    provenance = f"{_run_name(loaded.path)}, step {step}"
    say(f"sampling {count:,} molecules from {provenance}, {generator.steps:,} steps each")
    began = time.perf_counter()
    with progress_bar("rate") as bar:
        handle = bar.add_task("sampling", total=max(count, 0), rate="")
        outcome = sample_to_file(
            generator,
            count,
            output,
            _BarObserver(bar, handle),
            batch_size,
            provenance,
            loaded.config.to_yaml(),
        )
    seconds = time.perf_counter() - began
    say(
        f"{outcome.written:,} molecules written to {outcome.path} in {seconds:.0f} s "
        f"({outcome.written / seconds:.2f} molecules/s)"
    )
    if outcome.not_finite:
        warn(f"{outcome.not_finite} molecules diverged; they stand in the file without coordinates")
    if outcome.interrupted:
        say(f"interrupted: {count - outcome.written:,} of {count:,} are missing")
        sys.exit(INTERRUPTED)
    say(f"next: molgen-energy evaluate {outcome.path}")


class _BarObserver:
    def __init__(self, bar: Progress, handle: TaskID) -> None:
        self._bar, self._handle, self._log = bar, handle, Occasional()
        self._began, self._done = time.perf_counter(), 0.0

    def advance(self, molecules: int, share: float) -> None:
        self._done += molecules * share
        rate = self._done / (time.perf_counter() - self._began)
        self._bar.update(self._handle, completed=round(self._done), rate=f"{rate:.2f} molecules/s")
        self._log.say(f"{self._done:,.0f} molecules, {rate:.2f} molecules/s")


def _run_name(checkpoint: Path) -> str:
    """`runs/x/checkpoints/last` is run x."""
    path = checkpoint.resolve()
    return path.parents[1].name if path.parent.name == "checkpoints" else path.name


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
