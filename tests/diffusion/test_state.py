"""States of named fields: arithmetic, subspaces, noise, and the way through process and sampler."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from states import ExactRandomNumbers, levels_at

from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.diffusion.objective import Objective, TimestepDistribution, Weights
from molgen_energy.diffusion.prediction import Prediction
from molgen_energy.diffusion.process import PROCESSES, Diffusion, levels_of
from molgen_energy.diffusion.samplers import build_sampler, samplers_for
from molgen_energy.diffusion.state import DOMAINS, Field, Layout, State
from molgen_energy.losses import MeanAbsoluteError, MeanSquaredError

FIELDS = [
    Field("positions", "atom", 3, 2.0, "zero_mean"),
    Field("elements", "atom", 4, discrete=True),
    Field("charges", "atom", 1, discrete=True),
    Field("bonds", "pair", 2, projection="symmetric", discrete=True),
    Field("cell", "graph", 9, 10.0),
]
"""A field of each kind; the cell of a crystal holds three vectors."""
LAYOUT = Layout(FIELDS)
MASK = torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None]
POISON = {"atom": ~MASK, "pair": ~(MASK[:, :, None] & MASK[:, None, :])}
WAYS = [(name, kind) for name, process in PROCESSES.items() for kind in process.predictions]
SERVED = [(*way, sampler) for way in WAYS for sampler in samplers_for(way[0])]


def random_tensors(layout=LAYOUT, mask=MASK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        domain: torch.randn(layout.shape(domain, mask), generator=generator).double()
        for domain in layout.channels
    }


def random_state(layout=LAYOUT, mask=MASK, seed=0):
    return State(layout, mask, random_tensors(layout, mask, seed)).projected()


def poisoned(state):
    """The state with NaN at padding."""
    tensors = {d: values.clone() for d, values in state.tensors.items()}
    for domain, outside in POISON.items():
        tensors[domain][outside] = torch.nan
    return State(state.layout, state.mask, tensors)


def assert_equal(one, other, **tolerance):
    assert one.tensors.keys() == other.tensors.keys()
    for domain, values in one.tensors.items():
        if tolerance:
            torch.testing.assert_close(values, other.tensors[domain], **tolerance)
        else:
            assert torch.equal(values, other.tensors[domain]), domain


# -- layouts and arithmetic ----------------------------------------------------------------------


def test_layouts():
    assert LAYOUT.channels == {"atom": 8, "pair": 2, "graph": 9}
    assert LAYOUT.shape("atom", MASK) == (3, 6, 8)
    assert LAYOUT.shape("pair", MASK) == (3, 6, 6, 2)
    assert LAYOUT.shape("graph", MASK) == (3, 9)
    assert "cell" in LAYOUT and "smell" not in LAYOUT
    assert Layout(FIELDS) == LAYOUT and hash(LAYOUT) == hash(Layout(FIELDS))
    assert Layout(FIELDS[:-1]) != LAYOUT
    assert Layout(FIELDS[::-1]) != LAYOUT
    with pytest.raises(ValueError, match="same name"):
        Layout([FIELDS[0], FIELDS[0]])
    for domain, projection in (
        ("graph", "zero_mean"),
        ("pair", "zero_mean"),
        ("atom", "symmetric"),
    ):
        with pytest.raises(ValueError, match=f"field a: projection {projection} is not defined"):
            Field("a", domain, 1, projection=projection)


def test_a_field_is_a_view_of_the_tensor_of_its_domain():
    state = random_state()
    assert state["elements"].shape == (3, 6, 4)
    assert torch.equal(state["elements"], state.atoms[..., 3:7])
    assert state["charges"].data_ptr() == state.atoms[..., 7:].data_ptr()
    assert torch.equal(state["cell"], state.tensors["graph"])
    assert len(state) == 3


def test_from_fields_and_back():
    state = random_state()
    values = {name: state[name] for name in LAYOUT.fields}
    again = State.from_fields(LAYOUT, MASK, values)
    assert_equal(again, state, rtol=0, atol=1e-15)
    # In any order, and projected.
    moved = dict(reversed(values.items())) | {"positions": values["positions"] + 5}
    assert_equal(State.from_fields(LAYOUT, MASK, moved), state, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="expected the fields positions, elements"):
        State.from_fields(LAYOUT, MASK, {"positions": values["positions"]})
    with pytest.raises(ValueError, match=r"field cell: expected shape \(3, 9\), found \(3, 6\)"):
        State.from_fields(LAYOUT, MASK, values | {"cell": torch.zeros(3, 6)})


def test_encode_and_decode_divide_and_multiply_by_the_scale():
    cell = torch.randn(3, 9)
    field = LAYOUT.fields["cell"]
    assert torch.equal(field.encode({"cell": cell}), cell / 10)
    assert field.columns == {"cell"}
    torch.testing.assert_close(field.decode(field.encode({"cell": cell}))["cell"], cell)
    state = random_state()
    decoded = state.decode()
    assert decoded.keys() == LAYOUT.fields.keys()
    torch.testing.assert_close(decoded["positions"], 2 * state["positions"])


def test_arithmetic_is_that_of_tensors():
    a, b = random_state(seed=1), random_state(seed=2)
    factor = torch.tensor([0.5, -2.0, 3.0]).double()
    for domain in DOMAINS:
        x, y = a.tensors[domain], b.tensors[domain]
        f = factor.view(-1, *[1] * (x.ndim - 1))
        for found, expected in (
            (a + b, x + y),
            (a - b, x - y),
            (2.5 * a, 2.5 * x),
            (a * 2.5, 2.5 * x),
            (a / 4, x / 4),
            (factor * a, f * x),
            (a * factor, f * x),
            (a / factor, x / f),
            (factor * a - b / 2, f * x - y / 2),
            (a.map(torch.tanh), torch.tanh(x)),
        ):
            assert torch.equal(found.tensors[domain], expected)
            assert found.layout is LAYOUT and found.mask is MASK


def test_a_number_of_each_sample_may_be_a_tensor_first():
    """`tensor * state` is the state's product, not a tensor of objects."""
    state = random_state()
    found = torch.ones(3).double() * state
    assert isinstance(found, State)
    assert_equal(found, state)


def test_replace_changes_some_fields_only():
    state = random_state()
    zero = torch.zeros_like(state["elements"])
    found = state.replace(elements=zero, cell=state["cell"] + 1)
    assert torch.equal(found["elements"], zero)
    assert torch.equal(found["cell"], state["cell"] + 1)
    for name in ("positions", "charges", "bonds"):
        assert torch.equal(found[name], state[name])
    assert not torch.equal(state["elements"], zero)  # the original stays
    assert torch.equal(state.with_atoms(state.atoms * 2).atoms, 2 * state.atoms)
    assert torch.equal(state.with_atoms(state.atoms * 2)["cell"], state["cell"])


def test_detach():
    state = random_state().map(lambda values: values.requires_grad_())
    assert all(values.requires_grad for values in state.tensors.values())
    assert not any(values.requires_grad for values in state.detach().tensors.values())


# -- subspaces -----------------------------------------------------------------------------------


def test_projection_on_the_subspaces():
    state = poisoned(State(LAYOUT, MASK, random_tensors())).projected()
    for domain, outside in POISON.items():
        assert (state.tensors[domain][outside] == 0).all()
    assert state["positions"].sum(dim=1).abs().max() < 1e-14
    bonds = state["bonds"]
    assert torch.equal(bonds, bonds.transpose(1, 2))
    assert (bonds.diagonal(dim1=1, dim2=2) == 0).all()
    assert all(torch.isfinite(values).all() for values in state.tensors.values())
    # Fields without a projection are as they were.
    before = random_tensors()
    assert torch.equal(state["elements"][MASK], before["atom"][..., 3:7][MASK])
    assert torch.equal(state["cell"], before["graph"])


def test_projection_is_orthogonal():
    """P² = P and ⟨x, P y⟩ = ⟨P x, y⟩, so what is taken away is orthogonal to the subspace."""
    x, y = (State(LAYOUT, MASK, random_tensors(seed=k)) for k in (1, 2))
    assert_equal(x.projected().projected(), x.projected(), rtol=0, atol=1e-14)
    for domain in DOMAINS:
        left = (x.tensors[domain] * y.projected().tensors[domain]).sum()
        right = (x.projected().tensors[domain] * y.tensors[domain]).sum()
        torch.testing.assert_close(left, right)


# -- noise ---------------------------------------------------------------------------------------


def noise_of(numbers, mask, level=3, layout=LAYOUT, kind=RandomNumbers, seed=5):
    return kind(seed, torch.as_tensor(numbers)).noise(layout, mask, level)


def test_noise_has_unit_variance_on_its_subspace():
    """Of coordinates in an orthonormal basis of zero-mean positions, and of every other entry."""
    count, atoms = 4000, 5
    mask = torch.ones(count, atoms, dtype=torch.bool)
    noise = noise_of(torch.arange(count), mask)
    basis = torch.linalg.qr(torch.eye(atoms) - 1 / atoms)[0][:, : atoms - 1]
    free = torch.einsum("ak,bac->bkc", basis, noise["positions"])
    lower = torch.tril_indices(atoms, atoms, -1)
    samples = {
        "positions": free.flatten(1),
        "elements": noise["elements"].flatten(1),
        "charges": noise["charges"].flatten(1),
        "bonds": noise["bonds"][:, lower[0], lower[1]].flatten(1),
        "cell": noise["cell"],
    }
    for name, values in samples.items():
        variance = values.var(dim=0)
        assert (variance - 1).abs().max() < 0.12, name
        assert values.mean(dim=0).abs().max() < 0.08, name
        assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 0.001, name
    # Fields are independent of each other and of themselves elsewhere.
    joint = np.corrcoef(torch.cat(list(samples.values()), dim=1).numpy().T)
    assert np.abs(joint - np.eye(len(joint))).max() < 0.09


def test_noise_of_a_sample_depends_on_nothing_else():
    """Neither on the other samples, nor on padding, nor on the shard, in every domain."""
    numbers, sizes = torch.tensor([4, 11, 7]), (6, 4, 1)
    together = noise_of(numbers, MASK)
    for k, size in enumerate(sizes):
        alone = noise_of(numbers[k : k + 1], torch.ones(1, size, dtype=torch.bool))
        for name in LAYOUT.fields:
            values = together[name][k : k + 1]
            field = LAYOUT.fields[name]
            if field.domain != "graph":
                values = values[:, :size]
            if field.domain == "pair":
                values = values[:, :, :size]
            # The mean over atoms is a sum over padding as well.
            torch.testing.assert_close(values, alone[name], rtol=0, atol=1e-6)
            if name != "positions":
                assert torch.equal(values, alone[name])
    shards = [
        RandomNumbers(5, numbers[rank::2], 3).noise(LAYOUT, MASK[rank::2], 3) for rank in (0, 1)
    ]
    for rank, shard in enumerate(shards):
        for domain in DOMAINS:
            assert torch.equal(shard.tensors[domain], together.tensors[domain][rank::2])


@pytest.mark.parametrize("domain", DOMAINS)
def test_levels_seeds_and_samples_have_noise_of_their_own(domain):
    mask = torch.ones(1, 6, dtype=torch.bool)
    seen = [
        noise_of([sample], mask, level, seed=seed).tensors[domain]
        for sample, level, seed in [
            (0, 3, 5),
            (1, 3, 5),
            (0, 4, 5),
            (0, 3, 6),
            (0, 3, 5 + (1 << 40)),
        ]
    ]
    for k, one in enumerate(seen):
        for other in seen[:k]:
            inside = one != 0
            assert (one[inside] != other[inside]).all()


def test_domains_do_not_share_their_numbers():
    noise = noise_of([0], torch.ones(1, 6, dtype=torch.bool))
    values = torch.cat([noise[name].flatten() for name in LAYOUT.fields if name != "bonds"])
    assert len(values.unique()) == len(values)


def test_more_fields_leave_the_noise_of_positions():
    """Up to four channels: a network that also predicts a cell keeps the noise of its atoms."""
    with_cell, without = Layout(FIELDS), Layout(FIELDS[:3])
    first, second = (noise_of([3, 9, 1], MASK, layout=layout) for layout in (with_cell, without))
    assert torch.equal(first.atoms, second.atoms)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_stratified_numbers_of_shards_are_those_of_the_whole(world):
    population = 11
    whole = RandomNumbers(3, torch.arange(population))
    for stratified in (False, True):
        timesteps = TimestepDistribution(1.5, stratified)
        expected = timesteps.draw(whole)
        for rank in range(world):
            random = RandomNumbers(3, torch.arange(population)[rank::world], population)
            assert torch.equal(timesteps.draw(random), expected[rank::world])
            assert torch.equal(random.quaternions(), whole.quaternions()[rank::world])
            assert torch.equal(
                random.integers(Stream.EDGES), whole.integers(Stream.EDGES)[rank::world]
            )
    numbers = whole.stratified(Stream.LEVEL)
    assert sorted((numbers * population).long().tolist()) == list(range(population))


# -- process, prediction, sampler ----------------------------------------------------------------


def crystal(count=3, atoms=6):
    """Clean data of all fields, in float64."""
    return random_state(seed=8)


class Knows:
    """A denoiser that knows the clean data, in any parametrisation."""

    def __init__(self, process, clean):
        self.process, self.clean = process, clean

    def __call__(self, noisy, time, mask, condition, self_condition):
        return self.output(noisy, levels_at(self.process, time))

    def output(self, noisy, level):
        alpha, sigma = self.process.alpha(level), self.process.sigma(level)
        noise = (noisy - alpha * self.clean) / sigma
        return {
            "noise": lambda: noise,
            "velocity": lambda: self.process.velocity(self.clean, noise, alpha, sigma),
            "clean": lambda: self.clean,
        }[self.process.prediction]()


@pytest.mark.parametrize(("process", "kind", "name"), SERVED)
@pytest.mark.parametrize("steps", [40, 7])
def test_a_denoiser_that_knows_the_data_returns_them(process, kind, name, steps):
    """Positions, elements, bonds and the periodic cell, by every sampler."""
    trained_with, clean = PROCESSES[process](40, prediction=kind), crystal()
    sampler = build_sampler(trained_with, name, steps)
    random = ExactRandomNumbers(1, torch.arange(3))
    drawn = sampler.sample(Knows(trained_with, clean), random, LAYOUT, MASK)
    # Noise of level 0 is left in discrete fields, and random samplers add it at the end.
    left = 6 * 1e-5**0.5 if process == "diffusion" else 1e-4
    for field in LAYOUT.fields.values():
        random = name in ("ancestral", "sde-dpm++")
        exact = process == "diffusion" and not random and not field.discrete
        error = (drawn[field.name] - clean[field.name]).abs().max()
        assert error < (1e-4 if exact else left), field.name
    cells, expected = drawn.decode()["cell"], 10 * clean["cell"]
    torch.testing.assert_close(cells, expected, rtol=0, atol=10 * left)
    assert (drawn.atoms[~MASK] == 0).all()
    assert torch.equal(drawn["bonds"], drawn["bonds"].transpose(1, 2))


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_parametrisations_agree(name, kind):
    """Each conversion, of every field, against the equations, with α and σ of the process."""
    process, clean = PROCESSES[name](40, prediction=kind), crystal()
    level = levels_at(process, torch.tensor([0.25, 0.5, 0.75]))
    noise = ExactRandomNumbers(2, torch.arange(3)).noise(LAYOUT, MASK, 0)
    noisy = process.add_noise(clean, noise, level)
    alpha, sigma = process.alpha(level), process.sigma(level)
    assert_equal(noisy, alpha * clean + sigma * noise)
    wrong = clean + 0.3 * ExactRandomNumbers(3, torch.arange(3)).noise(LAYOUT, MASK, 0)
    noise = (noisy - alpha * wrong) / sigma
    velocity = noise - wrong if name == "flow_matching" else alpha * noise - sigma * wrong
    truth = {"noise": noise, "velocity": velocity, "clean": wrong}
    found = Prediction(process, noisy, level, truth[kind])
    for other, expected in truth.items():
        # α² + σ² = 1 holds to the precision of float32.
        assert_equal(getattr(found, other), expected, rtol=1e-5, atol=1e-5)
    expected = found.velocity if name == "flow_matching" else found.noise
    assert found.target is expected


def test_noise_and_data_are_the_ends_of_a_process():
    clean, noise = crystal(), ExactRandomNumbers(2, torch.arange(3)).noise(LAYOUT, MASK, 0)
    for name, process in PROCESSES.items():
        built = process(1000)
        last = levels_at(built, torch.ones(3))
        first = torch.full_like(last, built.first_level)
        assert_equal(built.add_noise(clean, noise, last), noise, rtol=0, atol=0.02)
        assert_equal(built.add_noise(clean, noise, first), clean, rtol=0, atol=0.02)
        assert built.time(last).tolist() == [1, 1, 1], name


# -- the objective -------------------------------------------------------------------------------


def terms_of(process, wrong, clean, loss=None, mask=MASK, **options):
    loss = MeanSquaredError(channels=8) if loss is None else loss
    objective = Objective(process, loss, options.pop("weights", Weights(1.0)), **options)
    random = RandomNumbers(4, torch.arange(len(mask)))
    level = process.draw_levels(objective.timesteps.draw(random))
    seen = []

    def model(noisy, time, mask, condition, self_condition):
        torch.testing.assert_close(time, process.time(level))
        seen.append(noisy)
        return wrong(noisy, level)

    return objective(model, clean, random), seen[0], level


class Recorder(MeanSquaredError):
    """Keeps what it was called with."""

    requires = frozenset({"noisy", "noise_level"})

    def of(self, samples):
        self.samples = samples
        return super().of(samples)


@pytest.mark.parametrize("name", PROCESSES)
def test_losses_get_the_noisy_positions_and_their_level(name):
    """σ/α in the unit of positions, whatever the weight in time."""
    process, loss = PROCESSES[name](40), Recorder()
    _, noisy, level = terms_of(process, lambda noisy, level: noisy, crystal(), loss)
    scale = LAYOUT.fields["positions"].scale
    ratio = process.sigma(level) / process.alpha(level)
    torch.testing.assert_close(loss.samples.noise_level, (scale * ratio).double())
    torch.testing.assert_close(loss.samples.noisy, scale * noisy["positions"])


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_a_perfect_prediction_costs_nothing(name, kind):
    process, clean = PROCESSES[name](40, prediction=kind), crystal()
    knows = Knows(process, clean)
    for weighting in ("noise", "clean"):
        terms, _, _ = terms_of(
            process,
            knows.output,
            clean,
            weighting=weighting,
        )
        assert terms.parts.keys() == LAYOUT.fields.keys()
        assert terms.total.abs().max() < 1e-6


@pytest.mark.parametrize("loss", [MeanSquaredError(channels=8), MeanAbsoluteError(channels=8)])
def test_errors_are_means_over_the_places_of_each_domain(loss):
    """Over atoms, ordered pairs and samples, and over all channels of a domain."""
    process, clean = Diffusion(40), crystal()
    true = RandomNumbers(4, torch.arange(3)).noise(LAYOUT, MASK, 0)
    wrong = ExactRandomNumbers(6, torch.arange(3)).noise(LAYOUT, MASK, 0)
    weights = Weights(1.0, {"charges": 3.0, "cell": 0.5})
    terms, _, _ = terms_of(
        process, lambda noisy, level: poisoned(true + wrong), clean, loss, weights=weights
    )
    atoms = MASK.sum(1).double()
    places = {"atom": atoms, "pair": (atoms * (atoms - 1)).clamp(min=1), "graph": 1}
    for name, field in LAYOUT.fields.items():
        error = wrong[name].abs() ** loss.degree
        weight = 0.5 * {"charges": 3.0, "cell": 0.5}.get(name, 1.0)
        count = places[field.domain] * LAYOUT.channels[field.domain]
        expected = weight * error.flatten(1).sum(1) / count
        torch.testing.assert_close(terms.parts[name], expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(terms.total, sum(terms.parts.values()))


def test_clean_weighting_takes_errors_of_clean_data():
    """All terms have the weight √(α/σ) of JODO."""
    process, clean = Diffusion(40, prediction="clean"), crystal()
    wrong = 0.1 * ExactRandomNumbers(6, torch.arange(3)).noise(LAYOUT, MASK, 0)
    terms, _, level = terms_of(
        process, lambda noisy, level: clean + wrong, clean, weighting="clean"
    )
    weight = (process.alpha(level) / process.sigma(level)).sqrt().double()
    expected = weight * wrong["cell"].square().sum(1) / 9
    torch.testing.assert_close(terms.parts["cell"], expected, rtol=1e-4, atol=1e-8)
    loss = MeanSquaredError(channels=8)
    scale = LAYOUT.fields["positions"].scale
    predicted = scale * (clean + wrong)["positions"]
    positions = weight * loss(predicted, scale * clean["positions"], MASK)
    torch.testing.assert_close(terms.parts["positions"], positions, rtol=1e-4, atol=1e-8)


class SelfConditioned(torch.nn.Module):
    """Predicts a constant, and remembers the previous predictions that it gets."""

    self_conditioned = True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5).double())
        self.previous = []

    def forward(self, noisy, time, mask, condition, self_condition):
        self.previous.append(self_condition)
        return (self.weight * noisy).projected()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_self_conditioned_denoisers_get_their_first_prediction(probability):
    model, clean = SelfConditioned(), crystal()
    process = Diffusion(40, prediction="clean")
    objective = Objective(
        process, MeanSquaredError(channels=8), Weights(1.0),
        self_condition_probability=probability,
    )  # fmt: skip
    objective(model, clean, RandomNumbers(4, torch.arange(3))).total.sum().backward()
    assert model.weight.grad is not None
    if probability == 0:
        assert model.previous == [None]
    else:
        first, second = model.previous
        assert first is None
        assert isinstance(second, State)
        assert not second.atoms.requires_grad


def test_samplers_pass_the_previous_clean_prediction():
    model, process = SelfConditioned(), Diffusion(10, prediction="clean")
    build_sampler(process, "ddim").sample(model, RandomNumbers(0, torch.arange(3)), LAYOUT, MASK)
    first, *others = model.previous
    assert first is None
    assert len(others) == 10
    assert all(isinstance(state, State) for state in others)
    plain = Knows(process, crystal())
    build_sampler(process, "ddim").sample(plain, RandomNumbers(0, torch.arange(3)), LAYOUT, MASK)


# -- the hook of a sampler -----------------------------------------------------------------------


class FixAtoms(SamplingHook):
    """Inpainting: some atoms have the noise of the level around their values, in the end none."""

    def __init__(self, process, random, known, fixed):
        self.process, self.random, self.known, self.fixed = process, random, known, fixed
        self.levels, self.done = [], False

    def after_step(self, state, level):
        self.levels.append(level)
        levels = levels_of(len(state), level, state.mask.device)
        noise = self.random.noise(state.layout, state.mask, 100 + len(self.levels))
        noisy = self.process.add_noise(self.known, noise, levels)
        if level == 0:
            noisy = self.known
        return state.with_atoms(torch.where(self.fixed[None, :, None], noisy.atoms, state.atoms))


class Shrinks(torch.nn.Module):
    """A denoiser of normal data of spread 0.5, which knows nothing of the fixed atoms."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, noisy, time, mask, condition, self_condition):
        level = time if self.process.continuous else (time * self.process.steps).round().long()
        alpha, sigma = self.process.alpha(level), self.process.sigma(level)
        total = alpha**2 * 0.25 + sigma**2
        clean = (alpha * 0.25 / total) * noisy
        output = Prediction(
            PROCESSES[self.process.name](self.process.steps, prediction="clean"),
            noisy,
            level,
            clean,
        )
        return getattr(output, self.process.prediction)


@pytest.mark.parametrize(
    ("process", "name"), [(p, n) for p, kind, n in SERVED if kind == "velocity"]
)
def test_a_hook_fixes_atoms(process, name):
    """Features exactly, positions up to the motion that keeps the mean of all atoms at zero."""
    layout, mask = Layout(FIELDS[:3]), torch.ones(2, 5, dtype=torch.bool)
    trained_with = PROCESSES[process](30, prediction="velocity")
    random = ExactRandomNumbers(0, torch.arange(2))
    known = random_state(layout, mask, 3)
    fixed = torch.tensor([True, True, True, False, False])
    hook = FixAtoms(trained_with, random, known, fixed)
    sampler = build_sampler(trained_with, name)
    drawn = sampler.sample(Shrinks(trained_with), random, layout, mask, hook=hook)
    free = sampler.sample(Shrinks(trained_with), random, layout, mask)
    for field in ("elements", "charges"):
        assert torch.equal(drawn[field][:, fixed], known[field][:, fixed])
        assert (free[field][:, fixed] != known[field][:, fixed]).all()
        assert (drawn[field][:, ~fixed] != known[field][:, ~fixed]).all()
    apart, expected = (
        torch.cdist(x["positions"][:, fixed], x["positions"][:, fixed]) for x in (drawn, known)
    )
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-6)
    assert drawn["positions"].sum(dim=1).abs().max() < 1e-12  # projected after the hook
    assert hook.levels[-1] == 0
    assert all(a >= b for a, b in pairwise(hook.levels))
    assert set(hook.levels) == {0, *(at.level for at in sampler.visited[1:])}


def test_a_hook_guides_predictions():
    """A shift of the clean prediction of the cell moves the drawn cell, and nothing else."""
    process, clean = Diffusion(40), crystal()

    class Guide(SamplingHook):
        def after_prediction(self, prediction, level):
            cell = prediction.clean["cell"] + 1
            clean_process = Diffusion(40, prediction="clean")
            output = prediction.clean.replace(cell=cell)
            levels = torch.full((3,), level)
            return Prediction(clean_process, prediction.noisy, levels, output)

    random = ExactRandomNumbers(1, torch.arange(3))
    sampler = build_sampler(process, "ddim")
    drawn = sampler.sample(Knows(process, clean), random, LAYOUT, MASK, hook=Guide())
    torch.testing.assert_close(drawn["cell"], clean["cell"] + 1, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn["positions"], clean["positions"], rtol=0, atol=1e-4)


def test_the_default_hook_changes_nothing():
    process, clean = Diffusion(20), crystal()
    drawn = [
        build_sampler(process, "heun").sample(
            Knows(process, clean), RandomNumbers(1, torch.arange(3)), LAYOUT, MASK, hook=hook
        )
        for hook in (None, SamplingHook())
    ]
    assert_equal(*drawn, rtol=0, atol=1e-9)
