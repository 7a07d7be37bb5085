"""Which file of which format is mutated how, and which commands read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fuzz_corpus import Command
from fuzz_mutants import (
    SAME,
    Mutator,
    atom_lines,
    damaged_bytes,
    damaged_lines,
    damaged_npz,
    damaged_numbers,
    declared_npz,
    emptied,
    foreign_characters,
    missing_separator,
    no_coordinate,
    shifted_atom,
)


@dataclass(frozen=True)
class Target:
    """A file in the corpus's folder of a format."""

    format: str
    file: str
    mutators: Sequence[Mutator]
    commands: Sequence[Command]


def _evaluate(*files: str, **more: Any) -> Command:
    return Command(("evaluate", *files, "--workers", "0", "--metrics", "rates,geometry"), **more)


def _preprocess(*arguments: str) -> Command:
    return Command(("preprocess", *arguments, "-o", "out.h5"), "out.h5")


_BYTES = (damaged_bytes(), emptied)
_SAME_BYTES = (damaged_bytes(SAME), emptied)
_TEXT = (damaged_lines, damaged_lines, damaged_numbers, damaged_numbers, foreign_characters)


def _text_targets() -> list[Target]:
    sdf = (*_BYTES, *_TEXT, no_coordinate, missing_separator, atom_lines)
    smiles = (*_BYTES, *_TEXT)
    return [
        Target("sdf", "v2000.sdf", (*sdf, shifted_atom),
               [_preprocess("v2000.sdf"), _evaluate("v2000.sdf")]),
        Target("sdf", "v3000.sdf", sdf, [_preprocess("v3000.sdf"), _evaluate("v3000.sdf")]),
        *(Target("xyz", file, (*_BYTES, *_TEXT, no_coordinate, atom_lines),
                 [_preprocess(file), _evaluate(file)]) for file in ("plain.xyz", "extended.xyz")),
        *(Target("smiles", file, smiles,
                 [_preprocess("smiles", file, "--workers", "0", "--relax", "none")])
          for file in ("molecules.smi", "molecules.csv")),
        Target("gzip", "v2000.sdf.gz", _SAME_BYTES, [_preprocess("v2000.sdf.gz")]),
        Target("gzip", "extended.xyz.gz", _SAME_BYTES, [_preprocess("extended.xyz.gz")]),
        Target("gzip", "molecules.smi.gz", _SAME_BYTES,
               [_preprocess("smiles", "molecules.smi.gz", "--workers", "0", "--relax", "none")]),
        *(Target("npz", file, (*_SAME_BYTES, damaged_npz, declared_npz, damaged_npz, declared_npz),
                 [Command(("sample", "--checkpoint", "run", "--data", file, "-o", "out.h5"),
                          "out.h5")]) for file in ("couplings.npz", "packed.npz")),
    ]  # fmt: skip


TARGETS: Sequence[Target] = (*_text_targets(),)
