"""Data that are made rather than read: `preprocess NAME` with options of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar

from molgen_energy.progress import ProgressCallback

Progress = ProgressCallback


class Dataset(ABC):
    """What `preprocess NAME` makes. A frozen dataclass: each field is an option of the command.

    The first line of its docstring is the command's help. Registered in `DATASETS`.
    """

    name: ClassVar[str]
    samples: ClassVar[str]
    """What there are many of."""
    output: ClassVar[str]
    """The file that is written where none is named."""

    @abstractmethod
    def write(self, output: Path, progress: Progress) -> str:
        """Make the data and write the file; returns what there is to say of it, in a line.

        Raises
        ------
        InputError
            An option does not serve, or the file cannot be written.
        """


def option(default: Any, text: str) -> Any:
    """A field of a source, with its default and the help of its option."""
    return field(default=default, metadata={"help": text})
