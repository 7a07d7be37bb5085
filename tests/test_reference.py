"""Every public name is documented: parameters, shapes of arrays, errors, source of equations."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
from torch import Tensor

import molgen_energy
from molgen_energy.api.reference import PAGES, resolve

ENTRIES = [name for page in PAGES for name in page.entries]
SHAPE = re.compile(r"\([A-ZΣ…][\w+Σ²…]*(?:, ?[\w+Σ²…]+)*,?\)|\(\w+(?:, \w+)+\)")
SOURCE = re.compile(r"\b(?:19|20)\d\d\b|arXiv|as published|the paper|equation")
WITHOUT_SOURCE = {
    "Edges", "Loss", "Neighbours", "PointwiseLoss", "PositionLoss", "ResolvedLoss", "Denoiser",
    "CompleteEdges", "BondEdges", "MeanAbsoluteError", "MeanSquaredError", "MLP", "ResNet",
    "ChiralityError", "GDMPairs",
}  # fmt: skip
"""Base classes, textbook formulas, and what this package is the first to define."""
FREE = {"self", "cls", "args", "kwargs", "options", "inputs"}


def functions(name: str) -> Iterator[tuple[str, Any, str]]:
    """Functions of an entry with their names and docstrings: itself, or the methods of a class."""
    found = resolve(name)
    if inspect.isfunction(found):
        yield name, found, found.__doc__ or ""
    elif inspect.isclass(found):
        for key, member in vars(found).items():
            method = member.fget if isinstance(member, property) else member
            method = getattr(method, "__func__", method)
            if not key.startswith("_") and inspect.isfunction(method):
                bases = [vars(base)[key] for base in found.__mro__ if key in vars(base)]
                docs = [base.__doc__ for base in bases if base.__doc__]
                yield f"{name}.{key}", method, "\n".join(docs)


def raised(function: Any) -> set[str]:
    """Names of the errors that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names, caught = set(), {"NotImplementedError", "AttributeError"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            names.add(ast.unparse(node.exc.func))
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            caught |= {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
    return names - caught


def faults(where: str, function: Any, doc: str, text: str, many: int) -> Iterator[str]:
    """What is missing in the docstring of a function; `text` is that of its class.

    A function of at most `many` parameters need not name them.
    """
    if not doc:
        yield f"{where}: no docstring"
        return
    signature = inspect.signature(function)
    if len(signature.parameters) > many:
        for parameter in signature.parameters.keys() - FREE:
            if not re.search(rf"\b{parameter}\b", doc + text):
                yield f"{where}: no word on {parameter}"
    for error in raised(function):
        if error not in doc:
            yield f"{where}: raises {error}"
    own = inspect.getmodule(function).__doc__ or ""
    annotations = [parameter.annotation for parameter in signature.parameters.values()]
    for annotation in [*annotations, signature.return_annotation]:
        is_array = re.search(r"Tensor|NDArray|ArrayLike", str(annotation))
        stated = SHAPE.search(doc + text + own) or re.search(r"\b[Ss]hapes?\b", doc)
        if is_array and not stated:
            yield f"{where}: no shape for {annotation}"


def documented_constants(module: str) -> set[str]:
    """Names that an assignment of the module gives a docstring."""
    body = ast.parse(inspect.getsource(import_module(module))).body
    found = set()
    for statement, after in pairwise(body):
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_list_holds_every_function_of_the_package():
    assert {n.rpartition(".")[2] for n in ENTRIES} >= set(molgen_energy.__all__) - {"__version__"}
    assert len(ENTRIES) == len(set(ENTRIES))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_public_name_is_documented(name):
    found = resolve(name)
    module, _, attribute = name.rpartition(".")
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        source = module
        if attribute not in documented_constants(module):  # imported into the package
            tree = ast.parse(inspect.getsource(import_module(module)))
            source = next(
                statement.module for statement in ast.walk(tree)
                if isinstance(statement, ast.ImportFrom)
                and attribute in [alias.name for alias in statement.names]
            )  # fmt: skip
        assert attribute in documented_constants(source), "a text below the assignment"
        return
    text = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    assert text and text.strip().splitlines()[0].rstrip().endswith((".", ":", ",")), "a docstring"
    many = 2 + inspect.isclass(found)
    every = [fault for item in functions(name) for fault in faults(*item, text, many)]
    assert every == []


@pytest.mark.parametrize(
    "name",
    [n for n in ENTRIES if n.startswith(("molgen_energy.losses", "molgen_energy.models"))],
)
def test_an_equation_has_its_source(name):
    """The paper of a loss or a network, in its own docstring or that of its module."""
    found, attribute = resolve(name), name.rpartition(".")[2]
    if not inspect.isclass(found) or name.endswith("Config") or attribute in WITHOUT_SOURCE:
        return
    texts = [found.__doc__ or "", inspect.getmodule(found).__doc__ or ""]
    assert any(SOURCE.search(text) for text in texts)


def scaled(values: Tensor, factor: float, power: int) -> float:
    """The values, scaled."""
    if power < 0:
        raise KeyError(power)
    return float(factor * values**power)


def test_the_check_finds_what_is_missing():
    found = set(faults("f", scaled, scaled.__doc__, "", 2))
    assert found == {
        "f: no word on factor", "f: no word on power", "f: raises KeyError",
        "f: no shape for Tensor",
    }  # fmt: skip
    assert list(faults("f", scaled, "", "", 2)) == ["f: no docstring"]
