"""What a step of training costs besides arithmetic: operations, waits, and the time of Python.

    python benchmarks/steps.py                                   # a CPU, seconds
    python benchmarks/steps.py --data qm9.h5 --device cuda       # a GPU, about three minutes

On a CPU it counts the operations of a step that a GPU would launch, those within the network on
pairs apart, since a GPU has kernels for these, and the times that a GPU would finish all its work
before Python goes on; and it takes the time of a step of a tiny network. On a GPU it also trains
with recorded steps (`training.cuda_graphs`), in turns with others, and counts kernels.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from molgen_energy.data.batches import BatchIndex
from molgen_energy.models.pair_network import _PairFunction
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training import loop

_WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select")
_NEVER = threading.Event()


class _Operations(TorchDispatchMode):
    """Counts operations that compute something, and those for which a GPU would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.where = "other"

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        views = [r.alias_info for r in function._schema.returns]
        is_view = any(info is not None and not info.is_write for info in views)
        if name in _WAITS:
            self.counts["waits"] += 1
        elif not is_view and name not in ("empty", "empty_like", "new_empty", "empty_strided"):
            self.counts[self.where] += 1
            self.names[name] += 1
        return function(*arguments, **options or {})

    @contextmanager
    def within_pairs(self) -> Iterator[None]:
        """Count apart what the network on pairs does."""
        plain = _PairFunction.forward, _PairFunction.backward

        def counted(function: Any) -> Any:
            def call(*arguments: Any) -> Any:
                before, self.where = self.where, "pairs"
                try:
                    return function(*arguments)
                finally:
                    self.where = before

            return staticmethod(call)

        _PairFunction.forward, _PairFunction.backward = map(counted, plain)  # type: ignore[method-assign]
        try:
            yield
        finally:
            _PairFunction.forward, _PairFunction.backward = map(staticmethod, plain)  # type: ignore[method-assign]


def trainer_of(options: argparse.Namespace, batch_size: int, width: int, **changes: Any) -> Any:
    """The loop of `qm9_gdm_pairs` of a width."""
    config = load_config("qm9_gdm_pairs").replaced(
        {
            "data.path": None if options.data is None else str(options.data),
            "model.layers": 8,
            "model.width": width,
            "training.batch_size": batch_size,
            "training.validation_molecules": 1,
            "training.low_precision": options.device.type == "cuda",
            **changes,
        }
    )
    task = MoleculeTask(config, options.device)
    task.model.train()
    return loop._Trainer(task, Path(tempfile.gettempdir()) / "steps", loop.no_callback)


def count_operations(options: argparse.Namespace, console: Console) -> None:
    trainer = trainer_of(options, 64, 32)
    batch = trainer.task.epoch(0)[0]
    trainer._step(batch, _NEVER)
    operations = _Operations()
    with operations, operations.within_pairs():
        trainer._step(batch, _NEVER)
    found = operations.counts
    console.print(
        f"a step of 8 layers: {found['other']} operations and {found['pairs']} within the network "
        f"on pairs; Python and device meet {found['waits']} times"
    )
    for width in (16, 64):
        trainer = trainer_of(options, 16, width)
        batches = list(trainer.task.epoch(0))[:40]
        times = []
        for batch in batches:
            began = time.process_time()
            trainer._step(batch, _NEVER)
            times.append(time.process_time() - began)
        median = 1000 * float(np.median(times[5:]))
        console.print(f"8×{width}, batches of 16: {median:.1f} ms of CPU a step")


def run_steps(trainer: Any, batches: list[BatchIndex]) -> tuple[float, float]:
    """Seconds of the batches, and those in which Python was busy."""
    torch.cuda.synchronize()
    began, busy = time.perf_counter(), 0.0
    for batch in batches:
        start = time.process_time()
        trainer._step(batch, _NEVER)
        busy += time.process_time() - start
    trainer._read_outcomes(0)
    torch.cuda.synchronize()
    return time.perf_counter() - began, busy


def kernels(trainer: Any, batch: BatchIndex) -> int:
    """Kernels of a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        trainer._step(batch, _NEVER)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def compare_on_gpu(options: argparse.Namespace, console: Console) -> None:
    table = Table(title=f"8×256 on {torch.cuda.get_device_name()}, in turns")
    columns = ("batch", "steps", "molecules/s", "ms a step", "Python, ms", "kernels", "GB")
    for column in columns:
        table.add_column(column, justify="right")
    for size in (512, 1536):
        trainers = {
            name: trainer_of(options, size, 256, **{"training.cuda_graphs": recorded})
            for name, recorded in (("launched", False), ("recorded", True))
        }
        batches = list(trainers["launched"].task.epoch(0))[:60]
        for trainer in trainers.values():  # compiles kernels, and records each shape
            for _ in range(2):
                run_steps(trainer, batches)
        spent = {name: np.zeros(2) for name in trainers}
        for _ in range(3):
            for name, trainer in trainers.items():
                spent[name] += run_steps(trainer, batches)
        molecules = 3 * sum(map(len, batches))
        for name, trainer in trainers.items():
            seconds, busy = spent[name]
            steps = 3 * len(batches)
            table.add_row(
                str(size), name, f"{molecules / seconds:,.0f}", f"{1000 * seconds / steps:.2f}",
                f"{1000 * busy / steps:.2f}", f"{kernels(trainer, batches[0]):,}",
                f"{torch.cuda.max_memory_reserved() / 1e9:.1f}",
            )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="QM9 as `preprocess qm9` writes it")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    console = Console()
    if options.device.type == "cuda":
        compare_on_gpu(options, console)
    else:
        count_operations(options, console)


if __name__ == "__main__":
    main()
