"""Make shipped weights of a run: what sampling needs of its last checkpoint, and how it went.

    python scripts/release_weights.py runs/mine qm9_energy --hardware "2 cores of ..."

EMA weights in half precision (float16, or float32 with --float32), the configuration without paths
of this machine, SHA-256 sums, and `training.csv`, a row for each validation (for students, which
have none, for each row of the run). A student keeps its levels. The card comes from
`scripts/measure_weights.py`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.data.batches import PairBudget, ResidentData
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.errors import InputError
from molgen_energy.output import atomic_replace
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.training.checkpoint import load_checkpoint, save_checkpoint
from molgen_energy.training.metrics import loss_terms
from molgen_energy.training.pretrained import weights_directory, write_checksums

KEPT = (
    "elements", "statistics", "size_histogram", "data", "condition", "initial_weights", "teacher",
)  # fmt: skip
"""What is kept of the state, where it is there."""
COLUMNS = ("step", "loss", "valid_loss", "lr", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--hardware", required=True, help="what it was trained on, in words")
    parser.add_argument("--command", required=True, help="what it was trained with, as typed")
    parser.add_argument("--data", type=Path, help="its data, if not where the run found them")
    parser.add_argument("--steps", type=int, default=100, help="to judge with, and the default")
    parser.add_argument("--spacing", default="quadratic", help="of the sampler's levels, likewise")
    parser.add_argument("--float32", action="store_true")
    with exit_on_error():
        release(parser.parse_args())


def molecules_seen(config: MoleculeConfig, steps: int, data: Path | None) -> int:
    """Training molecules in all batches of a run, whose data were in memory."""
    training = config.training
    if training.batch_size is not None:
        return steps * training.batch_size
    path = data or Path(config.data.path or bundled_sample())
    with MoleculeFile(path) as file:
        sizes = file.sizes(file.split_indices("train"))
    assert training.pairs_per_batch is not None
    batches = ResidentData(None, sizes, PairBudget(training.pairs_per_batch), training.seed)
    last = batches.starts.epoch_of(steps)
    rest = batches.epoch(last)[: steps - batches.starts[last]]
    return last * len(sizes) + sum(map(len, rest))


def release(arguments: argparse.Namespace) -> None:
    checkpoint = load_checkpoint(arguments.run, weights=["ema"])
    config = checkpoint.config_as(MoleculeConfig)
    progress = checkpoint.state["progress"]
    if config.training.sample_from == "last" and progress["step"] != config.training.steps:
        raise InputError(
            f"{arguments.run} ends at step {progress['step']} of {config.training.steps}; "
            f"continue with molgen-energy train --resume {arguments.run}"
        )
    state: dict[str, Any] = {
        "progress": {"step": progress["step"]},
        "sampling": checkpoint.state.get("sampling")
        or {"steps": arguments.steps, "spacing": arguments.spacing},
        "training": {
            "command": arguments.command,
            "hardware": arguments.hardware,
            "minutes": round(progress["seconds"] / 60, 1),
            "molecules": molecules_seen(config, progress["step"], arguments.data),
        },
        **{name: checkpoint.state[name] for name in KEPT if name in checkpoint.state},
    }
    dtype = torch.float32 if arguments.float32 else torch.float16
    model = MoleculeGenerator(checkpoint, torch.device("cpu")).model  # with its EMA weights
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    folder = weights_directory() / arguments.name
    save_checkpoint(folder, config.without_paths(), state, {"ema": weights})
    write_checksums(folder)
    with (arguments.run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["valid_loss"] or "teacher" in state]
    with (
        atomic_replace(folder / "training.csv") as output,
        output.temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        terms = loss_terms(rows[0])
        columns = [*COLUMNS[:2], *terms, *COLUMNS[2:]]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    say(f"{folder}; next: python scripts/measure_weights.py")


if __name__ == "__main__":
    main()
