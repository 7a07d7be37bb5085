"""Commands in the process of the tests, and short runs that several tests train and compare."""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from molgen_energy.cli import main
from molgen_energy.config import Config
from molgen_energy.systems.registry import load_config
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.metrics import read_metrics

CPU = torch.device("cpu")


def run_command(arguments: Iterable[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command line in this process, as `molgen-energy` does; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["molgen-energy", *map(str, arguments)])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    return int(ended.value.code or 0)


TINY = {
    "model.layers": 2,
    "model.width": 16,
    "training.steps": 12,
    "training.batch_size": 16,
    "training.log_every": 3,
    "training.validate_every": 6,
    "training.validation_molecules": 32,
    "training.checkpoint_every": 4,
    "training.low_precision": False,
}


class Watcher:
    """A callback of training that counts steps, and runs `at[step]` after a step."""

    def __init__(self, at=None):
        self.steps, self.losses, self.at = [], [], at or {}

    def __call__(self, step, steps, loss, samples_per_second):
        self.steps.append(step)
        self.losses.append(loss)
        self.at.get(step, lambda: None)()


def tiny(**changes) -> Config:
    return load_config("quick").replaced(
        TINY | {k.replace("__", "."): v for k, v in changes.items()}
    )


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(run, "last").read_tensors(name)


def rewrite_weights(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]):
    """Change the tensors of a checkpoint, with a SHA-256 as of a trainer that wrote them."""
    path = folder / f"{name}.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    content = safetensors.torch.save(tensors)
    path.write_bytes(content)
    state = yaml.safe_load((folder / "state.yaml").read_text())
    state["sha256"][name] = hashlib.sha256(content).hexdigest()
    (folder / "state.yaml").write_text(yaml.safe_dump(state, sort_keys=False))


def assert_same_run(a: Path, b: Path) -> None:
    """All tensors and all rows, but for times and speeds."""
    for name in ("model", "ema", "optimizer"):
        theirs, ours = weights(a, name), weights(b, name)
        assert theirs.keys() == ours.keys()
        for key in theirs:
            assert torch.equal(theirs[key], ours[key]), (name, key)
    rows = [list(read_metrics(run / "metrics.csv")) for run in (a, b)]
    for row in (*rows[0], *rows[1]):
        del row["seconds"], row["samples_per_second"]
    assert rows[0] == rows[1]
