"""Reference molecules that samples are compared with, and training molecules for novelty."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from rdkit import rdBase

from molgen_energy import __version__
from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.chemistry.geometry import (
    GEOMETRY_TYPES,
    KINDS,
    GeometryTypes,
    code_of,
    type_name,
)
from molgen_energy.data.molecules import MoleculeChunk
from molgen_energy.elements import ELEMENTS
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.formats.declaration import (
    AttributeSpec,
    DatasetSpec,
    HDF5Format,
    Relation,
    Size,
)
from molgen_energy.formats.hdf5 import HDF5File, open_hdf5
from molgen_energy.metrics.accumulator import (
    JACKKNIFE_GROUPS,
    EvaluationAccumulator,
    ValueSample,
)
from molgen_energy.metrics.checks.chunk import CheckSettings
from molgen_energy.metrics.distances.comparison import Comparison, Distributions, compare
from molgen_energy.metrics.distances.fcd import FEATURES, Gaussian, Moments
from molgen_energy.metrics.distances.real_ranges import RealRanges, ResampledRanges, StoredRanges
from molgen_energy.metrics.molecule_evaluation import (
    MoleculeEvaluation,
    ProgressCounter,
    check_chunks,
    collect_smiles_hashes,
    evaluate_source,
    hash_smiles,
)
from molgen_energy.metrics.molecule_values import MoleculeValues
from molgen_energy.metrics.options import EvaluationOptions, with_types
from molgen_energy.metrics.sources import FileSource
from molgen_energy.metrics.statistics import Estimate, Rate
from molgen_energy.output import atomic_replace
from molgen_energy.resources import asset, bundled_sample
from molgen_energy.workers import WorkerPool

MAX_COMPARED = 10_000
"""Number of training molecules that are compared with the test split, for the reference's own
distances."""
MAX_KEPT = 20_000
"""Number of molecules of the reference that sets of real molecules are drawn from."""
MAX_STORED = 5000
"""Number of values of a descriptor in a file of `Reference.save`."""

_BUNDLED_SMILES = "qm9_train_smiles.txt.gz"
_BUNDLED_STATISTICS = "qm9_test_statistics.h5"
_COMPRESSED = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
_FREQUENT = 8  # types of each kind, without a list


_Stored = tuple[float | None, tuple[float, float] | None, int, str]  # an estimate

STATISTICS = HDF5Format(
    None,
    "Statistics of a reference",
    "What samples are compared with: statistics of real molecules. The package brings those of "
    "QM9's test split.",
    schema=None,
    sizes={
        "G": Size("groups of molecules, of which the jackknife leaves out one at a time"),
        "H": Size("halves of the molecules, or one whole"),
        "C": Size("numbers of molecules with known ranges"),
    },
    attributes=(
        AttributeSpec("name", "text", "name of the molecules"),
        AttributeSpec("source", "text", "what the molecules are", required=False),
        AttributeSpec("created_by", "text", "program and version", required=False),
        AttributeSpec("rdkit", "text", "version of RDKit", required=False),
        AttributeSpec("molecules", "integer", "how many there are", low=0),
        AttributeSpec("bonds", "text", "where bonds come from"),
        AttributeSpec("valence", "text", "table of valences, `edm` without it", required=False),
        AttributeSpec(
            "types", "json", "types of bond lengths, angles and dihedrals", json=GeometryTypes
        ),
        AttributeSpec(
            "rates", "json", "count, total and design effect of each rate",
            json=dict[str, tuple[int, int, float] | None],
        ),
        AttributeSpec(
            "measures", "json", "value, interval, count and note of each mean",
            json=dict[str, _Stored],
        ),
        AttributeSpec(
            "distances", "json", "value, interval, count and note of each distance",
            json=dict[str, _Stored],
        ),
        AttributeSpec(
            "by_type", "json", "MMD and Wasserstein distance of each type",
            json=dict[str, dict[str, tuple[float, float]]],
        ),
        AttributeSpec(
            "count", "integer", "molecules of each half", required=False, low=1, shape=("H",),
            of="fcd",
        ),
    ),
    datasets=(
        DatasetSpec(
            "geometry/*/*", ("*",), "float", "values of a type, sorted by group; the group above "
            "is `bond length`, `angle` or `dihedral`", unit="Å or degrees", required=False,
            dtype="f4",
            attributes=(
                AttributeSpec("count", "integer", "values before some were drawn", low=0),
                AttributeSpec("groups", "integer", "values of each group", low=0, shape=("G",)),
            ),
        ),
        DatasetSpec(
            "descriptors/*", ("*",), "float", "values of a descriptor, sorted by group",
            required=False, dtype="f4",
            attributes=(
                AttributeSpec("count", "integer", "values before some were drawn", low=0),
                AttributeSpec("groups", "integer", "values of each group", low=0, shape=("G",)),
            ),
        ),
        DatasetSpec("sizes", ("G", "*"), "integer", "molecules of 0, 1, 2 … atoms", low=0),
        DatasetSpec(
            "elements", ("G", ELEMENTS + 1), "integer", "atoms of atomic number 0 to 118", low=0
        ),
        DatasetSpec(
            "fcd/mean", ("H", FEATURES), "float", "mean of the activations of ChemNet",
            required=False, required_with="fcd",
        ),
        DatasetSpec(
            "fcd/covariance", ("H", FEATURES * (FEATURES + 1) // 2), "float",
            "upper triangle of their covariance", required=False, required_with="fcd",
            dtype="f4",
        ),
        DatasetSpec(
            "ranges/counts", ("C",), "integer", "numbers of molecules, ascending",
            required=False, required_with="ranges", low=1,
        ),
        DatasetSpec(
            "ranges/quantiles/*", ("C", 3), "float", "quantiles 2.5, 50 and 97.5 % of a distance "
            "of so many real molecules; NaN where undefined", required=False, finite=False,
        ),
    ),
    relations=(
        Relation(
            "numbers that ascend", ("ranges/counts",), lambda counts: np.diff(counts) <= 0,
            at_opening=True,
        ),
        Relation(
            "as many atoms as in 'elements'", ("sizes", "elements"),
            lambda sizes, elements: sizes @ np.arange(sizes.shape[1]) != elements.sum(axis=1),
            at_opening=True,
        ),
    ),
    remedy="install molgen-energy again",
)  # fmt: skip
"""The declaration of `Reference.save`."""


@dataclass
class Reference:
    """Statistics of the reference molecules."""

    name: str
    evaluation: MoleculeEvaluation
    """Their own rates and energies."""
    distributions: Distributions
    """What samples are compared with."""
    distances: Comparison
    """Distances of other real molecules from these: the best that samples can achieve."""
    types: GeometryTypes
    ranges: RealRanges | None = None
    """The range of each distance for as many real molecules as a file has."""

    def save(self, path: Path, source: str) -> None:
        """Write to an HDF5 file for `load`.

        Parameters
        ----------
        source
            Description of the molecules, stored with them.
        """
        evaluation, distances = self.evaluation, self.distances
        with (
            atomic_replace(path) as output,
            output.temporary.open("w+b") as raw,
            h5py.File(raw, "w") as file,
        ):
            file.attrs.update(
                name=self.name,
                source=source,
                created_by=f"molgen-energy {__version__}",
                rdkit=rdBase.rdkitVersion,
                molecules=evaluation.molecules,
                bonds=evaluation.bonds,
                valence=evaluation.valence,
                types=json.dumps(vars(self.types)),
                rates=json.dumps({k: None if r is None else [r.count, r.total, r.effect]
                                  for k, r in evaluation.rates.items()}),
                measures=json.dumps({k: _to_list(e) for k, e in evaluation.estimates.items()}),
                distances=json.dumps({k: _to_list(e) for k, e in distances.estimates.items()}),
                by_type=json.dumps(distances.by_type),
            )  # fmt: skip
            for kind, names in self.types.types.items():
                for name in names:
                    _store_sample(
                        file, f"geometry/{kind}/{name}", self.distributions.values(kind, name)
                    )
            for key, sample in self.distributions.descriptors.items():
                digits = DESCRIPTORS[key].digits
                _store_sample(file, f"descriptors/{key}", sample, digits, MAX_STORED)
            for key in ("sizes", "elements"):
                counts = getattr(self.distributions, key)
                file.create_dataset(key, data=counts, **_COMPRESSED)
            moments = self.distributions.moments
            if moments is not None:
                # Not those of every jackknife group: half a megabyte each.
                parts = moments.halves() or [moments.gaussian()]
                upper = [part.covariance[np.triu_indices(len(part.mean))] for part in parts]
                covariance = np.array(upper, np.float32)
                file.create_dataset("fcd/mean", data=np.array([part.mean for part in parts]))
                file.create_dataset("fcd/covariance", data=covariance, **_COMPRESSED)
                file["fcd"].attrs["count"] = [part.count for part in parts]
            if isinstance(self.ranges, StoredRanges):
                file["ranges/counts"] = self.ranges.counts
                for key, quantiles in self.ranges.ranges.items():
                    file[f"ranges/quantiles/{key}"] = quantiles

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a file of `save`.

        Raises
        ------
        InputError
            The file is missing, or not as `STATISTICS` declares.
        """
        with open_hdf5(path, STATISTICS) as file:
            attributes = file.attributes
            geometry = {
                kind: {
                    code_of(kind, name.rpartition("/")[2]): _stored_sample(file, name)
                    for name in file.specs
                    if name.startswith(f"geometry/{kind}/")
                }
                for kind in KINDS
            }
            descriptors = {
                key: _stored_sample(file, f"descriptors/{key}")
                for key in DESCRIPTORS
                if f"descriptors/{key}" in file
            }
            moments = None
            if "fcd/mean" in file:
                parts = zip(
                    file.read("fcd/mean"),
                    file.read("fcd/covariance"),
                    attributes["fcd/count"],
                    strict=True,
                )
                moments = Moments.of_gaussians(
                    [
                        Gaussian(mean, _symmetric(part, len(mean)), int(count))
                        for mean, part, count in parts
                    ]
                )
            distributions = Distributions(
                geometry, file.read("sizes"), file.read("elements"), moments, descriptors
            )
            ranges = None
            if "ranges/counts" in file:
                prefix = "ranges/quantiles/"
                quantiles = {
                    name.removeprefix(prefix): file.read(name)
                    for name in file.specs
                    if name.startswith(prefix)
                }
                ranges = StoredRanges(file.read("ranges/counts"), quantiles)
        rates = {
            key: None if value is None else Rate(*value)
            for key, value in attributes["rates"].items()
        }
        evaluation = MoleculeEvaluation(
            str(attributes["name"]),
            int(attributes["molecules"]),
            rates,
            {key: Estimate(*value) for key, value in attributes["measures"].items()},
            distributions,
            bonds=str(attributes["bonds"]),
            valence=str(attributes.get("valence", "edm")),
        )
        distances = Comparison(
            {key: Estimate(*value) for key, value in attributes["distances"].items()},
            attributes["by_type"],
        )
        types = attributes["types"]
        return cls(evaluation.name, evaluation, distributions, distances, types, ranges)


def _store_sample(
    file: h5py.File,
    name: str,
    sample: ValueSample,
    digits: int | None = None,
    most: int | None = None,
) -> None:
    """Write values, sorted by jackknife group: rounded, and `most` at random, where given."""
    value, group = sample.value[:most], sample.group[:most]  # their order is random
    if digits is not None:
        value = value.astype(np.float64).round(digits).astype(np.float32)
    order = np.lexsort((value, group))
    data = file.create_dataset(name, data=value[order], **_COMPRESSED)
    data.attrs["count"] = sample.count
    data.attrs["groups"] = np.bincount(group, minlength=JACKKNIFE_GROUPS)


def _stored_sample(file: HDF5File, name: str) -> ValueSample:
    """Values that are sorted by jackknife group."""
    value, stored = file.read(name), file.attributes_of(name)
    groups = stored["groups"]
    if groups.sum() != len(value) or len(groups) > JACKKNIFE_GROUPS:
        raise file.error(f"attribute 'groups' of '{name}': expected {len(value)} in all")
    group = np.repeat(np.arange(len(groups), dtype=np.uint8), groups)
    return ValueSample.of(value, group, stored["count"])


def _to_list(estimate: Estimate) -> list[object]:
    return [estimate.value, estimate.interval, estimate.count, estimate.note]


def _symmetric(upper: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    """The symmetric matrix (size, size) with the given upper triangle."""
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = upper
    symmetric: NDArray[np.float64] = matrix + np.triu(matrix, 1).T
    return symmetric


def bundled_reference() -> Reference:
    """The bundled statistics of QM9's test split (EDM's split, 13,083 molecules)."""
    return Reference.load(asset(_BUNDLED_STATISTICS))


def evaluate_reference(
    path: Path,
    name: str,
    options: EvaluationOptions,
    types: GeometryTypes | None,
    training_hashes: NDArray[np.uint64] | None,
    workers: WorkerPool,
    counter: ProgressCounter | None = None,
) -> Reference:
    """Evaluate a file as a reference: its test split if it has one, else all molecules.

    Parameters
    ----------
    path, name
        The file, and its name in the report.
    options
        How the molecules are evaluated.
    types
        Geometry types; None takes the eight most frequent types of each kind.
    training_hashes
        Sorted hashes of the training molecules' SMILES, or None.
    workers
        Processes for the calls of RDKit.
    counter
        Gets the number of finished molecules.

    Notes
    -----
    The reference's own distances are those of up to 10,000 molecules of its training split, or,
    without splits, of one half of the molecules from the other.
    """
    source = FileSource(path, "test", options.skip_bad)
    if types is None:
        types = frequent_types(source, options, workers)
    options = replace(with_types(options, types), kept=MAX_KEPT)
    evaluation = evaluate_source(name, source, options, training_hashes, workers, counter)
    evaluation.skipped += source.skipped
    evaluation.notes += source.notes
    assert evaluation.distributions is not None
    compared = types if "geometry" in options.metrics else None
    composition = "composition" in options.metrics
    real = [evaluation]
    if has_train_and_test(source):
        training = FileSource(path, "train", options.skip_bad, MAX_COMPARED)
        fast = replace(options, metrics=options.metrics - {"strain", "xtb", "posebusters"})
        other = evaluate_source(f"{name}, train", training, fast, None, workers, counter)
        assert other.distributions is not None
        real.append(other)
        distances = compare(other.distributions, evaluation.distributions, compared, composition)
    else:
        half = np.arange(JACKKNIFE_GROUPS) < JACKKNIFE_GROUPS // 2
        both = evaluation.distributions
        distances = compare(both.select(half), both.select(~half), compared, composition)
        evaluation.notes.append(
            "it has no splits: its distances are those of one half of it from the other"
        )
    ranges = resampled_ranges(real, compared)
    return Reference(name, evaluation, evaluation.distributions, distances, types, ranges)


def resampled_ranges(
    real: Sequence[MoleculeEvaluation], types: GeometryTypes | None
) -> ResampledRanges:
    """Ranges from the kept molecules of the reference, first, and of other real molecules."""
    kept = [evaluation.accumulator.kept_molecules.values for evaluation in real]
    activations = [e.activations for e in real if e.activations is not None]
    molecules = MoleculeValues.join([values for values in kept if values is not None])
    return ResampledRanges(
        molecules,
        np.concatenate([*activations, np.zeros((0, FEATURES), np.float32)]),
        0 if kept[0] is None else len(kept[0]),
        len(activations[0]) if activations else 0,
        types,
    )


def has_train_and_test(source: FileSource) -> bool:
    """Whether a reference has a training split to compare its test split with."""
    return source.has_split("train") and source.has_split("test")


def frequent_types(
    source: FileSource, options: EvaluationOptions, workers: WorkerPool
) -> GeometryTypes:
    """The eight most frequent types of each kind among the first 10,000 molecules."""
    settings = replace(options.checks, type_codes=None, whole_smiles=False)
    first: list[MoleculeChunk] = []
    for chunk in source.chunks():
        first.append(chunk)
        if sum(map(len, first)) >= MAX_COMPARED:
            break
    accumulator = EvaluationAccumulator(0)
    for _, checks in check_chunks(first, settings, workers):
        accumulator.add_geometry(checks)
    chosen = {}
    for kind in KINDS:
        by_type = accumulator.geometry.get(kind, {})
        counts = {type_name(kind, code): sample.count for code, sample in by_type.items()}
        ranked = sorted(counts, key=lambda name: (-counts[name], name))
        chosen[kind] = tuple(ranked[:_FREQUENT])
    return GeometryTypes(f"the {_FREQUENT} most frequent of each kind", chosen)


def select_types(name: str | None, reference: Path | None) -> GeometryTypes | None:
    """The list of geometry types with a name; None stands for the most frequent types.

    Parameters
    ----------
    name
        `qm9`, `geom` or `frequent`; None takes QM9's list for QM9 and else the most frequent types.
    reference
        The reference file; None is the bundled QM9.

    Raises
    ------
    InputError
        The name is unknown.
    """
    if name is None:
        is_qm9 = reference is None or FileSource(reference).is_qm9()
        return GEOMETRY_TYPES["qm9"] if is_qm9 else None
    if name == "frequent":
        return None
    if name not in GEOMETRY_TYPES:
        raise InputError(unknown_name("list of types", name, [*GEOMETRY_TYPES, "frequent"]))
    return GEOMETRY_TYPES[name]


def bundled_training_hashes() -> NDArray[np.uint64] | None:
    """Sorted hashes of the bundled SMILES of QM9's 100,000 training molecules.

    Canonical SMILES can change between versions of RDKit. With another version than the list was
    written with, the SMILES of the bundled sample are computed again, and None is returned unless
    the list contains them.
    """
    with gzip.open(asset(_BUNDLED_SMILES), "rt", encoding="utf-8") as file:
        version, *smiles = file.read().splitlines()
    hashes = hash_smiles(smiles)
    if version != f"# RDKit {rdBase.rdkitVersion}":
        train = FileSource(bundled_sample(), split="train")
        again = collect_smiles_hashes(train, CheckSettings(), WorkerPool(0))
        if not np.isin(again, hashes).all():
            return None
    return hashes
