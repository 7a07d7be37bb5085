"""`--help`, completion, usage errors, `-v` and `-q`: the command line as people are used to it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import typer

from molgen_energy.chemistry.geometry import COUNTINGS, GEOMETRY_TYPES
from molgen_energy.chemistry.valence import VALENCE_MODELS
from molgen_energy.cli import app, evaluate, sample, train
from molgen_energy.diffusion.samplers import SAMPLERS
from molgen_energy.losses import EDGES, LOSSES, SPIN_LOSSES, SPRINGS
from molgen_energy.metrics.bundled import BUNDLED, DEFAULT_REFERENCE
from molgen_energy.metrics.options import BOND_CHOICES, METRIC_GROUPS
from molgen_energy.systems.datasets import DATASETS

GROUP = typer.main.get_command(app)
PREPROCESS = GROUP.commands["preprocess"]
LEAVES = {
    **{name: GROUP.commands[name] for name in ("train", "sample", "evaluate", "info")},
    **{f"preprocess {name}": PREPROCESS.commands[name] for name in DATASETS},
}
COMMANDS = {"": GROUP, "preprocess": PREPROCESS, **LEAVES}
COMMON = {"--verbose", "--quiet", "--help"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in this process: exit code, standard output, standard error."""

    def call(*arguments, columns=80):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([*map(str, arguments)], prog_name="molgen-energy")
        return (ended.value.code or 0, *capsys.readouterr())

    return call


def options(command):
    return [p for p in command.params if p.param_type_name == "option"]


@pytest.mark.parametrize("columns", [50, 80, 100, 160])
def test_help_fits_and_keeps_words(run, columns):
    """Every word of every text stands in one piece, and no line is longer than the terminal."""
    for name, command in COMMANDS.items():
        code, text, stderr = run(*name.split(), "--help", columns=columns)
        assert (code, stderr) == (0, "")
        assert max(map(len, text.splitlines())) <= min(columns, 100), name
        words = set(re.sub("[│╭╮╰╯─]", " ", text).split())
        for parameter in command.params:
            assert set((parameter.help or "").split()) <= words, (name, parameter.name)
            names = [part for option in parameter.opts for part in (option, f"{option},")]
            assert parameter.param_type_name == "argument" or words & set(names)
            assert set(parameter.secondary_opts) <= words, (name, parameter.name)
        assert not re.search(r"\[default:[^\]]*\n", text), name
        assert "<bool>" not in text
    assert text.count("\n") < 60


def test_every_option_has_a_panel_and_every_value_a_name():
    for name, command in LEAVES.items():
        for option in options(command):
            own = not COMMON & set(option.opts)
            assert not own or option.rich_help_panel or name == "info", (name, option.opts)
            assert option.is_flag or option.metavar, (name, option.opts)


def test_examples_are_commands_that_exist_and_fit():
    lines = [line for command in COMMANDS.values() for line in (command.epilog or "").split("\n")]
    examples = [line for line in lines if line]
    assert len(examples) > 10
    for line in examples:
        assert len(line) <= 76
        program, name, *words = shlex.split(line)
        command = GROUP.commands[name]
        if name == "preprocess":
            kind = "smiles" if "mine.smi" in words else "files"
            command = command.commands[words[0] if words[0] in DATASETS else kind]
        known = {name for option in command.params for name in option.opts}
        assert program == "molgen-energy"
        assert {word for word in words if word.startswith("-")} <= known, line


def test_names_in_texts_and_completion_are_those_of_the_registries():
    """The command line does not import the registries at its start."""
    assert set(train._LOSSES) == set(LOSSES)
    assert set(train._SPIN_LOSSES) == set(SPIN_LOSSES)
    assert {*train._SPRINGS, "auto"} >= set(SPRINGS)
    assert set(train._EDGES) == set(EDGES)
    assert set(sample._SAMPLERS) == set(SAMPLERS)
    assert set(evaluate._METRICS) == {*METRIC_GROUPS, "default", "all"}
    assert list(evaluate._REFERENCES) == list(BUNDLED)
    assert evaluate._REFERENCES[0] == DEFAULT_REFERENCE
    completed = {
        option.name: option for option in options(LEAVES["evaluate"]) if option.metavar == "NAME"
    }
    for name, names in (
        ("bonds", BOND_CHOICES), ("valence", VALENCE_MODELS), ("angles", COUNTINGS),
        ("types", (*GEOMETRY_TYPES, "frequent")),
    ):  # fmt: skip
        context = typer.Context(LEAVES["evaluate"])
        found = completed[name].shell_complete(context, "")
        assert {item.value for item in found} == set(names)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --loss s", {"score_energy"}),
        ("train --config qm9_e", {"qm9_edm", "qm9_edm_cpu"}),
        ("sample --checkpoint ", {"ccd_energy", "ccd_mse", "qm9_energy", "qm9_mse"}),
        ("preprocess ", set(DATASETS)),
    ],
)
def test_the_shell_completes(tmp_path, words, expected):
    program = "import sys; sys.argv = ['molgen-energy']; from molgen_energy.cli import main; main()"
    line = f"molgen-energy {words}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={"_MOLGEN_ENERGY_COMPLETE": "complete_bash", "COMP_WORDS": line,
             "COMP_CWORD": str(len(line.split(" ")) - 1), "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert (set(done.stdout.split()), done.stderr) == (expected, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--los", "mse"), "error: no such option: --los"),
        (("trian",), "error: no such command 'trian'"),
        (("train", "--steps", "few"), "error: invalid value for '--steps'"),
        (("sample", "qm9_mse"), "error: got unexpected extra argument(s) (qm9_mse): name a run or"),
        (("evaluate",), "error: missing argument 'FILE…'"),
        (("-v", "train", "-q"), "error: -v and -q exclude each other; leave out one"),
    ],
)
def test_bad_usage_is_one_line(run, arguments, message):
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "")
    *before, line = stderr.splitlines()
    assert line.startswith(message)
    assert before == [] or "-v" in arguments
    assert "--help)" in line or "exclude" in line


def test_without_arguments_the_help_is_shown(run):
    assert run() == run("--help")
    assert run("preprocess") == run("preprocess", "-h")


@pytest.mark.parametrize("columns", [50, 80, 100])
def test_names_and_texts_fit_and_keep_intervals(run, columns):
    for command in (("sample", "--checkpoint", "list"), ("info",)):
        code, text, _ = run(*command, columns=columns)
        assert code == 0
        assert max(map(len, text.splitlines())) <= columns
        for interval in ("[80.7, 82.3]", "[75.3, 76.9]"):
            assert interval in text


def test_quiet_and_verbose(run, tmp_path):
    (tmp_path / "a.xyz").write_text("3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n" * 9)
    code, stdout, stderr = run("preprocess", "a.xyz", "-q")
    assert (code, stdout) == (0, "")
    assert all(line.startswith("warning: ") for line in stderr.splitlines())
    told = run("preprocess", "a.xyz", "-o", "b.h5")[2]
    assert "9 molecules written to b.h5" in told
    detailed = run("-v", "preprocess", "a.xyz", "-o", "c.h5")[2].splitlines()
    assert re.match(r"molgen-energy \S+, Python 3\.\d+\.\d+, torch \S+, rdkit", detailed[0])
    assert len(detailed) == 1 + len(told.splitlines())
    code, _, stderr = run("-q", "preprocess", "a.xyz", "--elements", "H", "-o", "d.h5")
    assert (code, stderr.count("\n")) == (2, 1)


def test_files_are_not_replaced_unless_told(run, tmp_path):
    (tmp_path / "a.xyz").write_text("3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n" * 9)
    (tmp_path / "report").mkdir()
    for path in ("a.h5", "samples.sdf", "report/report.html"):
        (tmp_path / path).write_text("mine")
    sampling = ("sample", "-n", "1", "--steps", "1", "--checkpoint", "qm9_energy")
    commands = {
        "a.h5": ("preprocess", "a.xyz", "-o", "a.h5"),
        "samples.sdf": (*sampling, "-o", "samples.sdf"),
        "report/report.html": ("evaluate", "a.xyz", "--report", "report"),
    }
    for path, command in commands.items():
        code, _, stderr = run(*command)
        assert code == 2
        option = "--report" if "report" in path else "-o"
        last = stderr.splitlines()[-1]
        assert (
            last
            == f"error: {path} exists; name another with {option}, or replace it with --overwrite"
        )
        assert (tmp_path / path).read_text() == "mine"
    assert run(*commands["a.h5"], "--overwrite")[0] == 0
    assert run(*commands["samples.sdf"], "--overwrite")[0] == 0
    for default, command in (("a.h5", ("preprocess", "a.xyz")), ("samples.sdf", sampling)):
        (tmp_path / default).write_text("old")
        code, _, stderr = run(*command)
        assert code == 0
        assert f"{default} exists and is replaced once the new file is complete" in stderr
    assert (tmp_path / "samples.sdf").read_text().count("$$$$") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"a.xyz", "a.h5", "samples.sdf", "report"}
