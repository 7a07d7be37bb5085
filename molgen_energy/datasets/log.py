"""What a dataset of molecules reports while it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.progress import ProgressCallback, no_progress


class DatasetLog:
    """What a dataset of molecules reports while it is read."""

    MOST_NAMED = 5

    def __init__(
        self, progress: ProgressCallback = no_progress, output: Path = Path("molecules.h5")
    ) -> None:
        self.progress = progress
        self.output = output
        """The file that is written."""
        self.skipped: list[str] = []
        self.skipped_count = 0
        self.file = ""
        """The file of the chunk, where a dataset has several."""
        self.locate: Callable[[int], str] = "record {}".format
        """Names a record by its number."""
        self.names: NDArray[np.str_] | None = None
        """Names of all records by number, from 1, where they have some."""
        self.notes: list[str] = []
        """What may be wrong, apart from the molecules themselves."""
        self.facts: list[str] = []
        """What the summary says of the molecules."""
        self.counts: Counter[str] = Counter()
        """How many records were left out or changed by an option, by what the summary says."""

    def skip(self, record: str) -> None:
        """Report a record that is left out, and why; the first are named."""
        if len(self.skipped) < self.MOST_NAMED:
            self.skipped.append(record)
        self.skipped_count += 1
