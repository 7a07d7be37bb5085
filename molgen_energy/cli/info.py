"""`molgen-energy info`: what is installed, for a first look and for reports of bugs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.console import show, show_pairs

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
    show_pairs(list(_general(found)))
    show_pairs([(d.name, _device(d)) for d in found.devices], "devices (--device)")
    show_pairs([(extra.name, _extra(extra)) for extra in found.extras], "extras")
    show_pairs(
        [
            (w.name, f"{w.summary}{'' if w.is_intact else ' — damaged, install again'}")
            for w in found.weights
        ],
        "pretrained weights (sample --checkpoint)",
    )
    show_pairs([("", ", ".join(found.configurations))], "configurations (train --config)")
    show_pairs([(what, _short(folder)) for what, folder in found.caches.items()], "caches")


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
