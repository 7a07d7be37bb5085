"""The declaration of the shards of a file of spin glasses; a shard is a chunk that was solved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from molgen_energy.data.shards import Manifest
from molgen_energy.formats.tensors import Shapes
from molgen_energy.formats.yaml import YAMLFormat

SHAPES: Shapes = {
    "right": ("float32", ("M", "L", "L")),
    "down": ("float32", ("M", "L", "L")),
    "spins": ("int8", ("M", "L", "L")),
    "energy": ("float64", ("M",)),
}
"""Of the arrays of a solved chunk."""


class SpinManifest(Manifest):
    """The options of `preprocess spins`, of which its lattices are a function."""

    command: Literal["preprocess spins"] = "preprocess spins"
    """The command that writes the file."""
    couplings: str
    """`uniform`, `binary`, or a fingerprint of those of a file."""
    size: Annotated[int, Field(ge=2)]
    """L."""
    count: Annotated[int, Field(ge=1)]
    """Lattices."""
    boundary: Literal["open", "periodic"]
    """Of the lattices."""
    seed: Annotated[int, Field(ge=0)]
    """Of couplings and split."""


SPIN_MANIFEST = YAMLFormat(
    "manifest.yaml of solved lattices",
    "The options of `preprocess spins`, in `FILE.shards` until it ends.",
    SpinManifest,
)
