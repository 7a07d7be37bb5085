"""The noise levels that a sampler visits, from noise to data.

Of a process with levels t = 0 … T, a sampler with S steps visits S + 1, T first and 0 last. In
continuous time it visits S times, and the clean prediction at the last one is the sample. They are
equally far apart in log(σ/α), in t or in √t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from molgen_energy.diffusion.process import MOST_STEPS, CosineDiffusion, Diffusion, Process
from molgen_energy.diffusion.state import Layout
from molgen_energy.errors import InputError, unknown_name

SPACINGS = ("log", "even", "quadratic")
"""The visited levels are equally far apart in log(σ/α), in t, or in √t."""

# With exact scores, equal steps in log(σ/α) are best for few steps of a diffusion: every sampler
# here comes closer to the data than with even or quadratic spacing. JODO's times are even.
DEFAULT_SPACINGS = {"diffusion": "log", "flow_matching": "even", "cosine": "even"}
"""By the process that the denoiser was trained with."""

FIRST_TIME, LAST_TIME = 0.9946, 1e-3
"""Of samplers in continuous time; those of JODO (Huang et al., 2023, arXiv:2305.12347)."""
LEAST_FIRST_TIME = 0.99
"""Of levels that are named, since samplers start from pure noise."""


class VisitedLevel(NamedTuple):
    """A noise level that a sampler visits."""

    level: float
    """Number of the level, an integer; in continuous time the time."""
    alpha2: float
    """α²."""
    sigma2: float
    """σ²."""
    stream: int
    """Number of the random noise of the step that starts there; differs among the visited."""


def visited_levels(
    process: Process, steps: int, spacing: str | None = None
) -> tuple[list[VisitedLevel], str | None]:
    """The levels that a sampler visits, and their spacing, None if these are all levels.

    Parameters
    ----------
    process
        The process of the training.
    steps
        S.
    spacing
        One of `SPACINGS`; None takes the default of the process.

    Raises
    ------
    InputError
        S is out of range, or the spacing is not defined for the process.
    """
    most = MOST_STEPS if process.continuous else process.steps
    if not 1 <= steps <= most:
        why = "" if process.continuous else f"the network was trained with {most:,} steps; "
        raise InputError(f"--steps {steps}: {why}choose 1 to {most:,}")
    valid = [name for name in SPACINGS if name != "log" or process.name != "flow_matching"]
    if spacing is not None and spacing not in valid:
        raise InputError(unknown_name("spacing", spacing, valid))
    spacing = DEFAULT_SPACINGS[process.name] if spacing is None else spacing
    if isinstance(process, CosineDiffusion):
        times = spaced_times(process, steps, spacing)
        return [
            VisitedLevel(time, *process.squares(time), steps - 1 - place)
            for place, time in enumerate(times)
        ], spacing
    levels = spaced_levels(_places(process, spacing), steps)
    visited = [VisitedLevel(level, *process.squares(level), level) for level in levels]
    return visited, None if steps == process.steps else spacing


def chosen_levels(process: Process, levels: Sequence[float]) -> list[VisitedLevel]:
    """Levels that a user or a checkpoint names, as a sampler visits them.

    Parameters
    ----------
    process
        The process of the training.
    levels
        Descending, the first T, pure noise. If the last is 0, a sampler ends as after steps to 0.
        Otherwise its samples are the clean prediction at the last one. Of a process in continuous
        time they are times below 1, from at least `LEAST_FIRST_TIME` to at least that of training.

    Raises
    ------
    InputError
        The levels do not meet these conditions.
    """
    named = f"--levels {levels_text(levels)}"
    if not levels or not all(a > b for a, b in pairwise(levels)):
        raise InputError(f"{named}: expected noise levels in descending order")
    first, last = levels[0], levels[-1]
    if process.continuous:
        low = process.first_level
        if not LEAST_FIRST_TIME <= first < 1 or last < low:
            raise InputError(
                f"{named}: expected times, the first from {LEAST_FIRST_TIME} to 1, such as "
                f"{FIRST_TIME}, and none below {low:g}"
            )
        times = map(float, levels)
        return [
            VisitedLevel(time, *process.squares(time), len(levels) - 1 - place)
            for place, time in enumerate(times)
        ]
    whole = all(math.isfinite(level) and level == int(level) for level in levels)
    if not whole or first != process.steps or last < 0:
        raise InputError(
            f"{named}: expected whole numbers from {process.steps} (pure noise) to 0 (data), the "
            f"first {process.steps}"
        )
    return [VisitedLevel(int(at), *process.squares(int(at)), int(at)) for at in levels]


def levels_below(
    process: Process, visited: Sequence[VisitedLevel], strength: float
) -> list[VisitedLevel]:
    """The level at a share of the time, t/T, and those visited levels that are below it.

    Parameters
    ----------
    process
        The process of the training.
    visited
        As samplers visit them from pure noise.
    strength
        The share, above 0 and below 1; a level that is an integer is rounded.

    Raises
    ------
    InputError
        The share is out of range, or the level is below all that the network was trained at.
    """
    if not 0 < strength < 1:
        raise InputError(f"--strength {strength:g}: expected a number above 0 and at most 1")
    first = strength if process.continuous else round(strength * process.steps)
    if first < max(process.first_level, visited[-1].level) or not first:
        raise InputError(
            f"--strength {strength:g} is below the lowest noise level that is visited; choose more"
        )
    below = [at for at in visited if at.level < first]
    # The numbers of the noise are then those of no other level.
    stream = visited[len(visited) - len(below) - 1].stream if process.continuous else int(first)
    return [VisitedLevel(first, *process.squares(first), stream), *below]


def levels_text(levels: Sequence[float]) -> str:
    """Levels as the command line has them, such as `1000,600,300,100`."""
    return ",".join(f"{level:.17g}" if level % 1 else f"{level:.0f}" for level in levels)


def _places(process: Process, spacing: str) -> Tensor:
    """The quantity in which levels are equally far apart, at each level, (T+1,) float64."""
    if spacing == "log":
        assert isinstance(process, Diffusion)
        return (process.schedule.sigma2 / process.schedule.alpha2).log() / 2
    times = torch.arange(process.steps + 1, dtype=torch.float64)
    return times.sqrt() if spacing == "quadratic" else times


def spaced_levels(places: Tensor, steps: int) -> list[int]:
    """S + 1 of the levels, T first and 0 last, about equally far apart.

    Where several would round to the same level, the next free ones are used, so that all differ.

    Parameters
    ----------
    places
        The quantity that is evenly spaced, at each level, ascending, (T+1,) float64.
    steps
        S, 1 to T.
    """
    top = len(places) - 1
    wanted = torch.linspace(float(places[0]), float(places[-1]), steps + 1, dtype=torch.float64)
    above = torch.searchsorted(places, wanted).clamp(1, top)
    nearer_below = wanted - places[above - 1] < places[above] - wanted
    # At least k levels are below the k-th chosen one, and S − k above.
    k = torch.arange(steps + 1)
    levels = torch.cummax(above - nearer_below.long() - k, dim=0).values + k
    levels = torch.minimum(levels, top - steps + k)
    return [int(level) for level in levels.flip(0)]


def spaced_times(process: CosineDiffusion, steps: int, spacing: str) -> list[float]:
    """S times, `FIRST_TIME` to `LAST_TIME`, equally far apart; for S = 1 the first."""
    first, last = FIRST_TIME, LAST_TIME
    squares = map(process.squares, (first, last))
    if spacing == "log":
        first_snr, last_snr = (math.log(alpha2 / sigma2) for alpha2, sigma2 in squares)
        times = process.schedule.time(_evenly(first_snr, last_snr, steps))
    elif spacing == "quadratic":
        times = _evenly(math.sqrt(first), math.sqrt(last), steps).square()
    else:
        times = _evenly(first, last, steps)
    return [first, *times[1:-1].tolist(), last][:steps]


def _evenly(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64)


def power_levels(
    process: Process, count: int, high: float, power: float, low: float | None = None
) -> list[float]:
    """Levels with equal distances in (σ/α)^{1/power} between two noise levels, after the first.

    Equation 5 of Karras et al. (NeurIPS 2022), after a step from pure noise. A high power comes
    close to equal distances in log(σ/α).

    Parameters
    ----------
    process
        A diffusion; with continuous time a level is a time.
    count
        Levels, all different, of which a sampler evaluates the network once at each; at least 2.
    high
        σ/α of the second level.
    low
        σ/α of the last level; None ends at 0, or in continuous time at `LAST_TIME`.
    """
    first: float = FIRST_TIME if process.continuous else process.steps
    end: float = LAST_TIME if process.continuous else 0
    ratios = _evenly(
        high ** (1 / power), (low or noise_to_signal(process, end)) ** (1 / power), count - 1
    )
    nearest = levels_near(process, ratios**power)
    if process.continuous:
        return [first, *nearest]
    if low is None:
        nearest[-1] = 0
    levels: list[float] = [process.steps]
    for place, level in enumerate(nearest):
        room = len(nearest) - 1 - place if low is None else len(nearest) - place
        levels.append(max(min(level, levels[-1] - 1), room))
    return levels


def levels_near(process: Process, ratios: Tensor) -> list[float]:
    """The levels of a diffusion whose σ/α are nearest to some ratios; in continuous time, times."""
    if isinstance(process, CosineDiffusion):
        times: list[float] = process.schedule.time(-2 * ratios.log()).tolist()
        return times
    assert isinstance(process, Diffusion)
    known = (process.schedule.sigma2 / process.schedule.alpha2).log() / 2
    nearest: list[float] = (known[:, None] - ratios.log()).abs().argmin(dim=0).tolist()
    return nearest


def noise_to_signal(process: Process, level: float) -> float:
    """σ/α at a level."""
    alpha2, sigma2 = process.squares(level)
    return math.sqrt(sigma2 / alpha2)


def noise_levels(process: Process, layout: Layout, level: Tensor) -> Tensor:
    """σ/α in the unit of the positions at levels (any shape), float64.

    At t = 1 of flow matching it is infinite.
    """
    ratios = process.sigma(level).double() / process.alpha(level).double()
    return ratios * layout.fields["positions"].scale
