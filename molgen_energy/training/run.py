"""A run as an object: its folder, its end, its curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.config import Config
from molgen_energy.display.curves import COLOURS, Curve, plot
from molgen_energy.display.html import render
from molgen_energy.errors import InputError
from molgen_energy.output import display_path
from molgen_energy.tables import data_frame
from molgen_energy.training.metrics import read_columns
from molgen_energy.training.state import Progress


@dataclass(frozen=True)
class Run:
    """A run of training: what `train` returns and `load_run` reads.

    Functions that take the folder of a run take the object too: `sample(checkpoint=run)`. A
    notebook shows its values and curves.
    """

    folder: Path
    """With checkpoints, configuration and `metrics.csv`."""
    steps: int
    """Steps that it has taken."""
    seconds: float
    """Training time of all of them, in s."""
    valid_loss: float | None
    """Of the last validation."""
    skipped: int
    """Steps whose loss or gradient was not finite."""
    config: Config
    """Without `auto`."""
    already_complete: bool = False
    """Whether a resumed run had no step left."""
    best_step: int | None = None
    """Steps of its checkpoint `best`; None without validation data."""
    best_valid: float | None = None
    """Validation loss of that one."""

    @classmethod
    def of(
        cls, folder: Path, at: Progress, config: Config, *, already_complete: bool = False
    ) -> Run:
        """The run of a `folder` and a `config`, as far as its last checkpoint is.

        Parameters
        ----------
        at
            Progress of that checkpoint.
        already_complete
            As of the run.
        """
        return cls(
            folder,
            at.step,
            at.seconds,
            at.last_valid,
            at.skipped,
            config,
            already_complete,
            at.best_step,
            at.kept_valid,
        )

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """The columns of `metrics.csv`, (R,) for its R rows; NaN where a row has no value.

        `step`, `epoch`, `loss`, the terms of the loss, `valid_loss`, `gradient_norm`, `lr`,
        `samples_per_second`, `seconds`, and `skipped`. Read anew each time, so a run in progress
        can be watched.

        Raises
        ------
        InputError
            The run has none yet, or a value is no number.
        """
        path = self.folder / "metrics.csv"
        if not path.is_file():
            raise InputError(f"{self.folder} has no metrics.csv; it stopped before its first row")
        return read_columns(path)

    def to_pandas(self) -> Any:
        """The metrics as a pandas `DataFrame`, one row for each of `metrics.csv`.

        Raises
        ------
        InputError
            pandas is not installed, or as of `metrics`.
        """
        return data_frame(self.metrics)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._facts().items())

    def _facts(self) -> dict[str, str]:
        minutes = self.seconds / 60
        time = f"{self.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} minutes"
        facts = {"run": display_path(self.folder), "steps": f"{self.steps:,}", "time": time}
        if self.valid_loss is not None:
            facts["validation loss"] = f"{self.valid_loss:.4g}"
        if self.best_valid is not None and self.config.training.sample_from == "best":
            facts["best"] = f"{self.best_valid:.4g} at step {self.best_step:,}"
        if self.skipped:
            facts["skipped steps"] = f"{self.skipped:,}"
        loss = getattr(self.config, "loss", None)
        model = getattr(self.config, "model", None)
        if loss is not None and model is not None:
            facts |= {"loss": str(loss.name), "model": str(model.name)}
        return facts

    def _repr_html_(self) -> str:
        try:
            columns = self.metrics
        except InputError:
            columns = {}
        step = columns.get("step", np.zeros(0))
        losses = [
            Curve(label, step, columns[name], dots)
            for name, label, dots in (
                ("loss", "training loss", False),
                ("valid_loss", "validation loss", True),
            )
            if name in columns and np.isfinite(columns[name]).any()
        ]
        rate = [Curve("learning rate", step, columns["lr"])] if "lr" in columns else []
        plots = [
            {
                "legend": [
                    (curve.name, COLOURS[k % len(COLOURS)]) for k, curve in enumerate(curves)
                ],
                "svg": svg,
            }
            for curves, logarithmic in ((losses, True), (rate, False))
            if (svg := plot(curves, ", ".join(c.name for c in curves), "step", logarithmic))
        ]
        return render("run.html.j2", facts=self._facts(), plots=plots)
