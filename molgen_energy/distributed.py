"""Several processes that do one job, as `torchrun` starts them.

`torchrun --nproc-per-node K -m molgen_energy VERB …` starts K processes and tells each of them by
environment variables who it is. What a command does is divided by rank; process 0 alone writes and
speaks. Everything here works in a single process too, where it does nothing.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any

from molgen_energy.errors import InputError

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Number of this process in its job, from 0."""
    return _from_environment("RANK", 0)


def world_size() -> int:
    """Processes of the job."""
    return _from_environment("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Processes of the job on this machine."""
    return _from_environment("LOCAL_WORLD_SIZE", 1)


def is_main() -> bool:
    """Whether this is the process that writes files and speaks to the user."""
    return rank() == 0


def _from_environment(name: str, default: int) -> int:
    # Other launchers set some of these variables too, for jobs that are not ours to join.
    if "MASTER_ADDR" not in os.environ or "WORLD_SIZE" not in os.environ:
        return default
    return int(os.environ.get(name, default))


@contextmanager
def process_group(device: torch.device | None = None) -> Iterator[None]:
    """Join the job's other processes for a block; over NCCL on CUDA devices, else over gloo.

    The group of processes is gone behind it, with its threads: one that frees a tensor while the
    interpreter ends would abort the process.
    """
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist

    # Imported within the block, this would keep the group as the default of its arguments.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("nccl" if device is not None and device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def lines() -> Iterator[list[Connection]]:
    """Lines between process 0 and each other one, beside the collectives.

    Process 0 gets one to each other process, by rank; the others get the one to process 0; a
    single process gets none. They carry what can be pickled, wait for any time, can be interrupted
    while they wait, and end with an `EOFError` when the other process does.
    """
    with ExitStack() as stack:
        found: list[Connection] = []
        if world_size() > 1:
            with process_group():  # to agree on where to meet, and on a key that keeps others out
                found = _meet()
        for line in found:
            stack.callback(line.close)
        yield found


def _meet() -> list[Connection]:
    alone = local_world_size() == world_size()  # on this machine
    if is_main():
        key = secrets.token_bytes(32)
        host = "localhost" if alone else ""
        with Listener((host, 0), backlog=world_size(), authkey=key) as listener:
            broadcast((listener.address[1], key))
            arrived = [listener.accept() for _ in range(world_size() - 1)]
        return [line for _, line in sorted((line.recv(), line) for line in arrived)]
    port, key = broadcast(None)
    line = Client(("localhost" if alone else os.environ["MASTER_ADDR"], port), authkey=key)
    line.send(rank())
    return [line]


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs each process of a machine takes its own.

    Raises
    ------
    InputError
        There are more processes on this machine than GPUs, or one GPU was named for all.
    """
    if world_size() == 1 or device.type != "cuda":
        return device
    import torch

    if device.index is not None:
        raise InputError(f"--device {device}: with torchrun name the kind alone, --device cuda")
    own = _from_environment("LOCAL_RANK", 0)
    if own >= torch.cuda.device_count():
        raise InputError(
            f"torchrun started more processes than this machine's {torch.cuda.device_count()} "
            "GPUs; lower --nproc-per-node"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def broadcast(value: Any) -> Any:
    """What process 0 has given, in all processes."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of tensors of one shape, in all processes."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def default_workers() -> int:
    """The processors that this process may use; its share, where `torchrun` started several."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    return max(1, processors // local_world_size())
