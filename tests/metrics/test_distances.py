"""Distances between distributions, against direct computations."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import fft, special, stats

from molgen_energy.metrics.distances.histograms import total_variation, wasserstein_of_counts
from molgen_energy.metrics.distances.mmd import _transform_length, mmd, mmd_leave_groups_out
from molgen_energy.metrics.distances.wasserstein import wasserstein, wasserstein_leave_groups_out
from molgen_energy.metrics.statistics import jackknife_interval


def naive_mmd(source, target) -> float:
    """The double sum over all pairs, in float64."""
    both = np.concatenate([source, target]).astype(np.float64)
    n = len(both)
    squared = (both[:, None] - both[None]) ** 2
    width = squared.sum() / (n * n - n) / 4
    kernel = sum(np.exp(-squared / (width * 2**i)) for i in range(5))
    m = len(source)
    return kernel[:m, :m].mean() + kernel[m:, m:].mean() - 2 * kernel[:m, m:].mean()


@pytest.mark.parametrize("outlier", [0.0, 100.0, 1e5])
@pytest.mark.parametrize(("m", "n", "shift"), [(300, 500, 0.0), (1, 400, 2.0), (2, 1, 0.1)])
def test_mmd_against_the_double_sum(rng, m, n, shift, outlier):
    source, target = rng.normal(size=m) + shift, rng.normal(size=n)
    target[0] += outlier
    assert mmd(source, target) == pytest.approx(naive_mmd(source, target), rel=1e-7, abs=1e-7)


def test_mmd_without_groups(rng):
    """As the double sum over what is left, with the kernels of all."""
    source, target = rng.normal(size=300), rng.normal(0.3, 1, size=200)
    group = rng.integers(0, 4, 300).astype("u1")
    both = np.concatenate([source, target])
    squared = (both[:, None] - both[None]) ** 2
    width = squared.sum() / (500 * 499) / 4
    kernel = sum(np.exp(-squared / (width * 2**i)) for i in range(5))
    expected = []
    for g in (None, 0, 3):
        kept = np.concatenate([np.ones(300, bool) if g is None else group != g])
        weight = np.concatenate([kept / kept.sum(), np.full(200, -1 / 200)])
        expected.append(weight @ kernel @ weight)
    assert mmd_leave_groups_out(source, group, target, [0, 3]) == pytest.approx(expected, abs=1e-7)
    assert np.isnan(mmd_leave_groups_out(source, group * 0, target, [0])[1])
    whole, without = wasserstein_leave_groups_out(source, group, target, [2])
    assert whole == pytest.approx(stats.wasserstein_distance(source, target))
    assert without == pytest.approx(stats.wasserstein_distance(source[group != 2], target))


def test_wasserstein_around_a_circle(rng):
    """The least of the distances on a line, over all places to cut the circle."""
    zero = np.zeros(1, "u1")
    assert wasserstein_leave_groups_out(np.array([179.0]), zero, np.array([-179.0]), [], 360) == [2]
    assert wasserstein_leave_groups_out(np.array([10.0]), zero, np.array([-80.0]), [], 360) == [90]
    for _ in range(5):
        source = rng.vonmises(3, 2, 40) * 180 / np.pi
        target = rng.vonmises(-2.5, 1, 55) * 180 / np.pi
        group = rng.integers(0, 3, 40).astype("u1")
        cuts = np.concatenate([source, target])

        def cut_open(ours, theirs, cuts=cuts):
            return min(
                stats.wasserstein_distance((ours - cut) % 360, (theirs - cut) % 360) for cut in cuts
            )

        whole, without = wasserstein_leave_groups_out(source, group, target, [1], 360)
        assert whole == pytest.approx(cut_open(source, target))
        assert without == pytest.approx(cut_open(source[group != 1], target))
        turned = (wrapped(source + 100), group, wrapped(target + 100))
        assert wasserstein_leave_groups_out(*turned, [], 360)[0] == pytest.approx(whole)
        assert whole <= wasserstein(source, target) + 1e-12


def wrapped(degrees):
    return (degrees + 180) % 360 - 180


def test_mmd_of_equal_values():
    assert mmd(np.ones(3), np.ones(4)) == 0
    values = np.random.default_rng(0).normal(size=1000)
    assert mmd(values, values) == pytest.approx(0, abs=1e-12)


def test_memory_of_mmd():
    rng = np.random.default_rng(0)
    tracemalloc.start()
    mmd(rng.normal(size=20_000), rng.normal(size=20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_wasserstein_and_total_variation(rng):
    a, b = rng.integers(0, 9, 400), rng.integers(2, 12, 300)
    expected = stats.wasserstein_distance(a, b)
    assert wasserstein(a, b) == pytest.approx(expected)
    counts = np.bincount(a), np.bincount(b)
    assert wasserstein_of_counts(*counts) == pytest.approx(expected)
    assert total_variation(np.array([1, 1]), np.array([0, 0, 3])) == 1
    assert total_variation(np.array([2, 2]), np.array([1, 1])) == 0
    assert total_variation(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)


def test_the_jackknife_of_a_mean_is_the_interval_of_a_mean(rng):
    """For means of groups of one size it is Student's interval exactly."""
    groups = rng.normal(10, 1, size=(10, 40)).mean(axis=1)
    without = [np.delete(groups, g).mean() for g in range(10)]
    low, high = jackknife_interval(groups.mean(), without)
    expected = stats.t.interval(0.95, 9, groups.mean(), stats.sem(groups))
    assert (low, high) == pytest.approx(expected)
    assert jackknife_interval(0.1, [0.0, 0.3])[0] == 0


@pytest.mark.parametrize("groups", range(2, 11))
def test_jackknife_quantiles_are_those_of_scipy(rng, groups):
    """To the last bit, so that no figure depends on which of the two is used."""
    without = rng.normal(size=groups).tolist()
    half = special.stdtrit(groups - 1, 0.975) * np.sqrt((groups - 1) * np.var(without))
    assert jackknife_interval(0.0, without, -np.inf) == (-half, half)


def test_lengths_of_transforms_are_those_of_scipy():
    for least in (*range(1, 700), 99_999, 1_234_567, 1 << 23, (1 << 23) + 1):
        assert _transform_length(least) == fft.next_fast_len(least, real=True)
