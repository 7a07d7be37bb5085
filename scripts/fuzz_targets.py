"""Which file of which format is mutated how, and which commands read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fuzz_corpus import TINY, Command
from fuzz_hdf5 import damaged_attribute, damaged_dataset
from fuzz_mutants import (
    SAME,
    Mutator,
    atom_lines,
    damaged_bytes,
    damaged_lines,
    damaged_npz,
    damaged_numbers,
    damaged_yaml,
    declared_npz,
    emptied,
    emptied_or_same,
    foreign_characters,
    hostile_yaml,
    missing_separator,
    no_coordinate,
    shifted_atom,
)

from molgen_energy.api.formats import FORMATS
from molgen_energy.config import RawConfig
from molgen_energy.errors import InputError
from molgen_energy.formats.yaml import validate_as
from molgen_energy.systems.registry import SYSTEMS


@dataclass(frozen=True)
class Target:
    """A file in the corpus's folder of a format."""

    format: str
    file: str
    mutators: Sequence[Mutator]
    commands: Sequence[Command]


def _evaluate(*files: str, metrics: str = "rates", **more: Any) -> Command:
    return Command(("evaluate", *files, "--workers", "0", "--metrics", metrics), **more)


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
        *(Target(name, file, _BYTES,
                 [_preprocess("geom-drugs", "--source", file, "--workers", "0")])
          for name, file in (("pickle", "train.smol"), ("torch", "train_data_processed.pt"),
                             ("msgpack", "drugs_crude.msgpack"), ("npy", "geom_drugs_30.npy"))),
        *(Target("npz", file, (*_SAME_BYTES, damaged_npz, declared_npz, damaged_npz, declared_npz),
                 [Command(("sample", "--checkpoint", "run", "--data", file, "-o", "out.h5"),
                          "out.h5")]) for file in ("couplings.npz", "packed.npz")),
    ]  # fmt: skip


def _hdf5(format: str, file: str, *commands: Command) -> list[Target]:
    """A file of a declared format, with mutants of its bytes and of its declaration.

    The first command reads every value, the others need not.
    """
    declared = FORMATS[format]
    changes = damaged_dataset(declared), damaged_attribute(declared), damaged_bytes()
    targets = [Target(format, file, (*(changes[0],) * 6, *changes[1:], emptied), commands[:1])]
    if commands[1:]:
        some = damaged_dataset(declared, checks_values=False)
        targets.append(Target(format, file, (some, some, *changes[1:]), commands[1:]))
    return targets


_TRAIN = ("train", "--steps", "1", "--device", "cpu", "-o", "new")
_TINY = tuple(f"--set={key}={value}" for key, value in TINY.items() if key != "training.steps")


def _hdf5_targets() -> list[Target]:
    quick = (*_TRAIN, *_TINY, "--set=process.steps=4")
    shapes = (*_TRAIN, *_TINY, "--config", "shapes_energy", "--data", "shapes.h5")
    spins = (*_TRAIN, *_TINY, "--config", "spins_cross_entropy", "--data", "spins.h5")
    predict = Command(("sample", "--checkpoint", "run", "--data", "spins.h5", "-o", "out.h5"))
    statistics = _evaluate("molecules.sdf", metrics="rates,geometry", statistics="statistics.h5")
    return [
        *_hdf5("molecules", "molecules.h5", _evaluate("molecules.h5"),
               Command((*quick, "--data", "molecules.h5"))),
        *_hdf5("molecules", "packed.h5", _evaluate("packed.h5"),
               _evaluate("molecules.h5", "--reference", "packed.h5")),
        *_hdf5("shapes", "shapes.h5", Command(("evaluate", "shapes.h5")), Command(shapes)),
        *_hdf5("shapes", "predicted.h5", Command(("evaluate", "predicted.h5"))),
        *_hdf5("spins", "spins.h5", Command(spins), predict),
        *_hdf5("spins", "predicted.h5", Command(("evaluate", "predicted.h5"))),
        *_hdf5("statistics", "statistics.h5", statistics),
    ]  # fmt: skip


def _config(system: str) -> Callable[[Any], bool]:
    """Whether a tree is a configuration of a system."""

    def accepts(tree: Any) -> bool:
        if not isinstance(tree, dict):
            return False
        try:
            SYSTEMS[system].config.of(RawConfig("", {"name": "file", **tree}))
        except InputError:
            return False
        return True

    return accepts


def _schema(name: str) -> Callable[[Any], bool]:
    """Whether a tree is what a declaration says."""

    def accepts(tree: Any) -> bool:
        try:
            validate_as(FORMATS[name].schema, tree, "", "")
        except InputError:
            return False
        return True

    return accepts


def _yaml_mutators(accepts: Callable[[Any], bool]) -> tuple[Mutator, ...]:
    return (*(damaged_yaml(accepts),) * 4, hostile_yaml, hostile_yaml, *_TEXT, damaged_bytes())


def _yaml_targets() -> list[Target]:
    configs = [
        Target("config", f"{system}.yaml", _yaml_mutators(_config(system)),
               [Command((*_TRAIN, "--config", f"{system}.yaml", "--data", f"{system}.h5"))])
        for system in SYSTEMS
    ]  # fmt: skip
    sample = Command(("sample", "-n", "2", "--checkpoint", "run", "-o", "out.sdf"), "out.sdf")
    resume = Command(("train", "--resume", "run", "--steps", "3", "--data", "molecules.h5"))
    last = "run/checkpoints/last"
    tensors = (damaged_bytes(SAME), emptied)
    run = [
        Target("run", f"{last}/state.yaml", _yaml_mutators(_schema("state-molecules")),
               [sample, resume]),
        Target("run", f"{last}/config.yaml", _yaml_mutators(_config("molecules")),
               [sample, resume]),
        Target("run", f"{last}/ema.safetensors", tensors, [sample, resume]),
        Target("run", f"{last}/model.safetensors", tensors, [resume]),
        Target("run", f"{last}/optimizer.safetensors", tensors, [resume]),
        Target("run", "run/metrics.csv", (*_TEXT, damaged_bytes()), [resume]),
    ]  # fmt: skip
    goes_on = Command(("train", "--resume", "run", "--steps", "3", "--data", "properties.h5"))
    of_properties = [
        Target("properties", f"{last}/state.yaml", _yaml_mutators(_schema("state-properties")),
               [goes_on]),
        Target("properties", f"{last}/model.safetensors", tensors, [goes_on]),
    ]  # fmt: skip
    weights = Command(("sample", "-n", "2", "--checkpoint", "weights", "-o", "out.sdf"), "out.sdf")
    released = [
        Target("weights", f"weights/{file}", tensors, [weights])
        for file in ("ema.safetensors", "state.yaml", "config.yaml", "SHA256SUMS")
    ]
    shards = []
    for manifest, output, command in (
        ("manifest-sample", "samples.sdf",
         ("sample", "--resume", "samples.sdf", "--checkpoint", "run")),
        ("manifest-spins", "spins.h5",
         ("preprocess", "spins", "--size", "3", "--count", "52", "--workers", "0")),
        ("manifest-smiles", "molecules.h5",
         ("preprocess", "smiles", "molecules.smi", "--workers", "0", "--relax", "none")),
    ):  # fmt: skip
        new = () if command[0] == "sample" else ("-o", output)
        job = Command((*command, *new), output)
        shards.append(Target("shards", f"{output}.shards/manifest.yaml",
                             _yaml_mutators(_schema(manifest)), [job]))  # fmt: skip
        shards.append(
            Target(
                "shards", f"{output}.shards/*.shard", (damaged_bytes(SAME), emptied_or_same), [job]
            )
        )
    return [*configs, *run, *of_properties, *released, *shards]


TARGETS: Sequence[Target] = (*_hdf5_targets(), *_yaml_targets(), *_text_targets())
