"""A run of an earlier version, of checkpoint format 2, still samples and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CPU, Watcher

from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training.checkpoint import FORMAT, load_checkpoint
from molgen_energy.training.loop import train
from molgen_energy.training.metrics import read_metrics

RUN = Path(__file__).parents[1] / "data" / "run_format_2"


def test_its_configuration_has_todays_keys():
    checkpoint = load_checkpoint(RUN)
    assert checkpoint.state["format"] == 2
    config = checkpoint.config_as(MoleculeConfig)
    assert config.process.name == "diffusion" and config.process.steps == 20
    assert config.process.prediction == "velocity"
    assert config.loss.name == "mse"
    assert config.objective.position_weight == 1.5
    assert config.objective.weighting == "noise"
    assert (config.scales.elements, config.scales.nuclear_charges) == (4.0, 10.0)


def test_it_draws_the_same_molecules():
    expected = np.load(RUN / "samples.npz")
    count = len(expected["offsets"]) - 1
    drawn = MoleculeGenerator(load_checkpoint(RUN), CPU).draw(torch.arange(count))
    assert drawn.offsets.tolist() == expected["offsets"].tolist()
    assert drawn.atomic_numbers.tolist() == expected["atomic_numbers"].tolist()
    assert np.abs(drawn.positions - expected["positions"]).max() < 1e-4


def test_it_resumes_and_becomes_a_run_of_the_present_format(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    config = load_checkpoint(run).config_as(MoleculeConfig).replaced({"training.steps": 6})
    watcher = Watcher()
    summary = train(MoleculeTask(config, CPU), run, watcher, resume=True)
    assert watcher.steps == [5, 6] and np.isfinite(watcher.losses).all()
    assert summary.valid_loss is not None and np.isfinite(summary.valid_loss)
    assert load_checkpoint(run).state["format"] == FORMAT
    rows = list(read_metrics(run / "metrics.csv"))
    assert [int(row["step"]) for row in rows] == [4, 6]
    assert rows[1]["positions_loss"] and not rows[0]["positions_loss"]


def test_other_formats_are_refused(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    state = run / "checkpoints" / "last" / "state.yaml"
    text = state.read_text()
    for number, remedy in ((1, "train again"), (FORMAT + 1, "upgrade molgen-energy")):
        state.write_text(text.replace("format: 2", f"format: {number}"))
        with pytest.raises(InputError, match=f"has checkpoint format {number}.*{remedy}"):
            load_checkpoint(run)
