"""Reference molecules that samples are compared with, and training molecules for novelty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from molgen_energy.metrics.distances.comparison import Comparison, Distributions, compare
from molgen_energy.metrics.distances.fcd import FEATURES, Gaussian, Moments
from molgen_energy.metrics.distances.real_ranges import (
    DESCRIPTOR_KEYS,
    FCD_KEYS,
    RealRanges,
    ResampledRanges,
    StoredRanges,
)
from molgen_energy.metrics.distances.similarity import SIMILARITY_KEYS
from molgen_energy.metrics.molecule_evaluation import (
    MoleculeEvaluation,
    ProgressCounter,
    check_chunks,
    evaluate_source,
)
from molgen_energy.metrics.molecule_values import MoleculeValues
from molgen_energy.metrics.options import BOND_DESCRIPTIONS, EvaluationOptions, with_types
from molgen_energy.metrics.packed_text import pack, unpack
from molgen_energy.metrics.sources import FileSource
from molgen_energy.metrics.statistics import Estimate, Rate
from molgen_energy.output import atomic_replace
from molgen_energy.workers import WorkerPool

MAX_COMPARED = 10_000
"""Number of training molecules that are compared with the test split, for the reference's own
distances."""
MAX_KEPT = 20_000
"""Number of molecules of the reference that sets of real molecules are drawn from."""
MAX_STORED = 5000
"""Number of values of a descriptor in a file of `Reference.save`."""

_FREQUENT = 8  # types of each kind, without a list
FREQUENT_TYPES = f"the {_FREQUENT} most frequent of each kind"
"""Name of the list of types that a reference chooses itself."""
_ROUNDED_BITS = {"bond length": 12, "angle": 5, "dihedral": 5}
_MODES = ("perceived", "given")  # choices of bonds whose statistics a file can have

_Stored = tuple[float | None, tuple[float, float] | None, int, str]  # an estimate
_StoredRates = dict[str, tuple[int, int, float] | None]


def _attributes(bonds: str) -> tuple[AttributeSpec, ...]:
    """Of the group of one choice of bonds."""
    return (
        AttributeSpec("molecules", "integer", "how many there are", low=0, of=bonds),
        AttributeSpec("valence", "text", "table of valences of `rates`", of=bonds),
        AttributeSpec(
            "types", "json", "types of bond lengths, angles and dihedrals", json=GeometryTypes,
            of=bonds,
        ),
        AttributeSpec(
            "rates", "json", "count, total and design effect of each rate", json=_StoredRates,
            of=bonds,
        ),
        AttributeSpec(
            "measures", "json", "value, interval, count and note of each mean",
            json=dict[str, _Stored], of=bonds,
        ),
        AttributeSpec(
            "distances", "json", "value, interval, count and note of each distance",
            json=dict[str, _Stored], of=bonds,
        ),
        AttributeSpec(
            "by_type", "json", "MMD and Wasserstein distance of each type",
            json=dict[str, dict[str, tuple[float, float]]], of=bonds,
        ),
        AttributeSpec(
            "count", "integer", "molecules of each half", required=False, low=1, shape=("H",),
            of=f"{bonds}/fcd",
        ),
        AttributeSpec(
            "probes", "json", "SMILES of training molecules, to try another version of RDKit",
            required=False, json=list[str], of=bonds,
        ),
    )  # fmt: skip


def _datasets(bonds: str) -> tuple[DatasetSpec, ...]:
    """Of the group of one choice of bonds."""
    return (
        DatasetSpec(
            f"{bonds}/geometry/*/*", ("*",), "float", "values of a type, sorted by group; the "
            "group above is `bond length`, `angle` or `dihedral`", unit="Å or degrees",
            required=False, dtype="f4",
            attributes=(
                AttributeSpec("count", "integer", "values before some were drawn", low=0),
                AttributeSpec("groups", "integer", "values of each group", low=0, shape=("G",)),
            ),
        ),
        DatasetSpec(
            f"{bonds}/descriptors/*", ("*",), "float", "values of a descriptor, sorted by group",
            required=False, dtype="f4",
            attributes=(
                AttributeSpec("count", "integer", "values before some were drawn", low=0),
                AttributeSpec("groups", "integer", "values of each group", low=0, shape=("G",)),
            ),
        ),
        DatasetSpec(
            f"{bonds}/sizes", ("G", "*"), "integer", "molecules of 0, 1, 2 … atoms", low=0,
            required=False, required_with=bonds,
        ),
        DatasetSpec(
            f"{bonds}/elements", ("G", ELEMENTS + 1), "integer",
            "atoms of atomic number 0 to 118", low=0, required=False, required_with=bonds,
        ),
        DatasetSpec(
            f"{bonds}/fcd/mean", ("H", FEATURES), "float", "mean of the activations of ChemNet",
            required=False, required_with=f"{bonds}/fcd",
        ),
        DatasetSpec(
            f"{bonds}/fcd/covariance", ("H", FEATURES * (FEATURES + 1) // 2), "float",
            "upper triangle of their covariance", required=False, required_with=f"{bonds}/fcd",
            dtype="f4",
        ),
        DatasetSpec(
            f"{bonds}/ranges/counts", ("C",), "integer", "numbers of molecules, ascending",
            required=False, required_with=f"{bonds}/ranges", low=1,
        ),
        DatasetSpec(
            f"{bonds}/ranges/quantiles/*", ("C", 3), "float", "quantiles 2.5, 50 and 97.5 % of a "
            "distance of so many real molecules; NaN where undefined", required=False,
            finite=False,
        ),
        DatasetSpec(
            f"{bonds}/training", ("*",), "integer", "hashes of the SMILES of training molecules, "
            "ascending", required=False, low=0, dtype="u8",
        ),
        DatasetSpec(
            f"{bonds}/smiles", ("*",), "integer", "SMILES of the valid molecules without "
            "stereochemistry, sorted, each with the number of characters that it shares with the "
            "one before, as the character 32 beyond, in place of these; compressed by bzip2",
            required=False, low=0, dtype="u1",
        ),
    )  # fmt: skip


def _relations(bonds: str) -> tuple[Relation, ...]:
    """Of the group of one choice of bonds."""
    return (
        Relation(
            "numbers that ascend", (f"{bonds}/ranges/counts",),
            lambda counts: np.diff(counts) <= 0, at_opening=True,
        ),
        Relation(
            f"as many atoms as in '{bonds}/elements'", (f"{bonds}/sizes", f"{bonds}/elements"),
            lambda sizes, elements: sizes @ np.arange(sizes.shape[1]) != elements.sum(axis=1),
            at_opening=True,
        ),
        Relation(
            "numbers that ascend", (f"{bonds}/training",),
            lambda hashes: hashes[1:] <= hashes[:-1], at_opening=True,
        ),
    )  # fmt: skip


STATISTICS = HDF5Format(
    None,
    "Statistics of a reference",
    "What samples are compared with: statistics of real molecules, with perceived bonds, given "
    "ones, or both. The package brings those of QM9's and of CCD's test split.",
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
        AttributeSpec(
            "rates", "json", "by choice of bonds and table of valences: count, total and design "
            "effect of each rate", required=False, json=dict[str, dict[str, _StoredRates]],
        ),
        *(spec for bonds in _MODES for spec in _attributes(bonds)),
    ),
    datasets=tuple(spec for bonds in _MODES for spec in _datasets(bonds)),
    relations=tuple(relation for bonds in _MODES for relation in _relations(bonds)),
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
    training: NDArray[np.uint64] | None = None
    """Sorted hashes of the SMILES of training molecules, with the same choice of bonds."""
    probes: list[str] = field(default_factory=list)
    """Some of these SMILES, which tell whether another version of RDKit writes the same ones."""
    smiles: list[str] = field(default_factory=list)
    """SMILES of the valid molecules, which `similarity` is computed from; empty where they are not
    stored."""
    rdkit: str = rdBase.rdkitVersion
    """The version that wrote them."""

    def save(
        self,
        path: Path,
        source: str,
        others: Sequence[Reference] = (),
        rates: Mapping[str, Mapping[str, Mapping[str, Rate | None]]] | None = None,
        compact: bool = False,
    ) -> None:
        """Write to an HDF5 file for `load`.

        Parameters
        ----------
        source
            Description of the molecules, stored with them.
        others
            Statistics of the same molecules with other bonds.
        rates
            Of the same molecules, by choice of bonds (`perceived`, `given`, `single`) and table of
            valences.
        compact
            Round lengths to 2⁻¹² Å, angles and dihedrals to 2⁻⁵ degrees, and covariances to half
            precision: a quarter of the size.
        """
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
            )
            if rates is not None:
                file.attrs["rates"] = json.dumps(
                    {
                        bonds: {valence: _stored_rates(each) for valence, each in tables.items()}
                        for bonds, tables in rates.items()
                    }
                )
            for reference in (self, *others):
                given = reference.evaluation.bonds == BOND_DESCRIPTIONS["given"]
                reference._write(file.create_group("given" if given else "perceived"), compact)

    def _write(self, group: h5py.Group, compact: bool) -> None:
        evaluation, distances = self.evaluation, self.distances
        group.attrs.update(
            molecules=evaluation.molecules,
            valence=evaluation.valence,
            types=json.dumps(vars(self.types)),
            rates=json.dumps(_stored_rates(evaluation.rates)),
            measures=json.dumps({k: _to_list(e) for k, e in evaluation.estimates.items()}),
            distances=json.dumps({k: _to_list(e) for k, e in distances.estimates.items()}),
            by_type=json.dumps(distances.by_type),
        )
        for kind, names in self.types.types.items():
            for name in names:
                sample = self.distributions.values(kind, name)
                value = sample.value
                if compact:  # zeros at the end of the mantissa
                    steps = np.float32(2 ** _ROUNDED_BITS[kind])
                    value = (np.round(value * steps) / steps).astype(np.float32)
                _store_sample(group, f"geometry/{kind}/{name}", sample, value)
        for key, sample in self.distributions.descriptors.items():
            rounded = sample.value[:MAX_STORED].astype(np.float64).round(DESCRIPTORS[key].digits)
            _store_sample(group, f"descriptors/{key}", sample, rounded)
        for key in ("sizes", "elements"):
            counts = getattr(self.distributions, key)
            _compress(group, key, counts)
        moments = self.distributions.moments
        if moments is not None:
            # Not those of every jackknife group: half a megabyte each.
            parts = moments.halves() or [moments.gaussian()]
            upper = [part.covariance[np.triu_indices(len(part.mean))] for part in parts]
            covariance = np.array(upper, np.float16 if compact else np.float32)
            group.create_dataset("fcd/mean", data=np.array([part.mean for part in parts]))
            _compress(group, "fcd/covariance", covariance)
            group["fcd"].attrs["count"] = [part.count for part in parts]
        if isinstance(self.ranges, StoredRanges):
            group["ranges/counts"] = self.ranges.counts
            for key, quantiles in self.ranges.ranges.items():
                group[f"ranges/quantiles/{key}"] = quantiles
        if evaluation.distributions is not None:
            found = evaluation.distributions.substructures
            if found is not None and found.smiles:
                group.create_dataset("smiles", data=pack(found.smiles))
        if self.training is not None:
            _compress(group, "training", self.training)
            group.attrs["probes"] = json.dumps(self.probes)

    @classmethod
    def load(cls, path: Path, bonds: str = "perceived", valence: str | None = None) -> Reference:
        """Read a file of `save`.

        Parameters
        ----------
        bonds
            `perceived`, `given` or `single`. A file without given bonds gives perceived ones, and
            the other way round. With `single` there are rates, geometry and composition only.
        valence
            The table of valences that stability is by; None, and a table that the file does not
            have, is that of its `rates`.

        Raises
        ------
        InputError
            The file is missing, or not as `STATISTICS` declares.
        """
        with open_hdf5(path, STATISTICS) as file:
            mode = "given" if bonds == "given" else "perceived"
            if f"{mode}/sizes" not in file:
                mode = next((other for other in _MODES if f"{other}/sizes" in file), mode)
            if f"{mode}/sizes" not in file:
                raise file.error(f"lacks the groups {' and '.join(_MODES)}", colon=False)
            found = cls._read(file, mode)
            by_valence = file.attributes.get("rates", {}).get(bonds, {})
            if valence is not None and valence in by_valence:
                if bonds == "single":
                    found = found._without_energies()
                evaluation = found.evaluation
                evaluation.rates |= _loaded_rates(by_valence[valence])
                evaluation.bonds, evaluation.valence = BOND_DESCRIPTIONS[bonds], valence
            return found

    @classmethod
    def _read(cls, file: HDF5File, mode: str) -> Reference:
        """The statistics of one choice of bonds."""
        attributes = {
            name.removeprefix(f"{mode}/"): value for name, value in file.attributes.items()
        }
        geometry = {
            kind: {
                code_of(kind, name.rpartition("/")[2]): _stored_sample(file, name)
                for name in file.specs
                if name.startswith(f"{mode}/geometry/{kind}/")
            }
            for kind in KINDS
        }
        descriptors = {
            key: _stored_sample(file, f"{mode}/descriptors/{key}")
            for key in DESCRIPTORS
            if f"{mode}/descriptors/{key}" in file
        }
        moments = None
        if f"{mode}/fcd/mean" in file:
            parts = zip(
                file.read(f"{mode}/fcd/mean"),
                file.read(f"{mode}/fcd/covariance"),
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
            geometry,
            file.read(f"{mode}/sizes"),
            file.read(f"{mode}/elements"),
            moments,
            descriptors,
        )
        ranges = None
        if f"{mode}/ranges/counts" in file:
            prefix = f"{mode}/ranges/quantiles/"
            quantiles = {
                name.removeprefix(prefix): file.read(name)
                for name in file.specs
                if name.startswith(prefix)
            }
            ranges = StoredRanges(file.read(f"{mode}/ranges/counts"), quantiles)
        smiles: list[str] = []
        if f"{mode}/smiles" in file:
            try:
                smiles = unpack(file.read(f"{mode}/smiles"))
            except ValueError as error:
                raise file.error(f"dataset '{mode}/smiles': {error}") from None
        training = file.read(f"{mode}/training") if f"{mode}/training" in file else None
        evaluation = MoleculeEvaluation(
            str(file.attributes["name"]),
            int(attributes["molecules"]),
            _loaded_rates(attributes["rates"]),
            {key: Estimate(*value) for key, value in attributes["measures"].items()},
            distributions,
            bonds=BOND_DESCRIPTIONS[mode],
            valence=str(attributes["valence"]),
        )
        distances = Comparison(
            {key: Estimate(*value) for key, value in attributes["distances"].items()},
            attributes["by_type"],
        )
        return cls(
            evaluation.name, evaluation, distributions, distances, attributes["types"], ranges,
            training, attributes.get("probes", []), smiles,
            str(file.attributes.get("rdkit", "")),
        )  # fmt: skip

    def _without_energies(self) -> Reference:
        """Without what depends on bond orders that are not those of geometry.

        These are energies, descriptors, FCD and similarity.
        """
        distributions = replace(self.distributions, moments=None, descriptors={})
        left_out = {*FCD_KEYS, *DESCRIPTOR_KEYS, *SIMILARITY_KEYS}
        estimates = self.distances.estimates.items()
        distances = replace(
            self.distances, estimates={k: e for k, e in estimates if k not in left_out}
        )
        evaluation = replace(self.evaluation, estimates={}, distributions=distributions)
        return replace(
            self, evaluation=evaluation, distributions=distributions, distances=distances,
            smiles=[],
        )  # fmt: skip


def _stored_rates(rates: Mapping[str, Rate | None]) -> dict[str, list[float] | None]:
    return {k: None if r is None else [r.count, r.total, r.effect] for k, r in rates.items()}


def _loaded_rates(stored: _StoredRates) -> dict[str, Rate | None]:
    return {key: None if value is None else Rate(*value) for key, value in stored.items()}


def _compress(group: h5py.Group, name: str, values: NDArray[Any]) -> h5py.Dataset:
    """Write an array in one chunk, since the index of several takes kilobytes."""
    if not values.size:
        return group.create_dataset(name, data=values)
    return group.create_dataset(
        name, data=values, chunks=values.shape, compression="gzip", compression_opts=9,
        shuffle=True,
    )  # fmt: skip


def _store_sample(
    group: h5py.Group, name: str, sample: ValueSample, value: NDArray[np.floating[Any]]
) -> None:
    """Write numbers (V,), the first or all of a sample, sorted by jackknife group."""
    of_value = sample.group[: len(value)]
    order = np.lexsort((value, of_value))
    data = _compress(group, name, value[order].astype(np.float32))
    data.attrs["count"] = sample.count
    data.attrs["groups"] = np.bincount(of_value, minlength=JACKKNIFE_GROUPS)


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
    settings = replace(options.checks, type_codes=None, whole_smiles=False, substructures=False)
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
    return GeometryTypes(FREQUENT_TYPES, chosen)


def select_types(name: str | None, reference: Path | None) -> GeometryTypes | None:
    """The list of geometry types with a name; None stands for the most frequent types.

    Parameters
    ----------
    name
        `qm9`, `geom` or `frequent`; None takes QM9's list for QM9 and else the most frequent types.
    reference
        The reference file; None if it is bundled, whose types are its own without a name.

    Raises
    ------
    InputError
        The name is unknown.
    """
    if name is None:
        is_qm9 = reference is not None and FileSource(reference).is_qm9()
        return GEOMETRY_TYPES["qm9"] if is_qm9 else None
    if name == "frequent":
        return None
    if name not in GEOMETRY_TYPES:
        raise InputError(unknown_name("list of types", name, [*GEOMETRY_TYPES, "frequent"]))
    return GEOMETRY_TYPES[name]
