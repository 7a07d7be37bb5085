"""The optimiser Muon: momentum with orthogonalised updates of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from molgen_energy.models.pair_network import PairNetwork
from molgen_energy.training.clipping import gradients_of

_MOMENTUM = 0.95
_ITERATIONS = 5
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_SIZE = 0.2  # root mean square of an update at a rate of 1, about that of AdamW's


class Muon(torch.optim.Optimizer):
    """θ ← θ − 0.2 η √max(m, n)·O, O the nearest matrix to the momentum with singular values near 1.

    Keller Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon), with Nesterov's momentum
    0.95 and five Newton–Schulz iterations; the factor is that of Liu et al., 2025
    (arXiv:2502.16982). Iterations run in float32: on a CPU bfloat16 is no faster.

    Parameters
    ----------
    parameters
        Matrices, or groups of them.
    lr
        η.
    """

    def __init__(self, parameters: ParamsT, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient are unchanged.

        If the attribute `found_inf` is set, as for PyTorch's fused optimizers, nothing changes
        where it is 1.
        """
        refused: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in alike.items():
                updates = orthogonal(self._directions(parameters, refused))
                rate = group["lr"] * _SIZE * max(shape) ** 0.5
                updates *= -rate if refused is None else -rate * (1 - refused)
                torch._foreach_add_([*parameters], list(updates.unbind()))

    def _directions(self, parameters: list[nn.Parameter], refused: Tensor | None) -> Tensor:
        """Update the momenta, and return Nesterov's interpolation from gradients, (B, m, n)."""
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        own = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients, momenta = torch.stack(gradients_of(parameters)), torch.stack(own)
        if refused is not None:  # gradients may hold NaN
            gradients = torch.where(refused > 0, momenta, gradients)
        momenta.lerp_(gradients, 1 - _MOMENTUM)
        torch._foreach_copy_(own, list(momenta.unbind()))
        return gradients.lerp_(momenta, _MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (B, m, n) with the same singular vectors, and singular values from 0.7 to 1.2."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    result: Tensor = x if wide else x.mT
    return result


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Matrices of the model's `layers` from states to states, without features and read-outs."""
    narrow: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, PairNetwork):
            narrow.update(module.read.parameters())
            narrow.update(() if module.feature is None else module.feature.parameters())
    return [
        parameter
        for name, parameter in model.named_parameters()
        if "layers" in name.split(".") and parameter.ndim == 2 and parameter not in narrow
    ]
