"""`molgen-energy sample`: from a checkpoint to a file of samples."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molgen_energy.cli.console import INTERRUPTED, ThrottledLog, progress_bar, say, stdout, warn
from molgen_energy.distributed import broadcast, is_main, local_device, process_group, world_size
from molgen_energy.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress


def command(
    count: int | None = typer.Option(
        None,
        "-n",
        "--count",
        help="How many; default: 100, of spins all that there are couplings of.",
    ),
    checkpoint: Path | None = typer.Option(
        None,
        "--checkpoint",
        metavar="RUN|NAME|list",
        help="A run's folder, a checkpoint, or shipped weights by the name that `list` shows; "
        "default: the newest in runs/, else shipped weights of QM9.",
    ),
    data: Path | None = typer.Option(
        None,
        "--data",
        help="Of spins: couplings to predict for, HDF5 of `preprocess` or .npz with `right` and "
        "`down`; default: the test split of the run's data.",
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
        help="Another seed, other samples; default: 0.",
    ),
    sampler: str | None = typer.Option(
        None,
        "--sampler",
        help="ancestral, ddim, dpm++ or heun; of flow matching euler or heun. Default: the first.",
    ),
    steps: int | None = typer.Option(
        None,
        "--steps",
        help="Steps of the sampler; default: as many as in training, of shipped weights as many "
        "as they were judged with.",
    ),
    spacing: str | None = typer.Option(
        None,
        "--spacing",
        help="Where the sampler's levels are: log, even or quadratic, of flow matching even or "
        "quadratic. Default: the first, of shipped weights that which they were judged with.",
    ),
    eta: float | None = typer.Option(
        None, "--eta", help="Noise of ddim's steps, 0 (the default) to 1 (as ancestral)."
    ),
    output: Path | None = typer.Option(
        None,
        "-o",
        "--output",
        help="File to write: of molecules .sdf (default: samples.sdf), .xyz or .h5, else .h5.",
    ),
    batch_size: int | None = typer.Option(
        None, "--batch-size", min=1, help="Samples at once; default: what suits size and device."
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

    Without a run of your own, from weights that ship with the package. From a run on another
    physical system, predict its samples. Of molecules, finished batches wait in FILE.parts until
    all are there, so that nothing is lost when sampling is broken off, and
    `torchrun --nproc-per-node K -m molgen_energy sample` shares the work.
    """
    from molgen_energy.data.shards import shards_folder
    from molgen_energy.systems.registry import system_named
    from molgen_energy.training.checkpoint import load_checkpoint
    from molgen_energy.training.devices import choose_device

    if checkpoint == Path("list") and not checkpoint.exists():
        _list()
        return
    values = {
        "count": count,
        "n_atoms": None if n_atoms is None else _sizes(n_atoms),
        "seed": seed,
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "eta": eta,
        "batch_size": batch_size,
        "low_precision": low_precision or None,
        "data": data,
    }
    given = {name: value for name, value in values.items() if value is not None}
    chosen = local_device(choose_device(device))
    with process_group(chosen):
        # The first process decides for all: the newest run may be another one a second later.
        found, path, asked = broadcast(
            _asked(given, checkpoint, output, resume) if is_main() else None
        )
        loaded = load_checkpoint(found, weights=["ema"])
        system = system_named(loaded.system, str(loaded.path))
        generator = system.generator(loaded, chosen, asked)
        if path.resolve() in [source.resolve() for source in generator.inputs]:
            raise InputError(f"-o {path} is a file that samples are made from; name another")
        total, samples = generator.count, system.samples
        if not generator.distributed and not is_main():
            return
        shared = (
            f", by {world_size()} processes" if generator.distributed and world_size() > 1 else ""
        )
        say(f"sampling {total:,} {samples} from {generator.origin}: {generator.method}{shared}")
        go_on = f"go on with: molgen-energy sample --resume {shlex.quote(str(path))}"
        began = time.perf_counter()
        try:
            with progress_bar("rate") as bar:
                observer = SamplingBar(bar, total, samples, go_on)
                outcome = generator.write(path, observer, resume is not None)
        except (OSError, RuntimeError, MemoryError):
            if shards_folder(path).exists():
                say(f"what is finished stays in {shards_folder(path)}; {go_on}")
            raise
    if not is_main():
        return
    seconds = time.perf_counter() - began
    if not outcome.interrupted:
        say(
            f"{outcome.written:,} {samples} written to {outcome.path} in {seconds:.0f} s "
            f"({outcome.drawn / seconds:.2f} {samples}/s)"
        )
    elif outcome.path is not None:
        say(f"what is finished can be used already: {outcome.path}")
    if outcome.not_finite:
        warn(f"{outcome.not_finite} {samples} diverged; they stand in the file without coordinates")
    if outcome.interrupted:
        sys.exit(INTERRUPTED)
    say(f"next: molgen-energy evaluate {shlex.quote(str(outcome.path))}")


def _asked(
    given: dict[str, Any], checkpoint: Path | None, output: Path | None, resume: Path | None
) -> tuple[Path, Path, dict[str, Any]]:
    """The checkpoint, the file to write, and a value for each option of the system."""
    from molgen_energy.data.shards import read_sampling_job, shards_folder
    from molgen_energy.output import resolve_symlink
    from molgen_energy.systems.registry import SYSTEMS, system_named
    from molgen_energy.training.checkpoint import load_checkpoint, newest_run
    from molgen_energy.training.pretrained import DEFAULT, resolve_checkpoint

    if resume is None:
        chosen = newest_run(Path("runs")) or Path(DEFAULT) if checkpoint is None else checkpoint
        found = resolve_checkpoint(chosen)
        begun = load_checkpoint(found)
        system = system_named(begun.system, str(begun.path))
        for name in given:
            if name not in system.sampling:
                serve = ", ".join(map(_option, system.sampling))
                raise InputError(
                    f"{_option(name)} has no meaning for {system.samples}, which {chosen} makes; "
                    f"there serve {serve}"
                )
        path = resolve_symlink(Path(system.output) if output is None else output)
        system.check_output(path)
        return found, path, dict(system.sampling) | given
    if output is not None and output != resume:
        raise InputError(f"--resume {resume} names the file itself; leave out -o {output}")
    resume = resolve_symlink(resume)
    job = read_sampling_job(resume)
    options = SYSTEMS["molecules"].sampling
    for name, value in given.items():
        there = getattr(job, name, None)
        if value != there:
            was = "-".join(map(str, there)) if isinstance(there, tuple) else there
            raise InputError(
                f"{_option(name)} cannot change: {shards_folder(resume)} was begun with "
                f"{'the default' if was is None else was}; --resume needs no other option"
            )
    try:
        found = resolve_checkpoint(Path(job.checkpoint) if checkpoint is None else checkpoint)
    except InputError:
        if checkpoint is not None:
            raise
        remedy = "name its new place with --checkpoint"
        raise InputError(f"{job.checkpoint} does not exist; {remedy}") from None
    return found, resume, {name: getattr(job, name) for name in options}


def _list() -> None:
    """Print what weights ship."""
    from rich.table import Table

    from molgen_energy.training.pretrained import pretrained_weights

    table = Table("name", "weights", box=None, pad_edge=False)
    for name, weights in pretrained_weights().items():
        table.add_row(name, weights.summary)
    stdout.print(table)


def _option(name: str) -> str:
    """The option of a parameter."""
    return {"count": "-n"}.get(name, f"--{name.replace('_', '-')}")


class SamplingBar:
    """Shows how sampling goes, on a bar with the column `rate`."""

    def __init__(
        self, bar: Progress, total: int, samples: str, go_on: str, title: str = "sampling"
    ) -> None:
        self._samples = samples
        self._bar, self._handle = bar, bar.add_task(title, total=max(total, 0), rate="")
        self._total, self._go_on, self._log = total, go_on, ThrottledLog()
        self._began, self._before, self._done = time.perf_counter(), 0, 0.0

    def found(self, samples: int) -> None:
        self._before = samples
        say(f"{samples:,} of {self._total:,} {self._samples} are finished already")

    def interrupted(self, samples: int) -> None:
        say(
            f"interrupted: {samples:,} of {self._total:,} {self._samples} are finished; "
            f"{self._go_on}"
        )

    def advance(self, samples: int, share: float) -> None:
        self._done += samples * share
        rate = self._done / (time.perf_counter() - self._began)
        there = self._before + self._done
        self._bar.update(self._handle, completed=round(there), rate=f"{rate:.2f} {self._samples}/s")
        self._log.say(f"{there:,.0f} {self._samples}, {rate:.2f} {self._samples}/s")


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
