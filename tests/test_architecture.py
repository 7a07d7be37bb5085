"""Which parts of the package import which, and what the command line imports at its start."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import molgen_energy
from molgen_energy.metrics.evaluation import PRELOAD

ROOT = Path(molgen_energy.__file__).parent

LAYERS = (
    "__main__",
    "cli",
    "__init__",  # the public names, from `api`
    "api",
    "systems",
    "metrics",
    "training",
    "models",
    "diffusion",
    "losses",
    "display",
    "datasets",
    "chemistry",
    "data",
    "workers",
    "distributed",
    "config",
    "formats",
    "paths",
    "output",
    "elements",
    "resources",
    "tables",
    "progress",
    "errors",
)
"""Packages and top-level modules; each may import those that stand below it."""

HEAVY = ("torch", "rdkit", "h5py", "scipy", "matplotlib", "numpy", "pydantic")
"""Packages that would take most of the time of `molgen-energy --help`."""


class Import(NamedTuple):
    """One module that imports another, both as dotted names without the package's."""

    module: str
    imported: str


def layer(module: str) -> str:
    return module.partition(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Files of the package by dotted name: `losses.energy`; a package has that of its folder."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        names[".".join(parts)] = path
    return names


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, also those in functions, without those for type checkers alone."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from statements(ast.Module([statement], []))
        else:
            yield from statements(child)


def imported_names(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """Full dotted names that a statement imports."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert not statement.level, "relative import"
    return [f"{statement.module}.{alias.name}" for alias in statement.names]


@cache
def tree(module: str) -> ast.Module:
    """The syntax of a module."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    """Every import of one module of the package by another.

    The version number is the one name that modules may import from the package itself.
    """
    found = set()
    for module in modules():
        for statement in statements(tree(module)):
            for name in imported_names(statement):
                package, _, inner = name.partition(".")
                if package != "molgen_energy" or inner == "__version__":
                    continue
                while inner and inner not in modules():
                    inner = inner.rpartition(".")[0]
                found.add(Import(module, inner or "__init__"))
    return tuple(sorted(found - {Import(module, module) for module in modules()}))


def cycle(edges: Iterable[tuple[str, str]]) -> list[str] | None:
    """Nodes along a cycle of a graph, if it has one."""
    sorter = TopologicalSorter[str]()
    for node, successor in edges:
        sorter.add(node, successor)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def test_every_module_has_a_layer():
    assert {layer(module) for module in modules()} <= set(LAYERS)


def test_imports_point_downwards():
    """So there is no cycle between packages, in functions either."""
    position = {name: k for k, name in enumerate(LAYERS)}
    upwards = [
        f"{module} imports {imported}"
        for module, imported in imports()
        if position[layer(module)] > position[layer(imported)]
    ]
    assert not upwards, upwards


def test_formats_know_nothing_of_what_is_in_files():
    """So that what declares and checks files can be trusted by itself."""
    own = {imported for module, imported in imports() if layer(module) == "formats"}
    assert {layer(imported) for imported in own} <= {"formats", "output", "errors"}


def test_files_are_read_in_one_place():
    """HDF5, archives of NumPy, YAML and safetensors, whoever reads them."""
    loads = re.compile(r"(np|numpy|pickle|torch|yaml|safetensors\.\w+)\.(safe_)?load\w*")
    opens, readers = set(), set()
    for module in modules():
        for node in ast.walk(tree(module)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name == "h5py.File" and ast.unparse(node.args[1]) != "'w'":
                opens.add(module)
            elif loads.fullmatch(name):
                readers.add(module)
    assert opens == {"formats.hdf5"}
    # The pool reads what its own processes wrote.
    assert {layer(module) for module in readers} <= {"formats", "workers"}, readers
    for package, reader in (("yaml", "formats.yaml"), ("safetensors", "formats.tensors")):
        users = {
            module
            for module in modules()
            for statement in statements(tree(module))
            for name in imported_names(statement)
            if name.partition(".")[0] == package
        }
        assert users == {reader}, users


def test_no_cycle_between_packages():
    """Whatever their order in `LAYERS`."""
    edges = {(layer(module), layer(imported)) for module, imported in imports()}
    assert cycle(edge for edge in edges if edge[0] != edge[1]) is None


def test_no_cycle_between_files():
    assert cycle(imports()) is None


def test_imports_are_found():
    """The parser sees imports of every form, and leaves out those for type checkers."""
    source = """
import os, molgen_energy.errors
from molgen_energy import output
if TYPE_CHECKING:
    from molgen_energy.config import Config
else:
    from molgen_energy.progress import no_progress
class C:
    def f(self):
        try:
            from molgen_energy.losses import LOSSES, base
        except ImportError:
            pass
"""
    found = [
        name for statement in statements(ast.parse(source)) for name in imported_names(statement)
    ]
    assert found == [
        "os",
        "molgen_energy.errors",
        "molgen_energy.output",
        "molgen_energy.progress.no_progress",
        "molgen_energy.losses.LOSSES",
        "molgen_energy.losses.base",
    ]
    assert cycle([("a", "b"), ("b", "c"), ("a", "c")]) is None
    assert cycle([("a", "b"), ("b", "c"), ("c", "a")]) in (
        ["a", "b", "c", "a"],
        ["b", "c", "a", "b"],
        ["c", "a", "b", "c"],
    )


def test_worker_processes_import_little():
    """Each of them reads `__main__` and what `evaluate` works with."""
    used = ["molgen_energy.__main__", *PRELOAD]
    others = ("typer", "rich", "pydantic", "yaml", "h5py", "jinja2", "scipy", "torch", "matplotlib")
    program = f"import sys, {', '.join(used)}\nprint(*({set(others)} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_command_line_imports_nothing_heavy():
    """`molgen-energy --help` answers at once; commands import what they need."""
    program = (
        f"import sys, molgen_energy.cli\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
