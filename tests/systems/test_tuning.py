"""The search for a sampler: that it finds the best one, and not one that only looks regular."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import CPU, tiny

from molgen_energy.api import tune
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.diffusion.samplers import SAMPLERS
from molgen_energy.diffusion.spacing import FIRST_TIME
from molgen_energy.errors import InputError
from molgen_energy.formats.yaml import load_yaml
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.molecules import tuning
from molgen_energy.systems.molecules.fields import MoleculeStatistics, build_layout
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.state import MoleculeState
from molgen_energy.systems.molecules.task import build_model
from molgen_energy.systems.molecules.tuning import (
    SamplerChoice,
    SamplerSearch,
    sampler_so_far,
)
from molgen_energy.training.checkpoint import (
    copy_for_sampling,
    load_checkpoint,
    save_checkpoint,
    store_in_state,
)
from molgen_energy.training.pretrained import write_checksums

RUN = Path(__file__).parents[1] / "data" / "run_format_2"
EVALUATIONS, COUNT = 6, 32
SPLITS = {"train": 80, "valid": 60, "test": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Few real molecules, since each candidate is compared with all of them."""
    path = tmp_path_factory.mktemp("data") / "real.h5"
    with MoleculeFile(bundled_sample()) as file:
        parts = [file.read(file.split_indices(split)[:count]) for split, count in SPLITS.items()]
    with MoleculeWriter(path, source="QM9") as writer:
        for part in parts:
            writer.append(part)
        writer.set_split(np.repeat([0, 1, 2], list(SPLITS.values())))
    return path


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "run"))


class Drawn:
    """Draws real molecules, displaced by an error in Å that depends on the sampler.

    `regular` of them are one and the same molecule, without an error.
    """

    def __init__(self, monkeypatch, error, regular=lambda sampler: 0.0):
        with MoleculeFile(bundled_sample()) as file:
            real = file.read(file.split_indices("train"))
        self.calls = []

        def draw(generator, numbers, advance):
            self.calls += numbers.tolist()
            for _ in range(generator.sampler.evaluations):
                advance()
            which = (200 + numbers.numpy()) % 900
            share = regular(generator.sampler)
            which[numbers.numpy() % 10 < 10 * share] = 0
            random = np.random.default_rng(int(numbers.sum()))
            molecules = real.select(which)
            shift = random.normal(0, 1, molecules.positions.shape) * error(generator.sampler)
            return Molecules(
                (molecules.positions + shift).astype("f4"),
                molecules.atomic_numbers,
                molecules.offsets,
            )

        monkeypatch.setattr(MoleculeGenerator, "draw", draw)
        monkeypatch.setattr(tuning, "_GRID", tuning._GRID[3:5])  # fewer, for the sake of time
        monkeypatch.setattr(tuning, "_OTHER_LAST", tuning._OTHER_LAST[:1])
        monkeypatch.setattr(tune, "worker_count", lambda workers: 0)


def search(run, data, tmp_path, **options):
    generator = MoleculeGenerator(load_checkpoint(run), CPU, **options)
    return SamplerSearch(generator, data, EVALUATIONS, COUNT, tmp_path / "work", 0)


def error_of(sampler):
    """The ODE is best, and worse the more noise is added at the end."""
    best = not sampler.adds_noise and sampler.levels is not None
    return 0.01 if best else 0.1


def test_the_candidate_with_the_best_molecules_wins(run, data, tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch, error_of)
    made, seen = search(run, data, tmp_path), []
    result = made.run(lambda done, total: seen.append((done, total)))
    assert result.chosen.choice.sampler == "dpm++"
    assert result.chosen.evaluations == EVALUATIONS
    assert result.chosen.molecules == result.before.molecules == COUNT
    assert result.before.choice == SamplerChoice("ancestral", EVALUATIONS - 1, "log")
    assert result.chosen is result.candidates[0] and result.chosen.near
    assert result.real.molecule_stability.value > 0.9
    shares = [each.molecule_stability.value for each in (result.real, result.chosen, result.before)]
    assert shares[0] > shares[1] - 0.1 > shares[2]
    # Announced, and each molecule drawn once by each candidate.
    assert len(drawn.calls) <= made.molecules
    assert seen[-1][0] == EVALUATIONS * len(drawn.calls) <= seen[-1][1] == made.network_evaluations
    assert [a[0] for a in seen] == sorted(a[0] for a in seen)


@pytest.mark.parametrize(("process", "expected"), [("cosine", "dpm++"), ("flow_matching", "heun")])
def test_other_processes(run, data, tmp_path, monkeypatch, process, expected):
    """Times in place of levels, or spacings alone; the best sampler is found and stored."""
    config = tiny(process__name=process, model__layers=1, process__steps=20)
    state = load_checkpoint(run).state
    statistics = MoleculeStatistics.of_state(MoleculeState.model_validate(state))
    model = build_model(config, build_layout(config.model.fields, config.scales, statistics))
    state = {key: state[key] for key in ("progress", "elements", "size_histogram")}
    save_checkpoint(tmp_path / "mine", config, state, {"ema": model.state_dict()})
    Drawn(monkeypatch, lambda sampler: 0.01 if type(sampler) is SAMPLERS[expected] else 0.1)
    result = search(tmp_path / "mine", data, tmp_path).run()
    choice = result.chosen.choice
    assert choice.sampler == expected
    assert result.chosen.evaluations <= EVALUATIONS
    if process == "cosine":
        assert choice.levels[0] == FIRST_TIME and len(choice.levels) == EVALUATIONS
    store_in_state(
        load_checkpoint(tmp_path / "mine"),
        {"sampling": choice.state},
    )
    stored = MoleculeGenerator(load_checkpoint(tmp_path / "mine"), CPU).sampler
    assert stored.visited == choice.build(stored.process).visited


def test_regular_molecules_do_not_win(run, data, tmp_path, monkeypatch):
    """Stable, since most are one perfect molecule; but the geometry is far from the data's."""

    def is_regular(sampler):
        return sampler.temperature.final_noise == 0.0

    Drawn(
        monkeypatch,
        lambda sampler: 0.02 if is_regular(sampler) else 0.06,
        lambda sampler: 0.9 if is_regular(sampler) else 0.0,
    )
    result = search(run, data, tmp_path).run()
    varied = [each for each in result.candidates if each.choice.final_noise == 0]
    assert len(varied) == 1
    gaps = [
        abs(each.molecule_stability.value - result.real.molecule_stability.value)
        for each in (varied[0], result.chosen)
    ]
    assert gaps[0] < gaps[1] and not varied[0].near
    assert result.chosen.choice.final_noise != 0


def test_an_interrupted_search_draws_nothing_twice(run, data, tmp_path, monkeypatch):
    drawn = Drawn(monkeypatch, error_of)

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(run, data, tmp_path).run(interrupt)
    before, files = len(drawn.calls), len(list((tmp_path / "work").iterdir()))
    assert before and files
    drawn.calls.clear()
    whole = search(run, data, tmp_path).run()
    there = len(list((tmp_path / "work").iterdir()))
    assert drawn.calls and there > files
    drawn.calls.clear()
    assert search(run, data, tmp_path).run() == whole
    assert not drawn.calls  # all were there


@pytest.mark.parametrize(
    ("evaluations", "count", "message"),
    [
        (2, 64, "--steps 2: --tune chooses for 3 to 20 network evaluations"),
        (21, 64, "--steps 21: --tune chooses for 3 to 20"),
        (6, 15, "-n 15: --tune compares 16 molecules or more"),
    ],
)
def test_numbers_out_of_range(run, data, tmp_path, evaluations, count, message):
    generator = MoleculeGenerator(load_checkpoint(run), CPU)
    with pytest.raises(InputError, match=message):
        SamplerSearch(generator, data, evaluations, count, tmp_path, 0)


def test_test_molecules_are_not_read(run, tmp_path):
    path = tmp_path / "test.h5"
    with MoleculeFile(bundled_sample()) as file:
        molecules = file.read(np.arange(30))
    with MoleculeWriter(path, source="mine") as writer:
        writer.append(molecules)
        writer.set_split(np.full(30, 2))
    generator = MoleculeGenerator(load_checkpoint(run), CPU)
    with pytest.raises(InputError, match=r"test\.h5 has no training split, and --tune reads no"):
        SamplerSearch(generator, path, 6, 16, tmp_path, 0)


# ---- where the choice is stored ------------------------------------------------------------------

STORED = {"sampling": {"sampler": "sde-dpm++", "levels": [20, 9, 2], "final_noise": 0.5}}


def test_it_is_stored_beside_the_same_weights(run):
    checkpoint = load_checkpoint(run)
    store_in_state(checkpoint, STORED)
    again = load_checkpoint(run)
    assert again.state == checkpoint.state | STORED
    sampler = MoleculeGenerator(again, CPU).sampler
    assert (sampler.levels, sampler.temperature.final_noise) == ((20, 9, 2), 0.5)
    state = again.state_as(MoleculeState)
    stored = sampler_so_far(state, sampler.process, 3)
    assert stored == SamplerChoice("sde-dpm++", levels=(20, 9, 2), final_noise=0.5)
    assert sampler_so_far(state, sampler.process, 2) == SamplerChoice("sde-dpm++", 1, "log")
    with pytest.raises(InputError, match="was replaced meanwhile"):
        store_in_state(checkpoint, STORED)


def test_a_copy_of_released_weights_is_an_ordinary_checkpoint(run, tmp_path):
    released = run / "checkpoints" / "last"
    write_checksums(released)
    copy_for_sampling(load_checkpoint(run), STORED, tmp_path / "copy")
    load_checkpoint(released)  # its checksums still hold
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"ema.safetensors", "config.yaml", "state.yaml"}
    copy = load_checkpoint(tmp_path / "copy")
    ours, theirs = MoleculeGenerator(copy, CPU), MoleculeGenerator(load_checkpoint(run), CPU)
    assert ours.fingerprint() == theirs.fingerprint()
    assert ours.sampler.levels == (20, 9, 2) and theirs.sampler.levels is None
    damaged = bytearray((tmp_path / "copy" / "ema.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "copy" / "ema.safetensors").write_bytes(damaged)
    with pytest.raises(InputError, match=r"ema\.safetensors"):
        MoleculeGenerator(load_checkpoint(tmp_path / "copy"), CPU)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_stores_what_sample_then_takes(run, data, tmp_path, monkeypatch, cli_here):
    Drawn(monkeypatch, error_of)
    command = ("sample", "--tune", "--checkpoint", "run", "--steps", 6, "--data", data)
    done = cli_here(*command, "-n", 32)
    assert f"by {data}: at most 256 molecules, 1,536 network evaluations" in done.stderr
    assert "dpm++, 2.5 to 0.03 Å, power 5" in done.stdout
    assert "80 training and 60 validation" in done.stdout
    assert "next: molgen-energy sample --checkpoint run/checkpoints/last" in done.stderr
    assert not list(tmp_path.glob("*.tuning"))
    stored = load_yaml((run / "checkpoints/last/state.yaml").read_bytes(), "state")["sampling"]
    assert stored.keys() == {"sampler", "levels"} and len(stored["levels"]) == 6
    assert all(type(level) is int for level in stored["levels"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    sampler = MoleculeGenerator(load_checkpoint(run), CPU).sampler
    assert sampler.evaluations == 6 and list(sampler.levels) == stored["levels"]


def test_released_weights_stay_as_they_are(run, data, tmp_path, monkeypatch, cli_here):
    Drawn(monkeypatch, error_of)
    released = run / "checkpoints" / "last"
    write_checksums(released)
    before = {path: path.read_bytes() for path in released.iterdir()}
    command = ("sample", "--tune", "--checkpoint", "run", "--steps", 6, "-n", 32, "--data", data)
    done = cli_here(*command)
    assert "pretrained weights stay as they are; -o FOLDER stores" in done.stderr
    assert "--sampler dpm++ --levels 20," in done.stderr
    done = cli_here(*command, "-o", "tuned")
    assert "next: molgen-energy sample --checkpoint tuned" in done.stderr
    assert {path: path.read_bytes() for path in released.iterdir()} == before
    assert load_checkpoint(tmp_path / "tuned").state["sampling"]["sampler"] == "dpm++"
    done = cli_here(*command, "-o", "tuned", code=2)
    assert "-o tuned exists; name a new folder for the copy" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sampler", "ddim"), "--tune chooses for itself; leave out --sampler"),
        (("--resume", "a.sdf"), "--tune chooses for itself; leave out --resume"),
        (("--final-noise", 0), "--tune chooses for itself; leave out --final-noise"),
        (("--cuda-graphs",), "--tune chooses for itself; leave out --cuda-graphs"),
        (("--steps", 1), "--steps 1: --tune chooses for 3 to 20"),
        (("--data", "no.h5"), "no.h5"),
        (("-o", "no/folder"), "does not exist; make it first"),
    ],
)
def test_bad_commands(run, cli_here, arguments, message):
    done = cli_here("sample", "--tune", "--checkpoint", "run", *arguments, code=2)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
