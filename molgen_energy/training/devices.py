"""Which device to run on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from molgen_energy.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` takes a GPU where there is one.

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
    """Take products in float32 from oneDNN where that is faster than MKL, at the same precision.

    MKL uses half the vector units of AMD's processors with AVX-512. PyTorch takes oneDNN where
    lower precision is allowed, which oneDNN has for float32 on processors with AMX alone.
    """
    by_amd = "AuthenticAMD" in _text("/proc/cpuinfo")
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
    if by_amd and not amx and torch.backends.cpu.get_cpu_capability() == "AVX512":
        torch.set_float32_matmul_precision("medium")


def lower_precision(device: torch.device) -> None:
    """Let a GPU take products of float32 matrices in TF32, where bfloat16 serves for most."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take: of a GPU's memory and of the machine's, the lesser.

    The machine's is what Linux calls available, or what a control group leaves of its limit where
    that is less; elsewhere all that is installed. None where the system does not say.
    """
    found = []
    if device.type == "cuda":
        found.append(torch.cuda.mem_get_info(device)[0])
    lines = _text("/proc/meminfo").splitlines()
    found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit, used = (_text(f"/sys/fs/cgroup/memory.{what}").strip() for what in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        # Pages of files count as used, but go when memory is wanted.
        parts = dict(line.split() for line in _text("/sys/fs/cgroup/memory.stat").splitlines())
        cache = int(parts.get("inactive_file", 0)) + int(parts.get("slab_reclaimable", 0))
        found.append(max(0, int(limit) - int(used) + cache))
    if not lines and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""
