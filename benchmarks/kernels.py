"""Gated sums over pairs on a GPU: blocks of operations, separate kernels and fused kernels.

    python benchmarks/kernels.py                           # a GPU, about three minutes
    python benchmarks/kernels.py --tiles                   # and other tiles of the fused kernels
    TRITON_INTERPRET=1 python benchmarks/kernels.py --device cpu --molecules 1 --atoms 5 --width 64

One layer of a network on pairs in bfloat16, forward alone and with gradients: errors against
float64, then times in turns (medians), nanoseconds a pair, and the least that products and memory
traffic of the fused kernels take at the rates given. On a CPU Triton's interpreter runs the
kernels: times mean nothing there, and errors are larger, for it cuts bfloat16 off, not rounds it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from molgen_energy.models import fused_kernels
from molgen_energy.models.fused_kernels import FusedSums, Tile
from molgen_energy.models.pair_kernels import GatedSums
from molgen_energy.models.pair_network import _in_blocks

Function = Callable[..., tuple[Tensor, Tensor]]
FUNCTIONS: dict[str, Function] = {
    "blocks": _in_blocks,
    "separate kernels": GatedSums.apply,
    "fused kernels": FusedSums.apply,
}
TILES = {
    "_FORWARD": (Tile(64, 4), Tile(128, 8), Tile(128, 4)),
    "_MESSAGE": (Tile(128, 8), Tile(64, 4), Tile(64, 8)),
    "_HIDDEN": (Tile(128, 8), Tile(64, 4), Tile(128, 4)),
}


def layer(options: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """Leaves and P of a layer on molecules of one size: states, features, weights."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(options.device)

    count, size, width = options.molecules, options.atoms, options.width
    leaves = [
        drawn(count, size, width), drawn(count, size, width),
        drawn(count, size, size, options.features),
        drawn(width, width) / width**0.5, drawn(width),
        drawn(1 + options.channels, width) / width**0.5, drawn(1 + options.channels),
        drawn(width, options.features),
    ]  # fmt: skip
    pairs = (1 - torch.eye(size, device=options.device)).expand(count, size, size).contiguous()
    return [leaf.requires_grad_(index != 2) for index, leaf in enumerate(leaves)], pairs


def textbook(
    receiver: Tensor,
    sender: Tensor,
    features: Tensor,
    pairs: Tensor,
    dtype: torch.dtype,
    *weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The formula for all pairs at once."""
    weight, bias, read, offset, feature = weights
    p = receiver[:, :, None] + sender[:, None] + features @ feature.t()
    message = F.silu(F.silu(p) @ weight.t() + bias)
    numbers = message @ read.t() + offset
    gate = pairs * numbers[..., 0].sigmoid()
    return (gate[..., None] * message).sum(dim=2), numbers[..., 1:]


def run(function: Function, leaves: list[Tensor], pairs: Tensor, training: bool) -> list[Tensor]:
    """Results, and in training the gradients of their sums."""
    arguments = (*leaves[:3], pairs, torch.bfloat16, *leaves[3:])
    if not training:
        with torch.no_grad():
            return list(function(*arguments))
    results = list(function(*arguments))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [*results, *torch.autograd.grad([result.sum() for result in results], wanted)]


def largest_error(function: Function, leaves: list[Tensor], pairs: Tensor) -> float:
    """Against float64, relative to the norm, of results and gradients of 16 molecules at most."""
    some = [
        (leaf[:16] if index < 3 else leaf).detach().requires_grad_(index != 2)
        for index, leaf in enumerate(leaves)
    ]
    exact = [leaf.detach().double().requires_grad_(index != 2) for index, leaf in enumerate(some)]
    found = run(function, some, pairs[:16].contiguous(), training=True)
    expected = run(textbook, exact, pairs[:16].double(), training=True)
    differences = ((a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))
    return max(difference.item() for difference in differences)


def times(
    functions: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Median seconds of each, in turns."""

    def timed(function: Callable[[], object]) -> float:
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for function in functions.values():
        timed(function)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or not taken[next(iter(taken))]:
        for name, function in functions.items():
            taken[name].append(timed(function))
    return {name: median(values) for name, values in taken.items()}


def limits(options: argparse.Namespace, training: bool) -> tuple[float, float]:
    """Nanoseconds a pair of the fused kernels' products, and of their memory traffic."""
    width, channels, features = options.width, options.channels, options.features
    products, numbers = 2 * width**2, 4 * (2 + channels + features)
    if not training:
        return products / options.tflops / 1e3, numbers / options.bandwidth / 1e3
    # x twice, ∂h, ∂W; ∂x and h are written, ∂x read for each part of ∂h, both for ∂W.
    parts = width // min(fused_kernels._COLUMNS, width)
    numbers = 4 * numbers + 2 * width * (2 + parts + 2)
    return 4 * products / options.tflops / 1e3, numbers / options.bandwidth / 1e3


def compare(options: argparse.Namespace, console: Console) -> None:
    leaves, pairs = layer(options)
    table = Table(title=f"W = {options.width}, {options.molecules} molecules of {options.atoms}")
    for column in ("", "error", "forward, ms", "ns a pair", "with gradients, ms", "ns a pair"):
        table.add_column(column, justify="right")
    took = [
        times(
            {n: lambda f=f, t=t: run(f, leaves, pairs, t) for n, f in FUNCTIONS.items()},
            options.device,
            options.seconds,
        )
        for t in (False, True)
    ]
    count = pairs.numel()
    for name, function in FUNCTIONS.items():
        cells = [f(once[name]) for once in took for f in (in_milliseconds, each(count))]
        table.add_row(name, f"{largest_error(function, leaves, pairs):.0e}", *cells)
    for row, name in enumerate(("products", "memory traffic")):
        bound = [limits(options, training)[row] for training in (False, True)]
        table.add_row(f"least for {name}", "", "", f"{bound[0]:.2f}", "", f"{bound[1]:.2f}")
    console.print(table)


def in_milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


def each(count: int) -> Callable[[float], str]:
    return lambda seconds: f"{1e9 * seconds / count:.2f}"


def other_tiles(name: str) -> Iterator[Tile]:
    """Sets each tile of a kernel in turn, and the first again at the end."""
    for tile in TILES[name]:
        setattr(fused_kernels, name, tile)
        yield tile
    setattr(fused_kernels, name, TILES[name][0])


def compare_tiles(options: argparse.Namespace, console: Console) -> None:
    leaves, pairs = layer(options)
    table = Table(title="tiles of the fused kernels, one kernel at a time")
    for column in ("kernel", "pairs", "warps", "error", "with gradients, ms"):
        table.add_column(column, justify="right")
    for name in TILES:
        for tile in other_tiles(name):
            try:
                error = f"{largest_error(FusedSums.apply, leaves, pairs):.0e}"
                step = {"": lambda: run(FusedSums.apply, leaves, pairs, True)}
                took = in_milliseconds(times(step, options.device, options.seconds / 2)[""])
            except Exception as problem:  # a tile too large for this GPU
                error, took = "–", str(problem).splitlines()[0]
            table.add_row(name.strip("_").lower(), str(tile.pairs), str(tile.warps), error, took)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--molecules", type=int, default=512)
    parser.add_argument("--atoms", type=int, default=18)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--features", type=int, default=12)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each column")
    parser.add_argument("--tflops", type=float, default=790.0, help="bfloat16, of an H100")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s, of an H100")
    parser.add_argument("--tiles", action="store_true", help="try other tiles too")
    options = parser.parse_args()
    console = Console()
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU, interpreter"
    console.print(f"{where}, torch {torch.__version__}")
    compare(options, console)
    if options.tiles:
        compare_tiles(options, console)


if __name__ == "__main__":
    main()
