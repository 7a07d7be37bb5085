"""Fields that a denoiser gets without noise, so that it generates the others for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from molgen_energy.diffusion.state import State


class GivenFields(nn.Module):
    """A denoiser that sees the clean values of some fields at every noise level.

    The process adds noise to all fields; this puts the clean values into the noisy state, and into
    the previous prediction. What the denoiser returns for these fields has no meaning. Conformers
    are generated so: elements and bonds are given, positions are not.

    Parameters
    ----------
    denoiser
        Called as denoiser(state, time, mask, condition, self_condition).
    names
        The given fields.
    clean
        Their values, with any values of the other fields.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str], clean: State) -> None:
        super().__init__()
        self.module = denoiser
        self._values = {name: clean[name] for name in names}

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        """The prediction, as of `Denoiser.forward`."""
        previous = None if self_condition is None else self_condition.replace(**self._values)
        result: State = self.module(state.replace(**self._values), time, mask, condition, previous)
        return result
