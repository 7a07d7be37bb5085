"""Networks that predict the noise in a molecule."""

from __future__ import annotations

from molgen_energy.models.egnn import EDM
from molgen_energy.models.gdm_pairs import GDMPairs
from molgen_energy.models.gnn import GDM

MODELS: dict[str, type[GDM | EDM | GDMPairs]] = {"gdm": GDM, "edm": EDM, "gdm_pairs": GDMPairs}

__all__ = ["EDM", "GDM", "MODELS", "GDMPairs"]
