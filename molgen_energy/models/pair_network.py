"""The network on pairs of atoms in every layer of GDM and EDM.

m_ij = SiLU(W·SiLU(a_i + b_j + Σ_k e_ijk·f_k) + c) for all ordered pairs of a molecule's atoms, and
one or more numbers r·m_ij + o of each. With a = A·h + c' and b = B·h this is a network of two
layers on [h_i, h_j, e_ij]: the first layer is linear, so it splits into a receiver and a sender
part, computed once for each atom rather than once for each pair.

The messages m of a batch of 64 molecules of QM9 at width 256 take 20 MB, and autograd would keep
five such tensors for each layer. This implementation works in blocks that fit the processor's
cache, and its backward pass recomputes everything except the product with W. On a GPU with Triton,
the kernels of `pair_kernels` do the work, or those of `fused_kernels` where they are faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from shutil import which
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Elements of a block. On a CPU three buffers for each core fit in its part of the cache; on a GPU
# memory limits the size of a block.
_BLOCK_PER_THREAD, _BLOCK_GPU = 1 << 20, 1 << 27
# A layer keeps the product with W for the backward pass up to this many bytes, else recomputes it:
# a third more work.
_KEPT_CPU, _KEPT_GPU = 1 << 28, 1 << 29
# Most elements of messages for which kernels are used, and the widths that they support.
_KERNELS_GPU, _KERNEL_WIDTHS, _FUSED_WIDTHS = 1 << 29, (32, 64, 128, 256, 512), (64, 128, 256)


class PairNetwork(nn.Module):
    """m_ij = φ(h_i, h_j, e_ij) for all pairs of atoms, and linear read-outs of each.

    φ is two linear layers, each followed by SiLU.

    Parameters
    ----------
    width
        W, of atoms' states, of the hidden layer and of messages.
    features
        K, of pairs.
    offset
        Whether read-outs have a bias.
    channels
        C, read-outs besides the first.
    """

    def __init__(
        self, width: int, features: int = 0, offset: bool = True, channels: int = 0
    ) -> None:
        super().__init__()
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.feature = nn.Linear(features, width, bias=False) if features else None
        self.linear = nn.Linear(width, width)
        self.read = nn.Linear(width, 1 + channels, bias=offset)
        # The initial scale of one layer on [h_i, h_j, e_ij].
        bound = (2 * width + features) ** -0.5
        for layer in (self.receiver, self.sender, self.feature):
            for parameter in layer.parameters() if layer is not None else ():
                nn.init.uniform_(parameter, -bound, bound)

    def gated_sum(
        self, h: Tensor, pairs: Tensor, features: Tensor | None = None, low_precision: bool = False
    ) -> Tensor:
        """Σ_j P_ij·σ(r·m_ij + o)·m_ij for each atom i, (B, N, W).

        Parameters
        ----------
        h
            States of atoms, (B, N, W).
        pairs
            P, (B, N, N): 1 where j sends to i, else 0.
        features
            e, (B, N, N, K).
        low_precision
            Messages and products in bfloat16. Their inputs a + b + e·f are summed in the precision
            of h: positions are subtracted there.
        """
        gathered, _ = self._apply_to(h, pairs, features, low_precision)
        return gathered

    def gated_sum_and_channels(
        self, h: Tensor, pairs: Tensor, features: Tensor | None = None, low_precision: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The gated sum, and the C further read-outs of all pairs, (B, N, N, C)."""
        return self._apply_to(h, pairs, features, low_precision)

    def values(
        self, h: Tensor, features: Tensor | None = None, low_precision: bool = False
    ) -> Tensor:
        """r·m_ij + o for all pairs, (B, N, N); for the parameters see `gated_sum`."""
        values, _ = self._apply_to(h, None, features, low_precision)
        return values

    def _apply_to(
        self, h: Tensor, pairs: Tensor | None, features: Tensor | None, low_precision: bool
    ) -> tuple[Tensor, Tensor]:
        receiver, sender = self.receiver(h), self.sender(h)
        dtype = torch.bfloat16 if low_precision else receiver.dtype
        function = _function(receiver, features, pairs is not None, dtype, self.read.out_features)
        return function(
            receiver,
            sender,
            features,
            pairs,
            dtype,
            self.linear.weight,
            self.linear.bias,
            self.read.weight,
            self.read.bias,
            None if self.feature is None else self.feature.weight,
        )


PairSums = Callable[..., tuple[Tensor, Tensor]]
"""Takes states of receivers and senders, features, pairs, the precision, and the weights."""


def _in_blocks(
    receiver: Tensor,
    sender: Tensor,
    features: Tensor | None,
    pairs: Tensor | None,
    dtype: torch.dtype,
    *weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    low, recording = dtype != receiver.dtype, torch.is_grad_enabled()
    result: tuple[Tensor, Tensor] = _PairFunction.apply(  # type: ignore[no-untyped-call]
        receiver, sender, features, pairs, low, recording, *weights
    )
    return result


def _function(
    receiver: Tensor, features: Tensor | None, gated: bool, dtype: torch.dtype, numbers: int
) -> PairSums:
    """What computes pairs of such states: fused kernels, those of `pair_kernels`, or blocks."""
    if not _kernels_serve(receiver):
        return _in_blocks
    from molgen_energy.models.fused_kernels import FusedSums, is_faster
    from molgen_energy.models.pair_kernels import GatedSums

    wanted = features is not None and features.requires_grad
    other: PairSums = GatedSums.apply if gated and not wanted else _in_blocks
    width, count = receiver.shape[-1], 0 if features is None else features.shape[-1]
    if (
        dtype == torch.bfloat16
        and width in _FUSED_WIDTHS
        and torch.cuda.get_device_capability(receiver.device) >= (9, 0)
        and is_faster(other, receiver.device, width, count, numbers, gated, wanted)
    ):
        fused: PairSums = FusedSums.apply
        return fused
    return other


def _kernels_serve(receiver: Tensor) -> bool:
    """Whether kernels support such states."""
    if not receiver.is_cuda or receiver.dtype != torch.float32 or not _has_kernels(receiver.device):
        return False
    _, atoms, width = receiver.shape
    return width in _KERNEL_WIDTHS and 0 < receiver.numel() * atoms <= _KERNELS_GPU


@lru_cache
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton can compile kernels for a GPU here; it calls a C compiler."""
    compiler = "CC" in os.environ or which("gcc") or which("clang")
    if find_spec("triton") is None or not compiler or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def has_onednn() -> bool:
    """Whether PyTorch has oneDNN here."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _fuses_silu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies such matrices, and computes SiLU within the product."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return False  # by MKL or OpenBLAS
    return _has_fused_silu(dtype)


@lru_cache
def _has_fused_silu(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has the operation, which is not part of its public interface."""
    if not has_onednn():
        return False
    one = torch.ones(1, 1, dtype=dtype)
    try:
        found = torch.ops.mkldnn._linear_pointwise(one, one, one[0], "swish", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, F.silu(one + 1), rtol=0.01)


class _Block(NamedTuple):
    """Some receivers of some molecules, with all senders: whole molecules, or part of one."""

    molecules: slice
    receivers: slice


def _blocks(batch: int, atoms: int, width: int, device: torch.device) -> Iterator[_Block]:
    threads = torch.get_num_threads()
    numbers = _BLOCK_PER_THREAD * threads if device.type == "cpu" else _BLOCK_GPU
    receivers = max(1, numbers // (width * max(1, atoms)))
    if receivers >= atoms:
        count = receivers // max(1, atoms)
        for start in range(0, batch, count):
            yield _Block(slice(start, min(start + count, batch)), slice(0, atoms))
        return
    for molecule in range(batch):
        for start in range(0, atoms, receivers):
            part = slice(start, min(start + receivers, atoms))
            yield _Block(slice(molecule, molecule + 1), part)


class _Buffers:
    """Memory for the tensors (b, r, N, W) of a block, reused by all blocks."""

    def __init__(self, count: int, like: Tensor, dtype: torch.dtype) -> None:
        batch, atoms, width = like.shape
        blocks = _blocks(batch, atoms, width, like.device)
        largest = next(blocks, _Block(slice(0, 0), slice(0, 0)))
        rows = (largest.molecules.stop - largest.molecules.start) * (
            largest.receivers.stop - largest.receivers.start
        )
        self._atoms, self._width = atoms, width
        self._flat = [like.new_empty(rows * atoms * width, dtype=dtype) for _ in range(count)]

    def of(self, block: _Block) -> list[Tensor]:
        """The buffers in the shape of a block's pairs."""
        batch = block.molecules.stop - block.molecules.start
        rows = block.receivers.stop - block.receivers.start
        shape = (batch, rows, self._atoms, self._width)
        size = batch * rows * self._atoms * self._width
        return [flat[:size].view(shape) for flat in self._flat]


def _silu_backward(gradient: Tensor, at: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(gradient, at, grad_input=out)


class _PairFunction(torch.autograd.Function):
    """Gated sums with a mask of pairs, else values of pairs; and further channels of pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        receiver: Tensor,
        sender: Tensor,
        features: Tensor | None,
        pairs: Tensor | None,
        low_precision: bool,
        recording: bool,  # of gradients, which is off inside this function
        weight: Tensor,
        bias: Tensor,
        read: Tensor,
        offset: Tensor | None,
        feature: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, atoms, width = receiver.shape
        dtype = torch.bfloat16 if low_precision else receiver.dtype
        shape = (batch, atoms, atoms, width)
        on_cpu = receiver.device.type == "cpu"
        size = batch * atoms * atoms * width * torch.finfo(dtype).bits // 8
        keep = (
            recording and any(ctx.needs_input_grad) and size <= (_KEPT_CPU if on_cpu else _KEPT_GPU)
        )
        kept = receiver.new_empty(shape, dtype=dtype) if keep else None
        values = receiver.new_empty(batch, atoms, atoms)
        gathered = torch.empty_like(receiver) if pairs is not None else None
        network = _Forward(receiver, sender, features, weight, bias, feature, dtype)
        reader, channels = read.to(dtype), len(read) - 1
        numbers = receiver.new_empty(batch, atoms, atoms, len(read), dtype=dtype)
        buffers = _Buffers(2, receiver, dtype)
        fused = not recording and _fuses_silu(receiver.device, dtype)
        for block in _blocks(batch, atoms, width, receiver.device):
            hidden, message = buffers.of(block)
            network.hidden(block, hidden)
            F.silu(hidden, inplace=True)
            if fused:
                message = network.activated(hidden)
            else:
                linear = message if kept is None else kept[block]
                network.linear(hidden, linear)
                torch.ops.aten.silu.out(linear, out=message)
            part, read_out = values[block], numbers[block]
            if channels:
                torch.mm(message.view(-1, width), reader.t(), out=read_out.view(-1, len(read)))
            else:
                torch.mv(message.view(-1, width), reader[0], out=read_out.view(-1))
            part.copy_(read_out[..., 0])
            if gathered is not None:
                assert pairs is not None
                if offset is not None:
                    part.add_(offset[0])
                part.sigmoid_()
                gate = (part * pairs[block]).to(dtype).view(-1, 1, atoms)
                rows = torch.bmm(gate, message.view(-1, atoms, width))
                gathered[block].copy_(rows.view(gathered[block].shape))
        if gathered is None and offset is not None:
            values.add_(offset[0])
        further = numbers[..., 1:].to(receiver.dtype, copy=True)
        if offset is not None:
            further.add_(offset[1:])
        ctx.dtype = dtype
        gates = values if gathered is not None else None
        # Saved by autograd, which frees them after this layer's backward pass.
        ctx.save_for_backward(
            receiver, sender, features, pairs, weight, bias, read, offset, feature, kept, gates
        )
        return values if gathered is None else gathered, further

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, outer_further: Tensor) -> tuple[Tensor | None, ...]:
        (
            receiver, sender, features, pairs, weight, bias, read, offset, feature, kept, gates,
        ) = ctx.saved_tensors  # fmt: skip
        dtype: torch.dtype = ctx.dtype
        batch, atoms, width = receiver.shape
        network = _Forward(receiver, sender, features, weight, bias, feature, dtype)
        reader, matrix, channels = read.to(dtype), network.matrix, len(read) - 1
        d_receiver, d_sender = torch.empty_like(receiver), torch.zeros_like(sender)
        # Features are data, unless the input needs a gradient.
        wanted = features is not None and ctx.needs_input_grad[2]
        d_features = torch.empty_like(features) if wanted else None
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        d_read = torch.zeros_like(read)
        d_offset = None if offset is None else torch.zeros_like(offset)
        d_feature = None if feature is None else torch.zeros_like(feature)
        buffers = _Buffers(3, receiver, dtype)
        for block in _blocks(batch, atoms, width, receiver.device):
            first, second, third = buffers.of(block)
            if kept is None:
                network.hidden(block, first)
                F.silu(first, inplace=True)
                linear = third
                network.linear(first, linear)
            else:
                linear = kept[block]
            message = first
            torch.ops.aten.silu.out(linear, out=message)
            # Gradient of the values, then that of the messages, in `second`.
            if gates is not None:
                gate, allowed = gates[block], pairs[block]
                from_sum = outer[block].to(dtype)[:, :, None]
                torch.mul(message, from_sum, out=second)
                d_value = second.sum(dim=-1, dtype=gate.dtype) * allowed * gate * (1 - gate)
                torch.mul((gate * allowed).to(dtype)[..., None], from_sum, out=second)
                second.view(-1, width).addr_(d_value.to(dtype).view(-1), reader[0])
            else:
                d_value = outer[block]
                torch.mul(d_value.to(dtype)[..., None], reader[0], out=second)
            d_read[0].add_(torch.mv(message.view(-1, width).t(), d_value.reshape(-1).to(dtype)))
            if d_offset is not None:
                d_offset[0] += d_value.sum()
            if channels:
                d_further = outer_further[block].reshape(-1, channels)
                second.view(-1, width).addmm_(d_further.to(dtype), reader[1:])
                _add_product(d_read[1:], d_further.to(dtype).t(), message.view(-1, width))
                if d_offset is not None:
                    d_offset[1:] += d_further.sum(dim=0)
            d_linear = second
            _silu_backward(second, linear, d_linear)
            rows = d_linear.view(-1, width)
            d_bias += rows.sum(dim=0, dtype=bias.dtype)
            # `linear` is not needed any more: `third` is free, and `first` after the next lines.
            network.hidden(block, third)
            torch.ops.aten.silu.out(third, out=first)
            _add_product(d_weight, rows.t(), first.view(-1, width))
            torch.mm(rows, matrix, out=first.view(-1, width))
            d_hidden = first
            _silu_backward(first, third, d_hidden)
            torch.sum(d_hidden, dim=2, dtype=receiver.dtype, out=d_receiver[block])
            d_sender[block.molecules] += d_hidden.sum(dim=1, dtype=sender.dtype)
            if features is not None:
                assert d_feature is not None and feature is not None
                flat = d_hidden.view(-1, width).to(feature.dtype)
                own = features[block].reshape(-1, features.shape[-1])
                # For a few columns these are several times faster than matrix products.
                d_feature += (own.t().contiguous() @ flat).t()
                if d_features is not None:
                    columns = [torch.mv(flat, column) for column in feature.t().contiguous()]
                    d_features[block] = torch.stack(columns, dim=-1).view(d_features[block].shape)
        return (
            d_receiver, d_sender, d_features, None, None, None,
            d_weight, d_bias, d_read, d_offset, d_feature,
        )  # fmt: skip


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left·right, in the precision of the total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _Forward:
    """The two linear steps of the network, on a block; parameters are converted once for all."""

    def __init__(
        self,
        receiver: Tensor,
        sender: Tensor,
        features: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        feature: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._receiver, self._sender, self._features = receiver, sender, features
        self._columns = None if feature is None else feature.t()
        self.matrix, self._bias = weight.to(dtype), bias.to(dtype)
        self._exact: Tensor | None = None  # memory for sums in a higher precision

    def hidden(self, block: _Block, out: Tensor) -> None:
        """a_i + b_j + Σ_k e_ijk·f_k, before the first SiLU; summed in the precision of a."""
        receiver, sender = self._receiver[block][:, :, None], self._sender[block.molecules][:, None]
        if self._features is None:
            torch.add(receiver, sender, out=out)
            return
        exact = out
        if out.dtype != receiver.dtype:
            if self._exact is None:  # the first block is the largest
                self._exact = torch.empty_like(out, dtype=receiver.dtype).view(-1)
            exact = self._exact[: out.numel()].view(out.shape)
        torch.add(receiver, sender, out=exact)
        assert self._columns is not None
        own = self._features[block].reshape(-1, self._features.shape[-1])
        exact.view(-1, out.shape[-1]).addmm_(own, self._columns)
        if exact is not out:
            out.copy_(exact)

    def linear(self, hidden: Tensor, out: Tensor) -> None:
        """W·hidden + c."""
        width = hidden.shape[-1]
        torch.addmm(self._bias, hidden.view(-1, width), self.matrix.t(), out=out.view(-1, width))

    def activated(self, hidden: Tensor) -> Tensor:
        """SiLU(W·hidden + c), by one call of oneDNN; see `_fuses_silu`."""
        rows = hidden.view(-1, hidden.shape[-1])
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.matrix, self._bias, "swish", [], ""
        )
        return product.view(hidden.shape)
