"""A loss and a spring family of one's own: a class or function, and a row in a registry."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import test_physical_laws as laws
import torch
from torch import Tensor

from molgen_energy.config import PositiveFloat
from molgen_energy.errors import InputError
from molgen_energy.losses import LOSSES, SPRINGS, LossConfig, PositionLoss, SpringFamily
from molgen_energy.losses.base import Samples
from molgen_energy.progress import no_progress
from molgen_energy.systems.registry import load_config
from molgen_energy.systems.shapes.dataset import Polygons
from molgen_energy.systems.shapes.system import ShapeSystem
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train


class HuberConfig(LossConfig):
    """Squared error of small displacements, absolute error of large ones."""

    name: str = "huber"
    delta: PositiveFloat = 1.0

    def build(self, *, seed: int = 0, channels: int | None = None) -> Huber:
        return Huber(self.delta)


class Huber(PositionLoss):
    Config: ClassVar[type[HuberConfig]] = HuberConfig

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = delta

    def of(self, samples: Samples) -> Tensor:
        error = torch.nn.functional.huber_loss(
            samples.prediction, samples.target, reduction="none", delta=self.delta
        )
        return error.sum(dim=(1, 2)) / samples.counts


def lorentzian(distances: Tensor) -> Tensor:
    return 1 / (1 + distances.square())


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(LOSSES, "huber", Huber)
    monkeypatch.setitem(SPRINGS, "lorentzian", SpringFamily(lorentzian, finite_at_zero=True))


def laws_of(name: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The laws that run over a loss of the registry, with values of their other parameters."""
    found = {}
    for key, function in vars(laws).items():
        marks = {m.args[0]: m for m in getattr(function, "pytestmark", []) if m.args}
        parameters = set(inspect.signature(function).parameters) if key.startswith("test_") else {}
        if "loss" not in marks or name not in marks["loss"].kwargs["ids"]:
            continue
        others = {p: next(iter(mark.args[1])) for p, mark in marks.items() if p != "loss"}
        if set(parameters) <= {"pair", "loss"} | set(others):
            found[key] = function, others
    return found


LAWS = [
    *((key, "mse", "huber") for key in laws_of("mse")),
    *(
        (key, f"energy-exponential-{edges}", f"energy-lorentzian-{edges}")
        for edges in ("complete", "sparse")
        for key in laws_of(f"energy-exponential-{edges}")
    ),
]


def test_laws_are_found():
    assert {"test_padding_has_no_effect", "test_degree", "test_precisions"} <= set(laws_of("mse"))
    assert "test_energy_is_invariant_in_both_arguments" in laws_of("energy-exponential-sparse")
    assert "test_minimisers_of_the_energy_are_images_of_the_data" not in laws_of("mse")


@pytest.mark.parametrize(("law", "like", "name"), LAWS)
def test_a_new_row_obeys_the_laws(registered, molecules, law, like, name):
    function, values = laws_of(like)[law]
    values = values | {"loss": laws.position_losses()[name]}
    if "pair" in inspect.signature(function).parameters:
        values["pair"] = laws.prediction_of(molecules)
    function(**values)


def test_its_section_stands_beside_it(registered):
    laws.test_sections_stand_beside_their_losses(LOSSES, "huber")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("{name: huber, delta: 0.5}", "loss huber"),
        (
            "{name: energy, springs: {family: lorentzian}, edges: {kind: sparse}}",
            "loss energy, lorentzian springs on sparse edges",
        ),
    ],
)
def test_a_new_row_is_trained_by_its_name(registered, tmp_path, loss, said):
    Polygons(count=40, vertices=6).write(tmp_path / "shapes.h5", no_progress)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"system: shapes\ndata: {{path: {tmp_path / 'shapes.h5'}}}\nloss: {loss}\n"
        "training: {steps: 2, batch_size: 8}\n"
    )
    system = ShapeSystem()
    task = system.task(load_config(path), torch.device("cpu"), no_progress)
    assert said in system.describe(task.config, 1)
    losses = []

    def watch(step: int, steps: int, loss: float, samples_per_second: float) -> None:
        losses.append(loss)

    train(task, tmp_path / "run", watch)
    assert losses
    assert all(value > 0 for value in losses)
    config = load_checkpoint(tmp_path / "run").config_as(system.config)
    assert config.loss == task.config.loss
    assert config.training.lr == 3e-2


def test_its_keys_are_its_own(registered):
    config = load_config("shapes_energy").replaced({"loss.name": "huber", "loss.delta": 2.0})
    assert config.loss == HuberConfig(delta=2.0)
    with pytest.raises(InputError, match=r"'loss\.springs'.*\(valid: loss\.name, loss\.delta\)"):
        load_config("shapes_energy").replaced({"loss": {"name": "huber", "springs": {}}})
    with pytest.raises(InputError, match=r"loss\.delta: .*greater than 0"):
        config.replaced({"loss.delta": 0})
