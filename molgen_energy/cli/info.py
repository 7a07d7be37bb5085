"""`molgen-energy info`: what is installed, for a first look and for reports of bugs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.console import show

if TYPE_CHECKING:
    from molgen_energy.api.info import Device, Extra, Installation

EXAMPLES = """
molgen-energy info
molgen-energy info --json
"""


def command(
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show versions, devices, optional packages, pretrained weights and configurations."""
    from molgen_energy.api.info import installation

    found = installation()
    if as_json:
        show(json.dumps(found.to_dict(), indent=2))
        return
    _print_table("", list(_general(found)))
    _print_table("devices (--device)", [(d.name, _device(d)) for d in found.devices])
    _print_table("extras", [(extra.name, _extra(extra)) for extra in found.extras])
    _print_table(
        "pretrained weights (sample --checkpoint)",
        [
            (w.name, f"{w.summary}{'' if w.is_intact else ' — damaged, install again'}")
            for w in found.weights
        ],
    )
    _print_table("configurations (train --config)", [("", ", ".join(found.configurations))])
    _print_table("caches", [(what, _short(folder)) for what, folder in found.caches.items()])


def _general(found: Installation) -> Iterator[tuple[str, str]]:
    yield "molgen-energy", f"{found.version}, in {_short(found.folder)}"
    yield "Python", f"{found.python}, {found.system}"
    packages = [f"{name} {version}" for name, version in found.packages.items() if version]
    yield "packages", ", ".join(packages)
    if found.newest_run is not None:
        yield "newest run", f"{found.newest_run}; `sample` takes it by default"


def _device(device: Device) -> str:
    if device.free_memory is None:
        return device.description
    return f"{device.description}, {device.free_memory / 2**30:.1f} GiB free"


def _extra(extra: Extra) -> str:
    if extra.is_installed:
        versions = ", ".join(f"{name} {version}" for name, version in extra.versions.items())
        return f"installed: {versions}"
    return f"missing: {extra.command} ({extra.purpose})"


def _short(path: Path) -> str:
    """The path, with ~ for the home folder: people post this output in public."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        indented = f"  {name}" if title else name
        table.add_row(escape(indented), escape(text))
    if title:
        show(Text(f"\n{title}", "bold"))
    show(table)
