"""JODO's training: dropout, its loss in float64, published weights, other data and bad input."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import config_of, torchrun_to_end
from runs import CPU, Watcher, assert_same_run, weights
from scipy.spatial.transform import Rotation
from states import ExactRandomNumbers

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.batches import DeviceMolecules
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.molecules import AROMATIC, Molecules
from molgen_energy.diffusion.objective import Objective, Weights
from molgen_energy.diffusion.process import CosineDiffusion
from molgen_energy.diffusion.state import State
from molgen_energy.errors import InputError
from molgen_energy.losses import KabschError, PairwiseEnergy
from molgen_energy.models import JODO
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.fields import MoleculeStatistics, ScalesConfig, build_layout
from molgen_energy.systems.molecules.task import MoleculeTask, _build_objective
from molgen_energy.systems.registry import load_config
from molgen_energy.training.initial import initialise
from molgen_energy.training.loop import TrainingInterrupted, train

TINY = {
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 4,
    "model.dropout": 0.1,
    "training.steps": 6,
    "training.batch_size": 8,
    "training.lr": 1e-3,
    "training.warmup_steps": 2,
    "training.log_every": 2,
    "training.validate_every": 6,
    "training.validation_molecules": 16,
    "training.checkpoint_every": 100,
}
SIGNED = ScalesConfig(bonds=1.0, signed=True)


def write(path: Path, molecules: Molecules) -> Path:
    with MoleculeWriter(path, source="test") as writer:
        writer.append(molecules)
        split = np.zeros(len(molecules), np.uint8)
        split[::10] = 1
        writer.set_split(split)
    return path


@pytest.fixture(scope="module")
def bonded(molecules) -> Molecules:
    """The bundled training molecules with bonds, and with charges of −1, 0 and 1."""
    perceived = perceive(molecules.select(np.arange(0, 2000, 2)))
    charges = np.random.default_rng(0).integers(-1, 2, len(perceived.atomic_numbers))
    return replace(perceived, formal_charges=charges.astype(np.int8))


@pytest.fixture(scope="module")
def data(bonded, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "bonded.h5", bonded)


def jodo(data: Path, config: str = "qm9_jodo", **changes: object) -> MoleculeConfig:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    found = load_config(config).replaced({"data.path": str(data)} | TINY | given)
    assert isinstance(found, MoleculeConfig)
    return found


@pytest.mark.parametrize("changes", [{}, {"loss__name": "energy", "training__optimizer": "muon"}])
def test_a_resumed_run_with_dropout_equals_an_uninterrupted_one(data, tmp_path, changes):
    config = jodo(data, **changes)
    train(MoleculeTask(config, CPU), tmp_path / "unbroken", Watcher())
    torch.rand(7)  # the state of PyTorch's random numbers does not matter
    before = torch.random.get_rng_state()
    watcher = Watcher({3: lambda: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(TrainingInterrupted):
        train(MoleculeTask(config, CPU), tmp_path / "run", watcher)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    resolved = config_of(tmp_path / "run")
    train(MoleculeTask(resolved, CPU), tmp_path / "run", Watcher(), resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "run")


def test_dropout_acts_in_training_alone(data, tmp_path):
    for dropout in (0.0, 0.5):
        config = jodo(data, model__dropout=dropout, training__steps=1, training__lr=1e-9)
        train(MoleculeTask(config, CPU), tmp_path / f"{dropout}", Watcher())
    rows = [
        (tmp_path / f"{dropout}" / "metrics.csv").read_text().split("\n") for dropout in (0.0, 0.5)
    ]
    names = rows[0][0].split(",")
    first, second = (dict(zip(names, row[1].split(","), strict=True)) for row in rows)
    assert first["loss"] != second["loss"]
    assert float(first["valid_loss"]) == pytest.approx(float(second["valid_loss"]), rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_a_self_conditioned_network(data, tmp_path):
    """Some weights have no gradient in steps without a previous prediction."""
    config = jodo(data, model__dropout=0.0)
    train(MoleculeTask(config, CPU), tmp_path / "alone", Watcher())
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    done = torchrun_to_end(tmp_path, "train", "--config", path, "-o", "run")
    assert done.returncode == 0, done.stderr
    ours, theirs = (weights(tmp_path / name, "model") for name in ("run", "alone"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-3, msg=name)


# -- the loss ------------------------------------------------------------------------------------


def clean_state(bonded: Molecules, count: int = 5) -> State:
    """Molecules of several sizes in float64, with signed classes."""
    statistics = MoleculeStatistics((1, 6, 7, 8, 9), (-1, 1))
    layout = build_layout(JODO.Config.fields, SIGNED, statistics)
    batch = DeviceMolecules(bonded, CPU, dense_bonds=True).batch(np.arange(0, 1000, 1000 // count))
    values = {name: field.encode(batch.data).double() for name, field in layout.fields.items()}
    return State.from_fields(layout, batch.mask, values)


def of_positions(loss: str, predicted, true, noisy) -> float:
    if loss == "kabsch":
        rotation, _ = Rotation.align_vectors(noisy, true - true.mean(0))
        aligned = rotation.apply(true - true.mean(0))
        return float(((predicted - aligned) ** 2).mean(1).sum())
    total = 0.0
    for i in range(len(true)):
        for j in range(len(true)):
            if i != j:
                d = np.linalg.norm(true[i] - true[j])
                error = np.linalg.norm(predicted[i] - predicted[j]) - d
                total += 0.5 * 3.7 / len(true) / (d + 1e-5) * error**2
    return total


@pytest.mark.parametrize("name", ["kabsch", "energy"])
def test_the_objective_is_jodos(bonded, name):
    """Sums over atoms and ordered pairs, √(α/σ), alignment to the noisy positions, in float64."""
    clean = clean_state(bonded)
    random = ExactRandomNumbers(4, torch.arange(len(clean)))
    error = ExactRandomNumbers(9, torch.arange(len(clean))).noise(clean.layout, clean.mask, 0)
    output, seen = clean + 0.3 * error, []

    def model(noisy, time, mask, condition, self_condition):
        seen.append(noisy)
        return output

    loss = KabschError(align="noisy") if name == "kabsch" else PairwiseEnergy("inverse", 3.7)
    weights = Weights(1.0, {"elements": 0.25, "formal_charges": 0.25, "bonds": 0.1})
    objective = Objective(CosineDiffusion(), loss, weights, weighting="clean", reduction="sum")
    found = objective(model, clean, random)
    times = CosineDiffusion().draw_levels(objective.timesteps.draw(random)).numpy()
    assert len(seen) == 1
    for k, time in enumerate(times):
        n = int(clean.mask[k].sum())
        alpha = np.cos((time + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
        weight = np.sqrt(alpha / np.sqrt(1 - alpha**2))
        atoms = [s.tensors["atom"][k, :n].numpy() for s in (output, clean, seen[0])]
        pairs = [s.tensors["pair"][k, :n, :n].numpy() for s in (output, clean)]
        x = of_positions(name, *(a[:, :3] for a in atoms))
        h = ((atoms[0][:, 3:] - atoms[1][:, 3:]) ** 2).mean(1).sum()
        e = sum(
            ((pairs[0][i, j] - pairs[1][i, j]) ** 2).mean()
            for i in range(n)
            for j in range(n)
            if i != j
        )
        expected = weight * np.array([x, 0.25 * h, 0.1 * e])
        features = found.parts["elements"] + found.parts["formal_charges"]
        terms = torch.stack([found.parts["positions"], features, found.parts["bonds"]])[:, k]
        np.testing.assert_allclose(terms, expected, rtol=1e-5)
        assert float(found.total[k]) == pytest.approx(expected.sum(), rel=1e-5)


@pytest.mark.parametrize("again", [0.0, 1.0])
def test_given_fields_have_no_noise_and_no_error(bonded, again):
    """Neither in the state nor in the previous prediction; the others are as without them."""
    clean = clean_state(bonded)
    error = ExactRandomNumbers(9, torch.arange(len(clean))).noise(clean.layout, clean.mask, 0)
    random = ExactRandomNumbers(4, torch.arange(len(clean)))
    given = ("elements", "formal_charges", "bonds")

    class Model(torch.nn.Module):
        self_conditioned, noise_input = True, "log_snr"

        def forward(self, noisy, time, mask, condition, self_condition):
            self.seen, self.previous, self.time = noisy, self_condition, time
            return clean + 0.3 * error

    runs = {}
    for names in ((), given):
        model = Model()
        objective = Objective(
            CosineDiffusion(), KabschError(align="noisy"), Weights(1.0), weighting="clean",
            self_condition_probability=again, given=names,
        )  # fmt: skip
        runs[names] = objective(model, clean, random), model
    (plain, of_all), (terms, model) = runs.values()
    assert list(terms.parts) == ["positions"]
    assert torch.equal(terms.total, plain.parts["positions"])
    assert torch.equal(model.time, of_all.time)
    assert torch.equal(model.seen["positions"], of_all.seen["positions"])
    assert (model.previous is None) == (again == 0)
    for state in (model.seen, model.previous):
        for name in given if state is not None else ():
            assert torch.equal(state[name], clean[name])
            assert not torch.equal(of_all.seen[name], clean[name])
    if again:
        assert torch.equal(model.previous["positions"], of_all.previous["positions"])


def test_given_fields_that_are_not_possible(data):
    for names in (["positions"], ["charges"]):
        with pytest.raises(InputError, match=rf"given_fields: unknown field '{names[0]}'.*bonds"):
            MoleculeTask(jodo(data, objective__given_fields=names), CPU)
    task = MoleculeTask(jodo(data, objective__given_fields=["bonds"]), CPU)
    assert task.loss_terms == ("positions_loss", "elements_loss", "formal_charges_loss")
    student = task.config.replaced({"distillation.evaluations": 4})
    with pytest.raises(InputError, match=r"a student generates all fields.*another --teacher"):
        _build_objective(student, task.layout)


@pytest.mark.parametrize("passes", [1, 3])
def test_training_makes_as_many_predictions_as_are_set(data, passes):
    """Each without gradient, and with the one before as its input."""
    task = MoleculeTask(
        jodo(
            data,
            objective__self_condition_probability=1.0,
            objective__self_condition_passes=passes,
        ),
        CPU,
    )
    forward, calls = task.model.forward, []

    def recorded(state, time, mask, condition, previous):
        result = forward(state, time, mask, condition, previous)
        calls.append((previous, result, torch.is_grad_enabled()))
        return result

    task.model.forward = recorded
    task.model.eval()
    task.loss(task.model, task.epoch(0)[0], 0)
    assert [grad for _, _, grad in calls] == [False] * passes + [True]
    assert calls[0][0] is None
    for (_, result, _), (previous, _, _) in pairwise(calls):
        torch.testing.assert_close(previous.atoms, result.atoms, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["noise", "velocity", "clean"])
@pytest.mark.parametrize("loss", ["energy", "kabsch"])
def test_losses_are_finite_at_the_last_time(data, monkeypatch, prediction, loss):
    """α is 1e-9 there, which the clean prediction is divided by."""
    monkeypatch.setattr(CosineDiffusion, "draw_levels", lambda self, u: torch.ones_like(u).double())
    changes = {"process__prediction": prediction, "loss__name": loss}
    config = jodo(data, objective__weighting="auto", **changes)
    task = MoleculeTask(config, CPU)
    terms = task.loss(task.model, task.epoch(0)[0], 0)
    terms["loss"].sum().backward()
    assert torch.isfinite(terms["loss"]).all()
    for parameter in task.model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("family", ["exponential", "inverse", "inverse_square", "constant"])
def test_published_springs_have_the_published_weight(data, family):
    """The sample of QM9 has about the mean springs of QM9."""
    config = jodo(
        data, "qm9_jodo_energy", loss__springs__family=family, objective__position_weight="auto"
    )
    resolved = MoleculeTask(config, CPU).config
    assert resolved.loss.springs.scale == {
        "exponential": 24, "inverse": 3.7, "inverse_square": 9, "constant": 1,
    }[family]  # fmt: skip
    assert resolved.objective.position_weight == pytest.approx(1, rel=0.02)


def test_sums_have_the_published_weight_whatever_the_size(bonded, tmp_path):
    """Errors of fields grow with the number of atoms then, as the energy does."""
    small = bonded.select(np.flatnonzero(bonded.sizes <= 14))
    path = write(tmp_path / "small.h5", small)
    found = {}
    for reduction in ("sum", "mean"):
        changes = {"objective__reduction": reduction, "objective__position_weight": "auto"}
        config = jodo(path, "qm9_jodo_energy", loss__springs__family="constant", **changes)
        found[reduction] = MoleculeTask(config, CPU).config.objective.position_weight
    assert found["sum"] == 1
    train_sizes = np.delete(small.sizes, np.arange(0, len(small), 10))
    assert found["mean"] == pytest.approx(18.03 / train_sizes.mean(), rel=1e-6)


# -- weights of other data, and bad input ----------------------------------------------------------


def test_training_starts_from_weights_without_aromatic_bonds(data, bonded, tmp_path):
    """Channels of new elements and of aromatic bonds are drawn, all others are taken."""
    train(MoleculeTask(jodo(data, training__steps=1), CPU), tmp_path / "run", Watcher())
    order = bonded.bonds.order.copy()
    order[::9] = AROMATIC
    aromatic = write(
        tmp_path / "aromatic.h5", replace(bonded, bonds=replace(bonded.bonds, order=order))
    )
    config = jodo(
        aromatic,
        training__initial_weights=str(tmp_path / "run"),
        data__elements=["H", "C", "N", "O", "F", "S"],
    )
    task = MoleculeTask(config, CPU)
    initialise(task)
    new = {"elements S", "bonds aromatic"}
    assert set(task.state["initial_weights"]["new"]) == new | {f"previous {n}" for n in new}
    ours, theirs = task.model.state_dict(), weights(tmp_path / "run", "ema")
    kept = [0, 1, 3, 4]  # of exists, order, aromatic, now and in the previous prediction
    assert torch.equal(ours["embed_edges.weight"][:, kept], theirs["embed_edges.weight"])
    assert torch.equal(ours["kind_head.4.weight"][:1], theirs["kind_head.4.weight"])
    atoms = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 13]  # all but sulphur
    assert torch.equal(ours["embed_nodes.weight"][:, atoms], theirs["embed_nodes.weight"])
    back = MoleculeTask(jodo(data, training__initial_weights=str(tmp_path / "run")), CPU)
    initialise(back)
    assert back.state["initial_weights"]["new"] == []
    for name, tensor in theirs.items():
        assert torch.equal(back.model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 20}, r"model: width 20 must be a multiple of 4 and of heads \(16\)"),
        ({"model.heads": 2}, r"model\.heads: .*greater than or equal to 3"),
        ({"model.dropout": 1.0}, r"model\.dropout: .*less than 1"),
        ({"model.cutoff": 0}, r"model\.cutoff: .*greater than 0"),
        ({"training.max_gradient_norm": 0}, r"max_gradient_norm: .*greater than 0"),
        ({"process.prediction": "score"}, r"process\.prediction: .*'noise', 'velocity' or 'clean'"),
        ({"loss.align": "nearest"}, r"loss\.align: .*'prediction' or 'noisy'"),
        ({"objective.reduction": "max"}, r"objective\.reduction: .*'mean' or 'sum'"),
        ({"objective.self_condition_passes": 0}, r"self_condition_passes: .*greater than 0"),
    ],
)
def test_bad_values_are_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        load_config("qm9_jodo").replaced(changes)
    assert "\n" not in str(error.value)


def test_data_without_bonds_are_refused(cli_here, sample_path):
    done = cli_here("train", "--config", "qm9_jodo", "--data", sample_path, code=2)
    assert "which model jodo generates" in done.stderr
    assert "preprocess" in done.stderr
    done = cli_here("train", "--config", "qm9_jodo", "--data", "none.h5", code=2)
    assert "preprocess qm9 --bonds -o none.h5` or from your own SDF with bonds" in done.stderr


def test_passes_are_refused_for_a_network_that_is_not_self_conditioned():
    config = load_config("quick").replaced({"objective.self_condition_passes": 2})
    assert isinstance(config, MoleculeConfig)
    with pytest.raises(InputError, match=r"self_condition_passes=2 is for .* which gdm is not"):
        MoleculeTask(config, CPU)


def test_weights_of_another_network_are_refused(data, tmp_path):
    train(MoleculeTask(jodo(data, training__steps=1), CPU), tmp_path / "run", Watcher())
    changes = {"training.initial_weights": str(tmp_path / "run")}
    other = load_config("quick").replaced(changes)
    with pytest.raises(InputError, match=r"with model\.name=jodo \(here gdm\), process\.name=cos"):
        initialise(MoleculeTask(other, CPU))
    wider = jodo(data, model__width=32, **{"training.initial_weights": str(tmp_path / "run")})
    with pytest.raises(InputError, match=r"with model\.width=16 \(here 32\); set the same"):
        initialise(MoleculeTask(wider, CPU))


def test_a_layout_without_bonds_is_refused():
    names = ("positions", "elements", "formal_charges")
    layout = build_layout(names, SIGNED, MoleculeStatistics((1, 6)))
    with pytest.raises(ValueError, match="jodo needs the field bonds"):
        JODO(layout, 1, 16, 4)
