"""The optimizer of matrices."""

from __future__ import annotations

import pytest
import torch
from states import network
from torch import nn

from molgen_energy.models import MODELS
from molgen_energy.training.muon import Muon, hidden_matrices, orthogonal


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 40), (2, 40, 16)])
def test_updates_are_about_orthogonal(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    # The same singular vectors: the polar factor turns it into a symmetric positive matrix.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    similarity = torch.nn.functional.cosine_similarity(found.flatten(1), (u @ v).flatten(1))
    assert similarity.min() > 0.98


def test_a_matrix_alone_is_updated_as_among_others():
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (8, 8), (24, 8)]
    starts, gradients = ([torch.randn(s) for s in shapes] for _ in range(2))

    def updated(which):
        parameters = [nn.Parameter(starts[k].clone()) for k in which]
        optimizer = Muon(parameters, lr=0.1)
        for _ in range(3):
            for k, parameter in zip(which, parameters, strict=True):
                parameter.grad = gradients[k] * parameter.detach().mean()
            optimizer.step()
        return parameters

    together = updated(range(4))
    for k in range(4):
        torch.testing.assert_close(updated([k])[0], together[k])


def test_stacked_iterations_are_those_of_each_matrix():
    """Against the published iteration, in float64."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 12, dtype=torch.float64)
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        x = matrix / matrix.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_a_refused_update_changes_nothing():
    parameter = nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([parameter], lr=0.1)
    for refused in (0.0, 1.0):
        before = parameter.detach().clone()
        parameter.grad = torch.full((8, 8), torch.nan) if refused else torch.randn(8, 8)
        optimizer.found_inf = torch.tensor(refused)
        momentum = optimizer.state[parameter].get("momentum", torch.zeros(8, 8)).clone()
        optimizer.step()
        unchanged = torch.equal(parameter, before)
        assert unchanged == torch.equal(optimizer.state[parameter]["momentum"], momentum)
        assert unchanged == bool(refused)


def test_size_of_an_update_is_about_adams():
    for shape in [(64, 64), (64, 200)]:
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        Muon([parameter], lr=1.0).step()
        assert 0.1 < float(parameter.detach().square().mean().sqrt()) < 0.3


def test_learns_a_linear_map():
    torch.manual_seed(0)
    layer, wanted = nn.Linear(16, 16, bias=False), torch.randn(16, 16)
    optimizer = Muon([layer.weight], lr=0.3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 300)
        layer.weight.grad = layer.weight.detach() - wanted
        optimizer.step()
    assert (layer.weight - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_those_between_states(name):
    model = network(name, width=64)
    found = set(hidden_matrices(model))
    names = {label for label, parameter in model.named_parameters() if parameter in found}
    assert names
    for label in names:
        assert label.startswith("layers.") and label.endswith(".weight")
        assert not any(part in label for part in ("read", "feature", "embed"))
    inside = {label for label, _ in model.named_parameters() if label.endswith("receiver.weight")}
    assert inside <= names
