"""The configuration of a run: a typed schema, YAML, and `--set key=value`.

Unknown keys and names fail and say which are valid. A value `auto` is replaced by a number before
training starts, so the `config.yaml` of a run holds what was used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from molgen_energy.diffusion.process import PROCESSES
from molgen_energy.elements import atomic_number
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.losses import EDGES, LOSSES, PUBLISHED_SCALES, SPIN_LOSSES, SPRINGS
from molgen_energy.models import MODELS
from molgen_energy.resources import resource_directory

SYSTEMS = ("molecules",)

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _one_of(kind: str, names: Any) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(unknown_name(kind, name, names))
        return name

    return AfterValidator(check)


def _positive_or(names: tuple[str, ...], value: float | str) -> float | str:
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"expected a number above 0 or {', '.join(names)}, not '{value}'")
    elif not 0 < value < float("inf"):
        raise ValueError(f"expected a number greater than 0, not {value}")
    return value


def _positive_or_auto(value: float | str) -> float | str:
    return _positive_or(("auto",), value)


def _spring_scale(value: float | str) -> float | str:
    return _positive_or(("auto", *PUBLISHED_SCALES), value)


def _no_spin_loss(name: str) -> str:
    if name in SPIN_LOSSES:
        raise ValueError(
            f"'{name}' is a loss on spins, for your own training code; molecules are trained with "
            f"{', '.join(LOSSES)}"
        )
    return name


def _symbols(value: list[str] | Auto) -> list[str] | Auto:
    if value != "auto":
        for symbol in value:
            atomic_number(symbol)
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_value(cls, values: Any) -> Any:
        if isinstance(values, (str, int, float, list)):
            raise ValueError(f"holds {', '.join(cls.model_fields)}; set one of these")
        return values


class DataConfig(_Section):
    """What to train on."""

    path: Annotated[
        str | None, Field(description="HDF5 file; null is the bundled sample of QM9")
    ] = None
    elements: Annotated[list[str] | Auto, AfterValidator(_symbols)] = "auto"
    """Symbols of the vocabulary; `auto` takes those of the file."""
    in_memory: bool | Auto = "auto"
    """Whether all training molecules stay in memory, on the device, or are streamed in windows;
    `auto` keeps them there unless that takes more than a quarter of the memory available."""
    window: PositiveInt = 200_000
    """Training molecules in a window, where they are streamed; two windows are in memory."""


class ModelConfig(_Section):
    """Network that predicts the noise."""

    name: Annotated[str, _one_of("model", MODELS)] = "gdm"
    layers: PositiveInt = 9
    width: PositiveInt = 256
    normalization: PositiveFloat = 1.0
    """Sums over an atom's neighbours are divided by it."""


class DiffusionConfig(_Section):
    """Forward process, and the scale that positions and features are divided by."""

    process: Annotated[str, _one_of("process", PROCESSES)] = "diffusion"
    """`diffusion` predicts noise, `flow_matching` the velocity from data to noise."""
    prediction: Literal["noise", "velocity"] = "noise"
    """What the network gives of a diffusion: ε, or v = α ε − σ x, of which ε is made."""
    steps: Annotated[int, Field(ge=2)] = 1000
    precision: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5
    time_power: PositiveFloat = 1.0
    """Training draws times as u to this power, u uniform: above 1, little noise is frequent."""
    spread_times: bool = False
    """Whether the times of a batch are spread evenly rather than independent."""
    position_scale: PositiveFloat = 1.0
    type_scale: PositiveFloat = 4.0
    charge_scale: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _one_velocity(self) -> DiffusionConfig:
        if self.process != "diffusion" and self.prediction != "noise":
            raise ValueError("prediction is of the process diffusion; a flow has its own velocity")
        return self


class SpringsConfig(_Section):
    """Springs of the energy loss."""

    family: Annotated[str, _one_of("spring family", SPRINGS)] = "exponential"
    scale: Annotated[float | str, AfterValidator(_spring_scale)] = "auto"
    """c of k_ij = (c/n)·f(d_ij); `auto` makes c·f of mean 1 over the training pairs, a model's name
    takes the published c that goes with it."""
    distance: Literal["positions", "features"] = "positions"
    """What f takes: distances of positions, or of positions and encoded features together."""


class EdgesConfig(_Section):
    """Pairs that springs join, in the energy loss."""

    kind: Annotated[str, _one_of("edges", EDGES)] = "complete"
    pool: Annotated[int, Field(gt=0, le=10_000)] = 100
    """Random graphs to draw from for each number of atoms; `sparse` and `symmetrized`."""
    tolerance: PositiveFloat = 0.01
    """Distances in Å that differ by less count as equal by symmetry; `symmetrized`."""


class LossConfig(_Section):
    """Loss on positions; features have the squared (`mae`: absolute) error of what is predicted."""

    name: Annotated[str, AfterValidator(_no_spin_loss), _one_of("loss", LOSSES)] = "energy"
    springs: SpringsConfig = SpringsConfig()
    edges: EdgesConfig = EdgesConfig()
    position_weight: Annotated[float | str, AfterValidator(_positive_or_auto)] = "auto"
    """w; `auto` takes the paper's, converted to the run's springs and edges for the energy."""


class TrainingConfig(_Section):
    """Optimisation. Either `steps` or `epochs` says how long."""

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 64
    lr: PositiveFloat | Auto = "auto"
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` makes updates of matrices between states orthogonal; all else has AdamW."""
    muon_lr: PositiveFloat = 0.01
    """Learning rate of the matrices that `muon` has; `lr` is that of all else."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["none", "cosine"] = "none"
    """Learning rate behind the warm-up: constant, or a half cosine to zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-12
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    clip_gradients: bool = True
    augment_rotations: bool = False
    low_precision: bool | Auto = "auto"
    """bfloat16 on pairs; `auto` uses it where the processor has instructions for it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: PositiveInt = 50
    validate_every: PositiveInt = 1000
    validation_molecules: PositiveInt = 2048
    """How many molecules of the validation split the validation loss is taken over, at most."""
    checkpoint_every: PositiveInt = 1000


class Config(_Section):
    """A whole run."""

    name: str
    system: Annotated[str, _one_of("system", SYSTEMS)] = "molecules"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()

    def to_yaml(self) -> str:
        """All values, defaults too."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def replaced(self, changes: Mapping[str, Any]) -> Config:
        """A copy with values changed, by dotted key: ``{"model.layers": 6}``.

        Raises
        ------
        InputError
            A key or a value is not valid.
        """
        values = self.model_dump()
        for key, value in changes.items():
            *sections, last = key.split(".")
            place = values
            for section in sections:
                inner = place.get(section)
                if not isinstance(inner, dict):
                    raise InputError(unknown_name("config key", key, _keys_near(values, sections)))
                place = inner
            if last not in place:
                raise InputError(unknown_name("config key", key, _keys_near(values, sections)))
            place[last] = value
        # Of the two ways to say how long, the one that was changed holds.
        if "training.steps" in changes and "training.epochs" not in changes:
            values["training"]["epochs"] = None
        if "training.epochs" in changes and "training.steps" not in changes:
            values["training"]["steps"] = None
        return _validated(values, "the given options")


def _keys_near(values: Mapping[str, Any], sections: list[str]) -> list[str]:
    """Full names of the keys of the deepest section that exists."""
    prefix: list[str] = []
    place: Any = values
    for section in sections:
        if not isinstance(place.get(section), dict):
            break
        place = place[section]
        prefix.append(section)
    return [".".join([*prefix, key]) for key in place]


def config_names() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in resource_directory("configs").glob("*.yaml"))


def load_config(name: str | Path) -> Config:
    """A shipped configuration by name, or a YAML file by path.

    Raises
    ------
    InputError
        There is no such configuration, it is no YAML, or a key or value is not valid.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in config_names():
            raise InputError(
                unknown_name("config", str(name), config_names()) + "; or the path of a .yaml file"
            )
        path = resource_directory("configs") / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"config {path} does not exist (shipped: {', '.join(config_names())})")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold keys and values")
    return _validated({"name": path.stem} | values, str(path))


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`key=value` texts as a dictionary; values are read as YAML.

    Raises
    ------
    InputError
        A text has no `=`, or its value is no YAML.
    """
    changes = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {text}: expected key=value, such as model.layers=6")
        try:
            changes[key.strip()] = _yaml_scalar(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {text}: the value is no YAML") from error
    return changes


def _yaml_scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:  # YAML 1.1 takes 1e-4, without a dot, for a text
            return float(value)
        except ValueError:
            return value
    return value


def _validated(values: Mapping[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            key = ".".join(map(str, first["loc"]))
            valid = _keys_near(Config(name="").model_dump(), list(map(str, first["loc"][:-1])))
            raise InputError(f"{where}: {unknown_name('config key', key, valid)}") from error
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] == "value_error" else f" (it is {first['input']!r})"
        raise InputError(f"{where}: {_key(first['loc'])}: {message}{shown}") from error


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key of a place of an error; pydantic appends the branch of a union, dropped."""
    place: Any = Config(name="").model_dump()
    key = []
    for part in location:
        if not isinstance(place, dict) or part not in place:
            break
        key.append(str(part))
        place = place[part]
    return ".".join(key)
