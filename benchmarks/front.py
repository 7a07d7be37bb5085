"""Molecule stability against FCD as the sampling temperature varies, for one or more checkpoints.

    python benchmarks/front.py qm9_mse qm9_energy --temperatures 0.8,0.9,1 -n 2000
    python benchmarks/front.py mse=runs/a mse=runs/b energy=runs/c energy=runs/d  # seeds of a label
    python benchmarks/front.py --only-draw fronts/front.csv --image front.png     # without sampling

A lower temperature makes more molecules stable and the samples less diverse, so a single point of
each model says little: a loss is better if its curve is. The last two tables compare the curves at
equal FCD and at equal stability. They interpolate along each curve and never extrapolate.

FCD is biased: of fewer molecules it is larger, and only valid molecules have one. Curves therefore
take the FCD of the same number of distinct valid molecules for every point, by default as many as
each point has.

Samples and reports stay in --work. What is there for the same weights and settings is not made
again, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rdkit import Chem
from rich.console import Console
from rich.table import Table

from molgen_energy import evaluate, sample
from molgen_energy.cli.console import exit_on_error, say, warn
from molgen_energy.config import parse_assignments
from molgen_energy.data.shards import shards_folder
from molgen_energy.distributed import default_workers
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.metrics.accumulator import JACKKNIFE_GROUPS
from molgen_energy.metrics.bundled import BUNDLED
from molgen_energy.metrics.checks.chunk import CheckSettings
from molgen_energy.metrics.distances.comparison import Distributions, compare
from molgen_energy.metrics.distances.fcd import ChemNet
from molgen_energy.metrics.evaluation import PRELOAD
from molgen_energy.metrics.molecule_evaluation import check_chunks
from molgen_energy.metrics.options import install_command, is_missing, parse_metrics
from molgen_energy.metrics.sources import FileSource
from molgen_energy.output import atomic_replace, atomic_write, check_writable
from molgen_energy.resources import asset
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.registry import SYSTEMS
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.pretrained import resolve_checkpoint
from molgen_energy.workers import WorkerPool

METRICS = "rates,geometry,composition,strain,fcd"
STABILITY, FCD, FCD_EQUAL = "molecule_stability", "fcd", "fcd_equal"
SHOWN = {
    STABILITY: ("stable, %", 100, 1),
    "validity": ("valid, %", 100, 1),
    FCD_EQUAL: ("FCD, equal number", 1, 2),
    FCD: ("FCD, all valid", 1, 2),
    "wasserstein_dihedral": ("dihedrals, °", 1, 2),
    "strain_energy": ("strain, kcal/mol", 1, 1),
}  # columns of the first table: title, factor and decimals
DATA = "data"  # label of real molecules
COLOURS = ("#2563c9", "#d9651b", "#1f9254", "#a8339c", "#c22f3b", "#6b5ad0", "#8a6d1d", "#0f8f9c")
DARK = "#3a3f46"
FEW = 4  # curves whose temperatures are all written
NEAR = 0.6  # of the range of curves, for real molecules in the picture
LINES = ("-", "--", ":")
DRAWS = 400  # resamplings for the interval of one run
FEWEST = 2 * JACKKNIFE_GROUPS  # molecules of an FCD, for an interval
TIMEOUT = 20.0  # s, for one molecule in RDKit

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval; NaN where unknown."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Point:
    """The metrics of one checkpoint at one temperature, or of real molecules (without either)."""

    label: str
    checkpoint: str = ""
    weights: str = ""
    temperature: float = math.nan
    molecules: int = 0
    steps: int = 0
    spacing: str = ""
    seed: int = 0
    options: str = ""
    fcd_molecules: int = 0
    metrics: Mapping[str, Measured] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> Measured:
        return self.metrics.get(metric, Measured())


@dataclass(frozen=True)
class Job:
    """Samples to draw: a checkpoint and a temperature, with the file that they go to."""

    label: str
    checkpoint: str
    weights: str
    temperature: float
    molecules: int
    steps: int
    spacing: str
    seed: int
    options: Mapping[str, Any]
    """Further ones of `sample`."""
    device: str
    path: Path


@dataclass(frozen=True)
class Spread:
    """A number over the runs of a label: the mean with the least and the largest, or the 95 %
    interval of a single run. NaN unless all runs have it."""

    value: float
    low: float
    high: float
    reached: int
    runs: int


@dataclass(frozen=True)
class Equal:
    """What a label has of `metric` where it has `at` of the other metric."""

    label: str
    metric: str
    at: float
    value: float
    low: float
    high: float
    reached: int
    runs: int


def parser() -> argparse.ArgumentParser:
    """The options of this program."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "checkpoints",
        nargs="*",
        metavar="[LABEL=]CHECKPOINT",
        help="a run, a checkpoint or shipped weights; those of one label are seeds of one curve",
    )
    options.add_argument("--temperatures", default="0.8,0.85,0.9,0.95,1", help="with commas")
    options.add_argument("-n", "--molecules", type=int, default=1000)
    options.add_argument("--steps", type=int, default=50, help="of the sampler")
    options.add_argument("--spacing", default="quadratic", help="of the sampler's levels")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further option of `sample`, such as temperature_of=score",
    )
    options.add_argument("--device", default="auto")
    options.add_argument("--jobs", type=int, default=1, help="processes that draw, a thread each")
    options.add_argument("--workers", type=int, default=default_workers(), help="for judging")
    options.add_argument(
        "--metrics", default=METRICS, help="of `evaluate`, for instance all, or with posebusters"
    )
    options.add_argument(
        "--fcd-molecules",
        type=int,
        help="of the FCD on curves; default: the most that every point has",
    )
    options.add_argument("--at-fcd", help="levels of FCD to compare at; default: round numbers")
    options.add_argument("--at-stability", help="levels in per cent; default: round numbers")
    options.add_argument("--work", type=Path, default=Path("fronts"), help="samples and reports")
    options.add_argument("--csv", type=Path, help="points; default: front.csv in --work")
    options.add_argument("--image", type=Path, help="default: beside the CSV, as .png")
    options.add_argument("--only-draw", type=Path, metavar="CSV", help="tables and picture again")
    return options


def main() -> None:
    arguments = parser().parse_args()
    with exit_on_error():
        if arguments.only_draw is not None:
            redraw(arguments)
        else:
            measure(arguments)


def redraw(arguments: argparse.Namespace) -> None:
    """Tables and picture of a CSV."""
    if arguments.checkpoints:
        raise InputError("--only-draw takes no checkpoint: its CSV has the points")
    conclude(read_points(arguments.only_draw), arguments, arguments.only_draw)


def measure(arguments: argparse.Namespace) -> None:
    """Draw and evaluate what is missing, then write tables and picture."""
    if is_missing("fcd"):
        raise InputError(f"fronts need FCD: {install_command('fcd')}")
    metrics = sorted(parse_metrics(arguments.metrics) | {"fcd"})
    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: expected 1 or more processes")
    if arguments.fcd_molecules is not None and arguments.fcd_molecules < FEWEST:
        raise InputError(f"--fcd-molecules {arguments.fcd_molecules}: expected {FEWEST} or more")
    table = arguments.csv or arguments.work / "front.csv"
    arguments.work.mkdir(parents=True, exist_ok=True)
    for path in (table, arguments.image or table.with_suffix(".png")):
        check_writable(path)
    jobs = chosen_jobs(arguments)
    for done, job in enumerate(drawn(jobs, arguments.jobs), start=1):
        found = evaluated(job, metrics, arguments.workers)["report"]["files"][0]["metrics"]
        stable, valid = (100 * found[name]["value"] for name in (STABILITY, "validity"))
        say(
            f"{done} of {len(jobs)}: {job.label} at {job.temperature:g}: {stable:.1f} % stable, "
            f"{valid:.1f} % valid"
        )
    reports = [evaluated(job, metrics, arguments.workers) for job in jobs]
    equal = arguments.fcd_molecules
    if equal is None:
        equal = max(FEWEST, min(len(found["smiles"]) for found in reports))
    points = []
    for job, found in zip(jobs, reports, strict=True):
        if len(found["smiles"]) < equal:
            warn(
                f"{job.label} at {job.temperature:g} is on no curve: it has {len(found['smiles'])} "
                f"distinct valid molecules, FCD takes {equal}; draw more (-n)"
            )
        points.append(point_of(job, found, equal))
    points.append(data_point(reports[0], equal))
    write_points(table, points)
    conclude(points, arguments, table)


# Drawing and judging


def chosen_jobs(arguments: argparse.Namespace) -> list[Job]:
    """One for each checkpoint and temperature."""
    named = parse_checkpoints(arguments.checkpoints)
    temperatures = parse_numbers("--temperatures", arguments.temperatures)
    options = parse_options(arguments.set)
    digest = f"-{hashlib.sha256(repr(options).encode()).hexdigest()[:6]}" if options else ""
    jobs, configs = [], dict[str, MoleculeConfig]()
    for label, checkpoint in named:
        loaded = load_checkpoint(resolve_checkpoint(Path(checkpoint)), weights=["ema"])
        weights = MoleculeGenerator(loaded, torch.device("cpu")).fingerprint()
        config = without_seed(loaded.config_as(MoleculeConfig))
        if configs.setdefault(label, config) != config:
            warn(f"{checkpoint} differs from others of the label {label} in more than its seed")
        for temperature in temperatures:
            settings = f"t{temperature:g}-{arguments.steps}-{arguments.spacing}-{arguments.seed}"
            name = f"{weights[:12]}-{settings}{digest}-{arguments.molecules}.h5"
            jobs.append(
                Job(
                    label, checkpoint, weights, temperature, arguments.molecules, arguments.steps,
                    arguments.spacing, arguments.seed, options, arguments.device,
                    arguments.work / name,
                )
            )  # fmt: skip
    return jobs


def parse_checkpoints(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Labels and checkpoints; without a label, that of a folder is its name.

    Raises
    ------
    InputError
        There are none, or two folders have the same name and no label.
    """
    if not texts:
        raise InputError("name at least one checkpoint: a run's folder, or weights like qm9_mse")
    named, own = [], dict[str, str]()
    for text in texts:
        label, equals, checkpoint = text.partition("=")
        if not equals or Path(text).exists():
            label, checkpoint = Path(text).resolve().name, text
            if own.setdefault(label, text) != text:
                raise InputError(
                    f"{own[label]} and {text} have the same name; write LABEL={text}, one label "
                    "for runs that differ only by their seed"
                )
        if not label or not checkpoint or label == DATA:
            raise InputError(f"{text}: expected LABEL=CHECKPOINT, with a label other than {DATA}")
        named.append((label, checkpoint))
    return named


def parse_numbers(option: str, text: str) -> list[float]:
    """Numbers above zero with commas, each once, in their order."""
    try:
        numbers = list(dict.fromkeys(float(number) for number in text.split(",")))
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise InputError(f"{option} {text}: expected numbers above 0, such as 0.8,0.9,1")
    return numbers


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """Options of `sample` in the order of their names, without those of this program.

    Raises
    ------
    InputError
        There is no such option.
    """
    options = parse_assignments(assignments)
    own = ("count", "seed", "steps", "spacing", "temperature")
    valid = [name for name in SYSTEMS["molecules"].sampling if name not in own]
    for name in options:
        if name not in valid:
            raise InputError(unknown_name("option of samples for --set", name, valid))
    return dict(sorted(options.items()))


def without_seed(config: MoleculeConfig) -> MoleculeConfig:
    """A copy without what may differ between the seeds of a curve."""
    return config.replaced({"training.seed": 0, "name": "", "data.path": None})


def drawn(jobs: Sequence[Job], processes: int) -> Iterator[Job]:
    """The jobs in their order, each when its samples are there."""
    if processes == 1:
        for job in jobs:
            draw(job)
            yield job
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        done = [pool.submit(draw, job) for job in jobs]
        try:
            for job, future in zip(jobs, done, strict=True):
                future.result()
                yield job
        finally:
            pool.shutdown(cancel_futures=True)


def draw(job: Job) -> None:
    """Draw the samples of a job, or go on with them, unless they are there."""
    if job.path.exists():
        return
    if shards_folder(job.path).exists():
        result = sample(resume=job.path, device=job.device)
    else:
        result = sample(
            job.molecules,
            job.path,
            checkpoint=job.checkpoint,
            temperature=job.temperature,
            steps=job.steps,
            spacing=job.spacing,
            seed=job.seed,
            device=job.device,
            **job.options,
        )
    if result.interrupted:
        raise KeyboardInterrupt


def evaluated(job: Job, metrics: Sequence[str], workers: int) -> dict[str, Any]:
    """The report on a job's samples and their distinct valid SMILES, as stored if they are."""
    stored = job.path.with_suffix(".json")
    if stored.exists():
        found: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
        if found["metrics"] == list(metrics):
            return found
    found = {
        "metrics": list(metrics),
        "report": evaluate(job.path, metrics=metrics, workers=workers).to_dict(),
        "smiles": sorted(set(valid_smiles(job.path, workers))),
        FCD_EQUAL: {},  # by number of molecules
    }
    store(stored, found)
    return found


def store(path: Path, found: Mapping[str, Any]) -> None:
    atomic_write(path, (json.dumps(found, indent=1) + "\n").encode())


def point_of(job: Job, found: dict[str, Any], equal: int) -> Point:
    """The metrics of a job's samples; the FCD of `equal` molecules is stored once computed."""
    by_number, fcd = found[FCD_EQUAL], Measured()
    if str(equal) in by_number:
        fcd = Measured(*by_number[str(equal)])
    elif len(found["smiles"]) >= equal:
        fcd = fcd_of_equal(found["smiles"], equal)
        by_number[str(equal)] = [fcd.value, fcd.low, fcd.high]
        store(job.path.with_suffix(".json"), found)
    (file,) = found["report"]["files"]
    return Point(
        label=job.label,
        checkpoint=job.checkpoint,
        weights=job.weights,
        temperature=job.temperature,
        molecules=job.molecules,
        steps=job.steps,
        spacing=job.spacing,
        seed=job.seed,
        options=", ".join(f"{name}={value}" for name, value in job.options.items()),
        fcd_molecules=equal,
        metrics=metrics_of(file, fcd),
    )


def data_point(found: Mapping[str, Any], equal: int) -> Point:
    """The metrics of real molecules, from any report."""
    entry = found["report"]["reference"]
    metrics = metrics_of(entry, fcd_of_data(equal))
    return Point(DATA, molecules=entry["molecules"], fcd_molecules=equal, metrics=metrics)


def metrics_of(entry: Mapping[str, Any], equal: Measured) -> dict[str, Measured]:
    """Metrics of a file in a report, without those of given bonds, and its FCD at equal number."""
    found = {}
    for name, metric in entry["metrics"].items():
        if metric is not None:
            low, high = metric["interval"] or (math.nan, math.nan)
            value = math.nan if metric["value"] is None else metric["value"]
            found[name] = Measured(value, low, high)
    return found | {FCD_EQUAL: equal}


def valid_smiles(path: Path, workers: int) -> list[str]:
    """SMILES of the valid molecules of a file, as `evaluate` passes them to ChemNet."""
    settings = CheckSettings(type_codes={}, whole_smiles=True)
    with WorkerPool(workers, TIMEOUT, preload=PRELOAD) as pool:
        checked = check_chunks(FileSource(path).chunks(), settings, pool)
        return [smiles for _, checks in checked for smiles in checks.whole_smiles if smiles]


def fcd_of_data(count: int) -> Measured:
    """`fcd_of_equal` of QM9's training molecules: the best that a model can achieve."""
    with gzip.open(asset("qm9_train_smiles.txt.gz"), "rt", encoding="utf-8") as file:
        listed = file.read().splitlines()[1:]  # with explicit hydrogens
    distinct: set[str] = set()
    for k in np.random.default_rng(0).permutation(len(listed)):
        if len(distinct) < count:
            distinct.add(Chem.CanonSmiles(listed[k]))
    return fcd_of_equal(distinct, count)


def fcd_of_equal(smiles: Iterable[str], count: int) -> Measured:
    """FCD from QM9's test molecules of `count` random ones of distinct SMILES.

    The interval is the jackknife's of `evaluate`.
    """
    distinct = sorted(smiles)
    chosen = np.random.default_rng(0).permutation(len(distinct))[:count]
    net = ChemNet()
    net.add([distinct[k] for k in chosen])
    none = np.zeros((JACKKNIFE_GROUPS, 1), np.int64)
    source = Distributions({}, none, none, net.finish())
    found = compare(source, BUNDLED["qm9"].load().distributions, None, composition=False)
    estimate = found.estimates["fcd"]
    assert estimate.value is not None and estimate.interval is not None
    return Measured(estimate.value, *estimate.interval)


# Points as a table


def write_points(path: Path, points: Sequence[Point]) -> None:
    """One row for each point; metrics have the columns NAME, NAME_low and NAME_high."""
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    rows = []
    for point in points:
        row = asdict(point)
        del row["metrics"]
        for name in names:
            for end, value in asdict(point[name]).items():
                row[name if end == "value" else f"{name}_{end}"] = value
        rows.append({key: as_text(value) for key, value in row.items()})
    write_rows(path, rows)


def as_text(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.6g}"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with (
        atomic_replace(path) as output,
        output.temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_points(path: Path) -> list[Point]:
    """The points of `write_points`.

    Raises
    ------
    InputError
        The file does not exist or is another table.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; name a CSV that this program wrote")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds: dict[str, Callable[[str], Any]] = {"temperature": number}
    kinds |= dict.fromkeys(("label", "checkpoint", "weights", "spacing", "options"), str)
    kinds |= dict.fromkeys(("molecules", "steps", "seed", "fcd_molecules"), int)
    if not rows or not {*kinds, STABILITY, FCD_EQUAL} <= rows[0].keys():
        raise InputError(f"{path} is no table of points of this program")
    names = [name for name in rows[0] if f"{name}_low" in rows[0]]
    return [
        Point(
            **{name: kind(row[name]) for name, kind in kinds.items()},
            metrics={
                name: Measured(*(number(row[f"{name}{end}"]) for end in ("", "_low", "_high")))
                for name in names
            },
        )
        for row in rows
    ]


def number(text: str) -> float:
    return float(text) if text else math.nan


# Fronts


def fronts(points: Iterable[Point]) -> dict[str, list[list[Point]]]:
    """By label: the points of each of its checkpoints, by temperature."""
    found: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        if point.label != DATA:
            found.setdefault(point.label, {}).setdefault(point.weights, []).append(point)
    return {
        label: [sorted(run, key=lambda point: point.temperature) for run in runs.values()]
        for label, runs in found.items()
    }


def spread(values: Sequence[Measured]) -> Spread:
    """Over the values of the runs of a label."""
    numbers = [measured.value for measured in values if math.isfinite(measured.value)]
    if len(numbers) < len(values):
        return Spread(math.nan, math.nan, math.nan, len(numbers), len(values))
    if len(values) == 1:
        return Spread(values[0].value, values[0].low, values[0].high, 1, 1)
    mean = sum(numbers) / len(numbers)
    return Spread(mean, min(numbers), max(numbers), len(numbers), len(values))


def curve(run: Sequence[Point]) -> tuple[Array, Array]:
    """FCD and stability of the points of one checkpoint that have both, and their standard errors.

    Returns
    -------
    Two arrays (P, 2).
    """
    both = [(point[FCD_EQUAL], point[STABILITY]) for point in run]
    both = [pair for pair in both if all(math.isfinite(measured.value) for measured in pair)]
    values = np.array([[measured.value for measured in pair] for pair in both]).reshape(-1, 2)
    widths = np.array([[m.high - m.low for m in pair] for pair in both]).reshape(-1, 2)
    return values, np.nan_to_num(widths) / 3.92


def interpolated(points: Array, column: int, at: float) -> float:
    """The other column of a curve (P, 2) where `column` is `at`, on straight lines between points.

    The best value if the curve passes `at` several times: the highest stability, the lowest FCD.
    NaN if it does not: curves are not extrapolated.
    """
    key, other = points[:, column] - at, points[:, 1 - column]
    found = other[key == 0].tolist()
    for k in np.flatnonzero(key[:-1] * key[1:] < 0):
        share = key[k] / (key[k] - key[k + 1])
        found.append(float(other[k] + share * (other[k + 1] - other[k])))
    if not found:
        return math.nan
    return float(max(found) if column == 0 else min(found))


def interpolated_with_interval(run: Sequence[Point], column: int, at: float) -> Measured:
    """`interpolated`, with the 95 % interval from normal errors of all points.

    The errors of the points are taken as independent. Resampled curves that do not reach `at` do
    not count.
    """
    points, errors = curve(run)
    value = interpolated(points, column, at)
    if math.isnan(value):
        return Measured()
    noise = np.random.default_rng(0).standard_normal((DRAWS, *points.shape)) * errors
    again = np.array([interpolated(points + each, column, at) for each in noise])
    reached = again[np.isfinite(again)]
    if not len(reached):
        return Measured(value)
    low, high = np.percentile(reached, [2.5, 97.5])
    return Measured(value, float(low), float(high))


def at_equal(
    by_label: Mapping[str, Sequence[Sequence[Point]]], column: int, levels: Sequence[float]
) -> list[Equal]:
    """Of each label: stability at levels of FCD (column 0), or FCD at levels of stability (1)."""
    metric = (STABILITY, FCD_EQUAL)[column]
    return [
        Equal(label, metric, at, **asdict(over_runs))
        for at in levels
        for label, runs in by_label.items()
        for over_runs in [spread([interpolated_with_interval(run, column, at) for run in runs])]
    ]


def round_levels(by_label: Mapping[str, Sequence[Sequence[Point]]], column: int) -> list[float]:
    """Round numbers within the range of all curves."""
    every = [curve(run)[0][:, column] for runs in by_label.values() for run in runs]
    values = np.concatenate(every)
    if not len(values):
        return []
    ticks = MaxNLocator(7).tick_values(values.min(), values.max())
    return [float(f"{t:.6g}") for t in ticks if values.min() <= t <= values.max()]


# Tables and picture


def conclude(points: Sequence[Point], arguments: argparse.Namespace, table: Path) -> None:
    """Write the picture and the comparison beside the table of points, and print all."""
    by_label, console = fronts(points), Console(width=160)
    data = next(point for point in points if point.label == DATA)
    console.print(point_table(by_label, data))
    found = []
    for column, option, factor in ((0, "at_fcd", 1), (1, "at_stability", 100)):
        text = getattr(arguments, option)
        levels = (
            round_levels(by_label, column)
            if text is None
            else [x / factor for x in parse_numbers(f"--{option.replace('_', '-')}", text)]
        )
        rows = at_equal(by_label, column, levels)
        if rows:
            console.print(equal_table(rows, data))
        found += rows
    comparison = table.with_name(f"{table.stem}_equal.csv")
    if found:
        write_rows(comparison, [{k: as_text(v) for k, v in asdict(row).items()} for row in found])
    image = arguments.image or table.with_suffix(".png")
    with atomic_replace(image) as output:
        picture(by_label, data).savefig(output.temporary, format="png", metadata={"Software": None})
    say(f"points: {table}, comparison: {comparison if found else 'none'}, picture: {image}")


def point_table(by_label: Mapping[str, Sequence[Sequence[Point]]], data: Point) -> Table:
    """All metrics of `SHOWN` by label and temperature, and those of real molecules."""
    runs = max(map(len, by_label.values()))
    table = Table(
        title="temperature τ, with "
        + ("95 % intervals" if runs == 1 else "mean [least, largest] over the runs of a label")
    )
    for title in ("", "τ", *(title for title, _, _ in SHOWN.values())):
        table.add_column(title, justify="right" if title else "left")
    for label, group in by_label.items():
        for temperature in temperatures_of(group):
            same = [point for run in group for point in run if point.temperature == temperature]
            cells = [cell(spread([p[m] for p in same]), *SHOWN[m][1:]) for m in SHOWN]
            table.add_row(label, f"{temperature:g}", *cells)
        table.add_section()
    cells = [cell(spread([data[m]]), *SHOWN[m][1:]) for m in SHOWN]
    table.add_row("data", "", *cells)
    return table


def temperatures_of(group: Iterable[Iterable[Point]]) -> list[float]:
    return sorted({point.temperature for run in group for point in run})


def cell(found: Spread, factor: float, decimals: int) -> str:
    if math.isnan(found.value):
        return "n/a"
    text = f"{factor * found.value:.{decimals}f}"
    if math.isnan(found.low):
        return text
    low, high = (f"{factor * bound:.{decimals}f}" for bound in (found.low, found.high))
    return f"{text} [{low}, {high}]"


def equal_table(rows: Sequence[Equal], data: Point) -> Table:
    """Labels in rows, levels in columns."""
    stability = rows[0].metric == STABILITY
    metric = SHOWN[rows[0].metric]
    table = Table(
        title="molecule stability, %, at equal FCD" if stability else "FCD at equal stability",
        caption=f"FCD of {data.fcd_molecules:,} distinct valid molecules; real molecules have "
        f"{data[FCD_EQUAL].value:.2f} and are stable in {100 * data[STABILITY].value:.1f} %",
    )
    table.add_column("")
    for at in dict.fromkeys(row.at for row in rows):
        table.add_column(f"FCD {at:g}" if stability else f"{100 * at:g} %", justify="right")
    for label in dict.fromkeys(row.label for row in rows):
        mine = [row for row in rows if row.label == label]
        table.add_row(label, *(equal_cell(row, *metric[1:]) for row in mine))
    return table


def equal_cell(row: Equal, factor: float, decimals: int) -> str:
    if not row.reached:
        return "not reached"
    if row.reached < row.runs:
        return f"by {row.reached} of {row.runs}"
    return cell(Spread(row.value, row.low, row.high, row.reached, row.runs), factor, decimals)


def picture(by_label: Mapping[str, Sequence[Sequence[Point]]], data: Point) -> Figure:
    """One curve a label, and real molecules if they are near."""
    figure = Figure(figsize=(8.8, 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for k, (label, group) in enumerate(by_label.items()):
        style = LINES[k // len(COLOURS) % len(LINES)]
        draw_front(axes, label, group, COLOURS[k % len(COLOURS)], style, len(by_label) <= FEW)
    fcd, stable = data[FCD_EQUAL].value, 100 * data[STABILITY].value
    reference = f"real molecules:\n{stable:.1f} %, FCD {fcd:.2f}"
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    if left - fcd < NEAR * (right - left) and stable - top < NEAR * (top - bottom):
        axes.plot(fcd, stable, "*", color=DARK, ms=12, ls="none", label=reference)
    else:  # so far away that curves would be small
        axes.plot([], [], "*", color=DARK, ms=9, ls="none", label=f"{reference}\n(not shown)")
    axes.set_title("↖ better", loc="left", color=DARK, fontsize=11)
    axes.set_title("numbers: sampling temperature", loc="right", color=DARK, fontsize=8.5)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(
        xlabel=f"FCD of {data.fcd_molecules:,} distinct valid molecules",
        ylabel="stable molecules, %",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    return figure


def draw_front(
    axes: Axes,
    label: str,
    group: Sequence[Sequence[Point]],
    colour: str,
    style: str,
    every: bool,
) -> None:
    """A curve through the means over the runs of a label; bars as in the first table.

    `every` writes all temperatures, otherwise the first and the last.
    """
    rows = []
    for temperature in temperatures_of(group):
        same = [point for run in group for point in run if point.temperature == temperature]
        x, y = (spread([p[m] for p in same]) for m in (FCD_EQUAL, STABILITY))
        if math.isfinite(x.value):
            rows.append([temperature, x.value, x.low, x.high, y.value, y.low, y.high])
    if not rows:
        return
    t, x, x_low, x_high, y, y_low, y_high = np.array(rows).T
    y, y_low, y_high = 100 * y, 100 * y_low, 100 * y_high
    axes.errorbar(
        x, y, xerr=[x - x_low, x_high - x], yerr=[y - y_low, y_high - y], fmt="none",
        ecolor=colour, elinewidth=1, alpha=0.35,
    )  # fmt: skip
    seeds = f"\n({len(group)} seeds)" if len(group) > 1 else ""
    axes.plot(x, y, style, marker="o", color=colour, ms=5, lw=1.8, label=f"{label}{seeds}")
    axes.plot(x, y, "o", color=colour, ms=5, zorder=5)  # above the temperatures
    for k in range(len(t)) if every else sorted({0, len(t) - 1}):
        axes.annotate(
            f"{t[k]:g}", (x[k], y[k]), (0, 6), textcoords="offset points", ha="center", fontsize=8,
            color=colour, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


if __name__ == "__main__":
    main()
