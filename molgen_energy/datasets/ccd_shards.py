"""The declaration of the shards of `preprocess ccd`; what is in them: `datasets.conformers`."""

from __future__ import annotations

from typing import Literal

from molgen_energy.datasets.conformers import ConformerManifest
from molgen_energy.formats.yaml import YAMLFormat


class ComponentManifest(ConformerManifest):
    """The options of `preprocess ccd --relax` that conformers depend on.

    The names of shards depend on the molecules before relaxation.
    """

    command: Literal["preprocess ccd"] = "preprocess ccd"
    """The command that writes the file."""


COMPONENT_MANIFEST = YAMLFormat(
    "manifest.yaml of relaxed components",
    "The options of `preprocess ccd --relax`, in `FILE.shards` until it ends.",
    ComponentManifest,
)
