"""Which derivatives a loss has that computes its gradient itself or holds parts of it constant.

Its first derivative with respect to the prediction is right. PyTorch would return wrong second
derivatives, and no derivative with respect to an input whose effect is held constant, both without
an error. Here they are refused, in reverse and in forward mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from molgen_energy.losses.base import Neighbours, Samples


def once_differentiable(samples: Samples, loss: str, constants: Iterable[str]) -> Samples:
    """The samples with a prediction that can be differentiated once.

    Parameters
    ----------
    samples
        Of a call.
    loss
        What a message calls the loss.
    constants
        Names of the inputs besides the prediction that have an effect on the loss.

    Raises
    ------
    ValueError
        A gradient or a forward derivative with respect to one of `constants` is asked for.
    """
    for name in constants:
        values = getattr(samples, name)
        if isinstance(values, Neighbours):
            values = values.weight
        if values is not None and is_differentiated(values):
            raise ValueError(f"the {name} of {loss} gets no gradient: detach it")
    prediction: Tensor = _Once.apply(samples.prediction)  # type: ignore[no-untyped-call]
    return replace(samples, prediction=prediction)


def is_differentiated(values: Tensor) -> bool:
    """Whether a derivative with respect to the values is asked for, in either mode."""
    if values.requires_grad and torch.is_grad_enabled():
        return True
    tangent = forward_ad.unpack_dual(values).tangent  # type: ignore[no-untyped-call]
    return tangent is not None


def with_gradient(point: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """The value (B,) of a function at a point (B, N, D), with its gradient at this point.

    The point is the prediction of `once_differentiable`.
    """
    result: Tensor = _KnownGradient.apply(point, value, gradient)  # type: ignore[no-untyped-call]
    return result


class _KnownGradient(torch.autograd.Function):
    """A function of (B, N, D) whose value (B,) and gradient were computed together."""

    @staticmethod
    def forward(point: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[:, None, None] * gradient, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        (gradient,) = ctx.saved_tensors
        change: Tensor = (gradient * tangent).sum(dim=(1, 2))
        return change


class _Once(torch.autograd.Function):
    """The identity, whose derivative depends on the point so that it can be refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(point: Tensor) -> Tensor:
        return point.view_as(point)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return _derivative(upstream, *ctx.saved_tensors) if torch.is_grad_enabled() else upstream

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _derivative(tangent, *ctx.saved_tensors)


def _derivative(change: Tensor, point: Tensor) -> Tensor:
    result: Tensor = _Derivative.apply(change, point)  # type: ignore[no-untyped-call]
    return result


class _Derivative(torch.autograd.Function):
    """A derivative at a point, which cannot be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(change: Tensor, point: Tensor) -> Tensor:
        return change.view_as(change)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        raise RuntimeError("this loss has no second derivative")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError("this loss has no second derivative")
