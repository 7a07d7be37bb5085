"""Which device to run on."""

from __future__ import annotations

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
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"--device {name} is not available here ({reason})") from error
    return device
