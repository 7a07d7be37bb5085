"""Networks that predict the noise in a molecule."""

from __future__ import annotations

from molgen_energy.models.gnn import GDM

MODELS: dict[str, type[GDM]] = {"gdm": GDM}

__all__ = ["GDM", "MODELS"]
