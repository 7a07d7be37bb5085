"""Energy above the ground state of spin glasses, by loss: table 5 of Kaba et al., NeurIPS 2025.

    python scripts/measure_spins.py                       # about an hour; makes assets/spins.csv
    python scripts/measure_spins.py --full --device cuda  # at the scale of the paper, for a GPU

Trains each loss with three seeds on the same lattices, predicts the test lattices, and prints means
over seeds with standard errors, and the same for descents without a network. Data and runs are kept
in the folder --work, rows in the CSV file. After an interruption the script continues there.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rows import read, write

from molgen_energy.metrics.statistics import Mean
from molgen_energy.output import remove
from molgen_energy.progress import no_progress
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.registry import SYSTEMS, load_config
from molgen_energy.systems.spins.dataset import SpinGlasses
from molgen_energy.systems.spins.metrics import evaluate_spins
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train

ASSETS = Path(__file__).parents[1] / "assets"
LOSSES = ("cross_entropy", "margin", "local_field", "true_energy")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Scale:
    """Amount of data and training."""

    count: dict[str, int]
    """Lattices by boundary: 47.5 % are for training, half are evaluated."""
    width: int
    epochs: int


REDUCED = Scale({"open": 20_000, "periodic": 4_000}, width=32, epochs=10)
FULL = Scale({"open": 20_000, "periodic": 20_000}, width=256, epochs=100)


@dataclass(frozen=True)
class Result:
    """Settings of a run and the scores of its predictions."""

    boundary: str
    loss: str
    gauge: str
    width: int
    epochs: int
    lattices: int
    """Number of evaluated lattices."""
    seed: int
    excess: float
    exact: float
    overlap: float
    descended: float
    """Energy above the ground state, after a descent from the prediction."""
    descended_exact: float
    random: float
    """The same from random spins."""
    random_exact: float
    seconds: float
    """Of training."""


def run_once(
    boundary: str, loss: str, gauge: str, seed: int, scale: Scale, work: Path, device: torch.device
) -> Result:
    """Train, predict and evaluate."""
    data = work / f"{boundary}.h5"
    if not data.exists():
        SpinGlasses(count=scale.count[boundary], boundary=boundary).write(data, no_progress)
    config = load_config(f"spins_{loss}").replaced(
        {
            "data.path": str(data),
            **({} if gauge == "none" else {"loss.gauge": gauge}),
            "model.width": scale.width,
            "training.epochs": scale.epochs,
            "training.decay": "cosine",
            "training.seed": seed,
        }
    )
    run = work / f"{boundary}-{loss}-{gauge}-{seed}"
    system = SYSTEMS["spins"]
    task = system.task(config, device, no_progress)
    summary = train(task, run, resume=(run / "checkpoints").exists())
    options = {"count": None, "data": None, "batch_size": 256}
    predicted = work / f"{run.name}.h5"
    checkpoint = load_checkpoint(run, weights=["ema"])
    system.generator(checkpoint, device, options).write(predicted, NoCallback())
    (evaluated,) = evaluate_spins([predicted]).files
    prediction, descent, random = (column.metrics for column in evaluated.columns)
    result = Result(
        boundary, loss, gauge, scale.width, scale.epochs, evaluated.count, seed,
        excess=prediction["excess"].value, exact=prediction["exact"].value,
        overlap=prediction["overlap"].value,
        descended=descent["excess"].value, descended_exact=descent["exact"].value,
        random=random["excess"].value, random_exact=random["exact"].value,
        seconds=summary.seconds,
    )  # fmt: skip
    remove(run)
    remove(predicted)
    return result


def show(rows: list[Result]) -> None:
    """Print means over seeds with standard errors."""
    for boundary in ("open", "periodic"):
        selected = [row for row in rows if row.boundary == boundary]
        if not selected:
            continue
        print(f"\n{boundary} boundary, {selected[0].lattices:,} test lattices; "
              f"energy above the ground state, mean over seeds ± standard error")  # fmt: skip
        for loss in LOSSES:
            for gauge in ("either", "fixed", "none"):
                seeds = [row for row in selected if (row.loss, row.gauge) == (loss, gauge)]
                if not seeds:
                    continue
                text = []
                for name in ("excess", "descended"):
                    mean = Mean.of(np.array([getattr(row, name) for row in seeds]))
                    error = "" if math.isnan(mean.error) else f" ± {mean.error:.2f}"
                    text.append(f"{mean.value:.2f}{error}")
                exact = 100 * np.mean([row.descended_exact for row in seeds])
                overlap = np.mean([row.overlap for row in seeds])
                print(f"  {loss:14} gauge {gauge:6} {text[0]:16} after descent {text[1]:16} "
                      f"{exact:.2f} % exact, overlap {overlap:.3f}")  # fmt: skip
        random, exact = selected[0].random, 100 * selected[0].random_exact
        print(f"  descent from random spins, no network: {random:.2f}, {exact:.2f} % exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="256 channels, 100 epochs")
    parser.add_argument("--boundary", nargs="+", default=["open", "periodic"])
    parser.add_argument("--gauge", nargs="+", default=["either"], help="either, fixed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("spins"))
    parser.add_argument("--csv", type=Path, default=ASSETS / "spins.csv")
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    scale = FULL if arguments.full else REDUCED
    rows = read(arguments.csv, Result)
    # One seed of every loss first, so that a table exists after an early stop.
    for boundary in arguments.boundary:
        for seed in SEEDS:
            for loss in LOSSES:
                # The true energy does not depend on the gauge.
                for gauge in ["none"] if loss == "true_energy" else arguments.gauge:
                    key = (boundary, loss, gauge, scale.width, scale.epochs, seed)
                    if any(
                        (r.boundary, r.loss, r.gauge, r.width, r.epochs, r.seed) == key
                        for r in rows
                    ):
                        continue
                    device = torch.device(arguments.device)
                    result = run_once(boundary, loss, gauge, seed, scale, arguments.work, device)
                    rows.append(result)
                    write(arguments.csv, rows)
                    print(result, flush=True)
    show(rows)


if __name__ == "__main__":
    main()
