"""`molgen-energy info`."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from molgen_energy import __version__
from molgen_energy.api import info
from molgen_energy.cli import app
from molgen_energy.config import config_names
from molgen_energy.training import pretrained
from molgen_energy.training.pretrained import weights_directory

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
DEVELOPMENT = {"dev", "docs"}


@pytest.mark.skipif(not PYPROJECT.exists(), reason="no checkout around the tests")
def test_extras_are_those_of_the_package():
    section = PYPROJECT.read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    names = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    assert set(info.EXTRAS) == set(names) - DEVELOPMENT
    for name, (_, packages) in info.EXTRAS.items():
        listed = re.search(rf"^{name} = (\[.*?\])$", section, re.MULTILINE | re.DOTALL)[1]
        assert list(packages) == re.findall(r'"([a-z0-9]+)[><=]', listed)


def test_what_is_missing_or_damaged_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    shutil.copytree(weights_directory(), folder)
    with (folder / "qm9_mse" / "state.yaml").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(pretrained, "weights_directory", lambda: folder)
    real = importlib.metadata.version

    def version(name):
        if name == "ase":
            raise importlib.metadata.PackageNotFoundError
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = info.installation()
    assert found.version == __version__
    assert found.devices[0].name == "cpu"
    assert len(found.devices) >= 1 + torch.cuda.device_count()
    assert found.configurations == config_names()
    extras = {extra.name: extra for extra in found.extras}
    assert not extras["xtb"].is_installed
    assert extras["xtb"].command == "pip install 'molgen-energy[xtb]'"
    assert {weights.name: weights.is_intact for weights in found.weights} == {
        "qm9_energy": True, "ccd_energy": True, "ccd_mse": True, "qm9_mse": False,
    }  # fmt: skip
    assert json.loads(json.dumps(found.to_dict()))["packages"]["torch"] == real("torch")


def test_the_command_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        app(["info"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for words in (__version__, "cpu", "posebusters", "qm9_energy", "shapes_energy"):
        assert words in text
    assert str(Path.home()) not in text.replace(str(Path(info.__file__).parents[1]), "")
