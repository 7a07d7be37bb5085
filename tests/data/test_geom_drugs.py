"""GEOM-Drugs in each form in which it is passed on, written here with its true structure."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem

from molgen_energy import preprocess
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules
from molgen_energy.datasets.geom.layout import Entry
from molgen_energy.datasets.geom.processing import (
    EntryChunk,
    Rules,
    process_entries,
    processing_failed,
)
from molgen_energy.datasets.geom.rdkit_pickles import decode_pickled
from molgen_energy.datasets.geom.recognition import LAYOUTS, recognise
from molgen_energy.errors import InputError
from molgen_energy.workers import WorkerPool

msgpack = pytest.importorskip("msgpack")

CODES = {
    Chem.BondType.SINGLE: 1,
    Chem.BondType.DOUBLE: 2,
    Chem.BondType.TRIPLE: 3,
    Chem.BondType.AROMATIC: 4,
}
DRUGS = ("C[C@H](O)C#N", "c1ccncc1Cl", "[NH3+]CC(=O)[O-]", "C[C@@H](O)C#N", "CS(=O)(=O)NBr")
"""The mirror images are the one molecule that is in two splits of `split_of`."""


class Source(NamedTuple):
    """A molecule that is written, with its energies in hartree."""

    smiles: str
    conformers: list[Chem.Mol]
    energies: list[float]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    """Molecules of the bundled sample and drug-like ones, with 1 to 4 conformers."""
    from molgen_energy.resources import asset

    with MoleculeFile(asset("qm9_sample.h5")) as file:
        bundled = to_rdkit(perceive(file.read(np.arange(0, 300, 50))))
    drugs = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in DRUGS]
    for drug in drugs:
        AllChem.EmbedMolecule(drug, randomSeed=1)
    rng = np.random.default_rng(0)
    found = []
    for k, molecule in enumerate([*bundled, *drugs]):
        Chem.SanitizeMol(molecule)
        conformers = []
        for _ in range(1 + k % 4):
            copy = Chem.Mol(molecule)
            places = copy.GetConformer().GetPositions()
            moved = (places + rng.normal(scale=0.02, size=places.shape)).astype("f4")
            copy.GetConformer().SetPositions(moved.astype("f8"))
            conformers.append(copy)
        energies = rng.normal(-40, 1, len(conformers)).tolist()
        found.append(Source(Chem.MolToSmiles(Chem.RemoveHs(molecule)), conformers, energies))
    return found


def split_of(sources: list[Source]) -> dict[str, list[Source]]:
    return {"train": sources[:-4], "val": sources[-4:-2], "test": sources[-2:]}


def elements(molecule: Chem.Mol) -> list[int]:
    return [atom.GetAtomicNum() for atom in molecule.GetAtoms()]


def charges(molecule: Chem.Mol) -> list[int]:
    return [atom.GetFormalCharge() for atom in molecule.GetAtoms()]


def bonds(molecule: Chem.Mol) -> list[tuple[int, int, int]]:
    return [
        (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), CODES[b.GetBondType()])
        for b in molecule.GetBonds()
    ]


def places(molecule: Chem.Mol) -> np.ndarray:
    return molecule.GetConformer().GetPositions()


def write_crude(folder: Path, sources: list[Source]) -> Path:
    path = folder / "drugs_crude.msgpack"
    with path.open("wb") as file:
        for some in (sources[:5], sources[5:]):
            file.write(msgpack.packb({
                source.smiles: {
                    "totalconfs": 9,
                    "conformers": [
                        {"totalenergy": energy, "boltzmannweight": 0.1,
                         "xyz": np.column_stack([elements(m), places(m)]).tolist()}
                        for m, energy in zip(source.conformers, source.energies, strict=True)
                    ],
                }
                for source in some
            }))  # fmt: skip
    return folder


def write_edm(folder: Path, sources: list[Source]) -> Path:
    rows, sizes = [], []
    for source in sources:
        for k in np.argsort(source.energies):
            molecule = source.conformers[k]
            number = np.full(molecule.GetNumAtoms(), len(sizes))
            rows.append(np.column_stack([number, elements(molecule), places(molecule)]))
            sizes.append(molecule.GetNumAtoms())
    np.save(folder / "geom_drugs_30.npy", np.concatenate(rows))
    np.save(folder / "geom_drugs_n_30.npy", np.array(sizes))
    order = np.random.default_rng(1).permutation(len(sizes)).astype(np.int32)
    np.save(folder / "geom_permutation.npy", order)
    (folder / "geom_drugs_smiles.txt").write_text("\n".join(s.smiles for s in sources))
    return folder


def write_rdkit_folder(folder: Path, sources: list[Source]) -> Path:
    (folder / "rdkit_folder/drugs").mkdir(parents=True)
    summary: dict[str, Any] = {"CCCC": {"totalconfs": 3}, "CCC": {"uniqueconfs": 2}}
    for k, source in enumerate(sources):
        name = f"drugs/{k}.pickle"
        summary[source.smiles] = {"uniqueconfs": len(source.conformers), "pickle_path": name}
        content = {
            "smiles": source.smiles,
            "charge": 0,
            "temperature": np.float64(298.15),
            "conformers": [
                {"geom_id": j, "totalenergy": energy, "boltzmannweight": 0.5, "rd_mol": molecule,
                 "conformerweights": [0.1, 0.4], "degeneracy": 1}
                for j, (molecule, energy) in enumerate(
                    zip(source.conformers, source.energies, strict=True)
                )
            ],
        }  # fmt: skip
        (folder / "rdkit_folder" / name).write_bytes(pickle.dumps(content, 2 + k % 4))
    (folder / "rdkit_folder/summary_drugs.json").write_text(json.dumps(summary))
    return folder


def write_midi(folder: Path, sources: list[Source], protocol: int = 4) -> Path:
    for name, some in split_of(sources).items():
        items = [(source.smiles, source.conformers) for source in some]
        (folder / f"{name}_data.pickle").write_bytes(pickle.dumps(items, protocol))
    return folder


@pytest.fixture(scope="module")
def geometric() -> Iterator[type]:
    """`Data` of PyTorch Geometric, with the names and the state that pickles of it have."""
    names = ("torch_geometric", "torch_geometric.data", "torch_geometric.data.data",
             "torch_geometric.data.storage")  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    data, storage = modules[names[2]], modules[names[3]]
    code = "class GlobalStorage: pass"
    exec(code, storage.__dict__)
    exec("class DataEdgeAttr: pass\nclass DataTensorAttr: pass\nclass Data: pass", data.__dict__)

    def create(**attributes: Any) -> Any:
        made, store = data.Data(), storage.GlobalStorage()
        store.__dict__ |= {"_mapping": attributes, "_parent": made}
        made.__dict__ |= {"_edge_attr_cls": data.DataEdgeAttr,
                          "_tensor_attr_cls": data.DataTensorAttr, "_store": store}  # fmt: skip
        return made

    sys.modules |= modules
    yield create
    for name in names:
        del sys.modules[name]


def write_jodo(folder: Path, sources: list[Source], create: Callable[..., Any]) -> Path:
    types = {z: k for k, z in enumerate((1, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 33, 35, 53))}
    items = []
    for source in sources:
        molecule = source.conformers[int(np.argmin(source.energies))]
        both = sorted(chain.from_iterable(((i, j, k), (j, i, k)) for i, j, k in bonds(molecule)))
        table = torch.tensor(both, dtype=torch.long)
        items.append(create(
            atom_type=torch.tensor([types[z] for z in elements(molecule)]),
            pos=torch.tensor(places(molecule), dtype=torch.float),
            fc=torch.tensor(charges(molecule)),
            edge_index=table[:, :2].T.contiguous(),
            edge_type=table[:, 2].contiguous(),
            num_atom=molecule.GetNumAtoms(),
            rdmol=molecule,
        ))  # fmt: skip
    torch.save(items, folder / "data_geom_drug_1.pt")
    count = len(items)
    split = {
        "train": np.arange(count - 4)[::-1].copy(),
        "valid": np.array([count - 3, count - 4]),
        "test": np.array([count - 2, count - 1]),
    }
    torch.save(split, folder / "split_dict_geom_drug_1.pt")
    return folder


def write_semlaflow(folder: Path, sources: list[Source], older: bool = False) -> Path:
    for name, some in split_of(sources).items():
        items = []
        for source in some:
            molecule = source.conformers[0]
            table = torch.tensor(bonds(molecule))
            found = {
                "coords": torch.tensor(places(molecule)).float(),
                "atomics": torch.tensor(elements(molecule)),
                "charges": torch.tensor(charges(molecule)),
                "device": "cpu",
                "id": source.smiles,
            }
            if older:
                found["bonds"] = table
            else:  # views of one storage, as SemlaFlow writes them
                found |= {"bond_indices": table[:, :2], "bond_types": table[:, 2]}
            items.append(pickle.dumps(found, protocol=4))
        (folder / f"{name}.smol").write_bytes(pickle.dumps(items))
    return folder


def write_flowmol(folder: Path, sources: list[Source]) -> Path:
    order = [6, 1, 7, 8, 9, 15, 16, 17, 35, 53]
    for name, some in split_of(sources).items():
        molecules = [molecule for source in some for molecule in source.conformers]
        types = [torch.tensor([order.index(z) for z in elements(m)]) for m in molecules]
        tables = [torch.tensor(bonds(molecule)) for molecule in molecules]

        def ends(parts: list[torch.Tensor]) -> torch.Tensor:
            stops = torch.cumsum(torch.tensor([len(part) for part in parts]), 0)
            starts = torch.cat([torch.zeros(1, dtype=torch.long), stops[:-1]])
            return torch.stack([starts, stops], 1).int()

        one_hot = torch.nn.functional.one_hot(torch.cat(types), len(order)).bool()
        joint = torch.cat(tables)
        torch.save({
            "smiles": [source.smiles for source in some],
            "positions": torch.cat([torch.tensor(places(m)).float() for m in molecules]),
            "atom_types": one_hot,
            "atom_charges": torch.tensor([c for m in molecules for c in charges(m)]).int(),
            "bond_types": joint[:, 2].int(),
            "bond_idxs": joint[:, :2].int(),
            "node_idx_array": ends(types),
            "edge_idx_array": ends(tables),
        }, folder / f"{name}_data_processed.pt")  # fmt: skip
        torch.save(torch.ones(3), folder / f"{name}_data_n_atoms_histogram.pt")
    return folder


Writer = Callable[[Path, list[Source]], Path]


@pytest.fixture
def writers(geometric: type) -> dict[str, Writer]:
    return {
        "crude": write_crude,
        "edm": write_edm,
        "rdkit_folder": write_rdkit_folder,
        "midi": write_midi,
        "midi, protocol 2": lambda folder, sources: write_midi(folder, sources, 2),
        "jodo": lambda folder, sources: write_jodo(folder, sources, geometric),
        "semlaflow": write_semlaflow,
        "semlaflow, older": lambda folder, sources: write_semlaflow(folder, sources, True),
        "flowmol": write_flowmol,
    }


BY_ENERGY = ("crude", "edm", "rdkit_folder", "jodo")
WITHOUT_BONDS = ("crude", "edm")
NAMES = (*BY_ENERGY, "midi", "midi, protocol 2", "semlaflow", "semlaflow, older", "flowmol")


def expected(name: str, sources: list[Source], most: int) -> list[tuple[int, Chem.Mol]]:
    """Number of the molecule, and conformer, of all that a layout holds, at most so many each."""
    if name.startswith(("jodo", "semlaflow")):
        most = 1
    found = []
    for k, source in enumerate(sources):
        order = range(len(source.conformers))
        if name in BY_ENERGY:
            order = np.argsort(source.energies).tolist()
        found += [(k, source.conformers[j]) for j in list(order)[:most]]
    return found


def assert_is(found: Molecule, wanted: Chem.Mol, has_bonds: bool) -> None:
    assert found.atomic_numbers.tolist() == elements(wanted)
    np.testing.assert_array_equal(found.positions, places(wanted).astype("f4"))
    if not has_bonds:
        assert found.bond_index is None and found.formal_charges is None
        return
    assert found.formal_charges is not None
    assert found.formal_charges.tolist() == charges(wanted)
    assert found.bond_index is not None and found.bond_order is not None
    codes = [4 if order == AROMATIC else order for order in found.bond_order.tolist()]
    ends = [tuple(sorted(pair)) for pair in found.bond_index.tolist()]
    assert sorted(zip(ends, codes, strict=True)) == sorted(
        (tuple(sorted((i, j))), code) for i, j, code in bonds(wanted)
    )


def load(path: Path) -> tuple[Molecules, np.ndarray]:
    with MoleculeFile(path) as file:
        return file.load(), file.split


@pytest.mark.parametrize("name", NAMES)
def test_each_layout_gives_what_was_written(
    tmp_path: Path, sources: list[Source], writers: dict[str, Writer], name: str
) -> None:
    """Also its split, and with two conformers the two lowest in energy where energies are known."""
    source = writers[name](tmp_path, sources)
    output = tmp_path / "out.h5"
    result = preprocess("geom-drugs", output, source=str(source), conformers=2, workers=0)
    molecules, split = load(output)
    wanted = expected(name, sources, 2)
    assert len(molecules) == len(wanted) == result.count
    numbers = np.array([number for number, _ in wanted])
    if name not in ("crude", "edm", "rdkit_folder"):
        labels = np.repeat([0, 1, 2], [len(sources) - 4, 2, 2])
        assert split.tolist() == labels[numbers].tolist()
        assert "1 molecule in several splits" in result.warnings[0]
    for found, (number, molecule) in zip(molecules, wanted, strict=True):
        assert_is(found, molecule, name not in WITHOUT_BONDS)
        if name != "edm":
            heavy = Chem.MolFromSmiles(sources[number].smiles)
            assert found.smiles == Chem.MolToSmiles(heavy, isomericSmiles=False)
    assert molecules.groups is not None
    for group in set(molecules.groups.tolist()):  # conformers stay together
        assert len(set(split[molecules.groups == group].tolist())) == 1
    if name in ("crude", "rdkit_folder"):
        energies = [e for s in sources for e in sorted(s.energies)[:2]]
        np.testing.assert_array_equal(molecules.properties["energy"].values, energies)
        assert molecules.units["energy"] == "hartree"


def test_processes_and_single_files(
    tmp_path: Path, sources: list[Source], writers: dict[str, Writer]
) -> None:
    """Worker processes change nothing; one file of a set is split by molecule at random."""
    writers["midi"](tmp_path, sources)
    contents = []
    for workers in (0, 2):
        preprocess("geom-drugs", tmp_path / "a.h5", source=tmp_path, workers=workers)
        with MoleculeFile(tmp_path / "a.h5") as file:
            contents.append((file.summarize().fingerprint, file.split.tolist()))
    assert contents[0] == contents[1]
    for name, file_name in {
        "midi": "train_data.pickle",
        "semlaflow": "train.smol",
        "flowmol": "train_data_processed.pt",
        "jodo": "data_geom_drug_1.pt",
        "crude": "drugs_crude.msgpack",
        "edm": "geom_drugs_30.npy",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        writers[name](folder, sources)
        path = folder / file_name
        assert recognise(path).name == recognise(folder).name
        if name != "jodo":
            result = preprocess("geom-drugs", tmp_path / "a.h5", source=path, workers=0)
            molecules, split = load(tmp_path / "a.h5")
            assert len(set(split.tolist())) > 1
            assert not result.warnings
            for group in set(molecules.groups.tolist()):
                assert len(set(split[molecules.groups == group].tolist())) == 1


def test_splits_by_random_scaffold_and_of_edm(
    tmp_path: Path, sources: list[Source], writers: dict[str, Writer]
) -> None:
    writers["midi"](tmp_path, sources)
    options: dict[str, Any] = {"source": tmp_path, "workers": 0, "conformers": 1}
    result = preprocess("geom-drugs", tmp_path / "a.h5", split_by="random", **options)
    groups = load(tmp_path / "a.h5")[0].groups
    assert not result.warnings
    # The two mirror images are one group; nothing else is.
    assert len(set(groups.tolist())) == len(sources) - 1
    assert groups[-2] == groups[-5]
    preprocess("geom-drugs", tmp_path / "a.h5", split_by="scaffold", **options)
    molecules, split = load(tmp_path / "a.h5")
    assert len(set(molecules.groups.tolist())) <= len(sources) - 1
    assert len(set(split.tolist())) > 1
    (tmp_path / "edm").mkdir()
    writers["edm"](tmp_path / "edm", sources)
    options = {"source": tmp_path / "edm", "workers": 0, "conformers": 0}
    result = preprocess("geom-drugs", tmp_path / "a.h5", split_by="layout", **options)
    molecules, split = load(tmp_path / "a.h5")
    order = np.load(tmp_path / "edm/geom_permutation.npy")
    tenth = len(order) // 10
    assert sorted(np.flatnonzero(split == 1)) == sorted(order[:tenth])
    assert sorted(np.flatnonzero(split == 2)) == sorted(order[tenth : 2 * tenth])
    assert any("in several splits" in text for text in result.warnings)


def test_filters_are_counted(
    tmp_path: Path, sources: list[Source], writers: dict[str, Writer]
) -> None:
    """Also the cleaning: a stretched bond in any conformer, and salts."""
    stretched = Chem.Mol(sources[-1].conformers[0])
    moved = places(stretched)
    moved[-1] += 3
    stretched.GetConformer().SetPositions(moved)
    salt = Chem.AddHs(Chem.MolFromSmiles("CC(=O)[O-].[Na+]"))
    AllChem.EmbedMolecule(salt, randomSeed=1)
    more = [
        Source("C[S](=O)(=O)NBr", [*sources[-1].conformers[:1], stretched], [0.0, 1.0]),
        Source("CC(=O)[O-].[Na+]", [salt], [0.0]),
        *sources,
    ]
    writers["midi"](tmp_path, more)
    options: dict[str, Any] = {"source": tmp_path, "workers": 0, "conformers": 1}
    result = preprocess("geom-drugs", tmp_path / "a.h5", clean=True, max_atoms=12, **options)
    large = sum(source.conformers[0].GetNumAtoms() > 12 for source in more)
    assert 0 < large < 7
    assert f"{large} left out with more than 12 atoms" in result.summary
    assert "1 left out with other elements" in result.summary  # sodium
    assert "1 left out by the cleaning: a bond is too long" in result.summary
    assert result.count == len(more) - large - 2
    elements = "H,C,N,O,F,S,Cl,Br,Na"
    result = preprocess("geom-drugs", tmp_path / "a.h5", clean=True, elements=elements, **options)
    assert "1 left out by the cleaning: it has several fragments" in result.summary


def replaced(path: Path, new: Any) -> None:
    path.write_bytes(pickle.dumps(new))


def test_bad_molecules_are_named_or_left_out(
    tmp_path: Path, sources: list[Source], writers: dict[str, Writer]
) -> None:
    """Bytes that RDKit refuses or dies on, no conformer, no number."""
    molecule = sources[0].conformers[0]

    class Damaged:
        def __reduce__(self) -> Any:
            return Chem.Mol, (molecule.ToBinary()[:60],)

    flat = Chem.Mol(molecule)
    flat.RemoveAllConformers()
    nowhere = Chem.Mol(molecule)
    nowhere.GetConformer().SetAtomPosition(0, (np.nan, 0, 0))
    bad = [Damaged(), flat, "text", nowhere]
    writers["midi"](tmp_path, sources)
    items = [("CC", [one]) for one in bad]
    items += [("CC", []), *((source.smiles, source.conformers) for source in sources)]
    replaced(tmp_path / "train_data.pickle", items)
    options: dict[str, Any] = {"source": tmp_path, "workers": 0}
    with pytest.raises(InputError, match=r"train_data\.pickle: molecule 1: .*--skip-bad"):
        preprocess("geom-drugs", tmp_path / "a.h5", **options)
    result = preprocess("geom-drugs", tmp_path / "a.h5", skip_bad=True, conformers=1, **options)
    assert result.skipped_count == len(bad) + 1
    assert result.count == len(sources) + 4
    assert sorted(text.partition(": ")[2][:10] for text in result.skipped) == [
        f"molecule {k}" for k in (1, 2, 3, 4, 5)
    ]
    options["source"] = tmp_path / "train_data.pickle"
    with pytest.raises(InputError, match=r"^\S*train_data\.pickle: molecule 1: "):
        preprocess("geom-drugs", tmp_path / "b.h5", **options)


def test_bad_records_of_other_layouts(tmp_path: Path, sources: list[Source]) -> None:
    """Lists too deep for another process, no energy, no charges, sizes that are no numbers."""
    deep: Any = [[6, 0, 0, 0]]
    for _ in range(600):
        deep = [deep]
    path = tmp_path / "drugs_crude.msgpack"
    conformers = [{"xyz": [[8, 0, 0, 0], [1, 0.97, 0, 0], [1, -0.24, 0.94, 0]]}]
    found = {"C": {"conformers": [{"xyz": deep}]}, "O": {"conformers": conformers}}
    path.write_bytes(msgpack.packb(found))
    [crude, _] = recognise(path).entries(False)
    assert pickle.loads(pickle.dumps(crude)).energies == []
    result = preprocess("geom-drugs", tmp_path / "a.h5", source=path, skip_bad=True, workers=0)
    assert (result.count, result.skipped_count) == (1, 1)
    write_semlaflow(tmp_path, sources)
    [record, *_] = pickle.loads((tmp_path / "train.smol").read_bytes())
    record = pickle.loads(record)
    del record["charges"]
    replaced(tmp_path / "train.smol", [pickle.dumps(record)])
    arrays = write_edm(tmp_path, sources) / "geom_drugs_30.npy"
    np.save(tmp_path / "geom_drugs_n_30.npy", np.array([np.nan]))
    for source, message in ((tmp_path / "train.smol", "no charges"), (arrays, "no whole numbers")):
        with pytest.raises(InputError, match=message):
            preprocess("geom-drugs", tmp_path / "b.h5", source=source, workers=0)


def test_a_crash_of_the_parser_is_a_bad_molecule() -> None:
    """It ends a worker process, and this process lives on."""
    part = EntryChunk([Entry("first", [3])], Rules(os._exit, 1, np.ones(256, bool), 181, False))
    with WorkerPool(1, 60.0) as pool:
        [(_, found)] = pool.map(process_entries, [part], processing_failed)
    assert [one.failure for one in found] == ["the worker process died (exit code 3)"]


def test_elements_that_there_are_not(sources: list[Source]) -> None:
    """RDKit's bytes can hold any number."""
    changed = Chem.RWMol(sources[0].conformers[0])
    for number in (119, 200):
        changed.GetAtomWithIdx(0).SetAtomicNum(number)
        with pytest.raises(ValueError, match=f"atomic number {number}"):
            decode_pickled(changed.ToBinary())


def test_layouts_that_are_incomplete(
    tmp_path: Path, sources: list[Source], writers: dict[str, Writer]
) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message) as caught:
            preprocess("geom-drugs", tmp_path / "a.h5", workers=0, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "a.h5").exists()

    for name, missing in {
        "midi": "val_data.pickle",
        "semlaflow": "test.smol",
        "flowmol": "train_data_processed.pt",
        "jodo": "split_dict_geom_drug_1.pt",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        writers[name](folder, sources)
        (folder / missing).unlink()
        refused(f"{missing}.*--split-by random", source=folder)
        preprocess("geom-drugs", tmp_path / "b.h5", source=folder, workers=0, split_by="random")
    for name in ("edm", "crude", "rdkit_folder"):
        (tmp_path / name).mkdir()
        writers[name](tmp_path / name, sources)
    (tmp_path / "edm/geom_permutation.npy").unlink()
    refused("geom_permutation.npy does not exist", source=tmp_path / "edm", split_by="layout")
    refused("no bonds and no SMILES", source=tmp_path / "edm", split_by="scaffold")
    refused("--clean: GEOM's msgpack file has no bonds", source=tmp_path / "crude", clean=True)
    refused("rdkit_folder has no split", source=tmp_path / "rdkit_folder", split_by="layout")
    (tmp_path / "rdkit_folder/rdkit_folder/drugs/3.pickle").unlink()
    refused(r"3\.pickle", source=tmp_path / "rdkit_folder")
    (tmp_path / "rdkit_folder/rdkit_folder/summary_drugs.json").unlink()
    refused("without summary_drugs", source=tmp_path / "rdkit_folder/rdkit_folder/drugs")
    np.save(tmp_path / "edm/geom_drugs_n_30.npy", np.array([3, 4]))
    refused("not of the same set", source=tmp_path / "edm")
    everything = ".*".join(kind.file_names.split()[0] for kind in LAYOUTS)
    refused(
        f"is not GEOM-Drugs in a form that can be read, .*the forms: {everything}", source=tmp_path
    )
    for path in (tmp_path / "midi").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "crude/drugs_crude.msgpack").rename(tmp_path / "drugs_crude.msgpack")
    refused("holds GEOM's msgpack file and MiDi's pickles; name one", source=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name the folder or file of GEOM-Drugs with --source"),
        ({"source": ""}, "a file name is empty"),
        ({"source": "nowhere"}, "nowhere does not exist"),
        ({"source": ".", "conformers": -1}, "--conformers -1"),
        ({"source": ".", "max_atoms": 0}, "--max-atoms 0"),
        ({"source": ".", "workers": -1}, "--workers -1"),
        ({"source": ".", "split_by": "size"}, "unknown --split-by 'size'"),
        ({"source": ".", "elements": "C,Qq"}, "Qq"),
        ({"source": ".", "elements": "He"}, "holds no usable molecule .*other elements"),
        ({"source": ".", "max_atoms": 2}, "holds no usable molecule .*more than 2 atoms"),
    ],
)
def test_bad_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[Source],
    options: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_midi(tmp_path, sources[-4:])
    write_midi(tmp_path, [*sources[-4:], sources[0]])
    with pytest.raises(InputError, match=message):
        preprocess("geom-drugs", "a.h5", **({"workers": 0} | options))


class Hostile:
    """Would run a command when it is unpickled by Python."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_hostile_files_run_nothing(
    tmp_path: Path, sources: list[Source], writers: dict[str, Writer]
) -> None:
    marker = tmp_path / "called"
    hostile = Hostile(f"touch {marker}")

    def refused(source: Path, message: str = "system'; only RDKit molecules") -> None:
        with pytest.raises(InputError, match=message):
            preprocess("geom-drugs", tmp_path / "a.h5", source=source, workers=0)

    for name, file_name in (("midi", "val_data.pickle"), ("semlaflow", "val.smol")):
        folder = tmp_path / name
        folder.mkdir()
        writers[name](folder, sources)
        replaced(folder / file_name, [hostile])
        refused(folder)
    replaced(tmp_path / "semlaflow/val.smol", [pickle.dumps(hostile)])
    refused(tmp_path / "semlaflow", r"val\.smol: molecule 1: .*system'")
    for name in ("jodo", "flowmol", "rdkit_folder"):
        (tmp_path / name).mkdir()
        writers[name](tmp_path / name, sources)
    torch.save([hostile], tmp_path / "jodo/data_geom_drug_1.pt")
    refused(tmp_path / "jodo")
    torch.save({"smiles": hostile}, tmp_path / "flowmol/train_data_processed.pt")
    refused(tmp_path / "flowmol")
    folder = tmp_path / "rdkit_folder/rdkit_folder"
    replaced(folder / "drugs/2.pickle", {"conformers": [hostile]})
    refused(folder)
    for path in ("../../x.pickle", "/etc/passwd"):
        summary = {"CC": {"uniqueconfs": 1, "pickle_path": path}}
        (folder / "summary_drugs.json").write_text(json.dumps(summary))
        refused(folder, "leads out of the folder")
    assert not marker.exists()


def test_the_command_says_it_in_one_line(
    cli_here: Callable[..., Any], tmp_path: Path, sources: list[Source]
) -> None:
    write_midi(tmp_path, sources)
    done = cli_here("preprocess", "geom-drugs", "--source", ".", "--workers", 0, "--conformers", 1)
    assert f"{len(sources)} molecules written to geom_drugs.h5" in done.stderr
    content = (tmp_path / "val_data.pickle").read_bytes()
    (tmp_path / "val_data.pickle").write_bytes(content[: len(content) // 2])
    arguments = ("preprocess", "geom-drugs", "--source", ".", "--workers", 0, "-o", "b.h5")
    done = cli_here(*arguments, code=2)
    assert "val_data.pickle is not read: it is cut off" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "b.h5").exists()
