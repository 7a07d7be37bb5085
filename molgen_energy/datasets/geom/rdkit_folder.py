"""GEOM's `rdkit_folder`: a summary, and a pickle for each molecule with its RDKit conformers.

Axelrod and Gómez-Bombarelli, Scientific Data 9, 185 (2022). `summary_drugs.json` leads from a
SMILES to `pickle_path`; the pickle is a mapping whose `conformers` have `rd_mol` and `totalenergy`
in hartree. As in JODO, molecules whose summary lacks `uniqueconfs` or `pickle_path` do not count.
In memory are the paths, and one pickle at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.crude import energies_of
from molgen_energy.datasets.geom.layout import Entry, Layout
from molgen_energy.datasets.geom.rdkit_pickles import decode_pickled, pickled_bytes
from molgen_energy.errors import InputError
from molgen_energy.formats.limits import check_memory
from molgen_energy.formats.parts import check_part, read_part
from molgen_energy.formats.pickles import pickle_file, read_pickle

_SUMMARY = "summary_drugs.json"
_MEMORY = 12  # bytes for a byte of the summary


class RDKitFolder(Layout):
    """`rdkit_folder`."""

    name = "GEOM's rdkit_folder"
    file_names = f"rdkit_folder with {_SUMMARY}"
    has_smiles = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def in_folder(cls, folder: Path) -> RDKitFolder | None:
        """A folder with a summary, or the one that holds it."""
        for found in (folder, folder / "rdkit_folder"):
            if (found / _SUMMARY).exists():
                return cls(found)
        if folder.name == "drugs" and next(folder.glob("*.pickle"), None) is not None:
            raise InputError(
                f"{folder} holds pickles without {_SUMMARY}; name the folder rdkit_folder that "
                "holds both"
            )
        return None

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, in the order of the summary."""
        paths = self._paths()
        self.total = len(paths)
        for smiles, name in paths:
            path = self._folder / name
            with pickle_file(path) as (file, size):
                found = read_pickle(file, size)
            conformers = found.get("conformers") if isinstance(found, dict) else None
            if not isinstance(conformers, list):
                raise InputError(f"{path} has no conformers; fetch it again")
            items = [item if isinstance(item, dict) else {} for item in conformers]
            yield Entry(
                name,
                pickled_bytes(item.get("rd_mol") for item in items),
                energies_of(items),
                smiles,
            )

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """The bytes of an RDKit molecule."""
        return decode_pickled(conformer)

    def _paths(self) -> list[tuple[str, str]]:
        """SMILES and path within the folder of each molecule."""
        path = self._folder / _SUMMARY
        size = check_part(path)
        check_memory(_MEMORY * size, f"reading {path}", "free some memory")
        try:
            summary = json.loads(read_part(path, size))
        except (ValueError, RecursionError):
            raise InputError(f"{path} is cut off or damaged; fetch it again") from None
        if not isinstance(summary, dict):
            raise InputError(f"{path} is no summary of molecules; fetch it again")
        paths = []
        for smiles, about in summary.items():
            if not isinstance(about, dict) or about.get("uniqueconfs") is None:
                continue
            name = about.get("pickle_path")
            if name is None:
                continue
            if not isinstance(name, str) or not _is_inside(name):
                raise InputError(
                    f"{path}: the pickle_path {str(name)[:100]!r} leads out of the folder; mend it"
                )
            paths.append((smiles, name))
        return paths


def _is_inside(name: str) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    path = PurePosixPath(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts
