"""Fixtures and helpers: bundled molecules, poisoned padding, and the command line."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Tests run in parallel processes, and so do the commands that they start: each takes one thread.
# Set before NumPy and PyTorch are imported, which read it then.
# ruff: noqa: E402
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
# Rich takes them once, when a console is made. The library readline puts them into the environment
# of processes that pytest starts.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem
from runs import run_command

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecule, Molecules, offsets_from_sizes
from molgen_energy.resources import asset
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.devices import choose_device

torch.set_num_threads(1)  # tests run in parallel processes
# Select the same library for matrix products as the commands do, so that tests and commands sample
# the same numbers to the last bit.
choose_device("cpu")
# A background job of a shell ignores Ctrl-C, and the processes that tests interrupt would inherit
# that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def imported_script(name: str) -> Iterator[ModuleType]:
    """A file of `scripts/` as a module."""
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU with CUDA")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def sample_path() -> Path:
    return asset("qm9_sample.h5")


@pytest.fixture(scope="session")
def molecules(sample_path: Path) -> Molecules:
    """The 2,000 bundled molecules."""
    with MoleculeFile(sample_path) as file:
        return file.load()


@pytest.fixture
def cli(tmp_path: Path):
    """Run a command in a temporary folder and check its exit code."""

    def run(*arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "molgen_energy", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment,
            timeout=300,
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def cli_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """As `cli`, in this process: what a command does, without the seconds that one takes to start.

    Not for what depends on the start of a process, its signals or its environment.
    """

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        ended = run_command(arguments, monkeypatch)
        stdout, stderr = capfd.readouterr()
        assert ended == code, f"exit {ended}\n{stdout}\n{stderr}"
        assert "Traceback" not in stderr
        return subprocess.CompletedProcess(sys.argv, code, stdout, stderr)

    return run


def config_of(run: Path) -> MoleculeConfig:
    """The configuration of a run on molecules."""
    return load_checkpoint(run).config_as(MoleculeConfig)


def torchrun(
    folder: Path,
    *arguments: object,
    processes: int = 2,
    program: tuple[str, ...] = ("-m", "molgen_energy"),
) -> subprocess.Popen[str]:
    """Start `molgen-energy` or another program under `torchrun`, in a folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}, **pipes
    )


def torchrun_to_end(
    folder: Path, *arguments: object, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun` and wait for its end."""
    process = torchrun(folder, *arguments, **options)
    try:
        stdout, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def of_smiles(*smiles: str, shift: float = 0.0) -> Molecule:
    """One record of embedded molecules, each `shift` Å from the previous one."""
    positions, numbers = [], []
    for k, text in enumerate(smiles):
        molecule = Chem.AddHs(Chem.MolFromSmiles(text))
        AllChem.EmbedMolecule(molecule, randomSeed=7)
        AllChem.MMFFOptimizeMolecule(molecule)
        positions.append(molecule.GetConformer().GetPositions() + k * shift)
        numbers += [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return Molecule(np.concatenate(positions).astype("f4"), np.array(numbers, "u1"))


def dense_orders(positions: np.ndarray, atomic_numbers: np.ndarray) -> np.ndarray:
    """Perceived bond orders (B, N, N) of padded molecules (B, N, 3), (B, N)."""
    inside = atomic_numbers > 0
    molecules = Molecules(
        positions[inside].astype("f4"),
        atomic_numbers[inside],
        offsets_from_sizes(inside.sum(axis=1)),
    )
    bonds = perceive(molecules).bonds
    orders = np.zeros((*atomic_numbers.shape, atomic_numbers.shape[1]), np.uint8)
    owner = np.repeat(np.arange(len(molecules)), np.diff(bonds.offsets))
    i, j = bonds.index.T
    orders[owner, i, j] = orders[owner, j, i] = bonds.order
    return orders


def padded_batch(
    molecules: Molecules, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (B, N, 3) in Å with NaN at padding, and the mask (B, N)."""
    positions, numbers = molecules.padded()
    mask = torch.from_numpy(numbers > 0)
    values = torch.from_numpy(positions).to(dtype)
    return torch.where(mask[..., None], values, torch.nan), mask
