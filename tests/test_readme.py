"""What the README prints must be what there is; only where the checkout is at hand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
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
    verbs = typer.main.get_command(app).commands
    for verb, *arguments in commands():
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        used = {word for word in arguments if word.startswith("-")}
        assert used <= known, (verb, used - known)


def test_every_printed_configuration_is_shipped():
    text = README.read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)`[^|]*\| GDM|^\| `(\w+)` \| the same", text, re.MULTILINE))
    assert {name for pair in listed for name in pair if name} == set(config_names())


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\$[A-Z]{3,}|TODO|TBD", README.read_text(encoding="utf-8"))


def test_the_check_runs_the_printed_test_command():
    test_command = "python -m pip install -c constraints.txt -e '.[dev,qm9]' && python -m pytest"
    assert test_command in README.read_text(encoding="utf-8")
    assert test_command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
