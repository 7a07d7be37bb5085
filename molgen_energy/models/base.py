"""The interface of denoisers, and the base of the sections that configure them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from molgen_energy.config import Layers, PositiveFloat, PositiveInt, Section
from molgen_energy.diffusion.state import Layout, State, pairs_inside


class ChannelAxis(NamedTuple):
    """An axis of a parameter with one entry for each channel of inputs or outputs."""

    axis: int
    names: tuple[str, ...]
    """Of the channels, each once."""


def input_channels(layer: str, names: Sequence[str]) -> dict[str, ChannelAxis]:
    """The channels of the inputs of a linear layer, by name of the parameter."""
    return {f"{layer}.weight": ChannelAxis(1, tuple(names))}


def output_channels(layer: str, names: Sequence[str]) -> dict[str, ChannelAxis]:
    """The channels of the outputs of a linear layer, by name of the parameter."""
    axis = ChannelAxis(0, tuple(names))
    return {f"{layer}.weight": axis, f"{layer}.bias": axis}


class Denoiser(nn.Module, ABC):
    """A network that predicts noise, velocity or clean data of every field of a noisy state.

    Which of these it predicts is a property of the process that trains it
    (`molgen_energy.diffusion.process.Process.prediction`), not of the network.

    Parameters
    ----------
    layout
        Fields of the states.
    """

    Config: ClassVar[type[DenoiserConfig]]
    """The section that configures it."""
    equivariant: ClassVar[bool] = False
    """Whether it is E(3)-equivariant: rotations and reflections of the positions do the same to the
    output, and translations leave it unchanged."""
    self_conditioned: ClassVar[bool] = False
    """Whether it takes its previous clean prediction as input (Chen, Zhang, Hinton, ICLR 2023)."""
    noise_input: ClassVar[Literal["time", "log_snr"]] = "time"
    """What it takes as `time`: the diffusion time, or the log signal-to-noise ratio."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    @classmethod
    def channel_axes(
        cls, layout: Layout, condition: Sequence[str] = ()
    ) -> Mapping[str, ChannelAxis]:
        """The parameters with an axis of channels, by name, of the network for a layout.

        Training on molecules of other elements can then start from the weights of this network. By
        default none is known, and weights fit the same channels alone.

        Parameters
        ----------
        layout
            Fields of the states; `Layout.channel_names` names their channels.
        condition
            Names of the K channels of a condition; empty without a condition.
        """
        return {}

    @abstractmethod
    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        """Predict every field.

        Parameters
        ----------
        state
            The noisy state; values at padding have no effect.
        time
            (B,), diffusion time in [0, 1], or the log signal-to-noise ratio; see `noise_input`.
        mask
            (B, N), true at real atoms.
        condition
            (B, K) properties of the samples, normalised; None without conditions.
        self_condition
            The previous clean prediction; None in the first evaluation.

        Returns
        -------
        A state of the same layout, on the subspaces of its fields.
        """


PUBLISHED_ATOMS = 18.03
"""Mean number of atoms of QM9's training molecules, which published weights are for."""


class Published(NamedTuple):
    """Published learning rate and weight of the loss on positions, the values of `auto`.

    The weight is for springs of mean 1 over all pairs, for errors of features averaged over real
    atoms, and for molecules of the size of QM9's. An energy grows with the number of atoms, errors
    of features do not: with larger molecules its weight is smaller, see `PUBLISHED_ATOMS`.
    """

    lr: float
    position_weight: float


class DenoiserConfig(Section):
    """Base of the sections of networks, told apart by `name`."""

    name: str
    fields: ClassVar[tuple[str, ...]] = ("positions", "elements", "nuclear_charges")
    """Fields of a molecule that the network predicts, names of `MOLECULE_FIELDS`."""
    conditional: ClassVar[bool] = False
    """Whether the network accepts a condition."""
    published: ClassVar[Mapping[tuple[str, str | None], Published]] = {}
    """Values of `auto`, by name and variant of the loss; the variant of the energy is its spring
    family."""

    def build(self, layout: Layout, condition_channels: int, low_precision: bool) -> Denoiser:
        """The network with random weights.

        Parameters
        ----------
        layout
            Fields of the states.
        condition_channels
            K, channels of a condition; 0 without a condition.
        low_precision
            Whether to run the work on pairs in bfloat16.
        """
        raise NotImplementedError


class AtomNetworkConfig(DenoiserConfig):
    """Base of the sections of networks with one vector for each atom."""

    layers: Layers = 9
    width: PositiveInt = 256
    normalization: PositiveFloat = 1.0
    """Sums over an atom's neighbours are divided by it."""


def pair_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N, N) from (B, N): 1 for pairs of different real atoms, else 0."""
    return pairs_inside(mask).to(dtype)


def embed_condition(channels: int, width: int) -> nn.Linear | None:
    """A linear layer from a condition (B, K) to a bias of atom states; None without a condition."""
    return nn.Linear(channels, width) if channels else None


def add_condition(h: Tensor, embedding: nn.Linear | None, condition: Tensor | None) -> Tensor:
    """Atom states (B, N, W) plus the embedded condition (B, K), the same for all atoms.

    `embedding` is that of `embed_condition`; without it, the states are returned as they are.
    """
    if embedding is None:
        return h
    assert condition is not None
    bias: Tensor = embedding(condition)
    return h + bias[:, None]


def atom_network_channels(
    inputs: Sequence[str], outputs: Sequence[str], condition: Sequence[str]
) -> dict[str, ChannelAxis]:
    """`Denoiser.channel_axes` of a network with the linear layers `embed` and `readout`."""
    axes = input_channels("embed", inputs) | output_channels("readout", outputs)
    return axes | (input_channels("embed_condition", condition) if condition else {})
