"""Build the networks of physical systems, in the memory that there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from molgen_energy.formats.limits import check_memory

_BYTES = 4  # of a parameter


def build_network(section: Any, seed: int, *arguments: Any) -> nn.Module:
    """Build a network with random weights of a seed, if it fits the memory.

    Parameters
    ----------
    section
        The section of the network; its `build` is called with the other arguments.
    seed
        Of the weights.

    Raises
    ------
    InputError
        The network takes more memory than there is.
    """
    check_network_memory(section, *arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = section.build(*arguments)
        return network


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves out the random numbers of weights, whose import for the device `meta` takes 2 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        drawn = func in (torch.Tensor.normal_, torch.Tensor.uniform_)
        if drawn or getattr(func, "__module__", "") == nn.init.__name__:
            return named.get("tensor", *args[:1])
        return func(*args, **named)


def check_network_memory(section: Any, *arguments: Any) -> None:
    """Raise `InputError` where weights of a network, and their copy in a file, exceed the memory.

    Networks of one and two layers are built without memory, on the device `meta`; each further
    layer has as many parameters as the second one.
    """

    def parameters(**changes: Any) -> int:
        with torch.device("meta"), _NoRandomNumbers():
            network = section.model_copy(update=changes).build(*arguments)
        return sum(parameter.numel() for parameter in network.parameters())

    layers = getattr(section, "layers", None)
    try:
        if isinstance(layers, int) and layers > 2:
            one, two = parameters(layers=1), parameters(layers=2)
            count = one + (layers - 1) * (two - one)
        else:
            count = parameters()
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():  # a network that cannot be built without memory
            return
        count = 2**63
    what = f"model {section.name} with its {count:,} parameters"
    check_memory(2 * _BYTES * count, what, "lower model.width or model.layers")
