"""The callback through which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int, int | None], None]
"""Called as progress(done, total): samples finished so far, and all of them, None if unknown."""


def no_progress(done: int, total: int | None) -> None:
    """Report to nobody."""
