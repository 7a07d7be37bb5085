"""What reaches the terminal: no control characters or markup of others, on streams of any kind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import yaml
from runs import run_command, tiny

from molgen_energy.api.preprocess import preprocess
from molgen_energy.api.train import train
from molgen_energy.cli import console
from molgen_energy.cli.console import progress_bar, say, show, time_left, warn

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m[red]\u202e[/nothing]"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m[red]\u202e[/nothing]"
# ESC and BEL as they may stand in YAML, file names and fields of molecule files.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\udc80-\udcff]")
WATER = "3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"

posix = pytest.mark.skipif(os.name != "posix", reason="needs a shell and such file names")


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run a command in this process: exit code, output and errors, none of them raw."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(arguments, monkeypatch)
        shown = capsys.readouterr()
        for text in shown:
            assert not RAW.search(text), text
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    changes = {"training.steps": 1, "process.steps": 3}
    train(tiny().replaced(changes), output=folder / "run", device="cpu")
    return folder / "run"


SDF = """{title}
  made by hand

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 O   0  0
    0.9600    0.0000    0.0000 H   0  0
   -0.2400    0.9300    0.0000 H   0  0
  1  2  1  0
  1  3  1  0
M  END
>  <{field}>
{value}

$$$$
"""

MESSAGES = {
    "option": ("train", "--loss", EVIL),
    "command": (EVIL,),
    "usage": ("train", f"--{EVIL}"),
    "number": ("sample", "-n", EVIL),
    "key": ("train", "--set", f"{EVIL}=1"),
    "value": ("train", "--set", f"model.layers={EVIL}"),
    "sizes": ("sample", "--n-atoms", EVIL),
    "where": ("sample", "--where", EVIL),
    "missing file": ("evaluate", f"{EVIL.replace('/', '')}.xyz"),
    "element": ("evaluate", "element.xyz"),
    "coordinate": ("evaluate", "coordinate.xyz"),
    "comment": ("preprocess", "comment.xyz", "--properties", f"no{EVIL}"),
    "properties": ("preprocess", "comment.xyz", "--properties", "none"),
    "header": ("preprocess", "smiles", "header.csv"),
    "smiles": ("preprocess", "smiles", "bad.smi"),
    "yaml key": ("train", "--config", "key.yaml"),
    "yaml value": ("train", "--config", "value.yaml"),
    "no yaml": ("train", "--config", "no.yaml"),
    "attribute": ("evaluate", "attribute.h5"),
}


@posix
@pytest.mark.parametrize("what", MESSAGES)
def test_error_lines_show_control_characters(here, tmp_path, what):
    (tmp_path / "element.xyz").write_text(WATER.replace("O 0", f"{EVIL} 0"))
    (tmp_path / "coordinate.xyz").write_text(WATER.replace("0.96", EVIL))
    (tmp_path / "comment.xyz").write_text(WATER.replace("water", f"{EVIL}=1 gap=2") * 3)
    (tmp_path / "header.csv").write_text(f"{EVIL},b\nC,1\n")
    (tmp_path / "bad.smi").write_text(f"{EVIL}\n")
    (tmp_path / "key.yaml").write_text(yaml.safe_dump({"name": "a", EVIL: 1}))
    (tmp_path / "value.yaml").write_text(yaml.safe_dump({"name": "a", "system": EVIL}))
    (tmp_path / "no.yaml").write_text(f"'{EVIL}")
    with h5py.File(tmp_path / "attribute.h5", "w") as file:
        file.attrs.update(schema=EVIL, system=EVIL)
    code, out, err = here(*MESSAGES[what])
    assert code == 2
    assert not out
    if what not in ("command", "usage", "number"):
        assert err.startswith("error: ")
        assert err.count("\n") == 1


@posix
def test_names_and_fields_are_shown_and_not_obeyed(here, tmp_path, trained):
    """Of a run, of files, of records: in announcements, tables, warnings, logs and JSON."""
    name = EVIL.replace("/", "").replace("\x9b", "") + "\n\udcff"
    run, data = tmp_path / name, tmp_path / f"{name}.sdf"
    shutil.copytree(trained, run)
    fields = {"title": EVIL.replace("\n", ""), "field": EVIL.replace(">", ""), "value": "1.5"}
    flat = SDF.format(**fields)
    data.write_text(flat * 3 + flat.replace("0.9600", "0.0000"))
    code, out, err = here("evaluate", data, "--report", "report", "--metrics", "rates")
    assert (code, err.count("error")) == (0, 0), err
    assert r"\x1b]0;title\x07\x1b[2J31m[red]\u202e[nothing]\n" in out
    code, out, _ = here("evaluate", data, "--json", "-", "--metrics", "rates")
    assert json.loads(out)["files"][0]["molecules"] == 4
    code, _, err = here("preprocess", data, "--skip-bad", "-o", f"{name}.h5")
    assert code == 0, err
    assert SHOWN.replace("/", "_") in err  # the field
    code, _, err = here("train", "--data", f"{name}.h5", "--steps", "1", "-o", f"{name}2",
                        "--set", "model.layers=1", "--set", "model.width=8")  # fmt: skip
    assert code == 0, err
    code, _, err = here("train", "--resume", f"{name}2", "--steps", "2")
    assert code == 2  # a text cannot hold that name
    assert err.endswith("does not exist; name it with --data FILE\n")
    assert here("train", "--resume", f"{name}2", "--steps", "2", "--data", f"{name}.h5")[0] == 0
    for suffix in ("sdf", "h5"):
        code, _, err = here(
            "sample", "-n", "1", "--checkpoint", name, "-o", f"{name}.{suffix}", "--overwrite"
        )
        assert code == 0, err
    assert here("train", "--resume", name)[0] == 0
    assert here("train", "--resume", name, "--steps", "2")[0] == 0
    assert here("sample", "--resume", name)[0] == 2
    assert not RAW.search((run / "log.txt").read_text())


def test_the_api_reports_without_control_characters(tmp_path, monkeypatch):
    from molgen_energy.api.evaluate import evaluate

    monkeypatch.chdir(tmp_path)
    path = Path(f"{EVIL.replace('/', '')}.xyz")
    path.write_text(WATER * 2)
    assert not RAW.search(str(evaluate(path, workers=0)))


@pytest.fixture
def terminal(monkeypatch):
    """The text that a terminal receives as standard error."""
    file = io.StringIO()
    made = console._SafeConsole(file=file, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(console, "stderr", made)
    return file


def test_bars_and_lines_show_control_characters(terminal, capsys):
    with progress_bar("loss") as bar:
        task = bar.add_task(EVIL, total=2, loss="")
        bar.update(task, advance=1, loss=EVIL)
        bar.refresh()
    own = set(re.findall(r"\x1b.[?0-9]*[A-Za-z]?", terminal.getvalue()))
    assert terminal.getvalue().count(r"\x1b]0;title\x1b[2J\x9b31m[re") >= 2  # cut to the width
    say(EVIL)
    warn(f"{EVIL}\nerror: none")
    assert f"warning: {SHOWN}\\nerror: none\n" in terminal.getvalue()
    sequences = set(re.findall(r"\x1b.[?0-9]*[A-Za-z]?", terminal.getvalue()))
    assert sequences == own == {"\x1b[?25l", "\x1b[?25h", "\x1b[2K"}  # of the bar itself
    assert "\x07" not in terminal.getvalue()
    show(EVIL)
    assert capsys.readouterr().out == f"{SHOWN}\n"


def test_the_time_left_is_that_of_the_speed():
    bar, clock = progress_bar(), iter([0.0, 10.0, 20.0, 20.0, 20.0])
    bar.get_time = lambda: next(clock, 20.0)
    task = bar.add_task("training", total=100)
    assert time_left(bar) == ""
    for done in (5, 10):
        bar.update(task, completed=done)
    assert time_left(bar) == ", about 3.0 minutes left"  # 90 steps at 0.5 a second
    bar.update(task, completed=100)
    assert time_left(bar) == ""


def test_a_line_keeps_its_beginning_and_its_remedy(terminal):
    warn("a.xyz: " + 10_000_000 * "x" + "; mend it")
    line = terminal.getvalue()
    assert len(line) < 5000
    assert line.startswith("warning: a.xyz: x")
    assert line.endswith("x; mend it\n")


def shell(folder: Path, command: str, **environment: str) -> tuple[int, bytes]:
    """Exit code and output of a command of a shell, `$M` for the program."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        env=os.environ
        | {"M": f"{sys.executable} -m molgen_energy", "COLUMNS": "100"}
        | environment,
        timeout=120,
    )
    text = done.stdout + done.stderr
    assert b"Traceback" not in text
    assert b"Exception ignored" not in text
    return done.returncode, text


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("$M --version > /dev/full", 2, "error: No space left on device: standard output; free"),
        ("$M --help > /dev/full", 2, "error: No space left on device; free some and run again\n"),
        ("$M --version >&-", 2, "error: standard output is closed\n"),
        ("$M --version 2>&-", 0, "molgen-energy "),
        ("$M --version <&- >&- 2>&-", 2, ""),
        ("$M evaluate nothing.sdf 2> /dev/full", 2, ""),
        ("$M evaluate nothing.sdf 2>&-", 2, ""),
        ("$M preprocess water.xyz -o /dev/stdout | cat; exit ${PIPESTATUS[0]}", 2,
         "error: /dev/stdout is a device or a pipe; name a file to write\n"),
    ],
)  # fmt: skip
def test_streams_that_are_closed_or_full(tmp_path, command, code, message):
    (tmp_path / "water.xyz").write_text(WATER)
    ended, text = shell(tmp_path, command)
    assert ended == code
    assert text.decode().startswith(message)
    assert text.count(b"\n") == (1 if message else 0)


@posix
def test_a_closed_output_does_not_take_messages_into_files(tmp_path):
    """A file that is opened gets the lowest free number, which may be that of standard error."""
    (tmp_path / "water.xyz").write_text(WATER * 5)
    code, _ = shell(tmp_path, "$M preprocess water.xyz -o a.h5 <&- >&- 2>&-")
    assert code == 0
    preprocess(tmp_path / "water.xyz", tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@posix
@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["C", "ascii"],
)
def test_the_help_on_terminals_of_other_encodings(tmp_path, environment):
    """It has … and Å."""
    code, text = shell(tmp_path, "$M sample --help && $M evaluate --help", **environment)
    assert code == 0
    assert b"--temperature-range" in text


@posix
def test_a_terminal_and_file_names_in_ascii(tmp_path):
    """The table has ±, and the file's name is not even UTF-8."""
    name = os.fsdecode("é".encode() + b"\xff.xyz")
    (tmp_path / name).write_text(WATER * 3)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = "$M evaluate *.xyz --metrics rates --workers 0 && $M preprocess *.xyz -o a.h5"
    code, text = shell(tmp_path, command, **ascii_only)
    assert code == 0
    assert text.isascii()
    assert b"3 molecules written to a.h5" in text
    assert b"[95 % interval]" in text
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["source"] == "é\ufffd.xyz"
