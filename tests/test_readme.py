"""What README and guides print exists and runs; only in a checkout."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from molgen_energy.cli import app
from molgen_energy.config import config_names

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no README beside the tests")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "molgen-energy"]


def test_every_printed_option_exists():
    assert len(commands()) >= 8
    known_commands = typer.main.get_command(app).commands
    for name, *arguments in commands():
        command = known_commands[name]
        if name == "preprocess":  # the name of a dataset, else a file
            command = command.commands.get(arguments[0], command.commands["files"])
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word for word in arguments if word.startswith("-")}
        assert used <= known, (name, used - known)


def test_every_printed_configuration_is_shipped():
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`[^|]*)\| (?:GDM|EDM|MLP|CNN|the same)", text, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(config_names())


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [README, *(ROOT / "docs" / f"{n}.md" for n in ("losses", "evaluation", "training"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page):
    assert not re.findall(r"\$[A-Z]{3,}|TODO|TBD|BENCHMARK", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_printed_python_is_python(page):
    """It compiles, what it imports exists, and what it calls takes what it is given."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, page.name, "exec")
        for line in block.splitlines():
            if line.startswith("from molgen_energy"):
                exec(line, {})


def test_printed_losses_run():
    """The examples of the page on losses, on data of the shapes that they name."""
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    training, packed, symmetrized, spins, extension = re.findall(
        r"```python\n(.*?)```", text, re.DOTALL
    )
    x, mask = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    names = {
        "batches": [(x, mask)],
        "centred_noise": lambda x, mask: torch.randn_like(x),
        "alpha": torch.full((2, 1, 1), 0.8),
        "sigma": torch.full((2, 1, 1), 0.6),
        "t": torch.rand(2),
        "model": lambda *inputs: 0.9 * inputs[0] if len(inputs) > 1 else inputs[0].pos + 1,
    }
    exec(training, names)
    assert names["loss"].shape == ()
    data = SimpleNamespace(pos=torch.randn(7, 3), batch=torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    exec(packed, names | {"data": data})
    exec("from molgen_energy.losses import PairwiseEnergy, SymmetrizedEdges", names)
    exec(symmetrized, names)
    lattice = {name: torch.rand(2, 4, 4) for name in ("right", "down")}
    exec(spins, lattice | {"logits": torch.randn(2, 16, 1), "spins": torch.ones(2, 16, 1)})
    exec(compile(extension, "losses.md", "exec", dont_inherit=True), names)
    huber = names["HuberConfig"](delta=0.5).build()
    inside, outside = x + 0.1, x + 10  # every error below delta, every error above it
    half_squares = 0.5 * 0.1**2 * 3
    torch.testing.assert_close(huber(inside, x, mask), torch.full((2,), half_squares))
    torch.testing.assert_close(huber(outside, x, mask), torch.full((2,), 0.5 * (10 - 0.25) * 3))


def test_printed_model_trains(tmp_path, monkeypatch):
    """The model of the page on training, on molecules with bonds."""
    import molgen_energy
    from molgen_energy.chemistry.bonds import perceive
    from molgen_energy.data.hdf5 import MoleculeFile
    from molgen_energy.models import MODELS
    from molgen_energy.resources import bundled_sample
    from molgen_energy.systems.molecules.task import MoleculeTask
    from molgen_energy.systems.registry import load_config

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    model, use = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setitem(MODELS, "tiny", None)  # removed after the test
    exec(model, {"__name__": "example"})
    with MoleculeFile(bundled_sample()) as file:
        molecules = perceive(file.slice(0, 40))
    molgen_energy.preprocess(molecules, tmp_path / "mols.h5")
    changes = eval(re.search(r"changes = (.*)", use)[1])
    config = load_config("quick").replaced(changes | {"data.path": str(tmp_path / "mols.h5")})
    task = MoleculeTask(config, torch.device("cpu"))
    losses = task.loss(task.model, task.epoch(0)[0], seed=0)
    assert losses.keys() == {"loss", "positions_loss", "elements_loss", "bonds_loss"}
    assert all(torch.isfinite(values).all() for values in losses.values())


def test_the_check_runs_the_printed_test_command():
    extras = "dev,qm9,spins,fcd,posebusters,xtb"
    test_command = f"pip install -c constraints.txt -e '.[{extras}]' && python -m pytest"
    assert test_command in README.read_text(encoding="utf-8")
    assert test_command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
