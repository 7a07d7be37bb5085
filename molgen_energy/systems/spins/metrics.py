"""Judging predicted spins by their energy, beside true ground states.

Everything is the same for a configuration and its flip. Energies are in units of the couplings.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.metrics.rates import Clusters, Mean, Rate
from molgen_energy.metrics.scores import Row, Scores, file_name
from molgen_energy.systems.spins.files import read_spins
from molgen_energy.systems.spins.lattices import Lattices, Reals, Spins

_SAME = 1e-10  # of energies, in units of Σ|J|: what is nearer is one energy, summed otherwise
_ROUNDED = 1e-7  # of energies, for each bond and max|J|: solvers may round couplings so far
_STILL = 1e-12  # of a local field, in units of the largest |J|
_AT_ONCE = 2**18  # sites that a descent works on, so that they stay in the processor's cache


@dataclass(frozen=True)
class SamplingResult:
    """How far configurations are above the ground state."""

    excess: Reals
    """Energy above that of the ground state, (M, K): K configurations of each lattice."""
    exact: NDArray[np.bool_]
    """Which are ground states themselves, (M, K): within 10⁻¹⁰ Σ|J|."""

    @property
    def mean(self) -> Mean:
        """Mean excess, the error from lattice to lattice."""
        return Mean.of(self.excess.mean(axis=1) if self.excess.size else np.zeros(0))

    @property
    def rate(self) -> Rate:
        """Share of ground states; of several starts on a lattice, as many as are independent."""
        if self.exact.shape[1] == 1:
            return Rate(int(self.exact.sum()), self.exact.size)
        clusters = Clusters()
        clusters.add((~self.exact).sum(axis=1), np.full(len(self.exact), self.exact.shape[1]))
        return clusters.unmarked()


@dataclass(frozen=True)
class SpinScores:
    """Predictions for M lattices, as they are and as starts of a descent."""

    prediction: SamplingResult
    """As they are, K = 1."""
    from_random: SamplingResult
    """Descent from K random configurations: what a prediction has to beat."""
    from_prediction: SamplingResult
    """Descent from the prediction, K = 1."""
    overlap: Reals
    """|Σ_i y_i ŷ_i| / L² of prediction and ground state, (M,). Where there are many ground states,
    it is that with the stored one."""
    bonds: int
    """Of each lattice."""

    @property
    def mean_overlap(self) -> Mean:
        """Mean over lattices."""
        return Mean.of(self.overlap)


def judge(
    lattices: Lattices, predictions: Spins, seed: int = 0, starts: int = 1, origin: str = "lattices"
) -> SpinScores:
    """Compare predictions with ground states.

    Parameters
    ----------
    lattices
        M of them, whose spins are ground states.
    predictions
        Spins ±1, (M, L, L).
    seed
        Of the random configurations; those of the first lattices do not depend on how many follow.
    starts
        Random configurations for each lattice, 1 or more.
    origin
        Where the lattices come from, for messages.

    Raises
    ------
    InputError
        A configuration has an energy clearly below that of the spins that came with the lattice.
    """
    if lattices.spins is None or predictions.shape != lattices.right.shape:
        raise ValueError("judge takes lattices with spins, and a prediction for each")
    if (np.abs(predictions) != 1).any():
        raise ValueError("predictions are spins, 1 or -1")
    size, count = lattices.size, len(lattices)
    ground = lattices.energies()
    bits = np.random.default_rng(seed).integers(0, 2, (count, starts, size, size), dtype=np.int8)
    random = descend(lattices, 2 * bits - 1)
    descended = descend(lattices, predictions)
    same = _SAME * np.abs(lattices.couplings()).sum(axis=(1, 2, 3))
    tolerance = np.maximum(same, _ROUNDED * lattices.bonds * lattices.strongest)

    def outcome(spins: Spins) -> SamplingResult:
        excess = lattices.energies(spins) - ground[:, None]
        below = (excess < -tolerance[:, None]).any(axis=1)
        if below.any():
            k = int(below.argmax())
            raise InputError(
                f"{origin}: the spins of record {k + 1} are not a ground state, another "
                f"configuration is lower by {-float(excess[k].min()):.6g}; solve the file again"
            )
        return SamplingResult(excess, excess <= same[:, None])

    agreement = np.einsum("mrc,mrc->m", lattices.spins, predictions, dtype=np.float64)
    return SpinScores(
        outcome(predictions[:, None]),
        outcome(random),
        outcome(descended[:, None]),
        np.abs(agreement) / size**2,
        lattices.bonds,
    )


def descend(lattices: Lattices, start: Spins) -> Spins:
    """Flip the one spin that lowers the energy most, again and again until none does.

    Of equals it is the first one, by rows. The result is locally stable: every y_i h_i ≥ 0.

    Parameters
    ----------
    start
        (M, L, L), or (M, K, L, L) for K starts on each lattice.

    Returns
    -------
    Spins of the same shape.
    """
    sites = lattices.size**2
    several = start if start.ndim == 4 else start[:, None]
    spins = several.reshape(-1, sites).copy()
    owner = np.repeat(np.arange(len(lattices)), several.shape[1])
    costs = (several * lattices.fields(several)).reshape(-1, sites)
    neighbours, couplings = _neighbours(lattices)
    still = -_STILL * lattices.strongest[owner]
    step = max(1, _AT_ONCE // sites)
    for first in range(0, len(spins), step):
        part = slice(first, first + step)
        _descend(spins[part], costs[part], couplings[owner[part]], neighbours, still[part])
    return spins.reshape(start.shape)


def _descend(
    spins: Spins, costs: Reals, couplings: Reals, neighbours: NDArray[np.int64], still: Reals
) -> None:
    """In place: spins (R, N) with y_i h_i in `costs` (R, N), couplings (R, N, 4)."""
    active = np.arange(len(spins))
    while len(active):
        lowest = costs[active] if len(active) < len(costs) else costs
        site = lowest.argmin(axis=1)
        moving = lowest[np.arange(len(active)), site] < still[active]
        active, site = active[moving], site[moving]
        around = neighbours[site]
        row = active[:, None]
        # A neighbour's y_j h_j holds J_ij y_i y_j, which turns to its negative.
        turned = couplings[active, site] * (spins[active, site][:, None] * spins[row, around])
        costs[row, around] -= 2 * turned
        costs[active, site] *= -1
        spins[active, site] *= -1


def _neighbours(lattices: Lattices) -> tuple[NDArray[np.int64], Reals]:
    """The four neighbours of each site, (N, 4), and the couplings to them, (M, N, 4).

    Beyond an open boundary is the opposite site, with no coupling.
    """
    size = lattices.size
    site = np.arange(size * size).reshape(size, size)
    both = lattices.couplings()
    index, values = [], []
    for kind, axis in ((0, 1), (1, 0)):
        index += [np.roll(site, -1, axis), np.roll(site, 1, axis)]
        values += [both[:, kind], np.roll(both[:, kind], 1, axis + 1)]
    table = np.stack([x.reshape(-1) for x in index], axis=-1)
    couplings = np.stack([x.reshape(len(lattices), size * size) for x in values], axis=-1)
    return table, couplings


_COLUMNS = ("prediction", "descent from it", "random descent")
_STARTS = 4
_DRAWN = 6


def evaluate_spins(path: Path) -> Scores:
    """Judge a file of predicted spins that carries the ground states.

    Raises
    ------
    InputError
        The file is missing, broken, of another system, or lacks predictions or ground states.
    """
    file, lattices = read = read_spins(path, "`molgen-energy sample` from a run on spins")
    predictions = read.prediction
    if predictions is None:
        raise InputError(
            f"{path} holds no predictions; make them with `molgen-energy sample --data {path}`"
        )
    if lattices.spins is None:
        raise InputError(
            f"{path} holds no ground states to compare with; find them with `molgen-energy "
            "preprocess spins --couplings FILE.npz` and predict for that file"
        )
    found = judge(lattices, predictions, starts=_STARTS, origin=str(path))
    outcomes = found.prediction, found.from_prediction, found.from_random
    ground = Mean.of(lattices.energies())
    rows = [
        Row("excess", "energy above ground",
            "mean over lattices, in units of the couplings", [o.mean for o in outcomes]),
        Row("exact", "ground states", "lattices whose ground state is met",
            [o.rate for o in outcomes]),
        Row("overlap", "overlap |q|", "|Σ y ŷ|/L² with the ground state, which may be one of many",
            [found.mean_overlap, None, None]),
        Row("ground", "ground energy", "of the ground state, mean over lattices",
            [ground, None, None]),
    ]  # fmt: skip
    notes = []
    further = Mean.of(found.prediction.excess[:, 0] - found.from_random.excess.mean(axis=1))
    if further.interval is not None and further.interval[0] > 0:
        notes.append(
            "descent from random spins, which needs no network, comes closer to the ground state "
            "than the prediction"
        )
    return Scores(
        file_name(path),
        "spins",
        "lattices",
        len(lattices),
        _COLUMNS,
        rows,
        notes,
        file.provenance,
        {"domains": lambda: draw(lattices.select(slice(_DRAWN)), predictions[:_DRAWN])},
    )


def draw(lattices: Lattices, predictions: Spins) -> bytes:
    """Ground states, predictions and where they agree, for a few lattices; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert lattices.spins is not None
    agreement = lattices.spins * predictions
    # Of the two flips the one that agrees more.
    sign = np.where(agreement.sum(axis=(1, 2)) < 0, -1, 1)[:, None, None]
    shown = [
        ("ground state", lattices.spins, "gray"),
        ("prediction", predictions * sign, "gray"),
        ("agreement", agreement * sign, "PuOr"),
    ]
    figure = Figure(figsize=(1.6 * len(lattices) + 0.4, 5.2), layout="constrained")
    axes = figure.subplots(3, len(lattices), squeeze=False)
    for row, (title, values, colours) in zip(axes, shown, strict=True):
        row[0].set_ylabel(title)
        for place, value in zip(row, values, strict=True):
            place.imshow(value, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
            place.set(xticks=[], yticks=[])
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)  # type: ignore[no-untyped-call]
    return content.getvalue()
