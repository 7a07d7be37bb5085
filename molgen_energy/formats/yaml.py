"""YAML, read by one strict reader, and the schemas that its values are validated by.

Scalars are those of the core schema of YAML 1.2: `true`, `false` and `null`, whole numbers, decimal
numbers such as `1e-4`, and text. So `no` is text, and `010` and `1_0` are no numbers. Documents of
others can neither take the memory of a value more than once nor run code: anchors, aliases and tags
are refused, as are duplicate keys, integers beyond 64 bit, more than 32 levels and more than 2 MB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from molgen_energy.errors import InputError
from molgen_energy.output import check_file

MOST_BYTES = 2_000_000
MOST_LEVELS = 32
MOST_SHOWN = 60
"""Characters of a value in a message."""
_MOST_TEXT = 200  # characters of the message of a check
_DIGITS = 20  # of an integer of 64 bit

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)", re.ASCII)
_DECIMAL = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|(0|[1-9][0-9]*)(?=[eE]))([eE][-+]?[0-9]+)?", re.ASCII
)
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Model = TypeVar("Model", bound=BaseModel)


class Schema(BaseModel):
    """Base of the declarations of structured files.

    A number is not taken from text, and a whole number not from `true`; other keys than the
    declared ones are refused.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class YAMLFormat:
    """The declaration of a YAML file."""

    title: str
    """The file and what it belongs to."""
    purpose: str
    """What the file is for, in a sentence or two."""
    schema: type[Schema]
    """Its keys, their types, ranges and meanings."""


def load_yaml(source: Path | str | bytes, what: str = "") -> Any:
    """The value of a document: mappings, lists, text, numbers, `true`, `false` or None.

    Parameters
    ----------
    source
        The path of a file, or the document itself.
    what
        Name of the document in messages; by default the path.

    Raises
    ------
    InputError
        The file cannot be read, or is not YAML of the restricted kind; names the line.
    """
    name = what or str(source if isinstance(source, Path) else "the document")
    content = _content(source, name) if isinstance(source, Path) else source
    try:
        return _Document(content).value()
    except _NotValid as error:
        raise InputError(f"{name} is not YAML: {error}") from None


def read_as(model: type[Model], source: Path | str | bytes, remedy: str, what: str = "") -> Model:
    """A document, validated by its declaration.

    Parameters
    ----------
    model
        The declaration.
    source, what
        As of `load_yaml`.
    remedy
        What to do about a file that is not valid, for the end of messages.

    Raises
    ------
    InputError
        As of `load_yaml` and `validate_as`.
    """
    name = what or str(source if isinstance(source, Path) else "the document")
    try:
        values = load_yaml(source, what)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None
    return validate_as(model, values, name, remedy)


def validate_as(model: type[Model], values: Any, where: str, remedy: str) -> Model:
    """Values, validated by their declaration.

    Raises
    ------
    InputError
        A key is missing or unknown, or a value is not the declared one; names file, key, and what
        was expected and found.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected keys and values, found {shown(values)}; {remedy}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            text = f"expected the key {shown(key)}, which is missing"
        elif first["type"] == "extra_forbidden":
            text = f"unknown key {shown(key)}"
        elif first["type"] == "value_error":
            text = f"key {shown(key)}: {str(first['ctx']['error'])[:_MOST_TEXT]}"
        else:
            expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            text = f"key {shown(key)}: expected {expected}, found {shown(first['input'])}"
        raise InputError(f"{where}: {text}; {remedy}") from None


def dump_yaml(values: Any) -> str:
    """A document that `load_yaml` reads as these values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def shown(value: Any) -> str:
    """A value in a message, in at most about 80 characters and without control characters."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}…")
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bit"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value):,}"
    if isinstance(value, Mapping):
        return f"{len(value):,} keys and values" if value else "no keys and values"
    return f"a {type(value).__name__}"


class _NotValid(Exception):
    """A document that is refused; the message names the line."""

    def __init__(self, text: str, mark: Any = None) -> None:
        super().__init__(text if mark is None else f"line {mark.line + 1}: {text}")


class _Dumper(yaml.SafeDumper):
    """Writes text such as 1e4 in quotes, which YAML 1.1 does not take for a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"(?:{_DECIMAL.pattern})\Z"), [*"-+.0123456789"]
)


class _Document:
    """Builds the value of a document from the events of the parser."""

    def __init__(self, content: str | bytes) -> None:
        if len(content) > MOST_BYTES:
            raise _NotValid(f"it holds more than {MOST_BYTES / 1e6:g} MB")
        try:
            text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
            text.encode()  # bytes of the command line that are not UTF-8 are lone surrogates
        except UnicodeError:
            raise _NotValid("it is not UTF-8") from None
        self._events: Iterator[Any] = iter(
            yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        )

    def value(self) -> Any:
        """The value; None of an empty document."""
        self._next()  # the start of the stream
        first = self._next()
        if isinstance(first, yaml.StreamEndEvent):
            return None
        value = self._build(self._next(), 1)
        self._next()  # the end of the document
        following = self._next()
        if not isinstance(following, yaml.StreamEndEvent):
            raise _NotValid("it holds more than one document", following.start_mark)
        return value

    def _next(self) -> Any:
        try:
            event = next(self._events)
        except yaml.MarkedYAMLError as error:
            raise _NotValid(error.problem or "syntax", error.problem_mark) from None
        except yaml.YAMLError as error:
            raise _NotValid(" ".join(str(getattr(error, "reason", error)).split())) from None
        if isinstance(event, yaml.AliasEvent):
            raise _NotValid("aliases are not allowed, repeat the value", event.start_mark)
        if getattr(event, "anchor", None) is not None:
            raise _NotValid("anchors are not allowed", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _NotValid("tags are not allowed", event.start_mark)
        return event

    def _build(self, event: Any, level: int) -> Any:
        """The value that begins with an event."""
        if level > MOST_LEVELS:
            raise _NotValid(f"more than {MOST_LEVELS} levels", event.start_mark)
        if isinstance(event, yaml.SequenceStartEvent):
            values = []
            while not isinstance(event := self._next(), yaml.SequenceEndEvent):
                values.append(self._build(event, level + 1))
            return values
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(level)
        return _scalar(event)

    def _mapping(self, level: int) -> dict[str | int, Any]:
        values: dict[str | int, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = _scalar(event) if isinstance(event, yaml.ScalarEvent) else None
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                raise _NotValid("a key must be text or a whole number", event.start_mark)
            if key in values:
                raise _NotValid(f"the key {shown(key)} is there twice", event.start_mark)
            values[key] = self._build(self._next(), level + 1)
        return values


def _scalar(event: Any) -> Any:
    """The value of a scalar: text in quotes, and what YAML 1.2 takes plain text for."""
    text: str = event.value
    if "\0" in text:
        raise _NotValid("text holds a zero character", event.start_mark)
    if not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        value = int(text) if len(text) <= _DIGITS + 1 else None
        if value is None or not -(2**63) <= value < 2**64:
            raise _NotValid(f"{shown(text)} is an integer beyond 64 bit", event.start_mark)
        return value
    if _DECIMAL.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise _NotValid(f"{shown(text)} is beyond the range of numbers", event.start_mark)
        return number
    special = _SPECIAL.fullmatch(text)
    if special is not None:
        return float(f"{special[1] or ''}inf") if special[2] else math.nan
    return text


def _content(path: Path, name: str) -> bytes:
    """The bytes of a file, of which no more are read than the reader takes."""
    check_file(path)
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
