"""Runs, weights and shards of somebody else, or damaged ones: one line and exit code 2."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import rewrite_weights, tiny, weights
from safetensors.numpy import load, save

from molgen_energy.api.sample import sample_to
from molgen_energy.api.train import train
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.shards import ShardFolder, shards_folder
from molgen_energy.datasets.ccd_shards import ComponentManifest
from molgen_energy.datasets.smiles_shards import SmilesManifest
from molgen_energy.errors import InputError
from molgen_energy.formats import limits
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.molecules import sampling
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.shards import MoleculeShards
from molgen_energy.systems.registry import load_config
from molgen_energy.systems.spins import dataset as spins
from molgen_energy.systems.spins.dataset import draw_couplings
from molgen_energy.systems.spins.shards import SpinManifest
from molgen_energy.training.checkpoint import load_checkpoint, save_checkpoint
from molgen_energy.training.pretrained import SUMS, pretrained_weights

CPU = torch.device("cpu")
HUGE = "x" * 100_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps, with springs that are learnt."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"training.steps": 2, "process.steps": 4, "loss.springs.family": "auto"}
    train(tiny().replaced(changes), output=folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def last(run: Path) -> Path:
    return run / "checkpoints" / "last"


def change(path: Path, key: str, value: Any) -> None:
    """Set the value of a dotted key in a YAML file; `KeyError` removes the key."""
    values = yaml.safe_load(path.read_text())
    *sections, name = key.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    if value is KeyError:
        del inner[name]
    else:
        inner[name] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def refused(folder: Path, *keys: str) -> None:
    """Neither sampling nor resuming takes a run; the line names what is wrong."""
    for command in (
        lambda: sample_to(folder / "out.sdf", 1, checkpoint=folder, device="cpu"),
        lambda: train(resume=folder, steps=3, device="cpu"),
    ):
        with pytest.raises(InputError) as caught:
            command()
        text = str(caught.value)
        assert len(text) < 800 and "\n" not in text, text
        assert all(key in text for key in keys), text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("progress", None), ("progress", []), ("progress", KeyError), ("progress", "text"),
        ("progress.step", None), ("progress.step", "3"), ("progress.step", -1),
        ("progress.step", True), ("progress.step", 2**60), ("progress.step", [3]),
        ("progress.sums", None), ("progress.sums", ["a"]), ("progress.sums", [None]),
        ("progress.sums", [0.0] * 2000), ("progress.seconds", -1.0),
        ("progress.seconds", float("nan")), ("progress.skipped", 7), ("progress.count", 9),
        ("progress.skipped_in_row", 1), ("progress.best_valid", "low"), ("progress.more", 1),
        ("data", []), ("data.training_samples", -1), ("data.fingerprint", {}),
        ("data.source", HUGE), ("versions", ["1"]), ("epoch", None), ("format", None),
        ("format", "3"), ("format", 3.0), ("format", True), ("sha256", []), ("sha256.ema", "0"),
    ],
)  # fmt: skip
def test_a_damaged_state(run, key, value):
    change(last(run) / "state.yaml", key, value)
    refused(run, "state.yaml", key.split(".")[-1])


ONE_PROPERTY = {"names": ["a"], "units": [""], "mean": [0.0], "std": [1.0], "values": [[1.0]]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("elements", None), ("elements", []), ("elements", "H"), ("elements", ["Xx"]),
        ("elements", ["H", "H"]), ("elements", ["C", "H"]), ("elements", [1, 6]),
        ("elements", [HUGE]), ("elements", KeyError), ("size_histogram", {}),
        ("size_histogram", {5: 0}), ("size_histogram", {5: -1}), ("size_histogram", {0: 1}),
        ("size_histogram", {"a": 1}), ("size_histogram", {5: 1.5}), ("size_histogram", [5]),
        ("size_histogram", {10**7: 1}), ("statistics.charges", [1]),
        ("statistics.charges", [1, -1]), ("statistics.charges", [-(10**9), 10**9]),
        ("statistics.aromatic", 0), ("statistics", []), ("condition", {}),
        ("sampling", {"steps": 0}), ("sampling", {"spacing": 3}), ("more", 1),
        (
            "condition",
            {"names": ["a"], "units": ["eV"], "mean": [0.0], "std": [0.0], "values": [[1.0]]},
        ),
        (
            "condition",
            {"names": ["a"], "units": ["eV"], "mean": [0.0], "std": [1.0], "values": [[1.0, 2.0]]},
        ),
        ("condition", ONE_PROPERTY | {"lowest": [0.0]}),
        ("condition", ONE_PROPERTY | {"lowest": [1.0], "highest": [1.0]}),
        ("condition", ONE_PROPERTY | {"lowest": [0.0], "highest": [1.0, 2.0]}),
        ("condition", ONE_PROPERTY | {"atoms": [3, 4]}),
        ("condition", ONE_PROPERTY | {"atoms": [0]}),
    ],
)  # fmt: skip
def test_a_damaged_state_of_molecules(run, key, value):
    change(last(run) / "state.yaml", key, value)
    with pytest.raises(InputError, match=r"state\.yaml: ") as caught:
        MoleculeGenerator(load_checkpoint(run), CPU)
    text = str(caught.value)
    assert key.split(".")[0] in text and len(text) < 500 and "\n" not in text


def test_sizes_beyond_the_memory(run, monkeypatch):
    """They are refused before a table of them is made."""
    monkeypatch.setattr(limits, "available_memory", lambda: 10**9)
    change(last(run) / "state.yaml", "size_histogram", {900_000: 1})
    with pytest.raises(InputError, match=r"a molecule of 900,000 atoms takes 25\.9 TB"):
        MoleculeGenerator(load_checkpoint(run), CPU)
    with pytest.raises(InputError, match="a molecule of 1,000,000,000 atoms takes"):
        MoleculeGenerator(load_checkpoint(run), CPU, sizes=(1, 10**9))


@pytest.mark.parametrize(
    ("system", "key", "value"),
    [
        ("shapes", "vertices", 2), ("shapes", "vertices", 10**9), ("shapes", "vertices", "5"),
        ("shapes", "radii", None), ("shapes", "radii", [1.0]), ("shapes", "radii", [2.0, 1.0]),
        ("shapes", "radii", [0.0, 1.0]), ("spins", "boundary", "closed"),
        ("spins", "boundary", ["open"]), ("spins", "boundary", KeyError), ("spins", "size", 4),
    ],
)  # fmt: skip
def test_a_damaged_state_of_other_systems(tmp_path, system, key, value):
    own = {"shapes": {"vertices": 5, "radii": [0.5, 2.0]}, "spins": {"boundary": "open"}}
    name = {"shapes": "shapes_energy", "spins": "spins_margin"}[system]
    state = {"progress": {"step": 1}} | own[system]
    ema = {"ema": {"x": torch.zeros(1)}}
    save_checkpoint(tmp_path / "a", load_config(name), state, ema)
    change(tmp_path / "a" / "state.yaml", key, value)
    with pytest.raises(InputError, match=rf"state\.yaml: .*{key}"):
        sample_to(tmp_path / "out.h5", checkpoint=tmp_path / "a", device="cpu")


BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10)
)


@pytest.mark.parametrize("name", ["state.yaml", "config.yaml"])
@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "text", BOMB, "[" * 100_000, "format: " + "9" * 100_000, "format: 3\nformat: 3",
        "name: &a 1\nsystem: *a", "format: !!python/name:os.system", "format: \x00",
        "é".encode("latin-1"), HUGE * 30,
    ],
    ids=lambda text: text[:20] if isinstance(text, str) else "latin-1",
)  # fmt: skip
def test_a_document_that_is_no_part_of_a_run(run, name, text):
    content = text if isinstance(text, bytes) else text.encode()
    (last(run) / name).write_bytes(content)
    refused(run)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers", 10**11, "model.layers: "),
        ("model.width", 10**7, "parameters takes"),
        ("model.width", 10**15, "parameters takes"),
        ("model.width", 2**63 - 1, "parameters takes"),
        ("process.steps", 2**31, "process.steps: "),
        ("training.lr", True, "training.lr: "),
        ("training.seed", "0", "training.seed: "),
        ("system", [HUGE], "unknown system"),
        ("loss.name", HUGE, "unknown loss"),
        (HUGE, 1, "unknown config key"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_configuration(run, key, value, message):
    change(last(run) / "config.yaml", key, value)
    refused(run, message)


# Weights


def as_int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed.weight"] = tensors["embed.weight"].to(torch.int8)


def as_float64(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed.weight"] = tensors["embed.weight"].double()


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed.weight"][0, 0] = torch.nan


def without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["embed.weight"]


def with_another(tensors: dict[str, torch.Tensor]) -> None:
    tensors["more"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (as_int8, "tensor 'embed.weight': expected float32, found int8"),
        (as_float64, "tensor 'embed.weight': expected float32, found float64"),
        (with_nan, "tensor 'embed.weight' holds NaN or infinity"),
        (without, "'embed.weight' is no such tensor in the file"),
        (with_another, "'more' is (3,) in the file and no such tensor"),
    ],
)
def test_weights_of_another_kind(run, spoil, message):
    for name in ("ema", "model"):
        rewrite_weights(last(run), name, spoil)
    refused(run, message)


def test_flipped_bits_are_found(run):
    for name in ("ema", "model"):
        path = last(run) / f"{name}.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
    refused(run, "safetensors is damaged: its SHA-256 is not the one that was written with it")


def test_checkpoints_of_earlier_versions_have_no_checksums(run, tmp_path):
    before = weights(run, "ema")
    change(last(run) / "state.yaml", "sha256", KeyError)
    assert torch.equal(weights(run, "ema")["embed.weight"], before["embed.weight"])
    sample_to(tmp_path / "a.sdf", 1, checkpoint=run, device="cpu")
    assert train(resume=run, steps=3, device="cpu").steps == 3
    state = load_checkpoint(run).state
    assert state["sha256"].keys() == {"model", "ema", "optimizer", "springs"}
    for name, digest in state["sha256"].items():
        content = (last(run) / f"{name}.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest


OPTIMIZER: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "expected float32, found float64": lambda t: t.update(
        {"embed.weight/exp_avg": t["embed.weight/exp_avg"].double()}
    ),
    "'embed.weight/exp_avg' is (3, 2) in the file": lambda t: t.update(
        {"embed.weight/exp_avg": torch.zeros(3, 2)}
    ),
    "'embed.weight/exp_avg' is no such tensor in the file": lambda t: t.pop("embed.weight/exp_avg"),
    "'embed.weight/momentum' is ": lambda t: t.update({"embed.weight/momentum": torch.zeros(2)}),
    "'other/step' is () in the file": lambda t: t.update({"other/step": torch.tensor(1.0)}),
    "'embed.weight/step': expected float32, found int64": lambda t: t.update(
        {"embed.weight/step": torch.tensor(2)}
    ),
    "tensor 'embed.weight/exp_avg_sq' is negative": lambda t: t["embed.weight/exp_avg_sq"].fill_(
        -1
    ),
    "tensor 'embed.weight/exp_avg' holds NaN": lambda t: t["embed.weight/exp_avg"].fill_(torch.nan),
    "'clipper/norms' is no such tensor in the file": lambda t: t.pop("clipper/norms"),
    "'clipper/norms': expected float64, found float32": lambda t: t.update(
        {"clipper/norms": torch.ones(3)}
    ),
    "'clipper/norms' is () in the file": lambda t: t.update(
        {"clipper/norms": torch.tensor(1.0, dtype=torch.float64)}
    ),
    "tensor 'clipper/norms' is negative": lambda t: t["clipper/norms"].fill_(-1),
}


@pytest.mark.parametrize("message", OPTIMIZER)
def test_a_damaged_optimizer(run, message):
    rewrite_weights(last(run), "optimizer", OPTIMIZER[message])
    with pytest.raises(InputError) as caught:
        train(resume=run, steps=3, device="cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "spoil"),
    [
        ("'steps': expected int64, found float64", lambda t: t.update(steps=t["steps"].double())),
        ("'pairs' is (3,) in the file", lambda t: t.update(pairs=torch.zeros(3).double())),
        ("tensor 'squares' is negative", lambda t: t["squares"].fill_(-1)),
        ("'pairs' is no such tensor", lambda t: t.pop("pairs")),
    ],
)
def test_damaged_springs(run, message, spoil):
    rewrite_weights(last(run), "springs", spoil)
    with pytest.raises(InputError) as caught:
        train(resume=run, steps=3, device="cpu")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks config.yaml, ema.safetensors, state.yaml"),
        (b"nonsense\n", "is damaged"),
        (b"\xff", "is damaged"),
        (None, "lacks ema.safetensors"),
        (b"0" * 10**6, "has 1,000,000 bytes; expected at most"),
    ],
)
def test_incomplete_checksums_of_pretrained_weights(tmp_path, content, message):
    folder = tmp_path / "weights"
    shutil.copytree(next(iter(pretrained_weights().values())).path, folder)
    listed = folder / SUMS
    if content is None:
        lines = [line for line in listed.read_text().splitlines(True) if "ema" not in line]
        content = "".join(lines).encode()
    listed.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder)
    assert message in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="needs files with holes")
@pytest.mark.parametrize("name", ["ema.safetensors", "other"])
def test_checksums_of_files_beyond_the_memory(tmp_path, name):
    """Files that sampling does not read are not read for their sums either."""
    folder = tmp_path / "weights"
    shutil.copytree(next(iter(pretrained_weights().values())).path, folder)
    with (folder / SUMS).open("a") as listed:
        listed.write(f"{'0' * 64}  {name}\n")
    with (folder / name).open("ab") as file:
        file.truncate(1 << 43)
    if name == "other":
        load_checkpoint(folder)
    else:
        with pytest.raises(InputError, match=r"ema\.safetensors takes 8\.8 TB"):
            load_checkpoint(folder)


def test_pretrained_weights_without_checksums(tmp_path, monkeypatch):
    """A copy elsewhere is a checkpoint like others; among those that ship it is not complete."""
    folder = tmp_path / "weights" / "mine"
    shutil.copytree(next(iter(pretrained_weights().values())).path, folder)
    (folder / SUMS).unlink()
    assert load_checkpoint(folder).state["format"] == 3
    monkeypatch.setattr(
        "molgen_energy.training.pretrained.weights_directory", lambda: folder.parent
    )
    with pytest.raises(InputError, match="SHA256SUMS"):
        load_checkpoint(folder)


# Parts that are no files


@pytest.mark.skipif(os.name != "posix", reason="needs links and pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "nowhere", "circle", "folder"])
@pytest.mark.parametrize("name", ["state.yaml", "config.yaml", "ema.safetensors"])
def test_a_part_that_is_no_file(run, tmp_path, name, kind):
    path = last(run) / name
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": "absent", "circle": path}[kind])
    refused(run)


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_weights_of_a_cache_in_which_each_part_is_a_link(run, tmp_path):
    """Downloads of Hugging Face's hub are links to files in a folder `blobs`."""
    blobs, shipped = tmp_path / "blobs", next(iter(pretrained_weights().values())).path
    blobs.mkdir()
    for source in (last(run), shipped):
        snapshot = tmp_path / "snapshots" / source.name
        snapshot.mkdir(parents=True)
        for path in source.iterdir():
            shutil.copy(path, blobs / f"{source.name}-{path.name}")
            (snapshot / path.name).symlink_to(f"../../blobs/{source.name}-{path.name}")
        linked, own = (load_checkpoint(place, weights=["ema"]) for place in (snapshot, source))
        assert linked.raw_config.values == own.raw_config.values
        for name, tensor in own.read_tensors("ema").items():
            assert torch.equal(linked.read_tensors("ema")[name], tensor)
    sample_to(tmp_path / "out.sdf", 1, checkpoint=tmp_path / "snapshots/last", device="cpu")


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_a_command_says_it_in_one_line(cli_here, run):
    (last(run) / "state.yaml").unlink()
    os.mkfifo(last(run) / "state.yaml")
    for arguments in (("sample", "-n", "1", "--checkpoint", run), ("train", "--resume", run)):
        stderr = cli_here(*arguments, code=2).stderr
        assert stderr.startswith("error: ") and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,skipped\nthree,0\n", "row 1 has no step"),
        (b"step,skipped\n-1,0\n", "row 1 has no step"),
        (b"step,skipped\n" + b"9" * 5000 + b",0\n", "row 1 has no step"),
        (b"step,skipped\n\xff,0\n", "is no table"),
        (b'step,skipped\n"' + b"1" * 200_000 + b'",0\n', "is no table"),
        (b"step,skipped\n" + b"1," * 600_000, "a line of more than 1,048,576 characters"),
    ],
)
def test_damaged_metrics(run, content, message):
    before = (last(run) / "state.yaml").read_bytes()
    (run / "metrics.csv").write_bytes(content)
    with pytest.raises(InputError) as caught:
        train(resume=run, steps=3, device="cpu")
    assert message in str(caught.value) and "move it away" in str(caught.value)
    assert (run / "metrics.csv").read_bytes() == content
    assert (last(run) / "state.yaml").read_bytes() == before


# Shards


@pytest.mark.parametrize("name", [".", "/"])
def test_shards_of_a_folder(name):
    with pytest.raises(InputError, match="is a folder; name a file"):
        ShardFolder(Path(name), "`sample`", SpinManifest, lead=False)


def draw(generator: MoleculeGenerator, output: Path, only: int | None = None) -> None:
    """Draw the first shards of a job of twelve molecules, or all and write the file."""
    job = sampling._job(generator, 12, 4)
    with MoleculeShards.create(output, job) as shards:
        work = sampling._SamplingRun(generator, shards, output, NoCallback())
        if only is None:
            work.draw_and_write()
        else:
            for shard in list(work.in_turn())[:only]:
                work._draw(shard)


@pytest.fixture(scope="module")
def begun(trained, tmp_path_factory) -> Path:
    """A job with two of three shards, and the file of a whole one."""
    folder = tmp_path_factory.mktemp("begun")
    generator = MoleculeGenerator(load_checkpoint(trained), CPU)
    draw(generator, folder / "whole.sdf")
    draw(generator, folder / "a.sdf", only=2)
    return folder


@pytest.fixture
def output(begun, tmp_path) -> Path:
    """The output of a copy of that job."""
    shutil.copytree(begun / "a.sdf.shards", tmp_path / "a.sdf.shards")
    return tmp_path / "a.sdf"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", None), ("count", 0), ("count", "12"), ("count", 2**40), ("seed", -1),
        ("seed", True), ("steps", 0), ("steps", 2**31), ("sampler", ["ddim"]), ("sampler", "ode"),
        ("n_atoms", [1]), ("n_atoms", [9, 3]), ("n_atoms", [1, 10**12]), ("n_atoms", "9-18"),
        ("condition", []), ("condition", {"gap": "low"}), ("where", {"gap": [0.2]}),
        ("where", {"gap": [0.3, 0.2]}), ("guidance", None), ("guidance", []),
        ("batch_size", 0), ("batch_size", 2**40),
        ("window", 0), ("window", 2**40), ("pairs", -1), ("weights", {}), ("checkpoint", ""),
        ("checkpoint", None), ("temperature", None), ("temperature", -1.0), ("more", 1),
        ("temperature_range", 3), ("temperature_range", [1.0, 0.5]), ("version", HUGE),
        ("units", []), ("format", None), ("format", "2"), ("format", 9), ("command", None),
        ("command", HUGE), ("count", KeyError), ("low_precision", 0),
    ],
)  # fmt: skip
def test_a_damaged_manifest(output, key, value):
    change(shards_folder(output) / "manifest.yaml", key, value)
    with pytest.raises(InputError) as caught:
        sample_to(resume=output, device="cpu")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert not output.exists()


def resealed(folder: Path, path: Path, spoil: Callable[[dict[str, Any]], Any]) -> None:
    """Change the arrays of a shard, with a checksum as of the program that wrote it."""
    arrays = {name: array.copy() for name, array in load(path.read_bytes()[32:]).items()}
    spoil(arrays)
    payload = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    salt = hashlib.sha256((folder / "manifest.yaml").read_bytes()).digest()
    path.write_bytes(hashlib.sha256(salt + payload).digest() + payload)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.pop("offsets"),
        lambda a: a.update(positions=a["positions"][:-1]),
        lambda a: a.update(positions=a["positions"].astype("f8")),
        lambda a: a.update(positions=a["positions"].reshape(-1)),
        lambda a: a.update(atomic_numbers=a["atomic_numbers"].astype("i1")),
        lambda a: a["atomic_numbers"].fill(0),
        lambda a: a["atomic_numbers"].fill(119),
        lambda a: a["offsets"].fill(0),
        lambda a: a.update(offsets=a["offsets"][::-1]),
        lambda a: a.update(offsets=a["offsets"] * 2),
        lambda a: a.update(offsets=np.append(a["offsets"], a["offsets"][-1])),
        lambda a: a.update(numbers=a["numbers"] + 1),
        lambda a: a.update(more=np.zeros(3)),
        lambda a: a.update({"bonds/index": np.zeros((1, 2), "u4")}),
    ],
)
def test_a_foreign_shard_is_drawn_again(begun, output, spoil):
    folder = shards_folder(output)
    resealed(folder, sorted(folder.glob("*.shard"))[0], spoil)
    sample_to(resume=output, device="cpu")
    assert output.read_bytes() == (begun / "whole.sdf").read_bytes()


def test_bonds_of_a_shard_stay_in_their_molecule(molecules):
    """Those of the bundled molecules do; one that is moved does not."""
    molecules = perceive(molecules.select(np.arange(20)))
    molecules.check()
    bonds = molecules.bonds
    assert bonds is not None
    sizes = np.repeat(molecules.sizes, np.diff(bonds.offsets))
    for place in (0, len(bonds.index) - 1):
        before = bonds.index[place].copy()
        bonds.index[place, 1] = sizes[place]
        with pytest.raises(InputError, match="'bonds/index': expected atoms of the molecule"):
            molecules.check()
        bonds.index[place] = before
    molecules.check()


def test_a_job_of_many_molecules_is_resumed_at_once(trained, tmp_path, monkeypatch):
    """Only the windows that were begun are looked at."""
    generator = MoleculeGenerator(load_checkpoint(trained), CPU)
    job = sampling._job(generator, 10**9, None)
    asked = []
    sizes = MoleculeGenerator.sizes
    monkeypatch.setattr(
        MoleculeGenerator, "sizes", lambda self, n: (asked.append(len(n)), sizes(self, n))[1]
    )
    with MoleculeShards.create(tmp_path / "a.sdf", job) as shards:
        work = sampling._SamplingRun(generator, shards, tmp_path / "a.sdf", NoCallback())
        assert work.finished() == 0 and not asked
        (shards.folder / "000977-00000.shard").touch()
        assert work.finished() > 0 and asked == [1024]


def test_manifests_of_other_commands(tmp_path):
    solved = SpinManifest(
        couplings="uniform", size=4, count=3, boundary="open", seed=0, version="1", format=2
    )
    smiles = SmilesManifest(seed=0, conformers=1, relax="none", rdkit="1", version="1", format=2)
    relaxed = ComponentManifest(relax="mmff94", rdkit="1", version="1", format=2)
    bad = {
        "preprocess ccd": (relaxed, {"relax": None, "rdkit": 3, "seed": 0}),
        "preprocess spins": (solved, {"size": 1, "boundary": "closed", "count": "3", "seed": None}),
        "preprocess smiles": (smiles, {"conformers": 0, "relax": 3, "rdkit": KeyError, "x": 1}),
    }
    for command, (manifest, changes) in bad.items():
        for key, value in changes.items():
            output = tmp_path / f"{command}-{key}.h5"
            ShardFolder.begin(output, manifest)
            with ShardFolder(output, command, type(manifest), lead=False) as shards:
                assert shards.manifest == manifest
            change(shards_folder(output) / "manifest.yaml", key, value)
            with pytest.raises(InputError, match=rf"manifest\.yaml: .*'{key}'"):
                ShardFolder(output, command, type(manifest), lead=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.pop("energy"),
        lambda a: a["energy"].fill(0),
        lambda a: a["spins"].fill(0),
        lambda a: a["right"].fill(np.nan),
        lambda a: a.update(spins=a["spins"].astype("i8")),
        lambda a: a.update({name: array[:2] for name, array in a.items()}),
        lambda a: a.update({name: array.T for name, array in a.items() if array.ndim == 3}),
    ],
)
def test_a_foreign_chunk_of_lattices_is_solved_again(tmp_path, spoil):
    lattices = draw_couplings(range(3), 4, False, "uniform", 0)
    arrays = {
        "right": lattices.right, "down": lattices.down,
        "spins": np.ones((3, 4, 4), np.int8), "energy": lattices.energies(np.ones((3, 4, 4))),
    }  # fmt: skip
    output = tmp_path / "a.h5"
    ShardFolder.begin(
        output,
        SpinManifest(
            couplings="uniform", size=4, count=3, boundary="open", seed=0, version="1", format=2
        ),
    )
    with ShardFolder(output, "preprocess spins", SpinManifest, lead=True) as shards:
        shards.store(spins._shard(0), {k: np.ascontiguousarray(v) for k, v in arrays.items()})
        found = spins._solved(shards, 0, range(3), 4)
        assert found is not None and np.array_equal(found["right"], lattices.right)
        resealed(shards.folder, shards.folder / spins._shard(0), spoil)
        assert spins._solved(shards, 0, range(3), 4) is None


SPOILT_CONFORMERS: tuple[Callable[[dict[str, Any]], Any], ...] = (
    lambda a: a.update(failures=np.frombuffer(b"[[9, 1]]", "u1")),
    lambda a: a.update(failures=np.frombuffer(b'[[7, "why"]]', "u1")),
    lambda a: a.update(failures=np.frombuffer(b"[" * 9000, "u1")),
    lambda a: a.update(failures=np.frombuffer(b"\xff", "u1")),
    lambda a: a.update(which=a["which"] + 7),
    lambda a: a.update(which=a["which"][:0]) or a.pop("lost"),
    lambda a: a.pop("positions"),
    lambda a: a["offsets"].fill(1),
)


def test_a_foreign_shard_of_conformers_is_made_again(cli_here, tmp_path):
    """The file is that of a command without interruption."""
    (tmp_path / "a.smi").write_text("CO\nCC\n")
    command = ("preprocess", "smiles", "a.smi", "--workers", "0", "--relax", "none")
    cli_here(*command, "-o", "whole.h5")
    begun, folder = begun_conformers(tmp_path), tmp_path / "a.h5.shards"
    for spoil in SPOILT_CONFORMERS:
        shutil.copytree(begun, folder)
        resealed(folder, next(folder.glob("*.shard")), spoil)
        cli_here(*command, "-o", "a.h5")
        assert not folder.exists()
        assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
        (tmp_path / "a.h5").unlink()


def begun_conformers(folder: Path) -> Path:
    """The shards of the conformers of `a.smi`, as of an interrupted command."""
    from molgen_energy.datasets.log import DatasetLog
    from molgen_energy.datasets.smiles import SmilesFiles

    dataset = SmilesFiles(files=(folder / "a.smi",), workers=0, relax="none")
    list(dataset.chunks(DatasetLog(output=folder / "b.h5")))
    return folder / "b.h5.shards"
