"""The fused kernels without a GPU: what they compile to for an H100, tiles, and when they run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from molgen_energy.models import pair_network

triton = pytest.importorskip("triton")
fused_kernels = pytest.importorskip("molgen_energy.models.fused_kernels")

BFLOAT16 = ("weight", "read", "hidden", "d_linear")
SHARED = 227 * 1024  # bytes that a program can have on an H100
STEP = {"width": 256, "count": 12, "padded": 16, "most": 16, "block": 32, "native": True}
NUMBERS = {"channels": 8, "numbers": 16, "gated": True}


def compiled(kernel: Any, tile: Any, **constants: Any) -> Any:
    """A kernel compiled for an H100, as for `gdm_pairs` of width 256."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**STEP, **constants, "tile": tile.pairs}
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name in fused_kernels._CHANGING:
            signature[name] = "i32"
        else:
            signature[name] = "*bf16" if name in BFLOAT16 else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": fused_kernels._STAGES}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def loops(code: str) -> list[list[str]]:
    """The instructions of each loop of disassembled code."""
    labels, found, instructions = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*)", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                found.append(instructions[labels[back[1]] :])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tile", "constants", "stack"),
    [
        ("_forward_kernel", "_FORWARD", NUMBERS, 64),
        ("_message_backward_kernel", "_MESSAGE", {**NUMBERS, "d_first": None}, 1500),
        (
            "_hidden_backward_kernel",
            "_HIDDEN",
            {"sums": 64, "columns": 128, "wanted": False, "d_features": None},
            600,
        ),
    ],
)
def test_registers_and_shared_memory_of_an_h100(
    name: str, tile: str, constants: dict[str, Any], stack: int, tmp_path: Path
) -> None:
    """Loops over channels spill nothing (ptxas 12.9: two words), and products use matrix units."""
    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (programs / "nvdisasm").exists():
        pytest.skip("Triton comes without a disassembler")
    chosen = getattr(fused_kernels, tile)
    kernel = compiled(getattr(fused_kernels, name), chosen, **constants)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])

    def output(*command: str) -> str:
        arguments = [str(programs / command[0]), *command[1:], str(path)]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

    used = output("cuobjdump", "--dump-resource-usage")
    registers, spilled = (int(re.search(rf"{k}:(\d+)", used)[1]) for k in ("REG", "STACK"))
    # As many programs on a multiprocessor as `_programs` counts.
    together = 8 // chosen.warps
    assert registers <= 255 and registers * 32 * chosen.warps * together <= 65536
    assert kernel.metadata.shared * together <= SHARED
    assert spilled <= stack
    inner = [b for b in loops(output("nvdisasm", "-c")) if any("HGMMA" in i for i in b)]
    steps = min(inner, key=len)
    assert len(steps) < 400 and sum(bool(re.search(r"\b(LDL|STL)\b", i)) for i in steps) <= 2


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("atoms", [1, 2, 5, 9, 18, 29, 44, 63, 64, 65, 128, 129, 181])
def test_tiles_hold_all_pairs(atoms: int, across: bool) -> None:
    """No other division needs fewer tiles, and pairs fill them where they can."""
    together, senders, chunks = fused_kernels.tiling(atoms, 128, 64, across)
    assert together * senders <= 128 and senders <= 64 and together <= 16
    assert senders * chunks >= atoms > senders * (chunks - 1)

    def tiles(together: int, senders: int) -> float:
        return -(-atoms // senders) * (1 / together if across else -(-atoms // together))

    every = [(t, s) for t in range(1, 17) for s in range(1, 65) if t * s <= 128]
    every = [pair for pair in every if across or pair[0] <= atoms]
    assert tiles(together, senders) == pytest.approx(min(tiles(*pair) for pair in every))


def test_fused_kernels_are_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    faster, asked = [True], []

    def is_faster(*arguments: object) -> bool:
        asked.append(arguments[2:])
        return faster[0]

    def taken(states: torch.Tensor, gated: bool, dtype: torch.dtype, wanted: bool = False) -> str:
        features = torch.zeros(2, 3, 3, 5, requires_grad=wanted)
        found = pair_network._function(states, features, gated, dtype, 4)
        return getattr(found, "__self__", found).__name__

    monkeypatch.setattr(pair_network, "_kernels_serve", lambda receiver: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused_kernels, "is_faster", is_faster)
    states, low, full = torch.zeros(2, 3, 64), torch.bfloat16, torch.float32
    assert taken(states, True, full) == "GatedSums" and not asked
    assert taken(states[..., :32], True, low) == "GatedSums" and not asked
    assert taken(states, True, low) == taken(states, False, low, wanted=True) == "FusedSums"
    assert asked == [(64, 5, 4, True, False), (64, 5, 4, False, True)]
    faster[0] = False
    assert taken(states, True, low) == "GatedSums"
    assert taken(states, True, low, wanted=True) == taken(states, False, low) == "_in_blocks"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    faster[0] = True
    assert taken(states, True, low) == "GatedSums"
