"""Devices: choice, precision of matrix products, and available memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from molgen_energy.errors import InputError
from molgen_energy.formats.limits import machine_memory, system_text


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU if there is one.

    Raises
    ------
    InputError
        There is no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"--device {name} is not available here ({reason})") from error
    if device.type == "cpu":
        _multiply_by_onednn()
    return device


def _multiply_by_onednn() -> None:
    """Use oneDNN for float32 matrix products where it is faster than MKL, at the same precision.

    MKL uses half of the vector units of AMD processors with AVX-512. PyTorch uses oneDNN if lower
    precision is allowed; oneDNN lowers the precision of float32 only on processors with AMX.
    """
    by_amd = "AuthenticAMD" in system_text(Path("/proc/cpuinfo"))
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    if by_amd and not amx and torch.backends.cpu.get_cpu_capability() == "AVX512":
        torch.set_float32_matmul_precision("medium")


def lower_precision(device: torch.device) -> None:
    """Let a GPU use TF32 for float32 matrix products, in runs that use bfloat16 for most work."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate: the minimum for the GPU and for the machine.

    For the machine this is the available memory of Linux, or the rest of a control group's limit
    if that is less; on other systems all installed memory. None if it is unknown.
    """
    found = []
    if device.type == "cuda":
        found.append(torch.cuda.mem_get_info(device)[0])
    machine = machine_memory()
    if machine is not None:
        found.append(machine)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that PyTorch has reserved on a GPU, or that this process has held.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
