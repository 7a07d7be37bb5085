"""Choose the sampler of a checkpoint: `molgen-energy sample --tune` as a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from molgen_energy.display.progress import notebook_progress
from molgen_energy.distributed import worker_count, world_size
from molgen_energy.errors import InputError
from molgen_energy.output import check_folder, check_own_file, check_writable, real_path, remove
from molgen_energy.paths import find_again
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.generate import MoleculeGenerator, samples_in_bfloat16
from molgen_energy.systems.molecules.state import MoleculeState
from molgen_energy.systems.molecules.tuning import SEED, SamplerSearch, TuningResult
from molgen_energy.systems.registry import system_of_checkpoint
from molgen_energy.training.checkpoint import (
    Checkpoint,
    copy_for_sampling,
    default_checkpoint,
    is_released,
    load_checkpoint,
    store_in_state,
)
from molgen_energy.training.devices import choose_device
from molgen_energy.training.pretrained import resolve_checkpoint


@dataclass(frozen=True)
class TuningJobInfo:
    """A search that is about to begin."""

    checkpoint: Checkpoint
    data: Path
    """Real molecules."""
    search: SamplerSearch
    work: Path
    """Folder of molecules that were drawn; removed at the end."""


def tune(
    checkpoint: str | PathLike[str] | None = None,
    steps: int = 20,
    *,
    count: int = 256,
    data: str | PathLike[str] | None = None,
    output: str | PathLike[str] | None = None,
    seed: int = SEED,
    low_precision: bool | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: ProgressCallback = no_progress,
    on_start: Callable[[TuningJobInfo], None] = lambda job: None,
) -> TuningResult:
    """Find the sampler, noise levels and noise of a checkpoint for few network evaluations.

    The winner is stored in the checkpoint, and `sample` takes it from then on. Pretrained weights
    stay as they are: name an `output`, or pass the options of the result to `sample`.

    >>> result = molgen_energy.tune("runs/mine", steps=20)
    >>> print(result.chosen.choice.options)

    Parameters
    ----------
    checkpoint
        A run or its folder, a checkpoint, or the name of pretrained weights; by default the newest
        run in `runs/`, else `qm9_energy`.
    steps
        Network evaluations of each molecule, at most.
    count
        Molecules of each candidate in the last of three rounds.
    data
        Real molecules, HDF5 with training and validation split or any file of molecules; by
        default the data of the run, for QM9 else the bundled sample. Test molecules are not read.
    output
        Folder for a copy of the checkpoint, with the winner and without what only training needs;
        by default it is stored in the checkpoint itself.
    seed
        Of the molecules of the search.
    low_precision
        Run the work on pairs of atoms in bfloat16; by default where that is faster on a CPU, with a
        network that was trained so.
    device
        `auto`, `cpu`, `cuda` or `cuda:1`.
    workers
        Processes that judge molecules; by default one for each processor.
    progress
        Receives the number of network evaluations; by default a notebook shows a bar.
    on_start
        Called before the first molecule is drawn.

    Returns
    -------
    The winner, all candidates with 95 % intervals, and the real molecules. Molecules of an
    interrupted search stay in `NAME-STEPS.tuning`, and the same call goes on with them.

    Raises
    ------
    InputError
        The checkpoint is not of molecules, a number is out of range, the data is missing, or
        training replaced the checkpoint meanwhile.
    """
    if world_size() > 1:
        raise InputError("--tune runs in one process; start it without torchrun")
    chosen = default_checkpoint() if checkpoint is None else Path(checkpoint)
    loaded = load_checkpoint(resolve_checkpoint(chosen), weights=["ema"])
    system = system_of_checkpoint(loaded)
    if system.name != "molecules":
        raise InputError(f"--tune is for molecules, and {chosen} generates {system.samples}")
    target = None if output is None else Path(output)
    if target is not None:
        if target.exists():
            raise InputError(f"-o {target} exists; name a new folder for the copy")
        check_folder(target.parent)
    elif not is_released(loaded.path):
        check_writable(loaded.path / "state.yaml")
    real = _real_molecules(loaded) if data is None else Path(data)
    on = choose_device(device)
    if low_precision is None:
        low_precision = samples_in_bfloat16(loaded, on)
    generator = MoleculeGenerator(loaded, on, seed=seed, low_precision=low_precision)
    work = Path(f"{real_path(chosen).name}-{steps}.tuning")
    check_own_file(work)
    check_folder(work if work.exists() else work.parent)
    search = SamplerSearch(generator, real, steps, count, work, worker_count(workers))
    on_start(TuningJobInfo(loaded, real, search, work))
    with notebook_progress("tuning", "evaluations", progress) as report:
        result = search.run(report)
    assert result.chosen.choice is not None
    values = {"sampling": result.chosen.choice.state}
    if target is not None:
        copy_for_sampling(loaded, values, target)
        result = replace(result, stored=target)
    elif not is_released(loaded.path):
        store_in_state(loaded, values)
        result = replace(result, stored=loaded.path)
    remove(work)
    return result


def _real_molecules(checkpoint: Checkpoint) -> Path:
    """The data of a run.

    Raises
    ------
    InputError
        It is not there.
    """
    path = checkpoint.config_as(MoleculeConfig).data.path
    if path is None:
        return bundled_sample()
    found = find_again(str(path), checkpoint.path)
    if found.exists():
        return found
    summary = checkpoint.state_as(MoleculeState).data
    if summary is not None and "QM9" in summary.source:
        return bundled_sample()
    raise InputError(
        f"{found}, the data that {checkpoint.path} was trained on, is not there; name it by --data"
    )
