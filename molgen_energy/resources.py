"""Where the files that ship beside the code are found: `configs/` and `assets/`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource_directory(kind: str) -> Path:
    """Directory of the shipped `configs` or `assets`.

    A wheel installs them inside the package; a checkout (and so an editable install) has them
    beside it.
    """
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def bundled_sample() -> Path:
    """The sample of QM9 that ships with the package: 1,000 training, 200 valid, 800 test."""
    return asset("qm9_sample.h5")


def asset(name: str) -> Path:
    """Path of a shipped asset, for instance ``qm9_sample.h5``."""
    return resource_directory("assets") / name
