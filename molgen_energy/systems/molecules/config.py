"""The configuration of a run on molecules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ValidationError, field_validator, model_validator
from pydantic import Field as Option

from molgen_energy.config import (
    Auto,
    Config,
    DataConfig,
    OneOf,
    PositiveFloat,
    PositiveInt,
    PositiveOrAuto,
    RawConfig,
    Section,
    TrainingConfig,
    Whole,
    one_of,
    resolved,
)
from molgen_energy.diffusion.process import PROCESSES, Diffusion, ProcessConfig
from molgen_energy.elements import atomic_number
from molgen_energy.losses import (
    LOSSES,
    POSITION_TERMS,
    SPIN_LOSSES,
    EnergyConfig,
    LossConfig,
)
from molgen_energy.models import GDM, MODELS
from molgen_energy.models.base import DenoiserConfig
from molgen_energy.systems.molecules.condition import CONDITIONS, NoConditionConfig
from molgen_energy.systems.molecules.fields import ScalesConfig


def _check_symbols(value: list[str] | Auto) -> list[str] | Auto:
    if value != "auto":
        for symbol in value:
            atomic_number(symbol)
    return value


class MoleculeDataConfig(DataConfig):
    """Training data; the bundled sample of QM9 without a path."""

    elements: Annotated[list[str] | Auto, AfterValidator(_check_symbols)] = "auto"
    """Symbols of the elements; `auto` is those of the file."""
    in_memory: bool | Auto = "auto"
    """Whether training molecules stay in memory, on the device, or are streamed in windows; `auto`
    streams them if they would take more than a quarter of the available memory."""
    window: PositiveInt = 200_000
    """Training molecules in a window of streamed data; two windows are in memory."""


_OF_WEIGHTS = ("model", "process", "scales", "loss", "objective", "condition")
"""Sections that give the weights of a network a meaning, or say what it learnt."""
_OF_OPTIMISATION = (
    "augment_rotations", "optimizer", "adam_betas", "weight_decay", "clip_gradients",
    "max_gradient_norm",
)  # fmt: skip
"""Keys of `training` that fine-tuning takes from the run of the weights."""
_RATES = ("lr", "muon_lr")


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of values; those `above` hold. Sections of another name are not mixed."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            same = value.get("name", under.get("name")) == under.get("name")
            merged[key] = _merged(under, value) if same else value
        else:
            merged[key] = value
    return merged


class WeightedTerm(NamedTuple):
    """A further loss on positions and its weight."""

    config: LossConfig
    weight: float


class _TermWeight(Section):
    weight: Annotated[float, Option(ge=0, allow_inf_nan=False)] = 1.0


def _term(name: str, value: float | dict[str, Any]) -> WeightedTerm:
    keys = dict(value) if isinstance(value, dict) else {"weight": value}
    weight = _TermWeight.model_validate({k: v for k, v in keys.items() if k == "weight"}).weight
    own = {k: v for k, v in keys.items() if k != "weight"}
    return WeightedTerm(POSITION_TERMS[name].Config.model_validate(own), weight)


def _check_term(name: str, value: float | dict[str, Any]) -> None:
    """Raise `ValueError` with the key that is not valid."""
    try:
        _term(name, value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([name, *map(str, first["loc"])])
        raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None


class ObjectiveConfig(Section):
    """Weights of the loss, and the noise levels that training draws."""

    position_weight: PositiveOrAuto = "auto"
    """w of the loss on positions; `auto` is the published one, for the energy converted to the
    springs, edges and mean number of atoms of the run."""
    field_weights: dict[str, Annotated[float, Option(ge=0, allow_inf_nan=False)]] = Option(
        default_factory=dict
    )
    """Weights of the errors of the other fields; 1 for fields that are not named."""
    terms: dict[Annotated[str, one_of("term", POSITION_TERMS)], float | dict[str, Any]] = Option(
        default_factory=dict
    )
    """Further losses on positions, by name: a weight, or `weight` with the keys of the term."""
    weighting: Literal["auto", "noise", "clean"] = "auto"
    """`noise`: errors of the noise have the same weight at all levels. `clean`: errors of clean
    data, weighted by √(α/σ). `auto` is `clean` for models that predict clean data, else `noise`."""
    time_power: PositiveFloat = 1.0
    """Training draws times u^power with u uniform in [0, 1). A power above 1 draws low noise more
    often."""
    stratified_timesteps: bool = False
    """Whether a batch has one time in each of its equal parts of [0, 1)."""
    self_condition_probability: Annotated[float, Option(ge=0, le=1)] = 0.5
    """How often a self-conditioned model gets its own first prediction in training."""
    self_condition_passes: PositiveInt = 1
    """Evaluations that make this prediction, each with the one before as its input."""
    reduction: Literal["mean", "sum"] = "mean"
    """Whether errors are averaged or summed over atoms and pairs; `sum` is JODO's."""
    given_fields: list[str] = Option(default_factory=list)
    """Fields that the network gets without noise and does not learn to generate. With elements,
    formal charges and bonds it learns conformers, see `sample --smiles`."""

    @field_validator("terms")
    @classmethod
    def _check_terms(cls, terms: dict[str, float | dict[str, Any]]) -> dict[str, Any]:
        for name, value in terms.items():
            _check_term(name, value)
        return terms

    def weighted_terms(self) -> list[WeightedTerm]:
        """The terms with their weights and complete sections."""
        return [_term(name, value) for name, value in self.terms.items()]


class DistillationConfig(Section):
    """Training of a student, a network that draws in a few evaluations what its teacher would."""

    evaluations: Annotated[Whole, Option(ge=3, le=1000)] | None = None
    """K, evaluations of the student for a sample; null trains no student."""
    teacher: str | None = None
    """A run, a checkpoint, or the name of pretrained weights. The student starts from its EMA
    weights."""
    highest: PositiveFloat = 2.5
    """Noise of the second level, σ/α in Å; the first is pure noise."""
    lowest: PositiveFloat = 0.06
    """Noise of the last level, Å."""
    power: PositiveFloat = 5.0
    """In between levels have equal distances in (σ/α)^(1/power)."""
    auxiliary_lr: PositiveFloat = 1.0
    """Learning rates of the auxiliary network relative to those of the student."""
    student_share: Annotated[float, Option(gt=0, le=1)] = 1.0
    """Share of the steps that change the student; all steps change the auxiliary network."""
    regulariser: Annotated[float, Option(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of the loss that keeps the auxiliary network near the teacher; 1 in the paper."""

    @model_validator(mode="after")
    def _descending(self) -> DistillationConfig:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest:g} is not below highest {self.highest:g}")
        return self


class FineTuningConfig(Section):
    """Training that goes on from trained weights, on few molecules."""

    relative_lr: PositiveFloat | None = None
    """Learning rates relative to those that the weights were trained with; null is no
    fine-tuning."""


class MoleculeTrainingConfig(TrainingConfig):
    """Optimisation. Either `steps` or `epochs` sets the length.

    Either `batch_size` or `pairs_per_batch` sets the size of batches.
    """

    augment_rotations: bool = False
    low_precision: bool | Literal["auto"] = "auto"
    """bfloat16 for pairs; `auto` uses it on a GPU and where a CPU multiplies far faster in it."""
    validation_molecules: PositiveInt = 2048
    """Most molecules of the validation split that the validation loss is averaged over."""
    validation_draws: PositiveInt | Auto = 1
    """Noise levels and noises of each validation molecule; `auto` draws so many that few molecules
    give a loss as precise as 256 do."""


class MoleculeConfig(Config):
    """A run on molecules: a diffusion model or a flow."""

    system: str = "molecules"
    data: MoleculeDataConfig = MoleculeDataConfig()
    model: Annotated[DenoiserConfig, OneOf("model", MODELS)] = GDM.Config()
    process: Annotated[ProcessConfig, OneOf("process", PROCESSES)] = Diffusion.Config()
    scales: ScalesConfig = ScalesConfig()
    loss: Annotated[LossConfig, OneOf("loss", LOSSES, {"spins": SPIN_LOSSES})] = EnergyConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    condition: Annotated[Section, OneOf("condition", CONDITIONS)] = NoConditionConfig()
    training: MoleculeTrainingConfig = MoleculeTrainingConfig()
    distillation: DistillationConfig = DistillationConfig()
    fine_tuning: FineTuningConfig = FineTuningConfig()

    def with_values_of(self, teacher: MoleculeConfig) -> MoleculeConfig:
        """The configuration of a student: what this one does not set is as of its teacher.

        These are model, process, scales, loss, objective, condition, elements and random rotations.
        """
        return self._over(
            teacher,
            data={"elements": teacher.data.elements},
            training={"augment_rotations": teacher.training.augment_rotations},
        )

    def continuing(self, source: MoleculeConfig) -> MoleculeConfig:
        """The configuration of fine-tuning: what this one does not set is as of the source.

        These are model, process, scales, loss, objective, condition, random rotations, and the
        optimiser; its learning rates are multiplied by `fine_tuning.relative_lr`, unless the source
        was fine-tuned itself.
        """
        factor = self.fine_tuning.relative_lr
        assert factor is not None
        if source.fine_tuning.relative_lr is not None:
            factor = 1.0
        theirs = source.training
        rates = {name: factor * resolved(getattr(theirs, name)) for name in _RATES}
        kept = {name: getattr(theirs, name) for name in _OF_OPTIMISATION}
        return self._over(source, training=kept | rates)

    def _over(self, other: MoleculeConfig, **sections: dict[str, Any]) -> MoleculeConfig:
        """Values of this configuration over those sections of another that weights depend on."""
        own, theirs = self.model_dump(exclude_unset=True), other.model_dump()
        taken = {section: theirs[section] for section in _OF_WEIGHTS} | sections
        return MoleculeConfig.of(RawConfig(f"config {self.name}", _merged(taken, own)))

    @property
    def loss_requires(self) -> frozenset[str]:
        """Inputs that the loss on positions and the terms beside it require."""
        terms = self.objective.weighted_terms()
        return self.loss.requires.union(*(term.config.requires for term in terms))

    def without_paths(self) -> MoleculeConfig:
        """A copy for files that users share: of paths of data and weights, only the names."""
        config = super().without_paths()
        teacher = self.distillation.teacher
        if teacher is None:
            return config
        section = self.distillation.model_copy(update={"teacher": Path(teacher).name})
        return config.model_copy(update={"distillation": section})

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Current keys: `diffusion` is now `process`, `scales` and a part of `objective`."""
        old, loss = values.get("diffusion", {}), values.get("loss", {})
        if not isinstance(old, dict) or not isinstance(loss, dict):
            return values  # damaged, as its validation says
        values = {key: value for key, value in values.items() if key != "diffusion"}
        loss = dict(loss)
        flow = old.get("process") == "flow_matching"
        process = {"name": "flow_matching" if flow else "diffusion"}
        for key in ("steps", "precision", "prediction"):
            if key in old and not (flow and key != "steps"):
                process[key] = old[key]
        objective: dict[str, Any] = {
            new: section[key]
            for section, key, new in (
                (loss, "position_weight", "position_weight"),
                (old, "time_power", "time_power"),
                (old, "spread_times", "stratified_timesteps"),
            )
            if key in section
        }
        objective["weighting"] = "noise"
        loss.pop("position_weight", None)
        if loss.get("name", "energy") != "energy":
            loss = {"name": loss["name"]}
        scales = {
            new: old[key]
            for key, new in (
                ("position_scale", "positions"),
                ("type_scale", "elements"),
                ("charge_scale", "nuclear_charges"),
            )
            if key in old
        }
        return values | {"process": process, "scales": scales, "loss": loss, "objective": objective}
