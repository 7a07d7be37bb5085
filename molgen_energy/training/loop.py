"""The training loop: one for every physical system.

A run's folder holds `config.yaml` (resolved), `metrics.csv`, `log.txt` and
`checkpoints/{last,best}`. All randomness of step k is drawn from a generator seeded with (seed, k),
and the batches of an epoch follow from (seed, epoch), so there is no random state to save, and a
resumed run takes the steps that an unbroken one would have taken.

Several processes (`molgen_energy.distributed`) each take a share of every batch and the mean of
their gradients, so that K of them take the steps that one would take. Process 0 alone writes.
"""

from __future__ import annotations

import math
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from molgen_energy import __version__
from molgen_energy.config import TrainingConfig
from molgen_energy.data.batches import Batch
from molgen_energy.distributed import all_reduce_sum, is_main, rank, world_size
from molgen_energy.errors import InputError, TrainingFailedError
from molgen_energy.output import lock_file, remove
from molgen_energy.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from molgen_energy.training.clipping import GradientClipper
from molgen_energy.training.ema import ExponentialMovingAverage
from molgen_energy.training.metrics import MetricsLog
from molgen_energy.training.muon import Muon, hidden_matrices
from molgen_energy.training.task import Task

_MOST_SKIPPED = 10  # steps in a row whose loss or gradient is not finite
_PEER_LOST = re.compile("(closed|reset) by peer|broken pipe|remote process", re.IGNORECASE)


class Observer(Protocol):
    """Who is told how training goes."""

    def progress(self, step: int, steps: int, loss: float, samples_per_second: float) -> None: ...


class TrainingInterrupted(Exception):
    """Training was interrupted and can be resumed; the checkpoint is written."""


@dataclass(frozen=True)
class Summary:
    """How a run ended."""

    run: Path
    steps: int
    seconds: float
    valid_loss: float | None
    skipped: int
    """Steps whose loss or gradient was not finite."""


@dataclass
class _Progress:
    """What the loop carries from step to step besides weights; written to `state.yaml`."""

    step: int = 0
    seconds: float = 0.0
    best_valid: float | None = None
    last_valid: float | None = None
    # Sums since the last row of metrics.csv, so that a row does not depend on where a run broke.
    sums: tuple[float, ...] = ()
    count: int = 0
    # Steps that were skipped because their loss or gradient was not finite, in all and of late.
    skipped: int = 0
    skipped_in_row: int = 0


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
        Loss or gradient were not finite for ten steps in a row, memory does not suffice, or
        another process of the job ended.
    """
    with closing(task):
        trainer = _Trainer(task, run, observer)
        made = not resume and is_main() and _make_folder(run)
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
        self.model: nn.Module = task.model
        self.ema = ExponentialMovingAverage(task.model, self.training.ema_decay)
        self.clipper = GradientClipper()
        assert not isinstance(self.training.lr, str)
        self._muon_ratio = self.training.muon_lr / self.training.lr
        self.optimizers = _optimizers(self.training, task.model, task.device)
        self.at = _Progress(sums=self._nothing())
        self.metrics: MetricsLog | None = None
        self.lock: IO[bytes] | None = None

    def _nothing(self) -> tuple[float, ...]:
        """Sums of objective, parts and norm of the gradient over no steps."""
        return (0.0,) * (2 + len(self.task.parts))

    # -- the run's folder ----------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        if resume:
            self._restore(load_checkpoint(self.folder))
        if not is_main():
            return
        log = self.folder / "log.txt"
        log.touch()
        self.lock = lock_file(log, str(self.folder))
        (self.folder / "config.yaml").write_text(self.task.config.to_yaml(), encoding="utf-8")
        self.metrics = MetricsLog(self.folder, self.at.step, self.task.parts)
        if not resume:
            self._save("last")
        verb = "resume" if resume else "start"
        self._log(
            f"{verb} at step {self.at.step} of {self.steps} on {self.task.device}"
            f"{f', {world_size()} processes' if world_size() > 1 else ''} "
            f"(molgen-energy {__version__}, torch {torch.__version__})"
        )

    def _log(self, text: str) -> None:
        if not is_main():
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def _save(self, which: str) -> None:
        """Write a checkpoint, unless something is wrong: the one that is there is better then.

        It leads to the same steps again.
        """
        if not self._sound() or (self.at.skipped_in_row and self.at.step < self.steps):
            self._log(f"no checkpoint at step {self.at.step}: steps are not finite")
            return
        if not is_main():
            return
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

    def _sound(self) -> bool:
        """Whether all weights are finite."""
        models = (self.task.model, self.ema.model)
        return all(bool(torch.isfinite(p).all()) for model in models for p in model.parameters())

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {"clipper/norms": self.clipper.state()}
        for name, parameter in self.task.model.named_parameters():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{key}"] = value
        return tensors

    def _restore(self, checkpoint: Checkpoint) -> None:
        theirs, ours = checkpoint.state.get("data", {}), self.task.state["data"]
        if theirs.get("fingerprint") != ours["fingerprint"]:
            raise InputError(
                f"{checkpoint.path} was trained on other data ({theirs.get('source')}, "
                f"{theirs.get('training_samples')} samples) than is given now "
                f"({ours['source']}, {ours['training_samples']}); name its data with --data"
            )
        checkpoint.load_weights(self.task.model, "model")
        load_weights(self.ema.model, checkpoint.tensors("ema"), checkpoint.path)
        tensors = checkpoint.tensors("optimizer")
        self.clipper.load(tensors.pop("clipper/norms"))
        having = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in self.task.model.named_parameters():
            optimizer = having[parameter]
            own = {k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
            for key, value in own.items():
                device = "cpu" if key == "step" and not _fused(optimizer) else parameter.device
                optimizer.state[parameter][key] = value.to(device)
        progress = checkpoint.state["progress"]
        self.at = _Progress(**progress | {"sums": tuple(progress["sums"])})

    # -- the loop ------------------------------------------------------------------------------

    def run(self, interrupted: threading.Event) -> Summary:
        began = time.perf_counter()
        before = self.at.seconds
        row_began, row_samples = began, 0
        too_large: Batch | None = None
        self.task.model.train()
        try:
            if world_size() > 1:
                self.model = DistributedDataParallel(self.task.model)
            for batch in self._batches():
                stop = self._step(batch, interrupted)
                row_samples += len(batch)
                now = time.perf_counter()
                self.at.seconds = before + now - began
                self.observer.progress(
                    self.at.step,
                    self.steps,
                    self.at.sums[0] / self.at.count if self.at.count else math.nan,
                    row_samples / (now - row_began),
                )
                last = self.at.step == self.steps
                validate = last or self.at.step % self.training.validate_every == 0
                if validate:
                    self._validate()
                if validate or self.at.step % self.training.log_every == 0:
                    self._write_row(row_samples / (now - row_began))
                    row_began, row_samples = time.perf_counter(), 0
                if last and not self._sound():
                    self._fail("the weights are not finite", "train anew with a lower --lr")
                if last or self.at.step % self.training.checkpoint_every == 0:
                    self._save("last")
                alone = world_size() == 1 and interrupted.is_set()  # no one to agree with
                if (stop or alone) and not last:
                    self._save("last")
                    self._log(f"interrupted at step {self.at.step}")
                    raise TrainingInterrupted(f"stopped at step {self.at.step} of {self.steps}")
        except torch.OutOfMemoryError:
            too_large = batch  # looked into below: only there is free what the step held
        except RuntimeError as error:
            if world_size() == 1 or not _PEER_LOST.search(str(error)):
                raise
            what = "another process of the job ended, for the reason that it gives"
            self._fail(what, f"then: molgen-energy train --resume {shlex.quote(str(self.folder))}")
        finally:
            self.model = self.task.model  # the wrapper holds the group of processes
            if self.metrics is not None:
                self.metrics.close()
            if self.lock is not None:
                self.lock.close()
        if too_large is not None:
            self._fail(*self._out_of_memory(too_large))
        self._log(f"finished at step {self.at.step}, {self.at.seconds:.0f} s of training")
        at = self.at
        return Summary(self.folder, at.step, at.seconds, at.last_valid, at.skipped)

    def _batches(self) -> Iterator[Batch]:
        """The batches from the present step to the last."""
        while self.at.step < self.steps:
            epoch, done = divmod(self.at.step, self.task.batches_per_epoch)
            for batch in self.task.epoch(epoch)[done:]:
                if self.at.step == self.steps:
                    return
                yield batch

    def _step(self, batch: Batch, interrupted: threading.Event) -> bool:
        """One update, or none where it would spoil the weights; returns whether to stop."""
        sums = self._backward(self.model, batch, self._generator())
        # One look at the device's results for all decisions, alike in all processes.
        stop = sums.new_tensor([float(interrupted.is_set())])
        *values, stopped = all_reduce_sum(torch.cat([sums, stop])).tolist()
        values = [value / len(batch) for value in values]
        parameters = list(self.task.model.parameters())
        norm = self.clipper.clip(parameters) if self.training.clip_gradients else _norm(parameters)
        self.at.step += 1
        if math.isfinite(values[0]) and math.isfinite(norm):
            self._update(values, norm)
        else:
            self._skip(values[0], norm)
        self._zero_grad()
        return bool(stopped > 0)

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _generator(self) -> torch.Generator:
        generator = torch.Generator(self.task.device)
        return generator.manual_seed(_step_seed(self.training.seed, self.at.step))

    def _backward(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Gradients of the mean over the batch; returns the own samples' sums of each term.

        A process that has no sample of a small batch takes one with weight 0, so that all take part
        in the mean of gradients.
        """
        share = min(rank(), len(batch) - 1)
        terms = self.task.loss(model, batch, generator, share, world_size())
        weight = float(rank() < len(batch))
        # The mean over processes is taken behind.
        loss = terms[0].sum() * (weight * world_size() / len(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        return weight * torch.stack([term.detach().sum() for term in terms])

    def _update(self, values: list[float], norm: float) -> None:
        rate = learning_rate(self.training, self.at.step - 1, self.steps)
        for optimizer in self.optimizers:
            muon = isinstance(optimizer, Muon)
            for group in optimizer.param_groups:
                group["lr"] = rate * self._muon_ratio if muon else rate
            optimizer.step()
        self.ema.update(self.task.model, self.at.step)
        self.at.sums = tuple(
            old + new for old, new in zip(self.at.sums, (*values, norm), strict=True)
        )
        self.at.count += 1
        self.at.skipped_in_row = 0

    def _skip(self, loss: float, norm: float) -> None:
        self.at.skipped += 1
        self.at.skipped_in_row += 1
        self._log(f"step {self.at.step} skipped: loss {loss:g}, norm of the gradient {norm:g}")
        if self.at.skipped_in_row == _MOST_SKIPPED:
            what = "loss" if not math.isfinite(loss) else "gradient's norm"
            text = f"the {what} was not finite for {_MOST_SKIPPED} steps in a row"
            self._fail(text, "train anew with a lower --lr")

    def _out_of_memory(self, batch: Batch) -> tuple[str, str]:
        """What to say, with the batch size that fits the largest molecules, found by trying."""
        largest, every = len(batch), world_size()
        self._zero_grad()
        epoch = self.task.epoch(self.at.step // self.task.batches_per_epoch)
        alike = (other for other in epoch if other.window == batch.window)
        batch = max(alike, key=lambda other: float(other.sizes.sum()))
        size = largest
        while size > every:
            size = max(every, size // 2)
            if self.task.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                # Not through the model that waits for other processes.
                self._backward(self.task.model, batch.largest(size), self._generator())
            except torch.OutOfMemoryError:
                continue
            finally:
                self._zero_grad()
            remedy = f"{size} fit: train anew with --batch-size {size}"
            return f"out of memory with batches of {largest}", remedy
        return f"out of memory with batches of {largest}", "not even one molecule fits"

    def _fail(self, what: str, remedy: str) -> NoReturn:
        text = f"{what} at step {self.at.step}"
        self._log(text)
        raise TrainingFailedError(
            f"{text}; the last good checkpoint is {self.folder / 'checkpoints' / 'last'}; {remedy}"
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
        means = [value / at.count if at.count else None for value in at.sums]
        loss, *parts, norm = means
        validated = at.step % self.training.validate_every == 0 or at.step == self.steps
        if self.metrics is not None:
            self.metrics.write(
                step=at.step,
                epoch=(at.step - 1) // self.task.batches_per_epoch,
                loss=loss,
                **dict(zip(self.task.parts, parts, strict=True)),
                valid_loss=at.last_valid if validated else None,
                gradient_norm=norm,
                lr=learning_rate(self.training, at.step - 1, self.steps),
                samples_per_second=samples_per_second,
                seconds=at.seconds,
                skipped=at.skipped,
            )
        at.sums, at.count = self._nothing(), 0


def _optimizers(
    training: TrainingConfig, model: nn.Module, device: torch.device
) -> list[torch.optim.Optimizer]:
    """What updates the model, each a part of its parameters; rates are set at each step."""
    matrices = hidden_matrices(model) if training.optimizer == "muon" else []
    if training.optimizer == "muon" and not matrices:
        raise InputError("training.optimizer: muon has no matrices in this network; take adamw")
    taken = set(matrices)
    adamw = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter not in taken],
        lr=0.0,
        weight_decay=training.weight_decay,
        amsgrad=not matrices,
        fused=device.type in ("cpu", "cuda"),
    )
    return [adamw, Muon(matrices, lr=0.0)] if matrices else [adamw]


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
