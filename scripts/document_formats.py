"""Writes docs/formats.md from the declarations of all formats.

    python scripts/document_formats.py

The page says what the readers check, since both come from the same declarations.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from molgen_energy.api.formats import FORMATS
from molgen_energy.formats.declaration import (
    AttributeSpec,
    DatasetSpec,
    HDF5Format,
    Size,
    shape_text,
)
from molgen_energy.formats.npz import NpzFormat
from molgen_energy.formats.yaml import Schema, YAMLFormat
from molgen_energy.output import atomic_write

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"

_INTRODUCTION = """# File formats

`scripts/document_formats.py` writes this page from the declarations that check each file when it
is opened. A file that is not as declared is refused with one line that names the file, the place,
what was expected, and a remedy. [Prepare data](how_to/data.md) says how files of molecules are
made, and [Security](../SECURITY.md) what files of other people can and cannot do.

**HDF5 files.** Each data set lies in the file itself, in one piece or in chunks, uncompressed or
with gzip, shuffle and checksums. Links, external storage, virtual data sets, named types, other
filters, and chunks that are declared and not stored are refused. What is not declared is not read.
Sizes are compared with those of the file and with the available memory before memory is taken.
Numbers may have any size up to 64 bits and any order of bytes; the type below is what this package
writes. In shapes a symbol stands for one number in the whole file, and `*` for any number.

**Archives.** An `.npz` is read without pickles, and no more of it than its headers declare.

**YAML files** have no anchors, tags or duplicate keys; `molgen_energy/formats/yaml.py` says what a
scalar is.
"""
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


def page() -> str:
    """The page."""
    parts = [_INTRODUCTION]
    described: set[type] = {Schema}
    for declared in FORMATS.values():
        parts.append(f"## {declared.title}\n\n{declared.purpose}\n")
        if isinstance(declared, YAMLFormat):
            bases = declared.schema.__mro__[1:]
            base = next(base for base in bases if base in described)
            shared = base.model_fields
            rows = list(keys(declared.schema, without=shared))
            if shared:
                names = ", ".join(f"`{name}`" for name in shared)
                parts.append(f"{names} as above{', and:' if rows else '.'}\n")
            if rows:
                parts.append(table(("key", "value", "required", "meaning"), rows))
            described.update(bases)
            continue
        parts.append(sizes(declared.sizes.items()))
        if isinstance(declared, NpzFormat):
            parts.append(arrays("array", declared.arrays))
            continue
        parts += [arrays("data set", declared.datasets), attributes(declared)]
        if declared.relations:
            rules = "\n".join(f"- {relation.text}" for relation in declared.relations)
            parts.append(f"Checked besides:\n\n{rules}\n")
    return "\n".join(parts)


def sizes(declared: Iterable[tuple[str, Size]]) -> str:
    """What symbols count."""
    words = (
        f"{symbol} {size.meaning}{f', at least {size.low}' if size.low > 1 else ''}"
        for symbol, size in declared
    )
    return "; ".join(words) + ".\n"


def arrays(name: str, specs: tuple[DatasetSpec, ...]) -> str:
    """A table of data sets."""
    rows = []
    for spec in specs:
        own = "; ".join(f"attribute `{a.name}`: {a.meaning}" for a in spec.attributes)
        unit = f", {spec.unit}" if spec.unit else ""
        meaning = f"{spec.meaning}{unit}{f' ({own})' if own else ''}"
        with_group = f"with `{spec.required_with}`" if spec.required_with else "no"
        required = "yes" if spec.required else with_group
        kind = "text" if spec.kind == "text" else spec.read_dtype.name
        rows.append(
            (f"`{spec.name}`", shape_text(spec.shape), kind, spec.values, required, meaning)
        )
    return table((name, "shape", "type", "values", "required", "meaning"), rows)


def attributes(declared: HDF5Format) -> str:
    """A table of attributes, with those that tell formats apart."""
    first: tuple[AttributeSpec, ...] = ()
    if declared.schema is not None:
        first = (
            AttributeSpec("schema", "integer", f"{declared.schema}, the version of the format"),
            AttributeSpec("system", "text", "physical system", choices=(str(declared.system),)),
        )
    rows = []
    for spec in (*first, *declared.attributes):
        name = f"`{spec.name}`" + (f" of `{spec.of}`" if spec.of else "")
        value = f"JSON: {kind_text(spec.json)}" if spec.kind == "json" else spec.expected
        rows.append((name, value, "yes" if spec.required else "no", spec.meaning))
    return table(("attribute", "value", "required", "meaning"), rows)


def keys(
    schema: type[BaseModel], prefix: str = "", without: Collection[str] = ()
) -> Iterator[tuple[str, str, str, str]]:
    """A row for each key of a schema, without some, and for the keys of mappings in it."""
    for name, field in schema.model_fields.items():
        if name in without:
            continue
        required = "yes" if field.is_required() else "no"
        meaning = " ".join((field.description or "").split())
        yield f"`{prefix}{name}`", kind_text(field.annotation, field.metadata), required, meaning
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from keys(inner, f"{prefix}{name}.")


def kind_text(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """A type and its bounds in words: `integer from 2 to 3`, `list (text)`, `number or null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        outer = [m for each in inner[1:] for m in getattr(each, "metadata", [each])]
        return kind_text(inner[0], outer)
    if origin in (Union, types.UnionType):
        return " or ".join(kind_text(each) for each in inner)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        return f"list ({'; '.join(kind_text(each) for each in inner)})"
    if origin is dict:
        return f"mapping ({kind_text(inner[0])}: {kind_text(inner[1])})"
    return _WORDS.get(kind, "mapping") + bounds(metadata)


def bounds(metadata: Iterable[Any]) -> str:
    """What values the constraints of a field allow."""
    found = {
        name: getattr(each, name)
        for each in metadata
        for name in ("ge", "gt", "le", "lt", "pattern")
        if getattr(each, name, None) is not None
    }
    if {"ge", "le"} <= found.keys():
        return f" from {number(found['ge'])} to {number(found['le'])}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "pattern": "like"}
    texts = [
        f"{words[name]} {f'`{value}`' if name == 'pattern' else number(value)}"
        for name, value in found.items()
    ]
    return f" {' and '.join(texts)}" if texts else ""


def number(value: float) -> str:
    """A bound; large powers of two as such."""
    power = int(value).bit_length() - 1
    return f"2^{power}" if power > 30 and value == 2**power else f"{value:,}"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    atomic_write(PAGE, page().encode())
    print(f"{PAGE} describes {len(FORMATS)} formats")
