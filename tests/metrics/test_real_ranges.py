"""Distances that do not depend on the number of molecules, and ranges of real molecules."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import of_smiles

from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.chemistry.geometry import GeometryTypes, code_of
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.metrics.accumulator import EvaluationAccumulator, ValueSample, hash_numbers
from molgen_energy.metrics.bundled import BUNDLED
from molgen_energy.metrics.checks.chunk import CheckSettings, check_chunk
from molgen_energy.metrics.distances.comparison import (
    Comparison,
    Distributions,
    compare,
    compare_moments,
)
from molgen_energy.metrics.distances.fcd import FEATURES, Gaussian, Moments, extrapolate
from molgen_energy.metrics.distances.mmd import mmd, mmd_between_groups
from molgen_energy.metrics.distances.real_ranges import (
    ResampledRanges,
    StoredRanges,
    add_ranges,
)
from molgen_energy.metrics.molecule_values import MoleculeValues, TypeValues
from molgen_energy.metrics.reference import Reference
from molgen_energy.metrics.statistics import Estimate, RealRange

RINGS, LOGP = (list(DESCRIPTORS).index(name) for name in ("rings", "logp"))
TYPES = GeometryTypes("a test", {"bond length": ("C1H",), "dihedral": ("C1C-C1C-C1C",)})


def double_sum(source, group, target, target_group) -> float:
    """The means over all pairs of different groups, in float64."""
    width = 2 * target.var(ddof=1) / 4

    def kernel(a, b):
        squared = (a[:, None] - b[None]) ** 2
        return sum(np.exp(-squared / (width * 2**i)) for i in range(5))

    def within(a, group):
        different = group[:, None] != group[None]
        return (kernel(a, a) * different).sum() / different.sum()

    between = 2 * kernel(source, target).mean()
    return within(source, group) + within(target, target_group) - between


@pytest.mark.parametrize("outlier", [0.0, 100.0, 1e5])
@pytest.mark.parametrize("groups", [3, 10])
def test_mmd_between_groups_against_the_double_sum(rng, groups, outlier):
    source, target = rng.normal(0.3, 1, 200), rng.normal(size=300)
    source[:2] += outlier
    group, target_group = rng.integers(0, groups, 200), rng.integers(0, groups, 300)
    found = mmd_between_groups(source, group, target, target_group, [1, 77])
    kept = group != 1
    expected = [
        double_sum(source, group, target, target_group),
        double_sum(source[kept], group[kept], target, target_group),
    ]
    assert found == pytest.approx([*expected, expected[0]], abs=1e-7)


def test_mmd_between_groups_of_one_group_or_value(rng):
    """Pairs are of distinct numbers; without a width, equal numbers alone are alike."""
    source, target = rng.normal(size=40), rng.normal(size=50)
    one, other = np.zeros(40, int), np.zeros(50, int)
    expected = double_sum(source, np.arange(40), target, np.arange(50))
    found, without = mmd_between_groups(source, one, target, other, [0])
    assert found == pytest.approx(expected, abs=1e-7)
    assert math.isnan(without)
    half = np.arange(4) // 2
    assert mmd_between_groups(np.ones(4), half, np.ones(4), half, []) == [0]
    assert mmd_between_groups(np.zeros(4), half, np.ones(4), half, []) == [10]


def test_the_mean_of_unbiased_distances_does_not_depend_on_the_size(rng):
    """JODO's falls with it."""
    target = rng.normal(size=1000)
    means, biased = [], []
    for size, repeats in ((40, 150), (640, 15)):
        found = []
        for _ in range(repeats):
            source = rng.normal(0.5, 1, size)
            groups = rng.integers(0, 10, size), rng.integers(0, 10, 1000)
            unbiased = mmd_between_groups(source, groups[0], target, groups[1], [])[0]
            found.append((unbiased, mmd(source, target)))
        means.append(np.mean([pair[0] for pair in found]))
        biased.append(np.mean([pair[1] for pair in found]))
    assert means[0] == pytest.approx(means[1], rel=0.15)
    assert biased[0] > biased[1] + 0.03


def test_fcd_extrapolated_to_infinite_sets(rng):
    """Gaussians with a known distance: the extrapolation finds it, and FCD does not."""
    scale = np.exp(-np.arange(FEATURES) / 40)
    shift = np.where(np.arange(FEATURES) < 4, 0.5, 0.0)
    truth = (shift**2).sum() + ((0.2 * scale) ** 2).sum()

    def moments(count, factor, shift):
        made = Moments()
        numbers = shift + factor * scale * rng.standard_normal((count, FEATURES))
        made.add(numbers, np.arange(count) % 10)
        return made

    source, target = moments(700, 1.2, shift), moments(3000, 1.0, 0 * shift)
    values = [part.distance(target.gaussian()) for part in source.without_groups()]
    halves = [source.gaussian().distance(half) for half in target.halves()]
    found = extrapolate(values, halves, 700)
    assert values[0] > truth + 0.5
    assert found.interval[0] <= truth <= found.interval[1]
    assert found.value == pytest.approx(truth, abs=0.2)
    assert Moments.of_gaussians([target.gaussian()]).halves() == []
    assert compare_moments(source, source)["fcd_infinite"].value == 0


def molecule_values(count, rng) -> MoleculeValues:
    """Molecules with one to nine values of each type, which are alike in one molecule."""
    geometry = {}
    for kind, (name,) in TYPES.types.items():
        molecule = np.repeat(np.arange(count), rng.integers(1, 10, count))
        spread = 0.02 if kind == "bond length" else 60.0
        value = spread * rng.standard_normal(count)[molecule]
        value += spread * rng.standard_normal(len(molecule))
        value = (value + 180) % 360 - 180
        geometry[kind] = {code_of(kind, name): TypeValues(value.astype("f4"), molecule)}
    elements = np.zeros((count, 119), np.int32)
    elements[:, [1, 6]] = rng.integers(1, 12, (count, 2))
    key = np.arange(count).astype("u8")
    descriptors = np.full((count, len(DESCRIPTORS)), np.nan, np.float32)
    complete = rng.random(count) < 0.8
    descriptors[complete, RINGS] = rng.poisson(1.5, complete.sum())
    descriptors[complete, LOGP] = rng.normal(2, 1, complete.sum())
    return MoleculeValues(key, key, elements.sum(axis=1), elements, geometry, descriptors)


def distributions_of(values: MoleculeValues, molecules) -> Distributions:
    """The distributions of some molecules, one after the other in ten groups."""
    group = np.full(len(values), 255, np.uint8)
    group[molecules] = np.arange(len(molecules)) % 10
    geometry = {}
    for kind, by_type in values.geometry.items():
        geometry[kind] = {}
        for code, each in by_type.items():
            inside = group[each.molecule] < 10
            geometry[kind][code] = ValueSample.of(
                each.value[inside], group[each.molecule[inside]], int(inside.sum())
            )
    sizes = np.zeros((10, values.sizes.max() + 1), int)
    elements = np.zeros((10, 119), int)
    np.add.at(sizes, (group[molecules], values.sizes[molecules]), 1)
    np.add.at(elements, group[molecules], values.elements[molecules])
    descriptors = {}
    for name, column in (("rings", RINGS), ("logp", LOGP)):
        value = values.descriptors[:, column]
        inside = np.isfinite(value) & (group < 10)
        descriptors[name] = ValueSample.of(value[inside], group[inside], int(inside.sum()))
    return Distributions(geometry, sizes, elements, descriptors=descriptors)


@pytest.mark.parametrize(("count", "reference"), [(60, 500), (200, 500)])
def test_ranges_against_direct_subsets(rng, count, reference):
    """Mean and spread of the distances of random sets, each computed as that of a file."""
    values = molecule_values(800, rng)
    none = np.zeros((0, FEATURES), np.float32)
    real = ResampledRanges(values, none, reference, 0, TYPES)
    drawn = real.draw(count, 400)
    direct: dict[str, list[float]] = {key: [] for key in drawn}
    for _ in range(60):
        order = rng.permutation(800)
        source = distributions_of(values, order[:count])
        target = distributions_of(values, order[count : count + reference])
        for key, estimate in compare(source, target, TYPES).estimates.items():
            if key in direct:
                direct[key].append(estimate.value)
    assert len(drawn) == 8
    check_draws(drawn, direct, real, count)


def test_ranges_of_descriptors_against_direct_subsets(rng):
    """Sets and references are of molecules that have descriptors."""
    values = molecule_values(1000, rng)
    real = ResampledRanges(values, np.zeros((0, FEATURES), np.float32), 600, 0, None)
    described = np.flatnonzero(np.isfinite(values.descriptors).any(axis=1))
    reference = int((described < 600).sum())
    drawn = real.draw_descriptors(60, 400)
    assert set(drawn) == {"wasserstein_rings", "wasserstein_logp"}
    direct: dict[str, list[float]] = {key: [] for key in drawn}
    for _ in range(60):
        order = rng.permutation(described)
        source = distributions_of(values, order[:60])
        target = distributions_of(values, order[60 : 60 + reference])
        found = compare(source, target, None, composition=False).estimates
        assert {estimate.count for estimate in found.values()} == {60}
        for key, estimate in found.items():
            direct[key].append(estimate.value)
    check_draws(drawn, direct, real, 60)
    assert real.limits("wasserstein_logp")[1] < real.limits("sizes")[1]


def check_draws(drawn, direct, real, count):
    """Mean, spread and range of draws against distances of sets, each computed as of a file."""
    for key, found in drawn.items():
        error = np.std(direct[key]) / math.sqrt(60)
        assert found.mean() == pytest.approx(np.mean(direct[key]), abs=4 * error), key
        assert found.std() == pytest.approx(np.std(direct[key]), rel=0.45), key
        range_found = real.at(key, count)
        inside = [range_found.place(value) == "like" for value in direct[key]]
        assert np.mean(inside) >= 0.85


def test_conformers_of_one_molecule_are_drawn_together(rng):
    """Eight equal conformers of each molecule have the range of an eighth as many molecules."""
    few = molecule_values(200, rng)
    joined = MoleculeValues.join([few] * 8)
    key = np.arange(1600).astype("u8")
    none = np.zeros((0, FEATURES), np.float32)
    places = {}
    for name, independent in (("molecules", np.tile(few.key, 8)), ("conformers", key)):
        values = replace(joined, key=key, independent=independent)
        ranges = ResampledRanges(values, none, 800, 0, TYPES)
        places[name] = [ranges.at("mmd_bond_length", 400), ranges.at("sizes", 400)]
    inside = dict.fromkeys(places, 0)
    for _ in range(20):
        order = rng.permutation(200)
        chosen = [
            (order[part, None] + 200 * np.arange(8)).ravel() for part in (slice(50), slice(50, 150))
        ]
        source, target = (distributions_of(joined, molecules) for molecules in chosen)
        found = compare(source, target, TYPES).estimates
        for name, expected in places.items():
            for key_, of_real in zip(("mmd_bond_length", "sizes"), expected, strict=True):
                inside[name] += of_real.place(found[key_].value) == "like"
    assert inside["molecules"] >= 32
    assert inside["conformers"] <= 16


def test_a_reference_without_other_molecules_gives_ranges_up_to_a_third(rng):
    none = np.zeros((0, FEATURES), np.float32)
    real = ResampledRanges(molecule_values(300, rng), none, 300, 0, TYPES)
    assert real.limits("sizes") == (20, 100)
    assert real.at("sizes", 101) is real.at("sizes", 19) is real.at("fcd", 50) is None
    assert real.at("sizes", 100).interval[1] < real.at("sizes", 20).interval[1]
    comparison = Comparison({"sizes": Estimate(0.3, None, 150), "elements": Estimate(None)})
    (note,) = add_ranges(comparison, real)
    assert "for distances of 150 molecules" in note
    assert "20 to 100" in note
    comparison = Comparison({"sizes": Estimate(0.3, None, 50)})
    assert add_ranges(comparison, real) == []
    assert comparison.estimates["sizes"].real == real.at("sizes", 50)


def test_stored_ranges_between_their_sizes(rng):
    none = np.zeros((0, FEATURES), np.float32)
    real = ResampledRanges(molecule_values(900, rng), none, 300, 0, TYPES)
    stored = StoredRanges.of(real, (20, 80, 320), 400, 2)
    assert stored.limits("fcd") == (1, 0)
    assert stored.limits("mmd_dihedral") == (20, 320)
    assert stored.at("mmd_dihedral", 321) is None
    assert stored.limits("wasserstein_logp") == (20, 320)
    direct = real.draw(160, 400) | real.draw_descriptors(160, 400)
    for key in stored.ranges:
        found = stored.at(key, 160)
        assert isinstance(found, RealRange)
        expected = direct[key]
        width = np.ptp(np.quantile(expected, [0.025, 0.975]))
        assert found.median == pytest.approx(np.median(expected), abs=0.25 * width), key
        assert np.ptp(found.interval) == pytest.approx(width, rel=0.4), key


def test_kept_molecules_have_the_values_of_the_file():
    """What is kept of all molecules gives the distributions that the evaluation has."""
    molecules = Molecules.from_list([of_smiles(s) for s in ("CCO", "C", "CCCC", "CC(C)C", "CCC")])
    checks = check_chunk(MoleculeChunk(np.array([7, 3, 9, 1, 5]), molecules), CheckSettings())
    accumulator = EvaluationAccumulator(0, 5)
    accumulator.add(checks)
    values = accumulator.kept_molecules.values
    assert np.array_equal(np.bincount(values.sizes), accumulator.sizes.sum(axis=0))
    assert np.array_equal(values.elements.sum(axis=0), accumulator.elements.sum(axis=0))
    for kind, by_type in accumulator.geometry.items():
        for code, sample in by_type.items():
            kept = values.geometry[kind][code]
            assert np.array_equal(np.sort(kept.value), np.sort(sample.value))
    code = code_of("bond length", "C1H")
    some = EvaluationAccumulator(0, 2)
    every = values.key.tolist()
    for shift in (10, 20, 30):
        more = check_chunk(MoleculeChunk(np.arange(5) + shift, molecules), CheckSettings())
        some.add(more)
        every += hash_numbers(more.chunk.records).tolist()
    some.add(checks)
    fewer = some.kept_molecules.values
    assert fewer.key.tolist() == sorted(every)[:2]
    hydrogens = len(fewer.geometry["bond length"][code].molecule)
    assert hydrogens == fewer.elements[:, 1].sum() - alcohols(fewer)
    assert EvaluationAccumulator(0).kept_molecules.values is None


def alcohols(values: MoleculeValues) -> int:
    """Hydrogens that are not at carbon: one of each molecule with an oxygen."""
    return int(values.elements[:, 8].sum())


def test_the_bundled_ranges(tmp_path):
    data = BUNDLED["qm9"].load()
    assert isinstance(data.ranges, StoredRanges)
    # 10,000 training molecules are real.
    for key in ("mmd_bond_length", "mmd_reference_dihedral", "wasserstein_angle", "fcd"):
        estimate = data.distances.estimates[key]
        assert data.ranges.at(key, estimate.count).place(estimate.value) == "like"
    assert data.ranges.at("fcd", 1000).median > 3 * data.ranges.at("fcd", 10_000).median
    data.save(tmp_path / "a.h5", "a test")
    back = Reference.load(tmp_path / "a.h5")
    assert back.ranges.at("fcd", 700) == data.ranges.at("fcd", 700)
    both = [each.distributions.moments for each in (data, back)]
    assert both[0].count.tolist() == both[1].count.tolist()
    assert both[0].gaussian().distance(both[1].gaussian()) == pytest.approx(0, abs=1e-4)
    assert isinstance(both[1].halves()[0], Gaussian)
