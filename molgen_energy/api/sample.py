"""Draw samples: `molgen-energy sample` as a function."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from molgen_energy.api.molecule_list import MoleculeList
from molgen_energy.data.shards import shards_folder
from molgen_energy.diffusion.guidance import GuidanceFunction, guidance_name
from molgen_energy.diffusion.spacing import levels_text
from molgen_energy.diffusion.temperature import range_text
from molgen_energy.display.progress import NotebookProgress, in_notebook
from molgen_energy.distributed import broadcast, is_main, local_device, process_group
from molgen_energy.errors import InputError, counted, unknown_name
from molgen_energy.output import check_writable, real_path, resolve_symlink
from molgen_energy.systems.base import (
    Generator,
    NoCallback,
    SamplingCallback,
    SamplingResult,
    System,
)
from molgen_energy.systems.molecules.condition import wanted_ranges, where_text
from molgen_energy.systems.registry import system_of_checkpoint
from molgen_energy.training.checkpoint import default_checkpoint, load_checkpoint
from molgen_energy.training.devices import choose_device
from molgen_energy.training.pretrained import resolve_checkpoint

if TYPE_CHECKING:
    from rdkit import Chem

_REPRESENTATIONS = ("rdkit", "ase")

MoleculeInput: TypeAlias = "str | PathLike[str] | Chem.Mol"
"""A molecule file, or an RDKit molecule with a conformer."""


@dataclass(frozen=True)
class SamplingJobInfo:
    """A job that is about to sample."""

    system: System
    generator: Generator
    output: Path


def sample_to(
    output: str | PathLike[str] | None = None,
    count: int | None = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    seed: int | None = None,
    n_atoms: int | tuple[int, int] | None = None,
    where: Mapping[str, float | tuple[float, float] | None] | None = None,
    guidance: float | GuidanceFunction | None = None,
    formula: str | None = None,
    elements: str | Sequence[str] | None = None,
    keep: MoleculeInput | Sequence[MoleculeInput] | None = None,
    keep_smarts: str | None = None,
    resample: int | None = None,
    like: MoleculeInput | Sequence[MoleculeInput] | None = None,
    strength: float | None = None,
    smiles: str | PathLike[str] | Sequence[str] | None = None,
    consistent_charges: bool | None = None,
    aromatic: bool | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    levels: Sequence[float] | None = None,
    eta: float | None = None,
    temperature: float | None = None,
    temperature_of: str | None = None,
    temperature_range: tuple[float | None, float | None] | None = None,
    final_noise: float | None = None,
    ancestral_positions: bool | None = None,
    self_condition_passes: int | None = None,
    batch_size: int | None = None,
    low_precision: bool | None = None,
    cuda_graphs: bool | None = None,
    data: str | PathLike[str] | None = None,
    device: str = "auto",
    resume: str | PathLike[str] | None = None,
    callback: SamplingCallback | None = None,
    on_start: Callable[[SamplingJobInfo], SamplingCallback | None] = lambda job: None,
) -> SamplingResult | None:
    """Draw samples into a file.

    Parameters
    ----------
    output
        File to write; by default that of the physical system, such as `samples.sdf`.
    count
        Number of samples; by default 100, for spins all lattices.
    checkpoint
        Folder of a run or checkpoint, or the name of pretrained weights; by default the newest run
        in `runs/`, else the pretrained weights of QM9.
    seed
        Seed of the samples, by default 0.
    n_atoms
        Number of atoms, or its range; by default as in the training data.
    where
        Properties that the molecules shall have, of those that the network was trained on, in the
        unit of the data: ``{"gap": 0.2, "alpha": (70, 80)}``, a value or a range to draw from
        uniformly; None draws it from training molecules of the same size. Properties without an
        entry are left to the network. By default all are drawn from training molecules. Without
        `n_atoms` the sizes are those of training molecules with about such properties.
    guidance
        Scale of classifier-free guidance: above 1 molecules have the properties more closely and
        are less diverse, for two network evaluations each; by default 1, without. Or, without
        training, a differentiable function f(positions (B, N, 3) in Å, mask (B, N), atomic numbers
        (B, N)) -> (B,): molecules of low f are preferred, by the factor exp(−f).
    formula
        Atoms of each element, such as `C7H8N2`; with `keep` of the whole molecule.
    elements
        The only elements that generated atoms may have, such as `C,N,O,H`.
    keep
        Fixed atoms: an SDF, XYZ or HDF5 file or an RDKit molecule with a conformer, or several of
        them as fragments of one molecule. They come out where they were. `n_atoms` then counts new
        atoms.
    keep_smarts
        Fixes only those atoms of `keep` that match a SMARTS pattern.
    resample
        How often each step of the sampler is taken, so that new atoms come to fit fixed ones.
    like
        Molecules to vary: an SDF, XYZ or HDF5 file or RDKit molecules, with all hydrogens; `count`
        variants of each.
    strength
        How far variants are from them, above 0 and at most 1, by default 0.3: noise is added up to
        this share of the diffusion time, and removed again (SDEdit: Meng et al., ICLR 2022).
    smiles
        Molecules whose conformers are drawn, `count` of each, by a network with bonds: a SMILES,
        several, or a .smi or .csv file of them.
    consistent_charges
        Replace each formal charge that does not fit the generated bonds of its atom by the nearest
        one that does, as in the training molecules. Molecules get the properties `charges_changed`
        and `charges_without_fit`, numbers of atoms, and the notes of the result sum them up.
    aromatic
        Write generated aromatic bonds to an SDF as such; by default Kekulised.
    sampler, steps, spacing, eta
        See `molgen_energy.diffusion.samplers`; by default as the checkpoint was tuned, distilled or
        evaluated.
    levels
        Noise levels to visit, in place of steps and spacing: descending, the first pure noise. If
        the last is above 0, the sample is the clean prediction there.
    temperature
        Below 1 molecules are more probable, above 1 more diverse; by default 1.
    temperature_of
        `noise` (default): the random noise of steps is multiplied by the temperature. `score`: the
        predicted noise is divided by it.
    temperature_range
        Noise levels in Å at which the temperature acts, None for an open end; by default from 0.3.
    final_noise
        Factor of the noise of steps below that range, and of the last noise; by default 1.
    ancestral_positions
        With the sampler `dpm++`: positions take ancestral steps.
    self_condition_passes
        Evaluations of a self-conditioned network for each prediction, by default 1; each gets the
        clean prediction of the one before.
    batch_size
        Samples in a batch; by default chosen by size and device.
    low_precision
        Run the work on pairs of atoms in bfloat16; by default where that is faster on a CPU, with a
        network that was trained so.
    cuda_graphs
        Record the evaluations of a batch on a GPU once, and repeat them without Python.
    data
        For spins: file of couplings to predict ground states for.
    device
        `auto`, `cpu`, `cuda` or `cuda:1`.
    resume
        File of an interrupted job to continue; needs no other option.
    callback
        Receives progress.
    on_start
        Called when the model is ready; may return a callback.

    Returns
    -------
    The file and how many samples were written; None in a process that takes no part.

    Raises
    ------
    InputError
        The checkpoint or an option is not valid, or the output cannot be written.
    OSError
        The disk is full; finished batches stay, and `resume` continues the job.
    """
    sizes = (n_atoms, n_atoms) if isinstance(n_atoms, int) else n_atoms
    values = {
        "count": count,
        "n_atoms": sizes,
        "seed": seed,
        "where": None if where is None else wanted_ranges(where),
        "guidance": None if guidance is None else guidance_name(guidance),
        "formula": formula,
        "elements": elements,
        "keep": keep,
        "keep_smarts": keep_smarts,
        "resample": resample,
        "like": like,
        "strength": strength,
        "smiles": smiles,
        "consistent_charges": consistent_charges or None,
        "aromatic": aromatic or None,
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "levels": None if levels is None else tuple(levels),
        "eta": eta,
        "temperature": temperature,
        "temperature_of": temperature_of,
        "temperature_range": temperature_range and tuple(temperature_range),
        "final_noise": final_noise,
        "ancestral_positions": ancestral_positions or None,
        "self_condition_passes": self_condition_passes,
        "batch_size": batch_size,
        "low_precision": low_precision,
        "cuda_graphs": cuda_graphs or None,
        "data": None if data is None else Path(data),
    }
    given = {name: value for name, value in values.items() if value is not None}
    target = local_device(choose_device(device))
    if cuda_graphs and target.type != "cuda":
        raise InputError(f"--cuda-graphs is for GPUs, not {target.type}; leave it out")
    with process_group(target):
        # The first process decides for all, since another run may be the newest one a second later.
        found, path, options = broadcast(
            _options(
                given,
                None if checkpoint is None else Path(checkpoint),
                None if output is None else Path(output),
                None if resume is None else Path(resume),
            )
            if is_main()
            else None
        )
        if callable(guidance):  # which other processes were given too
            options["guidance"] = guidance
        elif isinstance(options.get("guidance"), str):
            raise InputError(
                f"{shards_folder(path)} was begun with the {options['guidance']}; give it to "
                "`molgen_energy.sample(resume=…, guidance=…)`"
            )
        loaded = load_checkpoint(found, weights=["ema"])
        system = system_of_checkpoint(loaded)
        generator = system.generator(loaded, target, options)
        _check_no_input(path, generator.inputs)
        if not generator.distributed and not is_main():
            return None
        callback = on_start(SamplingJobInfo(system, generator, path)) or callback or NoCallback()
        return generator.write(path, callback, resume is not None)


def _options(
    given: dict[str, Any], checkpoint: Path | None, output: Path | None, resume: Path | None
) -> tuple[Path, Path, dict[str, Any]]:
    """The checkpoint, the file to write, and a value for each option of the system."""
    if resume is not None:
        return _resumed_options(given, checkpoint, output, resolve_symlink(resume))
    chosen = default_checkpoint() if checkpoint is None else checkpoint
    found = resolve_checkpoint(chosen)
    system = system_of_checkpoint(load_checkpoint(found))
    for name in given:
        if name not in system.sampling:
            valid = ", ".join(map(option_name, system.sampling))
            raise InputError(
                f"{option_name(name)} is not an option for {system.samples}, which {chosen} "
                f"generates (valid: {valid})"
            )
    for name in ("temperature_of", "temperature_range"):
        acts = "temperature" in given or (name == "temperature_range" and "final_noise" in given)
        if name in given and not acts:
            raise InputError(f"{option_name(name)} has no effect without --temperature")
    path = Path(system.output) if output is None else output
    check_writable(path)
    path = resolve_symlink(path)
    system.check_output(path)
    for name in ("keep", "like", "smiles"):
        value = given.get(name)
        several = value if isinstance(value, (list, tuple)) else [value]
        _check_no_input(path, (Path(one) for one in several if isinstance(one, (str, PathLike))))
    return found, path, dict(system.sampling) | system.read_options(given)


def _check_no_input(output: Path, inputs: Iterable[Path]) -> None:
    """Raise `InputError` if the output is one of the files that are read."""
    if real_path(output) in map(real_path, inputs):
        raise InputError(f"-o {output} is an input of this command; name another file")


def _resumed_options(
    given: dict[str, Any], checkpoint: Path | None, output: Path | None, resume: Path
) -> tuple[Path, Path, dict[str, Any]]:
    from molgen_energy.systems.registry import SYSTEMS

    if output is not None and resolve_symlink(output) != resume:
        raise InputError(f"--resume {resume} names the output; leave out -o {output}")
    system, begun = next(
        (system, options)
        for system in SYSTEMS.values()
        if (options := system.sampling_options(resume)) is not None
    )
    options = dict(begun)
    origin = options.pop("checkpoint")
    for name, value in system.read_options(given).items():
        there = options.get(name)
        if value != there:
            was = there
            if there is not None and (name in _TEXTS or isinstance(there, tuple)):
                was = _TEXTS.get(name, _joined)(there)
            elif isinstance(there, (list, dict)):
                was = f"another one ({counted(len(there), 'entries')})"
            begun_with = f"with {'the default' if was is None else was}"
            if isinstance(there, bool):
                begun_with = "with it" if there else "without it"
            raise InputError(
                f"{option_name(name)} cannot change: {shards_folder(resume)} was begun "
                f"{begun_with}; --resume needs no other option"
            )
    try:
        found = resolve_checkpoint(Path(origin) if checkpoint is None else checkpoint)
    except InputError:
        if checkpoint is not None:
            raise
        raise InputError(f"{origin} does not exist; name its new place with --checkpoint") from None
    return found, resume, options


def _joined(values: tuple[int, ...]) -> str:
    return "-".join(map(str, values))


# Of options that are no range of whole numbers.
_TEXTS: dict[str, Callable[[Any], str]] = {
    "temperature_range": lambda ends: range_text(*ends),
    "levels": levels_text,
    "where": where_text,
}


def option_name(name: str) -> str:
    """The command-line option of a parameter."""
    return {"count": "-n"}.get(name, f"--{name.replace('_', '-')}")


class _NotebookSampling:
    """A `SamplingCallback` that shows a bar in a notebook."""

    def __init__(self, job: SamplingJobInfo) -> None:
        self._total, self._done = job.generator.count, 0.0
        self._bar = NotebookProgress("sampling", job.system.samples)

    def found(self, samples: int) -> None:
        self._done += samples

    def advance(self, samples: int, share: float) -> None:
        self._done += samples * share
        self._bar(self._done, self._total)

    def interrupted(self, samples: int) -> None:
        pass

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def sample(
    count: int | None = None,
    output: str | PathLike[str] | None = None,
    *,
    as_: str = "rdkit",
    checkpoint: str | PathLike[str] | None = None,
    seed: int | None = None,
    n_atoms: int | tuple[int, int] | None = None,
    where: Mapping[str, float | tuple[float, float] | None] | None = None,
    guidance: float | GuidanceFunction | None = None,
    formula: str | None = None,
    elements: str | Sequence[str] | None = None,
    keep: MoleculeInput | Sequence[MoleculeInput] | None = None,
    keep_smarts: str | None = None,
    resample: int | None = None,
    like: MoleculeInput | Sequence[MoleculeInput] | None = None,
    strength: float | None = None,
    smiles: str | PathLike[str] | Sequence[str] | None = None,
    consistent_charges: bool | None = None,
    aromatic: bool | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    levels: Sequence[float] | None = None,
    eta: float | None = None,
    temperature: float | None = None,
    temperature_of: str | None = None,
    temperature_range: tuple[float | None, float | None] | None = None,
    final_noise: float | None = None,
    ancestral_positions: bool | None = None,
    self_condition_passes: int | None = None,
    batch_size: int | None = None,
    low_precision: bool | None = None,
    cuda_graphs: bool | None = None,
    data: str | PathLike[str] | None = None,
    device: str = "auto",
    resume: str | PathLike[str] | None = None,
    callback: SamplingCallback | None = None,
) -> MoleculeList | Any:
    """Draw samples, in memory or into a file.

    >>> molecules = molgen_energy.sample(100, checkpoint="qm9_energy", seed=0)
    >>> molecules[0].GetConformer().GetPositions()  # (N, 3), Å
    >>> molgen_energy.sample(10_000, "samples.sdf", steps=50)

    Parameters
    ----------
    count
        Number of samples; by default 100, for spins all lattices.
    output
        File to write, molecules `.sdf`, `.xyz` or `.h5`, others `.h5`; None returns the samples.
    as_
        What molecules in memory are: `rdkit` or `ase`.
    checkpoint
        A run or its folder, a checkpoint, or the name of pretrained weights, such as
        `qm9_energy` or `ccd_energy`; by default the newest run in `runs/`, else `qm9_energy`.
    seed
        Seed of the samples, by default 0. Sample i of a seed is the same in every batch.
    n_atoms
        Number of atoms with hydrogens, or its range; by default as in the training data.
    where
        Properties that the molecules shall have, of those that the network was trained on, in the
        unit of the data: ``{"gap": 0.2, "alpha": (70, 80)}``, a value or a range to draw from
        uniformly; None draws it from training molecules of the same size. Properties without an
        entry are left to the network. By default all are drawn from training molecules. Without
        `n_atoms` the sizes are those of training molecules with about such properties.
    guidance
        Scale of classifier-free guidance: above 1 molecules have the properties more closely and
        are less diverse, for two network evaluations each; by default 1, without. Or, without
        training, a differentiable function f(positions (B, N, 3) in Å, mask (B, N), atomic numbers
        (B, N)) -> (B,): molecules of low f are preferred, by the factor exp(−f).
    formula
        Atoms of each element, such as `C7H8N2`; with `keep` of the whole molecule.
    elements
        The only elements that generated atoms may have, such as `C,N,O,H`.
    keep
        Fixed atoms: an SDF, XYZ or HDF5 file or an RDKit molecule with a conformer, or several of
        them as fragments of one molecule. They come out where they were. `n_atoms` then counts new
        atoms.
    keep_smarts
        Fixes only those atoms of `keep` that match a SMARTS pattern.
    resample
        How often each step of the sampler is taken, so that new atoms come to fit fixed ones.
    like
        Molecules to vary: an SDF, XYZ or HDF5 file or RDKit molecules, with all hydrogens; `count`
        variants of each.
    strength
        How far variants are from them, above 0 and at most 1, by default 0.3: noise is added up to
        this share of the diffusion time, and removed again (SDEdit: Meng et al., ICLR 2022).
    smiles
        Molecules whose conformers are drawn, `count` of each, by a network with bonds: a SMILES,
        several, or a .smi or .csv file of them.
    consistent_charges
        Replace each formal charge that does not fit the generated bonds of its atom by the nearest
        one that does, as in the training molecules.
    aromatic
        Write generated aromatic bonds to an SDF as such, which needs an output; by default
        Kekulised.
    sampler
        `ancestral`, `ddim`, `dpm++`, `sde-dpm++`, `heun` or `euler`; by default that of the
        checkpoint, as its steps or levels and its noise are.
    steps
        Steps of the sampler; fewer are faster.
    spacing
        Of the noise levels: `log`, `even` or `quadratic`.
    levels
        Noise levels to visit, in place of steps and spacing: descending, the first pure noise. If
        the last is above 0, the sample is the clean prediction there.
    eta
        Noise in the steps of `ddim`, from 0 to 1; by default 0.
    temperature
        Below 1 molecules are more probable, above 1 more diverse; by default 1.
    temperature_of
        `noise` (default): the random noise of steps is multiplied by the temperature. `score`: the
        predicted noise is divided by it.
    temperature_range
        Noise levels in Å at which the temperature acts, None for an open end; by default from 0.3.
    final_noise
        Factor of the noise of steps below that range, and of the last noise; by default 1.
    ancestral_positions
        With the sampler `dpm++`: positions take ancestral steps.
    self_condition_passes
        Evaluations of a self-conditioned network for each prediction, by default 1; each gets the
        clean prediction of the one before.
    batch_size
        Samples in a batch; by default chosen by size and device.
    low_precision
        Run the work on pairs of atoms in bfloat16; by default where that is faster on a CPU, with a
        network that was trained so.
    cuda_graphs
        Record the evaluations of a batch on a GPU once, and repeat them without Python.
    data
        For spins: file of couplings to predict ground states for.
    device
        `auto`, `cpu`, `cuda` or `cuda:1`.
    resume
        File of an interrupted job to continue; needs no other option.
    callback
        Receives progress; by default a notebook shows a bar.

    Returns
    -------
    Molecules: a `MoleculeList` of RDKit molecules, each with a conformer in Å, the bonds and formal
    charges that the model generates, or bonds perceived from distances, and properties; they are
    not sanitised. With `as_="ase"` a list of ASE `Atoms`. Samples of other physical systems: arrays
    by name. With an output the `SamplingResult`: the file, and how many samples it holds.

    Raises
    ------
    InputError
        The checkpoint or an option is not valid, or ASE is asked for and not installed.
    """
    if as_ not in _REPRESENTATIONS:
        raise InputError(unknown_name("representation as_", as_, _REPRESENTATIONS))
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "seed": seed,
        "n_atoms": n_atoms,
        "where": where,
        "guidance": guidance,
        "formula": formula,
        "elements": elements,
        "keep": keep,
        "keep_smarts": keep_smarts,
        "resample": resample,
        "like": like,
        "strength": strength,
        "smiles": smiles,
        "consistent_charges": consistent_charges,
        "aromatic": aromatic,
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "levels": levels,
        "eta": eta,
        "temperature": temperature,
        "temperature_of": temperature_of,
        "temperature_range": temperature_range,
        "final_noise": final_noise,
        "ancestral_positions": ancestral_positions,
        "self_condition_passes": self_condition_passes,
        "batch_size": batch_size,
        "low_precision": low_precision,
        "cuda_graphs": cuda_graphs,
        "data": data,
        "device": device,
        "callback": callback,
    }
    jobs: list[SamplingJobInfo] = []
    with ExitStack() as stack:

        def on_start(job: SamplingJobInfo) -> SamplingCallback | None:
            jobs.append(job)
            for text in job.generator.warnings:
                warnings.warn(text, stacklevel=2)
            if callback is not None or not in_notebook():
                return None
            return stack.enter_context(closing(_NotebookSampling(job)))

        if output is not None or resume is not None:
            if as_ != "rdkit":
                raise InputError(f"as_='{as_}' is for samples in memory; leave out the output file")
            return sample_to(output, count, resume=resume, on_start=on_start, **options)
        if aromatic:
            raise InputError("aromatic is for an SDF; name the output file, or leave it out")
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "samples.h5"
        sample_to(path, count, on_start=on_start, **options)
        system = jobs[0].system
        samples = system.read_samples(path)
    if isinstance(samples, list):
        molecules = MoleculeList(samples)
        return molecules.to_ase() if as_ == "ase" else molecules
    if as_ != "rdkit":
        raise InputError(f"as_='{as_}' is for molecules, not for {system.samples}")
    return samples
