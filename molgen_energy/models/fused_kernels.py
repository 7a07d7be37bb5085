"""Gated sums over pairs on a GPU in one kernel forward and two backward, in bfloat16.

The kernels of `pair_kernels` write the hidden layer and the messages of all pairs to memory between
matrix products. Here a tile of pairs goes through the whole network in registers and shared memory.
With p = a_i + b_j + Σ_k e_ijk·f_k the forward kernel computes

    h = SiLU(p),  x = W·h + c,  m = SiLU(x),  numbers r·m + o,  Σ_j gate·m

and writes sums, gates and numbers alone. Backward, the first kernel computes a tile again and then
∂x = (gate·∂sum + r·∂numbers)·SiLU'(x), the second ∂p = (Wᵗ·∂x)·SiLU'(p) and its sums over senders,
receivers and features. They write ∂x and h for the one product that gives ∂W: 256 × 256 sums in
float32 would take all registers of a multiprocessor.

A tile holds some receivers with some or all of the senders of their molecule. Which pair belongs to
which atom is a matrix of zeros and ones, so that sums over pairs and their gradients are matrix
products too, and tensors over pairs keep their distribution over threads. Every sum is taken by one
program in a fixed order, so results are reproducible.
"""

# No postponed annotations: Triton must see `constexpr` itself.
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHANGING = ("atoms", "molecules", "together", "senders", "chunks", "slices")  # not recompiled for
_ATOMS = 16  # most receivers in a tile: the smallest side of a matrix product


class Tile(NamedTuple):
    """Pairs of a tile and the warps that work on it."""

    pairs: int
    warps: int


_FORWARD, _MESSAGE, _HIDDEN = Tile(64, 4), Tile(128, 8), Tile(128, 8)
_BLOCK, _STAGES = 32, 2  # channels of a step of products with W, and steps loaded ahead
_SENDERS, _COLUMNS = 64, 128  # of ∂b, which a program sums


@triton.jit
def _sigmoid(x, native: tl.constexpr):
    """σ(x), by the processor's tanh, whose relative error is 2⁻¹¹."""
    if native:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * half + 0.5
    return tl.sigmoid(x)


@triton.jit
def _product(left, right, native: tl.constexpr):
    """left·right, summed in float32. Triton's interpreter cannot multiply bfloat16."""
    if native:
        return tl.dot(left, right)
    return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")


@triton.jit
def _halves(x, dtype: tl.constexpr):
    """x as the sum of two numbers of less precision."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def _bias(bias, tile: tl.constexpr, width: tl.constexpr, dtype: tl.constexpr):
    """Two factors of c for each pair: a product needs no registers for it."""
    one, w = tl.arange(0, 16), tl.arange(0, width)
    high, low = _halves(tl.load(bias + w), dtype)
    rows = tl.where(one[:, None] == 0, high[None, :], low[None, :])
    rows = tl.where(one[:, None] < 2, rows, 0.0).to(dtype)
    ones = tl.where((tl.arange(0, tile)[:, None] >= 0) & (one[None, :] < 2), 1.0, 0.0)
    return ones.to(dtype), rows


@triton.jit
def _features(features, pair, inside, count: tl.constexpr, padded: tl.constexpr):
    """e of pairs, (T, K), padded."""
    k = tl.arange(0, padded)
    at = pair[:, None] * count + k[None, :]
    return tl.load(features + at, mask=inside[:, None] & (k[None, :] < count), other=0.0)


@triton.jit
def _pre_activation(
    receiver, sender, e, feature, row, other, inside, w, width: tl.constexpr, count: tl.constexpr,
    padded: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """a_i + b_j + Σ_k e_ijk·f_k of pairs and channels w: states in float32, e·f in TF32."""
    own_at = row[:, None] * width + w[None, :]
    sent_at = other[:, None] * width + w[None, :]
    p = tl.load(receiver + own_at, mask=inside[:, None], other=0.0)
    p += tl.load(sender + sent_at, mask=inside[:, None], other=0.0)
    if count > 0:
        f = tl.load(feature + w[:, None] * padded + tl.arange(0, padded)[None, :])
        p += _product(e, tl.trans(f), native)
    return p


@triton.jit
def _linear(
    receiver, sender, features, feature, weight, ones, added, row, other, pair, inside,
    width: tl.constexpr, count: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
    native: tl.constexpr,
):  # fmt: skip
    """x = W·h + c of pairs, (T, W), with the two factors of c of `_bias`."""
    w, v = tl.arange(0, width), tl.arange(0, block)
    e = _features(features, pair, inside, count, padded) if count > 0 else None
    x = _product(ones, added, native)
    for begin in range(0, width, block):
        matrix = tl.load(weight + w[:, None] * width + (begin + v)[None, :])
        p = _pre_activation(
            receiver, sender, e, feature, row, other, inside, begin + v, width, count, padded,
            native,
        )  # fmt: skip
        hidden = (p * _sigmoid(p, native)).to(weight.dtype.element_ty)
        x += _product(hidden, tl.trans(matrix), native)
    return x


@triton.jit(do_not_specialize=_CHANGING)
def _forward_kernel(
    receiver, sender, features, feature, weight, bias, read, offset, allowed, gathered, first,
    further, molecules, atoms, together, senders, chunks, width: tl.constexpr, count: tl.constexpr,
    padded: tl.constexpr, channels: tl.constexpr, numbers: tl.constexpr, tile: tl.constexpr,
    most: tl.constexpr, block: tl.constexpr, gated: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """Sums, gates (or values) and further numbers; P programs take every P-th tile of receivers."""
    dtype = weight.dtype.element_ty
    receivers = molecules * atoms
    w, c, t = tl.arange(0, width), tl.arange(0, numbers), tl.arange(0, tile)
    r = tl.arange(0, most)
    readers = tl.load(read + c[:, None] * width + w[None, :], mask=c[:, None] <= channels, other=0)
    offsets = tl.load(offset + c, mask=c <= channels, other=0.0)
    ones, added = _bias(bias, tile, width, dtype)
    local, place = t // senders, t % senders
    groups = tl.cdiv(receivers, together)
    for item in range(tl.program_id(0), groups * chunks, tl.num_programs(0)):
        group, chunk = item % groups, item // groups
        row, j = group * together + local, chunk * senders + place
        inside = (local < together) & (row < receivers) & (j < atoms)
        pair, other = row * atoms + j, row // atoms * atoms + j
        x = _linear(
            receiver, sender, features, feature, weight, ones, added, row, other, pair, inside,
            width, count, padded, block, native,
        )  # fmt: skip
        message = (x * _sigmoid(x, native)).to(dtype)
        values = _product(message, tl.trans(readers), native) + offsets[None, :]
        at = pair[:, None] * channels + c[None, :] - 1
        some = (c[None, :] >= 1) & (c[None, :] <= channels) & inside[:, None]
        tl.store(further + at, values, mask=some)
        value = tl.sum(tl.where(c[None, :] == 0, values, 0.0), axis=1)
        if gated:
            value = tl.sigmoid(value) * tl.load(allowed + pair, mask=inside, other=0.0)
            chosen = tl.where(r[:, None] == local[None, :], value[None, :], 0.0).to(dtype)
            total = _product(chosen, message, native)
            own = group * together + r
            known = (r < together) & (own < receivers)
            at = (chunk * receivers + own)[:, None] * width + w[None, :]
            tl.store(gathered + at, total, mask=known[:, None])
        tl.store(first + pair, value, mask=inside)


@triton.jit
def _d_linear(
    slope, d_numbers, chosen, read, d_gathered, own, known, w, width: tl.constexpr,
    channels: tl.constexpr, numbers: tl.constexpr, gated: tl.constexpr, native: tl.constexpr,
):  # fmt: skip
    """∂x of pairs and channels w, from the gradients of numbers and of sums."""
    c = tl.arange(0, numbers)
    readers = tl.load(read + c[:, None] * width + w[None, :], mask=c[:, None] <= channels, other=0)
    d_message = _product(d_numbers, readers, native)
    if gated:
        at = own[:, None] * width + w[None, :]
        from_sum = tl.load(d_gathered + at, mask=known[:, None], other=0.0).to(slope.dtype)
        d_message += _product(chosen, from_sum, native)
    return (d_message * slope.to(tl.float32)).to(slope.dtype)


@triton.jit(do_not_specialize=_CHANGING)
def _message_backward_kernel(
    receiver, sender, features, feature, weight, bias, read, gates, d_gathered, d_first, d_further,
    d_linear, d_read, d_offset, molecules, atoms, together, senders, chunks, width: tl.constexpr,
    count: tl.constexpr, padded: tl.constexpr, channels: tl.constexpr, numbers: tl.constexpr,
    tile: tl.constexpr, most: tl.constexpr, block: tl.constexpr, gated: tl.constexpr,
    native: tl.constexpr,
):  # fmt: skip
    """∂x of all pairs, and a program's part of ∂r, with ∂c after it, and ∂o."""
    dtype = weight.dtype.element_ty
    receivers = molecules * atoms
    w, c, t = tl.arange(0, width), tl.arange(0, numbers), tl.arange(0, tile)
    r = tl.arange(0, most)
    half = tl.arange(0, width // 2)
    ones, added = _bias(bias, tile, width, dtype)
    local, place = t // senders, t % senders
    groups = tl.cdiv(receivers, together)
    one = (c[:, None] == channels + 1) & (t[None, :] < tile)  # the row of ∂c
    total = tl.zeros((numbers, width), tl.float32)
    offset_total = tl.zeros((numbers,), tl.float32)
    for item in range(tl.program_id(0), groups * chunks, tl.num_programs(0)):
        group, chunk = item % groups, item // groups
        row, j = group * together + local, chunk * senders + place
        inside = (local < together) & (row < receivers) & (j < atoms)
        pair, other = row * atoms + j, row // atoms * atoms + j
        x = _linear(
            receiver, sender, features, feature, weight, ones, added, row, other, pair, inside,
            width, count, padded, block, native,
        )  # fmt: skip
        s = _sigmoid(x, native)
        message = (x * s).to(dtype)
        slope = (s * (1 + x * (1 - s))).to(dtype)
        at = pair[:, None] * channels + c[None, :] - 1
        some = (c[None, :] >= 1) & (c[None, :] <= channels) & inside[:, None]
        d_values = tl.load(d_further + at, mask=some, other=0.0)
        own = group * together + r
        known = (r < together) & (own < receivers)
        if gated:
            gate = tl.load(gates + pair, mask=inside, other=0.0)
            at = own[:, None] * width + w[None, :]
            from_sum = tl.load(d_gathered + at, mask=known[:, None], other=0.0).to(dtype)
            its = local[:, None] == r[None, :]
            d_gate = _product(message, tl.trans(from_sum), native)
            d_value = tl.sum(tl.where(its, d_gate, 0.0), axis=1) * gate * (1 - gate)
        else:
            d_value = tl.load(d_first + pair, mask=inside, other=0.0)
        d_values = tl.where(c[None, :] == 0, d_value[:, None], d_values)
        offset_total += tl.sum(d_values, axis=0)
        d_numbers = d_values.to(dtype)
        total += _product(tl.trans(d_numbers), message, native)
        # In halves, which need fewer registers.
        first, second = tl.split(tl.permute(tl.reshape(slope, (tile, 2, width // 2)), (0, 2, 1)))
        chosen = tl.where(its, gate[:, None], 0.0).to(dtype) if gated else None
        first = _d_linear(
            first, d_numbers, chosen, read, d_gathered, own, known, half, width, channels, numbers,
            gated, native,
        )  # fmt: skip
        second = _d_linear(
            second, d_numbers, chosen, read, d_gathered, own, known, half + width // 2, width,
            channels, numbers, gated, native,
        )  # fmt: skip
        d_x = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (tile, width))
        total += _product(tl.where(one, 1.0, 0.0).to(dtype), d_x, native)
        tl.store(d_linear + pair[:, None] * width + w[None, :], d_x, mask=inside[:, None])
    program = tl.program_id(0)
    tl.store(d_read + (program * numbers + c)[:, None] * width + w[None, :], total)
    tl.store(d_offset + program * numbers + c, offset_total)


@triton.jit(do_not_specialize=_CHANGING)
def _hidden_backward_kernel(
    receiver, sender, features, feature, weight, d_linear, hidden, d_receiver, d_sender,
    d_feature, d_features, molecules, atoms, together, senders, chunks, width: tl.constexpr,
    count: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr, most: tl.constexpr,
    sums: tl.constexpr, columns: tl.constexpr, block: tl.constexpr, wanted: tl.constexpr,
    native: tl.constexpr,
):  # fmt: skip
    """h of all pairs, ∂a, ∂b, ∂f and ∂e; a program works on some senders and channels."""
    dtype = weight.dtype.element_ty
    molecule, chunk, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    w, t, v = part * columns + tl.arange(0, columns), tl.arange(0, tile), tl.arange(0, block)
    r, q, k = tl.arange(0, most), tl.arange(0, sums), tl.arange(0, padded)
    local, place = t // senders, t % senders
    base, j = molecule * atoms, chunk * senders + place
    sender_total = tl.zeros((sums, columns), tl.float32)
    feature_total = tl.zeros((padded, columns), tl.float32)
    for group in range(0, atoms, together):
        row = base + group + local
        inside = (local < together) & (group + local < atoms) & (j < atoms)
        pair = row * atoms + j
        e = _features(features, pair, inside, count, padded) if count > 0 else None
        p = _pre_activation(
            receiver, sender, e, feature, row, base + j, inside, w, width, count, padded, native
        )
        s = _sigmoid(p, native)
        at = pair[:, None] * width + w[None, :]
        tl.store(hidden + at, (p * s).to(dtype), mask=inside[:, None])
        slope = (s * (1 + p * (1 - s))).to(dtype)
        d_hidden = tl.zeros((tile, columns), tl.float32)
        for begin in range(0, width, block):
            d_x_at = pair[:, None] * width + (begin + v)[None, :]
            d_x = tl.load(d_linear + d_x_at, mask=inside[:, None], other=0.0)
            matrix = tl.load(weight + (begin + v)[:, None] * width + w[None, :])
            d_hidden += _product(d_x, matrix, native)
        d_p = (d_hidden * slope.to(tl.float32)).to(dtype)
        own = tl.where((r[:, None] == local[None, :]) & inside[None, :], 1.0, 0.0).to(dtype)
        total = _product(own, d_p, native)
        known = (r < together) & (group + r < atoms)
        at = ((chunk * molecules + molecule) * atoms + group + r)[:, None] * width + w[None, :]
        tl.store(d_receiver + at, total, mask=known[:, None])
        own = tl.where((q[:, None] == place[None, :]) & inside[None, :], 1.0, 0.0).to(dtype)
        sender_total += _product(own, d_p, native)
        if count > 0:
            e_high, e_low = _halves(e, dtype)
            feature_total += _product(tl.trans(e_high), d_p, native)
            feature_total += _product(tl.trans(e_low), d_p, native)
        if wanted:
            f = tl.load(feature + w[:, None] * padded + k[None, :])
            f_high, f_low = _halves(f, dtype)
            d_e = _product(d_p, f_high, native)
            d_e += _product(d_p, f_low, native)
            e_at = (part * molecules * atoms * atoms + pair)[:, None] * count + k[None, :]
            tl.store(d_features + e_at, d_e, mask=(k[None, :] < count) & inside[:, None])
    known = (q < senders) & (chunk * senders + q < atoms)
    at = (base + chunk * senders + q)[:, None] * width + w[None, :]
    tl.store(d_sender + at, sender_total, mask=known[:, None])
    if count > 0:
        at = (chunk * molecules + molecule) * padded + k
        tl.store(d_feature + at[:, None] * width + w[None, :], feature_total)


def tiling(atoms: int, pairs: int, senders: int, tiles_across: bool) -> tuple[int, int, int]:
    """Receivers and senders of a tile of so many pairs, and the parts of the senders.

    They need the fewest tiles: for all receivers of a batch, or for those of each molecule.
    """
    found = []
    for chunks in range(-(-atoms // senders), atoms + 1):
        size = -(-atoms // chunks)
        together = min(pairs // size, _ATOMS, *(() if tiles_across else (atoms,)))
        if together:
            tiles = chunks / together if tiles_across else chunks * -(-atoms // together)
            found.append((tiles, chunks, together, size))
        if size * _ATOMS <= pairs:
            break
    _, chunks, together, size = min(found)
    return together, size, chunks


class FusedSums(torch.autograd.Function):
    """Σ_j P_ij·σ(r_0·m_ij + o_0)·m_ij, (B, N, W); without P the values r_0·m_ij + o_0, (B, N, N).

    And the numbers r_c·m_ij + o_c, (B, N, N, C). The arguments are those of
    `pair_kernels.GatedSums`. States, weights, features and results are float32, the work on pairs
    in `dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        receiver: Tensor,
        sender: Tensor,
        features: Tensor | None,
        pairs: Tensor | None,
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor,
        read: Tensor,
        offset: Tensor | None,
        feature: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, atoms, width = receiver.shape
        count, channels = 0 if features is None else features.shape[-1], len(read) - 1
        padded = _padded(count)
        columns = None if feature is None else F.pad(feature, (0, padded - count))
        added = read.new_zeros(len(read)) if offset is None else offset
        matrix, readers = weight.to(dtype), read.to(dtype)
        gated = pairs is not None
        first = receiver.new_empty(batch, atoms, atoms)
        further = receiver.new_empty(batch, atoms, atoms, channels)
        together, senders, chunks = tiling(atoms, _FORWARD.pairs, _FORWARD.pairs, True)
        gathered = receiver.new_empty(chunks if gated else 0, batch, atoms, width)
        programs = min(_programs(receiver, _FORWARD), -(-batch * atoms // together) * chunks)
        _forward_kernel[(programs,)](
            receiver, sender, features, columns, matrix, bias, readers, added, pairs, gathered,
            first, further, batch, atoms, together, senders, chunks, width, count, padded,
            channels, _padded(1 + channels), _FORWARD.pairs, _ATOMS, _BLOCK, gated, _native(dtype),
            num_warps=_FORWARD.warps, num_stages=_STAGES,
        )  # fmt: skip
        ctx.dtype, ctx.gated = dtype, gated
        ctx.save_for_backward(
            receiver, sender, features, columns, weight, bias, read, offset,
            first if gated else None,
        )  # fmt: skip
        return _summed(gathered) if gated else first, further

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, d_further: Tensor) -> tuple[Tensor | None, ...]:
        receiver, sender, features, columns, weight, bias, read, offset, gates = ctx.saved_tensors
        batch, atoms, width = receiver.shape
        count, channels = 0 if features is None else features.shape[-1], len(read) - 1
        dtype, gated = ctx.dtype, ctx.gated
        outer, d_further = outer.contiguous(), d_further.contiguous()
        wanted = features is not None and ctx.needs_input_grad[2]
        numbers, padded = _padded(2 + channels), _padded(count)
        matrix, readers = weight.to(dtype), read.to(dtype)
        together, senders, chunks = tiling(atoms, _MESSAGE.pairs, _MESSAGE.pairs, True)
        programs = min(_programs(receiver, _MESSAGE), -(-batch * atoms // together) * chunks)
        hidden = receiver.new_empty(batch * atoms * atoms, width, dtype=dtype)
        d_linear = torch.empty_like(hidden)
        d_read = read.new_empty(programs, numbers, width)
        d_offset = read.new_empty(programs, numbers)
        _message_backward_kernel[(programs,)](
            receiver, sender, features, columns, matrix, bias, readers, gates,
            outer if gated else None, None if gated else outer, d_further, d_linear,
            d_read, d_offset, batch, atoms, together, senders, chunks, width, count,
            padded, channels, numbers, _MESSAGE.pairs, _ATOMS, _BLOCK, gated, _native(dtype),
            num_warps=_MESSAGE.warps, num_stages=_STAGES,
        )  # fmt: skip
        d_read = d_read.sum(dim=0)
        together, senders, chunks = tiling(atoms, _HIDDEN.pairs, _SENDERS, False)
        columns_each = min(_COLUMNS, width)
        d_receiver = receiver.new_empty(chunks, batch, atoms, width)
        d_sender = torch.empty_like(sender)
        d_feature = receiver.new_empty(chunks * batch if count else 0, padded, width)
        parts = width // columns_each
        d_features = features.new_empty(parts, *features.shape) if wanted else None
        _hidden_backward_kernel[(batch, chunks, parts)](
            receiver, sender, features, columns, matrix, d_linear, hidden, d_receiver, d_sender,
            d_feature, d_features, batch, atoms, together, senders, chunks, width, count, padded,
            _HIDDEN.pairs, _ATOMS, _SENDERS, columns_each, _BLOCK, wanted, _native(dtype),
            num_warps=_HIDDEN.warps, num_stages=_STAGES,
        )  # fmt: skip
        return (
            _summed(d_receiver),
            d_sender,
            None if d_features is None else _summed(d_features),
            None,
            None,
            (d_linear.t() @ hidden).to(weight.dtype),
            d_read[1 + channels],
            d_read[: 1 + channels],
            None if offset is None else d_offset.sum(dim=0)[: 1 + channels],
            d_feature.sum(dim=0)[:count].t() if count else None,
        )


def _summed(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def _padded(count: int) -> int:
    return max(16, int(triton.next_power_of_2(count)))


def _programs(like: Tensor, tile: Tile) -> int:
    """So many that registers hold all at once: 256 threads on a multiprocessor."""
    if not like.is_cuda:  # the interpreter
        return 3
    processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    return int(processors) * max(1, 8 // tile.warps)


def _native(dtype: torch.dtype) -> bool:
    """Whether to use instructions of the GPU for bfloat16: its products, and tanh."""
    return dtype == torch.bfloat16 and isinstance(_forward_kernel, triton.JITFunction)


_MOLECULES, _SIZE = 256, 18  # of the measurement
_GAIN, _DIFFERENCE = 1.15, 0.05  # so much faster, and so little different, relative to the largest


@lru_cache
def is_faster(
    other: Callable[..., tuple[Tensor, Tensor]],
    device: torch.device,
    width: int,
    count: int,
    numbers: int,
    gated: bool,
    wanted: bool,
) -> bool:
    """Whether `FusedSums` gives the same as another function here, and is faster.

    Measured once in a process, forward and backward, so not to be called first while a CUDA graph
    is recorded. `other` takes the same arguments; features get a gradient if it is `wanted`.
    """
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    with torch.inference_mode(False), torch.enable_grad():
        inputs = [
            drawn(_MOLECULES, _SIZE, width),
            drawn(_MOLECULES, _SIZE, width),
            drawn(_MOLECULES, _SIZE, _SIZE, count) if count else None,
            torch.ones(_MOLECULES, _SIZE, _SIZE, device=device) if gated else None,
            torch.bfloat16,
            drawn(width, width) / width**0.5,
            drawn(width),
            drawn(numbers, width) / width**0.5,
            drawn(numbers),
            drawn(width, count) if count else None,
        ]
        leaves = [
            t for t in (*inputs[:2], *inputs[5:], inputs[2] if wanted else None) if t is not None
        ]
        for leaf in leaves:
            leaf.requires_grad_()

        def run(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
            results = [r for r in function(*inputs) if r.numel()]
            return [*results, *torch.autograd.grad([r.sum() for r in results], leaves)]

        def milliseconds(function: Callable[..., tuple[Tensor, Tensor]]) -> float:
            began, ended = (torch.Event(device, enable_timing=True) for _ in range(2))
            began.record()
            run(function)
            ended.record()
            torch.cuda.synchronize(device)
            return float(began.elapsed_time(ended))

        try:
            pairs = zip(run(FusedSums.apply), run(other), strict=True)
            differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
            if not all(difference < _DIFFERENCE for difference in differences):
                warnings.warn(f"fused kernels are not used: errors {differences}", stacklevel=2)
                return False
            took = {
                f: sorted(milliseconds(f) for _ in range(7))[3] for f in (FusedSums.apply, other)
            }
        except Exception as error:  # of Triton's compiler, whose classes differ between versions
            warnings.warn(f"fused kernels are not used: {error}", stacklevel=2)
            return False
    return took[FusedSums.apply] * _GAIN < took[other]
