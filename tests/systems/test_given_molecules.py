"""Conformers of SMILES (`--smiles`) and variants of molecules (`--like`)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from runs import CPU
from torch import nn

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import from_rdkit, molecule_from_rdkit, to_rdkit
from molgen_energy.chemistry.identity import identify
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.control import build_control, read_controls
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.systems.molecules.system import MoleculeSystem
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training.checkpoint import load_checkpoint, save_checkpoint

TINY = {
    "model.layers": 1, "model.width": 16, "model.heads": 4, "training.steps": 2,
    "training.batch_size": 8, "training.warmup_steps": 1, "training.log_every": 1,
    "training.validate_every": 2, "training.validation_molecules": 8,
}  # fmt: skip
SYSTEM = MoleculeSystem()
CHIRAL = "C[C@H](O)[NH3+]"


@pytest.fixture(scope="module")
def bonded(molecules, tmp_path_factory):
    """Some of the bundled molecules with bonds, and charges of −1, 0 and 1."""
    some = perceive(molecules.select(np.arange(60)))
    charges = np.random.default_rng(0).integers(-1, 2, len(some.atomic_numbers))
    path = tmp_path_factory.mktemp("data") / "bonded.h5"
    with MoleculeWriter(path, source="test") as writer:
        writer.append(replace(some, formal_charges=charges.astype(np.int8)))
        writer.set_split((np.arange(60) % 10 == 0).astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def trained(bonded, tmp_path_factory):
    """Checkpoints with random weights: of JODO for conformers and for all fields, and of GDM."""

    def run(name, **changes):
        config = load_config(name).replaced({"data.path": str(bonded)} | changes)
        task = MoleculeTask(config, CPU)
        path = tmp_path_factory.mktemp("runs") / name
        state = {"progress": {"step": 0}, **task.state}
        save_checkpoint(path, task.config, state, {"ema": task.model.state_dict()})
        return load_checkpoint(path)

    gdm = {key: value for key, value in TINY.items() if key != "model.heads"}
    return {
        "conformers": run("qm9_jodo_conformers_cpu", **TINY),
        "joint": run("qm9_jodo_cpu", **TINY),
        "gdm": run("quick", **gdm | {"process.steps": 20, "training.low_precision": False}),
    }


def options_of(**options):
    read = SYSTEM.read_options({key: v for key, v in options.items() if v is not None})
    return dict(SYSTEM.sampling) | read


def generator_of(checkpoint, count=3, **options):
    sampling = SYSTEM.generator(checkpoint, CPU, options_of(count=count, **options))
    return sampling._generator, sampling.count


def draw(checkpoint, path, batch_size=None, **options):
    """The molecules of a file, and the notes at the end."""
    generator, count = generator_of(checkpoint, **options)

    class Callback:
        def found(self, samples): ...
        def advance(self, samples, share): ...
        def interrupted(self, samples): ...

    result = sample_to_file(generator, count, path, Callback(), batch_size)
    with MoleculeFile(path) as file:
        return file.load(), result.notes


def embedded(smiles: str) -> Chem.Mol:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(molecule, randomSeed=3)
    x = molecule.GetConformer().GetPositions()
    molecule.GetConformer().SetPositions(x + np.array([5.0, -3.0, 1.0]))
    return molecule


# -- conformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conformers", "joint"])
def test_conformers_have_the_graph_of_their_smiles(trained, tmp_path, name):
    """In the order of the SMILES, with a network that was trained so, and with any that has bonds;
    molecule i does not depend on batches."""
    smiles = ["CCO", CHIRAL, "c1ccc(O)cc1", "[H][H]"]
    drawn, _ = draw(trained[name], tmp_path / "a.h5", smiles=smiles, steps=4)
    again, _ = draw(trained[name], tmp_path / "b.h5", 2, smiles=smiles, steps=4)
    np.testing.assert_allclose(drawn.positions, again.positions, atol=1e-4)
    assert drawn.smiles.tolist() == [text for text in smiles for _ in range(3)]
    assert drawn.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for text, molecule in zip(drawn.smiles, drawn, strict=True):
        expected = Chem.AddHs(Chem.MolFromSmiles(text))
        Chem.Kekulize(expected, clearAromaticFlags=True)
        found = to_rdkit(drawn.from_list([molecule]))[0]
        for ours, theirs in zip(found.GetAtoms(), expected.GetAtoms(), strict=True):
            assert ours.GetAtomicNum() == theirs.GetAtomicNum()
            assert ours.GetFormalCharge() == theirs.GetFormalCharge()
        bonds = [
            {(b.GetBeginAtomIdx(), b.GetEndAtomIdx()): str(b.GetBondType()) for b in m.GetBonds()}
            for m in (found, expected)
        ]
        assert {(*sorted(k), v) for k, v in bonds[0].items()} == {
            (*sorted(k), v) for k, v in bonds[1].items()
        }
    assert len(np.unique(drawn.positions[:27].reshape(3, -1), axis=0)) == 3


def test_given_fields_are_clean_in_every_evaluation(trained, monkeypatch):
    generator, _ = generator_of(trained["conformers"], smiles="CC#N", steps=4)
    seen, forward = [], generator.model.forward

    def watched(state, time, mask, condition=None, self_condition=None):
        seen.append((state, self_condition))
        return forward(state, time, mask, condition, self_condition)

    monkeypatch.setattr(generator.model, "forward", watched)
    generator.draw(torch.arange(2))
    assert len(seen) == 4
    assert seen[0][1] is None
    for state, previous in seen:
        for given in (state, previous):
            if given is not None:
                data = given.decode()
                assert data["atomic_numbers"][0].tolist() == [6, 6, 7, 1, 1, 1]
                assert data["bond_orders"][0, 0].tolist() == [0, 1, 0, 1, 1, 1]
                assert set(given["bonds"][0, 0, 1:, 0].tolist()) == {-1.0, 1.0}


def test_of_two_mirror_images_the_one_that_is_asked_is_taken(trained, tmp_path, monkeypatch):
    smiles = [CHIRAL, CHIRAL.replace("@", "@@"), "CCO"]
    options = {"smiles": smiles, "steps": 3, "count": 8}
    drawn, notes = draw(trained["joint"], tmp_path / "a.h5", **options)
    assert notes[0] == (
        "of 16 conformers whose SMILES specify stereocentres or double bonds, 16 (100.0 %) have "
        "them"
    )
    generator, count = generator_of(trained["joint"], **options)
    monkeypatch.setattr(generator.control, "_mirror", False)
    plain = generator.draw(torch.arange(count)).positions
    same = []
    for a, b in pairwise(drawn.offsets.tolist()):
        same.append(np.allclose(drawn.positions[a:b], plain[a:b], atol=1e-4))
        assert np.allclose(drawn.positions[a:b], plain[a:b] * (1 if same[-1] else -1), atol=1e-4)
    assert 0 < sum(same[:16]) < 16
    assert all(same[16:])


def test_a_stored_job_gives_the_same_molecules(trained, tmp_path):
    """Without the input: what `--resume` builds again from the manifest."""
    from molgen_energy.systems.molecules.sampling import _job
    from molgen_energy.systems.molecules.shards import MoleculeShards

    (tmp_path / "in.smi").write_text("smiles\nCCO ethanol\n\nC[C@H](O)N x\n")
    for options in (
        {"smiles": str(tmp_path / "in.smi")},
        {"like": [embedded("CCO"), embedded("CN")], "strength": 0.4},
        {"like": embedded("CCO")},
    ):
        generator, count = generator_of(trained["conformers"], steps=4, **options)
        path = tmp_path / f"{len(options)}{count}.h5"
        MoleculeShards.create(path, _job(generator, count, None)).close()
        stored = dict(SYSTEM.sampling_options(path))
        assert stored["count"] == 3
        again = SYSTEM.generator(trained["conformers"], CPU, stored)
        assert again.count == count
        numbers = torch.arange(count)
        ours, theirs = generator.draw(numbers), again._generator.draw(numbers)
        np.testing.assert_array_equal(ours.positions, theirs.positions)
    assert stored["strength"] == 0.3


# -- variants -----------------------------------------------------------------------------------


class Perfect(nn.Module):
    """Returns the molecules themselves, whatever the noise."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.seen = clean, []

    def forward(self, state, time, mask, condition=None, self_condition=None):
        self.seen.append(state)
        return self.clean


def test_variants_begin_with_the_noisy_molecule_and_end_in_its_frame(trained):
    """With the same number of evaluations as levels up to the strength."""
    molecules = [embedded("CCO"), embedded("C#CC=O")]
    generator, count = generator_of(
        trained["joint"], 2, like=molecules, strength=0.25, steps=8, sampler="ddim"
    )
    assert count == 4
    numbers = torch.arange(4)
    assert generator.sizes(numbers).tolist() == [9, 9, 6, 6]
    mask = torch.arange(9)[None] < generator.sizes(numbers)[:, None]
    from molgen_energy.systems.molecules.control.base import Batch

    clean = generator.control.start(Batch(numbers, mask, generator.layout))
    generator._denoiser = perfect = Perfect(clean)
    drawn = generator.draw(numbers)
    expected = [m.GetConformer().GetPositions() for m in molecules for _ in range(2)]
    np.testing.assert_allclose(drawn.positions, np.concatenate(expected), atol=1e-3)
    for k, molecule in enumerate(drawn):
        theirs = identify(molecule_from_rdkit(molecules[k // 2]))
        assert identify(molecule).smiles == theirs.smiles
    assert len(perfect.seen) == generator.sampler.evaluations
    level = torch.tensor([0.25], dtype=torch.float64)
    process = generator.sampler.process
    noise = (perfect.seen[0] - process.alpha(level) * clean) / process.sigma(level)
    inside = noise["positions"][mask].double()
    assert 0.5 < float(inside.square().mean()) < 1.5
    assert not torch.equal(noise["positions"][0], noise["positions"][1])


@pytest.mark.parametrize("name", ["conformers", "joint", "gdm"])
def test_variants_of_every_kind_of_network(trained, tmp_path, name):
    """Also in a file; a network for conformers keeps elements and bonds."""
    molecules = [embedded("CCO"), embedded("CN")]
    drawn, notes = draw(trained[name], tmp_path / "a.h5", like=molecules, strength=0.2, steps=10)
    assert drawn.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert drawn.sizes.tolist() == [9, 9, 9, 7, 7, 7]
    for k, molecule in enumerate(drawn):
        centre = molecules[k // 3].GetConformer().GetPositions().mean(axis=0)
        np.testing.assert_allclose(molecule.positions.mean(axis=0), centre, atol=1e-3)
    assert "of 6 variants are valid" in notes[0]
    if name == "conformers":
        assert notes[0] == (
            "6 of 6 variants are valid, and 6 the molecule itself; mean Tanimoto similarity to it: "
            "1.00 (Morgan fingerprints)"
        )


# -- bad input ----------------------------------------------------------------------------------


def test_input_that_is_not_possible(trained, tmp_path):
    bare = Chem.MolFromSmiles("CCO")
    rdDistGeom.EmbedMolecule(bare)
    (tmp_path / "bad.smi").write_text("CCO\nC(\n")
    (tmp_path / "empty.smi").write_text("smiles\n")
    (tmp_path / "table.csv").write_text("name,structure\nx,CCO\n")
    charged = embedded("C[NH3+]")
    charged.GetAtomWithIdx(1).SetFormalCharge(2)
    for name, options, message in (
        ("joint", {"smiles": "C("}, r"--smiles: RDKit cannot parse 'C\(' as a SMILES"),
        ("joint", {"smiles": "CN(C)(C)C"}, "--smiles: RDKit refuses 'CN.*valence"),
        ("joint", {"smiles": "CC.O"}, "has 2 fragments.*; draw conformers of one of them"),
        ("joint", {"smiles": ["CC", ""]}, "--smiles: number 2: no SMILES"),
        ("joint", {"smiles": []}, "holds no SMILES"),
        ("joint", {"smiles": "C->[Fe]"}, "bond of atoms 1 and 2 has no order"),
        ("joint", {"smiles": tmp_path / "bad.smi"}, "bad.smi: line 2: RDKit cannot parse"),
        ("joint", {"smiles": tmp_path / "empty.smi"}, "empty.smi holds no SMILES"),
        ("joint", {"smiles": tmp_path / "none.smi"}, "none.smi"),
        ("joint", {"smiles": str(tmp_path / "table.csv")}, "no column 'smiles'.*call that of the"),
        ("joint", {"smiles": "C[Si](C)C"}, r"--smiles C\[Si\].*generates no Si; choose among H, C"),
        ("joint", {"smiles": "[O-][N+2]"}, r"formal charge of \+2.*knows those from -1 to \+1"),
        ("gdm", {"smiles": "CCO"}, "has no bonds.*another with --checkpoint"),
        ("conformers", {}, "draws positions of given molecules; name them with --smiles or --like"),
        ("conformers", {"formula": "CH4"}, "name them with --smiles or --like"),
        ("gdm", {"like": embedded("C[SiH3]")}, "--like molecule 1: .* generates no Si"),
        ("joint", {"like": charged}, r"--like molecule 1 has a formal charge of \+2"),
        ("gdm", {"like": [embedded("CC"), bare]}, "--like molecule 2 lacks hydrogens; add them"),
        ("gdm", {"like": Chem.MolFromSmiles("C")}, "--like: molecule 1: no coordinates"),
        ("gdm", {"like": [3]}, "--like: molecule 1 is int; give paths or RDKit molecules"),
        ("gdm", {"like": []}, "--like: there is no molecule"),
        ("gdm", {"like": tmp_path / "none.sdf"}, "none.sdf"),
        ("gdm", {"like": bare, "smiles": "C"}, "--like does not go with --smiles"),
        ("gdm", {"strength": 0.5}, "--strength needs --like"),
        ("gdm", {"like": embedded("CC"), "strength": 0.0}, "--strength 0: expected a number above"),
        ("gdm", {"like": embedded("CC"), "strength": 1.5}, "--strength 1.5: expected a number"),
        ("gdm", {"like": embedded("CC"), "strength": 0.01}, "--strength 0.01 is below the lowest"),
    ):
        with pytest.raises(InputError, match=message):
            generator_of(trained[name], **options)


def test_xyz_files_get_bonds_of_their_distances(trained, tmp_path):
    molecule = from_rdkit([embedded("CCO")])[0]
    lines = [
        f"{'XHXXXXCXO'[z]} {x} {y} {w}"
        for z, (x, y, w) in zip(
            molecule.atomic_numbers.tolist(), molecule.positions.tolist(), strict=True
        )
    ]
    (tmp_path / "in.xyz").write_text("\n".join(["9", "", *lines]) + "\n")
    options = options_of(count=1, like=tmp_path / "in.xyz")
    assert options["like"][0].source == "in.xyz: record 1"
    assert not options["like"][0].bonds
    drawn, _ = draw(trained["conformers"], tmp_path / "a.h5", like=tmp_path / "in.xyz", steps=5)
    assert {identify(m).smiles for m in drawn} == {"CCO"}


def test_options_are_those_of_the_registry():
    read = read_controls({"smiles": "CCO", "count": 2})
    control = build_control(dict(SYSTEM.sampling) | read | {"count": 2})
    assert control.options == {"smiles": ["CCO"]}
    assert control.provenance() == {"conformers_of": "CCO"}


def test_after_training_the_next_command_names_a_molecule():
    for config, end in (("qm9_jodo_conformers_cpu", " --smiles CCO"), ("qm9_jodo_cpu", " run")):
        assert SYSTEM.next_command(load_config(config), "run").endswith(end)
