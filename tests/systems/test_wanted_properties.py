"""Molecules with wanted properties: what is asked, of which size, in which range, how closely."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from runs import CPU, tiny

import molgen_energy
from molgen_energy.api.sample import sample_to
from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules, Property, offsets_from_sizes
from molgen_energy.diffusion.guidance import guidance_name
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.errors import InputError
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.molecules.condition import PropertyCondition, wanted_ranges
from molgen_energy.systems.molecules.control.composition import Composition
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train

MANY = RandomNumbers(0, torch.arange(2000))


@pytest.fixture(scope="module")
def condition():
    """Molecules of 5 to 24 atoms: alpha is 4 for each atom, mu is anything from 0 to 10."""
    rng = np.random.default_rng(0)
    atoms = rng.integers(5, 25, 1500)
    values = np.stack([4.0 * atoms + rng.normal(0, 0.1, 1500), rng.uniform(0, 10, 1500)], axis=1)
    return PropertyCondition.fit(["alpha", "mu"], ["bohr^3", "debye"], values, atoms, seed=0)


# -- values ---------------------------------------------------------------------------------------


def test_all_properties_come_from_one_training_molecule_of_the_size(condition):
    atoms = torch.arange(5, 25).repeat(100)
    values = condition.values_for(None, MANY, atoms).numpy()
    stored = {tuple(row): size for row, size in zip(condition.values, condition.atoms, strict=True)}
    assert [stored[tuple(row)] for row in values] == atoms.tolist()
    assert len(np.unique(values[atoms == 9, 1])) > 0.8 * (condition.atoms == 9).sum()
    # A size that no training molecule has takes the nearest one.
    far = condition.values_for(None, RandomNumbers(0, torch.arange(50)), torch.full((50,), 90))
    assert {stored[tuple(row)] for row in far.numpy()} == {24}


def test_ranges_are_uniform_single_values_exact_and_others_unknown(condition):
    values = condition.values_for({"mu": (0.1, 0.1)}, MANY, None).numpy()
    assert np.isnan(values[:, 0]).all() and (values[:, 1] == 0.1).all()
    values = condition.values_for({"alpha": (30, 50), "mu": (2, 4)}, MANY, None).numpy()
    for column, (low, high) in zip(values.T, ((30, 50), (2, 4)), strict=True):
        counts = np.histogram(column, 10, (low, high))[0]
        assert counts.sum() == 2000 and abs(counts - 200).max() < 60  # four standard deviations
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.08
    # The value of a molecule depends on its number alone.
    alone = RandomNumbers(0, torch.tensor([700]))
    assert (condition.values_for({"mu": (2, 4)}, alone, None)[0, 1] == values[700, 1]).all()


def test_a_name_alone_draws_its_values_from_training_molecules(condition):
    atoms = torch.full((2000,), 12)
    values = condition.values_for({"mu": None}, MANY, atoms).numpy()
    assert np.isnan(values[:, 0]).all()
    assert set(values[:, 1]) == set(condition.values[condition.atoms == 12, 1])
    mixed = condition.values_for({"mu": None, "alpha": (50.0, 50.0)}, MANY, atoms).numpy()
    assert (mixed[:, 0] == 50).all() and (mixed[:, 1] == values[:, 1]).all()


def test_sizes_are_those_of_training_molecules_with_about_such_properties(condition):
    sizes = condition.sizes_for({"alpha": (60.0, 60.0)}, MANY)
    assert set(sizes.tolist()) == {15}
    ranged = condition.sizes_for({"alpha": (40.0, 80.0)}, MANY).numpy()
    asked = condition.values_for({"alpha": (40.0, 80.0)}, MANY, None)[:, 0].numpy()
    assert abs(4 * ranged - asked).max() < 4.5
    # A property that says nothing of the size leaves all sizes.
    any_size = condition.sizes_for({"mu": (5.0, 5.0)}, MANY).numpy()
    near = condition.atoms[np.argsort(np.abs(condition.values[:, 1] - 5))[:30]]
    assert Counter(any_size).keys() == set(near)
    assert condition.sizes_for({"mu": None}, MANY) is None
    assert replace(condition, atoms=None).sizes_for({"alpha": (60.0, 60.0)}, MANY) is None


# -- ranges ---------------------------------------------------------------------------------------


def test_values_outside_of_the_training_range(condition):
    low, high = condition.lowest[1], condition.highest[1]
    width = high - low
    assert condition.check({"mu": (low, high), "alpha": None}) == ()
    (note,) = condition.check({"mu": (high - 1, high + 0.9 * width)})
    assert f"training molecules' range, {low:g} to {high:g} debye; the network has not" in note
    assert len(condition.check({"mu": (low - 0.5 * width,) * 2, "alpha": (1.0, 70.0)})) == 2
    for far in ((high + 1.1 * width,) * 2, (low - 1.1 * width, high)):
        with pytest.raises(InputError, match=rf"range, {low:g} to {high:g} debye, by more than"):
            condition.check({"mu": far})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"mue": (1.0, 1.0)},
            r"--where unknown property 'mue'; did you mean 'mu'\? \(valid: alpha",
        ),
        ({"mu": (2.0, 1.0)}, "--where mu=2:1: expected a finite number, or a range"),
        ({"mu": (float("nan"),) * 2}, "--where mu=nan:nan: expected a finite number"),
        ({"mu": (1.0, float("inf"))}, "--where mu=1:inf: expected a finite number"),
    ],
)
def test_bad_wishes(condition, where, message):
    with pytest.raises(InputError, match=message):
        condition.check(where)


@pytest.mark.parametrize("value", ["high", (1, 2, 3), (), ("a", 2), {"mu": 1}])
def test_wishes_are_numbers_or_pairs(value):
    assert wanted_ranges({"gap": 0.2, "mu": (1, 2), "r2": None}) == {
        "gap": (0.2, 0.2), "mu": (1.0, 2.0), "r2": None,
    }  # fmt: skip
    with pytest.raises(
        InputError, match=r"where: gap is .*expected a number, or its range such as"
    ):
        wanted_ranges({"gap": value})


# -- sampling -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(molecules, tmp_path_factory):
    """A file of 90 molecules with two properties."""
    few = molecules.select(np.arange(90))
    gap = 0.2 + 0.05 * np.random.default_rng(0).standard_normal(90)
    properties = {"gap": Property(gap, "hartree"), "size": Property(1.0 * few.sizes, "")}
    path = tmp_path_factory.mktemp("data") / "few.h5"
    with MoleculeWriter(path, source="few") as writer:
        writer.append(replace(few, properties=properties))
    return path


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run that knows both, after some steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(
        data__path=str(data), process__steps=10, training__steps=10, training__lr=1e-2,
        condition__name="properties", condition__properties=["gap", "size"],
    )  # fmt: skip
    train(MoleculeTask(config, CPU), folder)
    return folder


def positions(checkpoint, count=3, **options):
    generator = MoleculeGenerator(checkpoint, CPU, sizes=(9, 9), **options)
    return generator.draw(torch.arange(count)).positions


def test_guidance_changes_molecules_and_1_does_not(run):
    checkpoint = load_checkpoint(run)
    where = {"gap": (0.3, 0.3)}
    plain, one, twice = (
        positions(checkpoint, where=where, guidance=scale) for scale in (1.0, 1.0, 2.0)
    )
    assert (plain == one).all() and abs(plain - twice).max() > 1e-4
    none = positions(checkpoint, where=where, guidance=0.0)
    np.testing.assert_allclose(none, positions(checkpoint, where={}), atol=1e-4)
    with pytest.raises(InputError, match="--guidance -1: expected a number from 0"):
        positions(checkpoint, where=where, guidance=-1.0)


def test_guided_molecules_do_not_depend_on_their_batch(run):
    generator = MoleculeGenerator(
        load_checkpoint(run), CPU, where={"gap": (0.1, 0.3)}, guidance=3.0
    )
    together, alone = generator.draw(torch.arange(6)), generator.draw(torch.tensor([4]))
    np.testing.assert_allclose(together[4].positions, alone[0].positions, atol=1e-3)
    assert (together[4].atomic_numbers == alone[0].atomic_numbers).all()
    asked = (m.properties["condition_gap"].values for m in (together, alone))
    assert next(asked)[4] == next(asked)[0]


def test_properties_go_with_a_formula(run):
    """Which then gives the size, also where properties come from molecules of that size."""
    generator = MoleculeGenerator(
        load_checkpoint(run),
        CPU,
        where={"gap": (0.1, 0.3), "size": None},
        guidance=2.0,
        control=Composition({"C": 3, "H": 8, "O": 1}),
    )
    drawn = generator.draw(torch.arange(3))
    assert [sorted(m.atomic_numbers) for m in drawn] == [[1] * 8 + [6] * 3 + [8]] * 3
    assert abs(drawn.properties["condition_size"].values - 12).max() <= 3
    assert len(set(drawn.properties["condition_gap"].values)) == 3


def test_networks_that_were_never_trained_without_properties_are_not_guided(data, tmp_path):
    config = tiny(
        data__path=str(data), process__steps=10, training__steps=1, condition__dropout=0.0,
        condition__name="properties", condition__properties=["gap"],
    )  # fmt: skip
    train(MoleculeTask(config, CPU), tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    with pytest.raises(InputError, match=r"never trained without its properties; leave it out, or"):
        MoleculeGenerator(checkpoint, CPU, where={"gap": (0.2, 0.2)}, guidance=2.0)
    plain = tiny(process__steps=10, training__steps=1)
    train(MoleculeTask(plain, CPU), tmp_path / "plain")
    with pytest.raises(InputError, match="trained without properties; leave it out"):
        MoleculeGenerator(load_checkpoint(tmp_path / "plain"), CPU, guidance=2.0)


def pull(positions, mask, numbers):
    """Towards the origin, at nitrogen alone."""
    assert positions.shape == (*mask.shape, 3) and ((numbers > 0) == mask).all()
    return positions.square().sum(dim=2).where(numbers == 7, 0).sum(dim=1)


def other_pull(positions, mask, numbers):
    return pull(positions, mask, numbers)


def test_a_function_guides_molecules_without_training(run):
    checkpoint = load_checkpoint(run)
    free, guided = (
        MoleculeGenerator(checkpoint, CPU, sizes=(6, 9), guidance=guidance).draw(torch.arange(8))
        for guidance in (1.0, pull)
    )
    assert abs(free.positions - guided.positions).max() > 1e-2
    generator = MoleculeGenerator(checkpoint, CPU, sizes=(6, 9), guidance=pull)
    alone = generator.draw(torch.tensor([5]))
    np.testing.assert_allclose(alone[0].positions, guided[5].positions, rtol=1e-4, atol=1e-3)


def test_files_say_what_was_asked(run, tmp_path):
    path = tmp_path / "a.sdf"
    where = {"gap": (0.2, 0.25), "size": 9}
    sample_to(path, 3, checkpoint=run, where=where, guidance=2, steps=2, device="cpu")
    text = path.read_text()
    assert "gap=0.2:0.25, size=9" in text and "<guidance>" in text
    selection = MoleculeReader(path).detect_fields()
    for record in MoleculeReader(path, selection=selection):
        assert 0.2 <= record.properties["condition_gap"] <= 0.25
        assert record.properties["condition_size"] == 9
        assert "guidance" not in record.properties


def test_jobs_resume_with_what_was_asked(run, tmp_path, monkeypatch):
    def begin(name, **options):
        generator = MoleculeGenerator(load_checkpoint(run), CPU, **options)
        with monkeypatch.context() as broken:
            broken.setattr("molgen_energy.systems.molecules.sampling._SamplingRun._write", None)
            with pytest.raises(TypeError):
                sample_to_file(generator, 4, tmp_path / name, NoCallback(), batch_size=2)

    wanted = {"gap": (0.2, 0.25), "size": None}
    begin("a.h5", where=wanted, guidance=2.0)
    resume = {"resume": tmp_path / "a.h5", "device": "cpu"}
    with pytest.raises(InputError, match=r"begun with gap=0\.2:0\.25, size; --resume needs no"):
        sample_to(where={"gap": 0.2}, **resume)
    with pytest.raises(InputError, match=r"--guidance cannot change: .* begun with 2\.0"):
        sample_to(guidance=3.0, **resume)
    manifest = tmp_path / "a.h5.shards" / "manifest.yaml"
    assert yaml.safe_load(manifest.read_text())["where"] == {"gap": [0.2, 0.25], "size": None}
    sample_to(**resume)
    expected = MoleculeGenerator(load_checkpoint(run), CPU, where=wanted, guidance=2.0)
    with MoleculeFile(tmp_path / "a.h5") as file:
        drawn = file.load()
        assert file.provenance["where"] == "gap=0.2:0.25, size"
    np.testing.assert_allclose(drawn.positions, expected.draw(torch.arange(4)).positions, atol=1e-3)

    begin("b.h5", guidance=pull)
    name = guidance_name(pull)
    resume = {"resume": tmp_path / "b.h5", "device": "cpu"}
    with pytest.raises(InputError, match=f"was begun with the {name}; give it to"):
        sample_to(**resume)
    with pytest.raises(InputError, match="--guidance cannot change"):
        sample_to(guidance=other_pull, **resume)
    assert sample_to(guidance=pull, **resume).written == 4


def test_an_interrupted_job_of_an_earlier_version(run, tmp_path, monkeypatch):
    """It has single values, as `condition`."""
    generator = MoleculeGenerator(load_checkpoint(run), CPU, where={"gap": (0.2, 0.2)})
    with monkeypatch.context() as broken:
        broken.setattr("molgen_energy.systems.molecules.sampling._SamplingRun._write", None)
        with pytest.raises(TypeError):
            sample_to_file(generator, 4, tmp_path / "a.h5", NoCallback(), batch_size=2)
    manifest = tmp_path / "a.h5.shards" / "manifest.yaml"
    values = yaml.safe_load(manifest.read_text())
    values["condition"] = {name: low for name, (low, _) in values.pop("where").items()}
    del values["guidance"]
    manifest.write_text(yaml.safe_dump(values))
    assert sample_to(resume=tmp_path / "a.h5", device="cpu").written == 4


def test_python_warns_of_values_outside_of_the_training_range(run):
    with pytest.warns(UserWarning, match=r"--where gap=0\.4 is outside of the training molecules'"):
        molecules = molgen_energy.sample(1, checkpoint=run, where={"gap": 0.4}, device="cpu")
    assert len(molecules) == 1


# -- learning -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs_of_atoms(tmp_path_factory):
    """A little network of two carbon atoms (q about 0) or two nitrogen atoms (q about 1)."""
    rng, folder, count = np.random.default_rng(0), tmp_path_factory.mktemp("learning"), 200
    positions = np.array([[-0.7, 0, 0], [0.7, 0, 0]]) + 0.03 * rng.standard_normal((count, 2, 3))
    nitrogen = rng.random(count) < 0.5
    properties = {
        "q": Property(nitrogen + 0.1 * rng.standard_normal(count), ""),
        "other": Property(rng.standard_normal(count), ""),
    }
    molecules = Molecules(
        positions.reshape(-1, 3).astype(np.float32),
        np.where(nitrogen, 7, 6).astype(np.uint8).repeat(2),
        offsets_from_sizes(np.full(count, 2)),
        properties=properties,
    )
    with MoleculeWriter(folder / "data.h5", source="two kinds") as writer:
        writer.append(molecules)
    config = tiny(
        data__path=str(folder / "data.h5"), process__steps=20, model__name="gdm_pairs",
        model__width=32, training__optimizer="muon", training__muon_lr=2e-2, training__lr=5e-3,
        training__steps=150, training__batch_size=32, training__warmup_steps=10,
        training__ema_decay=0.97, training__checkpoint_every=1000, training__log_every=100,
        training__validate_every=1000,
        condition__name="properties", condition__properties=["q", "other"],
    )  # fmt: skip
    train(MoleculeTask(config, CPU), folder / "run")
    return load_checkpoint(folder / "run")


def test_molecules_have_what_they_are_asked_for(pairs_of_atoms):
    """More nitrogen with a higher q, and more so with guidance; without q, some of both."""

    def nitrogen(where, guidance=1.0):
        generator = MoleculeGenerator(pairs_of_atoms, CPU, where=where, guidance=guidance)
        return float((generator.draw(torch.arange(128)).atomic_numbers == 7).mean())

    low, any_q, high = (nitrogen(q) for q in ({"q": (0.0, 0.0)}, {}, {"q": (1.0, 1.0)}))
    assert low + 0.1 < any_q < high - 0.1
    guided_low, guided_high = (nitrogen({"q": (q, q)}, 3.0) for q in (0.0, 1.0))
    assert guided_high - guided_low > high - low + 0.1
    # It has learnt to ignore the other property.
    assert abs(nitrogen({"q": (1.0, 1.0), "other": (-1.0, 1.0)}) - high) < 0.15


# -- commands -------------------------------------------------------------------------------------


def test_commands_take_properties(data, cli_here, tmp_path):
    few = ("--config", "quick", "--set", "process.steps=10", "--set", "model.width=16")
    begun = ("train", "--data", data, "-o", "run", "--steps", 1, *few)
    cli_here(*begun, "--condition", "gap,size", "--set", "training.batch_size=4")
    state = yaml.safe_load((tmp_path / "run/checkpoints/last/state.yaml").read_text())
    assert state["condition"]["names"] == ["gap", "size"]
    outside = state["condition"]["highest"][0] + 0.01
    sample = ("sample", "--checkpoint", "run", "-n", 2, "--overwrite", "-o", "a.xyz")
    done = cli_here(*sample, "--where", f"gap={outside}", "--where", "size=8:9", "--guidance", 2)
    assert "is outside of the training molecules' range" in done.stderr
    wanted = f"gap={outside:g} hartree, size=8:9"
    assert f"22 network evaluations each, {wanted}, guidance 2" in done.stderr
    cli_here(*sample, "--where", "size=17", "--where", "gap")
    sizes = [len(record.atomic_numbers) for record in MoleculeReader(tmp_path / "a.xyz")]
    assert set(sizes) == {17}
    for arguments, message in {
        ("--where", "gap=low"): "--where gap=low: expected NAME=VALUE such as gap=0.2, NAME=LOW",
        ("--where", "gap=1:"): "--where gap=1:: expected NAME=VALUE",
        ("--where", "gop"): "unknown property 'gop'; did you mean 'gap'? (valid: gap, size)",
        ("--where", "gap=9"): "hartree, by more than its width; ask for values in it",
        ("--where", "gap", "--where", "gap=0.2"): "gap is named twice",
    }.items():
        failed = cli_here(*sample, *arguments, code=2)
        assert message in failed.stderr and failed.stderr.count("\n") == 1
    for names in ("gap,gap", "gap,", ""):
        failed = cli_here(*begun, "--condition", names, code=2)
        assert f"--condition {names}: expected different names of properties" in failed.stderr
    failed = cli_here("train", "--data", data, *few, "--condition", "gop", code=2)
    assert "unknown property 'gop'; did you mean 'gap'? (valid: gap, size)" in failed.stderr
