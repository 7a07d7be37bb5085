"""The training loop: one for every physical system.

A run's folder holds `config.yaml` (without `auto`), `metrics.csv`, `curves.svg`, `log.txt`
and `checkpoints/{last,best}`. Random numbers of step k depend on (seed, k) alone, and the batches
of an epoch on (seed, epoch), so there is no random state to save, and a resumed run takes the steps
that an uninterrupted one would have taken.

Several processes (`molgen_energy.distributed`) each take a shard of every batch and average their
gradients, so that K of them take the steps that one would take, except for dropout, whose masks
depend on the process too. Only process 0 writes.
"""

from __future__ import annotations

import math
import re
import shlex
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from molgen_energy import __version__
from molgen_energy.config import TrainingConfig, resolved
from molgen_energy.data.batches import BatchIndex, EpochStarts, on_device
from molgen_energy.diffusion.process import is_self_conditioned
from molgen_energy.distributed import all_reduce_sum, is_main, rank, world_size
from molgen_energy.errors import InputError, TrainingFailedError
from molgen_energy.formats.limits import check_memory
from molgen_energy.output import (
    atomic_write,
    check_own_file,
    lock_file,
    open_to_append,
    remove,
    remove_leftovers,
)
from molgen_energy.training.checkpoint import (
    Checkpoint,
    check_alike,
    load_checkpoint,
    save_checkpoint,
)
from molgen_energy.training.clipping import GradientClipper, gradients_of, total_norm
from molgen_energy.training.curves import write_curves
from molgen_energy.training.devices import peak_memory
from molgen_energy.training.ema import ExponentialMovingAverage
from molgen_energy.training.graphs import CUDARecorder, GraphCache, Recorder
from molgen_energy.training.initial import describe_initial_weights, initialise, keep_sampling
from molgen_energy.training.metrics import MetricsLog
from molgen_energy.training.muon import Muon, hidden_matrices
from molgen_energy.training.run import Run
from molgen_energy.training.state import has_stalled
from molgen_energy.training.task import Recordable, Task

_MEASURED_BATCHES = 64  # at most, to estimate what a run needs
_WRITTEN = ("config.yaml", "metrics.csv", "curves.svg", "log.txt", "tensorboard", "checkpoints")
_MOST_SKIPPED = 10  # steps in a row whose loss or gradient is not finite
_COPIES = 5  # of the weights while training: average, gradient, and the optimiser's
_AUXILIARY = "auxiliary"  # weights of the auxiliary network, and the prefix of its parameters
_NORMS = "clipper/norms"  # the tensor of the gradient clipper, beside those of optimizers
_NOT_NEGATIVE = ("step", "exp_avg_sq", "max_exp_avg_sq")  # tensors of AdamW
_PEER_LOST = re.compile("(closed|reset) by peer|broken pipe|remote process", re.IGNORECASE)


class TrainingCallback(Protocol):
    """Receives the progress of training."""

    def __call__(self, step: int, steps: int, loss: float, samples_per_second: float) -> None: ...


def no_callback(step: int, steps: int, loss: float, samples_per_second: float) -> None:
    """Ignore the progress of training."""


class TrainingInterrupted(Exception):
    """Training was interrupted after writing a checkpoint, and can be resumed from its run."""

    def __init__(self, message: str, run: Path) -> None:
        super().__init__(message)
        self.run = run


@dataclass
class _Progress:
    """The state of the loop besides weights; written to `state.yaml`."""

    step: int = 0
    seconds: float = 0.0
    best_valid: float | None = None
    best_step: int | None = None
    kept_valid: float | None = None
    last_valid: float | None = None
    # Weighted sums since the last row of metrics.csv, so that rows do not depend on interruptions.
    sums: tuple[float, ...] = ()
    count: int = 0
    weight: float = 0.0
    # Steps skipped because loss or gradient was not finite: in all, and in a row up to now.
    skipped: int = 0
    skipped_in_row: int = 0


class _Rates(NamedTuple):
    """What an update depends on besides gradients: numbers, or tensors () on the device."""

    lr: float | Tensor
    muon_lr: float | Tensor
    ema: float | Tensor
    """Weight of the new parameters in their average."""
    weight: float | Tensor
    """Of the batch, see `BatchIndex.weight`."""


@dataclass(frozen=True)
class _Outcome:
    """What a step found, which is read from the device when it is needed, or a step later."""

    step: int
    """Steps with this one."""
    samples: int
    weight: float
    """Of the batch."""
    values: Tensor
    """Sums of the loss and its terms over the batch, processes that were interrupted, and the norm
    of the gradient; on the CPU, once the device is `ready`."""
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, batch: BatchIndex, values: Tensor) -> _Outcome:
        """Begin to copy the values from the device."""
        ready, waits = None, values.device.type != "cuda"
        # A copy even on the CPU: a recorded step overwrites the values.
        values = values.to("cpu", non_blocking=not waits, copy=True)
        if not waits:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        return cls(step, len(batch), batch.weight, values, ready)

    def read(self) -> tuple[list[float], bool, float]:
        """Means of the loss and its terms, whether to stop, and the norm of the gradient."""
        if self.ready is not None:
            self.ready.synchronize()
        *sums, stopped, norm = self.values.tolist()
        return [value / self.samples for value in sums], stopped > 0, norm


def total_steps(training: TrainingConfig, starts: EpochStarts) -> int:
    """Length of a run in steps.

    Raises
    ------
    InputError
        The configuration gives both steps and epochs, or neither.
    """
    if (training.steps is None) == (training.epochs is None):
        raise InputError("set exactly one of training.steps and training.epochs")
    if training.steps is not None:
        return resolved(training.steps)
    assert training.epochs is not None
    return starts[training.epochs]


def learning_rate(training: TrainingConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up, then constant or half a cosine."""
    assert not isinstance(training.lr, str)
    rate = training.lr
    if step < training.warmup_steps:
        return rate * (step + 1) / training.warmup_steps
    if training.decay == "cosine":
        share = (step - training.warmup_steps) / max(1, steps - training.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * share))
    return rate


@dataclass(frozen=True)
class TrainingCost:
    """What a run needs, estimated from a few of its steps."""

    step: float
    """Seconds of one step."""
    validation: float
    """Seconds of one validation."""
    seconds: float
    """Of all steps and validations that are left."""
    memory: int | None
    """Bytes, of the GPU or else of the process; None where the system does not tell."""
    measured: int
    """Number of timed steps."""


def measure_cost(task: Task, run: Path, steps: int, seconds: float = 5.0) -> TrainingCost:
    """Estimate what a run needs by taking some of its steps; writes nothing.

    The weights of the task are changed by it.

    Parameters
    ----------
    task
        Physical system with its resolved configuration; closed at the end.
    run
        Folder of the run.
    steps
        Number of steps that are left.
    seconds
        About how long to measure.
    """
    with closing(task):
        trainer = _Trainer(task, run, no_callback)
        step, forward, measured = trainer.measure(seconds, min(steps, _MEASURED_BATCHES))
    validation = forward * task.validation_samples
    validations = math.ceil(steps / resolved(task.config.training.validate_every))
    return TrainingCost(
        step,
        validation,
        step * steps + validation * validations,
        peak_memory(task.device),
        measured,
    )


def train(
    task: Task, run: Path, callback: TrainingCallback = no_callback, resume: bool = False
) -> Run:
    """Train until the configured step, writing the run's folder.

    Parameters
    ----------
    task
        Physical system with its resolved configuration; closed at the end.
    run
        Folder of the run; when `resume` is false, a new one or an empty one.
    callback
        Receives progress.
    resume
        Continue from `run/checkpoints/last`; with the same task it takes the steps that an
        uninterrupted run would have taken.

    Raises
    ------
    InputError
        The checkpoint or the initial weights do not fit the task, or streamed data is damaged.
    TrainingInterrupted
        SIGINT or SIGTERM stopped the run after a checkpoint.
    TrainingFailedError
        Loss or gradient were not finite for ten steps in a row, memory ran out, or another process
        of the job ended.
    """
    with closing(task):
        if not resume:
            initialise(task)
        trainer = _Trainer(task, run, callback)
        made = not resume and is_main() and _make_folder(run)
        try:
            trainer.start(resume)
        except BaseException:
            if made:
                remove(run)  # it has no checkpoint yet
            raise
        with _interruptible() as interrupted:
            return trainer.run(interrupted)


def _make_folder(run: Path) -> bool:
    """Make a run's folder, or use an empty one; returns whether it was made."""
    try:
        run.mkdir(parents=True)
    except FileExistsError:
        if not run.is_dir() or any(run.iterdir()):
            raise InputError(f"{run} exists and is not empty; name another --output") from None
        return False
    return True


def check_run_folder(run: Path) -> None:
    """Raise `InputError` where a link, a device or a pipe has the name of a file to write."""
    for name in _WRITTEN:
        check_own_file(run / name)
    checkpoints = run / "checkpoints"
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        check_own_file(path)


class _Trainer:
    def __init__(self, task: Task, run: Path, callback: TrainingCallback) -> None:
        self.task, self.folder, self.callback = task, run, callback
        self.training = task.config.training
        self.steps = total_steps(self.training, task.starts)
        self.model: nn.Module = task.model
        others = [] if task.auxiliary is None else [task.auxiliary.network]
        self.networks = (task.model, *others)
        modules = [module for network in self.networks for module in network.modules()]
        self._has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules)
        if task.device.type == "cpu":
            size = _COPIES * sum(p.numel() * p.element_size() for p in self._parameters())
            check_memory(size, "training the network", "lower model.width or model.layers")
        self.ema = ExponentialMovingAverage(task.model, resolved(self.training.ema_decay))
        self._validate_every = resolved(self.training.validate_every)
        self.clipper = GradientClipper(self.training.max_gradient_norm or math.inf)
        assert not isinstance(self.training.lr, str)
        self._muon_ratio = self.training.muon_lr / self.training.lr
        self._recorded: GraphCache | None = None
        if self.training.cuda_graphs:
            self._recorded = GraphCache(_recorder(task, self._has_dropout))
        self.optimizers = _optimizers(self.training, task)
        self.at = _Progress(sums=self._zero_sums())
        # A GPU works on a step while the outcome of the one before is read.
        self._unread: deque[_Outcome] = deque()
        self._most_unread = 1 if task.device.type == "cuda" else 0
        self.metrics: MetricsLog | None = None
        self.lock: IO[bytes] | None = None

    def _parameters(self) -> list[nn.Parameter]:
        """Of all networks that are trained."""
        return [parameter for network in self.networks for parameter in network.parameters()]

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """With the names that their tensors of an optimizer have in a checkpoint."""
        for prefix, network in zip(("", _AUXILIARY), self.networks, strict=False):
            yield from network.named_parameters(prefix)

    def _zero_sums(self) -> tuple[float, ...]:
        """Sums of loss, its terms and gradient norm, over no steps."""
        return (0.0,) * (2 + len(self.task.loss_terms))

    def _begin_row(self) -> None:
        self.at.sums, self.at.count, self.at.weight = self._zero_sums(), 0, 0.0

    # -- the run's folder ----------------------------------------------------------------------

    def start(self, resume: bool) -> None:
        if resume:
            self._restore(load_checkpoint(self.folder, "last"))
        elif self.training.sample_from == "best":
            self.at.last_valid = self.task.validation_loss(self.ema.model)
        if not is_main():
            if not resume:
                self._note_validation()
            return
        check_run_folder(self.folder)
        log = self.folder / "log.txt"
        open_to_append(log).close()
        self.lock = lock_file(log, str(self.folder))
        remove_leftovers(self.folder)
        text = self.task.config.to_yaml()
        atomic_write(self.folder / "config.yaml", text.encode(), own=True)
        self.metrics = MetricsLog(self.folder, self.at.step, self.task.loss_terms)
        if not resume:
            self._note_validation()
            if self.at.last_valid is not None:
                self._write_row(None)
            self._save("last")
        verb = "resume" if resume else "start"
        self._log(
            f"{verb} at step {self.at.step} of {self.steps} on {self.task.device}"
            f"{f', {world_size()} processes' if world_size() > 1 else ''} "
            f"(molgen-energy {__version__}, torch {torch.__version__})"
        )
        initial = describe_initial_weights(self.task.state)
        if initial and not resume:
            self._log(f"weights from {initial}")
        teacher = self.task.state.get("teacher")
        if teacher is not None and not resume:
            self._log(f"student of {teacher['origin']}")
        if self.training.sample_from == "best" and not self.task.validation_samples:
            self._log("no validation data: the last weights stand for the run")

    def _log(self, text: str) -> None:
        if not is_main() or self.lock is None:  # measuring a run does not write its folder
            return
        with open_to_append(self.folder / "log.txt") as file:
            file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n")

    def _save(self, which: str) -> None:
        """Write a checkpoint, unless weights are not finite or the last steps were skipped.

        In that case the previous checkpoint stays; resuming from it repeats the steps since.
        """
        if not self._is_finite() or (self.at.skipped_in_row and self.at.step < self.steps):
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
            if self.task.auxiliary is not None:
                weights[_AUXILIARY] = self.task.auxiliary.network.state_dict()
        if self.task.adaptive is not None:
            weights["springs"] = self.task.adaptive.state()
        at = self.at
        progress = vars(at) | {"sums": list(at.sums)}
        state = {"epoch": self.task.starts.epoch_of(at.step), "progress": progress}
        path = self.folder / "checkpoints" / which
        save_checkpoint(path, self.task.config, state | self.task.state, weights)

    def _is_finite(self) -> bool:
        """Whether all weights are finite."""
        models = (*self.networks, self.ema.model)
        finite = [torch.isfinite(p).all() for model in models for p in model.parameters()]
        return bool(torch.stack(finite).all())

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {_NORMS: self.clipper.state()}
        for name, parameter in self._named_parameters():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{key}"] = value
        return tensors

    def _restore(self, checkpoint: Checkpoint) -> None:
        theirs, ours = checkpoint.state.get("data") or {}, self.task.state["data"]
        if theirs.get("fingerprint") != ours["fingerprint"]:
            raise InputError(
                f"{checkpoint.path} was trained on other data ({theirs.get('source')}, "
                f"{theirs.get('training_samples')} samples) than {ours['source']} "
                f"({ours['training_samples']}); name its data with --data"
            )
        taught, teacher = checkpoint.state.get("teacher"), self.task.state.get("teacher")
        if taught is not None and teacher is not None and taught["sha256"] != teacher["sha256"]:
            raise InputError(
                f"{checkpoint.path} is a student of {taught['origin']}, whose weights have changed "
                "since; put the earlier ones back, or train a new student"
            )
        if checkpoint.state.get("initial_weights") is not None:
            self.task.state["initial_weights"] = checkpoint.state["initial_weights"]
            keep_sampling(self.task, checkpoint)
        checkpoint.load_weights(self.task.model, "model")
        checkpoint.load_weights(self.ema.model, "ema")
        if self.task.auxiliary is not None:
            checkpoint.load_weights(self.task.auxiliary.network, _AUXILIARY)
        self._restore_optimizers(checkpoint)
        if self.task.adaptive is not None:
            springs = checkpoint.read_tensors("springs")
            check_alike(springs, self.task.adaptive.state(), checkpoint.path)
            _check_not_negative(springs, checkpoint.path)
            self.task.adaptive.load_state(springs)
        progress = checkpoint.progress
        weight = progress.count if progress.weight is None else progress.weight
        values = {"sums": tuple(progress.sums), "weight": float(weight)}
        self.at = _Progress(**progress.model_dump() | values)
        if len(self.at.sums) != len(self._zero_sums()):  # format 2 has sums of other terms
            self._begin_row()

    def _restore_optimizers(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors("optimizer", self.task.model)
        norms = {name: tensors.pop(name) for name in (_NORMS,) if name in tensors}
        known = self.clipper.state()
        length = len(norms[_NORMS]) if norms and norms[_NORMS].ndim else 0
        check_alike(norms, {_NORMS: known.new_zeros(max(1, length))}, checkpoint.path)
        optimizer_of = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        own = {
            f"{name}/{key}": (parameter, key)
            for name, parameter in self._named_parameters()
            if any(tensor.startswith(f"{name}/") for tensor in tensors)
            for key in _state_keys(optimizer_of[parameter])
        }
        alike = {
            name: torch.zeros(()) if key == "step" else parameter
            for name, (parameter, key) in own.items()
        }
        check_alike(tensors, alike, checkpoint.path)
        _check_not_negative(
            norms | {name: tensors[name] for name, (_, key) in own.items() if key in _NOT_NEGATIVE},
            checkpoint.path,
        )
        self.clipper.load(norms[_NORMS])
        for name, (parameter, key) in own.items():
            optimizer = optimizer_of[parameter]
            device = "cpu" if key == "step" and not _fused(optimizer) else parameter.device
            optimizer.state[parameter][key] = tensors[name].to(device)

    # -- the cost of a run ---------------------------------------------------------------------

    def measure(self, seconds: float, most: int) -> tuple[float, float, int]:
        """Take some steps: seconds of a step, of one sample without gradients, and their number.

        The time of a sample is that of a mean one. The first step, on the largest of some batches,
        also compiles kernels and reserves memory; its time does not count.
        """
        batches = list(self.task.epoch(0)[:_MEASURED_BATCHES])
        never = threading.Event()
        self.task.model.train()
        self._step(max(batches, key=lambda batch: float(batch.sizes.max()) * len(batch)), never)
        began, count = time.perf_counter(), 0
        for batch in batches[:most]:
            self._step(batch, never)
            count += 1
            if count >= 3 and time.perf_counter() - began > seconds:
                break
        self._read_outcomes(0)
        step = (time.perf_counter() - began) / count
        began = time.perf_counter()
        with torch.no_grad():
            loss = self.task.loss(self.ema.model, batches[0], seed=0)["loss"].sum()
        float(loss)  # waits for a GPU
        sample = (time.perf_counter() - began) * batches[0].weight / len(batches[0])
        return step, sample, count

    # -- the loop ------------------------------------------------------------------------------

    def run(self, interrupted: threading.Event) -> Run:
        began = time.perf_counter()
        before = self.at.seconds
        row_began, row_samples = began, 0
        too_large: BatchIndex | None = None
        self.task.model.train()
        try:
            if world_size() > 1:
                # Some weights of a self-conditioned network have no gradient in half of the steps.
                self.model = DistributedDataParallel(
                    self.task.model, find_unused_parameters=is_self_conditioned(self.task.model)
                )
                if self.task.auxiliary is not None:
                    wrapper = DistributedDataParallel(self.task.auxiliary.network)
                    self.task.auxiliary.wrapper = wrapper
            for batch in self._batches():
                stop = self._step(batch, interrupted)
                row_samples += len(batch)
                last = self.at.step == self.steps
                validate = last or self.at.step % self._validate_every == 0
                log = validate or self.at.step % self.training.log_every == 0
                save = last or self.at.step % self.training.checkpoint_every == 0
                if log or save:
                    stop = self._read_outcomes(0) or stop
                now = time.perf_counter()
                self.at.seconds = before + now - began
                self.callback(
                    self.at.step,
                    self.steps,
                    self.at.sums[0] / self.at.weight if self.at.weight else math.nan,
                    row_samples / (now - row_began),
                )
                if validate:
                    self._validate()
                    last = last or has_stalled(self.training, self.at.step, self.at.best_step)
                if log:
                    self._write_row(row_samples / (now - row_began))
                    if validate:
                        self._draw()
                    row_began, row_samples = time.perf_counter(), 0
                if last and not self._is_finite():
                    self._fail("the weights are not finite", "train again with a lower --lr")
                if save or last:
                    self._save("last")
                alone = world_size() == 1 and interrupted.is_set()
                if (stop or alone) and not last:
                    self._read_outcomes(0)
                    self._save("last")
                    self._draw()
                    self._log(f"interrupted at step {self.at.step}")
                    raise TrainingInterrupted(
                        f"stopped at step {self.at.step} of {self.steps}", self.folder
                    )
                if last:
                    break
        except torch.OutOfMemoryError:
            too_large = batch  # handled below, where the memory of the step is free
        except RuntimeError as error:
            if world_size() == 1 or not _PEER_LOST.search(str(error)):
                raise
            what = "another process of the job ended, see its message"
            self._fail(what, f"then: molgen-energy train --resume {shlex.quote(str(self.folder))}")
        finally:
            self.model = self.task.model  # the wrapper holds the process group
            if self.task.auxiliary is not None:
                self.task.auxiliary.wrapper = None
            if self.metrics is not None:
                self.metrics.close()
            if self.lock is not None:
                self.lock.close()
        if too_large is not None:
            self._fail(*self._out_of_memory(too_large))
        at = self.at
        if at.step < self.steps:
            self._log(f"no better validation loss since step {at.best_step}")
        self._log(f"finished at step {at.step}, {at.seconds:.0f} s of training")
        return Run(
            self.folder, at.step, at.seconds, at.last_valid, at.skipped, self.task.config,
            best_step=at.best_step, best_valid=at.kept_valid,
        )  # fmt: skip

    def _batches(self) -> Iterator[BatchIndex]:
        """The batches from the current step to the last."""
        while self.at.step < self.steps:
            epoch = self.task.starts.epoch_of(self.at.step)
            done = self.at.step - self.task.starts[epoch]
            for batch in self.task.epoch(epoch)[done:]:
                if self.at.step == self.steps:
                    return
                yield batch

    def _step(self, batch: BatchIndex, interrupted: threading.Event) -> bool:
        """One update, or none if loss or gradient are not finite; returns whether to stop.

        The device decides itself, so that no step waits for it. What it found is read after the
        next step was started, in all processes at the same step.
        """
        rates = self._rates(batch)
        if self._recorded is None:
            sums = self._backward(self.model, batch)
            stop = sums.new_full((1,), float(interrupted.is_set()))
            outcome = self._update(all_reduce_sum(torch.cat([sums, stop])), rates)
            self._zero_grad()
        else:
            outcome = self._recorded_step(self._recorded, batch, rates)
        self.at.step += 1
        self._unread.append(_Outcome.of(self.at.step, batch, outcome))
        return self._read_outcomes(self._most_unread)

    def _recorded_step(self, graphs: GraphCache, batch: BatchIndex, rates: _Rates) -> Tensor:
        """As `_backward` and `_update`, of one process, for shapes of batches that come again."""
        task = self.task
        assert isinstance(task, Recordable)
        prepared = task.prepare(batch, _derived_seed(self.training.seed, self.at.step))

        def step(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            self._zero_grad()
            losses = task.prepared_loss(self.model, prepared.with_tensors(tensors))
            sums = self._differentiate(losses, 1.0, len(batch))
            totals = torch.cat([sums, torch.zeros_like(sums[:1])])  # `interrupted` is known
            return {"outcome": self._update(totals, _Rates(*tensors["rates"].unbind()))}

        numbers = on_device(np.array(rates, np.float32), task.device)
        return graphs(step, {**prepared.tensors(), "rates": numbers})["outcome"]

    def _rates(self, batch: BatchIndex) -> _Rates:
        rate = learning_rate(self.training, self.at.step, self.steps)
        ema = self.ema.weight(self.at.step + 1)
        return _Rates(rate, rate * self._muon_ratio, ema, batch.weight)

    def _read_outcomes(self, unread: int) -> bool:
        """Read what steps found, but for the last ones; returns whether to stop."""
        stop = False
        while len(self._unread) > unread:
            outcome = self._unread.popleft()
            values, stopped, norm = outcome.read()
            stop = stop or stopped
            if math.isfinite(values[0]) and math.isfinite(norm):
                self._count(values, norm, outcome.weight)
            else:
                self._skip(outcome.step, values[0], norm)
        return stop

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _backward(self, model: nn.Module, batch: BatchIndex) -> Tensor:
        """Gradients of the mean over the batch; returns the shard's sums of the loss and its terms.

        A process without a sample of a small batch takes one with weight 0, so that all processes
        take part in averaging gradients.
        """
        seed = _derived_seed(self.training.seed, self.at.step)
        place = min(rank(), len(batch) - 1)
        with self._seeded_dropout(seed):
            losses = self.task.loss(model, batch, seed, place, world_size())
        weight = float(rank() < len(batch))
        if not weight and self.task.adaptive is not None:
            self.task.adaptive.discard_step()
        return self._differentiate(losses, weight, len(batch))

    def _differentiate(self, losses: Mapping[str, Tensor], weight: float, samples: int) -> Tensor:
        # Gradients are averaged over processes afterwards.
        loss = losses["loss"].sum() * (weight * world_size() / samples)
        loss.backward()  # type: ignore[no-untyped-call]
        names = ("loss", *self.task.loss_terms)
        return weight * torch.stack([losses[name].detach().sum() for name in names])

    @contextmanager
    def _seeded_dropout(self, seed: int) -> Iterator[None]:
        """Draw the masks of dropout, if there is any, from the seed of the step and the process."""
        if not self._has_dropout:  # small networks would notice the time
            yield
            return
        device = self.task.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_derived_seed(seed, rank()))
            yield

    def _update(self, totals: Tensor, rates: _Rates) -> Tensor:
        """Update parameters, average and springs, unless the loss or the gradient is not finite.

        Returns the totals and the norm of the gradient, on the device.
        """
        parameters = self._parameters()
        if self.training.clip_gradients:
            norm = self.clipper.clip(parameters, rates.weight)
        else:
            gradients = gradients_of(parameters)
            norm = total_norm(gradients)
            torch._foreach_mul_(gradients, rates.weight)
        accepted = totals[0].isfinite() & norm.isfinite()
        refused = (~accepted).float()
        for optimizer in self.optimizers:
            muon = isinstance(optimizer, Muon)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * (rates.muon_lr if muon else rates.lr)
            if muon or _fused(optimizer):
                optimizer.found_inf = refused  # type: ignore[attr-defined]
                optimizer.step()
            elif not bool(refused):  # such optimizers cannot decide on the device
                optimizer.step()
        self.ema.update(self.task.model, accepted * rates.ema)
        if self.task.adaptive is not None:
            self.task.adaptive.finish_step(all_reduce_sum, accepted)
        return torch.cat([totals, norm[None]])

    def _count(self, values: list[float], norm: float, weight: float) -> None:
        self.at.sums = tuple(
            old + weight * new for old, new in zip(self.at.sums, (*values, norm), strict=True)
        )
        self.at.count += 1
        self.at.weight += weight
        self.at.skipped_in_row = 0

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self.at.skipped += 1
        self.at.skipped_in_row += 1
        self._log(f"step {step} skipped: loss {loss:g}, norm of the gradient {norm:g}")
        if self.at.skipped_in_row == _MOST_SKIPPED:
            what = "loss" if not math.isfinite(loss) else "gradient's norm"
            text = f"the {what} was not finite for {_MOST_SKIPPED} steps in a row"
            self._fail(text, "train again with a lower --lr", step)

    def _out_of_memory(self, batch: BatchIndex) -> tuple[str, str]:
        """Message and remedy, with the batch size that fits the largest samples."""
        pairs, every = self.training.pairs_per_batch, world_size()
        kind = f"{len(batch)}" if pairs is None else f"{pairs:,} pairs of atoms"
        what = f"out of memory with batches of {kind}"
        self._zero_grad()
        if pairs is None:  # else all batches are about as large
            epoch = self.task.epoch(self.task.starts.epoch_of(self.at.step))
            in_window = (other for other in epoch if other.window == batch.window)
            batch = max(in_window, key=lambda other: float(other.sizes.sum()))
        size = len(batch)
        while size > every:
            size = max(every, size // 2)
            if self.task.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                # Not through the wrapper, which waits for other processes.
                self._backward(self.task.model, batch.largest(size))
            except torch.OutOfMemoryError:
                continue
            finally:
                self._zero_grad()
            if pairs is None:
                return what, f"{size} fit: train again with --batch-size {size}"
            fitting = size * int(batch.sizes.max()) ** 2
            return (
                what,
                f"{fitting:,} fit: train again with --set training.pairs_per_batch={fitting}",
            )
        return what, "not even one sample fits"

    def _fail(self, what: str, remedy: str, step: int | None = None) -> NoReturn:
        text = f"{what} at step {self.at.step if step is None else step}"
        self._log(text)
        raise TrainingFailedError(
            f"{text}; the last good checkpoint is {self.folder / 'checkpoints' / 'last'}; {remedy}"
        )

    def _validate(self) -> None:
        self.at.last_valid = self.task.validation_loss(self.ema.model)
        self._note_validation()

    def _note_validation(self) -> None:
        """Keep the weights, if their validation loss is the lowest, or within the tolerance."""
        valid, at = self.at.last_valid, self.at
        if valid is None or not math.isfinite(valid):
            return
        lowest = at.best_valid
        if lowest is None or valid < lowest + self.training.tolerance * abs(lowest):
            at.best_valid = valid if lowest is None else min(valid, lowest)
            at.best_step, at.kept_valid = at.step, valid
            self._save("best")

    def _draw(self) -> None:
        """Draw the curves; a run does not end because a picture cannot be written."""
        if not is_main():
            return
        try:
            write_curves(self.folder)
        except (InputError, OSError) as error:
            self._log(f"no picture of the curves: {error}")

    def _write_row(self, samples_per_second: float | None) -> None:
        at = self.at
        means = [value / at.weight if at.weight else None for value in at.sums]
        loss, *parts, norm = means
        validated = at.step % self._validate_every == 0 or at.step == self.steps
        before = max(0, at.step - 1)
        if self.metrics is not None:
            self.metrics.write(
                step=at.step,
                epoch=self.task.starts.epoch_of(before),
                loss=loss,
                **dict(zip(self.task.loss_terms, parts, strict=True)),
                valid_loss=at.last_valid if validated else None,
                gradient_norm=norm,
                lr=learning_rate(self.training, before, self.steps),
                samples_per_second=samples_per_second,
                seconds=at.seconds,
                skipped=at.skipped,
            )
        self._begin_row()


def _recorder(task: Task, has_dropout: bool) -> Recorder:
    """What records the steps of a run; `InputError` where they cannot be recorded."""
    option = "training.cuda_graphs"
    reason = None
    if not isinstance(task, Recordable):
        reason = "only steps on molecules can be recorded"
    elif world_size() > 1:
        reason = "steps of several processes cannot be recorded"
    elif has_dropout or is_self_conditioned(task.model):
        reason = "steps with dropout or self-conditioning cannot be recorded"
    if reason is not None:
        raise InputError(f"{option}: {reason}; leave it out")
    return CUDARecorder(task.device, option)


def _optimizers(training: TrainingConfig, task: Task) -> list[torch.optim.Optimizer]:
    """Optimizers of disjoint parts of the parameters.

    Learning rates are set at each step, those of a group relative to the others by its `factor`.
    """
    networks = [(task.model, 1.0)]
    if task.auxiliary is not None:
        networks.append((task.auxiliary.network, task.auxiliary.lr))
    groups, groups_of_matrices = [], []
    for network, factor in networks:
        matrices = hidden_matrices(network) if training.optimizer == "muon" else []
        if training.optimizer == "muon" and not matrices:
            raise InputError(
                "training.optimizer: muon finds no matrices in this network; choose adamw"
            )
        taken = set(matrices)
        others = [parameter for parameter in network.parameters() if parameter not in taken]
        groups.append({"params": others, "factor": factor})
        groups_of_matrices.append({"params": matrices, "factor": factor})
    muon = training.optimizer == "muon"
    adamw = torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=training.adam_betas,
        weight_decay=training.weight_decay,
        # A largest second moment would keep the loss of a student, which moves, from large steps.
        amsgrad=not muon and task.auxiliary is None,
        fused=task.device.type in ("cpu", "cuda"),
        capturable=training.cuda_graphs,
    )
    return [adamw, Muon(groups_of_matrices, lr=0.0)] if muon else [adamw]


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The tensors of an optimizer for each parameter that had a gradient."""
    if isinstance(optimizer, Muon):
        return ("momentum",)
    largest = ("max_exp_avg_sq",) if optimizer.defaults["amsgrad"] else ()
    return ("step", "exp_avg", "exp_avg_sq", *largest)


def _check_not_negative(tensors: Mapping[str, Tensor], where: Path) -> None:
    for name, tensor in tensors.items():
        if bool((tensor < 0).any()):
            raise InputError(f"{where}: tensor '{name}' is negative; train again")


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _derived_seed(seed: int, number: int) -> int:
    """The seed of a step, or of a process."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the loop finishes its step first.

    A second SIGINT raises KeyboardInterrupt.
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
