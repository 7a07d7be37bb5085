"""What users share holds no absolute path, no home and no script, and reading it runs no code."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import h5py
import pytest
import yaml
from runs import tiny

import molgen_energy
from molgen_energy.api.evaluate import evaluate
from molgen_energy.api.preprocess import preprocess
from molgen_energy.api.sample import sample, sample_to
from molgen_energy.api.train import train
from molgen_energy.errors import InputError
from molgen_energy.resources import resource_directory
from molgen_energy.systems.registry import load_config

WATER = "3\n{title}\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Files of a user who names all of them by absolute paths, from another folder."""
    home = tmp_path_factory.mktemp("home") / "somebody"
    (home / "project" / "a").mkdir(parents=True)
    (home / "project" / "b").mkdir()
    return home


@pytest.fixture(scope="module")
def made(home) -> Path:
    """The project with a file of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "home", lambda: home)
        patch.chdir(home.parent)
        project = home / "project"
        for name in ("a", "b"):
            (project / name / "m.xyz").write_text(WATER.format(title="water") * 6)
        preprocess(project / "a" / "m.xyz", project / "m.h5")
        patch.chdir(project / "a")
        preprocess(".", project / "folder.h5")
        patch.chdir(home.parent)
        changes = {"model.layers": 1, "model.width": 8, "process.steps": 3, "training.steps": 1}
        config = tiny().replaced(changes)
        run = project / "runs" / "first"
        train(config, data=project / "m.h5", output=run, device="cpu")
        second = project / "runs" / "second"
        train(config, data=project / "m.h5", initial_weights=run, output=second, device="cpu")
        for suffix in ("sdf", "xyz", "h5"):
            sample_to(project / f"s.{suffix}", 2, checkpoint=second, device="cpu")
        files = [project / name for name in ("a/m.xyz", "b/m.xyz", "s.h5", "s.sdf")]
        options = {"reference": project / "m.h5", "train": project / "a" / "m.xyz"}
        report = evaluate(files, **options, types="frequent", metrics="rates,geometry", workers=0)
        report.save(project / "report")
        (project / "printed.txt").write_text(str(report), encoding="utf-8")
    return project


def test_no_file_holds_the_path_of_its_author(home, made):
    files = [path for path in made.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert kinds >= {".h5", ".sdf", ".xyz", ".html", ".json", ".png", ".yaml", ".txt", ".csv"}
    for path in files:
        content = path.read_bytes()
        for secret in (str(home.parent), home.name, home.parent.name):
            assert secret.encode() not in content, path
    names = [
        file["name"] for file in json.loads((made / "report/report.json").read_text())["files"]
    ]
    assert names == ["a/m.xyz", "b/m.xyz", "project/s.h5", "project/s.sdf"]
    with h5py.File(made / "folder.h5") as file:
        assert file.attrs["source"] == "a"
    config = yaml.safe_load((made / "runs/second/config.yaml").read_text())
    assert config["data"]["path"] == "~/project/m.h5"
    assert config["training"]["initial_weights"] == "~/project/runs/first"


def test_a_run_that_was_copied_still_samples_and_resumes(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "runs" / "second", tmp_path / "copy")
    assert sample_to("s.xyz", 1, checkpoint="copy", device="cpu").written == 1
    with pytest.raises(InputError, match="the data of copy, does not exist; name it with --data"):
        train(resume="copy", steps=2, device="cpu")
    summary = train(resume="copy", data=made / "m.h5", steps=2, device="cpu")
    assert summary.steps == 2


def test_a_project_that_was_copied_finds_its_data(home, tmp_path, monkeypatch):
    """Started in the project, so its paths are relative to it."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    preprocess("shapes", "shapes.h5", seed=0)
    config = load_config("shapes_energy").replaced({"training.steps": 1, "training.batch_size": 8})
    train(config, data="shapes.h5", output="runs/mine", device="cpu")
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(home)
    run = tmp_path / "moved" / "runs" / "mine"
    assert "path: shapes.h5" in (run / "config.yaml").read_text()
    assert train(resume=run, steps=2, device="cpu").steps == 2
    assert len(sample(3, checkpoint=run)["radius"]) == 3


def test_shipped_files_hold_no_path_of_their_author():
    pattern = re.compile(rb"/(home|root|Users|tmp|work|mnt)/")
    for path in (resource_directory("assets") / "weights").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert not pattern.search(path.read_bytes()), path


class _Page(HTMLParser):
    """Counts the elements and attributes that could run a script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        harmless = not any(
            name.startswith("on") or (value or "").strip().lower().startswith("javascript:")
            for name, value in attrs
        )
        if tag == "script" or not harmless:
            self.found.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.skipif(os.name != "posix", reason="needs such file names")
def test_what_stands_in_files_is_text_on_the_page(tmp_path, monkeypatch):
    """Names of files and records, provenance and failures of foreign files."""
    monkeypatch.chdir(tmp_path)
    name = SCRIPT.replace("/", "")
    Path(f"{name}.xyz").write_text(WATER.format(title=f'smiles="{SCRIPT}" {SCRIPT}') * 3)
    molecules = preprocess(f"{name}.xyz", "m.h5")
    assert molecules.count == 3
    with h5py.File("m.h5", "r+") as file:
        file.attrs["source"] = SCRIPT
        file.attrs["provenance"] = json.dumps({SCRIPT: SCRIPT, "config": f"{SCRIPT}\n{SCRIPT}"})
    report = evaluate([f"{name}.xyz", "m.h5"], reference="m.h5", types="frequent", workers=0)
    page = _Page()
    page.feed(report.save("report").read_text(encoding="utf-8"))
    own = _Page()
    Path("plain.xyz").write_text(WATER.format(title="water") * 3)
    plain = evaluate("plain.xyz", reference="plain.xyz", types="frequent", workers=0)
    own.feed(plain.save("plain").read_text(encoding="utf-8"))
    assert page.found == own.found
    assert any(name in text for text in page.text)
    assert any(SCRIPT in text for text in page.text)


UNSAFE = {
    r"\bpickle\.|import pickle\b": "it runs code",
    r"\bdill\b|\bjoblib\b|\bshelve\b|\bmarshal\b": "they run code",
    r"(?<!safetensors\.)torch\.load\b": "a pickle",
    r"weights_only": "a pickle",
    r"allow_pickle\s*=\s*True": "a pickle",
    r"yaml\.(load|load_all|full_load|unsafe_load|FullLoader|UnsafeLoader|Loader)\b": "runs code",
    r"(?<![\w.])(eval|exec|compile|__import__)\(": "it runs code",
    r"\bos\.system\b|shell\s*=\s*True": "a shell",
    r"extractall\(": "members may lead out of the folder",
    r"\|\s*safe\b": "not escaped",
    r"autoescape\s*=\s*False": "not escaped",
}


@pytest.mark.parametrize("pattern", UNSAFE)
def test_nothing_that_is_read_can_run_code(pattern):
    root = Path(molgen_energy.__file__).parent
    files = [
        path
        for path in root.rglob("*")
        # Processes of this package send each other pickles; none is read from a file.
        if path.suffix in (".py", ".j2", ".html") and path != root / "workers.py"
    ]
    assert len(files) > 100
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.search(pattern, line), f"{path}:{number}: {UNSAFE[pattern]}: {line}"


def test_the_patterns_find_what_they_are_for():
    lines = [
        "import pickle", "import joblib", "torch.load(path)", "f(weights_only=False)",
        "f(allow_pickle=True)", "yaml.load(text)", "x = eval(text)",
        "run(shell=True)", "archive.extractall(path)", "{{ name|safe }}", "autoescape=False",
    ]  # fmt: skip
    for line, pattern in zip(lines, UNSAFE, strict=True):
        assert re.search(pattern, line), (line, pattern)
    for line in ("model.eval()", "re.compile(x)", "safetensors.torch.load(path)"):
        assert not any(re.search(pattern, line) for pattern in UNSAFE), line
