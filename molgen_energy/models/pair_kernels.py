"""Gated sums over pairs on a GPU: four Triton kernels around three matrix products.

One kernel does all work between two products, and reads and writes the messages of a batch at most
once: memory traffic, not arithmetic, limits a network on pairs on a GPU. Forward, with
p = a_i + b_j + Σ_k e_ijk·f_k:

    hidden = SiLU(p)  →  linear = W·hidden + c  →  m = SiLU(linear), numbers r·m, Σ_j gate·m

and backward: ∂linear from the gradients of sums and numbers, ∂W and ∂hidden as products, then ∂a,
∂b and ∂f, for which p is recomputed. Sums are taken in a fixed order, so results are reproducible.
"""

# No postponed annotations: Triton must see `constexpr` itself.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_PROGRAMS = 1056  # of the kernel that sums over all pairs, eight for each multiprocessor of an H100
# Pairs in a tile, and warps that work on it, of each kernel; of the last also channels.
_HIDDEN, _GATHER, _MESSAGE, _LAST = (32, 8), (4, 1), (16, 8), (32, 2, 32)
_CHANGING = ("atoms", "total", "molecules")  # sizes for which kernels are not recompiled


@triton.jit
def _pre_activation(
    own, sent, features, feature, pair, inside, w, width: tl.constexpr, count: tl.constexpr
):
    """a_i + b_j + Σ_k e_ijk·f_k of a tile (J, W)."""
    p = own + sent
    for k in tl.static_range(count):
        e = tl.load(features + pair * count + k, mask=inside, other=0.0)
        f = tl.load(feature + k * width + w)
        p += e[:, None] * f[None, :]
    return p


@triton.jit(do_not_specialize=_CHANGING)
def _hidden_kernel(
    receiver, sender, features, feature, hidden, total, atoms,
    width: tl.constexpr, count: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """SiLU(p) of the pairs of a tile; one program for each tile."""
    pair = tl.program_id(0) * rows + tl.arange(0, rows)
    inside = pair < total
    row = pair // atoms
    other = row // atoms * atoms + pair % atoms
    w = tl.arange(0, width)
    own = tl.load(receiver + row[:, None] * width + w[None, :], mask=inside[:, None], other=0.0)
    sent = tl.load(sender + other[:, None] * width + w[None, :], mask=inside[:, None], other=0.0)
    p = _pre_activation(own, sent, features, feature, pair, inside, w, width, count)
    out = (p * tl.sigmoid(p)).to(hidden.dtype.element_ty)
    tl.store(hidden + pair[:, None] * width + w[None, :], out, mask=inside[:, None])


@triton.jit(do_not_specialize=_CHANGING)
def _gather_kernel(
    linear, pairs, read, offset, gathered, gates, further, atoms,
    width: tl.constexpr, channels: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Gated sum, gates and numbers of a receiver; one program for each receiver."""
    row = tl.program_id(0)
    w = tl.arange(0, width)
    total = tl.zeros((rows, width), tl.float32)
    for start in range(0, atoms, rows):
        j = start + tl.arange(0, rows)
        inside = j < atoms
        pair = row * atoms + j
        at = pair[:, None] * width + w[None, :]
        x = tl.load(linear + at, mask=inside[:, None], other=0.0).to(tl.float32)
        m = x * tl.sigmoid(x)
        first = tl.sum(m * tl.load(read + w)[None, :], axis=1) + tl.load(offset)
        gate = tl.sigmoid(first) * tl.load(pairs + pair, mask=inside, other=0.0)
        tl.store(gates + pair, gate, mask=inside)
        for c in tl.static_range(channels):
            reader = tl.load(read + (c + 1) * width + w)
            number = tl.sum(m * reader[None, :], axis=1) + tl.load(offset + c + 1)
            tl.store(further + pair * channels + c, number, mask=inside)
        total += gate[:, None] * m
    tl.store(gathered + row * width + w, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=_CHANGING)
def _message_backward_kernel(
    linear, gates, read, d_gathered, d_further, d_linear, d_read, d_bias, d_offset, total, atoms,
    width: tl.constexpr, channels: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """∂linear of every P-th tile of pairs, for P programs; each writes its part of all sums."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    w, c = tl.arange(0, width), tl.arange(0, padded)
    read_at = c[:, None] * width + w[None, :]
    readers = tl.load(read + read_at, mask=c[:, None] <= channels, other=0.0)
    read_total = tl.zeros((padded, width), tl.float32)
    bias_total = tl.zeros((rows, width), tl.float32)
    offset_total = tl.zeros((rows, padded), tl.float32)
    for start in range(program * rows, total, programs * rows):
        pair = start + tl.arange(0, rows)
        inside = pair < total
        row = pair // atoms
        at = pair[:, None] * width + w[None, :]
        x = tl.load(linear + at, mask=inside[:, None], other=0.0).to(tl.float32)
        from_at = row[:, None] * width + w[None, :]
        from_sum = tl.load(d_gathered + from_at, mask=inside[:, None], other=0.0)
        s = tl.sigmoid(x)
        m = x * s
        gate = tl.load(gates + pair, mask=inside, other=0.0)
        d_first = tl.sum(m * from_sum, axis=1) * gate * (1 - gate)
        some = (c[None, :] >= 1) & (c[None, :] <= channels) & inside[:, None]
        place = pair[:, None] * channels + c[None, :] - 1
        d_numbers = tl.load(d_further + place, mask=some, other=0.0)
        d_numbers = tl.where(c[None, :] == 0, d_first[:, None], d_numbers)
        d_message = gate[:, None] * from_sum + tl.dot(d_numbers, readers, input_precision=precision)
        d_x = d_message * s * (1 + x * (1 - s))
        tl.store(d_linear + at, d_x.to(d_linear.dtype.element_ty), mask=inside[:, None])
        bias_total += d_x
        offset_total += d_numbers
        read_total += tl.dot(tl.trans(d_numbers), m, input_precision=precision)
    at = (program * padded + c)[:, None] * width + w[None, :]
    tl.store(d_read + at, read_total)
    tl.store(d_bias + program * width + w, tl.sum(bias_total, axis=0))
    tl.store(d_offset + program * padded + c, tl.sum(offset_total, axis=0))


@triton.jit(do_not_specialize=_CHANGING)
def _hidden_backward_kernel(
    receiver, sender, features, feature, d_hidden, d_receiver, d_sender, d_feature, molecules,
    atoms, width: tl.constexpr, count: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr,
    columns: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """∂a, ∂b and ∂f for some senders and channels of a molecule; partial sums over senders."""
    molecule, part = tl.program_id(0), tl.program_id(2)
    w = tl.program_id(1) * columns + tl.arange(0, columns)
    j = part * rows + tl.arange(0, rows)
    inside = j < atoms
    k = tl.arange(0, padded)
    own_at = (molecule * atoms + j)[:, None] * width + w[None, :]
    sent = tl.load(sender + own_at, mask=inside[:, None], other=0.0)
    sender_total = tl.zeros((rows, columns), tl.float32)
    feature_total = tl.zeros((padded, columns), tl.float32)
    if count > 0:
        f_at = k[:, None] * width + w[None, :]
        f = tl.load(feature + f_at, mask=k[:, None] < count, other=0.0)
    for i in range(atoms):
        row = molecule * atoms + i
        pair = row * atoms + j
        p = sent + tl.load(receiver + row * width + w)[None, :]
        if count > 0:
            some = (k[None, :] < count) & inside[:, None]
            e = tl.load(features + pair[:, None] * count + k[None, :], mask=some, other=0.0)
            p += tl.dot(e, f, input_precision=precision)
        s = tl.sigmoid(p)
        at = pair[:, None] * width + w[None, :]
        d_p = tl.load(d_hidden + at, mask=inside[:, None], other=0.0).to(tl.float32)
        d_p = d_p * s * (1 + p * (1 - s))
        place = (part * molecules + molecule) * atoms + i
        tl.store(d_receiver + place * width + w, tl.sum(d_p, axis=0))
        sender_total += d_p
        if count > 0:
            feature_total += tl.dot(tl.trans(e), d_p, input_precision=precision)
    tl.store(d_sender + own_at, sender_total, mask=inside[:, None])
    if count > 0:
        place = ((part * molecules + molecule) * padded + k)[:, None] * width + w[None, :]
        tl.store(d_feature + place, feature_total)


class GatedSums(torch.autograd.Function):
    """Σ_j P_ij·σ(r_0·m_ij + o_0)·m_ij, (B, N, W), and the numbers r_c·m_ij + o_c, (B, N, N, C).

    The arguments are those of `PairNetwork`, of which this is the gated sum: `feature` is (W, K),
    `read` (1 + C, W), `offset` (1 + C,), P is 0 or 1. All are float32 and contiguous, W is a power
    of 2, and B·N²·W below 2³¹. Features of pairs and P get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        receiver: Tensor,
        sender: Tensor,
        features: Tensor | None,
        pairs: Tensor,
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor,
        read: Tensor,
        offset: Tensor | None,
        feature: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, atoms, width = receiver.shape
        count, channels = 0 if features is None else features.shape[-1], len(read) - 1
        columns = None if feature is None else feature.t().contiguous()
        added = read.new_zeros(len(read)) if offset is None else offset
        size = batch * atoms * atoms
        hidden = receiver.new_empty(size, width, dtype=dtype)
        _hidden_kernel[(-(-size // _HIDDEN[0]),)](
            receiver, sender, features, columns, hidden, size, atoms, width, count, _HIDDEN[0],
            num_warps=_HIDDEN[1],
        )  # fmt: skip
        linear = torch.addmm(bias.to(dtype), hidden, weight.t().to(dtype))
        gathered = torch.empty_like(receiver)
        gates = receiver.new_empty(batch, atoms, atoms)
        further = receiver.new_empty(batch, atoms, atoms, channels)
        _gather_kernel[(batch * atoms,)](
            linear, pairs, read, added, gathered, gates, further, atoms, width, channels,
            _GATHER[0], num_warps=_GATHER[1],
        )  # fmt: skip
        ctx.save_for_backward(
            receiver, sender, features, columns, weight, read, offset, hidden, linear, gates
        )
        return gathered, further

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_gathered: Tensor, d_further: Tensor) -> tuple[Tensor | None, ...]:
        (
            receiver, sender, features, columns, weight, read, offset, hidden, linear, gates,
        ) = ctx.saved_tensors  # fmt: skip
        batch, atoms, width = receiver.shape
        count, channels = 0 if features is None else features.shape[-1], len(read) - 1
        dtype = hidden.dtype
        precision = "ieee" if dtype == torch.float32 else "tf32"
        d_gathered, d_further = d_gathered.contiguous(), d_further.contiguous()
        numbers = max(16, triton.next_power_of_2(1 + channels))
        size = batch * atoms * atoms
        programs = min(_PROGRAMS, -(-size // _MESSAGE[0]))
        d_linear = torch.empty_like(linear)
        d_read = read.new_empty(programs, numbers, width)
        d_bias = read.new_empty(programs, width)
        d_offset = read.new_empty(programs, numbers)
        _message_backward_kernel[(programs,)](
            linear, gates, read, d_gathered, d_further, d_linear, d_read, d_bias, d_offset,
            size, atoms, width, channels, numbers, _MESSAGE[0], precision, num_warps=_MESSAGE[1],
        )  # fmt: skip
        d_weight = (d_linear.t() @ hidden).to(weight.dtype)
        d_hidden = d_linear @ weight.to(dtype)
        parts, padded = -(-atoms // _LAST[0]), max(16, triton.next_power_of_2(count))
        d_receiver = receiver.new_empty(parts, batch, atoms, width)
        d_sender = torch.empty_like(sender)
        d_feature = receiver.new_empty(parts * batch if count else 0, padded, width)
        step = min(_LAST[2], width)
        _hidden_backward_kernel[(batch, width // step, parts)](
            receiver, sender, features, columns, d_hidden, d_receiver, d_sender, d_feature,
            batch, atoms, width, count, padded, _LAST[0], step, precision, num_warps=_LAST[1],
        )  # fmt: skip
        return (
            d_receiver[0] if parts == 1 else d_receiver.sum(dim=0),
            d_sender,
            None,
            None,
            None,
            d_weight,
            d_bias.sum(dim=0),
            d_read.sum(dim=0)[: 1 + channels],
            None if offset is None else d_offset.sum(dim=0)[: 1 + channels],
            d_feature.sum(dim=0)[:count].t() if count else None,
        )
