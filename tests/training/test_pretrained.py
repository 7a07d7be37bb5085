"""Weights that ship: found, listed, chosen, intact, as good as their cards say."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.pretrained import (
    DEFAULT,
    SUMS,
    checkpoint_name,
    pretrained_weights,
    resolve_checkpoint,
    verify_checksums,
)

NAMES = ["qm9_energy", "ccd_energy", "ccd_mse", "qm9_mse"]
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_what_ships():
    weights = pretrained_weights()
    assert list(weights) == NAMES
    assert NAMES[0] == DEFAULT
    total = 0
    for one in weights.values():
        verify_checksums(one.path)
        names = {file.name for file in one.path.iterdir()}
        assert names >= {"config.yaml", "state.yaml", "ema.safetensors", "card.md", "report.json"}
        assert names >= {"training.csv", SUMS}
        listed = (one.path / SUMS).read_text().split()[1::2]
        assert listed == ["config.yaml", "ema.safetensors", "state.yaml"]
        total += sum(file.stat().st_size for file in one.path.iterdir())
    assert total < 20e6


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_on_disk_float32_in_memory(name):
    checkpoint = load_checkpoint(pretrained_weights()[name].path)
    stored = checkpoint.read_tensors("ema")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    generator = MoleculeGenerator(checkpoint, CPU)
    stored = checkpoint.tensors("ema", generator.model)
    for key, parameter in generator.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.half(), stored[key])
    steps = 50 if name.startswith("ccd") else 100
    stored, sampler = checkpoint.state["sampling"], generator.sampler
    assert (stored["steps"], stored["spacing"]) == (steps, "quadratic")
    if name.startswith("ccd"):
        assert (generator.sampler_name, sampler.steps, sampler.spacing) == (
            "ancestral", steps, "quadratic",
        )  # fmt: skip
    else:
        assert generator.sampler_name == stored["sampler"] == "sde-dpm++"
        assert list(sampler.levels or ()) == stored["levels"] and sampler.evaluations == 30
    other = MoleculeGenerator(checkpoint, CPU, steps=7, spacing="log").sampler
    assert (other.steps, other.spacing) == (7, "log")
    assert MoleculeGenerator(checkpoint, CPU, steps=7).sampler.spacing == "quadratic"


def test_names_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = resolve_checkpoint(Path("qm9_mse"))
    assert shipped == pretrained_weights()["qm9_mse"].path
    assert checkpoint_name(shipped) == "qm9_mse"
    with pytest.raises(
        InputError, match=r"did you mean 'qm9_mse'\?\).*: qm9_energy, ccd_energy, ccd_mse"
    ):
        resolve_checkpoint(Path("qm9_mes"))
    Path("qm9_mse").mkdir()  # a folder comes first
    assert resolve_checkpoint(Path("qm9_mse")) == Path("qm9_mse")
    assert checkpoint_name(Path("qm9_mse")) == str(tmp_path / "qm9_mse")


def test_other_files_than_those_that_were_released_are_refused(tmp_path):
    copy = tmp_path / "copy"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_checkpoint(copy, weights=["ema"])
        shutil.rmtree(copy)
        shutil.copytree(pretrained_weights()[DEFAULT].path, copy)

    shutil.copytree(pretrained_weights()[DEFAULT].path, copy)
    load_checkpoint(copy, weights=["ema"])
    content = bytearray((copy / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "ema.safetensors").write_bytes(content)
    refused(r"ema\.safetensors is not the file that was released .*install molgen-energy again")
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text() + "\n")
    refused(r"config\.yaml is not the file that was released")
    (copy / "ema.safetensors").unlink()
    refused(r"ema\.safetensors is not the file")
    (copy / SUMS).write_text("nonsense\n")
    refused(r"SHA256SUMS is damaged")


@pytest.mark.slow
def test_sample_without_a_run(cli_here, tmp_path):
    done = cli_here("sample", "-n", "3", "--steps", "2", "-o", "a.sdf")
    begin = (
        "sampling 3 molecules from qm9_energy, step 4700: sde-dpm++, 2 steps of quadratic spacing"
    )
    assert begin in done.stderr
    assert (tmp_path / "a.sdf").read_text().count("$$$$") == 3
    listed = cli_here("sample", "--checkpoint", "list").stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["name", *NAMES]
    assert "of 10,000 molecules stable" in listed
    done = cli_here("sample", "-n", "1", "--steps", "2", "--checkpoint", "qm9_mse", "-o", "b.sdf")
    assert "from qm9_mse" in done.stderr
    cli_here("train", "--steps", "1", "--set", "model.width=16", "--set", "process.steps=5")
    assert "from quick-energy" in cli_here("sample", "-n", "1", "-o", "c.sdf").stderr


@pytest.fixture(scope="module")
def measuring():
    """`scripts/measure_weights.py` as a module."""
    path = ROOT / "scripts" / "measure_weights.py"
    if not path.exists():
        pytest.skip("no scripts beside the tests")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("measure_weights", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for its names
    spec.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


def test_texts_are_those_of_what_was_measured(measuring):
    weights = pretrained_weights()
    for one in weights.values():
        assert (one.path / "card.md").read_text("utf-8") == measuring.card(one)
        report = json.loads((one.path / "report.json").read_text("utf-8"))
        assert measuring.digest(one)[:8] in report["samples"]
        head = yaml.safe_load((one.path / "card.md").read_text("utf-8").split("---\n")[1])
        found = report["files"][0]["metrics"]["molecule_stability"]
        assert f"{100 * found['value']:.1f} [" in head["summary"]
        assert found["interval"][0] <= found["value"] < found["interval"][1]
        count = measuring.family_of(one).samples
        assert sum(report["by_unstable_atoms"]) == report["files"][0]["molecules"] == count
        assert report["by_unstable_atoms"][0] == round(count * found["value"])
    for family, members in measuring.families(weights).items():
        for page, columns in family.tables.items():
            text = (ROOT / page).read_text("utf-8")
            table = measuring.table(family, members, columns)
            assert measuring.with_table(text, table) == text


def test_every_way_of_sampling_is_measured(measuring):
    with (pretrained_weights()[DEFAULT].path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [(row["sampler"], row["spacing"], int(row["steps"])) for row in rows]
    every = [(*kind, steps) for kind, steps in measuring.STEPS.items()]
    assert measured == [
        *((sampler, spacing, one) for sampler, spacing, steps in every for one in steps),
        ("sde-dpm++", "chosen", 30),
    ]


def test_measuring_continues_where_it_was(measuring, tmp_path, monkeypatch, molecules):
    """Files that are there are not drawn again, and their note says how they were drawn."""
    one = pretrained_weights()[DEFAULT]
    family = dataclasses.replace(measuring.family_of(one), samples=3)
    monkeypatch.setitem(measuring.FAMILIES, "qm9", family)
    path = measuring.draw_file(one, tmp_path, CPU, "ddim", "log", 2, 3)
    note = measuring.note_of(path)
    assert (note["sampler"], note["spacing"], note["steps"]) == ("ddim", "log", 2)
    assert note["evaluations"] == 3 and note["device"].startswith("CPU, ")
    monkeypatch.setattr(measuring, "sample_to_file", None)
    assert measuring.draw_file(one, tmp_path, CPU, "ddim", "log", 2, 3) == path
    fewer = measuring.draw_file(one, tmp_path, CPU, "ddim", "log", 2, 2)
    assert measuring.note_of(fewer) == note
    with MoleculeFile(path) as all_three, MoleculeFile(fewer) as two:
        assert np.array_equal(two.load().positions, all_three.slice(0, 2).positions)
        assert two.provenance == all_three.provenance
    found = measuring.faults(path, family.bins)
    assert sum(found["by_unstable_atoms"]) == 3
    assert sum(row["molecules"] for row in found["by_size"]) == 3
