"""Make the HDF5 file of a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from glob import has_magic
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from molgen_energy.data.molecules import Molecules
from molgen_energy.datasets.base import Dataset, PreprocessResult
from molgen_energy.datasets.files import MoleculeFiles
from molgen_energy.datasets.memory import MoleculesInMemory
from molgen_energy.datasets.smiles import SmilesFiles, is_smiles_file
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.systems.datasets import DATASETS

if TYPE_CHECKING:
    from rdkit import Chem

__all__ = ["PreprocessResult", "preprocess"]

Source = Union[
    str, "PathLike[str]", Dataset, Molecules, "Sequence[str | PathLike[str]]", "Sequence[Chem.Mol]"
]


def preprocess(
    dataset: Source,
    output: str | PathLike[str] | None = None,
    *,
    progress: ProgressCallback = no_progress,
    **options: Any,
) -> PreprocessResult:
    """Write a dataset into the HDF5 file that training reads.

    >>> preprocess("qm9").counts
    {'train': 100000, 'valid': 17748, 'test': 13083}
    >>> preprocess("mine.sdf", "mine.h5", split="0.9,0.05,0.05", properties="gap=eV")
    >>> preprocess([Chem.AddHs(mol) for mol in mols], "mine.h5")  # with conformers

    Parameters
    ----------
    dataset
        A name of `molgen_energy.systems.datasets.DATASETS`; the path of an SDF, XYZ or SMILES file,
        of a folder of SDF or XYZ files or a pattern (`molecule_*.xyz`), or several; a `Dataset`;
        `Molecules`; or RDKit molecules with conformers, see
        `molgen_energy.chemistry.convert.from_rdkit`.
    output
        HDF5 file to write; by default the dataset's own name for it, in the current folder.
    progress
        Called as the work goes on.
    options
        Fields of the dataset's class, which are the options of `preprocess NAME`; none with a
        `Dataset`, which has them already.

    Raises
    ------
    InputError
        There is no such dataset, file or option, an option has a bad value, the data are bad, or
        the file cannot be written.
    """
    chosen = _dataset(dataset, options)
    return chosen.make(chosen.default_output() if output is None else Path(output), progress)


def _dataset(dataset: Source, options: dict[str, Any]) -> Dataset:
    if isinstance(dataset, Dataset):
        if options:
            raise InputError(f"options {', '.join(options)}: a Dataset has its options already")
        return dataset
    if isinstance(dataset, Molecules):
        return _created(MoleculesInMemory, options, molecules=dataset)
    if isinstance(dataset, str) and dataset in DATASETS and not Path(dataset).is_file():
        return _created(DATASETS[dataset], options)
    if isinstance(dataset, (str, PathLike)):
        name = fspath(dataset)
        if name and not Path(name).suffix and not Path(name).exists() and not has_magic(name):
            raise InputError(unknown_name("dataset", name, [*DATASETS, "FILE.sdf"]))
        return _created(_kind_of([name]), options, files=(name,))
    items: list[Any] = list(dataset)
    if items and all(isinstance(item, (str, PathLike)) for item in items):
        return _created(_kind_of(items), options, files=tuple(items))
    from molgen_energy.chemistry.convert import from_rdkit

    return _created(MoleculesInMemory, options, molecules=from_rdkit(items))


def _kind_of(paths: Sequence[str | PathLike[str]]) -> type[Dataset]:
    """The dataset of files of these names."""
    return SmilesFiles if all(map(is_smiles_file, paths)) else MoleculeFiles


def _created(kind: type[Dataset], options: dict[str, Any], **given: Any) -> Dataset:
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    names = [field.name for field in fields if field.name not in given]
    for name in options:
        if name not in names:
            raise InputError(unknown_name(f"option of {kind.name}", name, names))
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := required - options.keys() - given.keys():
        raise InputError(f"dataset {kind.name} needs the option {', '.join(sorted(missing))}")
    return kind(**given, **options)
