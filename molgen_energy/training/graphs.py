"""CUDA graphs: the work of a function on a GPU, recorded once for each shape and then repeated.

A step of training launches hundreds of small kernels. For small batches the processor takes longer
to launch them than the GPU to run them; a recorded step is launched at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from molgen_energy.errors import InputError

_MOST_GRAPHS = 64  # each takes some MB, and a second to record
_MOST_SEEN = 4096  # shapes that are remembered until they come again

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], dict[str, Tensor]]


class Recorder(Protocol):
    """Runs functions on a device, and records what they do."""

    def run(self, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run a function in the same circumstances as `record` does; returns its results."""
        ...

    def record(
        self, function: Callable[[], dict[str, Tensor]]
    ) -> tuple[Callable[[], object], dict[str, Tensor]]:
        """What repeats the work of a function, and the results, whose memory it writes.

        Nothing is computed yet.
        """
        ...


class CUDARecorder:
    """Records CUDA graphs, which share their memory: they must be repeated one after another.

    Parameters
    ----------
    device
        The GPU.
    option
        What asked for it, for messages.

    Raises
    ------
    InputError
        The device is no GPU.
    """

    def __init__(self, device: torch.device, option: str) -> None:
        if device.type != "cuda":
            raise InputError(f"{option} is for GPUs, not {device.type}; leave it out")
        self._option = option
        # Gradients are added on the stream of the first one, so all work is on this one.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run a function on the stream that `record` uses."""
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            results = function()
        outer.wait_stream(self._stream)
        return results

    def record(
        self, function: Callable[[], dict[str, Tensor]]
    ) -> tuple[Callable[[], object], dict[str, Tensor]]:
        """Record a function.

        Raises
        ------
        InputError
            It waits for the GPU, or copies from or to it.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                results = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:120]
            raise InputError(
                f"{self._option}: this network or loss cannot be recorded ({reason}); leave it out"
            ) from error
        return graph.replay, results


@dataclass(frozen=True)
class _Graph:
    inputs: dict[str, Tensor]
    replay: Callable[[], object]
    results: dict[str, Tensor]


class GraphCache:
    """Calls functions of named tensors, and repeats their work for shapes that come again.

    The first call with tensors of certain names, shapes and types runs the function. The second one
    records it. This one and all later ones copy the tensors to where the recorded function reads
    its arguments, and repeat its work. A function must do the same for the same shapes, and what it
    reads or changes besides its arguments must keep its memory.

    Parameters
    ----------
    recorder
        Records on a device.
    most
        Recorded functions; other shapes are run each time.
    """

    def __init__(self, recorder: Recorder, most: int = _MOST_GRAPHS) -> None:
        self._recorder, self._most = recorder, most
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, function: Function, tensors: Tensors) -> dict[str, Tensor]:
        """The results of a function, until the next call.

        Parameters
        ----------
        function
            Of the tensors by name; all calls with tensors of the same shapes mean the same one.
        tensors
            Its arguments, on the device.

        Raises
        ------
        InputError
            The function cannot be recorded.
        """
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in tensors.items())
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen or len(self._graphs) == self._most:
                if len(self._seen) == _MOST_SEEN:
                    self._seen.clear()
                self._seen.add(key)
                return self._recorder.run(lambda: function(tensors))
            inputs = {name: torch.empty_like(x) for name, x in tensors.items()}
            graph = _Graph(inputs, *self._recorder.record(lambda: function(inputs)))
            self._graphs[key] = graph
        for name, values in tensors.items():
            graph.inputs[name].copy_(values, non_blocking=True)
        graph.replay()
        return graph.results
