"""Fixed atoms (`--keep`), formulas and elements: what is fixed, what is refused, what stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from runs import CPU

import molgen_energy
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import from_rdkit
from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import AROMATIC
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.molecules.control import build_control
from molgen_energy.systems.molecules.control.base import Record
from molgen_energy.systems.molecules.control.composition import parse_formula
from molgen_energy.systems.molecules.control.fragments import OpenValences
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.systems.molecules.system import MoleculeSystem
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training.checkpoint import load_checkpoint, save_checkpoint

SYSTEM = MoleculeSystem()
TINY = {
    "model.layers": 1, "model.width": 16, "training.batch_size": 8, "training.warmup_steps": 1,
    "training.validation_molecules": 8, "training.low_precision": False,
}  # fmt: skip


def fragment(smiles: str, drop: int, shift: float = 0.0) -> Chem.Mol:
    """An embedded molecule without the hydrogens of its first `drop` hydrogen atoms, Kekulised."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(molecule, randomSeed=7)
    Chem.Kekulize(molecule, clearAromaticFlags=True)
    edited = Chem.RWMol(molecule)
    hydrogens = [atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetAtomicNum() == 1]
    for index in sorted(hydrogens[:drop], reverse=True):
        edited.RemoveAtom(index)
    conformer = edited.GetConformer()
    conformer.SetPositions(conformer.GetPositions() + shift)
    return edited.GetMol()


@pytest.fixture(scope="module")
def networks(molecules, tmp_path_factory):
    """With random weights: one with bonds and charges, and one with elements and positions."""
    some = perceive(molecules.select(np.arange(60)))
    charges = np.random.default_rng(0).integers(-1, 2, len(some.atomic_numbers))
    data = tmp_path_factory.mktemp("data") / "bonded.h5"
    with MoleculeWriter(data, source="test") as writer:
        writer.append(replace(some, formal_charges=charges.astype(np.int8)))
        writer.set_split((np.arange(60) % 10 == 0).astype(np.uint8))

    def made(name, **changes):
        config = load_config(name).replaced({"data.path": str(data)} | TINY | changes)
        task = MoleculeTask(config, CPU)
        path = tmp_path_factory.mktemp("runs") / name
        state = {"progress": {"step": 0}, **task.state}
        save_checkpoint(path, task.config, state, {"ema": task.model.state_dict()})
        return load_checkpoint(path)

    return {
        "jodo": made("qm9_jodo_cpu", **{"model.heads": 4}),
        "gdm": made("quick", **{"process.steps": 10}),
        "flow": made("quick", **{"process.name": "flow_matching", "process.steps": 10}),
    }


def options_of(**options):
    if isinstance(sizes := options.get("n_atoms"), int):
        options["n_atoms"] = sizes, sizes
    return dict(SYSTEM.sampling) | SYSTEM.read_options(options)


def generator_of(checkpoint, count=3, **options):
    sampling = SYSTEM.generator(checkpoint, CPU, options_of(count=count, **options))
    return sampling._generator, sampling.count


def drawn_by(checkpoint, **options):
    generator, count = generator_of(checkpoint, **options)
    return generator.draw(torch.arange(count))


# -- fixed atoms ---------------------------------------------------------------------------------

SAMPLED = [
    ("gdm", "ancestral"), ("gdm", "ddim"), ("gdm", "dpm++"), ("gdm", "sde-dpm++"), ("gdm", "heun"),
    ("flow", "euler"), ("flow", "heun"), ("jodo", "ancestral"), ("jodo", "dpm++"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "sampler"), SAMPLED)
def test_fixed_atoms_come_out_where_they_were(networks, network, sampler):
    """First and in their order, by all samplers, with bonds and charges if the network has them."""
    pyrrole = fragment("c1cc[nH]c1", 2, shift=40.0)
    given = from_rdkit([pyrrole])
    molecules = drawn_by(networks[network], keep=pyrrole, n_atoms=(3, 6), sampler=sampler, steps=4)
    kept = len(given.positions)
    assert set(molecules.sizes - kept) <= {3, 4, 5, 6}
    for molecule in molecules:
        assert (molecule.positions[:kept] == given.positions).all()
        assert (molecule.atomic_numbers[:kept] == given.atomic_numbers).all()
        assert molecule.properties["fixed_atoms"] == kept
        if network == "jodo":
            assert (molecule.formal_charges[:kept] == given.formal_charges).all()
            inside = (molecule.bond_index < kept).all(axis=1)
            ours = {
                (*sorted(pair), order)
                for pair, order in zip(
                    molecule.bond_index[inside].tolist(),
                    molecule.bond_order[inside].tolist(),
                    strict=True,
                )
            }
            theirs = {
                (*sorted(pair), order)
                for pair, order in zip(
                    given.bonds.index.tolist(), given.bonds.order.tolist(), strict=True
                )
            }
            assert ours == theirs


def test_new_atoms_move_with_the_fragment(networks):
    """In another place the molecule is the same; nothing else depends on the frame."""
    near, far = (
        drawn_by(networks["gdm"], keep=fragment("CCO", 1, shift), n_atoms=4, steps=4)
        for shift in (0.0, 25.0)
    )
    np.testing.assert_allclose(far.positions - near.positions, 25.0, atol=1e-3)
    assert (far.atomic_numbers == near.atomic_numbers).all()


def test_a_molecule_depends_on_its_number_alone(networks):
    """Not on its batch, whose molecules are larger, nor on other records."""
    keep = [fragment("CCO", 1), fragment("C", 1, shift=4.0)]
    options = {"keep": keep, "steps": 4, "resample": 3, "sampler": "ancestral"}
    generator, _ = generator_of(networks["gdm"], count=5, **options)
    together = generator.draw(torch.arange(5))
    for number in range(5):
        alone = generator.draw(torch.tensor([number]))
        one = together.select(np.array([number]))
        assert (alone.atomic_numbers == one.atomic_numbers).all()
        np.testing.assert_allclose(alone.positions, one.positions, atol=1e-3)


def test_records_of_files_go_together(networks, tmp_path):
    """Record k of one file with record k of the other; a file of one record goes with all."""
    ends = [fragment("CC", 1), fragment("CO", 1), fragment("CN", 1)]
    for name, some in (("a", ends), ("b", [fragment("C", 1, shift=6.0)])):
        with Chem.SDWriter(str(tmp_path / f"{name}.sdf")) as writer:
            for molecule in some:
                writer.write(molecule)
    keep = [tmp_path / "a.sdf", tmp_path / "b.sdf"]
    generator, count = generator_of(networks["gdm"], count=2, keep=keep, n_atoms=3, steps=2)
    assert count == 6
    molecules = generator.draw(torch.arange(count))
    assert molecules.properties["fragment_record"].values.tolist() == [1, 1, 2, 2, 3, 3]
    for number, molecule in enumerate(molecules):
        end = from_rdkit([ends[number // 2]])
        kept = len(end.positions)
        np.testing.assert_allclose(molecule.positions[:kept], end.positions, atol=1e-4)
        assert molecule.properties["fixed_atoms"] == kept + 4
    with Chem.SDWriter(str(tmp_path / "b.sdf")) as writer:
        for molecule in ends[:2]:
            writer.write(molecule)
    with pytest.raises(InputError, match=r"b\.sdf: record 1 is one of 2 records.* has 3; files"):
        options_of(keep=[tmp_path / "b.sdf", tmp_path / "a.sdf"][::-1])


def test_sizes_without_a_number_of_new_atoms_are_those_of_the_data(networks):
    generator, _ = generator_of(networks["gdm"], keep=fragment("CCO", 1))
    sizes = generator.sizes(torch.arange(4000)).numpy()
    histogram = generator.checkpoint.state["size_histogram"]
    allowed = {size: count for size, count in histogram.items() if size > 8 and count}
    found = Counter(sizes.tolist())
    assert set(found) <= set(allowed)
    for size, count in allowed.items():
        expected = count / sum(allowed.values())
        assert found[size] / 4000 == pytest.approx(expected, abs=4 * (expected / 4000) ** 0.5)


def test_a_smarts_chooses_atoms(networks):
    """All matches together, with the bonds of the whole molecule."""
    biphenyl = fragment("c1ccccc1-c1ccccc1O", 0)
    options = options_of(keep=biphenyl, keep_smarts="c1ccccc1", n_atoms=3)
    record = options["keep"][0]
    assert [line.split()[0] for line in record.atoms] == ["C"] * 12
    assert len(record.bonds) == len(record.aromatic) + 1 == 13
    orders = record.in_aromatic_form.bond_order
    assert (orders == AROMATIC).sum() == 12
    assert (record.molecule.bond_order == 2).sum() == 6
    control = build_control(options)
    assert control.provenance()["fixed_smarts"] == "c1ccccc1"
    with pytest.raises(InputError, match=r"'?--keep-smarts.* matches nothing in molecule 1"):
        options_of(keep=biphenyl, keep_smarts="[Br]")
    with pytest.raises(InputError, match="--keep-smarts c1cc: RDKit does not read it as SMARTS"):
        options_of(keep=biphenyl, keep_smarts="c1cc")
    with pytest.raises(InputError, match="--keep-smarts: expected a text of at most 5,000"):
        options_of(keep=biphenyl, keep_smarts="c" * 5001)
    with pytest.raises(InputError, match="--keep-smarts needs --keep"):
        options_of(keep_smarts="c")


@pytest.mark.parametrize(
    ("atom", "bonds", "message"),
    [
        ("C 0 0 0 999", [], "a charge too large"),
        ("C 1e30 0 0 0", [], "coordinates or a charge too large"),
        ("C 0 0 0 0", ["1 1 1"], "each pair of two atoms once"),
        ("C 0 0 0 0", ["1 2 1", "2 1 1"], "each pair of two atoms once"),
    ],
)
def test_records_that_were_edited_by_hand(atom, bonds, message):
    with pytest.raises(ValueError, match=message):
        Record(source="a.sdf", atoms=[atom, "C 0 0 1.5 0"], bonds=bonds)


def test_far_away_fragments_are_refused():
    """Single precision would round their coordinates."""
    with pytest.raises(InputError, match="molecule 1: it is more than 100,000 Å from the origin"):
        options_of(keep=fragment("CCO", 1, shift=3e5))


def test_a_record_holds_the_molecule_to_the_last_bit():
    positions = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * 1e3
    molecule = replace(from_rdkit([fragment("C", 1)])[0], positions=positions)
    record = Record.of_molecule(molecule, "here", np.array([False, True, False]))
    again = Record.model_validate(record.model_dump(mode="json"))
    assert again == record
    assert (again.molecule.positions == positions).all()
    assert (again.molecule.bond_index == molecule.bond_index).all()
    assert again.aromatic == [2]


def test_what_can_not_be_kept_is_refused(networks, tmp_path):
    gdm, jodo = networks["gdm"], networks["jodo"]
    with pytest.raises(InputError, match="generates no Br; choose among H, C, N, O"):
        generator_of(gdm, keep=fragment("CBr", 1))
    with pytest.raises(
        InputError,
        match=r"atom 1 of molecule 1 and atom 1 of molecule 1 are "
        r"0\.00 Å apart; fixed atoms must not overlap",
    ):
        options_of(keep=[fragment("CC", 1), fragment("CC", 1)])
    with pytest.raises(InputError, match=r"every valence is filled.*remove the hydrogens"):
        options_of(keep=fragment("CC", 0))
    with pytest.raises(
        InputError,
        match=r"has 91 atoms, and the molecules that .* was trained on "
        r"have at most \d+; .*--n-atoms",
    ):
        generator_of(gdm, keep=fragment("C" * 30, 1))
    with pytest.raises(InputError, match=r"formal charge of \+2, and .* knows those from -1 to"):
        generator_of(jodo, keep=charged("C", 2), n_atoms=3)
    (tmp_path / "bad.sdf").write_text("nothing\n")
    with pytest.raises(InputError, match=r"bad\.sdf"):
        options_of(keep=tmp_path / "bad.sdf")
    with pytest.raises(InputError, match=r"absent\.sdf"):
        options_of(keep=tmp_path / "absent.sdf")
    with pytest.raises(InputError, match="--keep: there is no fragment"):
        options_of(keep=[])
    with pytest.raises(InputError, match="--keep does not go with --like; leave one of them out"):
        options_of(keep=fragment("CC", 1), like=fragment("CC", 0))
    with pytest.raises(InputError, match="--resample has no effect without fixed values"):
        options_of(resample=3)
    with pytest.raises(InputError, match="--resample 3 repeats random steps, and heun takes none"):
        generator_of(gdm, keep=fragment("CC", 1), resample=3, sampler="heun")


def charged(smiles: str, charge: int) -> Chem.Mol:
    molecule = fragment(smiles, 1)
    molecule.GetAtomWithIdx(0).SetFormalCharge(charge)
    return molecule


def test_jobs_resume_without_the_file(networks, tmp_path, monkeypatch):
    """With the same molecules, and the file may have changed; its options are in the manifest."""
    path = tmp_path / "end.sdf"
    Chem.MolToMolFile(fragment("CCO", 1), str(path), kekulize=False)
    options = {"keep": path, "n_atoms": 3, "steps": 3, "elements": "C,H,O", "resample": 2}
    generator, count = generator_of(networks["gdm"], count=6, sampler="ancestral", **options)
    sample_to_file(generator, count, tmp_path / "whole.sdf", NoCallback(), batch_size=2)

    class Stops(NoCallback):
        calls = 0

        def advance(self, samples, share):
            self.calls += 1
            if self.calls == 12:
                raise KeyboardInterrupt

    generator, count = generator_of(networks["gdm"], count=6, sampler="ancestral", **options)
    sample_to_file(generator, count, tmp_path / "parts.sdf", Stops(), batch_size=2)
    path.unlink()
    begun = dict(SYSTEM.sampling_options(tmp_path / "parts.sdf"))
    begun.pop("checkpoint")
    sampling = SYSTEM.generator(networks["gdm"], CPU, begun)
    result = sampling.write(tmp_path / "parts.sdf", NoCallback(), resume=True)
    assert result.written == 6 and 0 < result.drawn < 6
    whole, parts = (tmp_path / f"{name}.sdf" for name in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()
    assert any("fixed and new atoms are one valid molecule" in note for note in result.notes)
    text = whole.read_text()
    for name, value in (("fixed", "end.sdf: record 1"), ("resample", "2"), ("elements", "H,C,O")):
        assert f">  <{name}>" in text and value in text
    first = next(iter(MoleculeReader(whole)))
    assert (first.atomic_numbers[:3] == [6, 6, 8]).all()


def test_the_share_of_valid_molecules_is_that_of_rdkit(networks, molecules):
    """Real molecules, some cut in two pieces; the count is RDKit's."""
    control = build_control(options_of(keep=fragment("C", 1)))
    some = molecules.select(np.arange(20))
    apart = some.positions.copy()
    for number in range(0, 20, 4):
        apart[some.offsets[number]] += 50
    tally = control.tally()
    tally.add(replace(some, positions=apart), np.arange(20))
    expected = 0
    for molecule in perceive(replace(some, positions=apart)):
        built = Chem.RWMol()
        for number in molecule.atomic_numbers.tolist():
            built.AddAtom(Chem.Atom(number))
        for (i, j), order in zip(molecule.bond_index.tolist(), molecule.bond_order, strict=True):
            built.AddBond(i, j, Chem.BondType.values[int(order)])
        whole = len(Chem.GetMolFrags(built)) == 1
        expected += whole and Chem.SanitizeMol(built, catchErrors=True) == 0
    assert 0 < expected <= 15
    assert tally.notes() == (
        f"in {expected} of 20 molecules ({5 * expected} %) fixed and new atoms are one valid "
        "molecule",
    )


def test_open_valences_point_to_where_an_atom_was():
    """Against the hydrogens that were removed, within 10°, but for planar nitrogen."""
    for smiles, drop in (("CCO", 1), ("c1ccoc1", 1), ("C#C", 1), ("C=O", 1), ("C", 2)):
        whole, part = fragment(smiles, 0), fragment(smiles, drop)
        molecule = from_rdkit([part])[0]
        found = OpenValences.of(molecule)
        centre = molecule.positions.mean(axis=0)
        gone = whole.GetConformer().GetPositions()
        there = part.GetConformer().GetPositions()
        gone = gone[np.abs(gone[:, None] - there).sum(axis=2).min(axis=1) > 1e-6]
        assert len(found.anchors) == 1 and len(gone) == drop
        expected = gone.mean(axis=0) - centre - found.anchors[0]
        cosine = expected @ found.directions[0] / np.linalg.norm(expected)
        assert cosine > np.cos(np.radians(10)), smiles
        distance = np.linalg.norm(found.anchors_of(4)[0] - found.anchors[0])
        assert distance == pytest.approx(1.2 + 0.45 * 2)
    # Two fragments have one anchor between them; a scaffold one at each open valence.
    two = options_of(keep=[fragment("CC", 1), fragment("CC", 1, shift=6.0)])["keep"][0].molecule
    assert len(OpenValences.of(two).anchors) == 1
    assert len(OpenValences.of(from_rdkit([fragment("c1ccccc1", 3)])[0]).anchors) == 3
    assert len(OpenValences.of(from_rdkit([fragment("c1ccccc1", 3)])[0]).anchors_of(2)) == 2


# -- formulas and elements -----------------------------------------------------------------------


@pytest.mark.parametrize(("network", "sampler"), SAMPLED)
def test_molecules_of_a_formula(networks, network, sampler):
    molecules = drawn_by(networks[network], formula="N2C3H5", sampler=sampler, steps=3)
    for molecule in molecules:
        assert Counter(molecule.atomic_numbers.tolist()) == {6: 3, 1: 5, 7: 2}


def test_a_formula_counts_fixed_atoms(networks):
    molecules = drawn_by(networks["gdm"], keep=fragment("CCO", 1), formula="C4H9NO", steps=3)
    for molecule in molecules:
        assert Counter(molecule.atomic_numbers.tolist()) == {6: 4, 1: 9, 7: 1, 8: 1}
        assert molecule.atomic_numbers[:3].tolist() == [6, 6, 8]
    with pytest.raises(InputError, match=r"--formula C1?H9O is that of the whole.* alone has 2 C"):
        generator_of(networks["gdm"], keep=fragment("CCO", 1), formula="CH9O")
    with pytest.raises(InputError, match=r"--formula C2H5O is that of --keep.*ask for more"):
        generator_of(networks["gdm"], keep=fragment("CCO", 1), formula="C2H5O")


@pytest.mark.parametrize(("network", "sampler"), SAMPLED)
def test_no_forbidden_elements(networks, network, sampler):
    """A network with random weights would take others, and the fixed oxygen stays."""
    options = {"sampler": sampler, "steps": 3, "count": 8, "n_atoms": 9}
    free = drawn_by(networks[network], **options)
    some = drawn_by(networks[network], elements="N,H", **options)
    assert set(free.atomic_numbers.tolist()) - {1, 7}
    assert set(some.atomic_numbers.tolist()) <= {1, 7}
    kept = drawn_by(networks[network], elements=["H", "N"], keep=fragment("CO", 1), **options)
    found = Counter(kept.atomic_numbers.tolist())
    assert found[8] == found[6] == 8


def test_formulas_are_parsed():
    """Against RDKit's formulas, and refused where they are none."""
    from rdkit.Chem.rdMolDescriptors import CalcMolFormula

    for smiles in ("CCO", "C1=CC=CN1", "Clc1ccccc1Br", "O", "[H][H]", "N#N", "CC(=O)[O]"):
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        counts = Counter(atom.GetSymbol() for atom in molecule.GetAtoms())
        assert parse_formula(CalcMolFormula(molecule)) == counts
    assert list(parse_formula("O2N4C3H10C")) == ["C", "H", "N", "O"]
    for text, message in (
        ("c6h6", "expected elements with numbers"), ("C2H6O+", "expected elements"),
        ("", "expected elements"), ("C2Xx", "'Xx' is no chemical element"),
        ("C0", "expected 1 to 1,000,000 atoms"), ("C99999999", "expected 1 to 1,000,000 atoms"),
        ("C(CH3)4", "expected elements with numbers"), (7, "expected a text .* found int"),
        ("H1000000000", "expected 1 to 1,000,000 atoms"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"--formula.*{message}"):
            parse_formula(text)


def test_elements_without_hydrogen_are_a_warning(networks):
    warning = "--elements C,O allows no hydrogens; with them: --elements C,O,H"
    assert generator_of(networks["gdm"], elements="O,C")[0].warnings == (warning,)
    for options in ({"elements": "C,H"}, {"elements": "C,O", "formula": "CO2"}):
        assert generator_of(networks["gdm"], **options)[0].warnings == ()


def test_elements_and_formulas_that_do_not_go(networks):
    with pytest.raises(InputError, match="generates no Br; choose among H, C, N, O"):
        generator_of(networks["gdm"], formula="C2H5Br")
    with pytest.raises(InputError, match=r"--elements Br: .* generates no Br"):
        generator_of(networks["gdm"], elements="Br")
    with pytest.raises(InputError, match="--elements: 'Q' is no chemical element; expected sym"):
        options_of(elements="C,Q")
    with pytest.raises(InputError, match=r"--elements: there is no element in \[\]"):
        options_of(elements=[])
    with pytest.raises(InputError, match="--smiles does not go with --elements"):
        options_of(elements="C,H", smiles="CCO")
    for name in ("keep", "like"):
        with pytest.raises(InputError, match=f"--{name}: molecule 1 is int; give paths or RDKit"):
            options_of(**{name: 5})
    with pytest.raises(InputError, match=r"; choose smaller ones$"):
        generator_of(networks["gdm"], formula="C900000")
    with pytest.raises(InputError, match="--formula CH4 has H, which --elements C forbids"):
        options_of(elements="C", formula="CH4")
    with pytest.raises(InputError, match="--formula does not go with --n-atoms"):
        options_of(formula="CH4", n_atoms=(5, 5))


def test_in_python(networks, tmp_path, monkeypatch):
    """`keep` takes RDKit molecules, and returns them where they were."""
    monkeypatch.chdir(tmp_path)
    end = fragment("CCN", 1, shift=3.0)
    drawn = molgen_energy.sample(
        2, checkpoint=networks["gdm"].path, keep=[end], n_atoms=3, steps=2, elements=["C", "H"]
    )
    kept = end.GetNumAtoms()
    for molecule in drawn:
        found = molecule.GetConformer().GetPositions()[:kept]
        np.testing.assert_allclose(found, end.GetConformer().GetPositions(), atol=1e-5)
        new = {atom.GetAtomicNum() for atom in list(molecule.GetAtoms())[kept:]}
        assert {symbol(number) for number in new} <= {"C", "H"}
    Chem.MolToMolFile(end, "end.sdf", kekulize=False)
    with pytest.raises(InputError, match=r"-o end\.sdf is an input of this command"):
        molgen_energy.sample(2, "end.sdf", checkpoint=networks["gdm"].path, keep="end.sdf")


def test_data_files_hold_what_was_fixed(networks, tmp_path):
    generator, count = generator_of(networks["jodo"], keep=fragment("CCO", 1), steps=2, n_atoms=2)
    sample_to_file(generator, count, tmp_path / "a.h5", NoCallback())
    with MoleculeFile(tmp_path / "a.h5") as file:
        assert file.provenance["fixed"] == "molecule 1"
        assert file.load().properties["fixed_atoms"].unit == "atoms"
