"""`metrics.csv` of a run, and TensorBoard if it is installed."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molgen_energy.output import atomic_replace

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
        rows = read_metrics(self._path) if self._path.exists() else []
        with (
            atomic_replace(self._path) as output,
            output.temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(self._columns)
            # A kill can leave half a last line; it is after the checkpoint.
            whole = [row for row in rows if row.get("skipped") and int(row["step"]) <= step]
            # Runs of older versions have other columns.
            writer.writerows([row.get(name, "") for name in self._columns] for row in whole)
        self._board = _tensorboard(run, step)

    def write(self, **values: float | int | None) -> None:
        """Append a row; missing columns stay empty."""
        row = ["" if values.get(name) is None else _text(values[name]) for name in self._columns]
        with self._path.open("a", newline="", encoding="utf-8") as file:
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
    """Rows of a `metrics.csv` as strings by column; missing values are empty strings."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def loss_terms(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns of the terms of the loss."""
    return [name for name in rows[0] if name not in (*_BEFORE, *_AFTER)]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _tensorboard(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `tensorboard` is not installed
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
