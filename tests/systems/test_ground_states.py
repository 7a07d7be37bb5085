"""Spin glasses: ground states against other ways to find them, drawing, solving and judging."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import product

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from molgen_energy.errors import InputError, PeerLostError
from molgen_energy.systems.spins import ground_states as solvers
from molgen_energy.systems.spins.dataset import draw_couplings, pieces_of, solved_pieces
from molgen_energy.systems.spins.ground_states import (
    brute_force,
    by_matching,
    by_program,
    certify,
    ground_states,
)
from molgen_energy.systems.spins.lattices import Lattices, check_size, fixed
from molgen_energy.systems.spins.metrics import descend, score_predictions

pytest.importorskip("pymatching")
pytest.importorskip("highspy")

UNIFORM = [7793639 / 2**23, -8363907 / 2**23]
KINDS = ("uniform", "binary")
BOUNDARIES = pytest.mark.parametrize("periodic", [False, True], ids=["open", "periodic"])


def bonds_of(lattices, k):
    """Every bond of a lattice one by one: two sites and a coupling."""
    size = lattices.size
    for r, c in product(range(size), repeat=2):
        for row, column, couplings in ((r, c + 1, lattices.right), (r + 1, c, lattices.down)):
            if lattices.periodic or (row < size and column < size):
                yield (r, c), (row % size, column % size), float(couplings[k, r, c])


def naive_energy(lattices, k, spins):
    return -sum(j * int(spins[a]) * int(spins[b]) for a, b, j in bonds_of(lattices, k))


def random_spins(rng, *shape):
    return rng.choice(np.array([-1, 1], np.int8), shape)


def mixed(periodic, size=4, count=24, seed=0):
    """Uniform and binary couplings, whole ones from −2 to 2, and ones with many zeros."""
    rng = np.random.default_rng(seed)
    both = np.concatenate(
        [
            *(
                np.stack([x.right, x.down], 1)
                for x in (draw_couplings(range(count), size, periodic, kind, 7) for kind in KINDS)
            ),
            rng.integers(-2, 3, (count, 2, size, size)),
            rng.normal(size=(count, 2, size, size)) * rng.integers(0, 2, (count, 2, size, size)),
        ]
    )
    some = Lattices(both[:, 0], both[:, 1], periodic).couplings().any(axis=(1, 2, 3))
    return Lattices.checked(both[some, 0], both[some, 1], periodic)


def transfer(right, down):
    """The lowest energy with an open boundary, row by row over all rows of spins."""
    size = len(right)
    rows = np.array(list(product([-1.0, 1.0], repeat=size)))
    within = -(rows[:, :-1] * rows[:, 1:]) @ right[:, :-1].T.astype(float)  # (2^L, L)
    lowest = within[:, 0]
    for r in range(1, size):
        between = -(rows * down[r - 1].astype(float)) @ rows.T
        lowest = (lowest[:, None] + between).min(axis=0) + within[:, r]
    return lowest.min()


def by_milp(lattices, k):
    """The lowest energy by another program: spins themselves, and for each bond y_i y_j = ±1."""
    size = lattices.size
    bonds = list(bonds_of(lattices, k))
    sites, count = size * size, len(bonds)
    rows, low, high = [], [], []
    for e, (a, b, coupling) in enumerate(bonds):
        i, j = a[0] * size + a[1], b[0] * size + b[1]
        # d = |x_i − x_j|, from below where the bond is better satisfied, from above elsewhere.
        for x, y, lower, upper in (
            [(1, -1, -np.inf, 0), (-1, 1, -np.inf, 0)]
            if coupling > 0
            else [(1, 1, 0, np.inf), (-1, -1, -2, np.inf)]
        ):
            row = np.zeros(sites + count)
            row[i], row[j], row[sites + e] = x, y, -1
            rows.append(row)
            low.append(lower)
            high.append(upper)
    couplings = np.array([j for *_, j in bonds])
    bounds = Bounds(np.zeros(sites + count), np.ones(sites + count))
    bounds.ub[0] = 0
    done = milp(
        np.concatenate([np.zeros(sites), 2 * couplings]),
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.concatenate([np.ones(sites), np.zeros(count)]),
        bounds=bounds,
        options={"mip_rel_gap": 0},
    )
    assert done.status == 0
    return done.fun - couplings.sum()


# Lattices


@BOUNDARIES
def test_energies_and_fields(periodic, rng):
    """Against a loop over bonds; a flip costs twice y_i h_i."""
    lattices = mixed(periodic, count=2)
    spins = random_spins(rng, len(lattices), 3, 4, 4)
    expected = [[naive_energy(lattices, k, s) for s in own] for k, own in enumerate(spins)]
    energies = lattices.energies(spins)
    np.testing.assert_allclose(energies, expected, atol=1e-12)
    assert np.array_equal(lattices.energies(-spins), energies)
    np.testing.assert_allclose(lattices.energies(spins[:, 1]), energies[:, 1], atol=1e-12)
    assert np.array_equal(lattices.with_spins(spins[:, 1]).energies(), energies[:, 1])
    fields = lattices.fields(spins)
    assert np.array_equal(lattices.fields(spins[:, 2]), fields[:, 2])
    for r, c in product(range(4), repeat=2):
        flipped = spins.copy()
        flipped[..., r, c] *= -1
        cost = 2 * (spins * fields)[..., r, c]
        np.testing.assert_allclose(lattices.energies(flipped) - energies, cost, atol=1e-12)


def test_same_energy_as_losses():
    torch = pytest.importorskip("torch")
    from molgen_energy.losses import lattice_couplings

    for periodic in (False, True):
        lattices = draw_couplings(range(3), 4, periodic, "uniform", 0)
        spins = random_spins(np.random.default_rng(0), 3, 4, 4)
        right, down = (torch.from_numpy(x).double() for x in (lattices.right, lattices.down))
        table = lattice_couplings(right, down, periodic)
        y = torch.from_numpy(spins).double().reshape(3, 16)
        energy = -0.5 * (
            y[:, :, None] * table.weight * y[torch.arange(3)[:, None, None], table.index]
        )
        np.testing.assert_allclose(lattices.energies(spins), energy.sum(dim=(1, 2)), atol=1e-12)


def test_boundary_without_meaning():
    """What stands beyond an open boundary has no effect, even NaN."""
    lattices = draw_couplings(range(2), 5, False, "uniform", 0)
    right, down = lattices.right.copy(), lattices.down.copy()
    right[:, :, -1], down[:, -1] = np.nan, 7
    spins = random_spins(np.random.default_rng(0), 2, 5, 5)
    for other in (Lattices(right, down, False), Lattices.checked(right, down, False)):
        assert np.array_equal(other.energies(spins), lattices.energies(spins))
        assert np.array_equal(ground_states(other), ground_states(lattices))
    checked = Lattices.checked(right, down, False)
    assert np.array_equal(checked.right, lattices.right)
    assert np.isnan(right[0, 0, -1])  # the caller's array is as before


def test_select_and_fixed(rng):
    lattices = draw_couplings(range(5), 4, True, "uniform", 0)
    assert (len(lattices), lattices.size, lattices.bonds) == (5, 4, 32)
    assert draw_couplings([0], 4, False, "uniform", 0).bonds == 24
    spins = random_spins(rng, 5, 4, 4)
    lattices = lattices.with_spins(spins)
    for which in (slice(1, 3), [1, 2], np.array([False, True, True, False, False])):
        part = lattices.select(which)
        assert np.array_equal(part.right, lattices.right[1:3])
        assert np.array_equal(part.spins, spins[1:3])
    assert len(lattices.select([])) == 0
    both = fixed(np.stack([spins, -spins]))
    assert np.array_equal(both[0], both[1])
    assert (both[..., 0, 0] == 1).all()
    assert np.array_equal(both[0] * spins[:, :1, :1], spins)


GOOD = np.ones((3, 4, 4))


def changed(value, where=(1, 2, 2)):
    array = GOOD.copy()
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD, GOOD[:2], True), r"^mine: 'right' has shape \(3, 4, 4\) and 'down' \(2, 4, 4\)"),
        ((GOOD[:, :3], GOOD[:, :3], True), "^mine: .*not those of square lattices"),
        ((GOOD[0], GOOD[0], True), "^mine: .*not those of square lattices"),
        ((GOOD[:, :1, :1], GOOD[:, :1, :1], False), "^mine: a size of 1 .*take at least 2"),
        ((changed(np.nan), GOOD, True), "^mine: record 2 has couplings that are not finite.*leave"),
        ((GOOD, changed(np.inf), False), "^mine: record 2 .*not finite"),
        ((changed(1e39), GOOD, False), "^mine: record 2 .*not finite numbers of float32"),
        ((changed(0, 2), changed(0, 2), True), "^mine: record 3 .*all zero, .*leave it out"),
        ((GOOD, GOOD, True, GOOD[:2]), "^mine: spins of shape .*do not fit"),
        ((GOOD, GOOD, True, changed(0)), "^mine: record 2 has spins other than 1 and -1"),
    ],
)
def test_unusable_lattices(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        Lattices.checked(*arguments, origin="mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "remedy"), [(2, "size 4"), (3, "size 4"), (7, "size 6 or 8")])
def test_periodic_sizes(size, remedy):
    """An odd torus is refused with what to do, by whatever makes or takes one."""
    values = np.ones((1, size, size))
    for refused in (
        lambda: check_size(size, True),
        lambda: Lattices.checked(values, values, True),
        lambda: draw_couplings([0], size, True, "uniform", 0),
    ):
        match = f"even size of at least 4, not {size}; take {remedy},? or --boundary open"
        with pytest.raises(InputError, match=match):
            refused()
    check_size(size, False)


# Ground states


@BOUNDARIES
@pytest.mark.parametrize("method", list(solvers.SOLVERS))
def test_against_all_configurations(periodic, method):
    """Uniform, binary, whole and normal couplings, with zeros among them."""
    if periodic and method == "matching":
        pytest.skip("matching has no torus")
    lattices = mixed(periodic)
    truth = brute_force(lattices)
    spins = ground_states(lattices, method)
    np.testing.assert_allclose(lattices.energies(spins), truth.energies, atol=1e-9)
    assert (spins[:, 0, 0] == 1).all()
    assert ((spins * lattices.fields(spins)) >= -1e-9).all()
    alone = truth.states == 1
    assert 20 < alone.sum() < len(alone)  # degenerate ones as well
    assert np.array_equal(spins[alone], truth.spins[alone])


def test_all_configurations_themselves():
    """Against a loop over configurations and bonds; the number of ground states too."""
    lattices = mixed(False, size=3, count=2)
    truth = brute_force(lattices)
    for k in range(len(lattices)):
        energies = [
            naive_energy(lattices, k, np.reshape((1, *rest), (3, 3)))
            for rest in product([1, -1], repeat=8)
        ]
        assert truth.energies[k] == pytest.approx(min(energies), abs=1e-12)
        assert naive_energy(lattices, k, truth.spins[k]) == pytest.approx(min(energies), abs=1e-12)
        assert truth.states[k] == sum(e < min(energies) + 1e-9 for e in energies)
    with pytest.raises(ValueError, match="too many configurations"):
        brute_force(draw_couplings([0], 5, False, "uniform", 0))


@pytest.mark.parametrize("size", [2, 3])
def test_smallest_lattices(size):
    lattices = mixed(False, size, count=30)
    truth = brute_force(lattices)
    for method in solvers.SOLVERS:
        energies = lattices.energies(ground_states(lattices, method))
        np.testing.assert_allclose(energies, truth.energies, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_against_transfer_matrix(kind):
    for size in (8, 9):
        lattices = draw_couplings(range(3), size, False, kind, size)
        lowest = [transfer(*x) for x in zip(lattices.right, lattices.down, strict=True)]
        for method in solvers.SOLVERS:
            energies = lattices.energies(ground_states(lattices, method))
            np.testing.assert_allclose(energies, lowest, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_both_solvers_at_full_size(kind):
    lattices = draw_couplings(range(8), 16, False, kind, 1)
    one, other = (ground_states(lattices, method) for method in solvers.SOLVERS)
    assert np.array_equal(lattices.energies(one), lattices.energies(other))
    if kind == "uniform":
        assert np.array_equal(one, other)


@pytest.mark.parametrize(("kind", "size"), [("uniform", 6), ("binary", 6), ("uniform", 8)])
def test_torus_against_another_program(kind, size):
    lattices = draw_couplings(range(2), size, True, kind, 2)
    lowest = [by_milp(lattices, k) for k in range(len(lattices))]
    np.testing.assert_allclose(lattices.energies(ground_states(lattices)), lowest, atol=1e-6)


def test_torus_at_full_size():
    """The bound says that nothing is lower: energies are 2⁻²² apart, of binary couplings 4."""
    for kind, apart in (("uniform", 2.0**-22), ("binary", 4)):
        lattices = draw_couplings(range(4), 16, True, kind, 3)
        for k in range(len(lattices)):
            solution = by_program(lattices.select([k]))
            assert solution.bound <= solution.energy < solution.bound + apart
        energies = lattices.energies(ground_states(lattices))
        certify(lattices, ground_states(lattices), energies, energies)


@pytest.mark.parametrize("seed", [7, 16, 54, 127])
def test_hard_torus(seed, monkeypatch):
    """Nearly degenerate couplings, where the inequalities leave bonds undecided."""
    branched = []
    original = solvers._branching

    def noted(*arguments):
        branched.append(original(*arguments))
        return branched[-1]

    monkeypatch.setattr(solvers, "_branching", noted)
    rng = np.random.default_rng(seed)
    right, down = rng.choice([-1, 1], (2, 1, 6, 6)) * rng.normal(1, 1e-3, (2, 1, 6, 6))
    lattice = Lattices.checked(right, down, True)
    assert by_program(lattice).energy == pytest.approx(by_milp(lattice, 0), abs=1e-6)
    assert branched


def test_coarse_and_fine_couplings():
    """Units are found; couplings that PyMatching has to round cost no more than they may."""
    rng = np.random.default_rng(0)
    for values, unit in (
        ([1, -1], 1),
        ([0.1, -0.1], np.float32(0.1)),
        ([0.75, 0.5, 0], 0.25),
        ([9, -3], 3),
        ([1, 2.0**-30], 2.0**-30),
    ):
        assert solvers._unit(np.array(values, np.float32).astype(float)) == unit
    assert 0 < solvers._unit(np.array([1, np.float32(1e-30)], float)) < 1e-30
    drawn = draw_couplings(range(200), 8, False, "uniform", 0)
    largest = np.abs(drawn.couplings()).max() / solvers._unit(drawn.couplings())
    assert solvers._STEPS / 4 < largest <= solvers._STEPS
    assert by_matching(drawn.select([0])).energy == by_matching(drawn.select([0])).bound

    right, down = rng.normal(size=(2, 5, 8, 8)) * 10.0 ** rng.uniform(-6, 0, (2, 5, 8, 8))
    fine = Lattices.checked(right, down, False)
    lowest = [transfer(*x) for x in zip(fine.right, fine.down, strict=True)]
    for k in range(len(fine)):
        solution = by_matching(fine.select([k]))
        assert solution.bound < solution.energy  # it was rounded
        assert solution.bound <= lowest[k] + 1e-12
        assert solution.energy - lowest[k] <= 6e-8 * fine.bonds * fine.strongest[k]
        assert by_program(fine.select([k])).energy == pytest.approx(lowest[k], abs=1e-9)


def test_rounding_leaves_no_site_unstable():
    """Two bonds of a corner are alike to PyMatching; the spin follows the stronger one."""
    near = 0.5 + 2.0**-24
    for a, b in ((near, -0.5), (-near, 0.5), (0.5, -near), (-0.5, near)):
        right = np.array([[[a, 0], [1.7, 0]]])
        down = np.array([[[b, 1.7], [0, 0]]])
        lattices = Lattices.checked(right, down, False)
        assert by_matching(lattices).bound < by_matching(lattices).energy
        assert np.array_equal(ground_states(lattices), brute_force(lattices).spins)


@pytest.mark.parametrize("scale", [2.0**-60, 1e-3, 1e6])
def test_scale_of_couplings(scale):
    """Other units of energy change nothing."""
    for periodic in (False, True):
        lattices = draw_couplings(range(3), 6, periodic, "uniform", 0)
        expected = ground_states(lattices)
        scaled = Lattices.checked(lattices.right * scale, lattices.down * scale, periodic)
        assert np.array_equal(ground_states(scaled), expected)
        scores = score_predictions(scaled.with_spins(expected), expected)
        assert scores.prediction.exact.all()


def test_flipped_couplings():
    """Changing the sign of spins and of the couplings around them is the same problem."""
    for periodic in (False, True):
        lattices = draw_couplings(range(3), 8, periodic, "uniform", 0)
        gauge = fixed(random_spins(np.random.default_rng(0), 3, 8, 8))
        right = lattices.right * gauge * np.roll(gauge, -1, 2)
        down = lattices.down * gauge * np.roll(gauge, -1, 1)
        turned = Lattices.checked(right, down, periodic)
        assert np.array_equal(ground_states(turned), ground_states(lattices) * gauge)


@BOUNDARIES
def test_same_every_time(periodic):
    """Also of degenerate lattices, and whatever was solved before."""
    lattices = draw_couplings(range(4), 8, periodic, "binary", 0)
    first = ground_states(lattices)
    again = ground_states(lattices.select(slice(None, None, -1)))[::-1]
    assert np.array_equal(first, again)


def test_wrong_configurations_are_noticed(monkeypatch):
    lattices = draw_couplings(range(3), 8, False, "uniform", 0)
    spins = ground_states(lattices)
    energies = lattices.energies(spins)
    certify(lattices, spins, energies, energies)
    with pytest.raises(RuntimeError, match=r"^lattice 1 of 3: the solver's energy"):
        certify(lattices, spins, energies + np.array([0, 1e-9, 0]), energies)
    with pytest.raises(RuntimeError, match=r"^lattice 2 of 3: .*does not rule out a lower energy"):
        certify(lattices, spins, energies, energies - np.array([0, 0, 2.0**-21]))
    spins[2, 3, 3] *= -1
    with pytest.raises(RuntimeError, match=r"^lattice 2 of 3: .*not even locally stable"):
        certify(lattices, spins, lattices.energies(spins), lattices.energies(spins))

    def failing(lattice):
        raise RuntimeError("no way")

    monkeypatch.setitem(solvers.SOLVERS, "program", failing)
    with pytest.raises(RuntimeError, match=r"^lattice 0 of 3: no way"):
        ground_states(lattices, "program")
    with pytest.raises(ValueError, match=r"unknown method 'guess' \(valid: matching, program\)"):
        ground_states(lattices, "guess")
    with pytest.raises(ValueError, match="open boundaries alone"):
        by_matching(draw_couplings([0], 4, True, "uniform", 0))
    zero = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(InputError, match="record 1 has couplings that are all zero"):
        ground_states(Lattices(zero, zero, True))


@pytest.mark.parametrize(("package", "periodic"), [("pymatching", False), ("highspy", True)])
def test_missing_packages(monkeypatch, package, periodic):
    monkeypatch.setitem(sys.modules, package, None)
    lattices = draw_couplings([0], 4, periodic, "uniform", 0)
    match = rf"^{package} is not installed.*needs the extra: pip install 'molgen-energy\[spins\]'$"
    with pytest.raises(InputError, match=match):
        ground_states(lattices)
    with pytest.raises(InputError, match=match):  # and no process is started for it
        next(solved_pieces(lattices, pieces_of(1), workers=1))
    assert not multiprocessing.active_children()


def test_solvers_are_silent(capfd):
    ground_states(draw_couplings([0], 4, True, "uniform", 0))
    ground_states(draw_couplings([0], 4, False, "uniform", 0))
    assert capfd.readouterr() == ("", "")


# Drawing and solving many


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_couplings(kind):
    lattices = draw_couplings(range(300), 6, True, kind, 5)
    both = lattices.couplings()
    if kind == "binary":
        assert set(np.unique(both)) == {-1, 1}
    else:
        assert 0.999 < np.abs(both).max() < 1
        assert (np.fmod(both * 2**23, 2) != 0).all()  # odd multiples, none of them zero
        assert both.var() == pytest.approx(1 / 3, abs=0.01)
    assert abs(both.mean()) < 4 * both.std() / math.sqrt(both.size)
    # A number has the same couplings among any others, and none alike.
    some = draw_couplings([7, 250, 0], 6, True, kind, 5)
    assert np.array_equal(some.right, lattices.right[[7, 250, 0]])
    assert np.array_equal(some.down, lattices.down[[7, 250, 0]])
    assert len(np.unique(both.reshape(300, -1), axis=0)) == 300
    assert not np.array_equal(draw_couplings([7], 6, True, kind, 6).right, some.right[:1])
    # With an open boundary they are the same, but for those that mean nothing.
    opened = draw_couplings(range(300), 6, False, kind, 5)
    assert np.array_equal(opened.right[:, :, :-1], lattices.right[:, :, :-1])
    assert np.array_equal(opened.down[:, :-1], lattices.down[:, :-1])
    assert not opened.right[:, :, -1].any()
    assert not opened.down[:, -1].any()


def test_drawn_couplings_of_a_seed():
    """As they were when this was written: files that are extended later must fit."""
    uniform = draw_couplings([3], 2, False, "uniform", 11)
    binary = draw_couplings([3], 2, False, "binary", 11)
    assert uniform.right[0, :, 0].tolist() == UNIFORM
    assert binary.right[0, :, 0].tolist() == [float(np.sign(x)) for x in UNIFORM]
    assert len(draw_couplings([], 4, True, "uniform", 0)) == 0
    with pytest.raises(InputError, match="unknown kind of couplings 'binaries'; did you mean"):
        draw_couplings([0], 4, True, "binaries", 0)
    with pytest.raises(InputError, match="seed of -1 is negative"):
        draw_couplings([0], 4, True, "uniform", -1)


def test_pieces():
    pieces = pieces_of(105, 25)
    assert list(pieces) == [0, 1, 2, 3, 4]
    assert [i for numbers in pieces.values() for i in numbers] == list(range(105))
    assert {k: len(numbers) for k, numbers in pieces.items()} == {0: 25, 1: 25, 2: 25, 3: 25, 4: 5}


def test_workers_give_the_same():
    def draw(numbers):
        return draw_couplings(numbers, 6, False, "uniform", 0)

    pieces = pieces_of(17, 3)
    del pieces[1]  # finished before
    lattices = draw(range(17))
    truth = ground_states(lattices)
    for source, workers in ((draw, 0), (draw, 2), (lattices, 0), (lattices, 1)):
        solved = dict(solved_pieces(source, pieces, workers))
        assert sorted(solved) == [0, 2, 3, 4, 5]
        for number, part in solved.items():
            chosen = list(pieces[number])
            assert np.array_equal(part.right, lattices.right[chosen])
            assert np.array_equal(part.spins, truth[chosen])
    assert not multiprocessing.active_children()
    assert list(solved_pieces(draw, {}, 2)) == []


def test_dead_process():
    """A process that is killed is missed at once, and the other one ends too."""
    pieces = pieces_of(2000, 1000)
    solving = solved_pieces(lambda n: draw_couplings(n, 16, True, "uniform", 0), pieces, 2)

    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(children[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(PeerLostError, match=r"is gone \(exit code -9\) and piece 0 with it"):
        next(solving)
    thread.join()
    assert not multiprocessing.active_children()


def test_errors_of_processes():
    lattices = draw_couplings(range(4), 4, False, "uniform", 0)
    lattices.right[3] = lattices.down[3] = 0
    with pytest.raises(InputError, match="record 2 has couplings that are all zero"):
        list(solved_pieces(lattices, pieces_of(4, 2), workers=1))


SCRIPT = """
import signal
from multiprocessing import active_children
from molgen_energy.systems.spins.dataset import draw_couplings, pieces_of, solved_pieces

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = lambda numbers: draw_couplings(numbers, 16, True, "uniform", 0)
    pieces = {0: range(1), 1: range(2000)}
    try:
        for number, _ in solved_pieces(draw, pieces, 2):
            print("solved", number, *(child.pid for child in active_children()), flush=True)
    except KeyboardInterrupt:
        print("interrupted", len(active_children()), flush=True)
"""


def test_interrupt(tmp_path):
    """Ctrl-C, which goes to all processes, ends them at once and without a word of theirs."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, number, *children = process.stdout.readline().split()
        assert (number, len(children)) == ("0", 2)
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - begin < 5
    assert (stdout, stderr, process.returncode) == ("interrupted 0\n", "", 0)


# Judging


def naive_descent(lattices, k, spins):
    """The best flip of all, one after the other, with every energy computed anew."""
    spins = spins.copy()
    size = lattices.size
    while True:
        energy, costs = naive_energy(lattices, k, spins), []
        for site in product(range(size), repeat=2):
            spins[site] *= -1
            costs.append(naive_energy(lattices, k, spins) - energy)
            spins[site] *= -1
        best = int(np.argmin(costs))
        if costs[best] > -1e-9:
            return spins
        spins[divmod(best, size)] *= -1


@BOUNDARIES
@pytest.mark.parametrize("kind", KINDS)
def test_descent(periodic, kind, rng, monkeypatch):
    """Against a loop; binary couplings have ties, of which the first site is taken."""
    lattices = draw_couplings(range(3), 4, periodic, kind, 0)
    start = random_spins(rng, 3, 2, 4, 4)
    kept = start.copy()
    several = descend(lattices, start)
    assert np.array_equal(start, kept)
    for k, m in product(range(3), range(2)):
        assert np.array_equal(several[k, m], naive_descent(lattices, k, start[k, m]))
    assert ((several * lattices.fields(several)) >= -1e-9).all()
    assert np.array_equal(descend(lattices, start[:, 1]), several[:, 1])
    assert np.array_equal(descend(lattices, -start), -several)
    monkeypatch.setattr("molgen_energy.systems.spins.metrics._SITES_AT_ONCE", 64)  # 4 of 6
    assert np.array_equal(descend(lattices, start), several)


def test_descent_at_full_size(rng):
    lattices = draw_couplings(range(50), 16, True, "uniform", 0)
    spins = descend(lattices, random_spins(rng, 50, 3, 16, 16))
    assert ((spins * lattices.fields(spins)) >= 0).all()
    solved = ground_states(lattices.select(slice(2)))
    assert np.array_equal(descend(lattices.select(slice(2)), solved), solved)
    nothing = lattices.select([])
    assert descend(nothing, np.zeros((0, 16, 16), np.int8)).shape == (0, 16, 16)


@pytest.fixture(scope="module")
def solved():
    lattices = draw_couplings(range(30), 4, False, "uniform", 0)
    return lattices.with_spins(ground_states(lattices))


def test_scores_of_predictions(solved, rng):
    """Against loops."""
    predictions = solved.spins * np.where(rng.random((30, 4, 4)) < 0.1, -1, 1).astype(np.int8)
    predictions[:10] = -solved.spins[:10]
    scores = score_predictions(solved, predictions, seed=3, starts=4)
    starts = 2 * np.random.default_rng(3).integers(0, 2, (30, 4, 4, 4), dtype=np.int8) - 1
    for k in range(30):
        lowest = naive_energy(solved, k, solved.spins[k])

        def excess(spins, k=k, lowest=lowest):
            return naive_energy(solved, k, spins) - lowest

        descended = naive_descent(solved, k, predictions[k])
        expected = [excess(naive_descent(solved, k, start)) for start in starts[k]]
        for outcome, values in (
            (scores.prediction, [excess(predictions[k])]),
            (scores.from_prediction, [excess(descended)]),
            (scores.from_random, expected),
        ):
            np.testing.assert_allclose(outcome.excess[k], values, atol=1e-9)
            assert outcome.exact[k].tolist() == [value < 1e-6 for value in values]
        overlap = abs(sum(map(int, (solved.spins[k] * predictions[k]).flat))) / 16
        assert scores.overlap[k] == overlap
    assert scores.prediction.exact[:10].all()
    assert (scores.overlap[:10] == 1).all()
    assert 10 <= scores.prediction.exact.sum() < 30
    assert scores.from_prediction.exact.sum() > scores.prediction.exact.sum()

    means = scores.from_random.excess.mean(axis=1)
    assert scores.from_random.mean.value == pytest.approx(means.mean())
    assert scores.from_random.mean.error == pytest.approx(means.std(ddof=1) / math.sqrt(30))
    assert scores.mean_overlap.value == pytest.approx(scores.overlap.mean())
    rate = scores.prediction.rate
    assert (rate.count, rate.total, rate.effect) == (scores.prediction.exact.sum(), 30, 1)
    low, high = rate.interval
    assert low < rate.value < high
    several = scores.from_random.rate
    assert (several.count, several.total) == (scores.from_random.exact.sum(), 120)
    assert several.effect >= 1


def test_scores_are_invariant_under_flips(solved, rng):
    predictions = random_spins(rng, 30, 4, 4)
    signs = random_spins(rng, 30, 1, 1)
    one = score_predictions(solved, predictions)
    for other in (
        score_predictions(solved, predictions * signs),
        score_predictions(solved.with_spins(solved.spins * signs), predictions),
    ):
        assert np.array_equal(one.overlap, other.overlap)
        for name in ("prediction", "from_random", "from_prediction"):
            assert np.array_equal(getattr(one, name).excess, getattr(other, name).excess)


def test_scores_of_a_part(solved, rng):
    """Random starts of the first lattices do not depend on how many follow."""
    predictions = random_spins(rng, 30, 4, 4)
    whole = score_predictions(solved, predictions, starts=2)
    part = score_predictions(solved.select(slice(7)), predictions[:7], starts=2)
    assert np.array_equal(part.from_random.excess, whole.from_random.excess[:7])
    other = score_predictions(solved, predictions, seed=1, starts=2)
    assert not np.array_equal(other.from_random.excess, whole.from_random.excess)
    none = score_predictions(solved.select([]), predictions[:0])
    assert math.isnan(none.prediction.mean.value)
    assert none.prediction.rate.value is None


def test_scores_of_wrong_files(solved, rng):
    """Spins that something is lower than are no ground states."""
    wrong = solved.spins.copy()
    wrong[4, 2, 2] *= -1
    match = r"^file\.h5: the spins of record 5 are not a ground state.*lower by .*solve"
    with pytest.raises(InputError, match=match):
        score_predictions(solved.with_spins(wrong), solved.spins, origin="file.h5")
    with pytest.raises(InputError, match=match):  # descent finds it, where the prediction does not
        score_predictions(solved.with_spins(wrong), wrong, origin="file.h5")
    with pytest.raises(ValueError, match="prediction for each"):
        score_predictions(solved, solved.spins[:2])
    with pytest.raises(ValueError, match="1 or -1"):
        score_predictions(solved, solved.spins * 0)
