"""The declaration of the shards of `preprocess smiles`; what is in them: `datasets.conformers`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from molgen_energy.datasets.conformers import ConformerManifest
from molgen_energy.formats.yaml import YAMLFormat


class SmilesManifest(ConformerManifest):
    """The options of `preprocess smiles` that conformers depend on, besides the SMILES."""

    command: Literal["preprocess smiles"] = "preprocess smiles"
    """The command that writes the file."""
    seed: int
    """Of the conformers."""
    conformers: Annotated[int, Field(ge=1)]
    """Of each molecule."""


SMILES_MANIFEST = YAMLFormat(
    "manifest.yaml of conformers",
    "The options of `preprocess smiles`, in `FILE.shards` until it ends.",
    SmilesManifest,
)
