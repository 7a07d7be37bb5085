"""Networks that predict the noise in a molecule."""

from __future__ import annotations

from molgen_energy.models.egnn import EDM
from molgen_energy.models.gnn import GDM

MODELS: dict[str, type[GDM | EDM]] = {"gdm": GDM, "edm": EDM}

__all__ = ["EDM", "GDM", "MODELS"]
