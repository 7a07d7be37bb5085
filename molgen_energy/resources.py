"""Paths of the files that ship with the package: `configs/` and `assets/`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource_directory(kind: str) -> Path:
    """Directory of the shipped `configs` or `assets`.

    A wheel installs them inside the package. In a checkout, and so in an editable installation,
    they are beside the package.
    """
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def bundled_sample() -> Path:
    """The QM9 sample that ships with the package: 1,000 training, 200 validation, 800 test."""
    return asset("qm9_sample.h5")


def asset(name: str) -> Path:
    """Path of a shipped asset, for instance ``qm9_sample.h5``."""
    return resource_directory("assets") / name
