"""Quality of samples against the steps that they take, for each sampler.

python benchmarks/sample.py --checkpoint runs/mine -n 1000 --output quality.csv
python benchmarks/sample.py --checkpoint runs/mine --samplers dpm++,heun --steps 20,50
python benchmarks/sample.py --checkpoint qm9_energy --spacings log,quadratic --steps 20,50

All rows have the same seed, so they start from the same noise. Rows are written as they come, and
those that are there already are not made again: broken off at any moment, the same command goes on.
Samples are kept beside the table, to be looked at with `molgen-energy evaluate`.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from molgen_energy.api.evaluate import evaluate
from molgen_energy.cli.console import exit_on_error, say
from molgen_energy.cli.sample import SamplingBar
from molgen_energy.data.shards import shards_folder
from molgen_energy.diffusion.samplers import samplers_for
from molgen_energy.distributed import default_workers
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.metrics.options import is_missing
from molgen_energy.output import atomic_replace
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.sampling import sample_to_file
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.devices import choose_device
from molgen_energy.training.pretrained import resolve_checkpoint

STEPS = (10, 20, 50, 100, 250, 1000)
RATES = ("molecule_stability", "atom_stability", "validity")
MEASURED = (*RATES, "fcd")
KEY = ("weights", "molecules", "seed", "device", "low_precision", "sampler", "spacing", "steps")
COLUMNS = (
    *KEY,
    "evaluations",
    *(f"{name}{end}" for name in MEASURED for end in ("", "_low", "_high")),
    "not_finite",
    "molecules_per_second",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run, a checkpoint, or shipped weights"
    )
    parser.add_argument("-n", "--molecules", type=int, default=1000)
    parser.add_argument("--samplers", default=None, help="names with commas; default: all")
    parser.add_argument("--steps", default=None, help="numbers with commas; default: 10 to all")
    parser.add_argument(
        "--spacings", default=None, help="names with commas; default: that of the checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--low-precision", action="store_true")
    parser.add_argument("--workers", type=int, default=default_workers(), help="for judging")
    parser.add_argument("--output", type=Path, default=Path("quality.csv"))
    with exit_on_error():
        compare(parser.parse_args())


def compare(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    # Read once: a run that is still trained would have other weights for other rows.
    loaded = load_checkpoint(resolve_checkpoint(arguments.checkpoint), weights=["ema"])
    process = loaded.config_as(MoleculeConfig).process
    samplers = chosen_samplers(arguments.samplers, process.name)
    spacings = [None] if arguments.spacings is None else chosen(arguments.spacings)
    generators = [
        MoleculeGenerator(
            loaded,
            device,
            arguments.seed,
            low_precision=arguments.low_precision,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
        )
        for sampler in samplers
        for spacing in spacings
        for steps in chosen_steps(arguments.steps, process.steps)
    ]
    generators.sort(key=lambda generator: generator.sampler.evaluations)
    rows = read_rows(arguments.output)
    folder = arguments.output.with_suffix(".samples")
    for generator in generators:
        key = key_of(generator, arguments.molecules)
        if not any(same(row, key) for row in rows):
            folder.mkdir(exist_ok=True)
            rows.append(key | row_of(generator, key, folder, arguments.workers))
            write_rows(arguments.output, rows)
    keys = [key_of(generator, arguments.molecules) for generator in generators]
    show([row for key in keys for row in rows if same(row, key)], generators[0].checkpoint.origin)


def chosen_samplers(text: str | None, process: str) -> list[str]:
    served = samplers_for(process)
    names = served if text is None else chosen(text)
    for name in names:
        if name not in served:
            raise InputError(unknown_name("sampler", name, served))
    return names


def chosen(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def chosen_steps(text: str | None, trained: int) -> list[int]:
    if text is None:
        return sorted({*(steps for steps in STEPS if steps <= trained), trained})
    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise InputError(f"--steps {text}: expected numbers such as 10,20,50") from None


def key_of(generator: MoleculeGenerator, molecules: int) -> dict[str, Any]:
    return {
        "weights": generator.fingerprint(),
        "molecules": molecules,
        "seed": generator.seed,
        "device": generator.device.type,
        "low_precision": generator.low_precision,
        "sampler": generator.sampler_name,
        "spacing": generator.sampler.spacing or "all",
        "steps": generator.sampler.steps,
    }


def same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(str(row[name]) == str(key[name]) for name in KEY)


def row_of(
    generator: MoleculeGenerator, key: dict[str, Any], folder: Path, workers: int
) -> dict[str, Any]:
    """Sample and evaluate."""
    count, name = key["molecules"], f"{key['sampler']}, {key['spacing']}, {key['steps']} steps"
    settings = ("sampler", "spacing", "steps", "device", "low_precision", "seed", "molecules")
    file = "-".join([*(str(key[setting]) for setting in settings), key["weights"][:8]])
    path = folder / f"{file}.h5"
    speed, not_finite = "", ""
    if not path.exists():
        began = time.perf_counter()
        with SamplingBar(count, "molecules", "continue with the same command", name) as bar:
            resume = shards_folder(path).exists()
            outcome = sample_to_file(generator, count, path, bar, resume=resume)
        if outcome.interrupted:
            sys.exit(1)
        if outcome.drawn:
            speed = f"{outcome.drawn / (time.perf_counter() - began):.4g}"
        not_finite = str(outcome.not_finite)
    metrics = ["rates"] if is_missing("fcd") else ["rates", "fcd"]
    (evaluated,) = evaluate(path, metrics=metrics, workers=workers).files
    row: dict[str, Any] = {
        "evaluations": generator.sampler.evaluations,
        "not_finite": not_finite,
        "molecules_per_second": speed,
    }
    for measure in MEASURED:
        found = evaluated.metrics[measure]
        value = None if found is None else found.value
        interval = None if found is None else found.interval
        row[measure] = "" if value is None else f"{value:.6g}"
        for end, bound in zip(("_low", "_high"), interval or (None, None), strict=True):
            row[f"{measure}{end}"] = "" if bound is None else f"{bound:.6g}"
    say(f"{name}: {100 * float(row['molecule_stability']):.1f} % stable, {speed} molecules/s")
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(f"{path} is no table of this program; name another --output")
        return [row for row in reader if None not in row.values()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with (
        atomic_replace(path) as output,
        output.temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict[str, Any]], origin: str) -> None:
    shown = Table(title=f"{rows[0]['molecules']} molecules from {origin} on {rows[0]['device']}")
    titles = ("calls", "molecule stability, %", "atom stability, %", "validity, %", "FCD", "1/s")
    for title in ("sampler", "spacing", "steps", *titles):
        shown.add_column(title, justify="left" if title in ("sampler", "spacing") else "right")
    last = None
    for row in sorted(rows, key=lambda row: (row["sampler"], row["spacing"], int(row["steps"]))):
        if last not in (None, row["sampler"]):
            shown.add_section()
        last = row["sampler"]
        cells = [with_interval(row, name, 100, "{:.1f}") for name in RATES]
        cells.append(with_interval(row, "fcd", 1, "{:.3g}"))
        speed = row["molecules_per_second"]
        shown.add_row(
            last, row["spacing"], str(row["steps"]), str(row["evaluations"]), *cells, speed
        )
    Console(width=150).print(shown)


def with_interval(row: dict[str, Any], name: str, scale: float, form: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if not value:
        return "n/a"
    text = form.format(scale * float(value))
    bounds = ", ".join(form.format(scale * float(bound)) for bound in (low, high) if bound)
    return f"{text} [{bounds}]" if bounds else text


if __name__ == "__main__":
    main()
