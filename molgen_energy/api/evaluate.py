"""Evaluate samples: `molgen-energy evaluate` as a function."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molgen_energy.display.progress import notebook_progress
from molgen_energy.errors import InputError
from molgen_energy.output import named_path
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.systems.evaluators import EVALUATORS

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from molgen_energy.metrics.report.model import Report

_HDF5 = (".h5", ".hdf5")


def evaluate(
    inputs: str | Path | Sequence[str | Path] | Sequence[Any],
    reference: str | Path | None = None,
    train: str | Path | None = None,
    *,
    metrics: str | Iterable[str] | None = None,
    bonds: str | None = None,
    valence: str | None = None,
    angles: str | None = None,
    types: str | None = None,
    subset: int | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    skip_bad: bool | None = None,
    per_molecule: bool | None = None,
    predictor: str | PathLike[str] | None = None,
    progress: ProgressCallback = no_progress,
    peers: Sequence[Connection] = (),
) -> Report:
    """Evaluate samples: stability, validity, novelty, geometry, energy, beside real molecules.

    Samples of other physical systems take no options.

    >>> report = molgen_energy.evaluate(molgen_energy.sample(100), workers=0)
    >>> print(report)
    >>> report.molecules.to_pandas().query("not valid")

    Parameters
    ----------
    inputs
        The path of a file, a list of paths, or a list of RDKit molecules with explicit hydrogens
        and a conformer each. Files are SDF or XYZ, also gzip, or HDF5. A folder or a pattern
        (`mol_*.xyz`) is one set of SDF or XYZ files. An HDF5 file names its physical system.
    reference
        File of real molecules to compare with, its test split if it has one; or the name of
        statistics that ship with the package: `qm9` or `ccd`, of their test splits. Default: those
        of the data that the samples' network was trained on, which its samples name, else `qm9`.
    train
        File of training molecules for novelty, its training split if it has one. Default: the
        training split of the reference. A reference without splits has no novelty.
    metrics
        Names of metrics, as a sequence or separated by commas: `rates`, `geometry`, `composition`,
        `strain` (the default), `descriptors`, `similarity`, `fcd`, `posebusters`, `xtb` (the last
        three each an extra to install), `default`, or `all`.
    bonds
        Bonds of all checks: `given` in the input; `perceived` from distances; `single`, the same
        but all taken as single for validity, SMILES and connectivity; `both`, given and perceived
        ones side by side, with the share of molecules on which they agree; or `auto` (default),
        given bonds where every record of every input has them, else perceived ones.
    valence
        Which bonds make an atom stable: `strict` (default for given bonds), `geom`, `jodo`, or
        `edm` (default for perceived bonds); with both bonds, of given ones. See
        `molgen_energy.chemistry.valence`.
    angles
        Whether to count every angle and dihedral `once` (default) or as `jodo` does.
    types
        List of geometry types to compare: `qm9`, `geom` or `frequent`. Default: `qm9` for QM9, else
        the eight most frequent of the reference.
    subset
        Number of random molecules for strain and PoseBusters, 1000 by default; xTB takes a tenth.
    workers
        Number of processes, by default one for each processor. With 0, everything runs in this
        process, without a time limit.
    timeout
        Seconds after which one molecule is abandoned and counts as invalid, 20 by default.
    skip_bad
        Whether to skip broken records and count them. By default they raise.
    per_molecule
        Whether to keep the results of each molecule, in `report.molecules`; by default yes, for
        molecules.
    predictor
        A run on properties (`train --config qm9_properties`) that predicts the properties which
        samples were asked for, beside its own error on real molecules of `reference` or of its
        data; or `xtb`: GFN2-xTB, calibrated on `reference`, for the first `subset` molecules.
    progress
        Called with the number of finished molecules of all files, and their total if it is known.
        By default a notebook shows a bar.
    peers
        Connections to other processes of a distributed job, which do part of the work.

    Returns
    -------
    The report. `print` and a notebook show it; `to_dict` and `to_pandas` give all numbers;
    `save` writes an HTML page; `molecules` is a table with a row for each molecule.

    Raises
    ------
    InputError
        A file cannot be read, a molecule cannot be evaluated, an option is unknown or does not
        apply to the physical system. The message names the file, the record and the remedy.

    Notes
    -----
    Worker processes start with a fresh interpreter, so a script must call this function under
    ``if __name__ == "__main__":``.
    """
    items = _as_list(inputs)
    system = system_of_inputs(items)
    options: dict[str, Any] = {
        "reference": None if reference is None else named_path(reference),
        "train": None if train is None else named_path(train),
        "metrics": metrics,
        "bonds": bonds,
        "valence": valence,
        "angles": angles,
        "types": types,
        "subset": subset,
        "workers": workers,
        "timeout": timeout,
        "skip_bad": skip_bad,
        "per_molecule": per_molecule,
        "predictor": predictor,
    }
    given = {name: value for name, value in options.items() if value is not None}
    evaluator = EVALUATORS[system]
    for name, value in given.items():
        if name not in evaluator.options and value is not False:
            others = [other for other, e in EVALUATORS.items() if name in e.options]
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is for {', '.join(others)}, not for {system}")
    given = {name: value for name, value in given.items() if name in evaluator.options}
    if not evaluator.parallel:
        return evaluator.evaluate(items, **given)
    with notebook_progress("evaluating", "molecules", progress) as callback:
        return evaluator.evaluate(items, **given, progress=callback, peers=peers)


def _as_list(inputs: Any) -> list[Any]:
    """Paths as `Path`, anything else unchanged."""
    if isinstance(inputs, (str, Path)):
        return [named_path(inputs)]
    items = [named_path(item) if isinstance(item, (str, Path)) else item for item in inputs]
    if not items:
        raise InputError("there is nothing to evaluate; give a file or molecules")
    if 0 < sum(isinstance(item, Path) for item in items) < len(items):
        raise InputError("give either paths or RDKit molecules, not both in one list")
    return items


def system_of_inputs(inputs: Sequence[Any]) -> str:
    """Name of the physical system of paths; only HDF5 files can hold others than molecules.

    Raises
    ------
    InputError
        The files hold different systems, or one that has no evaluator.
    """
    first = None
    for path in inputs:
        system = "molecules"
        if isinstance(path, Path) and path.suffix.lower() in _HDF5:
            from molgen_energy.data.hdf5 import system_of

            system = system_of(path)
        if first is None:
            first = system
        if system != first:
            raise InputError(
                f"{inputs[0]} holds {first} and {path} {system}; evaluate them separately"
            )
    assert first is not None
    if first not in EVALUATORS:
        raise InputError(f"{inputs[0]} holds {first}; known are {', '.join(EVALUATORS)}")
    return first
