"""Processes of a `torchrun` job: their ranks, devices and communication.

`torchrun --nproc-per-node K -m molgen_energy COMMAND …` starts K processes, which read their rank
from environment variables. A command divides its work by rank; only process 0 writes files and
messages. In a single process every function here works too, as if the job had one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from molgen_energy.errors import InputError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch


def rank() -> int:
    """Rank of this process in its job, from 0."""
    return _from_environment("RANK", 0)


def world_size() -> int:
    """Number of processes of the job."""
    return _from_environment("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of processes of the job on this machine."""
    return _from_environment("LOCAL_WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this is process 0, which writes files and messages."""
    return rank() == 0


def _from_environment(name: str, default: int) -> int:
    # Other launchers set some of these variables too, for jobs without a `torch.distributed` group.
    if "MASTER_ADDR" not in os.environ or "WORLD_SIZE" not in os.environ:
        return default
    return int(os.environ.get(name, default))


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[None]:
    """Initialise the process group of the job for a block: NCCL for CUDA devices, else gloo.

    The group is destroyed after the block. Otherwise one of its threads could free a tensor while
    the interpreter exits, which aborts the process.
    """
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist

    # Imported first within the group, this module would keep it as a default argument.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("nccl" if device is not None and device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def worker_connections() -> Iterator[list[Connection]]:
    """Connections between process 0 and the others, for `molgen_energy.workers.WorkerPool`.

    Process 0 gets one to each other process, by rank; each other process gets the one to process
    0; a single process gets none. Unlike collectives, they have no time limit, Ctrl-C interrupts
    them, and they raise `EOFError` when the other process exits.
    """
    with ExitStack() as stack:
        connections: list[Connection] = []
        if world_size() > 1:
            with process_group():  # to exchange a port, and a key that keeps other programs out
                connections = _connect()
        for connection in connections:
            stack.callback(connection.close)
        yield connections


def _connect() -> list[Connection]:
    import secrets
    from multiprocessing.connection import Client, Listener

    one_machine = local_world_size() == world_size()
    if is_main():
        key = secrets.token_bytes(32)
        host = "localhost" if one_machine else ""
        with Listener((host, 0), backlog=world_size(), authkey=key) as listener:
            broadcast((listener.address[1], key))
            accepted = [listener.accept() for _ in range(world_size() - 1)]
        by_rank = {connection.recv(): connection for connection in accepted}
        return [by_rank[number] for number in sorted(by_rank)]
    port, key = broadcast(None)
    host = "localhost" if one_machine else os.environ["MASTER_ADDR"]
    connection = Client((host, port), authkey=key)
    connection.send(rank())
    return [connection]


def local_device(device: torch.device) -> torch.device:
    """The device of this process: with CUDA, the GPU of its local rank.

    Raises
    ------
    InputError
        This machine has fewer GPUs than processes of the job, or the device has an index.
    """
    if world_size() == 1 or device.type != "cuda":
        return device
    import torch

    if device.index is not None:
        raise InputError(f"--device {device}: with torchrun, use --device cuda without a number")
    own = _from_environment("LOCAL_RANK", 0)
    if own >= torch.cuda.device_count():
        raise InputError(
            f"torchrun started more processes than this machine's {torch.cuda.device_count()} "
            "GPUs; lower --nproc-per-node"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def broadcast(value: Any) -> Any:
    """The value that process 0 passes, in every process; it must be possible to pickle it."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place; returns it."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def check_workers(workers: int | None) -> None:
    """Raise `InputError` where `--workers` is negative."""
    if workers is not None and workers < 0:
        raise InputError(f"--workers {workers}: expected 0 or more")


def worker_count(workers: int | None) -> int:
    """Worker processes: `workers`, by default one for each processor."""
    return default_workers() if workers is None else workers


def default_workers() -> int:
    """Number of processors for this process: those it may use, divided by its job's processes."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return max(1, processors // local_world_size())
