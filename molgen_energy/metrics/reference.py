"""What samples are compared with: real data, and the molecules that training saw."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from rdkit import rdBase

from molgen_energy import __version__
from molgen_energy.chemistry.geometry import (
    GEOMETRY_TYPES,
    KINDS,
    GeometryTypes,
    code_of,
    type_name,
)
from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.hdf5 import SCHEMA, MoleculeFile
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.metrics.comparison import (
    Comparison,
    Distributions,
    Measure,
    compare,
)
from molgen_energy.metrics.evaluation import (
    Evaluation,
    Options,
    Progress,
    evaluate,
    hashes_of,
    hashes_of_names,
    judgements,
    settings_for,
)
from molgen_energy.metrics.fcd import Moments
from molgen_energy.metrics.findings import GROUPS, EvaluationAccumulator, Values
from molgen_energy.metrics.judging import Settings
from molgen_energy.metrics.rates import Rate
from molgen_energy.output import atomic_replace, check_file
from molgen_energy.resources import asset, bundled_sample
from molgen_energy.workers import Workers

PIECE = 500
COMPARED = 10_000
"""Training molecules that are compared with the test split, to say what real data score."""

_BUNDLED_SMILES = "qm9_train_smiles.txt.gz"
_BUNDLED_STATISTICS = "qm9_test_statistics.h5"
_FREQUENT = 8  # types of each kind, where no list is given


class MoleculeSource:
    """Molecules of any file that `evaluate` takes: SDF, XYZ (also gzip) or HDF5.

    Parameters
    ----------
    path
        The file.
    split
        Of an HDF5 file that has it, only these molecules (`train`, `test`); None takes all.
    skip_bad
        Leave out broken records and remember how many.
    most
        Take so many molecules of the split at most, at random (HDF5 only).

    Raises
    ------
    InputError
        There is no such file, or an HDF5 file holds no molecule.
    """

    def __init__(
        self,
        path: Path,
        split: str | None = None,
        skip_bad: bool = False,
        most: int | None = None,
    ) -> None:
        check_file(path)
        self.path, self.split, self.skip_bad, self.most = path, split, skip_bad, most
        self.skipped = 0
        self.note = ""
        self.provenance: dict[str, str] = {}

    @property
    def is_hdf5(self) -> bool:
        """Whether the name is that of an HDF5 file."""
        return self.path.suffix.lower() in (".h5", ".hdf5")

    def size(self) -> int | None:
        """How many molecules there are, where that is cheap to know."""
        if not self.is_hdf5:
            return None
        with _opened(self.path) as file:
            count = len(file.split_indices(self._existing_split(file)))
        return count if self.most is None else min(count, self.most)

    def has_split(self, split: str) -> bool:
        """Whether there are molecules of a split."""
        if not self.is_hdf5:
            return False
        with _opened(self.path) as file:
            return len(file.split_indices(split)) > 0

    def carries_bonds(self) -> bool:
        """Whether some of the first molecules have bonds that were not found from distances."""
        if self.is_hdf5:
            with _opened(self.path) as file:
                return "bonds" in file.columns
        first = next(self.pieces())
        bonds = first.molecules.bonds
        return bonds is not None and len(bonds.order) > 0

    def _existing_split(self, file: MoleculeFile) -> str | None:
        return self.split if len(file.split_indices(self.split)) else None

    def pieces(self) -> Iterator[MoleculeChunk]:
        """The molecules, some hundreds at a time.

        Bonds that a record says were found from distances are left out. Molecules with bonds of
        their own and those without come in different pieces.
        """
        if self.is_hdf5:
            yield from self._of_hdf5()
            return
        reader = MoleculeReader(self.path, self.skip_bad)
        read = (
            (reader.number, _without_bonds(molecule) if reader.bonds_perceived else molecule)
            for molecule in reader
        )
        while part := list(islice(read, PIECE)):
            self.provenance = reader.fields
            for bonded in (True, False):
                alike = [(k, m) for k, m in part if (m.bond_index is not None) == bonded]
                if alike:
                    records, molecules = zip(*alike, strict=True)
                    yield MoleculeChunk(np.array(records, np.int64), Molecules.from_list(molecules))
        self.skipped = reader.skipped_count
        self.note = _skipped_note(reader)

    def _of_hdf5(self) -> Iterator[MoleculeChunk]:
        with _opened(self.path) as file:
            split = self._existing_split(file)
            if split != self.split:
                self.note = f"it has no {self.split} split; all its molecules are taken"
            self.provenance = file.provenance
            members = file.split_indices(split)
            kept = np.ones(len(file), bool)
            if self.most is not None and len(members) > self.most:
                kept[:] = False
                rng = np.random.default_rng(0)
                kept[rng.choice(members, self.most, replace=False)] = True
            for piece in file.chunks(PIECE, split, self.skip_bad):
                chosen = np.flatnonzero(kept[piece.records - 1])
                if len(chosen):
                    yield piece if len(chosen) == len(piece) else piece.select(chosen)
            self.skipped = file.skipped


def _opened(path: Path) -> MoleculeFile:
    """An HDF5 file of molecules; one that was written without any may lack its arrays."""
    try:
        with h5py.File(path, "r") as file:
            empty = (
                file.attrs.get("schema") == SCHEMA and "split" in file and not len(file["split"])
            )
    except OSError:
        empty = False  # what is wrong with it is said below
    if empty:
        raise InputError(f"{path} holds no molecule")
    return MoleculeFile(path)


def _without_bonds(molecule: Molecule) -> Molecule:
    return replace(molecule, bond_index=None, bond_order=None)


def _skipped_note(reader: MoleculeReader) -> str:
    if not reader.skipped:
        return ""
    first = reader.skipped[0]
    return f"the first bad record is {first.number} (line {first.line}): {first.reason}"


@dataclass
class Reference:
    """Real molecules, as far as samples are compared with them.

    ``row`` is what they score themselves, beside samples; ``distances`` how far other real
    molecules are from them, which is as near as samples can come.
    """

    name: str
    row: Evaluation
    distributions: Distributions
    distances: Comparison
    types: GeometryTypes

    def save(self, path: Path, source: str) -> None:
        """Write to HDF5, for `load`."""
        with atomic_replace(path) as output, h5py.File(output.temporary, "w") as file:
            file.attrs.update(
                name=self.name,
                source=source,
                created_by=f"molgen-energy {__version__}",
                rdkit=rdBase.rdkitVersion,
                molecules=self.row.molecules,
                bonds=self.row.bonds,
                types=json.dumps({"name": self.types.name, "types": self.types.types}),
                rates=json.dumps({k: None if r is None else [r.count, r.total, r.effect]
                                  for k, r in self.row.rates.items()}),
                measures=json.dumps({k: _as_list(m) for k, m in self.row.measures.items()}),
                distances=json.dumps({k: _as_list(m) for k, m in self.distances.measures.items()}),
                by_type=json.dumps(self.distances.by_type),
            )  # fmt: skip
            compressed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
            for kind, names in self.types.types.items():
                for name in names:
                    values = self.distributions.values(kind, name)
                    data = file.create_dataset(
                        f"geometry/{kind}/{name}", data=np.sort(values.value), **compressed
                    )
                    data.attrs["count"] = values.count
            file["sizes"] = self.distributions.sizes.sum(axis=0)
            file["elements"] = self.distributions.elements.sum(axis=0)
            moments = self.distributions.moments
            if moments is not None:
                everyone = moments.gaussian(np.ones(len(moments.count), bool))
                upper = everyone.covariance[np.triu_indices(len(everyone.mean))]
                file.create_dataset("fcd/mean", data=everyone.mean)
                file.create_dataset("fcd/covariance", data=upper.astype(np.float32), **compressed)
                file["fcd"].attrs["count"] = everyone.count

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote; values are those of one group, so they serve as a target only."""
        with h5py.File(path, "r") as file:
            attributes = dict(file.attrs)
            geometry = {
                kind: {
                    code_of(kind, name): Values.of(data[:], int(data.attrs["count"]))
                    for name, data in file[f"geometry/{kind}"].items()
                }
                for kind in KINDS
            }
            moments = None
            if "fcd" in file:
                moments = _moments(
                    file["fcd/mean"][:], file["fcd/covariance"][:], int(file["fcd"].attrs["count"])
                )
            distributions = Distributions(
                geometry, file["sizes"][:][None], file["elements"][:][None], moments
            )
        rates = {
            key: None if value is None else Rate(*value)
            for key, value in json.loads(attributes["rates"]).items()
        }
        row = Evaluation(
            str(attributes["name"]),
            int(attributes["molecules"]),
            rates,
            {key: _of_list(value) for key, value in json.loads(attributes["measures"]).items()},
            distributions,
            bonds=str(attributes["bonds"]),
        )
        distances = Comparison(
            {key: _of_list(value) for key, value in json.loads(attributes["distances"]).items()},
            json.loads(attributes["by_type"]),
        )
        types = json.loads(attributes["types"])
        chosen = GeometryTypes(types["name"], {k: tuple(v) for k, v in types["types"].items()})
        return cls(row.name, row, distributions, distances, chosen)


def _as_list(measure: Measure) -> list[object]:
    return [measure.value, measure.interval, measure.count, measure.note]


def _of_list(stored: list[object]) -> Measure:
    value, interval, count, note = stored
    assert isinstance(count, int)
    between = None if interval is None else (float(interval[0]), float(interval[1]))  # type: ignore[index]
    return Measure(None if value is None else float(value), between, count, str(note))  # type: ignore[arg-type]


def _moments(mean: NDArray[np.float64], upper: NDArray[np.float32], count: int) -> Moments:
    """Sums of one group that give back a mean and a covariance."""
    width = len(mean)
    covariance = np.zeros((width, width))
    covariance[np.triu_indices(width)] = upper
    covariance = covariance + np.triu(covariance, 1).T
    moments = Moments(groups=1)
    moments.count[0] = count
    moments.first[0] = mean * count
    moments.second[0] = covariance * (count - 1) + count * np.outer(mean, mean)
    return moments


def bundled_reference() -> Reference:
    """Statistics of QM9's test split by EDM's split (13,083 molecules), as they ship."""
    return Reference.load(asset(_BUNDLED_STATISTICS))


def reference_of(
    path: Path,
    name: str,
    options: Options,
    types: GeometryTypes | None,
    known: NDArray[np.uint64] | None,
    workers: Workers,
    progress: Progress = lambda _: None,
) -> Reference:
    """Judge a file as a reference: its test split where it has one, else all of it.

    Parameters
    ----------
    types
        Of geometry; None takes the eight most frequent of the reference.

    Notes
    -----
    What real data score in distances is measured on up to 10,000 molecules of its training split,
    or, where there is none, on one half of the molecules against the other.
    """
    source = MoleculeSource(path, "test", options.skip_bad)
    if types is None:
        types = frequent_types(source, options, workers)
    options = replace(options, settings=settings_for(types, options))
    row = evaluate(name, source, options, known, workers, progress)
    row.skipped += source.skipped
    if source.note:
        row.notes.append(source.note)
    assert row.distributions is not None
    compared = types if "geometry" in options.metrics else None
    composition = "composition" in options.metrics
    if source.has_split("train") and source.has_split("test"):
        training = MoleculeSource(path, "train", options.skip_bad, COMPARED)
        without = replace(options, metrics=options.metrics - {"strain", "xtb", "posebusters"})
        other = evaluate(f"{name}, train", training, without, None, workers, progress)
        assert other.distributions is not None
        distances = compare(other.distributions, row.distributions, compared, composition)
    else:
        half = np.arange(GROUPS) < GROUPS // 2
        both = row.distributions
        distances = compare(both, both, compared, composition, within=half, against=~half)
        row.notes.append("distances in its column are those of one half of it from the other")
    return Reference(name, row, row.distributions, distances, types)


def frequent_types(source: MoleculeSource, options: Options, workers: Workers) -> GeometryTypes:
    """The eight most frequent types of each kind among the first 10,000 molecules."""
    settings = replace(options.settings, codes=None, whole_names=False)
    first: list[MoleculeChunk] = []
    for piece in source.pieces():
        first.append(piece)
        if sum(map(len, first)) >= COMPARED:
            break
    gathered = EvaluationAccumulator(0)
    for _, found in judgements(first, settings, workers):
        gathered.add_geometry(found)
    chosen = {}
    for kind in KINDS:
        by_type = gathered.geometry.get(kind, {})
        counts = {type_name(kind, code): values.count for code, values in by_type.items()}
        ranked = sorted(counts, key=lambda name: (-counts[name], name))
        chosen[kind] = tuple(ranked[:_FREQUENT])
    return GeometryTypes(f"the {_FREQUENT} most frequent of each kind", chosen)


def types_named(name: str | None, reference: Path | None) -> GeometryTypes | None:
    """The list of types of a name; by default QM9's for QM9, else None for the most frequent.

    Raises
    ------
    InputError
        There is no such list.
    """
    if name is None:
        return GEOMETRY_TYPES["qm9"] if reference is None or _is_qm9(reference) else None
    if name == "frequent":
        return None
    if name not in GEOMETRY_TYPES:
        raise InputError(unknown_name("list of types", name, [*GEOMETRY_TYPES, "frequent"]))
    return GEOMETRY_TYPES[name]


def _is_qm9(path: Path) -> bool:
    if path.suffix.lower() not in (".h5", ".hdf5"):
        return False
    with _opened(path) as file:
        return "QM9" in file.source


def training_names(
    path: Path,
    settings: Settings,
    workers: Workers,
    skip_bad: bool = False,
    progress: Progress = lambda _: None,
) -> tuple[NDArray[np.uint64], MoleculeSource]:
    """Hashes of the training molecules' SMILES, by the bonds that samples are judged by."""
    source = MoleculeSource(path, "train", skip_bad)
    return hashes_of_names(source, settings, workers, progress), source


def qm9_training_names() -> NDArray[np.uint64] | None:
    """Hashes of the SMILES of QM9's 100,000 training molecules by our perception, as they ship.

    Canonical SMILES are RDKit's own and can change between its versions: where the version is not
    the one that wrote the list, molecules of the bundled sample are named again, and None is
    returned unless the list holds them.
    """
    with gzip.open(asset(_BUNDLED_SMILES), "rt", encoding="utf-8") as file:
        version, *names = file.read().splitlines()
    known = hashes_of(names)
    if version != f"# RDKit {rdBase.rdkitVersion}":
        train = MoleculeSource(bundled_sample(), split="train")
        again = hashes_of_names(train, Settings(), Workers(0, 0.0))
        if not np.isin(again, known).all():
            return None
    return known
