"""What fine-tuning on few molecules gains over training from nothing, and what it forgets.

    python benchmarks/fine_tuning.py --data qm9.h5                    # as fine_tune plans it
    python benchmarks/fine_tuning.py --data qm9.h5 --steps 100 --count 200 --work tuning

Molecules are those of QM9's validation split with a Crippen logP in a narrow, high range, which
the pretrained weights have not seen: a set for each of --sizes, a tenth of it for validation. On
each the weights are fine-tuned, and the same network is trained from nothing, with its own learning
rates, for as many steps. Then all draw molecules, beside the pretrained weights. The table has the
share of molecules in the range, rates, FCD to molecules of the training split in the range and to
QM9's test split, copies of the fine-tuning set, and the loss on molecules of QM9's validation split
outside of the range; and the same of molecules of the validation split in the range that are in no
set. Finished parts stay in --work, and the same command goes on with the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem.Crippen import MolLogP
from rich.console import Console
from rich.table import Table

import molgen_energy as mg
from molgen_energy.cli.console import exit_on_error
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.data.shards import shards_folder
from molgen_energy.metrics.statistics import Mean, Rate
from molgen_energy.output import atomic_write
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training.checkpoint import Checkpoint, load_weights, store_in_state
from molgen_energy.training.loop import TrainingInterrupted

_RATES = ("molecule_stability", "validity", "uniqueness")
_OUTSIDE = 256  # molecules whose loss says what is forgotten
_HELD = 200  # real molecules that are judged like samples, at most
_REAL = 4000  # molecules of the training split in the range, at most


@dataclass(frozen=True)
class Job:
    """One row: its label, its run or the name of weights, and its fine-tuning set."""

    label: str
    checkpoint: Path
    data: Path | None = None
    from_nothing: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="QM9 as HDF5, with its splits")
    parser.add_argument("--weights", default="qm9_energy")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--range", type=float, nargs=2, default=[1.8, 2.2], help="of logP")
    parser.add_argument("--steps", type=int, help="of every training; default: as fine_tune plans")
    parser.add_argument("--count", type=int, default=1000, help="molecules that each draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("fine_tuning"))
    parser.add_argument(
        "--count-nothing", type=int, help="of networks from nothing; default: as --count"
    )
    parser.add_argument("--only", help="train and draw where the label holds this, without a table")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    low, high = options.range
    sets = cut(options.data, options.sizes, low, high, options.work, options.seed)
    jobs = [Job(options.weights, Path(options.weights))]
    for size in options.sizes:
        for nothing in (False, True):
            label = f"{size} molecules, {'from nothing' if nothing else 'fine-tuned'}"
            run = options.work / f"{'nothing' if nothing else 'tuned'}-{size}-{options.seed}"
            jobs.append(Job(label, run, sets[size], nothing))
    for job in jobs:
        if options.only is None or options.only in job.label:
            train(job, options)
            draw(job, options)
    if options.only is None:
        show(measured(jobs, options))


# -- data --------------------------------------------------------------------------------------


def cut(
    data: Path, sizes: list[int], low: float, high: float, work: Path, seed: int
) -> dict[int, Path]:
    """The fine-tuning sets by size; also `held.h5` and `real.h5` in the range, and `outside.h5`."""
    paths = {size: work / f"set-{size}-{seed}.h5" for size in sizes}
    held_out, real, outside = (work / f"{name}.h5" for name in ("held", "real", "outside"))
    if all(path.exists() for path in (*paths.values(), held_out, real, outside)):
        return paths
    with MoleculeFile(data) as file:
        rng = np.random.default_rng(seed)
        held = rng.permutation(file.split_indices("valid"))
        inside = in_range(file, held, low, high)
        if inside.sum() <= max(sizes):
            raise SystemExit(f"only {inside.sum()} molecules of the validation split are in range")
        for size, path in paths.items():
            write(file, held[inside][:size], path, size // 10)
        write(file, held[inside][max(sizes) :][:_HELD], held_out, 0)
        others = without_fluorine(file, held[~inside][: 2 * _OUTSIDE])
        write(file, others[:_OUTSIDE], outside, _OUTSIDE - 1)
        known = rng.permutation(file.split_indices("train"))
        write(file, known[in_range(file, known, low, high)][:_REAL], real, 0)
    return paths


def in_range(
    file: MoleculeFile, which: NDArray[np.int64], low: float, high: float
) -> NDArray[np.bool_]:
    """Whether the logP of each molecule is in the range, by its SMILES."""
    ascending = np.sort(which)
    texts: list[str] = []
    for start in range(0, len(which), 10_000):
        texts += stored_smiles(file.read(ascending[start : start + 10_000], frozenset({"smiles"})))
    found = np.array([low <= log_p(text) < high for text in texts])
    return found[np.searchsorted(ascending, which)]


def without_fluorine(file: MoleculeFile, which: NDArray[np.int64]) -> NDArray[np.int64]:
    """The molecules of H, C, N and O, which networks for small sets without F know too."""
    ascending = np.sort(which)
    molecules = file.read(ascending, frozenset())
    largest = np.maximum.reduceat(molecules.atomic_numbers, molecules.offsets[:-1])
    return which[largest[np.searchsorted(ascending, which)] <= 8]


def stored_smiles(molecules: Molecules) -> list[str]:
    """SMILES of molecules of a file that holds them."""
    assert molecules.smiles is not None
    return list(molecules.smiles)


def log_p(smiles: str) -> float:
    """Crippen's logP; NaN of a SMILES that RDKit rejects."""
    molecule = Chem.MolFromSmiles(smiles) if smiles else None
    return float("nan") if molecule is None else MolLogP(molecule)


def write(file: MoleculeFile, which: NDArray[np.int64], path: Path, valid: int) -> None:
    """Molecules as a file, the last ones as its validation split."""
    ascending = np.argsort(which)
    molecules = file.read(which[ascending], frozenset({"smiles"})).select(np.argsort(ascending))
    with MoleculeWriter(path, source=f"{len(which)} molecules of QM9") as writer:
        writer.append(molecules)
        split = np.repeat([0, 1], [len(which) - valid, valid])
        writer.set_split(split.astype(np.uint8))


# -- training and samples ----------------------------------------------------------------------


def train(job: Job, options: argparse.Namespace) -> None:
    """Train a job's network, unless it is trained or pretrained."""
    if job.data is None:
        return
    if (job.checkpoint / "checkpoints").exists():
        mg.train(resume=job.checkpoint)
        return
    common: dict[str, Any] = {
        "data": job.data, "steps": options.steps, "seed": options.seed, "output": job.checkpoint,
    }  # fmt: skip
    if not job.from_nothing:
        mg.train(initial_weights=options.weights, **common)
        return
    source = mg.load_checkpoint(options.weights)
    theirs = source.config_as(MoleculeConfig)
    config = load_config("fine_tune")
    assert isinstance(config, MoleculeConfig)
    rates = {name: getattr(theirs.training, name) for name in ("lr", "muon_lr")}
    changes = {"fine_tuning.relative_lr": None, "name": "from_nothing"}
    # Its loss falls until the end, so validation chooses nothing.
    changes |= {"training.sample_from": "last", "training.patience": None}
    changes |= {"training.validation_draws": 1}
    changes |= {f"training.{name}": rate for name, rate in rates.items()}
    mg.train(config.continuing(theirs).replaced(changes), **common)
    store_in_state(mg.load_checkpoint(job.checkpoint), {"sampling": sampling(source)})


def sampling(source: Checkpoint) -> dict[str, Any]:
    """How samples of the source are drawn by default."""
    return dict(source.state.get("sampling") or {})


def samples_of(job: Job, options: argparse.Namespace) -> Path:
    """The file of a job's samples."""
    name = job.checkpoint.name if job.data is None else job.checkpoint.stem
    return Path(options.work / f"{name}-samples.h5")


def draw(job: Job, options: argparse.Namespace) -> None:
    """Draw a job's samples, or go on with them, unless they are there."""
    path = samples_of(job, options)
    count = options.count_nothing if job.from_nothing else None
    if path.exists():
        return
    if shards_folder(path).exists():
        mg.sample(resume=path)
    else:
        mg.sample(count or options.count, path, checkpoint=job.checkpoint, seed=options.seed)


# -- figures -----------------------------------------------------------------------------------


def measured(jobs: list[Job], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of each job, also in `figures.json`; with intervals as [value, low, high]."""
    files = [options.work / "held.h5", *(samples_of(job, options) for job in jobs)]
    near = mg.evaluate(files, options.work / "real.h5", metrics="rates,fcd", workers=0)
    far = mg.evaluate(files, "qm9", metrics="rates,fcd", workers=0)
    table = near.molecules.to_pandas()
    rows = []
    for job, file, one, two in zip(
        [None, *jobs], files, near.to_dict()["files"], far.to_dict()["files"], strict=True
    ):
        label = "real molecules in the range" if job is None else job.label
        row: dict[str, Any] = {"label": label, "molecules": one["molecules"]}
        row |= {name: triple(one["metrics"][name]) for name in _RATES}
        row["FCD to the set"] = triple(one["metrics"]["fcd"])
        row["FCD to QM9"] = triple(two["metrics"]["fcd"])
        own = table[table["file"] == file.name]
        smiles = [text for text in own.loc[own["valid"] & own["connected"], "smiles"] if text]
        row |= of_smiles(smiles, options, None if job is None else job.data)
        if job is not None:
            row["loss outside"] = outside_loss(job, options)
        if job is not None and job.data is not None:
            run = mg.load_run(job.checkpoint)
            row |= {"steps": run.steps, "best step": run.best_step, "loss": run.best_valid}
        rows.append(row)
    text = json.dumps(rows, indent=1) + "\n"
    atomic_write(options.work / "figures.json", text.encode())
    return rows


def of_smiles(smiles: list[str], options: argparse.Namespace, data: Path | None) -> dict[str, Any]:
    """logP of valid, connected samples, and copies of the fine-tuning set."""
    values = np.array([log_p(text) for text in smiles])
    low, high = options.range
    found: dict[str, Any] = {
        "in range": share(int(((values >= low) & (values < high)).sum()), len(values))
    }
    mean = Mean.of(values)
    if mean.interval is not None:
        found["logP"] = [float(values.mean()), *mean.interval]
    if data is not None:
        known = set(training_smiles(data))
        copies = sum(Chem.CanonSmiles(text) in known for text in smiles)
        found["copies"] = share(copies, len(smiles))
    return found


def triple(metric: dict[str, Any] | None) -> list[float] | None:
    """A metric of a report with its interval; None where too few molecules have it."""
    if metric is None or metric["interval"] is None:
        return None
    return [metric["value"], *metric["interval"]]


def share(count: int, total: int) -> list[float] | None:
    """A share with its interval; None of nothing."""
    found = Rate(count, total)
    if found.value is None or found.interval is None:
        return None
    return [found.value, *found.interval]


def training_smiles(data: Path) -> Iterator[str]:
    """Canonical SMILES of the training molecules of a file."""
    with MoleculeFile(data) as file:
        for text in stored_smiles(file.load("train")):
            yield Chem.CanonSmiles(text)


def outside_loss(job: Job, options: argparse.Namespace) -> float:
    """The loss on molecules of QM9 outside of the range, with the same noise for all jobs."""
    source = mg.load_checkpoint(options.weights)
    config = load_config("fine_tune")
    assert isinstance(config, MoleculeConfig)
    config = config.continuing(source.config_as(MoleculeConfig)).replaced(
        {
            "data.path": str(options.work / "outside.h5"),
            "training.validation_draws": 2,
        }
    )
    task = MoleculeTask(config, torch.device("cpu"))
    checkpoint = mg.load_checkpoint(job.checkpoint)
    load_weights(task.model, task.fit_weights(checkpoint).tensors, checkpoint.path)
    loss = task.validation_loss(task.model.eval())
    assert loss is not None
    return loss


# -- the table ---------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]]) -> None:
    """Print all rows; shares in per cent."""
    table = Table(title="[95 % intervals] of the samples, not of the seed of the training")
    names = ("in range", *_RATES, "copies", "logP", "FCD to the set", "FCD to QM9", "loss outside")
    for heading in ("", "steps", "best", *names):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        cells = [row["label"], str(row.get("steps", "")), str(row.get("best step", ""))]
        table.add_row(*cells, *(cell(name, row.get(name)) for name in names))
    Console(width=240).print(table)


def cell(name: str, value: Any) -> str:
    """A value with its interval."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}"
    percent = name in ("in range", *_RATES, "copies")
    first, low, high = ((100 * v if percent else v) for v in value)
    digits = 1 if percent else 2
    return f"{first:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    with exit_on_error():
        try:
            main()
        except TrainingInterrupted as interrupted:  # the same command resumes it
            raise KeyboardInterrupt from interrupted
