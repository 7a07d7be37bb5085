"""What tests share: the bundled molecules, poisoned padding, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.resources import asset

torch.set_num_threads(1)  # tests run in parallel processes


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
    """Run the installed command in a folder of its own."""

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
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def padded_batch(
    molecules: Molecules, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions with NaN at padding, and the mask."""
    positions, numbers = molecules.padded()
    mask = torch.from_numpy(numbers > 0)
    values = torch.from_numpy(positions).to(dtype)
    return torch.where(mask[..., None], values, torch.nan), mask
