"""Train the losses of a plan at equal budget, and compare them by their fronts.

    python benchmarks/compare_losses.py springs --data qm9.h5 --jobs 2
    python benchmarks/compare_losses.py data --seeds 0,1 --set model.width=64 --steps 6400
    python benchmarks/compare_losses.py parts --rows mse,energy --front "-n 2000 --at-fcd 3,4"
    python benchmarks/compare_losses.py torsions --dry-run      # only print the commands
    python benchmarks/compare_losses.py jodo --config qm9_jodo_cpu --data qm9.h5 --steps 2400

Each row of a plan is trained once for each seed, --jobs runs at a time with one thread each. Then
`front.py` draws and compares. Runs stay in --work and are named after what they are trained with,
so plans share equal rows, and the same command goes on after an interruption: finished runs are
kept, interrupted ones are resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import front
import numpy as np
from numpy.typing import NDArray

from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.config import parse_assignments
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError, TrainingFailedError, unknown_name
from molgen_energy.output import remove
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.registry import load_config
from molgen_energy.training.checkpoint import load_checkpoint


@dataclass(frozen=True)
class Row:
    """One curve: a label, and what differs from the configuration, by dotted key."""

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    percent: float = 100
    """How much of the training split it sees."""


CHUNK = 20_000  # molecules in memory
POLL = 0.5  # s

MSE = {"loss.name": "mse"}
ENERGY = {"loss.name": "energy"}
SCORE_ENERGY = {"loss.name": "score_energy"}
AT_PREDICTION = {**ENERGY, "loss.springs_at": "prediction"}

PLANS: dict[str, tuple[Row, ...]] = {
    "springs": (
        Row("mse", MSE),
        *(
            Row(family, {**ENERGY, "loss.springs.family": family})
            for family in ("constant", "exponential", "inverse", "inverse_square", "auto")
        ),
        Row("score_energy", SCORE_ENERGY),
        Row("score_energy auto", {**SCORE_ENERGY, "loss.springs.family": "auto"}),
    ),
    "data": tuple(
        Row(f"{changes['loss.name']} {percent} %", changes, percent)
        for changes in (MSE, ENERGY, SCORE_ENERGY)
        for percent in (100, 50, 25, 10)
    ),
    "parts": (
        Row("mse", MSE),
        # The total weight of score_energy; 1.5 is the published weight of positions.
        Row("mse × 4.7", {**MSE, "objective.position_weight": 4.7 * 1.5}),
        Row("energy", ENERGY),
        Row("energy + mse", {**ENERGY, "objective.terms": {"mse": 1.5}}),
        Row("energy at prediction", AT_PREDICTION),
        Row("energy projected", {**AT_PREDICTION, "loss.rest": "projected"}),
        Row(
            "energy vector + mse",
            {**AT_PREDICTION, "loss.rest": "vector", "objective.terms": {"mse": 1.5}},
        ),
        Row("score_energy", SCORE_ENERGY),
    ),
    "torsions": tuple(
        Row(" + ".join([loss["loss.name"], *terms]), {**loss, "objective.terms": terms})
        if terms
        else Row(loss["loss.name"], loss)
        for loss in (MSE, ENERGY, SCORE_ENERGY)
        for terms in (
            {},
            {"torsion": 0.1},
            {"chirality": 0.1},
            {"torsion": 0.1, "chirality": 0.1},
        )
    ),
    # Of a network that generates bonds: --config qm9_jodo_cpu, or qm9_jodo.
    "jodo": (
        Row("original", {"loss.name": "kabsch", "loss.align": "noisy"}),
        *(
            Row(family, {**ENERGY, "loss.springs.family": family, "loss.springs.scale": "jodo"})
            for family in ("inverse", "exponential", "constant")
        ),
    ),
}


@dataclass(frozen=True)
class Run:
    """One training: its folder, and the options of `molgen-energy train`."""

    label: str
    folder: Path
    data: Path
    percent: float
    options: tuple[str, ...]
    steps: int | None
    """None for a length in epochs."""

    @property
    def log(self) -> Path:
        """What the training prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", metavar="PLAN", help=", ".join(PLANS))
    parser.add_argument("--rows", help="labels of the plan with commas; default: all")
    parser.add_argument("--config", default="qm9_gdm_pairs_small")
    parser.add_argument("--data", type=Path, help="default: that of the configuration")
    parser.add_argument("--seeds", default="0,1,2", help="of the training, with commas")
    parser.add_argument("--steps", type=int, help="of the training")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for every run"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=Path("comparison"))
    parser.add_argument("--front", default="", metavar="OPTIONS", help="of front.py, in quotes")
    parser.add_argument("--dry-run", action="store_true", help="print commands of training")
    arguments = parser.parse_args()
    with exit_on_error():
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    # Bad options are refused before hours of training.
    fronts = front.parser().parse_args(
        [
            "--work", str(arguments.work / "fronts"), "--device", arguments.device,
            "--jobs", str(arguments.jobs),
            "--csv", str(arguments.work / f"{arguments.plan}.csv"),
            *shlex.split(arguments.front),
        ]
    )  # fmt: skip
    runs = planned_runs(arguments)
    if arguments.dry_run:
        for run in runs:
            print(shlex.join(["molgen-energy", *command(run, arguments.device)]))
        return
    MoleculeFile(runs[0].data).close()  # raises before any run starts
    train(runs, arguments.jobs, arguments.device)
    fronts.checkpoints = [f"{run.label}={run.folder}" for run in runs]
    front.measure(fronts)


# The runs of a plan


def planned_runs(arguments: argparse.Namespace) -> list[Run]:
    """Every row with every seed.

    Raises
    ------
    InputError
        There is no such plan, row or configuration, or rows have keys or values that this version
        refuses; the message names all such rows.
    """
    rows = chosen_rows(arguments.plan, arguments.rows)
    base, common = load_config(arguments.config), parse_assignments(arguments.set)
    if arguments.steps is not None:
        common["training.steps"] = arguments.steps
    source = arguments.data or Path(base.data.path or bundled_sample())
    runs, refused = [], []
    for row in rows:
        changes = {**common, **row.changes}
        try:
            config = base.replaced(changes)
        except InputError as error:
            refused.append(f"{row.label} ({str(error).partition(' (valid')[0]})")
            continue
        for seed in parse_seeds(arguments.seeds):
            data = fraction_path(source, row.percent, arguments.work)
            options = ["--config", arguments.config, "--data", str(data), "--seed", str(seed)]
            for key, value in changes.items():
                options += ["--set", f"{key}={as_yaml(value)}"]
            whole = config.replaced({"data.path": str(data.resolve()), "training.seed": seed})
            content = json.dumps(whole.model_dump(mode="json", exclude_unset=True), sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()[:8]
            name = re.sub(r"[^\w.]+", "_", row.label).strip("_")
            folder = arguments.work / "runs" / f"{name}-{seed}-{digest}"
            steps = config.training.steps
            runs.append(Run(row.label, folder, source, row.percent, tuple(options), steps))
    if refused:
        rest = [row.label for row in rows if any(run.label == row.label for run in runs)]
        remedy = f"; --rows {shlex.quote(','.join(rest))} leaves them out" if rest else ""
        raise InputError(
            f"this version refuses rows of {arguments.plan}: {'; '.join(refused)}{remedy}"
        )
    return runs


def chosen_rows(plan: str, labels: str | None) -> tuple[Row, ...]:
    """The rows of a plan, or some of them by label.

    Raises
    ------
    InputError
        There is no such plan or row.
    """
    if plan not in PLANS:
        raise InputError(unknown_name("plan", plan, PLANS))
    rows = {row.label: row for row in PLANS[plan]}
    names = rows if labels is None else [label.strip() for label in labels.split(",")]
    for name in names:
        if name not in rows:
            raise InputError(unknown_name(f"row of {plan}", name, rows))
    return tuple(rows[name] for name in names)


def parse_seeds(text: str) -> list[int]:
    """Numbers with commas, each once."""
    try:
        return list(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise InputError(f"--seeds {text}: expected whole numbers such as 0,1,2") from None


def as_yaml(value: Any) -> str:
    """A value for `--set`."""
    return value if isinstance(value, str) else json.dumps(value)


def command(run: Run, device: str, resume: bool = False) -> list[str]:
    """Arguments of `molgen-energy` that train a run, or go on with it."""
    if resume:
        return ["train", "--resume", str(run.folder), "--device", device]
    return ["train", *run.options, "--device", device, "--output", str(run.folder)]


# Parts of the training split


def fraction_path(source: Path, percent: float, work: Path) -> Path:
    """Where a part of a data file is; the whole is the file itself."""
    if percent == 100:
        return source
    digest = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    return work / "data" / f"{source.stem}-{digest}-{percent:g}.h5"


def nested(members: NDArray[np.int64], percent: float) -> NDArray[np.int64]:
    """A random part of numbers (M,), ascending; contains that of every smaller percentage."""
    count = max(1, round(percent / 100 * len(members)))
    return np.sort(np.random.default_rng(0).permutation(members)[:count])


def write_fraction(source: Path, percent: float, target: Path) -> None:
    """A file with a part of the training split, and the same validation and test split."""
    with MoleculeFile(source) as file:
        parts = [file.split_indices(split) for split in SPLITS]
        kept = np.sort(np.concatenate([nested(parts[0], percent), *parts[1:]]))
        description = f"{file.source}, {percent:g} % of the training split"
        with MoleculeWriter(target, source=description) as writer:
            for start in range(0, len(kept), CHUNK):
                writer.append(file.read(kept[start : start + CHUNK], file.columns))
            writer.set_split(file.split[kept])


# Training


def train(runs: Sequence[Run], jobs: int, device: str) -> None:
    """Train what is not finished, some runs at a time.

    Raises
    ------
    TrainingFailedError
        Runs failed; the others are trained all the same.
    """
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: expected 1 or more runs at a time")
    waiting = [run for run in runs if not is_finished(run)]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished")
    for run in waiting:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        data = Path(run.options[run.options.index("--data") + 1])
        if not data.exists() and run.percent < 100:
            data.parent.mkdir(parents=True, exist_ok=True)
            write_fraction(run.data, run.percent, data)
    running: dict[Run, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = launch(run, jobs, device)
            time.sleep(POLL)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                code = running.pop(run).returncode
                say(f"{run.folder.name}: {'trained' if not code else f'exit code {code}'}")
                if code:
                    failed.append(f"{run.label}: {last_line(run.log)} ({run.log})")
    finally:
        for process in running.values():  # each writes a checkpoint
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise TrainingFailedError(f"{len(failed)} runs failed: {'; '.join(failed)}")


def is_finished(run: Run) -> bool:
    """Whether a run has taken all its steps."""
    try:
        step = int(load_checkpoint(run.folder).state["progress"]["step"])
    except InputError:  # there is none yet
        return False
    return run.steps is not None and step >= run.steps


def launch(run: Run, jobs: int, device: str) -> subprocess.Popen[bytes]:
    """Start or resume a training; what it prints goes to its log."""
    try:
        load_checkpoint(run.folder)
        resume = True
    except InputError:
        remove(run.folder)  # a kill before the first checkpoint left it
        resume = False
    arguments = command(run, device, resume)
    say(f"{run.folder.name}: molgen-energy {shlex.join(arguments)}")
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if jobs > 1 else {}
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "molgen_energy", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | threads,
            start_new_session=True,  # Ctrl-C reaches it once, by `train`
        )


def last_line(log: Path) -> str:
    """The last line of a log, which says why a command failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


if __name__ == "__main__":
    main()
