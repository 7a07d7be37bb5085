"""`scripts/fuzz.py`: damaged files of every format, and whether it would notice what is wrong."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from molgen_energy.data.hdf5 import MoleculeWriter

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.skipif(
    not (SCRIPTS.exists() and hasattr(os, "pidfd_open")), reason="no scripts beside the tests"
)


@pytest.mark.slow
def test_damaged_files_are_refused_in_one_line(tmp_path):
    """500 mutants of all formats; a process of its own, since it forks."""
    command = [sys.executable, SCRIPTS / "fuzz.py", "-n", "500", "--jobs", "1", "-o", "failures"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 mutants in" in done.stdout


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("fuzz")


@pytest.mark.parametrize(
    ("code", "stderr", "expected", "same", "verdict"),
    [
        (0, "6 molecules written\n", "any", False, None),
        (0, "", "same", True, None),
        (2, "data    6 molecules\nerror: a.sdf is damaged\n", "refused", False, None),
        (0, "", "refused", True, "a silent change"),
        (0, "", "same", False, "a silent change"),
        (1, "error: IndexError: 3 (please report it)\n", "any", False, "code 1"),
        (1, "error: out of memory; use smaller batches\n", "any", False, "memory"),
        (-11, "", "any", False, "signal 11"),
        (2, "error: a.sdf:\nline 3\n", "any", False, "several lines"),
        (2, "usage: \n", "any", False, "several lines"),
        (2, "error: \x1b[31m is no element\n", "any", False, "control characters"),
        (0, "Traceback (most recent call last)\n", "any", False, "traceback"),
    ],
)
def test_verdicts(fuzz, code, stderr, expected, same, verdict):
    outcome = fuzz.Outcome(code, "", stderr, hung=False, memory=0)
    assert fuzz.judge(outcome, fuzz.Mutation("", expected), same) == verdict


def test_a_command_that_hangs_or_takes_memory_is_ended(fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "_call", lambda command: time.sleep(60))
    outcome = fuzz.execute(tmp_path, fuzz.Command(()))
    assert fuzz.judge(outcome, fuzz.Mutation(""), False) == "a hang of 0.2 s"
    monkeypatch.setattr(fuzz, "SECONDS", 20)
    monkeypatch.setattr(fuzz, "_call", lambda command: bytearray(3 << 30))
    outcome = fuzz.execute(tmp_path, fuzz.Command(()))
    assert outcome.code == 1
    assert "MemoryError" in outcome.stderr


def test_a_seed_gives_the_same_mutant(fuzz, tmp_path, molecules):
    """Of every byte, and other ones for another number."""
    folder = tmp_path / "corpus" / "molecules"
    folder.mkdir(parents=True)
    for name in ("molecules.h5", "packed.h5"):
        with MoleculeWriter(folder / name, source="some") as writer:
            writer.append(molecules.select(np.arange(3)))

    def mutant(place, number, seed):
        fuzz.make_mutant(tmp_path / "corpus", tmp_path / place, "molecules", number, seed)
        return [(tmp_path / place / name).read_bytes() for name in ("molecules.h5", "packed.h5")]

    one, again, next_one, other = (
        mutant(str(k), *which) for k, which in enumerate([(5, 0), (5, 0), (6, 0), (5, 1)])
    )
    assert one == again
    assert one != next_one
    assert one != other
