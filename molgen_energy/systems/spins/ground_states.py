"""Exact ground states of spin glasses on square lattices.

Two independent solvers:

`by_matching`, for open boundaries. The unsatisfied bonds of a configuration form paths on the dual
lattice, which end at frustrated plaquettes or outside. Those of the ground state have the least
total weight: a minimum-weight perfect matching (I. Bieche, R. Maynard, R. Rammal, J. P. Uhry, *J.
Phys. A* 13, 2553, 1980), computed by PyMatching (O. Higgott, C. Gidney, *Quantum* 9, 1600, 2025).

`by_program`, for either boundary. A linear program over x_e ∈ [0, 1], which is 1 if the spins of
bond e differ. Every closed walk C crosses a cut an even number of times, so

.. math:: \\sum_{e \\in F} x_e - \\sum_{e \\in C \\setminus F} x_e \\le |F| - 1

for each subset F of its bonds with an odd number of them. Shortest paths find violated inequalities
(F. Barahona, A. R. Mahjoub, *Math. Programming* 36, 157, 1986), also those of walks around a torus;
branch and bound does the rest. HiGHS solves the programs (Q. Huangfu, J. A. J. Hall, *Math. Prog.
Comp.* 10, 119, 2018). The lower bound on all energies follows from its dual solution by weak
duality, summed in this module.

Guarantees
----------
The *unit* of a lattice is the largest number of which all its couplings are integer multiples.
|J| of `draw_couplings` is 1 unit, or less than 2²³ units.

- `by_matching`. PyMatching works with integer weights up to 2²⁴ − 1; it scales and rounds others.
  If every |J| is at most 2²⁴ − 1 units, weights are passed in units, without rounding, and the
  result is a ground state. Other couplings are rounded to the nearest of 2²⁴ − 1 steps. The energy
  then exceeds the lowest one by at most twice the sum of the rounding errors, so by at most
  (number of bonds) · max|J| · 6 · 10⁻⁸.
- `by_program`. Energies of a lattice differ by at least 2 units, or 4. The search ends when a lower
  bound on all energies is closer than that to the energy of the configuration, so that no energy
  lies between. If 10⁻¹⁰ Σ|J| is larger than that, the energy is exact to 10⁻¹⁰ Σ|J| only.

`certify` checks every configuration: its energy against the solver's, the energy against the bound,
and that no flip of a single spin lowers it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra

from molgen_energy.errors import InputError
from molgen_energy.systems.spins.lattices import Lattices, Reals, Spins, fix_gauge

Whole = NDArray[np.int64]

_STEPS = 2**24 - 1  # largest integer weight that PyMatching does not round
_LARGEST = 4  # largest L for `brute_force`
_STABLE = 1e-9  # tolerance of local fields, in units of the largest |J|
_PROVEN = 1e-10  # tolerance of bounds, in units of Σ|J|
_ROUNDING = 1e-12  # tolerance of float64 sums, in units of Σ|J|
_ROUNDED = 6e-8  # largest rounding error of a weight for a bond, in units of the largest |J|
_VIOLATED = 1e-7  # smallest violation of an inequality that counts
_WHOLE = 1e-9  # x this close to 0 or 1 counts as decided
_FEASIBLE = 1e-10  # tolerances of HiGHS, the smallest that it accepts
_SOURCES = 32  # least number of sites from which closed walks are searched
_CUTS = 400  # largest number of inequalities to add at once


class Ground(NamedTuple):
    """Ground states of M lattices."""

    energies: Reals
    """(M,)."""
    spins: Spins
    """One for each lattice, (M, L, L), with site (0, 0) up."""
    states: Whole
    """Number of ground states with site (0, 0) up, (M,)."""


class Solution(NamedTuple):
    """Result of a solver for one lattice."""

    spins: Spins
    """(L, L), with site (0, 0) up."""
    energy: float
    """According to the solver."""
    bound: float
    """No configuration has an energy below it."""


def ground_states(lattices: Lattices, method: str | None = None) -> Spins:
    """A ground state of each lattice, (M, L, L), with site (0, 0) up.

    If a lattice has several, the result is always the same one. See the module for guarantees.

    Parameters
    ----------
    method
        `matching` (only open boundaries) or `program`; None uses the faster one for the boundary.

    Raises
    ------
    InputError
        A solver is not installed, or a lattice is invalid.
    RuntimeError
        A solver failed, or its result did not pass `certify`; the message names the lattice.
    """
    lattices.check()
    if method is None:
        method = "program" if lattices.periodic else "matching"
    if method not in SOLVERS:
        raise ValueError(f"unknown method '{method}' (valid: {', '.join(SOLVERS)})")
    solve = SOLVERS[method]
    spins = np.empty(lattices.right.shape, np.int8)
    energies, bounds = np.empty(len(lattices)), np.empty(len(lattices))
    for k in range(len(lattices)):
        try:
            solution = solve(lattices.select(slice(k, k + 1)))
        except RuntimeError as error:
            raise RuntimeError(f"lattice {k} of {len(lattices)}: {error}") from error
        spins[k], energies[k], bounds[k] = solution
    certify(lattices, spins, energies, bounds)
    return spins


def certify(lattices: Lattices, spins: Spins, energies: Reals, bounds: Reals) -> None:
    """Check configurations (M, L, L), with energies and bounds (M,) from a solver.

    Energies must agree up to rounding. An energy may exceed its bound by less than the smallest
    difference of two energies, or by the solver's resolution (see the module).

    Raises
    ------
    RuntimeError
        The energy of a configuration differs from the solver's, its bound allows a lower one, or a
        flip of one spin lowers it; the message names the lattice.
    """
    every = lattices.couplings()
    scale, total = lattices.strongest, np.abs(every).sum(axis=(1, 2, 3))
    wrong = np.abs(lattices.energies(spins) - energies) > _ROUNDING * total
    bonds = _bonds(lattices.size, lattices.periodic)
    for k in np.flatnonzero(energies - bounds > _PROVEN * total).tolist():
        couplings = every[k].reshape(-1)[bonds.places]
        allowed = _spacing(couplings, bonds)
        if not lattices.periodic and _rounded(couplings):
            allowed = max(allowed, _ROUNDED * lattices.bonds * float(scale[k]))
        if energies[k] - bounds[k] >= allowed:
            raise RuntimeError(
                f"lattice {k} of {len(lattices)}: the solver does not rule out a lower energy"
            )
    unstable = ((spins * lattices.fields(spins)).min(axis=(1, 2)) < -_STABLE * scale) & ~wrong
    for bad, what in (
        (wrong, "the solver's energy is not that of its configuration"),
        (unstable, "the solver's configuration is not even locally stable"),
    ):
        if bad.any():
            raise RuntimeError(f"lattice {int(bad.argmax())} of {len(lattices)}: {what}")


def check_installed(periodic: bool) -> None:
    """Raise `InputError` unless the solver for a boundary is installed."""
    _load("highspy" if periodic else "pymatching")


# All configurations


def brute_force(lattices: Lattices) -> Ground:
    """Ground states by enumeration of all configurations, for L ≤ 4.

    Energies within 10⁻¹⁰ Σ|J| of the lowest one count as equal to it.

    Raises
    ------
    ValueError
        The lattices are larger.
    """
    if lattices.size > _LARGEST:
        raise ValueError(f"too many configurations at size {lattices.size}; at most {_LARGEST}")
    everything = _all_configurations(lattices.size)
    pairs = np.stack(
        [everything * np.roll(everything, -1, 2), everything * np.roll(everything, -1, 1)]
    )
    pairs = pairs.transpose(1, 0, 2, 3).reshape(len(everything), -1).astype(np.float64)
    couplings = lattices.couplings().reshape(len(lattices), -1)
    best = np.empty(len(lattices), np.int64)
    count = np.empty(len(lattices), np.int64)
    for k, own in enumerate(couplings):
        energies = -pairs @ own
        best[k] = energies.argmin()
        count[k] = (energies <= energies[best[k]] + _PROVEN * np.abs(own).sum()).sum()
    spins = everything[best]
    return Ground(lattices.energies(spins), spins, count)


@lru_cache(maxsize=1)
def _all_configurations(size: int) -> Spins:
    """All configurations with site (0, 0) up, (2^(L²−1), L, L)."""
    sites = size * size
    bits = np.arange(2 ** (sites - 1))[:, None] >> np.arange(sites - 1)[::-1] & 1
    spins = np.ones((len(bits), sites), np.int8)
    spins[:, 1:] -= (2 * bits).astype(np.int8)
    return spins.reshape(-1, size, size)


# Bonds


class _Bonds(NamedTuple):
    """The E bonds of a lattice: `right` bonds first, then `down`, each in the order of sites."""

    size: int
    """L."""
    places: Whole
    """Positions of the bonds in the flat array of couplings (2, L, L), (E,)."""
    ends: Whole
    """Numbers r·L + c of the two sites, (2, E)."""
    squares: Whole
    """The bonds around each plaquette, (P, 4)."""
    numbers: Whole
    """The bond between two sites, (L², L²), or −1."""
    doubled: csr_matrix
    """Graph of two copies of the lattice, (2 L², 2 L²): each bond joins sites within both copies,
    and sites of different copies. Only the sparsity pattern; values are set in `_separate`."""
    entries: Whole
    """For each value of `doubled`, (8 E,): e for bond e within a copy, E + e between copies."""


@lru_cache(maxsize=8)
def _bonds(size: int, periodic: bool) -> _Bonds:
    sites = size * size
    site = np.arange(sites).reshape(size, size)
    exists = np.ones((2, size, size), bool)
    if not periodic:
        exists[0, :, -1] = exists[1, -1] = False
    places = np.flatnonzero(exists)
    ahead = np.stack([np.roll(site, -1, 1), np.roll(site, -1, 0)])
    ends = np.stack([np.broadcast_to(site, exists.shape)[exists], ahead[exists]])
    bond = np.cumsum(exists).reshape(exists.shape) - 1
    around = [bond[0], np.roll(bond[1], -1, 1), np.roll(bond[0], -1, 0), bond[1]]
    squares = np.stack(around, axis=-1)
    numbers = np.full((sites, sites), -1)
    numbers[ends[0], ends[1]] = numbers[ends[1], ends[0]] = np.arange(len(places))
    # Within a copy from 0 to 0 and 1 to 1, between copies from 0 to 1 and 1 to 0; and back.
    there = np.concatenate([ends[0] + sites * k for k in (0, 1, 0, 1)])
    here = np.concatenate([ends[1] + sites * k for k in (0, 1, 1, 0)])
    rows, columns = np.concatenate([there, here]), np.concatenate([here, there])
    order = np.lexsort((columns, rows))
    starts = np.searchsorted(rows[order], np.arange(2 * sites + 1))
    doubled = csr_matrix(
        (np.zeros(len(order)), columns[order], starts), shape=(2 * sites, 2 * sites)
    )
    kind = np.tile(np.repeat([0, 0, 1, 1], len(places)), 2)
    entries = np.tile(np.arange(len(places)), 8) + kind * len(places)
    return _Bonds(
        size,
        places,
        ends,
        (squares if periodic else squares[:-1, :-1]).reshape(-1, 4),
        numbers,
        doubled,
        entries[order],
    )


def _unit(couplings: Reals) -> float:
    """The largest number of which float32 couplings, not all zero, are integer multiples."""
    strengths = np.abs(couplings[couplings != 0])
    _, exponents = np.frexp(strengths)
    finest = np.ldexp(1.0, int(exponents.min()) - 24)
    if exponents.max() - exponents.min() > 38:  # more than 62 bits: smaller than needed
        return float(finest)
    return float(finest * np.gcd.reduce((strengths / finest).astype(np.int64)))


def _spacing(couplings: Reals, bonds: _Bonds) -> float:
    """Smallest difference of energies: 2 units, or 4 if no flip costs 2 units modulo 4."""
    unit = _unit(couplings)
    odd = np.fmod(np.abs(couplings) / unit, 2)
    at_sites = np.bincount(bonds.ends.reshape(-1), np.tile(odd, 2)) % 2
    return (2 if at_sites.any() else 4) * unit


def _rounded(couplings: Reals) -> bool:
    """Whether weights for PyMatching have to be rounded."""
    return bool(np.abs(couplings).max() > _STEPS * _unit(couplings))


# Matching


def by_matching(lattice: Lattices) -> Solution:
    """A ground state of one lattice with an open boundary; see the module.

    Raises
    ------
    InputError
        PyMatching is not installed.
    """
    if lattice.periodic:
        raise ValueError("matching finds ground states with open boundaries alone")
    pymatching = _load("pymatching")
    size = lattice.size
    bonds = _bonds(size, False)
    couplings = lattice.couplings().reshape(-1)[bonds.places]
    strengths = np.abs(couplings)
    step = float(strengths.max()) / _STEPS if _rounded(couplings) else _unit(couplings)
    weights = np.rint(strengths / step)
    lost = float(np.abs(strengths - weights * step).sum())
    frustrated = (couplings < 0)[bonds.squares].sum(axis=1) % 2
    around = _plaquettes(size)
    # A corner plaquette has two bonds to the outside; only the lighter one matters.
    border = np.flatnonzero(np.diff(around.indptr) == 1)
    inner = around.indices[around.indptr[border]]
    border = border[np.lexsort((weights[border], inner))]
    lighter = border[np.unique(np.sort(inner), return_index=True)[1]]
    edges = np.union1d(np.flatnonzero(np.diff(around.indptr) == 2), lighter)
    graph = pymatching.Matching.from_check_matrix(around[:, edges], weights=weights[edges])
    unsatisfied = np.zeros(len(weights), bool)
    unsatisfied[edges] = graph.decode(frustrated.astype(np.uint8))
    agree = np.zeros(2 * size * size, np.int8)
    agree[bonds.places] = np.where((couplings < 0) == unsatisfied, 1, -1)
    right, down = agree.reshape(2, size, size)
    spins = np.ones((size, size), np.int8)
    spins[1:, 0] = np.cumprod(down[:-1, 0])
    spins[:, 1:] = spins[:, :1] * np.cumprod(right[:, :-1], axis=1)
    energy = float(2 * strengths[unsatisfied].sum() - strengths.sum())
    if lost:  # rounding can leave a site unstable in a field of its size
        spins = _descend(lattice, spins)
        energy = float(lattice.energies(spins[None])[0])
    return Solution(spins, energy, energy - 2 * lost)


@lru_cache(maxsize=8)
def _plaquettes(size: int) -> csc_matrix:
    """Incidence of plaquettes and bonds, (P, E); a bond on the border has only one plaquette."""
    bonds = _bonds(size, False)
    owner = np.repeat(np.arange(len(bonds.squares)), 4)
    entries = np.ones(len(owner), np.uint8)
    shape = len(bonds.squares), len(bonds.places)
    return csc_matrix((entries, (owner, bonds.squares.reshape(-1))), shape=shape)


def _descend(lattice: Lattices, spins: Spins) -> Spins:
    """Flip single spins of (L, L) as long as a flip lowers the energy."""
    spins = spins.copy()
    while True:
        gain = (spins * lattice.fields(spins[None])[0]).reshape(-1)
        worst = int(gain.argmin())
        if gain[worst] >= -1e-15 * lattice.strongest[0]:
            return fix_gauge(spins)
        spins.reshape(-1)[worst] *= -1


# Linear program


class _Subproblem(NamedTuple):
    """A node of branch and bound: each x is fixed to 0, fixed to 1, or free in [0, 1]."""

    bound: float
    """Lower bound on its energies."""
    lower: Reals
    """Bounds on x, (E,)."""
    upper: Reals


def by_program(lattice: Lattices) -> Solution:
    """A ground state of one lattice of either boundary; see the module.

    Raises
    ------
    InputError
        HiGHS is not installed.
    RuntimeError
        HiGHS could not solve a program.
    """
    highspy = _load("highspy")
    bonds = _bonds(lattice.size, lattice.periodic)
    couplings = lattice.couplings().reshape(-1)[bonds.places]
    # A power of two, so that division is exact.
    scale = 2.0 ** math.ceil(math.log2(np.abs(couplings).max()))
    cost = couplings / scale
    total = float(np.abs(cost).sum())
    # No lower energy exists if the bound is closer than this to the best energy.
    margin = max(_spacing(cost, bonds) - _ROUNDING * total, _PROVEN * total)
    program = _Program(highspy, cost)
    program.add(*_square_cuts(bonds))
    best, spins = math.inf, np.zeros(0, np.int8)
    proven = math.inf
    open_nodes = [_Subproblem(-math.inf, np.zeros(len(cost)), np.ones(len(cost)))]
    while open_nodes:
        node = open_nodes.pop()
        values, least = program.solve(node.lower, node.upper)
        node = node._replace(bound=max(node.bound, 2 * least - float(cost.sum())))
        if node.bound <= best - margin:
            rows, limits, near = _separate(bonds, values)
            differ = near[:, bonds.ends[0]] != near[:, bonds.ends[1]]
            energies = 2 * (differ @ cost) - cost.sum()
            k = int(energies.argmin())
            if energies[k] < best:
                best, spins = float(energies[k]), near[k]
        if node.bound > best - margin:
            proven = min(proven, node.bound)
        elif len(limits):
            program.add(rows, limits)
            open_nodes.append(node)
        else:
            open_nodes += _split(node, values, _branching_bond(bonds, values, node))
    shape = lattice.size, lattice.size
    return Solution(fix_gauge(spins.reshape(shape)), best * scale, min(proven, best) * scale)


class _Program:
    """min c·x for x within bounds and a·x ≤ b, to which rows (a, b) can be added."""

    def __init__(self, highspy: Any, cost: Reals) -> None:
        # The base class of `highspy.Highs`, whose own constructor prints.
        self._highs = highs = highspy._Highs()
        self._optimal = highspy.HighsModelStatus.kOptimal
        self._infeasible = highspy.HighsModelStatus.kInfeasible
        for name, value in {
            "output_flag": False,
            "threads": 1,
            "solver": "simplex",
            "presolve": "off",
            "primal_feasibility_tolerance": _FEASIBLE,
            "dual_feasibility_tolerance": _FEASIBLE,
        }.items():
            highs.setOptionValue(name, value)
        self._cost = cost
        columns = np.arange(len(cost), dtype=np.int32)
        none = np.zeros(0, np.int32)
        highs.addCols(
            len(cost), cost, np.zeros(len(cost)), np.ones(len(cost)), 0, none, none, np.zeros(0)
        )
        self._columns = columns
        self._rows: list[csr_matrix] = []
        self._limits: list[Reals] = []

    def add(self, rows: csr_matrix, limits: Reals) -> None:
        """Add rows (R, E) with right-hand sides (R,)."""
        free = np.full(len(limits), -np.inf)
        starts = rows.indptr[:-1].astype(np.int32)
        indices = rows.indices.astype(np.int32)
        self._highs.addRows(len(limits), free, limits, rows.nnz, starts, indices, rows.data)
        self._rows.append(rows)
        self._limits.append(limits)

    def solve(self, lower: Reals, upper: Reals) -> tuple[Reals, float]:
        """Minimise within bounds (E,); returns x (E,) and a lower bound on c·x."""
        self._highs.changeColsBounds(len(lower), self._columns, lower, upper)
        self._highs.run()
        status = self._highs.getModelStatus()
        if status == self._infeasible:
            return lower, math.inf
        if status != self._optimal:
            raise RuntimeError(f"HiGHS did not solve a program: {status}")
        solution = self._highs.getSolution()
        duals = np.minimum(np.array(solution.row_dual), 0.0)
        reduced, bound, first = self._cost.copy(), 0.0, 0
        for rows, limits in zip(self._rows, self._limits, strict=True):
            own = duals[first : first + len(limits)]
            first += len(limits)
            reduced -= rows.T @ own
            bound += float(limits @ own)
        bound += float(np.minimum(reduced * lower, reduced * upper).sum())
        return np.array(solution.col_value), bound


def _square_cuts(bonds: _Bonds) -> tuple[csr_matrix, Reals]:
    """The inequalities of the plaquettes, 8 for each."""
    signs = np.array([s for s in np.ndindex(2, 2, 2, 2) if sum(s) % 2]) * 2.0 - 1
    count = len(bonds.squares) * len(signs)
    columns = np.repeat(bonds.squares[:, None], len(signs), axis=1).reshape(-1)
    entries = np.tile(signs, (len(bonds.squares), 1)).reshape(-1)
    starts = 4 * np.arange(count + 1)
    rows = csr_matrix((entries, columns, starts), shape=(count, len(bonds.places)))
    return rows, np.tile((signs > 0).sum(axis=1) - 1.0, len(bonds.squares))


def _separate(bonds: _Bonds, values: Reals) -> tuple[csr_matrix, Reals, Spins]:
    """Inequalities that x (E,) violates, and configurations close to x.

    In a graph with two copies of every site, bond e joins sites of the same copy with length x_e,
    and of different copies with length 1 − x_e. A closed walk C with an odd set F is a path from a
    site to its other copy, of length Σ_F (1 − x_e) + Σ_{C∖F} x_e. It violates the inequality if it
    is shorter than 1.

    Returns
    -------
    Rows (R, E) and limits (R,) of the most violated inequalities; and spins (S, L²), one row for
    each of S source sites: +1 where the first copy of a site is not farther than its second one.
    """
    sites, edges = bonds.size**2, len(values)
    inside = np.clip(values, 0.0, 1.0)
    lengths = np.concatenate([inside, 1 - inside])[bonds.entries]
    # The small addition prefers the path with fewer bonds among equally long ones.
    graph = csr_matrix(
        (lengths + _VIOLATED / 100, bonds.doubled.indices, bonds.doubled.indptr),
        shape=bonds.doubled.shape,
    )
    # Sites joined by bonds of length 0 have the same distances: one source for each group.
    whole = np.minimum(inside, 1 - inside) < _WHOLE
    joined = csr_matrix((np.ones(whole.sum()), bonds.ends[:, whole]), shape=(sites, sites))
    source = np.unique(connected_components(joined, directed=False)[1], return_index=True)[1]
    # A few more sources find other paths, which saves solving programs.
    source = np.union1d(source, np.arange(0, sites, max(1, sites // _SOURCES)))
    distances, before = dijkstra(graph, indices=source, return_predecessors=True)
    near = np.where(distances[:, :sites] <= distances[:, sites:], 1, -1).astype(np.int8)

    # Follow all short paths back at once.
    start = np.arange(len(source))
    start = start[distances[start, source + sites] < 1 - _VIOLATED]
    at, walk = source[start] + sites, np.arange(len(start))
    rows = csr_matrix((len(start), edges))
    odd = np.zeros(len(start))
    while len(walk):
        previous = before[start[walk], at].astype(np.int64)
        crossed = (previous < sites) != (at < sites)
        used = bonds.numbers[previous % sites, at % sites]
        step = np.where(crossed, 1.0, -1.0), (walk, used)
        rows += csr_matrix(step, shape=rows.shape)
        odd[walk] += crossed
        going = previous != source[start[walk]]
        walk, at = walk[going], previous[going]
    # Several sites of a walk find the same walk.
    violation = rows @ values - (odd - 1)
    _, first = np.unique(np.round(rows @ _hashes(edges), 6), return_index=True)
    first = first[violation[first] > _VIOLATED]
    kept = first[np.argsort(-violation[first], kind="stable")[:_CUTS]]
    return rows[kept], odd[kept] - 1, near


def _split(parent: _Subproblem, values: Reals, bond: int) -> list[_Subproblem]:
    """The two subproblems with a bond fixed to 0 and to 1; the one closer to x comes last."""
    children = []
    for value in (0.0, 1.0) if values[bond] >= 0.5 else (1.0, 0.0):
        lower, upper = parent.lower.copy(), parent.upper.copy()
        lower[bond] = upper[bond] = value
        children.append(_Subproblem(parent.bound, lower, upper))
    return children


def _branching_bond(bonds: _Bonds, values: Reals, node: _Subproblem) -> int:
    """The bond to fix: the least decided one of the row or column with the fewest undecided bonds.

    A torus with the bonds of a whole row fixed is equivalent to a planar graph, for which the
    inequalities decide every bond. So every row and column has an undecided bond until the end.
    """
    undecided = np.minimum(values, 1 - values)
    undecided[(undecided < _WHOLE) | (node.lower == node.upper)] = 0
    if not undecided.any():
        raise RuntimeError("HiGHS's solution of a program is not precise enough")
    size = bonds.size
    on_lattice = np.zeros(2 * size * size)
    on_lattice[bonds.places] = undecided
    right, down = on_lattice.reshape(2, size, size)
    loops = np.concatenate([right, down.T])
    count = (loops > 0).sum(axis=1)
    loop = int(np.where(count, count, size + 1).argmin())
    along = int(loops[loop].argmax())
    place = loop * size + along if loop < size else size * size + along * size + loop - size
    return int(np.searchsorted(bonds.places, place))


@lru_cache(maxsize=8)
def _hashes(edges: int) -> Reals:
    """A random number for each bond; sums of different sets of bonds differ."""
    return np.random.default_rng(0).random(edges)


def _load(name: str) -> Any:
    """Import a package of the extra `spins`; raise `InputError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"{name} is not installed; solving spin glasses needs the extra: "
            "pip install 'molgen-energy[spins]'"
        ) from None


SOLVERS: dict[str, Callable[[Lattices], Solution]] = {
    "matching": by_matching,
    "program": by_program,
}
