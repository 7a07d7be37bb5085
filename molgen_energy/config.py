"""The configuration of a run: typed sections, YAML, and `--set key=value`.

Each physical system has a `Config` of its own (`molgen_energy.systems`); this module holds what all
of them share. A section with several classes, such as `model` or `loss`, is a union whose key
`name` chooses the class: see `OneOf`. Messages about unknown keys and names list the valid ones. A
value `auto` is replaced by a number before training starts, so the `config.yaml` of a run holds the
values that were used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from molgen_energy.errors import InputError, unknown_name
from molgen_energy.formats.yaml import MOST_SHOWN, dump_yaml, load_yaml, shown
from molgen_energy.resources import resource_directory


def _whole(value: Any) -> Any:
    """A whole number that is written as 1e3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Auto = Literal["auto"]
Whole = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Whole, Field(gt=0, lt=2**63)]
Layers = Annotated[Whole, Field(gt=0, le=1000)]
"""Layers of a network; its width is limited by the memory that is available."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
Self = TypeVar("Self", bound="Config")
Value = TypeVar("Value")

_OPTIONS = "the given options"  # source of the changes of `replaced`, in messages


def one_of(kind: str, names: Any) -> AfterValidator:
    """A check that a string is one of the names, for an annotated field.

    `names` is looked up at each validation, so a registry may grow.
    """

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(unknown_name(kind, name, names))
        return name

    return AfterValidator(check)


def positive_or(*names: str) -> AfterValidator:
    """A check that a value is a finite number above 0 or one of the names, for `float | str`."""

    def check(value: float | str) -> float | str:
        if isinstance(value, str):
            if value not in names:
                raise ValueError(
                    f"expected a number above 0 or {', '.join(names)}, not {shown(value)}"
                )
        elif not 0 < value < float("inf"):
            raise ValueError(f"expected a number greater than 0, not {value}")
        return value

    return AfterValidator(check)


PositiveOrAuto = Annotated[float | str, positive_or("auto")]


def resolved(value: Value | Auto) -> Value:
    """A value of a configuration whose `auto` was replaced."""
    assert value != "auto"
    return value


class Section(BaseModel):
    """A named group of keys of a configuration.

    Numbers are not taken from text or `true`; a whole number may be written as 1e3.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Refuse a plain value, and write the default name into unions without one.

        YAML has lists where fields are tuples.
        """
        if isinstance(values, (str, int, float, list)):
            raise ValueError(f"holds {', '.join(cls.model_fields)}; set one of these")
        if not isinstance(values, Mapping):
            return values
        completed = dict(values)
        for key, field in cls.model_fields.items():
            section = completed.get(key)
            default = getattr(field.default, "name", None)
            if _union(field) and isinstance(section, Mapping) and default is not None:
                completed[key] = {"name": default, **section}
            if isinstance(section, list) and get_origin(field.annotation) is tuple:
                completed[key] = tuple(section)
        return completed


class OneOf:
    """Metadata of a field whose section class is chosen by the section's key `name`.

    ``model: Annotated[Section, OneOf("model", MODELS)] = GDM.Config()`` is validated by
    ``MODELS[name].Config``; a section without a name has the name of the default.

    Parameters
    ----------
    kind
        What the names are names of, for messages.
    registry
        Classes by name, each with its section class as the attribute `Config`. It is looked up at
        each validation, so rows may be added.
    elsewhere
        Registries of other systems, by what these are trained on, for the message about a name
        that is valid there.
    """

    def __init__(
        self,
        kind: str,
        registry: Mapping[str, Any],
        elsewhere: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        self.kind = kind
        self.registry = registry
        self.elsewhere = elsewhere

    def section(self, name: Any) -> type[Section]:
        """The section class of a name.

        Raises
        ------
        ValueError
            The registry has no such name.
        """
        if isinstance(name, str) and name in self.registry:
            section: type[Section] = self.registry[name].Config
            return section
        for other, registry in self.elsewhere.items():
            if isinstance(name, str) and name in registry:
                raise ValueError(
                    f"'{name}' is a {self.kind} on {other} (valid here: {', '.join(self.registry)})"
                )
        raise ValueError(
            unknown_name(self.kind, name if isinstance(name, str) else shown(name), self.registry)
        )

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def _validate(self, value: Any) -> Section:
        if isinstance(value, Section):
            section = self.section(getattr(value, "name", None))
            if type(value) is not section:
                raise ValueError(f"expected a {section.__name__}, not a {type(value).__name__}")
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"expected the keys of a {self.kind}, such as name")
        return self.section(value.get("name")).model_validate(value)


def _union(field: FieldInfo) -> OneOf | None:
    """The metadata of a field that is a union of sections; None of any other field."""
    return next((item for item in field.metadata if isinstance(item, OneOf)), None)


def _section_class(field: FieldInfo, values: Any) -> type[Section] | None:
    """The section class that a field's values are validated by; None of a plain value.

    Raises
    ------
    ValueError
        The field is a union, and the values have a name that is not valid.
    """
    union = _union(field)
    if union is not None:
        name = values.get("name") if isinstance(values, Mapping) else None
        return union.section(getattr(field.default, "name", None) if name is None else name)
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


class DataConfig(Section):
    """What to train on."""

    path: Annotated[
        str | None, Field(description="HDF5 file of `preprocess`; null is a bundled sample")
    ] = None


class TrainingConfig(Section):
    """Optimisation. Exactly one of `steps` and `epochs` sets the length.

    Either `batch_size` or `pairs_per_batch` sets the size of batches.
    """

    steps: PositiveInt | Auto | None = None
    """`auto`, here and below, suits the number of training samples: see `training.plan`."""
    epochs: PositiveInt | None = None
    batch_size: PositiveInt | Auto | None = 64
    """Samples in a batch; null where `pairs_per_batch` is set."""
    pairs_per_batch: PositiveInt | None = None
    """Pairs of atoms in a batch of molecules, B·N² with padding; a larger molecule is a batch of
    its own."""
    lr: PositiveFloat | Auto = "auto"
    """`auto` takes the published value for the model and the loss, where there is one."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of hidden matrices; AdamW updates all other parameters."""
    muon_lr: PositiveFloat = 0.01
    """Learning rate of the matrices that `muon` updates; `lr` is that of all other parameters."""
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    decay: Literal["none", "cosine"] = "none"
    """Learning rate after the warm-up: constant, or a half cosine to zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-12
    ema_decay: _Decay | Auto = 0.9999
    adam_betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    """Decay of the two averages of AdamW."""
    clip_gradients: bool = True
    max_gradient_norm: PositiveFloat | None = None
    """The bound of `clip_gradients`, which recent steps determine, is never above this; null sets
    no limit. JODO has 10 for QM9 and 20 for GEOM-Drugs."""
    cuda_graphs: bool = False
    """Record a step on a GPU once for each shape of a batch, and repeat it without Python."""
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    initial_weights: str | None = None
    """A run, a checkpoint, or the name of pretrained weights, whose EMA weights training starts
    from; null draws random ones."""
    log_every: PositiveInt = 50
    validate_every: PositiveInt | Auto = 1000
    patience: PositiveInt | None = None
    """Validations in a row without better weights after which training ends; null takes all
    steps."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weights are the best ones so far if their validation loss is below the lowest, or above it by
    less than this share."""
    sample_from: Literal["last", "best"] = "last"
    """The checkpoint that stands for the run where none is named, such as in `sample`: the last
    one, or that of the best validation loss. With `best` the initial weights are validated too,
    and are the best ones if training only spoils them."""
    checkpoint_every: PositiveInt = 1000

    @model_validator(mode="before")
    @classmethod
    def _no_default_size(cls, values: Any) -> Any:
        """Pairs replace the default number of samples."""
        if isinstance(values, Mapping) and values.get("pairs_per_batch") is not None:
            return {"batch_size": None, **values}
        return values

    @model_validator(mode="after")
    def _one_size(self) -> TrainingConfig:
        if (self.batch_size is None) == (self.pairs_per_batch is None):
            raise ValueError("set exactly one of batch_size and pairs_per_batch, the other to null")
        return self


class Config(Section):
    """The configuration of a run. Each system adds `model`, `loss` and further sections."""

    name: str
    system: str
    """Key of `molgen_energy.systems.registry.SYSTEMS`; a subclass sets its own as the default."""
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
        """The system that this class configures."""
        return str(cls.model_fields["system"].default)

    @classmethod
    def of(cls: type[Self], raw: RawConfig) -> Self:
        """Validate the contents of a file.

        Raises
        ------
        InputError
            A key or a value is not valid.
        """
        return _validated(cls, raw.values, raw.where)

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Today's keys for the configuration of a checkpoint of format 2."""
        return values

    def without_paths(self: Self) -> Self:
        """A copy for files that users share: of the paths of data and weights, only the names."""
        changes: dict[str, Section] = {}
        if self.data.path is not None:
            changes["data"] = self.data.model_copy(update={"path": Path(self.data.path).name})
        weights = self.training.initial_weights
        if weights is not None:
            update = {"initial_weights": Path(weights).name}
            changes["training"] = self.training.model_copy(update=update)
        return self.model_copy(update=changes)

    def to_yaml(self) -> str:
        """All values, including defaults."""
        return dump_yaml(self.model_dump(mode="json"))

    def replaced(self: Self, changes: Mapping[str, Any]) -> Self:
        """A copy with changed values, by dotted key: ``{"model.layers": 6}``.

        A change of the name of a union, such as ``loss.name``, comes before the others. Of the
        section's previous keys those that both classes have keep their values, where these were
        set; all others take the defaults of the new class.

        Raises
        ------
        InputError
            A key or a value is not valid.
        """
        values = self.model_dump(exclude_unset=True)
        for key in sorted(changes, key=lambda key: not key.endswith(".name")):
            _assign(type(self), values, key, changes[key])
        # Of two ways to set the length, or the size of batches, the changed one holds.
        for pair in (("steps", "epochs"), ("batch_size", "pairs_per_batch")):
            for changed, other in (pair, pair[::-1]):
                given = changes.get(f"training.{changed}")
                if given is not None and f"training.{other}" not in changes:
                    values["training"][other] = None
        return _validated(type(self), values, _OPTIONS)


def _assign(schema: type[Section], values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in place; the last part may be a key of a mapping."""
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        field = schema.model_fields.get(section)
        if field is not None and get_origin(field.annotation) is dict:
            if depth + 1 < len(sections):
                entry = ".".join(sections[: depth + 2])
                raise InputError(
                    f"{key}: set the whole entry, such as {entry}={{{last}: {str(value)[:40]}}}"
                )
            values[section] = {**values.get(section, {}), last: value}
            return
        inner = None if field is None else _section_class(field, values.get(section))
        if field is None or inner is None:
            raise InputError(_unknown_key(key, schema, sections[:depth]))
        if not isinstance(values.get(section), dict):
            default = field.get_default(call_default_factory=True)
            is_section = isinstance(default, Section)
            values[section] = default.model_dump(exclude_unset=True) if is_section else {}
        if last == "name" and depth + 1 == len(sections) and _union(field) is not None:
            values[section] = _switched(field, inner, values[section], key, value)
        schema, values = inner, values[section]
    if last not in schema.model_fields:
        raise InputError(_unknown_key(key, schema, sections))
    values[last] = value


def _switched(
    field: FieldInfo, before: type[Section], values: dict[str, Any], key: str, name: Any
) -> dict[str, Any]:
    """The values of a section of another name: its keys that both section classes have."""
    union = _union(field)
    assert union is not None
    try:
        after = union.section(name)
    except ValueError as error:
        raise InputError(f"{_OPTIONS}: {key}: {error}") from None
    kept = {
        own: value
        for own, value in values.items()
        if own in after.model_fields
        and after.model_fields[own].annotation == before.model_fields[own].annotation
    }
    return kept | {"name": name}


def _unknown_key(key: str, section: type[Section], parents: list[str]) -> str:
    """Message for a dotted key that is not among those of a section under its parents."""
    part = key.split(".")[len(parents)][:MOST_SHOWN]
    near = difflib.get_close_matches(part, section.model_fields, n=1)
    hint = f"; did you mean '{'.'.join([*parents, near[0]])}'?" if near else ""
    valid = ", ".join(".".join([*parents, name]) for name in section.model_fields)
    return f"unknown config key {shown(key)}{hint} (valid: {valid})"


def config_names() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in resource_directory("configs").glob("*.yaml"))


class RawConfig(NamedTuple):
    """The contents of a configuration file, not yet validated."""

    where: str
    values: Mapping[str, Any]

    @property
    def system(self) -> str:
        """The physical system that it configures."""
        return str(self.values["system"])


def read_config(name: str | Path) -> RawConfig:
    """A shipped configuration by name, or a YAML file by path.

    Raises
    ------
    InputError
        There is no such configuration, or the file is not YAML.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in config_names():
            raise InputError(
                unknown_name("config", str(name), config_names()) + "; or the path of a .yaml file"
            )
        path = resource_directory("configs") / f"{name}.yaml"
    if not path.exists():
        raise InputError(f"config {path} does not exist (shipped: {', '.join(config_names())})")
    values = load_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold keys and values")
    return RawConfig(str(path), {"name": path.stem, "system": "molecules"} | values)


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Parse `key=value` strings into a dictionary; values are read as YAML.

    Raises
    ------
    InputError
        A string has no `=`, or its value is not YAML.
    """
    changes = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--set {text}: expected key=value, such as model.layers=6")
        changes[key.strip()] = load_yaml(value, f"--set {shown(text)[1:-1]}: the value")
    return changes


def _validated(schema: type[Self], values: Mapping[str, Any], where: str) -> Self:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        section, known = _located(schema, values, first["loc"])
        if first["type"] == "extra_forbidden":
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"{where}: {_unknown_key(key, section, known)}") from error
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] == "value_error" else f" (it is {shown(first['input'])})"
        raise InputError(f"{where}: {'.'.join(known)[:200]}: {message}{found}") from error


def _located(
    schema: type[Section], values: Any, location: tuple[int | str, ...]
) -> tuple[type[Section], list[str]]:
    """The innermost section of an error's location, and the keys of the location.

    Pydantic appends the branch of a union of plain types to a location; it is left out.
    """
    keys: list[str] = []
    for part in location:
        field = schema.model_fields.get(str(part))
        if field is None:
            break
        keys.append(str(part))
        values = values.get(part) if isinstance(values, Mapping) else None
        try:
            inner = _section_class(field, values)
        except ValueError:  # the error is about the name
            keys.append("name")
            break
        if inner is None:
            following = location[len(keys) : len(keys) + 1]
            if isinstance(values, Mapping) and following and following[0] in values:
                keys.append(str(following[0]))
            break
        schema = inner
    return schema, keys
