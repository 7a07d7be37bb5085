"""The configuration of a run: a typed schema, YAML, and `--set key=value`.

Each physical system has its own sections (`molgen_energy.systems`); what all share stands here.
Unknown keys and names fail and say which are valid. A value `auto` is replaced by a number before
training starts, so the `config.yaml` of a run holds what was used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from molgen_energy.errors import InputError, unknown_name
from molgen_energy.losses import EDGES, PUBLISHED_SCALES, SPRINGS
from molgen_energy.resources import resource_directory

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Self = TypeVar("Self", bound="Config")


def one_of(kind: str, names: Any) -> AfterValidator:
    """A check that a text is among names, for an annotated field."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(unknown_name(kind, name, names))
        return name

    return AfterValidator(check)


def loss_on(what: str, names: Any, elsewhere: Mapping[str, Any]) -> AfterValidator:
    """A check that a loss is among those on something, and not on something else."""

    def check(name: str) -> str:
        for other, foreign in elsewhere.items():
            if name in foreign and name not in names:
                raise ValueError(
                    f"'{name}' is a loss on {other}; {what} are trained with {', '.join(names)}"
                )
        if name not in names:
            raise ValueError(unknown_name("loss", name, names))
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


PositiveOrAuto = Annotated[float | str, AfterValidator(_positive_or_auto)]


class Section(BaseModel):
    """Some keys of a configuration, under one name."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_value(cls, values: Any) -> Any:
        if isinstance(values, (str, int, float, list)):
            raise ValueError(f"holds {', '.join(cls.model_fields)}; set one of these")
        return values


class DataConfig(Section):
    """What to train on."""

    path: Annotated[
        str | None, Field(description="HDF5 file of `preprocess`; null is a bundled sample")
    ] = None


class SpringsConfig(Section):
    """Springs of the energy loss."""

    family: Annotated[str, one_of("spring family", SPRINGS)] = "exponential"
    scale: Annotated[float | str, AfterValidator(_spring_scale)] = "auto"
    """c of k_ij = (c/n)·f(d_ij); `auto` makes c·f of mean 1 over the training pairs, a model's name
    takes the published c that goes with it."""
    distance: Literal["positions", "features"] = "positions"
    """What f takes: distances of positions, or of positions and encoded features together."""


class EdgesConfig(Section):
    """Pairs that springs join, in the energy loss."""

    kind: Annotated[str, one_of("edges", EDGES)] = "complete"
    pool: Annotated[int, Field(gt=0, le=10_000)] = 100
    """Random graphs to draw from for each number of atoms; `sparse` and `symmetrized`."""
    tolerance: PositiveFloat = 0.01
    """Distances in Å that differ by less count as equal by symmetry; `symmetrized`."""


class TrainingConfig(Section):
    """Optimisation. Either `steps` or `epochs` says how long."""

    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    batch_size: PositiveInt = 64
    lr: PositiveFloat | Auto = "auto"
    """`auto` takes what goes with the model and the loss, where there is such a value."""
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
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: PositiveInt = 50
    validate_every: PositiveInt = 1000
    checkpoint_every: PositiveInt = 1000


class Config(Section):
    """A whole run: what all systems have. Each adds `model`, `loss` and what else it needs."""

    name: str
    system: str
    """Key of `molgen_energy.systems.registry.SYSTEMS`; a subclass has its own as the default."""
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @field_validator("system")
    @classmethod
    def _own_system(cls, name: str) -> str:
        own = cls.of_system()
        if name != own:
            raise ValueError(f"the other keys are those of {own}; take a --config of {name}")
        return name

    @classmethod
    def of_system(cls) -> str:
        """The system that this is the configuration of."""
        return str(cls.model_fields["system"].default)

    @classmethod
    def of(cls: type[Self], given: RawConfig) -> Self:
        """Check what a file holds.

        Raises
        ------
        InputError
            A key or a value is not valid.
        """
        return _validated(cls, given.values, given.where)

    def to_yaml(self) -> str:
        """All values, defaults too."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def replaced(self: Self, changes: Mapping[str, Any]) -> Self:
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
        return _validated(type(self), values, "the given options")


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


class RawConfig(NamedTuple):
    """What a file of configuration holds, not yet checked."""

    where: str
    values: Mapping[str, Any]

    @property
    def system(self) -> str:
        """Which system it is of."""
        return str(self.values["system"])


def read_config(name: str | Path) -> RawConfig:
    """A shipped configuration by name, or a YAML file by path.

    Raises
    ------
    InputError
        There is no such configuration, or it is no YAML.
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
    return RawConfig(str(path), {"name": path.stem, "system": "molecules"} | values)


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


def _validated(schema: type[Self], values: Mapping[str, Any], where: str) -> Self:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        known = schema.model_validate({"name": ""}).model_dump()
        if first["type"] == "extra_forbidden":
            key = ".".join(map(str, first["loc"]))
            valid = _keys_near(known, list(map(str, first["loc"][:-1])))
            raise InputError(f"{where}: {unknown_name('config key', key, valid)}") from error
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] == "value_error" else f" (it is {first['input']!r})"
        raise InputError(f"{where}: {_key(first['loc'], known)}: {message}{shown}") from error


def _key(location: tuple[int | str, ...], known: Any) -> str:
    """The dotted key of a place of an error; pydantic appends the branch of a union, dropped."""
    key = []
    for part in location:
        if not isinstance(known, dict) or part not in known:
            break
        key.append(str(part))
        known = known[part]
    return ".".join(key)
