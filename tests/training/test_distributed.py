"""Several processes do what one does: `torchrun` on real processes, over gloo."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_of, torchrun, torchrun_to_end
from runs import CPU, Watcher

from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train
from molgen_energy.training.metrics import read_metrics

# Batches of 37: the last of an epoch of 1,000 molecules is a single one, fewer than processes.
CONFIG = """
model: {name: NAME, layers: 2, width: 16}
process: {steps: 100}
loss: {name: energy, springs: {family: auto}, edges: {kind: sparse}}
training:
  steps: 30
  batch_size: 37
  lr: 1.0e-3
  augment_rotations: true
  low_precision: false
  log_every: 5
  validate_every: 15
  validation_molecules: 100
  checkpoint_every: 10
"""


def config_file(folder: Path, model: str = "gdm") -> Path:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("NAME", model))
    return path


def tensors_of(run: Path) -> torch.Tensor:
    tensors = load_checkpoint(run).read_tensors("ema")
    # The mean of the predicted noise is taken away, so this has no gradient but rounding, of
    # which Adam makes steps of full length.
    tensors["readout.bias"][:3] = 0
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_close_runs(ours: Path, theirs: Path) -> None:
    rows = [list(read_metrics(run / "metrics.csv")) for run in (ours, theirs)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    terms = ("positions_loss", "elements_loss", "nuclear_charges_loss")
    for name in ("loss", *terms, "valid_loss", "gradient_norm"):
        a, b = ([float(row[name] or 0) for row in part] for part in rows)
        np.testing.assert_allclose(a, b, rtol=2e-4, err_msg=name)
    a, b = tensors_of(ours), tensors_of(theirs)
    assert float((a - b).norm() / b.norm()) < 1e-4
    a, b = (load_checkpoint(run).read_tensors("springs") for run in (ours, theirs))
    torch.testing.assert_close(
        a["pairs"].sum(), b["pairs"].sum(), rtol=1e-6, atol=0
    )  # one sample: 4e-6


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(MoleculeTask(load_config(config_file(folder)), CPU), folder / "run", Watcher())
    return folder / "run"


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(alone, tmp_path):
    done = torchrun_to_end(tmp_path, "train", "--config", config_file(tmp_path), "-o", "run")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("run     run") == 1  # one of them speaks
    assert_close_runs(tmp_path / "run", alone)
    assert ", 2 processes" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_checkpoints_do_not_depend_on_the_number_of_processes(alone, tmp_path):
    """Ten steps by one process, the rest by three."""
    config = load_config(config_file(tmp_path)).replaced({"training.steps": 10})
    train(MoleculeTask(config, CPU), tmp_path / "run", Watcher())
    resume = ["train", "--resume", "run", "--steps", 30]
    done = torchrun_to_end(tmp_path, *resume, processes=3)
    assert done.returncode == 0, done.stderr
    # A row and a validation more, at the end of the first part.
    a, b = tensors_of(tmp_path / "run"), tensors_of(alone)
    assert float((a - b).norm() / b.norm()) < 1e-4


COMMAND_THEN_THREADS = """
import os
from pathlib import Path
from molgen_energy.cli import main
try:
    main()
finally:
    names = [Path(f"/proc/self/task/{t}/comm").read_text() for t in os.listdir("/proc/self/task")]
    Path("threads" + os.environ["RANK"]).write_text("".join(names))
"""


def with_threads(folder: Path) -> tuple[str, ...]:
    """A program that does what `molgen-energy` does, and says which threads are left then."""
    (folder / "program.py").write_text(COMMAND_THEN_THREADS)
    return ("program.py",)


def assert_no_thread_of_the_group(folder: Path, processes: int) -> None:
    """One that frees a tensor while the interpreter ends would abort a process now and then."""
    files = list(folder.glob("threads*"))
    assert len(files) >= processes
    for file in files:
        threads = file.read_text().split()
        assert threads
        assert not [name for name in threads if "gloo" in name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds threads in /proc")
def test_no_thread_of_the_group_is_left(tmp_path):
    arguments = ("train", "--config", config_file(tmp_path), "--steps", 2, "-o", "run")
    done = torchrun_to_end(tmp_path, *arguments, program=with_threads(tmp_path))
    assert done.returncode == 0, done.stderr
    assert_no_thread_of_the_group(tmp_path, 2)


def started(folder: Path):
    """A run that is under way, and its processes by rank."""
    config = config_file(folder)
    job = torchrun(
        folder, "train", "--config", config, "-o", "run", "--steps", 100_000,
        "--set", "training.checkpoint_every=1", program=with_threads(folder),
    )  # fmt: skip
    best = folder / "run" / "checkpoints" / "best"
    while not best.exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(e[5:]): child for e in environment if e.startswith(b"RANK=")}
    return job, ranks


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_process_ends_the_job_and_it_resumes(tmp_path):
    job, ranks = started(tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    _, stderr = job.communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert job.returncode != 0
    assert "error: " in stderr
    at = load_checkpoint(tmp_path / "run").state["progress"]["step"]
    config = config_of(tmp_path / "run").replaced({"training.steps": at + 3})
    train(MoleculeTask(config, CPU), tmp_path / "run", Watcher(), resume=True)
    assert load_checkpoint(tmp_path / "run").state["progress"]["step"] == at + 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_ctrl_c_stops_all_at_one_step(tmp_path):
    job, ranks = started(tmp_path)
    os.kill(ranks[1], signal.SIGINT)  # one of them is enough: they agree
    _, stderr = job.communicate(timeout=90)
    assert "continue with: molgen-energy train --resume run" in stderr
    step = load_checkpoint(tmp_path / "run").state["progress"]["step"]
    assert f"stopped at step {step} of 100000" in stderr
    assert_no_thread_of_the_group(tmp_path, 1)  # the first to end has the others terminated


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path):
    done = torchrun_to_end(tmp_path, "train", "--loss", "enrgy")
    assert done.returncode != 0
    assert sum("did you mean 'energy'" in line for line in done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
