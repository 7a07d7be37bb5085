"""Relaxation of the Chemical Component Dictionary: minima, failures, and interrupted work."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from components import SMILES, dictionary
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers, rdMolAlign, rdMolTransforms

from molgen_energy import preprocess
from molgen_energy.chemistry import conformers
from molgen_energy.chemistry.conformers import Conformers, GivenConformer, relax
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.data.shards import ShardFolder, shards_folder
from molgen_energy.datasets import ccd
from molgen_energy.datasets import conformers as conformer_work
from molgen_energy.datasets.ccd_shards import ComponentManifest
from molgen_energy.errors import InputError

KEPT = ("BNZ", "DLA", "GLY", "LAC", "LNG", "TOL")
WITH_BORON = {name: SMILES[name] for name in ("BNZ", "LAC", "GLY")} | {"BOR": "OB(O)c1ccccc1"}

# Writes ccd.h5 from components.bcif, and ends at once when a second shard is finished.
KILLED = """
import os, signal
from pathlib import Path
from molgen_energy import preprocess
from molgen_energy.datasets import ccd

def progress(done, total):
    if len(list(Path("ccd.h5.shards").glob("*.shard"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    ccd.dictionary_path = lambda: Path("components.bcif")
    ccd._SHARDS["mmff94"] = 1
    preprocess("ccd", "ccd.h5", relax="mmff", workers=1, progress=progress)
"""


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """Put a dictionary in the place of the installed one, shards of 1; returns where to write."""
    pytest.importorskip("biotite")

    def put(smiles: dict[str, str]) -> Path:
        path = dictionary(tmp_path, smiles)
        monkeypatch.setattr(ccd, "dictionary_path", lambda: path)
        monkeypatch.setattr(ccd, "_SHARDS", {"mmff94": 1, "gfn2-xtb": 1})
        return tmp_path / "ccd.h5"

    return put


def loaded(path: Path) -> Molecules:
    with MoleculeFile(path) as file:
        return file.load()


def sanitized(molecules: Molecules) -> list[Chem.Mol]:
    found = [build(molecule, positions=True) for molecule in molecules]
    for molecule in found:
        Chem.SanitizeMol(molecule)
        Chem.AssignStereochemistryFrom3D(molecule)
    return found


def mmff_energy(molecule: Chem.Mol) -> float:
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    return rdForceFieldHelpers.MMFFGetMoleculeForceField(molecule, properties).CalcEnergy()


def test_minima_and_what_the_summary_says_of_them(
    use: Callable[[dict[str, str]], Path], tmp_path: Path
) -> None:
    """Energies, RMSD and lengths by RDKit alone."""
    output = use(SMILES)
    preprocess("ccd", tmp_path / "given.h5", workers=0)
    result = preprocess("ccd", output, workers=0, relax="mmff")
    given, relaxed = loaded(tmp_path / "given.h5"), loaded(output)
    assert len(relaxed) == len(KEPT)
    for name, values in given.to_arrays().items():
        if name != "positions":
            np.testing.assert_array_equal(values, relaxed.to_arrays()[name], name)
    energies, distances, changes = [], [], []
    for before, after in zip(sanitized(given), sanitized(relaxed), strict=True):
        assert Chem.MolToSmiles(before) == Chem.MolToSmiles(after)
        energies.append(mmff_energy(before) - mmff_energy(after))
        same = [(k, k) for k in range(before.GetNumAtoms())]
        distances.append(rdMolAlign.AlignMol(Chem.Mol(after), before, atomMap=same))
        for bond in before.GetBonds():
            ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            lengths = (
                rdMolTransforms.GetBondLength(molecule.GetConformer(), *ends)
                for molecule in (before, after)
            )
            changes.append(abs(np.subtract(*lengths)))
        reached = mmff_energy(after)
        assert rdForceFieldHelpers.MMFFOptimizeMolecule(after, maxIters=1000) == 0
        assert reached - mmff_energy(after) < 0.01
    assert (
        f"relaxed by mmff94: median energy lost {np.median(energies):.3g} kcal/mol, median RMSD "
        f"{np.median(distances):.2g} Å, bonds change by {np.mean(changes):.3f} Å (H1C "
    ) in result.summary
    assert not shards_folder(output).exists()


def test_what_cannot_be_relaxed_is_left_out_or_kept(use: Callable[[dict[str, str]], Path]) -> None:
    output = use(WITH_BORON)
    options: dict[str, Any] = {"workers": 0, "relax": "mmff", "elements": "H,B,C,N,O"}
    result = preprocess("ccd", output, **options)
    assert "1 left out: no MMFF94 parameters" in result.summary
    fewer = loaded(output)
    result = preprocess("ccd", output, keep_unrelaxed=True, **options)
    assert "1 kept unrelaxed: no MMFF94 parameters" in result.summary
    molecules = loaded(output)
    preprocess("ccd", output, workers=0, elements="H,B,C,N,O")
    given = loaded(output)
    same = [np.array_equal(a.positions, b.positions) for a, b in zip(given, molecules, strict=True)]
    assert same == [False, True, False, False]  # BNZ, BOR, GLY, LAC
    kept = molecules.select(np.flatnonzero(~np.array(same)))
    np.testing.assert_array_equal(kept.positions, fewer.positions)


def test_another_stereoisomer_is_a_failure(use: Callable[[dict[str, str]], Path]) -> None:
    """A centre on the wrong side of its neighbours, which the force field brings back."""
    output = use({"LAC": SMILES["LAC"]})
    preprocess("ccd", output, workers=0)
    (molecule,) = loaded(output)
    places = molecule.positions.astype(float)
    methyl, centre, hydroxyl, acid = places[:4]
    normal = np.cross(hydroxyl - methyl, acid - methyl)
    normal /= np.linalg.norm(normal)
    places[1] -= 1.3 * ((centre - methyl) @ normal) * normal  # beyond the plane of the three
    inverted = replace(molecule, positions=places.astype("f4"))
    (before,), (after,) = (
        Chem.FindMolChiralCenters(one)
        for one in sanitized(Molecules.from_list([inverted, molecule]))
    )
    assert before != after
    found = relax(GivenConformer("LAC", inverted, "mmff94"))
    assert (found.conformers, found.failure) == ((), "it becomes another stereoisomer")


def test_interrupted_work_continues(
    use: Callable[[dict[str, str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C and after a kill, with the same molecules; other options are refused."""
    output = use(SMILES)
    preprocess("ccd", tmp_path / "whole.h5", workers=0, relax="mmff")

    def stop(done: int, total: int | None) -> None:
        if len(list(shards_folder(output).glob("*.shard"))) == 3:
            raise KeyboardInterrupt

    killed = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(KeyboardInterrupt):
        preprocess("ccd", output, workers=0, relax="mmff", progress=stop)
    assert not output.exists()
    finished = sorted(shards_folder(output).glob("*.shard"))
    assert len(finished) == 3
    pytest.importorskip("tblite")
    with pytest.raises(
        InputError, match="begun with relax mmff94, which cannot change to gfn2-xtb"
    ):
        preprocess("ccd", output, workers=0, relax="xtb")
    names: list[str] = []

    def counted(item: GivenConformer) -> Conformers:
        names.append(item.name)
        return relax(item)

    monkeypatch.setattr(conformers, "relax", counted)
    preprocess("ccd", output, workers=0, relax="mmff")
    assert names == [f"component {name}" for name in KEPT[3:]]
    np.testing.assert_array_equal(loaded(output).positions, loaded(tmp_path / "whole.h5").positions)
    assert not shards_folder(output).exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a["atomic_numbers"].fill(6),
        lambda a: a.pop("energies"),
        lambda a: a["bonds/order"].fill(3),
        lambda a: a["positions"].fill(np.nan),
        lambda a: a.update(offsets=np.array([0, 3, 12])),
    ],
)
def test_a_foreign_shard_is_relaxed_again(
    use: Callable[[dict[str, str]], Path], spoil: Callable[[dict[str, Any]], Any]
) -> None:
    output = use({name: SMILES[name] for name in ("BNZ", "LAC")})
    preprocess("ccd", output, workers=0, relax="mmff")
    expected = loaded(output).positions

    def stop(done: int, total: int | None) -> None:
        if len(list(shards_folder(output).glob("*.shard"))) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess("ccd", output, workers=0, relax="mmff", progress=stop)
    with ShardFolder(output, "preprocess ccd", ComponentManifest, lead=True) as shards:
        (path,) = shards.folder.glob("*.shard")
        arrays = shards.load(path.name, conformer_work.SHAPES)
        assert arrays is not None
        arrays = {name: values.copy() for name, values in arrays.items()}
        spoil(arrays)
        shards.store(path.name, arrays)
    preprocess("ccd", output, workers=0, relax="mmff")
    np.testing.assert_array_equal(loaded(output).positions, expected)


def test_relaxation_by_xtb_and_its_time_limit(use: Callable[[dict[str, str]], Path]) -> None:
    """Forces vanish at the total charge; what took too long is tried again."""
    pytest.importorskip("tblite")
    from ase import Atoms
    from tblite.ase import TBLite

    output = use({"FOR": "[O-]C=O", "WAT": "O"})
    options: dict[str, Any] = {"relax": "xtb", "min_atoms": 3, "keep_unrelaxed": True}
    result = preprocess("ccd", output, workers=1, timeout=0.01, **options)
    assert "2 kept unrelaxed: not finished within 0.01 s; --timeout allows more" in result.summary
    preprocess("ccd", output, workers=0, **options)
    for molecule in loaded(output):
        atoms = Atoms(molecule.atomic_numbers, molecule.positions.astype(float))
        assert molecule.formal_charges is not None
        charge = int(molecule.formal_charges.sum())
        atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.06
