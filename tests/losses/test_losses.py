"""How losses are called, and what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad

from molgen_energy.losses import (
    LOSSES,
    CompleteEdges,
    EdgesConfig,
    EnergyConfig,
    KabschError,
    MeanSquaredError,
    Neighbours,
    PairwiseEnergy,
    SparseEdges,
    SpringFamily,
    SpringsConfig,
)

X = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ((X, X[:, :4]), {}, r"prediction \(2, 5, 3\) and target \(2, 4, 3\) differ"),
        ((X, X, torch.ones(2, 5, 1)), {}, r"expected a mask \(2, 5\), not \(2, 5, 1\)"),
        ((X, X), {"batch": torch.zeros(10)}, "take a mask, not batch"),
        ((X[0], X[0], torch.ones(5)), {}, "not a mask"),
        ((X[0], X[0]), {"batch": torch.tensor([0, 0, 1])}, r"expected batch \(5,\), not \(3,\)"),
        ((X[0], X[0]), {"batch": torch.tensor([0, 1, 0, 1, 1])}, "must ascend"),
        ((X[0, 0], X[0, 0]), {}, "not 1 dimensions"),
        ((X, X), {"features": torch.zeros(2, 4, 6)}, "expected features"),
        ((X, X), {"bonds": torch.zeros(2, 7)}, r"expected bonds \(2, 5, 5\) or \(3, E\)"),
        ((X, X), {"bonds": torch.zeros(3, 7)}, r"bonds \(3, E\) of integers"),
        ((X, X), {"bonds": torch.tensor([[2], [0], [1]])}, "outside of 2 samples of 5 atoms"),
        ((X, X), {"bonds": torch.tensor([[0], [-1], [1]])}, "outside of 2 samples of 5 atoms"),
        ((X[0], X[0]), {"bonds": torch.zeros(4, 2)}, "transpose"),
        (
            (X[0], X[0]),
            {"batch": torch.tensor([0, 0, 1, 1, 1]), "bonds": torch.tensor([[0], [4]])},
            "two samples",
        ),
        ((X[0], X[0]), {"batch": torch.tensor([-1, 0, 0, 0, 0])}, "must ascend from 0"),
        ((X[0], X[0]), {"batch": torch.zeros(5)}, "expected batch of integers"),
        ((X[0], X[0]), {"batch": torch.arange(5), "size": 3}, "more than size = 3"),
        ((X, X), {"features": torch.zeros(2, 5)}, "expected features of 3 dimensions"),
        ((X, X), {"neighbours": Neighbours(torch.zeros(2, 3, 1).long())}, "expected neighbours"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_fit_is_refused(name, arguments, given, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name]()(*arguments, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"springs": "exponentail"}, "unknown springs 'exponentail'"),
        ({"edges": "all"}, "unknown edges 'all'"),
        ({"distance": "feature"}, "unknown distance 'feature'"),
        ({"scale": "edn"}, "scale 'edn': expected a number or gdm"),
        ({"springs": "lennard_jones", "scale": "jodo"}, "no published scale for 'jodo'"),
        ({"springs": lambda d: d, "scale": "gdm"}, "known: none"),
        ({"scale": float("nan")}, "expected a number above 0"),
        ({"scale": -1.0}, "expected a number above 0"),
        ({"springs": 3}, "expected a name or a function"),
        ({"edges": SparseEdges}, "expected a name or an object"),
    ],
)
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PairwiseEnergy(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"springs": "lennard_jones"}, "give bonds"),
        ({"edges": "bonds"}, "give bonds"),
        ({"distance": "features"}, "give features"),
    ],
)
def test_what_is_missing_is_asked_for(options, message):
    with pytest.raises(ValueError, match=message):
        PairwiseEnergy(**options)(X, X)


def test_a_table_for_edges_that_take_none_is_refused():
    table = Neighbours(torch.zeros(2, 5, 1).long())
    with pytest.raises(ValueError, match="neighbours are for symmetrized edges"):
        PairwiseEnergy()(X, X, neighbours=table)


def test_published_scales():
    """c of the paper, for the models that it used the springs with."""
    table = {
        "constant": (1, 1),
        "exponential": (42, 24),
        "inverse": (5, 3.7),
        "inverse_square": (16, 9),
    }
    for springs, (gdm, jodo) in table.items():
        scales = [PairwiseEnergy(springs, model).scale for model in ("gdm", "edm", "jodo")]
        assert scales == [gdm, gdm, jodo]
    assert PairwiseEnergy("lennard_jones", "edm").scale == 9


def test_scale_and_springs_of_ones_own():
    target, prediction = torch.randn(2, 3, 6, 3).unbind(0)
    own = PairwiseEnergy(SpringFamily(lambda d: torch.exp(-d)), scale=3.0)
    expected = 3 * PairwiseEnergy("exponential")(prediction, target)
    torch.testing.assert_close(own(prediction, target), expected)
    # a function may write into its argument, return it, or return a number
    in_place = PairwiseEnergy(lambda d: d.neg_().exp_(), 3.0)
    torch.testing.assert_close(in_place(prediction, target), expected)
    number = PairwiseEnergy(lambda d: 1.0)
    constant = PairwiseEnergy("constant")
    torch.testing.assert_close(number(prediction, target), constant(prediction, target))
    linear = PairwiseEnergy(lambda d: d)
    torch.testing.assert_close(linear(target, target), torch.zeros(3))
    torch.testing.assert_close(
        linear(prediction, target),
        PairwiseEnergy(lambda d: 1 * d)(prediction, target),
    )


def test_blocks_give_the_same():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(7, 23, 3, generator=generator).double()
    prediction = target + 0.1 * torch.randn(target.shape, generator=generator)
    mask = torch.rand(7, 23, generator=generator) > 0.2
    results = []
    for pairs in (1, 24, 23 * 23, 3 * 23 * 23, 10**9):
        position = prediction.clone().requires_grad_()
        value = PairwiseEnergy(edges=CompleteEdges(pairs))(position, target, mask)
        value.sum().backward()
        results.append((value.detach(), position.grad))
    for value, gradient in results[1:]:
        torch.testing.assert_close(value, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])


def test_bonds_in_blocks_give_the_same():
    """Blocks of several samples, of some rows of one, and of all pairs see the same bonds."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(7, 23, 3, generator=generator).double()
    prediction = target + 0.1 * torch.randn(target.shape, generator=generator)
    bonds = torch.stack([torch.randint(n, (60,), generator=generator) for n in (7, 23, 23)])
    adjacency = torch.zeros(7, 23, 23)
    adjacency[bonds[0], bonds[1], bonds[2]] = 1
    expected = None
    for pairs in (1, 24, 23 * 23, 3 * 23 * 23, 10**9):
        loss = PairwiseEnergy("lennard_jones", edges=CompleteEdges(pairs))
        for given in (bonds, bonds.flip(1), adjacency):
            value = loss(prediction, target, bonds=given)
            expected = value if expected is None else expected
            torch.testing.assert_close(value, expected)
    assert (expected != PairwiseEnergy("inverse_square")(prediction, target)).all()


def test_a_section_resolves_with_as_little_data_as_it_needs():
    """A number and a published scale need none; the stiffness is computed when it is read."""
    passes = []
    target = torch.rand(3, 6, 3, generator=torch.Generator().manual_seed(0)).double()

    def samples():
        passes.append(1)
        return [{"target": target[:2]}, {"target": target[2:]}]

    lengths = torch.cdist(target, target)[:, ~torch.eye(6, dtype=torch.bool)]
    mean = float(torch.exp(-lengths).mean())
    for scale, expected in (("auto", 1 / mean), ("jodo", 24.0), (2.5, 2.5)):
        passes.clear()
        resolved = EnergyConfig(springs=SpringsConfig(scale=scale)).resolve(samples, 0)
        assert resolved.config.springs.scale == pytest.approx(expected)
        assert len(passes) == (scale == "auto")
        assert resolved.stiffness == pytest.approx(expected * mean)
        assert resolved.stiffness == resolved.stiffness
        assert len(passes) == 1
        assert resolved.config.resolve(samples, 0).config == resolved.config
    bonded = EnergyConfig(edges=EdgesConfig(kind="bonds"))
    one = torch.tensor([[0, 1, 2], [0, 0, 0], [1, 1, 1]])
    resolved = bonded.resolve(lambda: [{"target": target, "bonds": one}], 0)
    share = float(torch.exp(-(target[:, 0] - target[:, 1]).norm(dim=1)).mean()) / (15 * mean)
    assert resolved.stiffness == pytest.approx(share)
    passes.clear()
    assert MeanSquaredError.Config().resolve(samples, 0).stiffness == 1
    assert not passes


def test_a_section_with_auto_is_not_built():
    with pytest.raises(ValueError, match=r"loss\.springs\.scale is auto: resolve the section"):
        EnergyConfig().build()
    channels = MeanSquaredError.Config().build(channels=7).channels
    assert channels == 7


@pytest.mark.parametrize("edges", ["complete", "sparse", "bonds", None])
def test_only_symmetrized_edges_are_prepared(edges):
    loss = MeanSquaredError() if edges is None else PairwiseEnergy(edges=edges)
    assert "neighbours" not in loss.requires
    with pytest.raises(ValueError, match="not prepare neighbours"):
        loss.prepare_neighbours(X)


@pytest.mark.parametrize("loss", [PairwiseEnergy(), KabschError()], ids=["energy", "kabsch"])
def test_gradient_flows_to_the_prediction_alone(loss):
    target = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match=r"the target of .* gets no gradient: detach it"):
        loss(target + 1, target.clone().requires_grad_())
    prediction = (target + 1).requires_grad_()
    with torch.no_grad():
        value = loss(prediction, target.clone().requires_grad_())
        assert not value.requires_grad


@pytest.mark.parametrize("shape", [[1.0, 1, 0], [1.0, 0, 0]], ids=["planar", "linear"])
def test_kabsch_in_forward_mode_where_the_rotation_is_not_unique(shape):
    prediction, target, step = torch.randn(3, 2, 6, 3).double().unbind(0)
    prediction, target = prediction * torch.tensor(shape), target * torch.tensor(shape)

    def loss(position):
        return KabschError()(position, target)

    gradient = torch.func.jacrev(lambda x: loss(x).sum())(prediction)
    _, tangent = torch.func.jvp(loss, (prediction,), (step,))
    torch.testing.assert_close(tangent, (gradient * step).sum((1, 2)))


@pytest.mark.parametrize("loss", [PairwiseEnergy(), KabschError()], ids=["energy", "kabsch"])
def test_no_second_derivative_is_not_silent(loss):
    prediction = torch.randn(1, 4, 3, requires_grad=True)
    value = loss(prediction, torch.randn(1, 4, 3)).sum()
    (gradient,) = torch.autograd.grad(value, prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_and_functional_gradients(name):
    """Directional derivatives agree with the gradient, however it is asked for."""
    prediction, target, step = torch.randn(3, 2, 6, 3).double().unbind(0)
    loss = LOSSES[name]()
    position = prediction.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(position, target).sum(), position)
    expected = (gradient * step).sum((1, 2))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(prediction, step)
        tangent = forward_ad.unpack_dual(loss(dual, target)).tangent
    torch.testing.assert_close(tangent, expected)
    found = torch.func.grad(lambda x: loss(x, target).sum())(prediction)
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_input_is_left_as_it_was(name):
    prediction, target = torch.randn(2, 2, 4, 3).unbind(0)
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    before = prediction.clone(), target.clone(), mask.clone()
    LOSSES[name]()(prediction, target, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (prediction, target, mask), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_other_strides_and_empty_batches(name):
    loss = LOSSES[name]()
    prediction, target = torch.randn(2, 3, 6, 4).transpose(2, 3).unbind(0)
    expected = loss(prediction.contiguous(), target.contiguous())
    torch.testing.assert_close(loss(prediction, target), expected)
    assert loss(torch.zeros(0, 5, 3), torch.zeros(0, 5, 3)).shape == (0,)
    assert loss(torch.zeros(0, 3), torch.zeros(0, 3), batch=torch.zeros(0).long()).shape == (0,)
    assert (loss(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3)) == 0).all()


def test_a_sample_without_atoms_costs_nothing():
    prediction = torch.randn(5, 3, requires_grad=True)
    value = PairwiseEnergy()(
        prediction, prediction.detach() + 1, batch=torch.tensor([0, 0, 0, 2, 2])
    )
    assert value.shape == (3,)
    assert value[1] == 0
    batch = torch.tensor([0, 0, 0, 2, 2])
    more = PairwiseEnergy()(prediction, prediction.detach() + 1, batch=batch, size=5)
    assert more.shape == (5,)


@pytest.mark.parametrize("edges", ["bonds", "complete", "sparse"])
def test_bonds_in_one_direction_are_bonds(edges):
    prediction, target = torch.randn(2, 1, 6, 3).unbind(0)
    both = torch.zeros(1, 6, 6)
    both[0, [0, 1, 2], [4, 2, 5]] = both[0, [4, 2, 5], [0, 1, 2]] = 1
    loss = PairwiseEnergy("lennard_jones", 1.0, edges if edges != "sparse" else SparseEdges(1))
    expected = loss(prediction, target, bonds=both)
    for one in (both.triu(), both.tril()):
        torch.testing.assert_close(loss(prediction, target, bonds=one), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_data_of_other_types(name):
    """Integers, other precisions: the prediction says in which precision to calculate."""
    target = torch.randint(-3, 3, (2, 5, 3))
    prediction = target + torch.randn(2, 5, 3)
    expected = LOSSES[name]()(prediction, target.float())
    for other in (target, target.double(), target.half()):
        torch.testing.assert_close(LOSSES[name]()(prediction, other), expected)
    with pytest.raises(ValueError, match="floating-point"):
        LOSSES[name]()(target, target)


@pytest.mark.parametrize("edges", ["complete", "sparse"])
def test_losses_are_copied_and_pickled(edges):
    loss = PairwiseEnergy("inverse", 2.0, edges)
    prediction, target = torch.randn(2, 2, 9, 3).unbind(0)

    def value(loss):
        return loss(prediction, target, generator=torch.Generator().manual_seed(0))

    expected = value(loss)
    assert torch.equal(value(copy.deepcopy(loss)), expected)
    assert torch.equal(value(pickle.loads(pickle.dumps(loss))), expected)


def test_no_tensor_of_all_pairs_on_the_sparse_path():
    """30,000 atoms: all pairs would take 3.6 GB; the largest tensor here is far below."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            sizes.extend(x.numel() for x in outputs if isinstance(x, torch.Tensor))
            return result

    n = 30_000
    target = torch.randn(1, n, 3)
    prediction = (target + 0.1).requires_grad_()
    loss = PairwiseEnergy(edges=SparseEdges(pool=1))
    with Watch():
        loss(prediction, target).sum().backward()
    assert max(sizes) < 10 * 3 * n
    assert len(sizes) < 2000  # and no loop over atoms


@pytest.mark.filterwarnings("ignore:Optimal rotation is not uniquely")
def test_kabsch_against_scipy():
    """The same least squares as scipy's alignment of vectors, planar and linear molecules too."""
    from scipy.spatial.transform import Rotation

    generator = torch.Generator().manual_seed(0)
    for shape in ([1.0, 1, 1], [1, 1, 0], [1, 0, 0]):
        target = torch.randn(5, 8, 3, generator=generator).double() * torch.tensor(shape)
        prediction = target + 0.5 * torch.randn(target.shape, generator=generator)
        got = KabschError(channels=1)(prediction, target)
        for k in range(5):
            a, b = (x[k].numpy() - x[k].numpy().mean(0) for x in (prediction, target))
            _, distance = Rotation.align_vectors(a, b)
            assert float(got[k]) == pytest.approx(distance**2 / 8, rel=1e-6)
