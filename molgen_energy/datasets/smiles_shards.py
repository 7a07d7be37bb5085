"""The declaration of the shards of a file of conformers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from molgen_energy.data.shards import Manifest
from molgen_energy.formats.yaml import YAMLFormat


class SmilesManifest(Manifest):
    """The options of `preprocess smiles` that conformers depend on, besides the SMILES."""

    seed: int
    conformers: Annotated[int, Field(ge=1)]
    """Of each molecule."""
    relax: str
    """The relaxation."""
    rdkit: str
    """Version of RDKit."""


SMILES_MANIFEST = YAMLFormat(
    "manifest.yaml of conformers",
    "The options of `preprocess smiles`, in `FILE.shards` until it ends.",
    SmilesManifest,
)
