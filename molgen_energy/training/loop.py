"""The training loop: one for every physical system.

A run's folder holds `config.yaml` (resolved), `metrics.csv`, `log.txt` and
`checkpoints/{last,best}`. All randomness of step k is drawn from a generator seeded with (seed, k),
and the batches of an epoch follow from (seed, epoch), so there is no random state to save, and a
resumed run takes the steps that an unbroken one would have taken.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from molgen_energy import __version__
from molgen_energy.config import Config, TrainingConfig
from molgen_energy.data.batches import Batch
from molgen_energy.diffusion.process import Terms
from molgen_energy.errors import InputError, TrainingFailed
from molgen_energy.output import remove
from molgen_energy.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from molgen_energy.training.clipping import GradientClipper
from molgen_energy.training.ema import ExponentialMovingAverage
from molgen_energy.training.metrics import MetricsLog


class Task(Protocol):
    """What the loop needs of a physical system."""

    config: Config
    """Without `auto`."""
    device: torch.device
    model: nn.Module
    state: dict[str, Any]
    """What a checkpoint carries so that it can be sampled from; `data.fingerprint` among it."""

    @property
    def batches_per_epoch(self) -> int: ...

    def epoch(self, epoch: int) -> Sequence[Batch]: ...

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Terms: ...

    def validation_loss(self, model: nn.Module) -> float | None: ...

    def close(self) -> None: ...


class Observer(Protocol):
    """Who is told how training goes."""

    def progress(self, step: int, steps: int, loss: float, samples_per_second: float) -> None: ...


class Stopped(Exception):
    """Training was interrupted and can be resumed; the checkpoint is written."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run: Path
    steps: int
    seconds: float
    valid_loss: float | None


@dataclass
class _Progress:
    """What the loop carries from step to step besides weights; written to `state.yaml`."""

    step: int = 0
    seconds: float = 0.0
    best_valid: float | None = None
    last_valid: float | None = None
    # Sums since the last row of metrics.csv, so that a row does not depend on where a run broke.
    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    count: int = 0


def total_steps(training: TrainingConfig, batches_per_epoch: int) -> int:
    """Length of a run in steps.

    Raises
    ------
    InputError
        The configuration gives both steps and epochs, or neither.
    """
    if (training.steps is None) == (training.epochs is None):
        raise InputError("give either training.steps or training.epochs, not both and not neither")
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return training.epochs * batches_per_epoch


def learning_rate(training: TrainingConfig, step: int, steps: int) -> float:
    """Rate of update number `step` (from 0): linear warm-up, then constant or half a cosine."""
    assert not isinstance(training.lr, str)
    rate = training.lr
    if step < training.warmup_steps:
        return rate * (step + 1) / training.warmup_steps
    if training.decay == "cosine":
        share = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * share))
    return rate


def train(task: Task, run: Path, observer: Observer, resume: bool = False) -> Summary:
    """Train until the configured step, writing the run's folder.

    Parameters
    ----------
    task
        Physical system with its resolved configuration; closed at the end, however that comes.
    run
        Folder of the run; when `resume` is false, a new one or an empty one.
    observer
        Told of progress.
    resume
        Go on from `run/checkpoints/last`; with the same task it takes the very steps that an
        unbroken run would have taken.

    Raises
    ------
    InputError
        The checkpoint does not fit the task, or data that is read on the way is broken.
    Stopped
        Interrupted by SIGINT or SIGTERM, behind a checkpoint.
    TrainingFailed
        The loss is not finite.
    """
    with closing(task):
        trainer = _Trainer(task, run, observer)
        made = not resume and _make_folder(run)
        try:
            trainer.start(resume)
        except BaseException:
            if made:
                remove(run)  # without its first checkpoint it is no run
            raise
        with _interruptible() as interrupted:
            return trainer.run(interrupted)


def _make_folder(run: Path) -> bool:
    """Make a run's folder, or take an empty one; returns whether it was made here."""
    try:
        run.mkdir(parents=True)
    except FileExistsError:
        if not run.is_dir() or any(run.iterdir()):
            raise InputError(f"{run} is there and not empty; name another --output") from None
        return False
    return True


class _Trainer:
    def __init__(self, task: Task, run: Path, observer: Observer) -> None:
        self.task, self.folder, self.observer = task, run, observer
        self.training = task.config.training
        self.steps = total_steps(self.training, task.batches_per_epoch)
        self.ema = ExponentialMovingAverage(task.model, self.training.ema_decay)
        self.clipper = GradientClipper()
        self.optimizer = torch.optim.AdamW(
            task.model.parameters(),
            lr=0.0,  # set at each step
            weight_decay=self.training.weight_decay,
            amsgrad=True,
            fused=task.device.type in ("cpu", "cuda"),
        )
        self.at = _Progress()

    # -- the run's folder ----------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        if resume:
            self._restore(load_checkpoint(self.folder))
        (self.folder / "config.yaml").write_text(self.task.config.to_yaml(), encoding="utf-8")
        self.metrics = MetricsLog(self.folder, self.at.step)
        if not resume:
            self._save("last")
        verb = "resume" if resume else "start"
        self._log(
            f"{verb} at step {self.at.step} of {self.steps} on {self.task.device} "
            f"(molgen-energy {__version__}, torch {torch.__version__})"
        )

    def _log(self, text: str) -> None:
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def _save(self, which: str) -> None:
        weights: dict[str, Mapping[str, Tensor]] = {
            "model": self.task.model.state_dict(),
            "ema": self.ema.model.state_dict(),
        }
        if which == "last":
            weights["optimizer"] = self._optimizer_tensors()
        at = self.at
        progress = vars(at) | {"sums": list(at.sums)}
        state = {"epoch": at.step // self.task.batches_per_epoch, "progress": progress}
        path = self.folder / "checkpoints" / which
        save_checkpoint(path, self.task.config, state | self.task.state, weights)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {"clipper/norms": self.clipper.state()}
        for name, parameter in self.task.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return tensors

    def _restore(self, checkpoint: Checkpoint) -> None:
        theirs, ours = checkpoint.state.get("data", {}), self.task.state["data"]
        if theirs.get("fingerprint") != ours["fingerprint"]:
            raise InputError(
                f"{checkpoint.path} was trained on other data ({theirs.get('source')}, "
                f"{theirs.get('training_molecules')} molecules) than is given now "
                f"({ours['source']}, {ours['training_molecules']}); name its data with --data"
            )
        checkpoint.load_weights(self.task.model, "model")
        load_weights(self.ema.model, checkpoint.tensors("ema"), checkpoint.path)
        tensors = checkpoint.tensors("optimizer")
        self.clipper.load(tensors.pop("clipper/norms"))
        for name, parameter in self.task.model.named_parameters():
            own = {k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
            for key, value in own.items():
                device = "cpu" if key == "step" and not _fused(self.optimizer) else parameter.device
                self.optimizer.state[parameter][key] = value.to(device)
        progress = checkpoint.state["progress"]
        self.at = _Progress(**progress | {"sums": tuple(progress["sums"])})

    # -- the loop ------------------------------------------------------------------------------

    def run(self, interrupted: threading.Event) -> Summary:
        began = time.perf_counter()
        before = self.at.seconds
        row_began, row_samples = began, 0
        self.task.model.train()
        try:
            for batch in self._batches():
                self._step(batch)
                row_samples += len(batch)
                now = time.perf_counter()
                self.at.seconds = before + now - began
                self.observer.progress(
                    self.at.step,
                    self.steps,
                    self.at.sums[0] / self.at.count,
                    row_samples / (now - row_began),
                )
                last = self.at.step == self.steps
                validate = last or self.at.step % self.training.validate_every == 0
                if validate:
                    self._validate()
                if validate or self.at.step % self.training.log_every == 0:
                    self._write_row(row_samples / (now - row_began))
                    row_began, row_samples = time.perf_counter(), 0
                if last or self.at.step % self.training.checkpoint_every == 0:
                    self._save("last")
                if interrupted.is_set() and not last:
                    self._save("last")
                    self._log(f"interrupted at step {self.at.step}")
                    raise Stopped(f"stopped at step {self.at.step} of {self.steps}")
        finally:
            self.metrics.close()
        self._log(f"finished at step {self.at.step}, {self.at.seconds:.0f} s of training")
        return Summary(self.folder, self.at.step, self.at.seconds, self.at.last_valid)

    def _batches(self) -> Iterator[Batch]:
        """The batches from the present step to the last."""
        while self.at.step < self.steps:
            epoch, done = divmod(self.at.step, self.task.batches_per_epoch)
            for batch in self.task.epoch(epoch)[done:]:
                if self.at.step == self.steps:
                    return
                yield batch

    def _step(self, batch: Batch) -> None:
        generator = torch.Generator(self.task.device)
        generator.manual_seed(_step_seed(self.training.seed, self.at.step))
        terms = self.task.loss(self.task.model, batch, generator)
        loss = terms.total.mean()
        values = torch.stack([loss, terms.positions.mean(), terms.features.mean()]).tolist()
        if not math.isfinite(values[0]):
            self._fail(f"the loss became {values[0]}")
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(self.task.model.parameters())
        norm = self.clipper.clip(parameters) if self.training.clip_gradients else _norm(parameters)
        if not math.isfinite(norm):
            self._fail(f"the gradient's norm became {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, self.at.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at.step += 1
        self.ema.update(self.task.model, self.at.step)
        old = self.at.sums
        self.at.sums = (old[0] + values[0], old[1] + values[1], old[2] + values[2], old[3] + norm)
        self.at.count += 1

    def _fail(self, what: str) -> NoReturn:
        text = f"{what} at step {self.at.step + 1}"
        self._log(text)
        raise TrainingFailed(
            f"{text}; the last good checkpoint is {self.folder / 'checkpoints' / 'last'}; "
            "train anew with a lower --lr"
        )

    def _validate(self) -> None:
        valid = self.task.validation_loss(self.ema.model)
        self.at.last_valid = valid
        if valid is None or not math.isfinite(valid):
            return
        if self.at.best_valid is None or valid < self.at.best_valid:
            self.at.best_valid = valid
            self._save("best")

    def _write_row(self, samples_per_second: float) -> None:
        at = self.at
        loss, positions, features, norm = (value / at.count for value in at.sums)
        validated = at.step % self.training.validate_every == 0 or at.step == self.steps
        self.metrics.write(
            step=at.step,
            epoch=(at.step - 1) // self.task.batches_per_epoch,
            loss=loss,
            position_loss=positions,
            feature_loss=features,
            valid_loss=at.last_valid if validated else None,
            gradient_norm=norm,
            lr=learning_rate(self.training, at.step - 1, self.steps),
            molecules_per_second=samples_per_second,
            seconds=at.seconds,
        )
        at.sums, at.count = (0.0, 0.0, 0.0, 0.0), 0


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _norm(parameters: list[nn.Parameter]) -> float:
    return float(torch.nn.utils.clip_grad_norm_(parameters, math.inf))


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the step in hand is finished first.

    A second SIGINT is not waited for.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return

    def interrupt(number: int, _frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
