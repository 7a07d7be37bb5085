"""Coverage and matching of conformers, by the RMSD of heavy atoms over all symmetries.

Defined for L reference conformers of a molecule and K generated ones (O. Ganea et al., "GeoMol:
Torsional Geometric Generation of Molecular 3D Conformer Ensembles", NeurIPS 2021; M. Xu et al.,
ICLR 2021), with RMSD_kl after the best alignment of generated conformer k to reference l:

=====  =========================================================================================
COV-R  share of references with a generated conformer within the threshold, min_k RMSD_kl ≤ δ
MAT-R  mean over references of min_k RMSD_kl, Å
COV-P  share of generated conformers within the threshold of a reference, min_l RMSD_kl ≤ δ
MAT-P  mean over generated conformers of min_l RMSD_kl, Å
=====  =========================================================================================

The field draws twice as many conformers as there are references, K = 2L.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdMolAlign

from molgen_energy.metrics.statistics import Mean

DRUG_THRESHOLD, QM9_THRESHOLD = 1.25, 0.5
"""δ of the field, Å: for drug-like molecules and for QM9."""
_MOST_MATCHES = 10_000
"""Symmetries of a molecule that are tried; RDKit's million takes minutes."""
_HEADER = ("", "mean", "95 % interval", "median")


def heavy_atoms(molecule: Chem.Mol) -> Chem.Mol:
    """A sanitised copy without hydrogens, with all conformers.

    Raises
    ------
    ValueError
        RDKit cannot sanitise the molecule, or it has no conformer.
    """
    if not molecule.GetNumConformers():
        raise ValueError("it has no conformer")
    copy = Chem.Mol(molecule)
    with rdBase.BlockLogs():
        Chem.SanitizeMol(copy)
        return Chem.RemoveHs(copy)


def conformer_rmsd(
    samples: Sequence[Chem.Mol], references: Sequence[Chem.Mol]
) -> NDArray[np.float64]:
    """RMSD of heavy atoms after the best alignment over all symmetries, (K, L) in Å.

    `rdMolAlign.GetBestRMS` of RDKit. Mirror images are different.

    Parameters
    ----------
    samples, references
        Conformers of one molecule without hydrogens (`heavy_atoms`), one in each; K and L of them.

    Raises
    ------
    ValueError
        A sample and a reference are different molecules.
    """
    try:
        with rdBase.BlockLogs():
            # It moves the first molecule.
            found = [
                rdMolAlign.GetBestRMS(Chem.Mol(sample), reference, maxMatches=_MOST_MATCHES)
                for sample in samples
                for reference in references
            ]
    except RuntimeError as error:
        raise ValueError("samples and references are different molecules") from error
    return np.array(found, np.float64).reshape(len(samples), len(references))


@dataclass(frozen=True)
class ConformerScores:
    """Coverage and matching of the conformers of M molecules; see the module for definitions.

    Parameters
    ----------
    smiles
        Of the molecules, M.
    rmsd
        RMSD of each sample to each reference of the molecules in Å, M arrays (K, L).
    threshold
        δ, Å.
    without_samples
        Molecules of the reference that no sample belongs to; they do not count.
    without_reference
        Samples that belong to no molecule of the reference, or that RDKit cannot sanitise,
        or that are not finite.
    """

    smiles: tuple[str, ...]
    rmsd: tuple[NDArray[np.float64], ...]
    threshold: float
    without_samples: int = 0
    without_reference: int = 0

    def _of_each(self, value: Callable[[NDArray[np.float64]], float]) -> NDArray[np.float64]:
        return np.array([value(rmsd) for rmsd in self.rmsd], np.float64)

    @property
    def coverage_recall(self) -> NDArray[np.float64]:
        """COV-R of each molecule, (M,)."""
        return self._of_each(lambda rmsd: float((rmsd.min(axis=0) <= self.threshold).mean()))

    @property
    def matching_recall(self) -> NDArray[np.float64]:
        """MAT-R of each molecule, (M,) in Å."""
        return self._of_each(lambda rmsd: float(rmsd.min(axis=0).mean()))

    @property
    def coverage_precision(self) -> NDArray[np.float64]:
        """COV-P of each molecule, (M,)."""
        return self._of_each(lambda rmsd: float((rmsd.min(axis=1) <= self.threshold).mean()))

    @property
    def matching_precision(self) -> NDArray[np.float64]:
        """MAT-P of each molecule, (M,) in Å."""
        return self._of_each(lambda rmsd: float(rmsd.min(axis=1).mean()))

    def with_threshold(self, threshold: float) -> ConformerScores:
        """The same conformers at another δ, Å."""
        return ConformerScores(
            self.smiles, self.rmsd, threshold, self.without_samples, self.without_reference
        )

    def to_dict(self) -> dict[str, float]:
        """Means and medians over molecules: coverage as shares, matching in Å."""
        values = {
            "COV-R": self.coverage_recall, "MAT-R": self.matching_recall,
            "COV-P": self.coverage_precision, "MAT-P": self.matching_precision,
        }  # fmt: skip
        found = {"molecules": float(len(self.rmsd)), "threshold": self.threshold}
        for name, of_each in values.items():
            found |= {
                f"{name} mean": float(of_each.mean()),
                f"{name} median": float(np.median(of_each)),
            }
        return found

    def __str__(self) -> str:
        """A table: means over molecules with their 95 % intervals, and medians."""
        shares = (("COV-R, %", self.coverage_recall), ("COV-P, %", self.coverage_precision))
        lengths = (("MAT-R, Å", self.matching_recall), ("MAT-P, Å", self.matching_precision))
        rows = [_HEADER]
        for (share, of_share), (length, of_length) in zip(shares, lengths, strict=True):
            rows += [_row(share, 100 * of_share, 1), _row(length, of_length, 3)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        notes = [f"{len(self.rmsd):,} molecules, threshold {self.threshold:g} Å"]
        if self.without_samples:
            notes.append(f"{self.without_samples:,} molecules of the reference have no sample")
        if self.without_reference:
            notes.append(f"{self.without_reference:,} samples belong to no molecule of it")
        return "\n".join([*lines, "; ".join(notes)])


def _row(name: str, values: NDArray[np.float64], digits: int) -> tuple[str, str, str, str]:
    mean = Mean.of(values)
    interval = mean.interval
    between = "" if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return name, f"{mean.value:.{digits}f}", between, f"{float(np.median(values)):.{digits}f}"
