"""Evaluation of predicted spins by their energy, compared with ground states.

All metrics are invariant under flipping all spins of a configuration. Energies are in units of the
couplings.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.metrics.report.model import (
    EvaluatedFile,
    MetricValue,
    Report,
    ReportBlock,
    ReportColumn,
    ReportRow,
)
from molgen_energy.metrics.report.pictures import picture_block
from molgen_energy.metrics.statistics import Clusters, Mean, Rate
from molgen_energy.output import display_path
from molgen_energy.systems.spins.files import read_spins
from molgen_energy.systems.spins.lattices import Lattices, Reals, Spins

_EQUAL = 1e-10  # of energies, in units of Σ|J|: smaller differences come from the summation order
_ROUNDING = 1e-7  # of energies, per bond, in units of max|J|: solvers may round the couplings
_ZERO_FIELD = 1e-12  # of a local field, in units of the largest |J|
_SITES_AT_ONCE = 2**18  # in a descent, so that they fit the processor's cache


@dataclass(frozen=True)
class ExcessEnergies:
    """Energies of configurations above the ground state."""

    excess: Reals
    """Energy above that of the ground state, (M, K): K configurations of each lattice."""
    exact: NDArray[np.bool_]
    """Which configurations are ground states, within 10⁻¹⁰ Σ|J|, (M, K)."""

    @property
    def mean(self) -> Mean:
        """Mean excess, with the standard error over lattices."""
        return Mean.of(self.excess.mean(axis=1) if self.excess.size else np.zeros(0))

    @property
    def rate(self) -> Rate:
        """Share of ground states; the K configurations of a lattice are a cluster."""
        if self.exact.shape[1] == 1:
            return Rate(int(self.exact.sum()), self.exact.size)
        clusters = Clusters()
        clusters.add((~self.exact).sum(axis=1), np.full(len(self.exact), self.exact.shape[1]))
        return clusters.unmarked()


@dataclass(frozen=True)
class SpinScores:
    """Scores of predictions for M lattices, and of descents."""

    prediction: ExcessEnergies
    """The predictions themselves, K = 1."""
    from_random: ExcessEnergies
    """Descent from K random configurations, the baseline without a network."""
    from_prediction: ExcessEnergies
    """Descent from the prediction, K = 1."""
    overlap: Reals
    """|Σ_i y_i ŷ_i| / L² of prediction and stored ground state, which may be one of many, (M,)."""
    bonds: int
    """Number of bonds of each lattice."""

    @property
    def mean_overlap(self) -> Mean:
        """Mean over lattices."""
        return Mean.of(self.overlap)


def score_predictions(
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
        Seed of the random configurations; those of a lattice do not depend on later lattices.
    starts
        Number of random configurations for each lattice, at least 1.
    origin
        Name of the lattices in error messages.

    Raises
    ------
    InputError
        A configuration has an energy clearly below that of the lattice's ground state.
    """
    if lattices.spins is None or predictions.shape != lattices.right.shape:
        raise ValueError("expected lattices with ground states, and a prediction for each")
    if (np.abs(predictions) != 1).any():
        raise ValueError("predictions must be 1 or -1")
    size, count = lattices.size, len(lattices)
    ground = lattices.energies()
    bits = np.random.default_rng(seed).integers(0, 2, (count, starts, size, size), dtype=np.int8)
    random = descend(lattices, 2 * bits - 1)
    descended = descend(lattices, predictions)
    same = _EQUAL * np.abs(lattices.couplings()).sum(axis=(1, 2, 3))
    tolerance = np.maximum(same, _ROUNDING * lattices.bonds * lattices.strongest)

    def excess_energies(spins: Spins) -> ExcessEnergies:
        excess = lattices.energies(spins) - ground[:, None]
        below = (excess < -tolerance[:, None]).any(axis=1)
        if below.any():
            k = int(below.argmax())
            raise InputError(
                f"{origin}: the spins of record {k + 1} are not a ground state, another "
                f"configuration is lower by {-float(excess[k].min()):.6g}; solve the file again"
            )
        return ExcessEnergies(excess, excess <= same[:, None])

    agreement = np.einsum("mrc,mrc->m", lattices.spins, predictions, dtype=np.float64)
    return SpinScores(
        excess_energies(predictions[:, None]),
        excess_energies(random),
        excess_energies(descended[:, None]),
        np.abs(agreement) / size**2,
        lattices.bonds,
    )


def descend(lattices: Lattices, start: Spins) -> Spins:
    """Steepest descent: flip the spin that lowers the energy most until none does.

    Ties go to the first site in row-major order. The result is locally stable: every y_i h_i ≥ 0.

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
    threshold = -_ZERO_FIELD * lattices.strongest[owner]
    step = max(1, _SITES_AT_ONCE // sites)
    for first in range(0, len(spins), step):
        part = slice(first, first + step)
        _descend(spins[part], costs[part], couplings[owner[part]], neighbours, threshold[part])
    return spins.reshape(start.shape)


def _descend(
    spins: Spins, costs: Reals, couplings: Reals, neighbours: NDArray[np.int64], threshold: Reals
) -> None:
    """In place, for spins (R, N) with y_i h_i in `costs` (R, N) and couplings (R, N, 4)."""
    active = np.arange(len(spins))
    while len(active):
        lowest = costs[active] if len(active) < len(costs) else costs
        site = lowest.argmin(axis=1)
        moving = lowest[np.arange(len(active)), site] < threshold[active]
        active, site = active[moving], site[moving]
        around = neighbours[site]
        row = active[:, None]
        # The term J_ij y_i y_j of a neighbour's y_j h_j changes its sign.
        bond_terms = couplings[active, site] * (spins[active, site][:, None] * spins[row, around])
        costs[row, around] -= 2 * bond_terms
        costs[active, site] *= -1
        spins[active, site] *= -1


def _neighbours(lattices: Lattices) -> tuple[NDArray[np.int64], Reals]:
    """The four neighbours of each site, (N, 4), and the couplings to them, (M, N, 4).

    At an open boundary the neighbour is the opposite site, with coupling zero.
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


_STARTS = 4
_DRAWN = 6
_ROWS = (
    ReportRow("excess", "energy above ground", "mean over lattices, in units of the couplings"),
    ReportRow("exact", "ground states", "lattices whose ground state is found", "%"),
    ReportRow("overlap", "overlap |q|", "|Σ y ŷ|/L² with the stored ground state"),
    ReportRow("ground", "ground energy", "of the ground state, mean over lattices"),
)


def evaluate_spins(files: Sequence[Path]) -> Report:
    """Evaluate files of predicted spins that contain the ground states.

    Raises
    ------
    InputError
        A file is missing, broken, of another system, or lacks predictions or ground states.
    """
    return Report.of_files("spins", "lattices", _ROWS, "domains", files, _evaluate_file)


def _evaluate_file(path: Path, picture: str) -> tuple[EvaluatedFile, ReportBlock]:
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
    scores = score_predictions(lattices, predictions, starts=_STARTS, origin=str(path))
    columns = []
    for label, energies in (
        ("prediction", scores.prediction),
        ("descent from it", scores.from_prediction),
        ("random descent", scores.from_random),
    ):
        metrics: dict[str, MetricValue | None] = {"excess": energies.mean, "exact": energies.rate}
        columns.append(ReportColumn(metrics | {"overlap": None, "ground": None}, label))
    columns[0].metrics |= {"overlap": scores.mean_overlap, "ground": Mean.of(lattices.energies())}
    notes = []
    difference = Mean.of(scores.prediction.excess[:, 0] - scores.from_random.excess.mean(axis=1))
    if difference.interval is not None and difference.interval[0] > 0:
        notes.append(
            "descent from random spins, which needs no network, comes closer to the ground state "
            "than the prediction"
        )
    name = display_path(Path(path.name))
    evaluated = EvaluatedFile(
        name,
        len(lattices),
        columns,
        notes=notes,
        provenance=dict(file.provenance),
        path=path,
    )
    first, first_predictions = lattices.select(slice(_DRAWN)), predictions[:_DRAWN]
    return evaluated, picture_block(name, picture, lambda: draw(first, first_predictions))


def draw(lattices: Lattices, predictions: Spins) -> bytes:
    """Ground states, predictions and their agreement, for a few lattices, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert lattices.spins is not None
    agreement = lattices.spins * predictions
    # The one of the two flips that agrees more.
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
