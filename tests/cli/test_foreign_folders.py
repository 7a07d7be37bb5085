"""Folders of runs, shards and reports of somebody else: nothing is written outside of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from runs import run_command, tiny

from molgen_energy.api.train import train
from molgen_energy.systems.molecules import sampling

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")

WATER = "3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"
ETHANE = "CC\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps of four."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"training.steps": 1, "process.steps": 4}
    train(tiny().replaced(changes), output=folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run a command in this process, in a folder of its own: exit code and errors."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        return run_command(arguments, monkeypatch), capsys.readouterr().err

    return run


def put(path: Path, what: str, victim: Path) -> None:
    """Replace a path by a link to the victim, or by a pipe."""
    if path.is_dir() and what == "link":
        shutil.copytree(path, victim)
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)


def content(folder: Path) -> dict[str, bytes | int]:
    """All files of a folder with their bytes, others with their type."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.lstat().st_mode
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("log.txt", "link"),
        ("log.txt", "pipe"),
        ("metrics.csv", "link"),
        ("metrics.csv", "pipe"),
        ("config.yaml", "link"),
        ("tensorboard", "dangling"),
        ("checkpoints", "link"),
        ("checkpoints/last", "link"),
        ("checkpoints/last.tmp", "dangling"),
        ("checkpoints/last.old", "dangling"),
        ("checkpoints/best", "link"),
    ],
)
def test_a_foreign_run_is_resumed_in_its_folder_alone(here, trained, tmp_path, name, what):
    run, victim = tmp_path / "here" / "run", tmp_path / "victim"
    shutil.copytree(trained, run)
    if what == "link" and not (run / name).is_dir():
        victim.write_text("mine")
    put(run / name, what, victim)
    before = content(tmp_path)
    code, stderr = here("train", "--resume", "run", "--steps", "3")
    assert code == 2
    assert stderr.startswith("error: ") or "\nerror: " in stderr
    assert f"run/{name} is a " in stderr
    assert stderr.rstrip().endswith("; remove it")
    assert content(tmp_path) == before


def test_a_run_that_is_resumed_keeps_what_it_left_behind_clean(here, trained, tmp_path):
    run = tmp_path / "here" / "run"
    shutil.copytree(trained, run)
    leftovers = [run / f".metrics.csv.{16 * 'a'}.tmp", run / "checkpoints" / "last.tmp"]
    leftovers[0].touch()
    leftovers[1].mkdir()
    (run / "notes.txt").symlink_to(tmp_path / "elsewhere")  # not ours
    (run / "metrics.csv").chmod(0o600)
    assert here("train", "--resume", "run", "--steps", "2")[0] == 0
    assert not any(path.exists() for path in leftovers)
    assert (run / "notes.txt").is_symlink()
    assert (run / "metrics.csv").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["folder", "0.shard", "manifest.yaml", "samples.xyz", "1.done"])
@pytest.mark.parametrize("what", ["link", "pipe"])
def test_foreign_shards_lead_nowhere(here, trained, tmp_path, monkeypatch, name, what):
    """Those of `sample --resume`."""
    with monkeypatch.context() as broken:
        broken.setattr(sampling._SamplingRun, "_write", full)
        code, _ = here("sample", "-n", "1", "--checkpoint", trained, "-o", "samples.xyz")
    assert code == 2
    folder, victim = tmp_path / "here" / "samples.xyz.shards", tmp_path / "victim"
    (shard,) = folder.glob("*.shard")
    path = {"folder": folder, "0.shard": shard}.get(name, folder / name)
    if what == "link" and path.is_file():
        shutil.copyfile(path, victim)
    if what == "pipe" and path.is_dir():
        shutil.rmtree(path)
    put(path, what, victim)
    before = content(tmp_path)
    code, stderr = here("sample", "--resume", "samples.xyz")
    assert code == 2
    assert f"{path.relative_to(folder.parent)} is a " in stderr
    assert content(tmp_path) == before


def full(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["report.html", "report.json", "1.png"])
@pytest.mark.parametrize("what", ["link", "pipe"])
def test_a_foreign_report_leads_nowhere(here, tmp_path, name, what):
    report = tmp_path / "here" / "report"
    report.mkdir()
    Path("water.xyz").write_text(WATER)
    put(report / name, what, tmp_path / "victim")
    before = content(tmp_path)
    code, stderr = here("evaluate", "water.xyz", "--report", "report")
    assert code == 2
    assert stderr.startswith(f"error: report/{name} is a ")
    assert content(tmp_path) == before


OUTPUTS = {
    "preprocess": ("preprocess", "water.xyz", "-o"),
    "preprocess smiles": ("preprocess", "smiles", "ethane.smi", "-o"),
    "preprocess shapes": ("preprocess", "shapes", "-o"),
    "sample": ("sample", "-n", "1", "--checkpoint", "run", "-o"),
}


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize("what", ["pipe", "link to a pipe", "link to itself"])
def test_an_output_that_is_no_file_stays(here, trained, tmp_path, command, what):
    Path("water.xyz").write_text(WATER * 3)
    Path("ethane.smi").write_text(ETHANE)
    Path("run").symlink_to(trained)
    output = Path("f.h5")
    if what == "pipe":
        os.mkfifo(output)
    elif what == "link to a pipe":
        os.mkfifo("pipe")
        output.symlink_to("pipe")
    else:
        output.symlink_to(output)
    before = content(tmp_path / "here")
    code, stderr = here(*OUTPUTS[command], output)
    assert code == 2
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"error: {output} ")
    assert content(tmp_path / "here") == before


def test_a_new_run_in_a_circle_of_links_is_one_line(here, tmp_path):
    Path("a").symlink_to("b")
    Path("b").symlink_to("a")
    for arguments in (
        ("train", "--steps", "1", "-o", "a"),
        ("train", "--resume", "a"),
        ("train", "--from", "a"),
        ("train", "--data", "a"),
        ("sample", "--checkpoint", "a"),
        ("sample", "--resume", "a"),
        ("evaluate", "a"),
        ("evaluate", "a", "--report", "a"),
        ("preprocess", "files", "a"),
        ("preprocess", "smiles", "a"),
    ):
        code, stderr = here(*arguments)
        assert (code, stderr.count("\n")) == (2, 1), (arguments, stderr)
        assert stderr.startswith("error: ")
    assert len(list(tmp_path.joinpath("here").iterdir())) == 2
