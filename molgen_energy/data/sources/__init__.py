"""Where data come from: readers of data sets, and what makes data, by the name of `preprocess`."""

from __future__ import annotations

from molgen_energy.data.sources.base import Source
from molgen_energy.data.sources.shapes import Polygons
from molgen_energy.data.sources.spins import SpinGlasses

SOURCES: dict[str, type[Source]] = {source.name: source for source in (Polygons, SpinGlasses)}
"""What is made; QM9 and files of molecules are read."""

__all__ = ["SOURCES", "Source"]
