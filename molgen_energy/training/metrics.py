"""`metrics.csv` of a run, and TensorBoard if it is installed."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError
from molgen_energy.formats.parts import check_part
from molgen_energy.output import atomic_replace, open_to_append

_MOST_LINE = 1 << 20  # characters
_BEFORE = ("step", "epoch", "loss")
_AFTER = ("valid_loss", "gradient_norm", "lr", "samples_per_second", "seconds", "skipped")
"""Columns before and after the terms of the loss. `seconds` is training time, over all resumptions;
`skipped` counts all steps whose loss or gradient was not finite."""


class MetricsLog:
    """Append rows to `metrics.csv`; a resumed run first drops the rows after its checkpoint.

    `loss_terms` are the columns of the terms of the loss.
    """

    def __init__(self, run: Path, step: int, loss_terms: Sequence[str]) -> None:
        self._path = run / "metrics.csv"
        self._columns = (*_BEFORE, *loss_terms, *_AFTER)
        rows = _rows_before(self._path, step) if self._path.exists() else ()
        with (
            atomic_replace(self._path, own=True) as output,
            output.temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(self._columns)
            # Runs of older versions have other columns.
            writer.writerows([row.get(name, "") for name in self._columns] for row in rows)
        self._board = _tensorboard(run, step)

    def write(self, **values: float | int | None) -> None:
        """Append a row; missing columns stay empty."""
        row = ["" if values.get(name) is None else _text(values[name]) for name in self._columns]
        with open_to_append(self._path) as file:
            csv.writer(file).writerow(row)
        if self._board is not None:
            for name, value in values.items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> Iterator[dict[str, str]]:
    """Iterate over the rows of a `metrics.csv`: strings by column, empty ones where one is missing.

    Raises
    ------
    InputError
        The file is a pipe or a device, or no table.
    """
    check_part(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(_lines(file))
    except (csv.Error, UnicodeError) as error:
        raise InputError(
            f"{path} is no table ({error}); mend {path.name}, or move it away"
        ) from error


def _lines(file: IO[str]) -> Iterator[str]:
    while line := file.readline(_MOST_LINE):
        if len(line) == _MOST_LINE:
            raise csv.Error(f"a line of more than {_MOST_LINE:,} characters")
        yield line


def _rows_before(path: Path, step: int) -> Iterator[dict[str, str]]:
    """The rows up to a step; a kill can leave half a last line, which is after the checkpoint."""
    rows = (row for row in read_metrics(path) if row.get("skipped"))
    for number, row in enumerate(rows, start=1):
        if re.fullmatch("[0-9]{1,18}", row.get("step") or "") is None:
            raise InputError(f"{path}: row {number} has no step; mend {path.name}, or move it away")
        if int(row["step"]) <= step:
            yield row


def read_columns(path: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of a `metrics.csv`, (R,) for its R rows; NaN where a row has no value.

    Without a row there are no columns.

    Raises
    ------
    InputError
        A value is no number, or as of `read_metrics`.
    """
    # A row that is being written now may be cut off.
    rows = [row for row in read_metrics(path) if None not in row.values()]
    try:
        return {
            name: np.array([float(row[name] or math.nan) for row in rows], np.float64)
            for name in (rows[0] if rows else ())
        }
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


def loss_terms(columns: Iterable[str]) -> list[str]:
    """The columns of the terms of the loss among those of a `metrics.csv`."""
    return [name for name in columns if name not in (*_BEFORE, *_AFTER)]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _tensorboard(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `tensorboard` is not installed
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
