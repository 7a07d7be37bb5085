"""The declaration of the shards of a file of conformers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from molgen_energy.data.molecules import SHAPES as MOLECULES
from molgen_energy.data.shards import Manifest
from molgen_energy.formats.tensors import Shapes
from molgen_energy.formats.yaml import YAMLFormat

_OPTIONAL = {f"{name.removesuffix('?')}?": shape for name, shape in MOLECULES.items()}
SHAPES: Shapes = {
    **_OPTIONAL,  # none without a conformer
    "which": ("int64", ("conformers",)),
    "failures": ("uint8", ("bytes",)),
    "lost": ("bool", ("records",)),
}
"""Of the arrays of a shard: conformers, the record of each, and failures as JSON."""


class SmilesManifest(Manifest):
    """The options of `preprocess smiles` that conformers depend on, besides the SMILES."""

    command: Literal["preprocess smiles"] = "preprocess smiles"
    """The command that writes the file."""
    seed: int
    """Of the conformers."""
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
