"""The losses of a student: gradients, whom they reach, and the levels that they are drawn at."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from states import ExactRandomNumbers, network, seeded_noise

from molgen_energy.diffusion.distillation import Distillation, student_levels
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.objective import Objective, Weights
from molgen_energy.diffusion.process import PROCESSES, CosineDiffusion, Diffusion
from molgen_energy.diffusion.samplers import build_sampler
from molgen_energy.diffusion.state import State, pairs_inside
from molgen_energy.errors import InputError
from molgen_energy.losses import EnergyConfig, SpringsConfig
from molgen_energy.models import MODELS

TEACHERS = [name for name, kind in MODELS.items() if not kind.self_conditioned]
DIFFUSIONS = [name for name in PROCESSES if name != "flow_matching"]
SIZES = (4, 7, 5, 6, 7)


def perturbed(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Another network near a model."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.05 * noise
    return other


class Setting:
    """A student, an auxiliary network and a teacher, all different, in float64, with data."""

    def __init__(
        self, model: str, process: str, padding: int = 0, regulariser: float = 0.0
    ) -> None:
        torch.manual_seed(0)  # of the weights
        self.teacher = network(model, 8).double()
        self.student, self.auxiliary = (perturbed(self.teacher, seed) for seed in (1, 2))
        self.process = PROCESSES[process](50)
        self.levels = student_levels(self.process, 1.0, 4, 5.0, 0.1, 2.0)
        loss = EnergyConfig(springs=SpringsConfig(scale=1.7)).build()
        self.distillation = Distillation(
            Objective(self.process, loss, Weights(0.3)), self.teacher, self.levels, regulariser
        )
        mask = torch.arange(max(SIZES) + padding)[None] < torch.tensor(SIZES)[:, None]
        self.clean = seeded_noise(self.teacher.layout, mask, 5).map(torch.Tensor.double)
        self.random = ExactRandomNumbers(3, torch.arange(len(SIZES)))

    def terms(self):
        return self.distillation(self.student, self.auxiliary, self.clean, self.random)


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor | None]:
    return torch.autograd.grad(
        loss.sum(), list(model.parameters()), allow_unused=True, retain_graph=True
    )


def reaches(loss: torch.Tensor, model: torch.nn.Module) -> bool:
    found = [g for g in gradient(loss, model) if g is not None]
    return any(bool((g != 0).any()) for g in found)


@pytest.mark.parametrize("process", DIFFUSIONS)
@pytest.mark.parametrize("model", TEACHERS)
def test_the_student_moves_by_the_difference_of_both_networks(model, process):
    """The loss and its gradient against the formula, field by field, and finite differences."""
    own = Setting(model, process)
    terms = own.terms()
    gradients = gradient(terms.student, own.student)
    t, s = own.distillation.draw_levels(own.random)
    noise = own.random.noise(own.clean.layout, own.clean.mask, 0)
    noisy = own.process.add_noise(own.clean, noise, t)

    def drawn() -> State:
        return own.process.predict(own.student, noisy, t).clean.projected()

    with torch.no_grad():
        fixed = drawn()
        fresh = own.random.noise(own.clean.layout, own.clean.mask, 1)
        lower = own.distillation.posterior(fixed, noisy, t, s, fresh)
        moment, expected = (
            own.process.predict(one, lower, s).clean.projected()
            for one in (own.auxiliary, own.teacher)
        )
        directions, values = {}, torch.zeros(len(SIZES), dtype=torch.float64)
        for name, field in own.clean.layout.fields.items():
            directions[name] = torch.zeros_like(fixed[name])
            for k, n in enumerate(SIZES):
                a, b, x = (state[name][k, :n] for state in (moment, expected, fixed))
                if field.domain == "pair":
                    a, b, x = (value[:, :n][~torch.eye(n, dtype=torch.bool)] for value in (a, b, x))
                direction = (a - b) / (abs(x - b).mean() + 1e-3) / len(x)
                values[k] += 0.5 * len(x) * direction.square().sum()
                inside = (
                    own.clean.mask[k]
                    if field.domain == "atom"
                    else pairs_inside(own.clean.mask[k : k + 1])[0]
                )
                directions[name][k][inside] = direction
        torch.testing.assert_close(terms.student, values, rtol=1e-9, atol=0)
        distances = [
            float((x["positions"] - expected["positions"])[k, :n].abs().mean())
            for x in (fixed, moment)
            for k, n in enumerate(SIZES)
        ]
        found = torch.cat([terms.teacher_distance, terms.moment_distance])
        torch.testing.assert_close(found.tolist(), distances, rtol=1e-9, atol=0)

        def moved(step: float) -> float:
            for parameter, way in zip(own.student.parameters(), ways, strict=True):
                parameter += step * way
            total = sum(float((drawn()[name] * g).sum()) for name, g in directions.items())
            for parameter, way in zip(own.student.parameters(), ways, strict=True):
                parameter -= step * way
            return total

        torch.manual_seed(0)
        ways = [torch.randn_like(parameter) for parameter in own.student.parameters()]
        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    along = sum(
        float((g * way).sum()) for g, way in zip(gradients, ways, strict=True) if g is not None
    )
    assert along == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("regulariser", [0.0, 1.0])
@pytest.mark.parametrize("model", TEACHERS)
def test_each_loss_reaches_its_own_network(model, regulariser):
    own = Setting(model, "diffusion", regulariser=regulariser)
    terms = own.terms()
    assert reaches(terms.student, own.student) and reaches(terms.auxiliary, own.auxiliary)
    assert not reaches(terms.student, own.auxiliary) and not reaches(terms.auxiliary, own.student)
    assert not any(parameter.requires_grad for parameter in own.teacher.parameters())


@pytest.mark.parametrize("model", TEACHERS)
def test_a_sample_has_the_same_losses_in_every_batch(model):
    """Whatever the other samples and the padding, which would show NaN of a wrong sum."""
    wide, own = Setting(model, "diffusion", padding=3), Setting(model, "diffusion")
    found = torch.stack(wide.terms())
    torch.testing.assert_close(found, torch.stack(own.terms()), rtol=1e-6, atol=1e-8)
    which = torch.tensor([3, 0])
    clean = State(
        own.clean.layout,
        own.clean.mask[which, :6],
        {domain: values[which, :6] for domain, values in own.clean.tensors.items()},
    )
    random = ExactRandomNumbers(3, which, len(SIZES))
    part = torch.stack(own.distillation(own.student, own.auxiliary, clean, random))
    torch.testing.assert_close(part, found[:, which], rtol=1e-6, atol=1e-8)


def test_networks_that_agree_do_not_move_the_student():
    own = Setting("gdm", "diffusion")
    terms = own.distillation(own.student, own.teacher, own.clean, own.random)
    assert not terms.student.detach().any() and not terms.moment_distance.any()
    assert float(terms.teacher_distance.min()) > 0


def test_the_student_learns_from_its_share_of_the_batches():
    """Its losses are the same in all of them, and the auxiliary network learns from all."""
    own = Setting("gdm", "diffusion")
    values = own.terms()
    own.distillation.student_share = 0.3
    learns = []
    for seed in range(60):
        own.random = ExactRandomNumbers(seed, torch.arange(2))
        own.clean = State(own.clean.layout, own.clean.mask[:2], {"atom": own.clean.atoms[:2]})
        terms = own.terms()
        assert terms.auxiliary.requires_grad
        learns.append(terms.student.requires_grad)
    assert 9 <= sum(learns) <= 28  # 99.9 %
    own = Setting("gdm", "diffusion")
    own.distillation.student_share = 1e-6
    found = own.terms()
    assert not found.student.requires_grad
    torch.testing.assert_close(torch.stack(found), torch.stack(values), rtol=0, atol=0)


def test_the_regulariser_is_the_objective_towards_the_teacher():
    losses = [Setting("gdm", "diffusion", regulariser=r).terms().auxiliary for r in (0, 1, 2)]
    torch.testing.assert_close(losses[2] - losses[1], losses[1] - losses[0])
    assert (losses[1] > losses[0]).all()
    plain, own = (Setting("gdm", "diffusion", regulariser=r) for r in (0.0, 1.0))
    for one in (plain, own):
        one.auxiliary = one.teacher
    torch.testing.assert_close(own.terms().auxiliary, plain.terms().auxiliary, rtol=0, atol=1e-12)


@pytest.mark.parametrize("process", DIFFUSIONS)
def test_the_lower_state_is_the_conditional_of_a_gaussian(process):
    """x_s given x_t and x, from the joint normal distribution of both noisy states."""
    own = Setting("gdm", process)
    t, s = own.distillation.draw_levels(own.random)
    noisy, noise = (seeded_noise(own.clean.layout, own.clean.mask, k) for k in (7, 8))
    noisy, noise = noisy.map(torch.Tensor.double), noise.map(torch.Tensor.double)
    found = own.distillation.posterior(own.clean, noisy, t, s, noise)
    for k, (high, low) in enumerate(zip(t.tolist(), s.tolist(), strict=True)):
        (alpha2_t, sigma2_t), (alpha2_s, sigma2_s) = map(own.process.squares, (high, low))
        alpha_t, alpha_s = alpha2_t**0.5, alpha2_s**0.5
        covariance = alpha_t / alpha_s * sigma2_s
        gain = covariance / sigma2_t
        mean = alpha_s * own.clean.atoms[k] + gain * (noisy.atoms[k] - alpha_t * own.clean.atoms[k])
        spread = (sigma2_s - covariance * gain) ** 0.5
        # The process has its factors in float32.
        torch.testing.assert_close(
            found.atoms[k], mean + spread * noise.atoms[k], rtol=0, atol=3e-5
        )


@pytest.mark.parametrize(
    ("kind", "steps"), [(Diffusion, 1000), (Diffusion, 12), (CosineDiffusion, 9)]
)
def test_levels_of_a_student(kind, steps):
    """From pure noise in even steps of √(σ/α); samples are drawn at every one, and between."""
    process = kind(steps)
    levels = student_levels(process, 2.0, 8, 6.0, 0.2, 2.0)
    assert len(levels) == 8 and build_sampler(process, "ancestral", levels=levels).evaluations == 8
    ratios = torch.tensor(
        [sigma2 / alpha2 for alpha2, sigma2 in map(process.squares, levels)]
    ).sqrt()
    if steps != 12:  # with few levels, they are the nearest ones
        torch.testing.assert_close(ratios[[1, -1]], torch.tensor([3.0, 0.1]), rtol=0.02, atol=0)
        gaps = ratios[1:].sqrt().diff()
        torch.testing.assert_close(gaps, gaps.mean().expand(6), rtol=0.03, atol=0)
    objective = Objective(
        process, EnergyConfig(springs=SpringsConfig(scale=1.7)).build(), Weights(1)
    )
    distillation = Distillation(objective, network("gdm", 8), levels)
    t, s = distillation.draw_levels(RandomNumbers(0, torch.arange(4000)))
    assert set(t.tolist()) == set(levels)
    below = dict(zip(levels, [*levels[1:], 0], strict=True))
    for level in levels:
        lower = s[t == level]
        assert len(lower) == 500
        assert below[level] <= float(lower.min()) <= float(lower.max()) < level
    assert float(s.min()) >= process.first_level


@pytest.mark.parametrize(
    ("process", "count", "message"),
    [
        (PROCESSES["flow_matching"](100), 8, "which is not for flow_matching; name a teacher"),
        (Diffusion(6), 8, "the teacher has 6 noise levels; choose at most as many"),
    ],
)
def test_processes_without_students(process, count, message):
    with pytest.raises(InputError, match=re.escape(message)):
        student_levels(process, 1.0, count, 5.0, 0.1, 2.0)
