"""Every command and every Python block that README and site print runs.

What takes hours runs with few samples or steps and a small network; programs of `benchmarks/` and
`scripts/` stop when they have read their arguments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from runs import run_command

import molgen_energy
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.config import config_names
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.models import MODELS
from molgen_energy.systems.datasets import DATASETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("molgen-energy", "python", "torchrun")

pytestmark = pytest.mark.skipif(not PAGES[0].exists(), reason="no README beside the tests")

METHANE = """5
gdb {0}\t157.7\t157.7\t157.7\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t\
-40.47893\t-40.476062\t-40.475117\t-40.498597\t6.469
C\t-0.012698\t1.085804\t0.008001\t-0.535689
H\t0.002150\t-0.006031\t0.001976\t0.133921
H\t1.011731\t1.463751\t0.000277\t0.133922
H\t-0.540815\t1.447527\t-0.876644\t0.133923
H\t-0.523814\t1.437933\t0.906397\t0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""
TINY = ["--set", "model.layers=1", "--set", "model.width=32", "--batch-size", "8"]


def commands_of(page: Path) -> list[str]:
    """Lines of blocks, and commands within sentences that are complete."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inside = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)
    mention = re.compile(r".*…|.*\b[A-Z]{3,}\b|molgen-energy \w+$|torchrun$")
    lines += [line for line in inside if not mention.match(line)]
    found = dict.fromkeys(line.strip() for line in lines)
    return [line for line in found if line.split(" ")[0] in PROGRAMS]


def blocks_of(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def each_page_with(found):
    pages = [page for page in PAGES if page.exists() and found(page)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def mol_block(smiles: str, drop: int, shift: float) -> str:
    """A molecule in three dimensions, without some of its last hydrogens."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(molecule, randomSeed=1)
    part = Chem.RWMol(molecule)
    for _ in range(drop):
        part.RemoveAtom(part.GetNumAtoms() - 1)
    part.GetConformer().SetPositions(part.GetConformer().GetPositions() + shift)
    return Chem.MolToMolBlock(part)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, sample_path: Path) -> Path:
    """The files that commands name."""
    folder = tmp_path_factory.mktemp("files")
    with MoleculeFile(sample_path) as file:
        few = file.slice(0, 60)
    with MoleculeWriter(folder / "qm9.h5", source="QM9") as writer:
        writer.append(few)
        writer.set_split(np.repeat(np.array([0, 1, 2], np.uint8), [40, 10, 10]))
    molecules = to_rdkit(perceive(few.select(np.arange(24))))
    for name in ("mols.sdf", "mine.sdf", "theirs.sdf", "samples.sdf"):
        with Chem.SDWriter(str(folder / name)) as sdf:
            for number, molecule in enumerate(molecules):
                for key, value in (("gap", 0.2), ("mu", 1.5), ("name", number)):
                    molecule.SetProp(key, str(value))
                sdf.write(molecule)
    for name, text, drop in (
        ("fragment", "CCO", 1),
        ("a", "CO", 1),
        ("b", "CN", 1),
        ("scaffold", "C1CC1C", 0),
    ):
        (folder / f"{name}.sdf").write_text(mol_block(text, drop, 5.0 * (name == "b")))
    smiles = [f"{text} {number}" for number, text in enumerate(("CCO", "CC=O", "C1CC1O", "CCN"))]
    for name in ("mols.smi", "mine.smi"):
        (folder / name).write_text("\n".join(smiles * 3))
    rows = "\n".join(f"{line.split()[0]},0.2" for line in smiles * 3)
    (folder / "mine.csv").write_text(f"canonical,gap\n{rows}\n")
    (folder / "original").mkdir()
    for number in range(1, 13):
        record = METHANE.format(number)
        (folder / "original" / f"dsgdb9nsd_{number:06d}.xyz").write_text(record)
    xyz = "".join(Chem.MolToXYZBlock(molecule) for molecule in molecules)
    (folder / "theirs.xyz.gz").write_text(xyz)  # content tells the kind
    (folder / "mols").mkdir()
    for number, molecule in enumerate(molecules[:3]):
        (folder / "mols" / f"molecule_{number}.txt").write_text(Chem.MolToXYZBlock(molecule))
    items = [(Chem.MolToSmiles(molecule), [molecule]) for molecule in molecules]
    for name in ("rdkit_folder", "geom_raw"):
        (folder / name).mkdir()
    for split in ("train", "val", "test"):
        (folder / f"geom_raw/{split}_data.pickle").write_bytes(pickle.dumps(items))
    content = {"conformers": [{"totalenergy": -1.0, "rd_mol": molecules[0]}]}
    (folder / "rdkit_folder/0.pickle").write_bytes(pickle.dumps(content))
    summary = {items[0][0]: {"uniqueconfs": 1, "pickle_path": "0.pickle"}}
    (folder / "rdkit_folder/summary_drugs.json").write_text(json.dumps(summary))
    molgen_energy.preprocess(str(folder / "mols.sdf"), folder / "mine.h5")
    small = {"model.layers": 1, "model.width": 32, "training.batch_size": 8}
    molgen_energy.train(
        "qm9_jodo_conformers_cpu",
        data=folder / "mine.h5",
        steps=1,
        changes=small,
        output=folder / "runs" / "conformers",
    )
    for name, extra in (
        ("mine", {}),
        ("energy", {}),
        ("gap", {"condition.name": "properties", "condition.properties": ["gap"]}),
    ):
        molgen_energy.train(
            "qm9_gdm_pairs",
            data=folder / "qm9.h5",
            steps=1,
            changes=small | extra,
            output=folder / "runs" / name,
        )
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these files, as the current folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, in this process."""
    threads = torch.get_num_threads()
    try:
        assert run_command(arguments, monkeypatch) == 0, arguments
    finally:
        torch.set_num_threads(threads)


def shortened(arguments: list[str]) -> list[str]:
    """The same command with few samples or steps, and small networks."""
    name, *words = arguments
    options = {"-n": "2", "--count": "8", "--epochs": "1", "--conformers": "1"}
    options["--steps"] = "2" if name == "sample" else "1"
    short = [options.get(before, word) for before, word in zip([name, *words], words, strict=False)]
    resumed = "--resume" in words
    if name == "train" and not resumed:
        shapes = any("shapes" in word for word in words)
        short += ["--steps", "1"] if "--epochs" not in words else []
        # Weights have the size of their network.
        small = [] if {"--from", "--teacher"} & set(words) else TINY[:4]
        short += small if shapes else [*small, *TINY[4:]]
        if "--from" in words and "--config" not in words:
            short += [
                "--set",
                "training.validation_draws=1",
                "--set",
                "training.validation_molecules=2",
            ]
    if name == "sample" and not resumed and "list" not in words:
        if "-n" not in words and not Path("spins.h5").exists():
            short += ["-n", "2"]
        if not {"--steps", "--levels"} & set(words) and not Path("shapes.h5").exists():
            short += ["--steps", "2"]
        if "--tune" in words:
            short += ["--steps", "3", "-n", "16"]
    if name == "evaluate" and not any("predicted" in word for word in words):
        short += ["--workers", "0", "--subset", "4"]
    if name == "preprocess" and words[0] == "qm9":
        short += ["--source", "original", "--split", "0.5,0.25,0.25"]
    if name == "preprocess" and words[0] == "ccd":
        short += ["--workers", "0", "--max-atoms", "9"]
    if name == "preprocess" and words[0] == "geom-drugs":
        short += ["--workers", "0"]
    if name == "preprocess" and words[0] in ("shapes", "spins") and "--count" not in words:
        short += ["--count", "8"]
    return [name, *short]


def outputs_of(words: list[str]) -> set[Path]:
    """Files and folders that a command writes."""
    named = ("-o", "--output", "--report", "--json", "--per-molecule")
    paths = {Path(word) for before, word in itertools.pairwise(words) if before in named}
    if words[0] == "sample" and not {"-o", "list"} & set(words):
        paths.add(Path("samples.sdf"))
    if words[0] == "preprocess" and "-o" not in words:
        paths |= {Path(word).with_suffix(".h5") for word in words if word.endswith(".smi")}
    return paths - {Path("-")}


def interrupt_sampling(output: str) -> None:
    """Leave a job that `--resume` can complete."""
    from molgen_energy.api.sample import sample_to
    from molgen_energy.systems.base import NoCallback

    class Stop(NoCallback):
        done = 0.0

        def advance(self, samples: int, share: float) -> None:
            if self.done >= 1:  # the first of two molecules
                raise KeyboardInterrupt
            self.done += samples * share

    Path(output).unlink(missing_ok=True)
    sample_to(output, 2, checkpoint="runs/mine", steps=2, batch_size=1, callback=Stop())
    assert Path(f"{output}.shards").is_dir()


@each_page_with(commands_of)
def test_every_printed_command_runs(page, here, monkeypatch, capsys):
    written: set[Path] = set()
    for line in commands_of(page):
        program, *words = shlex.split(line, comments=True)
        if program == "torchrun":
            words = words[words.index("molgen_energy") + 1 :]
            program = "molgen-energy"
        if program == "python":
            check_program(words, monkeypatch)
            continue
        if "--resume" in words and words[0] == "sample":
            interrupt_sampling(words[words.index("--resume") + 1])
        else:  # commands refuse to replace files: those of the page itself must not collide
            for path in outputs_of(words) - written:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        run(shortened(words), monkeypatch)
        written |= {path for path in outputs_of(words) if path.exists()}
        for before, word in itertools.pairwise(words):
            assert before not in ("-o", "--report", "--per-molecule") or Path(word).exists(), line
        capsys.readouterr()


class ParsedError(BaseException):
    """The arguments of a program were accepted."""


def check_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a program of the repository and stop when it has read its arguments."""
    if words[0] == "-m":  # pip install and pytest, which .ci/run executes as printed
        assert words[1] in ("pip", "pytest"), words
        return
    if words[0] == "scripts/tasks.py":
        assert set(words[1:]) <= set(runpy.run_path(str(ROOT / words[0]))["TASKS"])
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments, **options):
        parse(self, *arguments, **options)
        raise ParsedError

    path = ROOT / words[0]
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(path), *words[1:]])
        patch.syspath_prepend(path.parent)
        with pytest.raises(ParsedError):
            runpy.run_path(str(path), run_name="__main__")


@each_page_with(blocks_of)
def test_every_printed_block_of_python_runs(page, here, monkeypatch):
    """The blocks of a page in turn, with the variables that training loops have."""
    short(monkeypatch)
    positions = torch.randn(7, 3)
    shift = torch.zeros(3, requires_grad=True)  # the parameter of a model
    x, mask = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    names = {
        "__name__": "__main__",
        "batches": [(x, mask)],
        "x": x,
        "x_hat": x + 0.1,
        "mask": mask,
        "centred_noise": lambda x, mask: torch.randn_like(x),
        "alpha": torch.full((2, 1, 1), 0.8),
        "sigma": torch.full((2, 1, 1), 0.6),
        "t": torch.rand(2),
        "model": lambda *inputs: 0.9 * inputs[0] if len(inputs) > 1 else inputs[0].pos + shift,
        "loader": [SimpleNamespace(pos=positions, batch=torch.tensor([0, 0, 0, 1, 1, 1, 1]))],
        "optimizer": torch.optim.SGD([shift], lr=0.1),
        "right": torch.rand(2, 4, 4),
        "down": torch.rand(2, 4, 4),
        "logits": torch.randn(2, 16, 1),
        "spins": torch.ones(2, 16, 1),
    }
    for block in blocks_of(page):
        exec(compile(block, page.name, "exec", dont_inherit=True), names)
    if "loss" in names:
        assert torch.isfinite(names["loss"]).all()
    if "HuberConfig" in names:
        huber = names["HuberConfig"](delta=0.5).build()
        inside, outside = x + 0.1, x + 10  # every error below delta, every error above it
        half_squares = torch.full((2,), 0.5 * 0.1**2 * 3)
        torch.testing.assert_close(huber(inside, x, mask), half_squares)
        torch.testing.assert_close(huber(outside, x, mask), torch.full((2,), 0.5 * 9.75 * 3))
    if "Tiny" in names:
        columns = (here / "runs" / "tiny" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"positions_loss", "elements_loss", "bonds_loss"} <= set(columns)


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the functions of the package draw two samples, take one step and start no processes."""
    sample, train = molgen_energy.sample, molgen_energy.train
    evaluate = molgen_energy.evaluate

    def few_samples(count=None, output=None, **options):
        return sample(min(count, 2), output, **{"steps": 2} | options)

    def one_step(*arguments, epochs=None, steps=None, **options):
        return train(*arguments, steps=1, **options)

    def here_alone(*arguments, **options):
        return evaluate(*arguments, **options | {"workers": 0, "subset": 4})

    monkeypatch.setattr(molgen_energy, "sample", few_samples)
    monkeypatch.setattr(molgen_energy, "train", one_step)
    monkeypatch.setattr(molgen_energy, "evaluate", here_alone)
    for registry, name in ((MODELS, "tiny"), (DATASETS, "chains")):
        monkeypatch.setitem(registry, name, None)  # removed after the test


def test_extras_that_are_printed_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[project", project, re.DOTALL)
    extras = set(re.findall(r"^(\w+) = \[", section[1], re.MULTILINE))
    for page in PAGES:
        for named in re.findall(r"'(?:\.|molgen-energy)\[([\w,]+)\]'", page.read_text("utf-8")):
            assert set(named.split(",")) <= extras, page


def test_every_printed_configuration_is_shipped():
    text = (ROOT / "docs" / "how_to" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`\w+`[^|]*)\| (?:GDM|EDM|JODO|Transformer|Invariant|MLP|CNN|the same)",
        text,
        re.MULTILINE,
    )
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(config_names())


def test_the_check_runs_the_printed_set_up():
    """The README's second command is that of `.ci/run` and of `scripts/tasks.py setup`."""
    readme = PAGES[0].read_text(encoding="utf-8")
    lines = re.findall(r"^python -m pip install .*", readme, re.MULTILINE)
    assert len(lines) == 2
    assert lines[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install = runpy.run_path(str(ROOT / "scripts" / "tasks.py"))["INSTALL"]
    assert shlex.split(lines[1].split("&&")[0])[2:] == shlex.split(install)
