"""`metrics.csv` of a run, and TensorBoard if it is installed."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molgen_energy.errors import InputError
from molgen_energy.formats.limits import check_memory
from molgen_energy.formats.parts import check_part
from molgen_energy.output import atomic_replace, open_to_append

_MEMORY_FACTOR = 20  # of the rows in memory, by the size of the file
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
        rows = _rows_before(self._path, step) if self._path.exists() else []
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


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a `metrics.csv` as strings by column; missing values are empty strings.

    Raises
    ------
    InputError
        The file is a pipe or a device, too large for the memory, or no table.
    """
    remedy = f"mend {path.name}, or move it away"
    size = check_part(path)
    check_memory(_MEMORY_FACTOR * size, f"reading {path}", remedy)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (csv.Error, UnicodeError) as error:
        raise InputError(f"{path} is no table ({error}); {remedy}") from error


def _rows_before(path: Path, step: int) -> list[dict[str, str]]:
    """The rows up to a step; a kill can leave half a last line, which is after the checkpoint."""
    rows = [row for row in read_metrics(path) if row.get("skipped")]
    for number, row in enumerate(rows, start=1):
        if re.fullmatch("[0-9]{1,18}", row.get("step") or "") is None:
            raise InputError(f"{path}: row {number} has no step; mend {path.name}, or move it away")
    return [row for row in rows if int(row["step"]) <= step]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _tensorboard(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `tensorboard` is not installed
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
