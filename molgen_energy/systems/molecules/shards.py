"""The shards of a file of sampled molecules; a shard is a batch that was drawn together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Strict, model_validator

from molgen_energy.chemistry.conformers import LONGEST_SMILES
from molgen_energy.data.molecules import PROPERTIES, SHAPES, Molecules
from molgen_energy.data.shards import Manifest, ShardFolder, check_unchanged, shards_folder
from molgen_energy.elements import atomic_number
from molgen_energy.errors import InputError
from molgen_energy.formats.yaml import YAMLFormat
from molgen_energy.output import check_writable, open_to_append
from molgen_energy.systems.molecules.control.base import (
    LONGEST_SMARTS,
    MOST_RECORDS,
    Record,
)
from molgen_energy.systems.molecules.state import MOST_ATOMS, MOST_LEVELS, Atoms

_DONE = ".done"
_MOST = 10**9  # molecules of a job
_MOST_IN_WINDOW = 10**6

Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
Smiles = Annotated[str, Field(min_length=1, max_length=LONGEST_SMILES)]


class SamplingJob(Manifest):
    """What to draw. Two equal jobs give the same molecules, in the same batches."""

    command: Literal["sample"] = "sample"
    """The first versions wrote none."""
    count: Annotated[int, Field(ge=1, le=_MOST)]
    """Molecules."""
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    """Of sizes and noise."""
    sampler: Text
    """Name of the sampler."""
    steps: Positive
    """Of the sampler."""
    spacing: Text | None
    """Of the sampler's levels; None if it visits all."""
    eta: Finite | None
    """Noise in the steps of the sampler ddim; None for others."""
    n_atoms: Annotated[tuple[Atoms, Atoms], Strict(False)] | None
    """Fewest and most atoms; None draws sizes from the histogram of the training molecules."""
    where: dict[Text, Annotated[tuple[Finite, Finite], Strict(False)] | None] | None
    """Lowest and highest values of properties; None draws them from the training molecules."""
    low_precision: bool
    """Whether pairs of atoms are in bfloat16."""
    batch_size: Annotated[int, Field(ge=1, le=_MOST_IN_WINDOW)] | None
    """Molecules in a batch; None makes batches of `pairs` pairs of atoms."""
    pairs: Annotated[int, Field(ge=1, le=10**9)]
    """Pairs of atoms in a batch."""
    window: Annotated[int, Field(ge=1, le=_MOST_IN_WINDOW)]
    """Molecules that are sorted by size and cut into batches together."""
    weights: Text
    """Fingerprint of the checkpoint."""
    checkpoint: Annotated[str, Field(min_length=1, max_length=4096)]
    """Absolute path of the checkpoint, or the name of pretrained weights."""
    origin: Text
    """Run and step of the weights, for the file of molecules."""
    # Options with a default may be missing in the manifest of an earlier version.
    consistent_charges: bool = False
    """Whether charges that do not fit the bonds of their atom are replaced."""
    aromatic: bool = False
    """Whether bonds are written in aromatic form."""
    trained_on: Annotated[str, Field(max_length=10_000)] = ""
    """The data that the network was trained on, in words."""
    temperature: Finite = 1.0
    """Factor of noise or score."""
    temperature_of: Text = "noise"
    """`noise` or `score`."""
    temperature_range: Annotated[tuple[Finite | None, Finite | None], Strict(False)] = (0.3, None)
    """Å; None is an open end."""
    final_noise: Finite = 1.0
    """Factor of the noise of steps below that range, and of the last noise."""
    levels: (
        Annotated[tuple[Finite, ...], Strict(False), Field(min_length=1, max_length=MOST_LEVELS)]
        | None
    ) = None
    """Noise levels of the sampler that were named; None where steps and spacing give them."""
    ancestral_positions: bool = False
    """Whether positions take ancestral steps in the sampler dpm++."""
    self_condition_passes: Positive = 1
    """Evaluations of a self-conditioned network for each prediction."""
    records: Annotated[int, Field(ge=1, le=MOST_RECORDS)] = 1
    """Input records, each with the same number of molecules."""
    guidance: Finite | Text = 1.0
    """Scale of classifier-free guidance, or the name of a function."""
    formula: dict[Text, Positive] | None = None
    """Atoms of each element."""
    elements: Annotated[list[Text], Field(min_length=1)] | None = None
    """The only elements of generated atoms."""
    keep: Annotated[list[Record], Field(min_length=1, max_length=MOST_RECORDS)] | None = None
    """Fixed atoms, in one record those of all fragments."""
    keep_smarts: Annotated[str, Field(min_length=1, max_length=LONGEST_SMARTS)] | None = None
    """The pattern that chose them."""
    resample: Positive = 1
    """How often each step is taken."""
    like: Annotated[list[Record], Field(min_length=1, max_length=MOST_RECORDS)] | None = None
    """Molecules to vary."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the time at which sampling begins with them."""
    smiles: Annotated[list[Smiles], Field(min_length=1, max_length=MOST_RECORDS)] | None = None
    """Molecules whose conformers are drawn."""
    cuda_graphs: bool = False
    """Whether a GPU records evaluations of the network."""
    units: dict[Text, Annotated[str, Field(max_length=200)]] = Field(default_factory=dict)
    """Of the properties that molecules will have."""

    @model_validator(mode="before")
    @classmethod
    def _of_values(cls, values: Any) -> Any:
        """Earlier versions wrote single values of properties, as `condition`."""
        if not isinstance(values, dict) or "condition" not in values:
            return values
        old, new = values["condition"], {k: v for k, v in values.items() if k != "condition"}
        return new | {
            "where": {k: (v, v) for k, v in old.items()} if isinstance(old, dict) else old
        }

    @model_validator(mode="after")
    def _ascending(self) -> SamplingJob:
        for wanted in (self.where or {}).values():
            if wanted is not None and wanted[0] > wanted[1]:
                raise ValueError("where: expected the lowest before the highest value")
        if self.n_atoms is not None and self.n_atoms[0] > self.n_atoms[1]:
            raise ValueError("n_atoms: expected the fewest before the most atoms")
        return self

    @model_validator(mode="after")
    def _possible(self) -> SamplingJob:
        for name in (*(self.formula or {}), *(self.elements or [])):
            atomic_number(name)
        if sum((self.formula or {}).values()) > MOST_ATOMS:
            raise ValueError(f"formula: expected at most {MOST_ATOMS:,} atoms")
        if self.strength is not None and self.like is None:
            raise ValueError("strength: there are no molecules to vary")
        return self


SAMPLING_MANIFEST = YAMLFormat(
    "manifest.yaml of sampled molecules",
    "The options of `sample`, in `FILE.shards` until it ends; `sample --resume` reads it.",
    SamplingJob,
)


class Shard(NamedTuple):
    """A batch of molecules that is drawn, and stored, together."""

    window: int
    place: int
    """Index among the shards of its window, by size."""
    numbers: NDArray[np.int64]
    """Numbers of the molecules, (M,)."""

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.window:06d}-{self.place:05d}.shard"


_NAME = re.compile(r"([0-9]{6,9})-[0-9]{5,9}\.shard")  # of the file of a shard


class MoleculeShards(ShardFolder[SamplingJob]):
    """The folder of finished shards of a file of molecules; made by `create` or `open`.

    A shard holds all columns of its molecules (`Molecules.to_arrays`) and their numbers.
    """

    def __init__(self, output: Path, lead: bool) -> None:
        super().__init__(output, "sample", SamplingJob, lead)
        self.job = self.manifest
        if lead:
            for stale in self.folder.glob(f"*{_DONE}"):
                stale.unlink()

    @classmethod
    def create(cls, output: Path, job: SamplingJob) -> MoleculeShards:
        """Begin a folder.

        Raises
        ------
        InputError
            The folder exists, or the output cannot be written.
        """
        check_writable(output)
        folder = shards_folder(output)
        if folder.exists():
            raise InputError(
                f"{folder} holds molecules of an interrupted run; continue with "
                f"`molgen-energy sample --resume {output}`, or remove that folder"
            )
        cls.begin(output, job)
        return cls(output, lead=True)

    @classmethod
    def open(cls, output: Path, lead: bool) -> MoleculeShards:
        """Open an existing folder.

        Raises
        ------
        InputError
            There is none, it is damaged, or another process locks it.
        """
        check_writable(output)
        return cls(output, lead)

    def has(self, shard: Shard) -> bool:
        """Whether a shard is finished; it may have been damaged since."""
        return self.holds(shard.name)

    def windows(self) -> set[int]:
        """The windows of which a shard is finished."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(match[1]) for match in names if match is not None}

    def read(self, shard: Shard) -> Molecules | None:
        """The molecules of a shard; None if it is missing or damaged."""
        properties = {f"{PROPERTIES}{name}": ("float64", ("molecules",)) for name in self.job.units}
        declared = {**SHAPES, **properties, "numbers": ("int64", ("molecules",))}
        arrays = self.load(shard.name, declared)
        if arrays is None or not np.array_equal(arrays.pop("numbers"), shard.numbers):
            return None
        try:
            # A file of tensors has no order, and the properties of records need one.
            molecules = Molecules.from_arrays(dict(sorted(arrays.items())), self.job.units)
            molecules.check()
        except (InputError, KeyError):  # a part of the bonds is missing
            return None
        return molecules if len(molecules) == len(shard.numbers) else None

    def write(self, shard: Shard, molecules: Molecules) -> None:
        """Store a shard that was drawn."""
        arrays: dict[str, NDArray[Any]] = molecules.to_arrays(encode_text=True)
        self.store(shard.name, arrays | {"numbers": shard.numbers})

    def mark_done(self, process: int) -> None:
        """Mark that a process has drawn its shards and does not need the folder any more."""
        open_to_append(self.folder / f"{process}{_DONE}").close()

    def is_done(self, process: int) -> bool:
        """Whether a process has finished since the folder was locked."""
        return (self.folder / f"{process}{_DONE}").exists()


def read_sampling_job(output: Path) -> SamplingJob:
    """The interrupted job of a file.

    Raises
    ------
    InputError
        There is none, or its manifest is damaged.
    """
    return MoleculeShards(output, lead=False).job


def check_same(begun: SamplingJob, now: SamplingJob, output: Path) -> None:
    """Raise `InputError` if two jobs differ in more than the checkpoint's path."""
    folder = shards_folder(output)
    if begun.weights != now.weights:
        raise InputError(
            f"{now.checkpoint} holds other weights ({now.origin}) than {folder} was begun with "
            f"({begun.origin}); name those with --checkpoint, or remove {folder} and sample again"
        )
    check_unchanged(begun, now, folder, "sample", free=("checkpoint", "origin"))
