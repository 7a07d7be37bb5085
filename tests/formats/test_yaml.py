"""The strict reader of YAML, and declarations of documents."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Annotated

import pytest
import yaml
from pydantic import Field

from molgen_energy.api.formats import FORMATS
from molgen_energy.config import parse_assignments
from molgen_energy.errors import InputError
from molgen_energy.formats.yaml import (
    MOST_BYTES,
    MOST_LEVELS,
    Schema,
    YAMLFormat,
    dump_yaml,
    load_yaml,
    read_as,
    validate_as,
)
from molgen_energy.resources import resource_directory
from molgen_energy.systems.registry import load_config

SHIPPED = sorted(
    [*resource_directory("configs").glob("*.yaml"), *resource_directory("assets").rglob("*.yaml")]
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_documents_are_read_as_pyyaml_reads_them(path):
    assert load_yaml(path) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1), ("-7", -7), ("+3", 3), ("0", 0), ("-0.0", -0.0), (f"{2**64 - 1}", 2**64 - 1),
        ("1e-4", 1e-4), ("1E3", 1000.0), (".5", 0.5), ("2.", 2.0), ("1.5e+3", 1500.0),
        (".inf", math.inf), ("-.inf", -math.inf), ("true", True), ("False", False), ("~", None),
        ("null", None), ("", None), ("# nothing", None), ("'1'", "1"), ('"true"', "true"),
        # Numbers of YAML 1.1 or of Python alone, and what looks like a truth value, are text.
        ("010", "010"), ("1_0", "1_0"), ("0x1F", "0x1F"), ("1:30", "1:30"), ("٣", "٣"),
        ("1e", "1e"), ("no", "no"), ("on", "on"), ("2020-01-01", "2020-01-01"), ("1e4_0", "1e4_0"),
        ("[H, No, Y]", ["H", "No", "Y"]), ("{3: 1, a: [{b: c}]}", {3: 1, "a": [{"b": "c"}]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
    ],
)  # fmt: skip
def test_values(text, value):
    found = load_yaml(text)
    assert found == value and type(found) is type(value)


def test_not_a_number():
    assert math.isnan(load_yaml(".nan"))


def bomb() -> str:
    """An alias of an alias … that would be 10⁹ texts."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 10)]
    return "\n".join(lines)


REFUSED = {
    "anchor": ("a: &b 1", "line 1: anchors are not allowed"),
    "alias": ("a: *b", "line 1: aliases are not allowed"),
    "bomb": (bomb(), "line 1: anchors are not allowed"),
    "tag": ("a: !!python/object/apply:os.system [id]", "line 1: tags are not allowed"),
    "local tag": ("- 1\n- !x 2", "line 2: tags are not allowed"),
    "twice": ("lr: 1\nsteps: 2\nlr: 3", "line 3: the key 'lr' is there twice"),
    "twice within": ("a: {b: 1, b: 2}", "the key 'b' is there twice"),
    "same number": ("1: a\n1: b", "line 2: the key 1 is there twice"),
    "list as a key": ("? [1]\n: 2", "a key must be text or a whole number"),
    "truth as a key": ("true: 2", "a key must be text or a whole number"),
    "integer": (f"a: {2**64}", "'18446744073709551616' is an integer beyond 64 bit"),
    "negative integer": (f"a: -{2**63 + 1}", "an integer beyond 64 bit"),
    "huge integer": ("a: " + "9" * 1_000_000, "999…' is an integer beyond 64 bit"),
    "infinite": ("a: 1e999", "'1e999' is beyond the range of numbers"),
    "lists": ("[" * 100_000, f"more than {MOST_LEVELS} levels"),
    "blocks": ("- " * 100_000, f"more than {MOST_LEVELS} levels"),
    "mappings": ("{a: " * 100_000, f"more than {MOST_LEVELS} levels"),
    "large": ("#" * (MOST_BYTES + 1), "more than 2 MB"),
    "two documents": ("--- 1\n--- 2", "line 2: it holds more than one document"),
    "cut off": ("a: [1,", "did not find expected node content"),
    "control character": ("a: \x1b", "control characters are not allowed"),
    "zero character": (r'a: "\0"', "text holds a zero character"),
    "latin-1": (b"a: \xe9", "it is not UTF-8"),
    "utf-16": ("a: 1".encode("utf-16"), "it is not UTF-8"),
    "byte of an argument": ("a: \udce9", "it is not UTF-8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_documents_that_are_refused(what):
    text, message = REFUSED[what]
    began = time.perf_counter()
    with pytest.raises(InputError) as caught:
        load_yaml(text, "x.yaml")
    assert time.perf_counter() - began < 1
    assert str(caught.value).startswith("x.yaml is not YAML: ") and message in str(caught.value)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_files_that_are_refused(tmp_path):
    for name, made in {
        "large": lambda path: path.write_bytes(b" " * (MOST_BYTES + 1)),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "circle": lambda path: path.symlink_to(path),
    }.items():
        made(tmp_path / name)
        with pytest.raises(InputError, match=name):
            load_yaml(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "1e4",
        "-1e4",
        ".5",
        "1.",
        "no",
        "010",
        "1_0",
        "null",
        "~",
        "",
        "1:30",
        "a: b",
        "<<",
        "=",
        "é",
    ],
)
def test_text_stays_text_in_a_written_document(text):
    assert load_yaml(dump_yaml({"a": text})) == {"a": text}
    assert yaml.safe_load(dump_yaml({"a": text})) == {"a": text}


def test_values_of_set_are_read_by_the_same_reader():
    assert parse_assignments(["a.b=1e-4", "c=[H, No]"]) == {"a.b": 1e-4, "c": ["H", "No"]}
    for text in ("a=&x 1", "a=!!int 1", "a={b: 1, b: 2}", "a=[", "a=\udce9"):
        with pytest.raises(InputError, match=r"--set a=.*: the value is not YAML: "):
            parse_assignments([text])


@pytest.mark.parametrize("text", ["true", "'0.1'", "1_0", "٣", "[0.1]", "null"])
def test_numbers_of_a_configuration_are_numbers(text):
    for key in ("training.lr", "model.layers", "training.ema_decay", "loss.springs.scale"):
        with pytest.raises(InputError, match=rf"{key}: ".replace(".", r"\.")):
            load_config("quick").replaced(parse_assignments([f"{key}={text}"]))


def test_whole_numbers_may_have_an_exponent():
    config = load_config("quick").replaced(parse_assignments(["training.steps=1e3"]))
    assert config.training.steps == 1000
    with pytest.raises(InputError, match=r"training\.steps: .*\(it is 1500\.5\)"):
        config.replaced({"training.steps": 1500.5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.layers=100000000000", r"model\.layers: .*less than or equal to 1000"),
        ("process.steps=2147483648", r"process\.steps: .*less than or equal to 1000000"),
        ("loss.name=[[1, 2], [3]]", r"unknown loss 'a list of 2'"),
        (f"loss.name={'x' * 100_000}", r"unknown loss 'x{60}…' \(valid"),
        (f"{'x' * 100_000}=1", r"unknown config key 'x{60}…'"),
        (f"training.lr={'x' * 100_000}", r"training\.lr: .* \(it is 'x{60}…'\)$"),
        (f"objective.position_weight={'x' * 100_000}", r"or auto, not 'x{60}…'$"),
    ],
)
def test_messages_about_a_configuration_are_short(change, message):
    with pytest.raises(InputError, match=message) as caught:
        load_config("quick").replaced(parse_assignments([change]))
    assert len(str(caught.value)) < 400


class Inner(Schema):
    share: Annotated[float, Field(ge=0, le=1)] = 0.0


class Outer(Schema):
    count: Annotated[int, Field(ge=1)]
    inner: Inner = Inner()
    names: dict[str, int] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a.yaml: expected keys and values, found a list of 0; mend it"),
        ("", "a.yaml: expected keys and values, found null; mend it"),
        ("{}", "a.yaml: expected the key 'count', which is missing; mend it"),
        ("{count: true}", "key 'count': expected a valid integer, found true"),
        ("{count: '1'}", "key 'count': expected a valid integer, found '1'"),
        ("{count: 0}", "key 'count': expected greater than or equal to 1, found 0"),
        ("{count: 1, other: 2}", "unknown key 'other'"),
        ("{count: 1, inner: {share: 2}}", "key 'inner.share': expected less than or equal to 1"),
        ("{count: 1, inner: 5}", "key 'inner': expected a valid dictionary"),
        (
            "{count: 1, names: {a: [1]}}",
            "key 'names.a': expected a valid integer, found a list of 1",
        ),
        ("{count: 1, names: {1: 1}}", "key 'names.1.[key]': expected a valid string, found 1"),
        (f"{{count: {'x' * 100_000}}}", "x…'; mend it"),
    ],
)
def test_documents_that_are_not_as_declared(text, message):
    with pytest.raises(InputError) as caught:
        read_as(Outer, text, "mend it", "a.yaml")
    assert str(caught.value).startswith("a.yaml: ") and message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_document_as_declared(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("count: 3\ninner: {share: 1}\nnames: {a: 2}\n")
    found = read_as(Outer, tmp_path / "a.yaml", "mend it")
    assert found == Outer(count=3, inner=Inner(share=1.0), names={"a": 2})
    with pytest.raises(InputError, match=r"a\.yaml does not exist; mend it"):
        read_as(Outer, tmp_path / "no" / "a.yaml", "mend it")
    with pytest.raises(InputError, match="b: expected the key 'count'"):
        validate_as(Outer, {}, "b", "mend it")


def test_every_key_of_a_format_is_explained():
    """The page of formats prints what the declarations say."""
    for name, declared in FORMATS.items():
        if isinstance(declared, YAMLFormat):
            schema = declared.schema.model_json_schema()
            for part in (schema, *schema.get("$defs", {}).values()):
                for key, entry in part["properties"].items():
                    assert entry.get("description"), (name, key)
