"""Small valid files of every format, which the package writes, to make mutants of."""

from __future__ import annotations

import contextlib
import gzip
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import torch
import yaml
from rdkit import Chem

from molgen_energy.api.sample import sample_to
from molgen_energy.api.train import train
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.chemistry.geometry import QM9_TYPES
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.data.splits import SPLITS
from molgen_energy.datasets.smiles import SmilesFiles
from molgen_energy.metrics.molecule_evaluation import hash_smiles
from molgen_energy.metrics.options import EvaluationOptions, with_bonds, with_types
from molgen_energy.metrics.reference import evaluate_reference
from molgen_energy.resources import asset
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.shapes.dataset import Polygons
from molgen_energy.systems.spins.dataset import SpinGlasses, draw_couplings
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.pretrained import CHECKED, write_checksums
from molgen_energy.workers import WorkerPool

TINY = {
    "model.layers": 1,
    "model.width": 8,
    "training.batch_size": 4,
    "training.steps": 2,
    "training.log_every": 1,
    "training.validate_every": 1,
    "training.checkpoint_every": 1,
}
"""A run of a fraction of a second."""


class Command(NamedTuple):
    """What a user types about a file."""

    arguments: tuple[str, ...]
    output: str | None = None
    """The file that it writes, which depends on its input alone."""
    statistics: str | None = None
    """The file of statistics of real molecules, instead of the one that ships."""

    def __str__(self) -> str:
        return " ".join(self.arguments)


def build(folder: Path) -> None:
    """Write all files, a folder for each format."""
    with MoleculeFile(asset("qm9_sample.h5")) as file:
        chosen = np.sort(np.concatenate([file.split_indices(split)[:6] for split in SPLITS]))
        molecules = perceive(file.read(chosen, ["smiles", "properties/gap", "properties/mu"]))
    molecules = replace(molecules, groups=np.arange(len(molecules)) // 2)
    with _inside(folder / "molecules"):
        _write_hdf5(Path("molecules.h5"), molecules, compress=False)
        _write_hdf5(Path("packed.h5"), molecules, compress=True)
    with _inside(folder / "shapes"):
        Polygons(vertices=5, count=24, split="0.5,0.25,0.25").make(Path("shapes.h5"))
        _train("shapes_energy", "shapes.h5")
        sample_to("predicted.h5", 4, checkpoint="run", device="cpu")
    with _inside(folder / "spins"):
        SpinGlasses(size=4, count=16, split="0.5,0.25,0.25", workers=0).make(Path("spins.h5"))
        _train("spins_cross_entropy", "spins.h5")
        sample_to("predicted.h5", checkpoint="run", device="cpu")
    with _inside(folder / "statistics"):
        _write_text(Path("molecules.sdf"), molecules)
        options = EvaluationOptions(frozenset({"rates", "geometry", "composition", "similarity"}))
        options = with_bonds(options, "given")  # as of the samples
        with WorkerPool(0) as workers:
            reference = evaluate_reference(
                folder / "molecules/molecules.h5", "some", with_types(options, QM9_TYPES),
                QM9_TYPES, None, workers,
            )  # fmt: skip
        reference.training, reference.probes = hash_smiles(["C", "O"]), ["[H]O[H]"]
        rates = {"given": {"strict": reference.evaluation.rates}}
        reference.save(Path("statistics.h5"), "some molecules of QM9", rates=rates)
    with _inside(folder / "run"):
        shutil.copy(folder / "molecules/molecules.h5", ".")
        _train("quick", "molecules.h5")
    with _inside(folder / "properties"):
        shutil.copy(folder / "molecules/molecules.h5", "properties.h5")
        _train("qm9_properties", "properties.h5")
    (folder / "config").mkdir()
    for system in ("shapes", "spins", "properties"):
        shutil.copy(folder / f"{system}/{system}.h5", folder / "config")
        _copy_config(folder / f"{system}/run", folder / f"config/{system}.yaml")
    shutil.copy(folder / "molecules/molecules.h5", folder / "config")
    _copy_config(folder / "run/run", folder / "config/molecules.yaml")
    with _inside(folder / "shards"):
        shutil.copytree(folder / "run/run", "run")
        _begin_shards()
    with _inside(folder / "weights"):
        _release(folder / "run/run", Path("weights"))
    with _inside(folder / "npz"):
        shutil.copytree(folder / "spins/run", "run")
        couplings = draw_couplings(range(4), 4, False, "uniform", 0)
        np.savez("couplings.npz", right=couplings.right, down=couplings.down)
        np.savez_compressed("packed.npz", right=couplings.right, down=couplings.down)
    for name in ("sdf", "xyz", "smiles", "gzip"):
        (folder / name).mkdir()
    few = molecules.select(np.arange(6))
    _write_text(folder / "sdf/v2000.sdf", few)
    blocks = [Chem.MolToV3KMolBlock(molecule) for molecule in to_rdkit(few)]
    fields = "> <gap>\n0.25\n\n$$$$\n"
    (folder / "sdf/v3000.sdf").write_text("".join(block + fields for block in blocks))
    _write_text(folder / "xyz/extended.xyz", few)
    lines = (folder / "xyz/extended.xyz").read_text().splitlines()
    plain = ["a molecule" if "Properties=" in line else line for line in lines]
    (folder / "xyz/plain.xyz").write_text("\n".join(plain) + "\n")
    names = [f"{text} m{k}" for k, text in enumerate(_SMILES)]
    (folder / "smiles/molecules.smi").write_text("\n".join(names) + "\n")
    rows = ["name,smiles,gap", *(f"m{k},{text},0.{k}" for k, text in enumerate(_SMILES))]
    (folder / "smiles/molecules.csv").write_text("\n".join(rows) + "\n")
    for source in ("sdf/v2000.sdf", "xyz/extended.xyz", "smiles/molecules.smi"):
        content = gzip.compress((folder / source).read_bytes(), mtime=0)
        (folder / "gzip" / f"{Path(source).name}.gz").write_bytes(content)
    for name, write in (
        ("pickle", _write_smol),
        ("torch", _write_torch),
        ("msgpack", _write_msgpack),
        ("npy", _write_npy),
    ):
        with _inside(folder / name):
            write(few)


def _write_smol(molecules: Molecules) -> None:
    """SemlaFlow's form of GEOM-Drugs: pickles inside a pickle."""
    items = [
        {
            "coords": torch.tensor(one.positions),
            "atomics": torch.tensor(one.atomic_numbers.astype(np.int64)),
            "charges": torch.zeros(len(one), dtype=torch.long),
            "bond_indices": torch.tensor(one.bond_index.astype(np.int64)),
            "bond_types": torch.tensor(one.bond_order.astype(np.int64)),
            "device": "cpu",
            "id": one.smiles,
        }
        for one in molecules
    ]
    content = pickle.dumps([pickle.dumps(item, protocol=4) for item in items])
    Path("train.smol").write_bytes(content)


def _write_torch(molecules: Molecules) -> None:
    """FlowMol's."""
    assert molecules.bonds is not None
    kinds = torch.tensor([(6, 1, 7, 8, 9).index(z) for z in molecules.atomic_numbers])

    def ends(offsets: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.stack([offsets[:-1], offsets[1:]], 1).astype(np.int32))

    arrays = {
        "smiles": molecules.smiles.tolist(),
        "positions": torch.tensor(molecules.positions),
        "atom_types": torch.nn.functional.one_hot(kinds, 10).bool(),
        "atom_charges": torch.zeros(len(kinds), dtype=torch.int32),
        "bond_types": torch.tensor(molecules.bonds.order.astype(np.int32)),
        "bond_idxs": torch.tensor(molecules.bonds.index.astype(np.int32)),
        "node_idx_array": ends(molecules.offsets),
        "edge_idx_array": ends(molecules.bonds.offsets),
    }
    torch.save(arrays, "train_data_processed.pt")


def _write_msgpack(molecules: Molecules) -> None:
    """GEOM's own."""
    entries = {
        one.smiles: {
            "conformers": [
                {
                    "totalenergy": -40.5,
                    "xyz": np.column_stack([one.atomic_numbers, one.positions]).tolist(),
                }
            ]
        }
        for one in molecules
    }
    Path("drugs_crude.msgpack").write_bytes(msgpack.packb(entries))


def _write_npy(molecules: Molecules) -> None:
    """EDM's."""
    columns = (molecules.molecule_index, molecules.atomic_numbers, molecules.positions)
    np.save("geom_drugs_30.npy", np.column_stack(columns).astype(np.float64))


_SMILES = ("C", "O", "CO", "C=O", "N#C")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Make a folder and work in it, as users do, so that files hold relative paths."""
    folder.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _write_hdf5(path: Path, molecules: Molecules, compress: bool) -> None:
    labels = np.repeat(np.arange(3, dtype=np.uint8), len(molecules) // 3)
    origin = {"seed": "0", "sampler": "ancestral"}
    with MoleculeWriter(path, source="some", compress=compress, provenance=origin) as writer:
        writer.append(molecules)
        writer.set_split(labels)


def _write_text(path: Path, molecules: Molecules) -> None:
    with MoleculeTextWriter(path, {"seed": "0"}) as writer:
        writer.append(molecules)


def _train(config: str, data: str) -> None:
    own = {"quick": {"process.steps": 4}, "qm9_properties": {"properties": ["gap", "mu"]}}
    changes = TINY | own.get(config, {"training.epochs": None})
    train(config, data=data, changes=changes, output="run", device="cpu")


def _copy_config(run: Path, path: Path) -> None:
    """The configuration of a run, with all keys and without its data."""
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    values["data"]["path"] = None
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


class _Stopped(Exception):
    """Ends a job before it is complete."""


class _StopAfter(NoCallback):
    """Stops sampling at its N-th network evaluation."""

    def __init__(self, evaluations: int) -> None:
        self._left = evaluations

    def advance(self, samples: int, share: float) -> None:
        self._left -= 1
        if not self._left:
            raise _Stopped


def _begin_shards() -> None:
    """Interrupted jobs: sampling of molecules, ground states, and conformers of SMILES."""
    with contextlib.suppress(_Stopped):
        sample_to(
            "samples.sdf", 8, checkpoint="run", batch_size=4, device="cpu", callback=_StopAfter(7)
        )

    def stop(done: int, total: int | None) -> None:
        if done:
            raise _Stopped

    with contextlib.suppress(_Stopped):
        SpinGlasses(size=3, count=52, workers=0).make(Path("spins.h5"), stop)
    Path("molecules.smi").write_text("\n".join(["C", "O", "N"] * 34) + "\n")
    with contextlib.suppress(_Stopped):
        SmilesFiles(files=("molecules.smi",), workers=0, relax="none").make(
            Path("molecules.h5"), stop
        )


def _release(run: Path, folder: Path) -> None:
    """The part of a run that `scripts/release_weights.py` releases."""
    source = load_checkpoint(run, weights=["ema"])
    folder.mkdir()
    for name in CHECKED:
        shutil.copy(source.path / name, folder)
    write_checksums(folder)
    (folder / "card.md").write_text("---\nsummary: some weights\n---\n", encoding="utf-8")
