"""The system of properties: training, its checkpoints, and prediction."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import Watcher, assert_same_run

from molgen_energy import evaluate, preprocess, train
from molgen_energy.api.sample import sample_to
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.errors import InputError
from molgen_energy.progress import no_progress
from molgen_energy.systems.properties.predictor import choose_predictor, load_predictor
from molgen_energy.systems.properties.system import PropertySystem
from molgen_energy.systems.registry import load_config
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import TrainingInterrupted

CPU = torch.device("cpu")
NAMES = ("gap", "mu")
CHANGES = {
    "properties": [*NAMES], "model.layers": 1, "model.width": 8, "training.steps": 6,
    "training.warmup_steps": 0, "training.validate_every": 2, "training.checkpoint_every": 2,
    "training.log_every": 1, "training.batch_size": 16, "training.ema_decay": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(sample_path, tmp_path_factory):
    """60 training molecules and 20 of each other split, of the bundled sample."""
    with MoleculeFile(sample_path) as file:
        molecules = file.load("train").select(np.arange(100))
    path = tmp_path_factory.mktemp("data") / "small.h5"
    preprocess(molecules, path, split="0.6,0.2,0.2")
    return path


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    train("qm9_properties", data=small, changes=CHANGES, output=folder, device="cpu")
    return folder


def task_of(path, **changes):
    config = load_config("qm9_properties").replaced(CHANGES | {"data.path": str(path)} | changes)
    return PropertySystem().task(config, CPU, no_progress)


def test_prediction_is_that_of_the_network_for_each_molecule_alone(run, small):
    predictor = load_predictor(run, CPU)
    assert predictor.units == {"gap": "hartree", "mu": "debye"}
    with MoleculeFile(small) as file:
        molecules = file.load("test")
    found = predictor(molecules)
    model = task_of(small).model
    load_checkpoint(run, "best").load_weights(model, "ema")
    known = [1, 6, 7, 8, 9]  # elements of these 80 molecules
    for k, molecule in enumerate(molecules):
        places = torch.tensor([[known.index(z) for z in molecule.atomic_numbers.tolist()]])
        positions = torch.from_numpy(molecule.positions)[None]
        alone = model(places, positions, torch.ones_like(places, dtype=torch.bool))[0]
        np.testing.assert_allclose([found[n][k] for n in NAMES], alone.tolist(), rtol=1e-4)
    # NaN for what the network cannot know; the others stay as they are.
    foreign, far = molecules.atomic_numbers.copy(), molecules.positions.copy()
    foreign[0], far[molecules.offsets[1]] = 26, np.inf
    partly = predictor(replace(molecules, atomic_numbers=foreign, positions=far))
    assert np.isnan(partly["gap"][:2]).all()
    np.testing.assert_allclose(partly["gap"][2:], found["gap"][2:], rtol=1e-5)


def test_the_loss_is_the_mean_error_in_units_of_the_scale(small, tmp_path):
    """By hand; a missing value counts as no error."""
    with MoleculeFile(small) as file:
        molecules, split = file.load(), file.split
    values = {name: column.values.copy() for name, column in molecules.properties.items()}
    values["mu"][::3] = np.nan
    properties = {n: replace(molecules.properties[n], values=values[n]) for n in NAMES}
    preprocess(replace(molecules, properties=properties), tmp_path / "some.h5", split="1,0,0")
    task = task_of(tmp_path / "some.h5")
    assert task.validation_loss(task.model) is None and len(split) == 100
    batch = task.epoch(0)[0]
    losses = task.loss(task.model, batch, seed=0)
    predicted = load_task_predictions(task, batch)
    true = np.stack([values[name][batch.which] for name in NAMES], axis=1)
    errors = np.nan_to_num(np.abs(predicted - true))
    np.testing.assert_allclose(losses["mu_error"].detach(), errors[:, 1], rtol=1e-4)
    expected = (errors / task.model.scale.numpy()).mean(axis=1)
    np.testing.assert_allclose(losses["loss"].detach(), expected, rtol=1e-4)


def load_task_predictions(task, batch):
    """Predictions (B, P) of the network of a task, by its parts."""
    data = task.molecules(batch)
    places = task.places[data.data["atomic_numbers"].long()]
    return task.model(places, data.data["positions"], data.mask).detach().numpy()


def test_an_interrupted_run_goes_on_the_same(run, small, tmp_path):
    stop = Watcher({3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted, match="step 3 of 6"):
        train(
            "qm9_properties", data=small, changes=CHANGES, output=tmp_path / "run", device="cpu",
            callback=stop,
        )  # fmt: skip
    resumed = train(resume=tmp_path / "run", device="cpu")
    assert_same_run(run, resumed.folder)


def test_training_lowers_the_error_of_held_out_molecules(small, tmp_path):
    """The size of a dipole, whose linear part knows little of it; by 40 steps on 60 molecules."""
    changes = CHANGES | {
        "properties": ["mu"], "model.width": 16, "training.steps": 40,
        "training.validate_every": 40, "training.checkpoint_every": 40,
    }  # fmt: skip
    done = train("qm9_properties", data=small, changes=changes, output=tmp_path / "a", device="cpu")
    assert done.metrics["loss"][-5:].mean() < 0.8 * done.metrics["loss"][:5].mean()


def test_weights_start_a_run_on_the_same_properties(run, small, tmp_path):
    first = task_of(small, **{"training.initial_weights": str(run)})
    fitted = first.fit_weights(load_checkpoint(run))
    assert fitted.drawn == 0
    other = task_of(small, properties=["mu", "gap"])
    with pytest.raises(InputError, match="has the properties gap, mu, the run mu, gap"):
        other.fit_weights(load_checkpoint(run))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gap", "nu"], "small.h5: unknown property 'nu' .valid: "),
        ([], r"name the properties to predict, such as --set properties="),
    ],
)
def test_unknown_properties_are_refused(small, names, message):
    with pytest.raises(InputError, match=message):
        task_of(small, properties=names)


def test_data_without_properties_are_refused(small, tmp_path):
    with MoleculeFile(small) as file:
        bare = replace(file.load(), properties={})
    preprocess(bare, tmp_path / "bare.h5")
    with pytest.raises(
        InputError, match=r"bare\.h5 holds no properties; keep some with `molgen-en"
    ):
        task_of(tmp_path / "bare.h5")


def test_a_property_without_two_values_is_refused(small, tmp_path):
    with MoleculeFile(small) as file:
        molecules = file.load()
    column = replace(molecules.properties["gap"], values=np.full(len(molecules), 0.25))
    properties = {"gap": column, "mu": molecules.properties["mu"]}
    preprocess(replace(molecules, properties=properties), tmp_path / "same.h5")
    with pytest.raises(InputError, match="property gap has no two different values"):
        task_of(tmp_path / "same.h5")


def test_what_predicts_nothing_is_refused(run, small, tmp_path):
    with pytest.raises(
        InputError, match="--predictor qm9_energy is a run on molecules and predicts no prop"
    ):
        choose_predictor("qm9_energy", None)
    with pytest.raises(InputError, match="--predictor nothing does not exist"):
        choose_predictor("nothing", None)
    with pytest.raises(InputError, match="xtb is calibrated on real molecules; name an HDF5 file"):
        choose_predictor("xtb", None)
    with pytest.raises(InputError, match="predicts properties and draws no molecules"):
        sample_to(tmp_path / "a.sdf", 2, checkpoint=run, device="cpu")
    assert choose_predictor(run, None)[1] == small


def test_evaluate_compares_asked_and_predicted_values(run, small, tmp_path):
    """Beside the error on the test split of the predictor's data, whose values they are here."""
    with MoleculeFile(small) as file:
        molecules = file.load("test")
    asked = {f"condition_{n}": molecules.properties[n] for n in NAMES}
    asked["condition_alpha"] = molecules.properties["alpha"]
    with MoleculeWriter(tmp_path / "samples.h5", source="some") as writer:
        writer.append(replace(molecules, properties=asked))
    options = {"metrics": "rates", "workers": 0, "predictor": run}
    report = evaluate(tmp_path / "samples.h5", **options)
    found, real = report.files[0].metrics, report.reference.metrics
    predicted = load_predictor(run, CPU)(molecules)["gap"]
    error = np.abs(predicted - molecules.properties["gap"].values).mean()
    assert found["property_gap_error"].value == pytest.approx(error)
    assert real["property_gap_error"].value == pytest.approx(error)  # of the same molecules
    assert found["property_mu_by_atoms"].value is None
    assert real["property_mu_by_atoms"].value > 0
    assert "asked for alpha too, which the predictor does not know" in report.files[0].notes
    assert "gap, by atoms, hartree" in str(report)
    with pytest.raises(InputError, match=r"small\.h5 has no property condition_NAME that the pred"):
        evaluate(small, **options)
