"""A residual convolutional network on a square lattice."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.config import Layers, PositiveInt, Section, Whole
from molgen_energy.errors import InputError

_GROUPS = 8


def _check_odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError(f"expected an odd number such as 3, not {number}")
    return number


class ResNetConfig(Section):
    """Residual convolutional network, see `ResNet`."""

    name: str = "resnet"
    layers: Layers = 6
    width: PositiveInt = 256
    kernel: Annotated[Whole, Field(gt=0, le=15), AfterValidator(_check_odd)] = 3
    """Odd side length of the convolution kernels."""
    learning_rate: ClassVar[float] = 1e-3
    """`training.lr: auto`. Kaba et al., NeurIPS 2025, section 5: Adam at 1e-3 for every loss."""

    def check_lattice(self, size: int, periodic: bool) -> None:
        """Raise `InputError` if a kernel covers a periodic lattice more than once."""
        if periodic and self.kernel // 2 > size:
            raise InputError(
                f"model.kernel: {self.kernel} goes more than once around a lattice of size {size}; "
                "choose a smaller one"
            )

    def build(self, channels: int, periodic: bool) -> ResNet:
        """The network with random weights; parameters are those of `ResNet`."""
        return ResNet(channels, self.layers, self.width, self.kernel, periodic)


class ResNet(nn.Module):
    """One output at each site of a lattice, from C inputs at each site.

    A convolution to W channels, then residual layers h + conv(SiLU(norm(h))), then a linear layer
    at each site: `layers` convolutions in all. Layers are normalised in groups of channels over the
    lattice (GroupNorm), so the output of a lattice does not depend on the rest of the batch.

    Parameters
    ----------
    channels
        C.
    layers
        Number of convolutions. The receptive field of a site extends by layers·(kernel − 1)/2.
    width
        W; a multiple of 8 is normalised in 8 groups, any other width in one.
    kernel
        Odd side length of the convolution kernels.
    periodic
        Whether boundaries are periodic; otherwise the lattice is padded with zeros.
    """

    Config: ClassVar[type[ResNetConfig]] = ResNetConfig

    def __init__(
        self,
        channels: int = 2,
        layers: int = 6,
        width: int = 256,
        kernel: int = 3,
        periodic: bool = False,
    ) -> None:
        super().__init__()
        mode: Literal["circular", "zeros"] = "circular" if periodic else "zeros"
        groups = _GROUPS if width % _GROUPS == 0 else 1

        def convolution(inputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, width, kernel, padding=kernel // 2, padding_mode=mode)

        self.first = convolution(channels)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(layers))
        self.convolutions = nn.ModuleList(convolution(width) for _ in range(layers - 1))
        self.read = nn.Conv2d(width, 1, 1)

    def forward(self, sites: Tensor) -> Tensor:
        """Outputs (B, L, L) at the sites of lattices (B, C, L, L)."""
        h = self.first(sites)
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            h = h + convolution(F.silu(norm(h)))
        read: Tensor = self.read(F.silu(self.norms[-1](h)))
        return read.squeeze(1)
