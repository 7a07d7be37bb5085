"""`molgen-energy sample`: from a checkpoint to a file of samples."""

from __future__ import annotations

import re
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.common import OVERWRITE, check_output, checkpoints, imports, one_of
from molgen_energy.cli.console import (
    INTERRUPTED,
    ThrottledLog,
    progress_bar,
    say,
    show,
    show_pairs,
    stdout,
    time_left,
    warn,
)
from molgen_energy.distributed import is_main, world_size
from molgen_energy.errors import InputError, counted

if TYPE_CHECKING:
    from rich.progress import Progress

    from molgen_energy.api.sample import SamplingJobInfo
    from molgen_energy.systems.base import SamplingResult

# Panels of the help.
_WHAT, _CONTROL = "What to sample", "Control"
_TEMPERATURE, _COMPUTATION = "Temperature", "Computation"
# Names for completion, without importing PyTorch; a test compares the registries.
_SAMPLERS = ("ancestral", "ddim", "dpm++", "sde-dpm++", "heun", "euler")
_SPACINGS = ("log", "even", "quadratic")
EXAMPLES = """
molgen-energy sample -n 1000
molgen-energy sample --checkpoint runs/mine --n-atoms 9-18 -o small.xyz
molgen-energy sample -n 100 --temperature 0.8 -o cold.sdf
molgen-energy sample --checkpoint runs/gap --where gap=0.3 --guidance 2
molgen-energy sample --keep fragment.sdf -n 20
molgen-energy sample --keep a.sdf --keep b.sdf --n-atoms 3-8 -n 20
molgen-energy sample --keep scaffold.sdf --keep-smarts C1CC1 -n 20
molgen-energy sample --like molecule.sdf --strength 0.3 -n 20
molgen-energy sample --checkpoint runs/conformers --smiles CCO -n 20
molgen-energy sample --tune --checkpoint runs/mine --steps 20
molgen-energy sample --resume samples.sdf
"""


def command(
    count: int | None = typer.Option(
        None,
        "-n",
        "--count",
        metavar="N",
        rich_help_panel=_WHAT,
        help="Number of samples; default: 100, for spins all lattices.",
    ),
    checkpoint: Path | None = typer.Option(
        None,
        "--checkpoint",
        metavar="RUN|NAME",
        rich_help_panel=_WHAT,
        autocompletion=checkpoints,
        help="A run's folder, a checkpoint, or the name of pretrained weights (`list` shows "
        "them); default: the newest run in runs/, else pretrained weights of QM9.",
    ),
    n_atoms: str | None = typer.Option(
        None,
        "--n-atoms",
        metavar="N|A-B",
        rich_help_panel=_WHAT,
        help="Number of atoms of a molecule, or its range; with --keep of the new atoms; default: "
        "as in the training data.",
    ),
    consistent_charges: bool = typer.Option(
        False,
        "--consistent-charges",
        rich_help_panel=_WHAT,
        help="Replace each formal charge that does not fit the generated bonds of its atom by the "
        "nearest one that does, as in the training molecules; what changes is counted.",
    ),
    data: Path | None = typer.Option(
        None,
        "--data",
        metavar="FILE",
        rich_help_panel=_WHAT,
        help="For spins: couplings, HDF5 of `preprocess` or .npz with `right` and `down`; default: "
        "the test split of the run's data. With --tune: real molecules.",
    ),
    seed: int | None = typer.Option(
        None,
        "--seed",
        min=0,
        max=2**64 - 1,
        metavar="N",
        rich_help_panel=_WHAT,
        help="Seed of the samples; default: 0.",
    ),
    where: list[str] = typer.Option(
        [],
        "--where",
        metavar="NAME=X|A:B",
        rich_help_panel=_CONTROL,
        help="Property that molecules shall have, in the unit of the data: gap=0.2, or for a range "
        "gap=0.2:0.25. Needs a network of `train --condition`. A name alone draws values from the "
        "training molecules; that is the default for all. Repeat it for several properties.",
    ),
    guidance: float | None = typer.Option(
        None,
        "--guidance",
        metavar="S",
        rich_help_panel=_CONTROL,
        help="Scale of classifier-free guidance. Above 1, such as 2: molecules have the properties "
        "of --where more closely, and are less diverse; takes twice the network evaluations. "
        "Default: 1, without.",
    ),
    formula: str | None = typer.Option(
        None,
        "--formula",
        metavar="FORMULA",
        rich_help_panel=_CONTROL,
        help="Atoms of each element, hydrogens included, such as C7H8N2; with --keep those of the "
        "whole molecule.",
    ),
    elements: str | None = typer.Option(
        None,
        "--elements",
        metavar="C,N,…",
        rich_help_panel=_CONTROL,
        help="The only elements that generated atoms may have, such as C,N,O,H. Without H there "
        "are no hydrogens.",
    ),
    keep: list[Path] = typer.Option(
        [],
        "--keep",
        metavar="FILE",
        rich_help_panel=_CONTROL,
        help="Fragment to complete: its atoms stay where they are, and the rest of the molecule is "
        "generated. An SDF, XYZ or HDF5 file, without the hydrogens in whose place new atoms are "
        "to bind. Repeat it for several fragments, between which a linker is generated. --n-atoms "
        "then counts the NEW atoms, such as 3-8; -n the molecules of each record.",
    ),
    keep_smarts: str | None = typer.Option(
        None,
        "--keep-smarts",
        metavar="SMARTS",
        rich_help_panel=_CONTROL,
        help="Keep only those atoms of --keep that match a pattern, such as c1ccccc1: a scaffold, "
        "whose R-groups are generated. Hydrogens stay only where the pattern names them.",
    ),
    resample: int | None = typer.Option(
        None,
        "--resample",
        min=1,
        metavar="N",
        rich_help_panel=_CONTROL,
        help="Take each step N times, with new noise between, so that generated atoms come to fit "
        "what is fixed (RePaint); for ancestral and sde-dpm++. Default: 1.",
    ),
    like: Path | None = typer.Option(
        None,
        "--like",
        metavar="FILE",
        rich_help_panel=_CONTROL,
        help="Molecules to vary: an SDF, XYZ or HDF5 file with all hydrogens. -n counts the "
        "variants of each.",
    ),
    strength: float | None = typer.Option(
        None,
        "--strength",
        metavar="X",
        rich_help_panel=_CONTROL,
        help="How far variants are from --like: noise is added up to this share of the diffusion "
        "time, and removed again. Near 0 the molecule comes back, at 1 only its size is left; "
        "default: 0.3.",
    ),
    smiles: str | None = typer.Option(
        None,
        "--smiles",
        metavar="SMILES|FILE",
        rich_help_panel=_CONTROL,
        help="Molecules whose conformers are drawn: a SMILES, or a .smi or .csv file. Needs a "
        "network with bonds, such as one of `train --config qm9_jodo_conformers_cpu`. -n counts "
        "the conformers of each.",
    ),
    output: Path | None = typer.Option(
        None,
        "-o",
        "--output",
        metavar="FILE",
        rich_help_panel="Output",
        help="File to write: molecules .sdf (default: samples.sdf), .xyz or .h5, others .h5.",
    ),
    aromatic: bool = typer.Option(
        False,
        "--aromatic",
        rich_help_panel="Output",
        help="Write generated aromatic bonds to an SDF as such (type 4); default: Kekulised.",
    ),
    overwrite: bool = OVERWRITE,
    resume: Path | None = typer.Option(
        None,
        "--resume",
        metavar="FILE",
        rich_help_panel="Output",
        help="Continue the interrupted job of a file; needs no other option.",
    ),
    sampler: str | None = typer.Option(
        None,
        "--sampler",
        metavar="NAME",
        rich_help_panel="Sampler",
        autocompletion=one_of(*_SAMPLERS),
        help="ancestral, ddim, dpm++, sde-dpm++ or heun; for flow matching euler or heun. Default: "
        "that of the checkpoint, else the first.",
    ),
    steps: int | None = typer.Option(
        None,
        "--steps",
        metavar="N",
        rich_help_panel="Sampler",
        help="Steps of the sampler, at most those of training, with a cosine process any number; "
        "default: those of the checkpoint, if it was tuned, distilled or evaluated, else all of "
        "training.",
    ),
    spacing: str | None = typer.Option(
        None,
        "--spacing",
        metavar="NAME",
        rich_help_panel="Sampler",
        autocompletion=one_of(*_SPACINGS),
        help="Spacing of the noise levels: log, even or quadratic, for flow matching even or "
        "quadratic. Default: that of the checkpoint, else log for diffusion, even with a cosine "
        "process and for flow matching.",
    ),
    levels: str | None = typer.Option(
        None,
        "--levels",
        metavar="T,…",
        rich_help_panel="Sampler",
        help="Noise levels to visit, in place of steps and spacing, such as 1000,600,300,100. The "
        "first is pure noise: the number of steps of the training. The sample is the clean "
        "prediction at the last one; if that is 0, it is that after all steps.",
    ),
    eta: float | None = typer.Option(
        None,
        "--eta",
        metavar="X",
        rich_help_panel="Sampler",
        help="Noise in the steps of ddim, from 0 (default) to 1 (as ancestral).",
    ),
    ancestral_positions: bool = typer.Option(
        False,
        "--ancestral-positions",
        rich_help_panel="Sampler",
        help="With dpm++: positions take ancestral steps, all other fields those of dpm++.",
    ),
    self_condition_passes: int | None = typer.Option(
        None,
        "--self-condition-passes",
        metavar="K",
        rich_help_panel="Sampler",
        help="Evaluations of a self-conditioned network for each prediction, each with the clean "
        "prediction of the one before; default: 1.",
    ),
    tune: bool = typer.Option(
        False,
        "--tune",
        rich_help_panel="Sampler",
        help="Find the best sampler, levels and noise for --steps network evaluations (default: "
        "20) and store them in the checkpoint, or with -o in a copy of it, a folder. `sample` then "
        "uses them. Compares with real molecules: --data, else those of the run. -n: molecules "
        "of each candidate in the last round, default: 256.",
    ),
    temperature: float | None = typer.Option(
        None,
        "--temperature",
        metavar="X",
        rich_help_panel=_TEMPERATURE,
        help="Below 1: molecules are more probable and less diverse, above 1 the opposite; "
        "default: 1.",
    ),
    temperature_of: str | None = typer.Option(
        None,
        "--temperature-of",
        metavar="NAME",
        rich_help_panel=_TEMPERATURE,
        autocompletion=one_of("noise", "score"),
        help="noise (default): multiply the random noise of steps by the temperature; score: "
        "divide the predicted noise by it, also for samplers without noise.",
    ),
    temperature_range: str | None = typer.Option(
        None,
        "--temperature-range",
        metavar="LOW:HIGH",
        rich_help_panel=_TEMPERATURE,
        help="Noise levels in Å at which the temperature acts, such as 0.3:5 or :5; default: 0.3:.",
    ),
    final_noise: float | None = typer.Option(
        None,
        "--final-noise",
        metavar="X",
        rich_help_panel=_TEMPERATURE,
        help="Factor of the random noise of steps below that range, and of the last noise; "
        "0 removes it, default: 1.",
    ),
    batch_size: int | None = typer.Option(
        None,
        "--batch-size",
        min=1,
        metavar="N",
        rich_help_panel=_COMPUTATION,
        help="Samples in a batch; default: chosen by size and device.",
    ),
    device: str = typer.Option(
        "auto",
        "--device",
        metavar="NAME",
        rich_help_panel=_COMPUTATION,
        autocompletion=one_of("auto", "cpu", "cuda"),
        help="auto, cpu, cuda, cuda:1.",
    ),
    low_precision: bool | None = typer.Option(
        None,
        "--low-precision/--full-precision",
        rich_help_panel=_COMPUTATION,
        help="Compute pairs of atoms in bfloat16, or in float32. Default: bfloat16 where that is "
        "faster on a CPU, with a network that was trained so; else float32.",
    ),
    cuda_graphs: bool = typer.Option(
        False,
        "--cuda-graphs",
        rich_help_panel=_COMPUTATION,
        help="On a GPU, record the evaluations of a batch once and repeat them without Python.",
    ),
) -> None:
    """Sample molecules from a trained model into a file of exactly N records.

    Uses pretrained weights if there is no run. For a run on another physical system, predicts its
    samples. Finished batches stay in FILE.shards until all are drawn, so that an interruption loses
    little. `torchrun --nproc-per-node K -m molgen_energy sample` shares the work.
    """
    with imports():
        from molgen_energy.api.sample import sample_to
        from molgen_energy.data.shards import shards_folder

    if checkpoint == Path("list") and not checkpoint.exists():
        _list_pretrained()
        return
    if tune:
        others = {
            "--n-atoms": n_atoms, "--where": where, "--guidance": guidance,
            "--formula": formula, "--elements": elements, "--keep": keep,
            "--keep-smarts": keep_smarts, "--resample": resample, "--like": like,
            "--strength": strength, "--smiles": smiles, "--sampler": sampler,
            "--consistent-charges": consistent_charges, "--aromatic": aromatic,
            "--resume": resume, "--spacing": spacing, "--levels": levels, "--eta": eta,
            "--ancestral-positions": ancestral_positions, "--temperature": temperature,
            "--self-condition-passes": self_condition_passes, "--temperature-of": temperature_of,
            "--temperature-range": temperature_range, "--final-noise": final_noise,
            "--batch-size": batch_size, "--overwrite": overwrite, "--cuda-graphs": cuda_graphs,
        }  # fmt: skip
        # 0 is a value, too, such as that of --final-noise.
        if given := [name for name, x in others.items() if x or type(x) in (int, float)]:
            raise InputError(f"--tune chooses for itself; leave out {given[0]}")
        _tune(
            checkpoint, output, data, device, low_precision,
            count=count, steps=steps, seed=seed,
        )  # fmt: skip
        return
    job = _Job(output is None, overwrite or resume is not None)
    try:
        with job:
            result = sample_to(
                output,
                count,
                checkpoint=checkpoint,
                seed=seed,
                n_atoms=None if n_atoms is None else _parse_sizes(n_atoms),
                where=_parse_where(where),
                guidance=guidance,
                formula=formula,
                elements=elements,
                keep=keep or None,
                keep_smarts=keep_smarts,
                resample=resample,
                like=like,
                strength=strength,
                smiles=smiles,
                consistent_charges=consistent_charges,
                aromatic=aromatic,
                sampler=sampler,
                steps=steps,
                spacing=spacing,
                levels=None if levels is None else _parse_levels(levels),
                eta=eta,
                temperature=temperature,
                temperature_of=temperature_of,
                temperature_range=(
                    None if temperature_range is None else _parse_range(temperature_range)
                ),
                final_noise=final_noise,
                ancestral_positions=ancestral_positions,
                self_condition_passes=self_condition_passes,
                batch_size=batch_size,
                low_precision=low_precision,
                cuda_graphs=cuda_graphs,
                data=data,
                device=device,
                resume=resume,
                on_start=job.start,
            )
    except (OSError, RuntimeError, MemoryError):
        if job.output is not None and shards_folder(job.output).exists():
            say(f"finished samples stay in {shards_folder(job.output)}; {job.resume_hint}")
        raise
    if result is not None and is_main():
        _conclude(result, job)


def _conclude(result: SamplingResult, job: _Job) -> None:
    samples, seconds = job.samples, time.perf_counter() - job.began
    if not result.interrupted:
        say(
            f"{counted(result.written, samples)} written to {result.path} in {seconds:.0f} s "
            f"({result.drawn / seconds:.2f} {samples}/s)"
        )
    elif result.path is not None:
        say(f"finished samples are in {result.path}")
    for note in result.notes:
        say(note)
    if result.not_finite:
        warn(f"{counted(result.not_finite, samples)} diverged, without coordinates in the file")
    if result.interrupted:
        sys.exit(INTERRUPTED)
    say(f"next: molgen-energy evaluate {shlex.quote(str(result.path))}")


def _list_pretrained() -> None:
    """Print the pretrained weights."""
    from molgen_energy.training.pretrained import pretrained_weights

    rows = [(name, weights.summary) for name, weights in pretrained_weights().items()]
    show_pairs([("name", "weights"), *rows])


def _tune(
    checkpoint: Path | None,
    output: Path | None,
    data: Path | None,
    device: str,
    low_precision: bool | None,
    **numbers: int | None,
) -> None:
    """Search for a sampler, show the candidates, and say where the best one is stored."""
    from molgen_energy.api.tune import TuningJobInfo, tune
    from molgen_energy.cli.tuning_table import tuning_table

    work: list[Path] = []
    log = ThrottledLog()

    def start(job: TuningJobInfo) -> None:
        work.append(job.work)
        say(
            f"tuning {job.checkpoint.origin} by {job.data}: at most {job.search.molecules:,} "
            f"molecules, {job.search.network_evaluations:,} network evaluations"
        )

    with progress_bar() as bar:
        handle = bar.add_task("tuning", total=None)

        def progress(done: int, total: int | None) -> None:
            bar.update(handle, completed=done, total=total)
            log.say(f"{done:,} of at most {total:,} network evaluations{time_left(bar)}")

        try:
            result = tune(
                checkpoint,
                data=data,
                output=output,
                device=device,
                low_precision=low_precision,
                progress=progress,
                on_start=start,
                **{name: value for name, value in numbers.items() if value is not None},
            )
        except (KeyboardInterrupt, OSError, RuntimeError, MemoryError):
            if work and work[0].exists():
                say(
                    f"molecules that were drawn stay in {work[0]}; run the same command to continue"
                )
            raise
    show(tuning_table(result, stdout.width))
    assert result.chosen.choice is not None
    options = result.chosen.choice.options
    if result.stored is None:
        say("pretrained weights stay as they are; -o FOLDER stores the choice in a copy")
        say(f"next: molgen-energy sample --checkpoint {result.name} {options}")
    else:
        say(f"stored in {result.stored}: {options}")
        say(f"next: molgen-energy sample --checkpoint {shlex.quote(str(result.stored))}")


class SamplingBar:
    """Shows the progress of sampling; a `SamplingCallback` and a context manager.

    Parameters
    ----------
    total
        How many samples there will be.
    samples
        Plural noun for them.
    resume_hint
        How to continue after an interruption.
    title
        Of the bar.
    """

    def __init__(self, total: int, samples: str, resume_hint: str, title: str = "sampling") -> None:
        self._total, self._samples, self._resume_hint = total, samples, resume_hint
        self._bar: Progress = progress_bar("rate", transient=title != "sampling")
        self._handle = self._bar.add_task(title, total=max(total, 0), rate="")
        self._log = ThrottledLog()
        self._began, self._before, self._done = time.perf_counter(), 0, 0.0

    def __enter__(self) -> SamplingBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def found(self, samples: int) -> None:
        self._before = samples
        say(f"{samples:,} of {self._total:,} {self._samples} are finished already")

    def interrupted(self, samples: int) -> None:
        say(
            f"interrupted: {samples:,} of {self._total:,} {self._samples} are finished; "
            f"{self._resume_hint}"
        )

    def advance(self, samples: int, share: float) -> None:
        self._done += samples * share
        rate = f"{self._done / (time.perf_counter() - self._began):.2f} {self._samples}/s"
        there = self._before + self._done
        self._bar.update(self._handle, completed=round(there), rate=rate)
        self._log.say(
            f"{there:,.0f} of {self._total:,} {self._samples}, {rate}{time_left(self._bar)}"
        )


class _Job:
    """What is sampled where, announced at the start, with its bar."""

    def __init__(self, is_default: bool, overwrite: bool) -> None:
        self._is_default, self._overwrite = is_default, overwrite
        self.output: Path | None = None
        self.samples, self.resume_hint = "samples", ""
        self.began = time.perf_counter()
        self._bars = ExitStack()

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.close()

    def start(self, job: SamplingJobInfo) -> SamplingBar:
        """Announce a job and show its bar; raises `InputError` as of `check_output`."""
        check_output(job.output, self._is_default, self._overwrite)
        generator, self.output = job.generator, job.output
        self.samples = job.system.samples
        self.resume_hint = (
            f"continue with: molgen-energy sample --resume {shlex.quote(str(job.output))}"
        )
        shared = generator.distributed and world_size() > 1
        processes = f", by {world_size()} processes" if shared else ""
        say(
            f"sampling {counted(generator.count, self.samples)} from {generator.origin}: "
            f"{generator.method}{processes}"
        )
        for text in generator.warnings:
            warn(text)
        self.began = time.perf_counter()
        bar = SamplingBar(generator.count, self.samples, self.resume_hint)
        return self._bars.enter_context(bar)


def _parse_sizes(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", text)
    low, high = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not 1 <= low <= high:
        raise InputError(f"--n-atoms {text}: expected a number such as 12, or a range such as 9-18")
    return low, high


def _parse_levels(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise InputError(
            f"--levels {text}: expected numbers with commas, such as 1000,600,300,100"
        ) from None


def _parse_range(text: str) -> tuple[float | None, float | None]:
    low, colon, high = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return (float(low) if low.strip() else None, float(high) if high.strip() else None)
    except ValueError:
        raise InputError(
            f"--temperature-range {text}: expected LOW:HIGH in Å, such as 0.3:5, 0.3: or :5"
        ) from None


def _parse_where(assignments: list[str]) -> dict[str, float | tuple[float, float] | None] | None:
    where: dict[str, float | tuple[float, float] | None] = {}
    for text in assignments:
        name, assigned, value = text.partition("=")
        if (name := name.strip()) in where:
            raise InputError(f"--where {text}: {name} is named twice; give one value or range")
        low, ranged, high = value.partition(":")
        try:
            where[name] = None
            if assigned:
                where[name] = (float(low), float(high)) if ranged else float(value)
        except ValueError:
            raise InputError(
                f"--where {text}: expected NAME=VALUE such as gap=0.2, NAME=LOW:HIGH such as "
                "gap=0.2:0.25, or a NAME alone"
            ) from None
    return where or None
