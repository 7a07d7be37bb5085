"""A residual convolutional network on a square lattice."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

_GROUPS = 8


class ResNet(nn.Module):
    """A number at each site of a lattice, from C numbers at each site.

    A convolution to W channels, then residual layers h + conv(SiLU(norm(h))), then a linear
    read-out at each site: `layers` convolutions in all. Layers are normalised in groups of channels
    over the lattice (GroupNorm), so a lattice's output does not depend on the rest of its batch.

    Parameters
    ----------
    channels
        C.
    layers
        Convolutions. A site sees others up to layers·(kernel − 1)/2 away.
    width
        W; with a multiple of 8 there are 8 groups, else one.
    kernel
        Odd side of a convolution's window.
    periodic
        Whether the lattice is closed to a torus; else zeros surround it.
    """

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
        """Numbers (B, L, L) at the sites of lattices (B, C, L, L)."""
        h = self.first(sites)
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            h = h + convolution(F.silu(norm(h)))
        read: Tensor = self.read(F.silu(self.norms[-1](h)))
        return read.squeeze(1)
