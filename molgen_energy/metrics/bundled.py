"""References that ship with the package: statistics of real molecules and training SMILES."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from molgen_energy.chemistry.fields import TRAINED_ON
from molgen_energy.errors import InputError
from molgen_energy.metrics.checks.chunk import CheckSettings, smiles_hash
from molgen_energy.metrics.molecule_evaluation import collect_smiles_hashes, hash_smiles
from molgen_energy.metrics.reference import Reference
from molgen_energy.metrics.sources import FileSource
from molgen_energy.resources import asset, bundled_sample
from molgen_energy.workers import WorkerPool

_QM9_SMILES = "qm9_train_smiles.txt.gz"


@dataclass(frozen=True)
class BundledReference:
    """Statistics of the test split of a data set, and its training molecules."""

    name: str
    """For `--reference`."""
    title: str
    """In reports."""
    statistics: str
    """Name of the asset."""
    marker: str
    """A part of the source of every file that was made from the data set."""
    training: str
    """The training molecules, in words."""
    made_by: str
    """The command that makes the data set."""

    def load(self, bonds: str = "perceived", valence: str | None = None) -> Reference:
        """The statistics for a choice of bonds and a table of valences, see `Reference.load`."""
        return Reference.load(asset(self.statistics), bonds, valence)

    def training_hashes(
        self, bonds: str = "perceived", loaded: Reference | None = None
    ) -> NDArray[np.uint64] | None:
        """Sorted hashes of the SMILES of the training molecules with `perceived` or `given` bonds.

        QM9's are of perceived bonds in any case. Canonical SMILES can change between versions of
        RDKit: with another version than the hashes were written with, some known SMILES are
        computed again, and None is returned unless they are as they were.

        Parameters
        ----------
        loaded
            The statistics for these bonds, if they are in memory.
        """
        if self.name == "qm9":
            return _qm9_training_hashes()
        reference = self.load(bonds) if loaded is None else loaded
        found = reference.training
        if found is None or reference.rdkit == rdBase.rdkitVersion:
            return found
        return found if all(_rewritten(smiles) == smiles for smiles in reference.probes) else None


BUNDLED: dict[str, BundledReference] = {
    "qm9": BundledReference(
        "qm9",
        "QM9",
        "qm9_test_statistics.h5",
        "QM9",
        "QM9's 100,000 training molecules (bundled)",
        "molgen-energy preprocess qm9",
    ),
    "ccd": BundledReference(
        "ccd",
        "CCD",
        "ccd_test_statistics.h5",
        "Chemical Component Dictionary",
        "CCD's 37,114 training molecules (bundled)",
        "molgen-energy preprocess ccd",
    ),
}
"""By name; the first is the default."""
DEFAULT_REFERENCE = "qm9"


def bundled_of(reference: Path) -> BundledReference | None:
    """The bundled reference of a name; None for a file, which takes precedence.

    Raises
    ------
    InputError
        It is neither.
    """
    if reference.exists() or any(sign in str(reference) for sign in "*?[/\\."):
        return None  # what cannot be read is an error of its reader
    if str(reference) not in BUNDLED:
        raise InputError(
            f"--reference {reference} does not exist; name a file of real molecules, or statistics "
            f"that ship with the package: {', '.join(BUNDLED)}"
        )
    return BUNDLED[str(reference)]


def bundled_by_data(
    provenances: Iterable[Mapping[str, str]],
) -> tuple[BundledReference | None, list[str]]:
    """The bundled reference of the data that samples, or networks, were made from.

    Parameters
    ----------
    provenances
        Of all files. Those that do not name their data, such as files of other programs, do not
        count.

    Returns
    -------
    The reference; None where no file names its data, where these have no bundled reference, or
    where files differ. And a note for the report in the last two cases.
    """
    found: dict[str, BundledReference] = {}
    others: list[str] = []
    for provenance in provenances:
        data = provenance.get(TRAINED_ON) or provenance.get("source", "")
        one = next((one for one in BUNDLED.values() if one.marker in data), None)
        if one is not None:
            found[one.title] = one
        elif TRAINED_ON in provenance and data not in others:
            others.append(data)
    default = BUNDLED[DEFAULT_REFERENCE].title
    names = [*found, *others]
    if len(names) > 1:
        return None, [
            f"the samples come from different data ({'; '.join(names)}) and are compared with "
            f"{default}; choose other real molecules with --reference"
        ]
    if others:
        return None, [
            f"the network was trained on {others[0]}, but its samples are compared with {default}; "
            "name its own data with --reference"
        ]
    return next(iter(found.values()), None), []


def _rewritten(smiles: str) -> str:
    """A SMILES with all hydrogens as this version of RDKit writes it; empty if it refuses it."""
    parameters = Chem.SmilesParserParams()
    parameters.removeHs = False  # type: ignore[assignment]  # RDKit's stubs say otherwise
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles, parameters)
    return "" if molecule is None else str(Chem.MolToSmiles(molecule))


def choose_probes(smiles: Iterable[str], count: int = 32) -> list[str]:
    """SMILES that this version of RDKit writes again as they are, those with the least hashes."""
    ranked = sorted(smiles, key=smiles_hash)
    return [text for text in ranked[: 4 * count] if _rewritten(text) == text][:count]


def _qm9_training_hashes() -> NDArray[np.uint64] | None:
    """Hashes of the bundled SMILES of QM9's 100,000 training molecules."""
    with gzip.open(asset(_QM9_SMILES), "rt", encoding="utf-8") as file:
        version, *smiles = file.read().splitlines()
    hashes = hash_smiles(smiles)
    if version != f"# RDKit {rdBase.rdkitVersion}":
        train = FileSource(bundled_sample(), split="train")
        again = collect_smiles_hashes(train, CheckSettings(), WorkerPool(0))
        if not np.isin(again, hashes).all():
            return None
    return hashes
