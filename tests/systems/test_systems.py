"""Physical systems through the four commands: polygons, spin glasses, and one defined here."""

from __future__ import annotations

import inspect
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import torchrun_to_end
from runs import rewrite_weights
from torch import nn
from typer.testing import CliRunner

from molgen_energy import cli as cli_package
from molgen_energy.cli import sample
from molgen_energy.config import Config, RawConfig, Section, TrainingConfig, config_names
from molgen_energy.data.arrays import ArrayFile, write_arrays
from molgen_energy.data.shards import FORMAT, Manifest, ShardFolder
from molgen_energy.data.splits import SPLITS
from molgen_energy.datasets.base import Dataset, option
from molgen_energy.diffusion.process import Diffusion, FlowMatching
from molgen_energy.errors import InputError
from molgen_energy.formats.declaration import SPLIT, DatasetSpec, HDF5Format
from molgen_energy.losses import SPIN_LOSSES, SPRINGS, SpringFamily
from molgen_energy.metrics.report.model import (
    EvaluatedFile,
    Report,
    ReportColumn,
    ReportRow,
    ReportSection,
)
from molgen_energy.metrics.statistics import Mean
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.systems import datasets, evaluators
from molgen_energy.systems.base import NoCallback, SamplingResult, System
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.registry import SYSTEMS, load_config
from molgen_energy.systems.shapes.dataset import Polygons, polygons
from molgen_energy.systems.shapes.files import read_polygons
from molgen_energy.systems.shapes.metrics import evaluate_shapes, quality, regularity
from molgen_energy.systems.shapes.system import ShapeSystem
from molgen_energy.systems.spins.dataset import draw_couplings
from molgen_energy.systems.spins.files import read_couplings, read_spins
from molgen_energy.systems.spins.lattices import Lattices
from molgen_energy.systems.spins.system import SpinSystem
from molgen_energy.systems.supervised import Examples, Predictor, SupervisedTask, data_path
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train

CPU = torch.device("cpu")
SMALL = ("--set", "model.width=8", "--set", "model.layers=2", "--batch-size", "32")


@pytest.fixture
def inside(tmp_path, monkeypatch, capfd):
    """Run a command in this process, in a folder of its own; standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    terminate = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object, code: int = 0) -> SimpleNamespace:
        capfd.readouterr()
        try:
            cli_package.app([*map(str, arguments)])
            found = 0
        except SystemExit as end:
            found = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, terminate)
        stdout, stderr = capfd.readouterr()
        assert found == code, stdout + stderr
        return SimpleNamespace(stdout=stdout, stderr=stderr)

    return run


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_whole(name):
    """Defaults for every key, a shipped configuration, options that `sample` has."""
    system = SYSTEMS[name]
    assert system.name == name
    assert system.config.model_validate({"name": "x"}).system == name
    assert any(load_config(shipped).system == name for shipped in config_names())
    options = inspect.signature(sample.command).parameters
    assert set(system.sampling) <= set(options)
    files = system.file_format.system  # those of properties are of molecules
    assert files in evaluators.EVALUATORS
    assert (files in datasets.DATASETS) == (files != "molecules")


# -- polygons ----------------------------------------------------------------------------------


def test_polygons_are_regular():
    points = polygons(np.array([1.0, 3.0]), np.array([0.0, math.pi / 2]), 4)
    np.testing.assert_allclose(points[0], [[1, 0], [0, 1], [-1, 0], [0, -1]], atol=1e-6)
    np.testing.assert_allclose(points[1, 0], [0, 3], atol=1e-6)


def test_regularity_by_hand():
    """One vertex of a square pushed outwards: centre, angles and radii by plain arithmetic."""
    square = np.array([[2.0, 0], [0, 1], [-1, 0], [0, -1]])
    centre = square.mean(axis=0)
    radii = [math.dist(point, centre) for point in square]
    angles = [math.atan2(y - centre[1], x - centre[0]) for x, y in square]
    steps = [(b - a) % (2 * math.pi) for a, b in zip(angles, angles[1:] + angles[:1], strict=True)]
    found = regularity(square[None])
    assert found.radius[0] == pytest.approx(np.mean(radii))
    assert found.radii[0] == pytest.approx(np.std(radii) / np.mean(radii))
    assert found.angles[0] == pytest.approx(np.std(steps) / (2 * math.pi))
    assert found.irregularity[0] == pytest.approx(found.radii[0] + found.angles[0])


def test_quality_knows_no_place(rng):
    """Moved, turned, mirrored, scaled: the same; and a star, or a heap, is not regular."""
    points = polygons(np.ones(5), np.zeros(5), 9) + rng.normal(0, 0.01, (5, 9, 2))
    angle = 0.7
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = quality(points)
    for other in (points + 7, points @ turn, points * [1, -1], points * 3, np.roll(points, 2, 1)):
        assert quality(other) == pytest.approx(expected, abs=1e-9)
    assert quality(polygons(np.ones(5), np.zeros(5), 9)) > 14
    assert quality(rng.normal(size=(50, 9, 2))) < 1
    assert 3.5 < expected < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vertices": 2}, "--vertices 2"),
        ({"augment_angle": 4.0}, r"--augment-angle 4: expected 0 to π"),
        ({"augment_angle": math.nan}, "--augment-angle"),
        ({"count": 0}, "--count 0"),
        ({"smallest": 0.0}, "--smallest 0"),
        ({"smallest": 3.0, "largest": 2.0}, "--smallest 3 --largest 2"),
        ({"split": "1,1,1"}, "must be three shares"),
        ({"split": "all"}, "--split all"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_options_of_polygons(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        Polygons(**options).write(tmp_path / "a.h5", no_progress)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_claim(tmp_path):
    """Turned by all angles, polygons collapse with the squared error and not with the energy."""
    data = tmp_path / "shapes.h5"
    Polygons(count=5000, split="1,0,0").write(data, no_progress)
    found = {}
    for name, changes in {
        "mse": {"loss.name": "mse"},
        "kabsch": {"loss.name": "kabsch"},
        "energy": {},
        "sparse": {"loss.edges.kind": "sparse"},
    }.items():
        config = load_config("shapes_energy").replaced(
            {**changes, "data.path": str(data), "training.steps": 600, "training.batch_size": 64,
             "training.lr": 1e-2, "training.validate_every": 1000}
        )  # fmt: skip
        run = tmp_path / name
        train(ShapeSystem().task(config, CPU, no_progress), run)
        generator = ShapeSystem().generator(
            load_checkpoint(run, weights=["ema"]), CPU, {"count": 500, "seed": 1, "batch_size": 64}
        )
        generator.write(tmp_path / f"{name}.h5", NoCallback())
        (evaluated,) = evaluate_shapes([tmp_path / f"{name}.h5"]).files
        found[name] = evaluated.metrics["quality"].value
        error = evaluated.metrics["radius_error"].value
        assert (error > 0.5) == (name == "mse")
        assert any("collapsed" in note for note in evaluated.notes) == (name == "mse")
    assert found["energy"] > found["mse"] + 2
    assert found["sparse"] > found["mse"] + 2
    assert found["kabsch"] > found["mse"] + 2


def test_polygons_by_command(inside, tmp_path):
    """All four commands, resumed half-way to the same numbers."""
    said = inside(
        "preprocess", "shapes", "--vertices", "5", "--count", "300", "--augment-angle", "1"
    )
    assert "polygons written to shapes.h5" in said.stderr
    trained = inside("train", "--config", "shapes_energy", "--steps", "12", "-o", "runs/a", *SMALL)
    assert "270 training polygons" in trained.stderr
    assert "exponential springs on complete edges" in trained.stderr
    inside("train", "--config", "shapes_energy", "--steps", "12", "-o", "b", *SMALL)
    more = ("train", "--config", "shapes_energy", "--from", "runs/a", "--steps", "1", *SMALL)
    assert "from    a, step 12: " in inside(*more, "-o", "c").stderr
    inside("preprocess", "shapes", "--vertices", "6", "--count", "300", "-o", "six.h5")
    refused = inside(*more, "--data", "six.h5", "-o", "d", code=2).stderr
    assert "is a checkpoint of another model: 'network.4.bias' is (10,) in the file" in refused
    inside("sample")
    with h5py.File(tmp_path / "shapes_predicted.h5") as file:
        assert file["positions"].shape == (100, 5, 2)
        assert file.attrs["system"] == "shapes"
        assert 0.3 <= file["radius"][:].min() <= file["radius"][:].max() <= 5
    inside("sample", "-n", "100", "--batch-size", "7", "--checkpoint", "b", "-o", "b.h5")
    with h5py.File(tmp_path / "shapes_predicted.h5") as one, h5py.File(tmp_path / "b.h5") as other:
        np.testing.assert_allclose(one["positions"], other["positions"], atol=1e-6)
    shown = inside("evaluate", "shapes_predicted.h5", "--report", "out").stdout
    assert "quality" in shown
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.html", "report.json", "polygons.png"
    }  # fmt: skip
    found = json.loads((tmp_path / "out" / "report.json").read_text())["files"][0]
    assert found["polygons"] == 100
    assert found["metrics"]["irregularity"]["5-gons"]["standard_error"] > 0
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()
    both = inside("evaluate", "shapes_predicted.h5", "b.h5", "--json", "-").stdout
    assert len(json.loads(both)["files"]) == 2


def test_a_resumed_run_is_the_same(tmp_path):
    Polygons(count=200, vertices=6).write(tmp_path / "shapes.h5", no_progress)
    changes = {"data.path": str(tmp_path / "shapes.h5"), "loss.edges.kind": "sparse",
               "training.batch_size": 32, "training.log_every": 5}  # fmt: skip
    config = load_config("shapes_energy").replaced(changes | {"training.steps": 20})
    train(ShapeSystem().task(config, CPU, no_progress), tmp_path / "whole")

    def stop(step, *_, **__):
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Exception, match="stopped at step 7"):
        train(ShapeSystem().task(config, CPU, no_progress), tmp_path / "broken", stop)
    train(ShapeSystem().task(config, CPU, no_progress), tmp_path / "broken", resume=True)
    one, other = (
        load_checkpoint(tmp_path / name).read_tensors("ema") for name in ("whole", "broken")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_processes_do_what_one_does(inside, tmp_path):
    inside("preprocess", "shapes", "--vertices", "5", "--count", "200")
    command = ("train", "--config", "shapes_energy", "--edges", "sparse", "--steps", "6", *SMALL)
    inside(*command, "-o", "one")
    assert torchrun_to_end(tmp_path, *command, "-o", "two").returncode == 0
    one, other = (load_checkpoint(tmp_path / name).read_tensors("ema") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)


def test_auto_is_resolved(tmp_path, monkeypatch):
    """The learning rate is the network's published one, and springs have mean 1 over the data."""
    data = tmp_path / "shapes.h5"
    Polygons(count=50, vertices=5, split="1,0,0").write(data, no_progress)
    changes = {"data.path": str(data), "training.lr": "auto"}
    config = load_config("shapes_energy").replaced(changes)
    found = ShapeSystem().task(config, CPU, no_progress).config
    assert found.training.lr == 3e-2
    positions = read_polygons(data, "").columns["positions"].astype(np.float64)
    lengths = [np.linalg.norm(p[:, None] - p[None], axis=-1)[~np.eye(5, dtype=bool)]
               for p in positions]  # fmt: skip
    assert found.loss.springs.scale * np.exp(-np.concatenate(lengths)).mean() == pytest.approx(1)
    published = config.replaced({"loss.springs.scale": "gdm"})
    assert ShapeSystem().task(published, CPU, no_progress).config.loss.springs.scale == 42
    monkeypatch.setitem(SPRINGS, "soft", SpringFamily(lambda d: 0 * d + 1))
    soft = config.replaced({"loss.springs.family": "soft"})
    assert ShapeSystem().task(soft, CPU, no_progress).config.loss.springs.scale == 1
    lacking = soft.replaced({"loss.springs.scale": "jodo"})
    with pytest.raises(InputError, match=r"loss\.springs\.scale: soft: .*set a number or auto"):
        ShapeSystem().task(lacking, CPU, no_progress)


@pytest.mark.parametrize(
    ("factor", "split", "message"),
    [(1e30, "train", r"springs\.scale: .* mean stiffness 0"), (1, "test", "no training sample")],
)
def test_polygons_that_cannot_be_trained_on(tmp_path, factor, split, message):
    path = tmp_path / "a.h5"
    Polygons(count=4).write(path, no_progress)
    with h5py.File(path, "r+") as file:
        file["positions"][...] *= np.float32(factor)
        file["split"][...] = SPLITS.index(split)
    config = load_config("shapes_energy").replaced({"data.path": str(path)})
    with pytest.raises(InputError, match=message):
        ShapeSystem().task(config, torch.device("cpu"), no_progress)


def test_configurations_of_format_2_are_upgraded():
    """One section held the keys of all losses on spins, and springs of all losses on polygons."""
    old = {
        "name": "spins_margin",
        "system": "spins",
        "loss": {"name": "margin", "offset": 1.0, "temperature": 0.1, "margin": 2.0,
                 "gauge": "fixed"},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"unknown config key 'loss\.offset'"):
        SpinSystem.config.of(RawConfig("old", old))
    upgraded = SpinSystem.config.upgrade(old)
    assert upgraded["loss"] == {"name": "margin", "margin": 2.0, "gauge": "fixed"}
    assert SpinSystem.config.of(RawConfig("old", upgraded)).loss.margin == 2.0
    assert SpinSystem.config.upgrade(upgraded) == upgraded
    springs = {"family": "inverse", "scale": 2.0, "distance": "positions"}
    edges = {"kind": "sparse", "pool": 100, "tolerance": 0.01}
    for name, kept in (("mse", {}), ("energy", {"springs": springs, "edges": edges})):
        loss = {"name": name, "springs": springs, "edges": edges}
        found = ShapeSystem.config.upgrade({"name": "x", "system": "shapes", "loss": loss})
        assert found["loss"] == {"name": name, **kept}
        ShapeSystem.config.of(RawConfig("old", found))
    for damaged in ({}, {"loss": 3}, {"loss": {"name": "none", "a": 1}}):
        assert SpinSystem.config.upgrade(damaged) == damaged


def test_configurations_of_molecules_of_format_2_are_upgraded():
    """`diffusion` became `process`, `scales` and a part of `objective`."""
    diffusion = {
        "process": "diffusion", "prediction": "velocity", "steps": 500, "precision": 1e-4,
        "time_power": 1.5, "spread_times": True, "position_scale": 2.0, "type_scale": 3.0,
        "charge_scale": 9.0,
    }  # fmt: skip
    springs, edges = {"family": "inverse", "scale": 2.0}, {"kind": "sparse"}
    loss = {"name": "energy", "springs": springs, "edges": edges, "position_weight": 0.2}
    old = {"name": "mine", "system": "molecules", "diffusion": diffusion, "loss": loss}
    upgrade = MoleculeConfig.upgrade
    config = MoleculeConfig.of(RawConfig("old", upgrade(old)))
    assert config.process == Diffusion.Config(steps=500, precision=1e-4, prediction="velocity")
    assert (config.scales.positions, config.scales.elements) == (2.0, 3.0)
    assert config.scales.nuclear_charges == 9.0
    assert (config.objective.position_weight, config.objective.time_power) == (0.2, 1.5)
    assert config.objective.stratified_timesteps is True
    assert (config.loss.springs.family, config.loss.edges.kind) == ("inverse", "sparse")
    assert old["loss"] is loss and "position_weight" in loss  # not changed in place
    flow = old | {"diffusion": diffusion | {"process": "flow_matching"}}
    config = MoleculeConfig.of(RawConfig("old", upgrade(flow)))
    assert config.process == FlowMatching.Config(steps=500)
    mse = MoleculeConfig.of(RawConfig("old", upgrade(old | {"loss": loss | {"name": "mse"}})))
    assert mse.loss.model_dump() == {"name": "mse"}
    assert mse.objective.position_weight == 0.2
    for damaged in ({"loss": 3}, {"diffusion": [1]}):
        with pytest.raises(InputError):
            MoleculeConfig.of(RawConfig("old", upgrade({"name": "x"} | damaged)))


# -- spin glasses ------------------------------------------------------------------------------

pymatching = pytest.importorskip("pymatching")


@pytest.fixture(scope="module")
def glasses(tmp_path_factory):
    """Folder with `spins.h5`: 80 open lattices of 6×6."""
    folder = tmp_path_factory.mktemp("glasses")
    done = subprocess.run(
        [sys.executable, "-m", "molgen_energy", "preprocess", "spins", "--size", "6",
         "--count", "80", "--workers", "1"], cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "lattices written to spins.h5" in done.stderr
    return folder


def test_spins_by_command(inside, tmp_path, glasses):
    (tmp_path / "spins.h5").write_bytes((glasses / "spins.h5").read_bytes())
    trained = inside("train", "--config", "spins_local_field", "--steps", "5", "-o", "run", *SMALL)
    assert "38 training lattices" in trained.stderr
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.training.lr == 1e-3
    inside("sample", "--checkpoint", "run")
    given, predicted = (read_spins(tmp_path / n) for n in ("spins.h5", "spins_predicted.h5"))
    test = given.lattices.select(given.file.split_indices("test"))
    np.testing.assert_array_equal(predicted.lattices.right, test.right)
    np.testing.assert_array_equal(predicted.lattices.spins, test.spins)
    assert set(np.unique(predicted.prediction)) <= {-1, 1}
    assert (predicted.prediction[:, 0, 0] == 1).all()
    shown = inside("evaluate", "spins_predicted.h5", "--report", "out")
    for words in ("energy above ground", "overlap", "descent"):
        assert words in shown.stdout
    assert re.search(r"lattices +│ +40 │", shown.stdout)
    assert (tmp_path / "out" / "domains.png").stat().st_size > 1000
    found = json.loads(inside("evaluate", "spins_predicted.h5", "--json", "-").stdout)["files"][0]
    excess = test.energies(predicted.prediction) - test.energies()
    cell = found["metrics"]["excess"]["prediction"]
    assert cell["value"] == pytest.approx(excess.mean())
    assert cell["standard_error"] == pytest.approx(excess.std(ddof=1) / math.sqrt(40))
    # Another file, a few lattices, given couplings without ground states.
    inside("sample", "--checkpoint", "run", "-n", "3", "--data", "spins.h5", "-o", "three.h5")
    assert len(read_spins(tmp_path / "three.h5").lattices) == 3
    np.savez(tmp_path / "mine.npz", right=test.right[:5], down=test.down[:5])
    inside("sample", "--checkpoint", "run", "--data", "mine.npz", "-o", "mine.h5")
    mine = read_spins(tmp_path / "mine.h5")
    np.testing.assert_array_equal(mine.prediction, predicted.prediction[:5])
    np.testing.assert_array_equal(mine.file.columns["record"], [1, 2, 3, 4, 5])
    numbers = predicted.file.columns["record"] - 1
    np.testing.assert_array_equal(given.lattices.right[numbers], test.right)
    assert "no ground states" in inside("evaluate", "mine.h5", code=2).stderr
    assert "no predictions" in inside("evaluate", "spins.h5", code=2).stderr
    inside("preprocess", "spins", "--couplings", "mine.npz", "-o", "solved.h5", "--workers", "0")
    solved = read_spins(tmp_path / "solved.h5")
    inside("sample", "--checkpoint", "run", "--data", "solved.h5", "-o", "whole.h5")
    assert re.search(r"lattices +│ +5 │", inside("evaluate", "whole.h5").stdout)
    np.testing.assert_allclose(solved.file.columns["energy"], test.energies()[:5])


@pytest.mark.parametrize("name", SPIN_LOSSES)
def test_every_loss_on_spins_trains(tmp_path, glasses, name):
    """A few steps lower the loss, with either gauge where it has one."""
    gauges = {"fixed", "either"} if "gauge" in SPIN_LOSSES[name].Config.model_fields else {None}
    for gauge in gauges:
        changes = {} if gauge is None else {"loss.gauge": gauge}
        config = load_config(f"spins_{name}").replaced(
            {"data.path": str(glasses / "spins.h5"), "model.width": 16, "model.layers": 3,
             "training.steps": 25, "training.batch_size": 38, "training.lr": 1e-2,
             "training.log_every": 1, **changes}
        )  # fmt: skip
        task = SpinSystem().task(config, CPU, no_progress)
        batch = task.epoch(0)[0]
        first = task.loss(task.model, batch, 0)["loss"].mean().item()
        train(task, tmp_path / str(gauge))
        last = task.loss(task.model, batch, 0)["loss"].mean().item()
        assert last < first - 0.05 * abs(first)


def test_a_flip_of_the_data_changes_nothing(tmp_path, glasses):
    """The gauge is fixed where data is read, whatever the file holds."""
    given = read_spins(glasses / "spins.h5").file
    columns = dict(given.columns)
    columns["spins"] = columns["spins"] * np.where(np.arange(80) % 2, -1, 1)[:, None, None]
    columns["spins"] = columns["spins"].astype(np.int8)
    write_arrays(tmp_path / "b.h5", "spins", "flipped", columns, {"boundary": "open"})
    tasks = []
    for path in (glasses / "spins.h5", tmp_path / "b.h5"):
        config = load_config("spins_cross_entropy").replaced(
            {"data.path": str(path), "model.width": 8, "model.layers": 2, "loss.gauge": "fixed"}
        )
        tasks.append(SpinSystem().task(config, CPU, no_progress))
    batch = tasks[0].epoch(0)[0]
    one, other = (t.loss(tasks[0].model, batch, 0)["loss"] for t in tasks)
    assert torch.equal(one, other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_solving_is_resumed(inside, tmp_path, number):
    """Broken off in any way, the same command goes on and ends at the same file."""
    command = ("preprocess", "spins", "--size", "8", "--count", "400", "--seed", "3")
    process = subprocess.Popen(
        [sys.executable, "-m", "molgen_energy", *command, "--workers", "1"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path / "spins.h5.shards"
    while len(list(folder.glob("*.shard"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    stderr = process.communicate(timeout=60)[1]
    assert "Traceback" not in stderr
    assert not (tmp_path / "spins.h5").exists()
    kept = sorted(folder.glob("*.shard"))
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "repeat the command to continue" in stderr
    said = inside(*command[:4], "--count", "401", "--seed", "3", code=2).stderr
    assert re.search(r"was begun with count 400, which cannot change to 401", said)
    kept[0].write_bytes(kept[0].read_bytes()[:-1] + b"?")  # damaged: solved again
    inside(*command, "--workers", "0")
    assert not folder.exists()
    found = read_spins(tmp_path / "spins.h5")
    drawn = draw_couplings(range(400), 8, False, "uniform", 3)
    np.testing.assert_array_equal(found.lattices.right, drawn.right)
    np.testing.assert_allclose(found.file.columns["energy"], found.lattices.energies())
    inside(*command, "-o", "again.h5", "--workers", "0")
    again = read_spins(tmp_path / "again.h5")
    np.testing.assert_array_equal(found.lattices.spins, again.lattices.spins)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "1"), r"--size 1: .*at least 2"),
        (("--size", "0"), r"--size 0: .*at least 2"),
        (("--size", "7", "--boundary", "periodic"), r"even size.*6 or 8, or --boundary open"),
        (("--count", "0"), r"--count 0: expected 1 or more"),
        (("--boundary", "free"), r"unknown boundary 'free'.*open, periodic"),
        (("--couplings", "gauss"), r"'gauss'.*uniform, binary, FILE\.npz"),
        (("--couplings", "none.npz"), r"none\.npz does not exist"),
        (("--couplings", "zero.npz"), r"zero\.npz: record 2 .*all zero.*ground state"),
        (("--couplings", "half.npz"), r"half\.npz lacks the array 'down'"),
        (("--couplings", "text.npz"), r"text\.npz is not an \.npz"),
        (("--couplings", "flat.npz"), r"flat\.npz: .*\(M, L, L\)"),
        (("--seed", "-1"), r"--seed -1"),
        (("--seed", str(2**64)), r"--seed 18446744073709551616: expected"),
        (("--workers", "-7"), r"--workers -7"),
        (("--couplings", "open.npz"), r"record 1 has couplings beyond the open boundary"),
        (("--couplings", "open.npz", "--size", "4"), r"open\.npz sets --size and --count"),
        (("--split", "2,0,0"), r"must be three shares"),
        (("-o", "spins.txt"), r"must end in \.h5"),
        (("-o", "nowhere/spins.h5"), r"does not exist"),
    ],
)
def test_bad_options_of_spins(inside, tmp_path, arguments, message):
    couplings = np.ones((2, 4, 4), np.float32)
    np.savez(
        tmp_path / "zero.npz", right=couplings * [[[1]], [[0]]], down=couplings * [[[1]], [[0]]]
    )
    np.savez(tmp_path / "half.npz", right=couplings)
    np.savez(tmp_path / "flat.npz", right=couplings[0], down=couplings[0])
    np.savez(tmp_path / "open.npz", right=couplings, down=couplings)
    (tmp_path / "text.npz").write_text("1 2 3")
    before = set(tmp_path.iterdir())
    stderr = inside("preprocess", "spins", *arguments, code=2).stderr
    assert re.search(message, stderr), stderr
    assert len(stderr.splitlines()) == 1
    assert set(tmp_path.iterdir()) == before


# -- one system's files and options given to another ---------------------------------------------


def test_files_of_another_system(inside, tmp_path, glasses, sample_path):
    inside("preprocess", "shapes", "--vertices", "5", "--count", "50")
    spins, shapes = glasses / "spins.h5", tmp_path / "shapes.h5"
    for arguments, message in (
        (("train", "--data", spins), "holds spins, not molecules"),
        (("train", "--config", "spins_margin", "--data", shapes), "holds shapes, not spins"),
        (("train", "--config", "shapes_energy", "--data", sample_path), "holds molecules, not"),
        (("train", "--config", "shapes_energy", "--data", spins), "holds spins, not shapes"),
        (("train", "--loss", "margin"), "'margin' is a loss on spins"),
        (("train", "--config", "shapes_energy", "--loss", "margin"), "'margin' is a loss on spins"),
        (("train", "--config", "spins_margin", "--loss", "energy"), "'energy' is a loss on pos"),
        (
            ("train", "--config", "shapes_energy", "--data", shapes, "--edges", "bonds"),
            "exponential springs on bonds edges: polygons have no bonds",
        ),
        (
            ("train", "--config", "shapes_energy", "--edges", "symmetrized"),
            "polygons have no neighbours; choose a loss, springs and edges",
        ),
        (("train", "--config", "shapes_energy", "--springs", "lennard_jones"), "have no bonds"),
        (("train", "--config", "spins_margin", "--data", "no.h5"), "no.h5 does not exist; make"),
        (("train", "--config", "spins_margin", "--set", "process.steps=5"), "unknown config key"),
        (("train", "--config", "spins_margin", "--set", "system=shapes"), "take a --config of sh"),
        (
            ("train", "--config", "shapes_energy", "--set", "loss.springs.distance=features"),
            "polygons have no features",
        ),
        (
            ("train", "--config", "spins_margin", "--springs", "constant"),
            "--springs goes with --lo",
        ),
        (("evaluate", spins, shapes), "evaluate them separately"),
        (("evaluate", shapes, "--metrics", "all"), "--metrics is for molecules"),
        (("preprocess", "--seed", "1", "spins"), "write `preprocess spins` first"),
    ):
        stderr = inside(*arguments, code=2).stderr
        assert message in stderr, stderr
        assert len(stderr.splitlines()) == 1, stderr


def test_options_of_another_system(inside, tmp_path, glasses):
    inside("preprocess", "shapes", "--vertices", "5", "--count", "50")
    inside("train", "--config", "shapes_energy", "--steps", "1", "-o", "polygons", *SMALL)
    inside("train", "--config", "spins_margin", "--data", glasses / "spins.h5", "--steps", "1",
        "-o", "lattices", *SMALL)  # fmt: skip
    np.savez(tmp_path / "zero.npz", right=np.zeros((1, 4, 4)), down=np.zeros((1, 4, 4)))
    (tmp_path / "some.h5").write_bytes((glasses / "spins.h5").read_bytes())
    inside("preprocess", "spins", "--size", "4", "--count", "5", "--boundary", "periodic",
        "-o", "torus.h5", "--workers", "0")  # fmt: skip
    for arguments, message in (
        (("polygons", "--n-atoms", "9"), "--n-atoms is not an option for polygons"),
        (("polygons", "--temperature", "0.9"), "--temperature is not an option for polygons"),
        (("lattices", "--final-noise", "0"), "--final-noise is not an option for lattices"),
        (("polygons", "--data", "shapes.h5"), "--data is not an option for polygons"),
        (("polygons", "-n", "0"), "-n 0"),
        (("polygons", "-o", "a.sdf"), "must end in .h5"),
        (("lattices", "--seed", "1"), "--seed is not an option for lattices"),
        (("lattices", "-n", "1000"), "-n 1000: expected 1 to 40"),
        (("lattices", "-n", "0"), "-n 0: expected 1 to 40"),
        (
            ("lattices", "-o", glasses / "spins.h5"),
            "is an input of this command; name another file",
        ),
        (
            ("lattices", "--data", "some.h5", "-o", "some.h5"),
            "is an input of this command; name another file",
        ),
        (("lattices", "--data", "shapes.h5"), "holds shapes, not spins"),
        (("lattices", "--data", "torus.h5"), "periodic boundaries, the run was trained on open"),
        (("lattices", "--data", "zero.npz"), "all zero"),
        (("lattices", "--data", "none.npz"), "none.npz does not exist"),
    ):
        stderr = inside("sample", "--checkpoint", *arguments, code=2).stderr
        assert message in stderr, stderr
        assert len(stderr.splitlines()) == 1, stderr
    assert not (tmp_path / "spins_predicted.h5").exists()


def test_predictions_better_than_the_ground_state_are_refused(tmp_path, glasses):
    """A file whose ground states are none."""
    given = read_spins(glasses / "spins.h5")
    columns = {
        "right": given.lattices.right, "down": given.lattices.down,
        "spins": np.ones_like(given.lattices.spins), "prediction": given.lattices.spins,
    }  # fmt: skip
    write_arrays(tmp_path / "b.h5", "spins", "wrong", columns, {"boundary": "open"})
    with pytest.raises(InputError, match=r"record 1 are not a ground state"):
        evaluators.EVALUATORS["spins"].evaluate([tmp_path / "b.h5"])


def test_spoilt_files_of_spins(tmp_path, glasses):
    for name, index, value, message in (
        ("energy", 7, 0.0, "record 8: its energy is not that of its spins"),
        (
            "right",
            (3, 0, 0),
            np.nan,
            "record 4: data set 'right': expected finite",
        ),
        ("spins", (5, 0, 0), 0, "record 6: data set 'spins': expected -1 or 1, found 0"),
    ):
        (tmp_path / "a.h5").write_bytes((glasses / "spins.h5").read_bytes())
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file[name][index] = value
        with pytest.raises(InputError, match=message):
            read_spins(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["boundary"] = [1, 2]
    with pytest.raises(InputError, match=r"'boundary': expected open or periodic, found \[1 2\]"):
        read_spins(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["schema"] = "one"
    with pytest.raises(InputError, match="has schema one"):
        read_spins(tmp_path / "a.h5")


@pytest.mark.parametrize("cut", [0, 1, 30, 200])
def test_damaged_couplings(tmp_path, cut):
    np.savez_compressed(tmp_path / "a.npz", right=np.ones((5, 4, 4)), down=np.ones((5, 4, 4)))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:cut] if cut < 200 else content[:40] + content[44:])
    with pytest.raises(InputError, match=r"a\.npz"):
        read_couplings(tmp_path / "a.npz", True)


def test_a_diverged_network_is_named(inside, tmp_path, glasses):
    """A prediction that is not finite is not written, as +1 or otherwise."""
    inside("train", "--config", "spins_margin", "--data", glasses / "spins.h5", "--steps", "1",
           "-o", "run", *SMALL)  # fmt: skip

    def diverge(weights):
        weights["read.weight"].fill_(3e38)

    rewrite_weights(tmp_path / "run" / "checkpoints" / "last", "ema", diverge)
    stderr = inside("sample", "--checkpoint", "run", code=2).stderr
    assert "the network's output for 40 of 40 samples is not finite" in stderr
    assert not (tmp_path / "spins_predicted.h5").exists()


def test_true_energy_needs_no_ground_states(inside, tmp_path, glasses):
    given = read_spins(glasses / "spins.h5")
    columns = {"right": given.lattices.right, "down": given.lattices.down}
    write_arrays(tmp_path / "bare.h5", "spins", "bare", columns, {"boundary": "open"})
    command = ("train", "--data", "bare.h5", "--steps", "2", *SMALL)
    inside(*command, "--config", "spins_true_energy", "-o", "run")
    said = inside(*command, "--config", "spins_margin", code=2).stderr
    assert (
        "holds no ground states, which the loss margin requires; train with --loss true_energy"
        in said
    )


def test_windows_around_a_torus(inside, tmp_path):
    inside("preprocess", "spins", "--size", "4", "--count", "9", "--boundary", "periodic",
           "--workers", "0")  # fmt: skip
    command = ("train", "--config", "spins_margin", "--steps", "1", "-o", "run", *SMALL)
    said = inside(*command, "--set", "model.kernel=11", code=2).stderr
    assert "goes more than once around a lattice of size 4" in said
    assert not (tmp_path / "run").exists()
    inside(*command, "--set", "model.kernel=9")


def test_shards_of_another_command(inside, tmp_path):
    """`sample --resume` does not suggest to remove solved lattices, nor the other way round."""
    own = {"format": FORMAT, "version": "1"}
    ShardFolder.begin(tmp_path / "a.h5", Manifest(command="preprocess spins", **own))
    stderr = inside("sample", "--resume", "a.h5", code=2).stderr
    assert "holds finished shards of `molgen-energy preprocess spins` for a.h5" in stderr
    ShardFolder.begin(tmp_path / "b.h5", Manifest(command="sample", **own))
    stderr = inside(
        "preprocess", "spins", "--size", "4", "--count", "3", "-o", "b.h5", code=2
    ).stderr
    assert "holds finished shards of `molgen-energy sample` for b.h5" in stderr


@pytest.mark.slow
def test_processes_that_sample_what_is_not_shared(inside, tmp_path):
    inside("preprocess", "shapes", "--vertices", "5", "--count", "50")
    inside("train", "--config", "shapes_energy", "--steps", "1", "-o", "run", *SMALL)
    done = torchrun_to_end(tmp_path, "sample", "--checkpoint", "run", "-o", "a.h5")
    assert done.returncode == 0
    assert done.stderr.count("100 polygons written to a.h5") == 1
    assert "processes" not in done.stderr


def test_figures_without_a_number_are_json(tmp_path):
    data = tmp_path / "shapes.h5"
    Polygons(count=3, vertices=4).write(data, no_progress)
    with h5py.File(data, "a") as file:
        file["positions"][:] = 0
    found = json.loads(json.dumps(evaluate_shapes([data]).to_dict(), allow_nan=False))
    assert found["files"][0]["metrics"]["quality"]["4-gons"]["value"] is None


def test_damaged_files(tmp_path):
    data = tmp_path / "shapes.h5"
    Polygons(count=10, vertices=4).write(data, no_progress)
    with h5py.File(data, "a") as file:
        file["positions"][3, 0, 0] = np.nan
    with pytest.raises(InputError, match="record 4: data set 'positions'"):
        read_polygons(data, "")
    with h5py.File(data, "a") as file:
        del file["radius"]
    with pytest.raises(InputError, match="lacks the data set 'radius'"):
        read_polygons(data, "")
    Polygons(count=10, vertices=4).write(data, no_progress)
    with h5py.File(data, "a") as file:
        del file["radius"]
        file["radius"] = np.ones(9, np.float32)
    with pytest.raises(InputError, match=r"'radius': .* with M = 10, found float32 \(9,\)"):
        read_polygons(data, "")
    for name, values, message in (
        (
            "radius",
            np.ones((10, 1), np.float32),
            r"'radius': .* \(M,\).* found float32 \(10, 1\)",
        ),
        ("radius", np.arange(10), r"'radius': expected floating-point .* found int64 \(10,\)"),
        ("radius", np.float32(1), r"'radius': expected .* found float32 \(\)"),
        (
            "radius",
            np.zeros(10, np.float32),
            "record 1: data set 'radius': expected a rad",
        ),
        ("positions", np.ones((10, 4, 3), np.float32), r"'positions': expected .*\(M, N, 2\)"),
        ("positions", np.ones((10, 2, 2), np.float32), "expected 3 vertices or more, found 2"),
        ("positions", np.ones((10, 8), np.float32), r"'positions': expected .*\(M, N, 2\)"),
        ("split", np.zeros((10, 2), np.uint8), r"'split': expected integers \(M,\)"),
    ):
        Polygons(count=10, vertices=4).write(data, no_progress)
        with h5py.File(data, "a") as file:
            del file[name]
            file[name] = values
        with pytest.raises(InputError, match=message):
            read_polygons(data, "")
    with h5py.File(data, "a") as file:
        del file["split"]
        file.create_group("split")
    with pytest.raises(InputError, match=r"'split': expected integers \(M,\).*, found a group"):
        read_polygons(data, "")
    data.write_bytes(data.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut off|not a readable"):
        read_polygons(data, "")


# -- a system of one's own: the README's recipe -------------------------------------------------


CHAINS = HDF5Format(
    "chains",
    "Chains",
    "Straight chains of beads.",
    datasets=(
        DatasetSpec("length", ("M",), "float", "distance between beads", dtype="f4"),
        DatasetSpec("positions", ("M", "beads", 3), "float", "beads", dtype="f4"),
        SPLIT,
    ),
)


@dataclass(frozen=True)
class Chains(Dataset):
    """Straight chains of beads, turned at random, from the distance between beads."""

    name = "chains"
    samples = "chains"
    output = "chains.h5"

    beads: int = option(5, "Beads of a chain.")
    count: int = option(400, "How many.")

    def write(self, output: Path, progress: ProgressCallback) -> str:
        rng = np.random.default_rng(0)
        length = rng.uniform(0.5, 2, self.count).astype(np.float32)
        direction = rng.normal(size=(self.count, 1, 3))
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        beads = length[:, None, None] * np.arange(self.beads)[:, None] * direction
        columns = {"length": length, "positions": beads.astype(np.float32)}
        write_arrays(output, "chains", f"chains of {self.beads}", columns, {})
        return f"{self.beads} beads each"


class ChainModel(Section):
    width: int = 16


class ChainConfig(Config):
    system: str = "chains"
    model: ChainModel = ChainModel()
    training: TrainingConfig = TrainingConfig()


def chain_model(config: ChainConfig, beads: int) -> nn.Module:
    width = config.model.width
    torch.manual_seed(config.training.seed)
    layers = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 3 * beads))
    return nn.Sequential(layers, nn.Unflatten(1, (beads, 3)))


class ChainGenerator:
    method, origin, count, distributed = "one network evaluation each", "a run", 50, False
    inputs: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()

    def __init__(self, checkpoint, device):
        self.beads = checkpoint.state["beads"]
        model = chain_model(checkpoint.config_as(ChainConfig), self.beads)
        self.predict = Predictor(checkpoint, model, device)

    def write(self, output: Path, callback: Any, resume: bool = False) -> SamplingResult:
        length = np.linspace(0.5, 2, self.count, dtype=np.float32)
        positions = self.predict(torch.from_numpy(length)[:, None], callback.advance).numpy()
        write_arrays(output, "chains", "sampled", {"length": length, "positions": positions}, {})
        return SamplingResult(output, self.count, self.count)


class ChainSystem(System):
    name = "chains"
    samples = "chains"
    config = ChainConfig
    sampling: Mapping[str, Any] = MappingProxyType({})
    output = "chains_predicted.h5"
    file_format = CHAINS

    def task(self, config, device, progress):
        from molgen_energy.losses import PairwiseEnergy

        energy = PairwiseEnergy("constant")
        file = ArrayFile(data_path(config, self.name), CHAINS)
        beads = file.columns["positions"].shape[1]
        return SupervisedTask(
            config, device, file,
            lambda c: Examples(torch.from_numpy(c["length"])[:, None],
                               torch.from_numpy(c["positions"])),
            chain_model(config, beads),
            lambda prediction, batch, random_integers: energy(prediction, batch.targets),
            {"beads": beads},
        )  # fmt: skip

    def generator(self, checkpoint, device, options):
        return ChainGenerator(checkpoint, device)

    def describe(self, config, parameters):
        return f"perceptron, {parameters} parameters"


def evaluate_chains(files: list[Path]) -> Report:
    evaluated = []
    for path in files:
        file = ArrayFile(path, CHAINS)
        steps = np.linalg.norm(np.diff(file.columns["positions"], axis=1), axis=-1)
        error = np.abs(steps.mean(axis=1) / file.columns["length"] - 1)
        column = ReportColumn({"error": Mean.of(error)})
        evaluated.append(EvaluatedFile(path.name, len(file), [column]))
    row = ReportRow("error", "error of the distance", "relative")
    return Report("chains", "chains", evaluated, [ReportSection("", [row])])


def test_a_system_of_ones_own(tmp_path, monkeypatch):
    """The classes above, three registry rows and a YAML run through all four commands."""
    monkeypatch.setitem(datasets.DATASETS, "chains", Chains)
    monkeypatch.setitem(SYSTEMS, "chains", ChainSystem())
    monkeypatch.setitem(evaluators.EVALUATORS, "chains", evaluators.Evaluator(evaluate_chains))
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    Path("chains.yaml").write_text(
        "system: chains\ntraining: {steps: 300, batch_size: 64, lr: 0.01, ema_decay: 0.9}\n"
    )
    app, runner = cli_package.application(), CliRunner()

    def call(*words: str) -> str:
        done = runner.invoke(app, words, env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.output
        return done.output

    assert "--beads" in call("preprocess", "chains", "--help")
    call("preprocess", "chains", "--beads", "4")
    call("train", "--config", "chains.yaml", "--data", "chains.h5", "-o", "run")
    call("train", "--resume", "run", "--steps", "310")
    call("sample", "--checkpoint", "run")
    found = json.loads(
        runner.invoke(app, ["evaluate", "chains_predicted.h5", "--json", "-"]).stdout
    )
    assert found["files"][0]["metrics"]["error"]["value"] < 0.1
    refused = runner.invoke(app, ["train", "--data", "chains.h5"])
    assert refused.exit_code == 2
    signal.signal(signal.SIGTERM, handler)


def test_couplings_are_not_mixed_up():
    """What the network sees is what the loss sees: the energy of a lattice by both."""
    from molgen_energy.losses import TrueEnergy, lattice_couplings
    from molgen_energy.systems.spins.system import as_channels

    for periodic in (False, True):
        drawn = draw_couplings(range(3), 4, periodic, "uniform", 0)
        rng = np.random.default_rng(0)
        spins = (2 * rng.integers(0, 2, (3, 4, 4)) - 1).astype(np.int8)
        right, down, reference = as_channels(drawn).double().unbind(dim=1)
        assert (reference.nonzero()[:, 1:] == 2).all()
        logits = 50.0 * torch.from_numpy(spins).flatten(1)[..., None].double()
        loss = TrueEnergy(1.0)(
            logits, torch.zeros_like(logits), neighbours=lattice_couplings(right, down, periodic)
        )
        np.testing.assert_allclose(loss.numpy(), drawn.energies(spins), atol=1e-6)
        assert isinstance(drawn, Lattices)
