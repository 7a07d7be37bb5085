"""GDM: a plain message-passing network on coordinates, not equivariant by construction.

The graph network of "GDM" in Hoogeboom et al., ICML 2022, as Kaba et al., NeurIPS 2025, use it:
width 256 and 9 layers make 3.56 M parameters.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.models.geometry import centred


class MessageLayer(nn.Module):
    """h_i ← h_i + φ_h(h_i, Σ_{j≠i} g_ij m_ij), m_ij = φ_m(h_i, h_j), g_ij = σ(w·m_ij).

    φ_m and φ_h are two linear layers with SiLU between; φ_m has one behind as well.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # The first linear layer of φ_m on [h_i, h_j] is W_r h_i + W_s h_j: the same function, done
        # once for each atom rather than once for each pair.
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.message = nn.Linear(width, width)
        self.gate = nn.Linear(width, 1)
        self.update_in = nn.Linear(2 * width, width)
        self.update_out = nn.Linear(width, width)
        with torch.no_grad():  # the scale that one layer of input 2·width would start with
            for parameter in (self.receiver.weight, self.receiver.bias, self.sender.weight):
                parameter.mul_(0.5**0.5)

    def forward(self, h: Tensor, pairs: Tensor, low_precision: bool) -> Tensor:
        """Atom states (B, N, W) to new ones; pairs (B, N, N) is 1 where j sends to i, else 0."""
        hidden = F.silu(self.receiver(h)[:, :, None] + self.sender(h)[:, None, :])
        # Only the work on pairs runs in bfloat16; coordinates enter `receiver` and `sender` and are
        # subtracted in float32.
        rough = torch.autocast(h.device.type, torch.bfloat16) if low_precision else nullcontext()
        with rough:
            message = F.silu(self.message(hidden))
            gate = torch.sigmoid(self.gate(message)).squeeze(-1) * pairs.to(message.dtype)
            gathered = torch.matmul(gate[:, :, None, :], message).squeeze(2)
        update = self.update_in(torch.cat([h, gathered.to(h.dtype)], dim=-1))
        change: Tensor = self.update_out(F.silu(update))
        return h + change


class GDM(nn.Module):
    """Noise of positions and features, predicted from a noisy molecule.

    Parameters
    ----------
    features
        F, channels of an atom besides its position.
    layers, width
        Depth and width of the network.
    low_precision
        Run the work on pairs in bfloat16; parameters, states and the result stay float32.
    """

    def __init__(
        self, features: int, layers: int = 9, width: int = 256, low_precision: bool = False
    ) -> None:
        super().__init__()
        self.low_precision = low_precision
        self.embed = nn.Linear(3 + features + 1, width)
        self.layers = nn.ModuleList(MessageLayer(width) for _ in range(layers))
        self.readout = nn.Linear(width, 3 + features)

    def forward(self, noisy: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        noisy
            (B, N, 3+F), positions first; what stands at padding has no effect.
        time
            (B,), diffusion time in [0, 1].
        mask
            (B, N), true at real atoms.

        Returns
        -------
        (B, N, 3+F): the noise, that of the positions with zero mean over the atoms, zero at
        padding.
        """
        atoms = mask[..., None]
        noisy = torch.where(atoms, noisy, 0)
        times = time[:, None, None].expand(*mask.shape, 1)
        apart = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        pairs = (mask[:, :, None] & mask[:, None, :] & apart).to(noisy.dtype)
        h = self.embed(torch.cat([noisy, times], dim=-1))
        for layer in self.layers:
            h = layer(h, pairs, self.low_precision)
        noise = torch.where(atoms, self.readout(h), 0)
        return torch.cat([centred(noise[..., :3], mask), noise[..., 3:]], dim=-1)
