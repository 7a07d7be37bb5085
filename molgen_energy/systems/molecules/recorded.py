"""A denoiser whose evaluations a GPU repeats without Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from molgen_energy.diffusion.state import Domain, State
from molgen_energy.training.graphs import GraphCache, Recorder


class RecordedDenoiser(nn.Module):
    """Evaluates a denoiser, as a CUDA graph from the second evaluation of a shape.

    Parameters
    ----------
    module
        The denoiser; its weights must keep their memory.
    recorder
        Records on its device.
    """

    def __init__(self, module: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.module = module
        self._graphs = GraphCache(recorder)

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        """The prediction, as of `Denoiser.forward`."""
        layout = state.layout
        given = {"time": time, "mask": mask, "condition": condition}
        tensors = {name: values for name, values in given.items() if values is not None}
        tensors |= {f"state/{domain}": values for domain, values in state.tensors.items()}
        if self_condition is not None:
            tensors |= {f"self/{domain}": x for domain, x in self_condition.tensors.items()}

        def evaluate(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            def read(kind: str) -> State:
                fields = {d: inputs[f"{kind}/{d}"] for d in layout.channels}
                return State(layout, inputs["mask"], fields)

            previous = None if self_condition is None else read("self")
            result = self.module(
                read("state"), inputs["time"], inputs["mask"], inputs.get("condition"), previous
            )
            return {str(domain): values for domain, values in result.tensors.items()}

        results = self._graphs(evaluate, tensors)
        # Copies, since samplers remember predictions.
        return State(layout, mask, {cast(Domain, d): x.clone() for d, x in results.items()})
