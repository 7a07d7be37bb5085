"""Training a denoiser of molecules: data, model and objective for the training loop."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from molgen_energy.chemistry.charges import AtomKind, count_atoms, without_radicals
from molgen_energy.config import resolved
from molgen_energy.data.batches import (
    BatchIndex,
    BatchSize,
    DeviceMolecules,
    EpochStarts,
    MoleculeBatch,
    PairBudget,
    ResidentData,
    StreamedData,
    TrainingData,
    on_device,
)
from molgen_energy.data.hdf5 import DatasetSummary, MoleculeFile
from molgen_energy.data.molecules import AROMATIC, Molecules, batch_by_size
from molgen_energy.diffusion.distillation import DISTANCES, Distillation, student_levels
from molgen_energy.diffusion.geometry import rotated, rotations_from_quaternions
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.objective import Objective, TimestepDistribution, Weights
from molgen_energy.diffusion.process import is_self_conditioned
from molgen_energy.diffusion.state import DOMAINS, Layout, State
from molgen_energy.distributed import (
    broadcast,
    local_world_size,
)
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.losses import AdaptiveSprings, Neighbours, PositionLoss
from molgen_energy.models import Denoiser
from molgen_energy.models.base import PUBLISHED_ATOMS, Published
from molgen_energy.models.precision import is_bfloat16_faster
from molgen_energy.paths import expand_home, portable_path
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.molecules.condition import (
    PropertyCondition,
    PropertyConditionConfig,
    check_conditions,
    renormalised,
)
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.fields import (
    MoleculeStatistics,
    build_layout,
    field_columns,
)
from molgen_energy.systems.molecules.loss_inputs import (
    LossInputs,
    feature_inputs,
    table_bytes,
    with_required_bonds,
)
from molgen_energy.systems.molecules.state import MoleculeState
from molgen_energy.systems.molecules.teacher import load_teacher
from molgen_energy.systems.networks import build_network
from molgen_energy.training.channels import FittedWeights, fit_weights
from molgen_energy.training.checkpoint import Checkpoint, load_weights
from molgen_energy.training.devices import available_memory, lower_precision
from molgen_energy.training.initial import provenance
from molgen_energy.training.plan import planned_values, validation_draws
from molgen_energy.training.task import Auxiliary, mean_loss

_SAMPLE = 100_000  # streamed molecules that means are taken over
_SMALL = 256_000_000  # bytes of training molecules that always stay in memory


def build_model(config: MoleculeConfig, layout: Layout, condition_channels: int = 0) -> Denoiser:
    """The configured network, its weights drawn with the run's seed.

    Raises
    ------
    InputError
        The network accepts no condition, and there is one.
    """
    if condition_channels and not config.model.conditional:
        raise InputError(
            f"model {config.model.name} accepts no condition; choose another model, or set "
            "condition.name=none"
        )
    low_precision = config.training.low_precision is True
    model = build_network(
        config.model, config.training.seed, layout, condition_channels, low_precision
    )
    assert isinstance(model, Denoiser)
    return model


class _Split(NamedTuple):
    """Molecules on the device, and their further inputs of the loss."""

    data: DeviceMolecules
    inputs: LossInputs


class _Inputs(NamedTuple):
    """What an objective takes besides the model."""

    clean: State
    random: RandomNumbers
    condition: Tensor | None
    loss_inputs: dict[str, Any]


@dataclass(frozen=True)
class PreparedMolecules:
    """Molecules of a batch, and all else that their loss depends on besides the network.

    molecules
        B of them.
    inputs
        Arguments of the loss, see `LossInputs.prepared`.
    seed
        Of random numbers, or its two words on the device, see `RandomNumbers`.
    samples
        Their places in the whole batch, (B,).
    population
        Molecules in the whole batch.
    """

    molecules: MoleculeBatch
    inputs: dict[str, Any]
    seed: int | Tensor
    samples: Tensor
    population: int

    @property
    def random(self) -> RandomNumbers:
        """Their random numbers."""
        return RandomNumbers(self.seed, self.samples, self.population)

    def tensors(self) -> dict[str, Tensor]:
        """All that differs between batches of one shape, on the device, by name."""
        batch = self.molecules
        found = {"mask": batch.mask, "samples": self.samples, "seed": self.random.key}
        found |= {f"data/{name}": values for name, values in batch.data.items()}
        found |= {f"properties/{name}": values for name, values in batch.properties.items()}
        if (bonds := self.inputs.get("bonds")) is not None:
            found["bonds"] = bonds
        if (neighbours := self.inputs.get("neighbours")) is not None:
            found |= {"index": neighbours.index, "weight": neighbours.weight}
        return found

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PreparedMolecules:
        """A batch of this shape with other `tensors`."""
        batch = self.molecules
        data = {name: tensors[f"data/{name}"] for name in batch.data}
        properties = {name: tensors[f"properties/{name}"] for name in batch.properties}
        inputs: dict[str, Any] = {}
        if "bonds" in self.inputs:
            inputs["bonds"] = tensors["bonds"]
        if "neighbours" in self.inputs:
            inputs["neighbours"] = Neighbours(tensors["index"], tensors["weight"])
        return replace(
            self,
            molecules=MoleculeBatch(tensors["mask"], data, properties),
            inputs=inputs,
            seed=tensors["seed"],
            samples=tensors["samples"],
        )


class MoleculeTask:
    """Training a denoiser of molecules.

    Parameters
    ----------
    config
        Configuration of the run; `self.config` is the same without `auto`.
    device
        Device of data and model.
    progress
        Called with the number of prepared molecules, if preparation takes long.

    Raises
    ------
    InputError
        The data is missing or broken, has no training molecule, lacks columns that the model, the
        loss or the condition need, or holds an element outside `data.elements`; or the model cannot
        have the passes of self-conditioning.
    """

    def __init__(
        self,
        config: MoleculeConfig,
        device: torch.device,
        progress: ProgressCallback = no_progress,
    ) -> None:
        self.device = device
        path = expand_home(config.data.path) if config.data.path else bundled_sample()
        teacher = None if config.distillation.evaluations is None else load_teacher(config)
        with ExitStack() as stack:
            file = stack.enter_context(MoleculeFile(path, _how_to_make(config, path)))
            source, summary = file.source, file.summarize()
            if not summary.training_molecules:
                raise InputError(
                    f"{path} holds no training molecule; make it with a larger train share"
                )
            columns = _required_columns(config, file)
            statistics = _statistics(file, _elements(config, summary, file), columns)
            self.layout = build_layout(config.model.fields, config.scales, statistics)
            self._condition = _fit_condition(config, file)
            in_memory = broadcast(_in_memory(config, summary, columns, device))
            planned = planned_values(config.training, summary.training_molecules)
            config = config.replaced({"data.in_memory": in_memory, **planned})
            self._train, self._valid = self._open(config, file, columns, progress)
            # Processes on different machines must agree.
            mean_atoms = summary.training_atoms / summary.training_molecules
            resolved = self._resolve_auto(config, mean_atoms)
            self.config: MoleculeConfig = broadcast(resolved)
            if self.config.training.low_precision is True:
                lower_precision(device)
            if not config.data.in_memory:
                stack.pop_all()  # stays open until `close`
        self._objective = _build_objective(self.config, self.layout)
        learnt = [name for name in self.layout.fields if name not in self._objective.given]
        names = ["positions", *self._objective.terms, *learnt]
        self.loss_terms: tuple[str, ...] = tuple(f"{name}_loss" for name in dict.fromkeys(names))
        self.auxiliary: Auxiliary | None = None
        channels = 0 if self._condition is None else self._condition.channels
        self.model: nn.Module = build_model(self.config, self.layout, channels).to(device)
        passes = self.config.objective.self_condition_passes
        if passes > 1 and not is_self_conditioned(self.model):
            raise InputError(
                f"objective.self_condition_passes={passes} is for self-conditioned networks, which "
                f"{self.config.model.name} is not; leave it out"
            )
        self.state: dict[str, Any] = {
            "elements": [symbol(z) for z in statistics.elements],
            "statistics": statistics.to_dict(),
            "size_histogram": summary.size_histogram,
            "data": {
                "source": source,
                "training_samples": summary.training_molecules,
                "fingerprint": summary.fingerprint,
            },
        }
        if self._condition is not None:
            self.state["condition"] = self._condition.to_dict()
        self._distillation: Distillation | None = None
        if teacher is not None:
            self._distillation = self._learn_from(teacher)
            self.loss_terms = ("student_loss", "auxiliary_loss", *DISTANCES)

    def _learn_from(self, teacher: Checkpoint) -> Distillation:
        """Begin with the weights of a teacher, as student and as auxiliary network."""
        section, process = self.config.distillation, self._objective.process
        assert section.evaluations is not None
        fitted = self.fit_weights(teacher)
        if fitted.drawn:
            raise InputError(
                f"--teacher {section.teacher} does not know {', '.join(fitted.new)}; name another "
                "teacher, or leave out --set data.elements"
            )
        load_weights(self.model, fitted.tensors, teacher.path)
        scale = self.layout.fields["positions"].scale
        levels = student_levels(
            process, scale, section.evaluations, section.highest, section.lowest, section.power
        )
        self.auxiliary = Auxiliary(copy.deepcopy(self.model), section.auxiliary_lr)
        self.state["teacher"] = provenance(teacher)
        self.state["sampling"] = {"sampler": "ancestral", "levels": list(levels)}
        return Distillation(
            self._objective,
            copy.deepcopy(self.model),
            levels,
            section.regulariser,
            section.student_share,
        )

    def _open(
        self,
        config: MoleculeConfig,
        file: MoleculeFile,
        columns: frozenset[str],
        progress: ProgressCallback,
    ) -> tuple[TrainingData[_Split], _Split | None]:
        """Training data and validation molecules, with the further inputs of the loss."""
        training = config.training
        dense_bonds = "bonds" in field_columns(self.layout)

        def split(
            molecules: Molecules,
            numbers: NDArray[np.int64],
            ranks: NDArray[np.int64] | None,
            **options: Any,
        ) -> _Split:
            molecules = with_required_bonds(molecules, config.loss_requires)
            inputs = LossInputs(
                config.loss, config.loss_requires, training.seed, molecules, self.device,
                str(file.path), numbers, ranks, **options,
            )  # fmt: skip
            return _Split(DeviceMolecules(molecules, self.device, dense_bonds), inputs)

        def window(
            molecules: Molecules,
            numbers: NDArray[np.int64],
            ranks: NDArray[np.int64],
            check_cancelled: Callable[[], None],
        ) -> _Split:
            return split(molecules, numbers, ranks, check_cancelled=check_cancelled)

        train: TrainingData[_Split]
        if config.data.in_memory:
            numbers = file.split_indices("train")
            whole = split(file.read(numbers, columns), numbers, None, progress=progress)
            train = ResidentData(whole, whole.data.sizes, _batch_size(config), training.seed)
        else:
            train = StreamedData(
                file,
                window,
                molecules=config.data.window,
                batch_size=_batch_size(config),
                seed=training.seed,
                columns=columns,
            )
        # Files are often sorted by size, so the validation molecules are chosen at random.
        in_valid = file.split_indices("valid")
        order = np.random.default_rng(training.seed).permutation(len(in_valid))
        in_valid = in_valid[order[: training.validation_molecules]]
        # A student has no validation loss: its own is low too where it has not learnt anything.
        if not len(in_valid) or config.distillation.evaluations is not None:
            return train, None
        ascending = np.argsort(in_valid)
        molecules = file.read(in_valid[ascending], columns).select(np.argsort(ascending))
        return train, split(molecules, in_valid, None, progress=progress)

    def _resolve_auto(self, config: MoleculeConfig, mean_atoms: float) -> MoleculeConfig:
        """Replace every `auto` by its value; training molecules have `mean_atoms` on average.

        For streamed data, means are taken over at most about 100,000 training molecules, in runs of
        the file that the seed chooses.
        """
        training, objective = config.training, config.objective
        changes: dict[str, Any] = {
            "data.elements": [symbol(z) for z in self.layout.fields["elements"].elements]  # type: ignore[attr-defined]
        }
        if config.data.path is not None:
            changes["data.path"] = portable_path(expand_home(config.data.path))
        resolved = config.loss.resolve(self._samples, training.seed)
        config = config.model_copy(update={"loss": resolved.config})
        if objective.position_weight == "auto":
            weight = _published(config, "objective.position_weight").position_weight
            if config.loss.extensive and objective.reduction == "mean":
                weight *= PUBLISHED_ATOMS / mean_atoms
            changes["objective.position_weight"] = weight / resolved.stiffness
        if objective.weighting == "auto":
            clean = getattr(config.process, "prediction", None) == "clean"
            changes["objective.weighting"] = "clean" if clean else "noise"
        if training.lr == "auto":
            changes["training.lr"] = _published(config, "training.lr").lr
        if training.validation_draws == "auto":
            count = 0 if self._valid is None else len(self._valid.data)
            changes["training.validation_draws"] = validation_draws(count)
        if training.low_precision == "auto":
            changes["training.low_precision"] = is_bfloat16_faster(self.device, training=True)
        return config.replaced(changes)

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Training molecules in chunks, as arguments of `PairwiseEnergy.total_stiffness`."""
        split = self._train.sample(_SAMPLE)
        for which in batch_by_size(split.data.sizes, pairs=1_000_000):
            batch = split.data.batch(which)
            inputs = split.inputs.of(which, batch, self.encode(batch))
            if "features" in inputs:
                inputs["features"] = inputs["features"].double()
            yield {"target": batch.data["positions"].double(), "mask": batch.mask, **inputs}

    def fit_weights(self, checkpoint: Checkpoint) -> FittedWeights:
        """The EMA weights of a checkpoint, with the channels of elements by their symbols.

        Raises
        ------
        InputError
            Conditions do not fit, or the network does not name its channels and these differ.
        """
        state = checkpoint.state_as(MoleculeState)
        statistics = MoleculeStatistics.of_state(state)
        layout = build_layout(self.config.model.fields, self.config.scales, statistics)
        theirs = None
        if state.condition is not None:
            theirs = PropertyCondition.from_dict(state.condition.model_dump())
        check_conditions(theirs, self._condition, checkpoint.path)
        network = type(self.model)
        assert issubclass(network, Denoiser)
        axes, own_axes = (
            network.channel_axes(fields, () if condition is None else condition.channel_names)
            for fields, condition in ((layout, theirs), (self.layout, self._condition))
        )
        tensors = checkpoint.tensors("ema", self.model)
        if not own_axes and not _same_channels(layout, theirs, self.layout, self._condition):
            raise InputError(
                f"{checkpoint.path} was trained on other elements, kinds of bonds or properties, "
                f"and model {self.config.model.name} does not name its channels "
                "(`Denoiser.channel_axes`); train on data with the same ones"
            )
        if theirs is not None and self._condition is not None:
            for name, axis in axes.items():
                if name in tensors:
                    tensors[name] = renormalised(tensors[name], axis, theirs, self._condition)
        own = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        return fit_weights(tensors, own, axes, own_axes, self.config.training.seed)

    def encode(self, batch: MoleculeBatch) -> State:
        """The state of a batch's molecules."""
        values = {name: field.encode(batch.data) for name, field in self.layout.fields.items()}
        return State.from_fields(self.layout, batch.mask, values)

    # -- the interface `Task` -------------------------------------------------------------------

    @property
    def starts(self) -> EpochStarts:
        """The first step of each epoch, in which every training molecule occurs once."""
        return self._train.starts

    @property
    def seconds_waited(self) -> float:
        """Seconds that steps have waited for molecules to be read."""
        return self._train.seconds_waited

    def epoch(self, epoch: int) -> Sequence[BatchIndex]:
        """The batches of an epoch; depends on the seed and `epoch` alone."""
        return self._train.epoch(epoch)

    def loss(
        self, model: nn.Module, batch: BatchIndex, seed: int, rank: int = 0, world: int = 1
    ) -> dict[str, Tensor]:
        """The objective of process `rank`'s shard of a batch, and its terms, (B,) each.

        Random numbers depend on the seed and on the place of a molecule in the whole batch, so K
        processes together compute the losses that one would.

        Raises
        ------
        InputError
            The file of streamed molecules is damaged.
        """
        return self.prepared_loss(model, self.prepare(batch, seed, rank, world))

    def prepare(
        self, batch: BatchIndex, seed: int, rank: int = 0, world: int = 1
    ) -> PreparedMolecules:
        """The molecules of process `rank`'s shard of a batch; see `loss`."""
        split = self._train.window(batch.window)
        places = torch.arange(len(batch), device=self.device)[rank::world]
        return _prepared(split, batch.shard(rank, world).which, seed, places, len(batch))

    def prepared_loss(self, model: nn.Module, batch: PreparedMolecules) -> dict[str, Tensor]:
        """The objective of prepared molecules, and its terms, (B,) each."""
        inputs = self._inputs(model, batch, self.config.training.augment_rotations)
        if self._distillation is not None:
            return self._student_losses(self._distillation, model, inputs)
        terms = self._objective(model, *inputs)
        return {"loss": terms.total} | {
            f"{name}_loss": values for name, values in terms.parts.items()
        }

    def molecules(self, batch: BatchIndex) -> MoleculeBatch:
        """The molecules of a batch, padded."""
        return self._train.window(batch.window).data.batch(batch.which)

    @property
    def adaptive(self) -> AdaptiveSprings | None:
        """The springs of the loss that are learnt, if any."""
        return self._objective.adaptive

    def close(self) -> None:
        """Stop reading streamed molecules; no batch is available after that."""
        self._train.close()

    @property
    def validation_samples(self) -> int:
        """Number of validation molecules times that of their draws; 0 without any."""
        draws = resolved(self.config.training.validation_draws)
        return 0 if self._valid is None else draws * len(self._valid.data)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float | None:
        """Mean objective over validation molecules and their draws, with fixed noise; None without.

        The processes of a job share the work.
        """
        if self._valid is None:
            return None
        training, count = self.config.training, len(self._valid.data)
        draws = resolved(training.validation_draws)
        valid, population = self._valid, count * draws
        pairs = training.pairs_per_batch
        if pairs is None:
            assert training.batch_size is not None
            pairs = resolved(training.batch_size) * 400

        def losses(numbers: NDArray[np.int64]) -> Tensor:
            samples = on_device(numbers, self.device)
            batch = _prepared(valid, numbers % count, training.seed, samples, population)
            return self._objective(model, *self._inputs(model, batch, False)).total

        chunks = list(batch_by_size(np.tile(valid.data.sizes, draws), pairs))
        return mean_loss(chunks, losses, population, self.device)

    def _student_losses(
        self, distillation: Distillation, model: nn.Module, inputs: _Inputs
    ) -> dict[str, Tensor]:
        """The losses of student and auxiliary network, and distances of their predictions."""
        assert self.auxiliary is not None
        terms = distillation(model, self.auxiliary.called, *inputs)
        distances = {name: getattr(terms, name) for name in DISTANCES}
        return {
            "loss": terms.student + terms.auxiliary,
            "student_loss": terms.student,
            "auxiliary_loss": terms.auxiliary,
            **distances,
        }

    def _inputs(self, model: nn.Module, prepared: PreparedMolecules, augment: bool) -> _Inputs:
        batch, random = prepared.molecules, prepared.random
        if augment:
            rotations = rotations_from_quaternions(random.quaternions())
            positions = rotated(batch.data["positions"], rotations)
            batch = replace(batch, data={**batch.data, "positions": positions})
        clean = self.encode(batch)
        condition = None
        if self._condition is not None:
            values = [batch.properties[name] for name in self._condition.names]
            condition = self._condition.encode(
                torch.stack(values, dim=1), random if model.training else None
            )
        inputs = prepared.inputs | feature_inputs(self.config.loss_requires, clean)
        return _Inputs(clean, random, condition, inputs)


def _prepared(
    split: _Split, which: NDArray[np.int64], seed: int, samples: Tensor, population: int
) -> PreparedMolecules:
    molecules = split.data.batch(which)
    inputs = split.inputs.prepared(which, molecules)
    return PreparedMolecules(molecules, inputs, seed, samples, population)


def _batch_size(config: MoleculeConfig) -> BatchSize:
    training = config.training
    if training.batch_size is not None:
        return resolved(training.batch_size)
    assert training.pairs_per_batch is not None
    return PairBudget(training.pairs_per_batch)


def _build_objective(config: MoleculeConfig, layout: Layout) -> Objective:
    """The objective of a configuration without `auto`."""
    section = config.objective
    assert not isinstance(section.position_weight, str) and section.weighting != "auto"
    unknown = section.field_weights.keys() - layout.fields.keys() | (
        {"positions"} & section.field_weights.keys()
    )
    if unknown:
        others = ", ".join(name for name in layout.fields if name != "positions")
        raise InputError(
            f"objective.field_weights: {min(unknown)} is none of the fields {others}; the weight "
            "of positions is objective.position_weight"
        )
    givable = [name for name in layout.fields if name != "positions"]
    for name in section.given_fields:
        if name not in givable:
            raise InputError(f"objective.given_fields: {unknown_name('field', name, givable)}")
    if section.given_fields and config.distillation.evaluations is not None:
        raise InputError(
            "distillation.evaluations: a student generates all fields, and this teacher was "
            "trained with objective.given_fields; name another --teacher"
        )
    # A mean is taken over positions and other fields together, as in EDM's objective.
    channels = layout.channels["atom"] if section.reduction == "mean" else None
    loss = config.loss.build(seed=config.training.seed, channels=channels)
    assert isinstance(loss, PositionLoss)
    terms: dict[str, PositionLoss] = {}
    weights: dict[str, float] = {}
    for term, weight in section.weighted_terms():
        built = term.build(channels=channels)
        assert isinstance(built, PositionLoss)
        terms[term.name], weights[term.name] = built, weight
    return Objective(
        config.process.build(),
        loss,
        Weights(section.position_weight, section.field_weights, weights),
        TimestepDistribution(section.time_power, section.stratified_timesteps),
        section.weighting,
        section.self_condition_probability,
        section.self_condition_passes,
        section.reduction,
        terms,
        section.given_fields,
    )


def _published(config: MoleculeConfig, key: str) -> Published:
    """The published learning rate and weight of a model with a loss."""
    loss = config.loss
    published = type(config.model).published
    if (loss.published_as, loss.variant) in published:
        return published[loss.published_as, loss.variant]
    variant = f" with {loss.variant} springs" if loss.variant else ""
    raise InputError(
        f"{key}: there is no published value for model {config.model.name} and loss "
        f"{loss.name}{variant}; set a number with --set {key}=…"
    )


def _same_channels(
    theirs: Layout,
    their_condition: PropertyCondition | None,
    own: Layout,
    condition: PropertyCondition | None,
) -> bool:
    """Whether two networks have the same channels in the same places."""
    fields = all(theirs.channel_names(domain) == own.channel_names(domain) for domain in DOMAINS)
    properties = [None if c is None else c.names for c in (their_condition, condition)]
    return fields and properties[0] == properties[1]


def _how_to_make(config: MoleculeConfig, path: Path) -> str:
    """The commands that make a data file which the model can be trained on."""
    bonds = "bonds" in config.model.fields
    dataset = "qm9 --bonds" if bonds else "qm9"
    if path.stem == "ccd":  # of the configurations for drug-like molecules
        dataset = "ccd"
    own = "SDF with bonds" if bonds else "SDF or XYZ file"
    return f"`molgen-energy preprocess {dataset} -o {{path}}` or from your own {own}"


def _required_columns(config: MoleculeConfig, file: MoleculeFile) -> frozenset[str]:
    """Optional columns of the file that model, loss and condition need.

    Bonds that only the loss requires may be missing; they are then perceived from distances.
    """
    layout = build_layout(config.model.fields, config.scales, MoleculeStatistics((1,)))
    needed = field_columns(layout)
    for name in sorted(needed - file.columns):
        remedy = "preprocess a file that holds it"
        if name in ("bonds", "formal_charges"):
            remedy = (
                "make it with `molgen-energy preprocess FILE.sdf` of an SDF with bonds, or of QM9 "
                "with `molgen-energy preprocess qm9 --bonds`, and name it with --data"
            )
        raise InputError(
            f"{file.path} has no column {name}, which model {config.model.name} generates; {remedy}"
        )
    properties = getattr(config.condition, "properties", ())
    known = sorted(name.removeprefix("properties/") for name in file.columns if "/" in name)
    for name in properties:
        if f"properties/{name}" not in file.columns:
            raise InputError(f"{file.path}: {unknown_name('property', name, known)}")
    if "bonds" in config.loss_requires and "bonds" in file.columns:
        needed |= {"bonds"}
    return needed | {f"properties/{name}" for name in properties}


def _statistics(
    file: MoleculeFile, elements: tuple[int, ...], columns: frozenset[str]
) -> MoleculeStatistics:
    """Elements, charges, kinds of bonds and of atoms; reads charges and bonds if needed.

    Charges and bonds of validation molecules count too, so that fields can hold them.
    """
    wanted = columns & {"formal_charges", "bonds"}
    low = high = 0
    aromatic = False
    atoms: Counter[AtomKind] = Counter()
    read = np.concatenate([file.split_indices(split) for split in ("train", "valid")])
    for chunk in _chunks(file, np.sort(read), wanted) if wanted else ():
        if chunk.formal_charges is not None and len(chunk.formal_charges):
            low = min(low, int(chunk.formal_charges.min()))
            high = max(high, int(chunk.formal_charges.max()))
        if chunk.bonds is not None:
            aromatic = aromatic or bool((chunk.bonds.order == AROMATIC).any())
        if len(wanted) == 2:
            atoms += count_atoms(chunk)
    known = Counter({kind: atoms[kind] for kind in without_radicals(atoms)}) if atoms else None
    return MoleculeStatistics(elements, (low, high), aromatic, known)


def _chunks(
    file: MoleculeFile, which: NDArray[np.int64], columns: frozenset[str]
) -> Iterator[Molecules]:
    """Some molecules of a file with optional columns, in chunks of bounded memory."""
    for start in range(0, len(which), _SAMPLE):
        yield file.read(which[start : start + _SAMPLE], columns)


def _fit_condition(config: MoleculeConfig, file: MoleculeFile) -> PropertyCondition | None:
    """The condition, normalised over the training molecules; None without."""
    section = config.condition
    if not isinstance(section, PropertyConditionConfig):
        return None
    names = section.properties
    columns = frozenset(f"properties/{name}" for name in names)
    training = file.split_indices("train")
    rows = [
        np.stack([chunk.properties[name].values for name in names], axis=1)
        for chunk in _chunks(file, training, columns)
    ]
    values = np.concatenate(rows)
    units = [file.property_units[name] for name in names]
    return PropertyCondition.fit(
        names,
        units,
        values,
        file.sizes(training),
        config.training.seed,
        section.dropout,
        section.single_dropout,
    )


def _in_memory(
    config: MoleculeConfig,
    summary: DatasetSummary,
    columns: frozenset[str],
    device: torch.device,
) -> bool:
    """Whether training molecules stay in memory; `auto` allows a quarter of it at most.

    Small data always stay in memory, so that a run does not depend on other processes.
    """
    if config.data.in_memory != "auto":
        return config.data.in_memory
    available = available_memory(device)
    if available is None:
        return True
    pairs = sum(size**2 * count for size, count in summary.size_histogram.items())
    # For each atom: position, element, charge, and about one bond. For each molecule: offset,
    # size, number in the file, and properties.
    bonds = "bonds" in columns or "bonds" in config.loss_requires
    per_atom = 13 + int("formal_charges" in columns) + 9 * int(bonds)
    per_molecule = 40 + 8 * sum("/" in name for name in columns)
    needed = per_atom * summary.training_atoms + per_molecule * summary.training_molecules
    needed += table_bytes(config.loss, pairs)
    return needed <= _SMALL or 4 * needed * local_world_size() <= available


def _elements(
    config: MoleculeConfig, summary: DatasetSummary, file: MoleculeFile
) -> tuple[int, ...]:
    """Atomic numbers of the configured elements, ascending; the file must hold no others."""
    present = tuple(sorted(summary.first_atoms))
    if config.data.elements == "auto":
        return present
    elements = tuple(sorted({atomic_number(name) for name in config.data.elements}))
    foreign = [(atom, z) for z, atom in summary.first_atoms.items() if z not in elements]
    if foreign:
        atom, z = min(foreign)
        number = int(np.searchsorted(file.offsets, atom, side="right"))
        remedy = "add it with --set data.elements=[...]"
        if config.distillation.teacher is not None:  # which knows no others
            remedy = "name data without it, or another --teacher"
        raise InputError(
            f"{file.path}: molecule {number} holds {symbol(z)}, which is not among the elements "
            f"{', '.join(symbol(z) for z in elements)}; {remedy}"
        )
    return elements
