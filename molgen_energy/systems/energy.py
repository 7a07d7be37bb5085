"""The energy loss of a configuration, for every system that has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from molgen_energy.config import EdgesConfig, SpringsConfig
from molgen_energy.errors import InputError
from molgen_energy.losses import EDGES, Edges, PairwiseEnergy, SparseEdges, SymmetrizedEdges
from molgen_energy.losses.springs import published_scale, spring_family


def build_edges(section: EdgesConfig, seed: int) -> Edges:
    """The configured edges; graphs are drawn with the seed."""
    if section.kind == "sparse":
        return SparseEdges(section.pool, seed)
    if section.kind == "symmetrized":
        return SymmetrizedEdges(section.tolerance, section.pool, seed)
    return EDGES[section.kind]()


def build_energy(springs: SpringsConfig, scale: float, edges: Edges) -> PairwiseEnergy:
    """The configured springs, with a scale and on edges."""
    return PairwiseEnergy(springs.family, scale, edges, springs.distance)


def resolve_scale(springs: SpringsConfig, mean: Callable[[], float]) -> float:
    """The configured scale, without `auto`, which is 1 over the mean of f over pairs of the data.

    Raises
    ------
    InputError
        There is no such published scale.
    """
    scale = springs.scale
    if scale == "auto":
        return 1 / mean()
    if isinstance(scale, str):
        try:
            return published_scale(spring_family(springs.family), scale)
        except ValueError as error:
            raise InputError(f"loss.springs: {springs.family}: {error}") from None
    return scale


def describe_springs(loss: Any) -> str:
    """The springs of a loss section, where it is the energy."""
    if loss.name != "energy":
        return ""
    return f", {loss.springs.family} springs on {loss.edges.kind} edges"
