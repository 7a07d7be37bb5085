"""Quality of regular polygons against the angle of augmentation and the number of vertices.

    python scripts/measure_shapes.py         # most of an hour on one core; makes assets/shapes.csv
    python scripts/measure_shapes.py --draw  # the figure alone, from that; assets/shapes.png

Figure 3 of Kaba et al., NeurIPS 2025, at a smaller scale: 20,000 polygons, 6,000 steps of 128. For
each loss, angle and number of vertices the learning rate with the best quality on validation radii
is chosen, and the quality on test radii is reported; of three seeds where the angle varies, of one
where the number of vertices does. Rows that are in the CSV are not measured again, so the script
can be stopped at any time.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rows import read, write

from molgen_energy.output import atomic_replace
from molgen_energy.progress import no_progress
from molgen_energy.systems.base import NoCallback
from molgen_energy.systems.registry import SYSTEMS, load_config
from molgen_energy.systems.shapes.dataset import Polygons
from molgen_energy.systems.shapes.files import read_polygons
from molgen_energy.systems.shapes.metrics import draw_polygon, quality
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.loop import train

ASSETS = Path(__file__).parents[1] / "assets"
LOSSES = {
    "mse": {"loss.name": "mse"},
    "kabsch": {"loss.name": "kabsch"},
    "energy": {"loss.name": "energy", "loss.edges.kind": "complete"},
    "sparse energy": {"loss.name": "energy", "loss.edges.kind": "sparse"},
}
ANGLES = tuple(k * math.pi / 4 for k in range(5))
VERTICES = (8, 16, 32, 64, 128)
REFERENCE = 20  # vertices where the angle varies
RATES = (1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2)
COUNT, STEPS, BATCH = 20_000, 6_000, 128
EVALUATED = 1_000
VALIDATION, TEST = 101, 102  # seeds of the radii for evaluation


@dataclass(frozen=True)
class Setting:
    """One training run."""

    loss: str
    angle: float
    vertices: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Found(Setting):
    """A setting with the quality of its predictions for two sets of radii."""

    validation: float
    test: float


def measured(
    setting: Setting, count: int = COUNT, steps: int = STEPS, batch: int = BATCH
) -> tuple[Found, np.ndarray]:
    """Train and evaluate; also returns the first predicted polygons, (12, N, 2)."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "shapes.h5", Path(folder) / "run"
        polygons = Polygons(
            vertices=setting.vertices,
            augment_angle=setting.angle,
            count=count,
            seed=setting.seed,
            split="1,0,0",
        )
        polygons.write(data, no_progress)
        config = load_config("shapes_energy").replaced(
            {
                **LOSSES[setting.loss],
                "data.path": str(data),
                "training.steps": steps,
                "training.batch_size": batch,
                "training.lr": setting.lr,
                "training.seed": setting.seed,
                "training.validate_every": steps,
                "training.checkpoint_every": steps,
            }
        )
        system, device = SYSTEMS["shapes"], torch.device("cpu")
        task = system.task(config, device, no_progress)
        train(task, run)
        checkpoint, scores, shown = load_checkpoint(run, weights=["ema"]), [], None
        for seed in (VALIDATION, TEST):
            options = {"count": EVALUATED, "seed": seed, "batch_size": None}
            out = Path(folder) / f"{seed}.h5"
            system.generator(checkpoint, device, options).write(out, NoCallback())
            file = read_polygons(out, "this")
            scores.append(quality(file.columns["positions"]))
            shown = file.columns["positions"][:12] / file.columns["radius"][:12, None, None]
        assert shown is not None
        return Found(**asdict(setting), validation=scores[0], test=scores[1]), shown


def places() -> Iterator[tuple[str, float, int]]:
    """All losses at all angles, and at all numbers of vertices with the largest angle."""
    for loss in LOSSES:
        yield from ((loss, angle, REFERENCE) for angle in ANGLES)
        yield from ((loss, math.pi, vertices) for vertices in VERTICES)


def rates(loss: str, vertices: int) -> tuple[float, ...]:
    """Learning rates to try; for the longest runs only those that are best elsewhere."""
    return RATES[-2:] if (loss, vertices) == ("energy", 128) else RATES


def best(rows: list[Found], loss: str, angle: float, vertices: int) -> float:
    """The learning rate with the best quality on validation radii, of the first seed."""
    swept = [
        row
        for row in rows
        if (row.loss, row.vertices, row.seed) == (loss, vertices, SEEDS[0])
        and math.isclose(row.angle, angle)
    ]
    return max(swept, key=lambda row: row.validation).lr


def _one(setting: Setting) -> Found:
    torch.set_num_threads(1)
    return measured(setting)[0]


def measure(path: Path, processes: int) -> list[Found]:
    """Measure the missing rows of the sweep, then of the other seeds."""
    rows = read(path, Found)
    # The longest runs first, so that processes finish together.
    where = sorted(places(), key=lambda place: -place[2])
    swept = [Setting(*place, lr, SEEDS[0]) for place in where for lr in rates(place[0], place[2])]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for stage in range(2):
            if stage == 1:
                swept = [
                    Setting(*place, best(rows, *place), seed)
                    for place in where
                    for seed in SEEDS[1:]
                    if place[2] == REFERENCE
                ]
            known = {(r.loss, round(r.angle, 6), r.vertices, r.lr, r.seed) for r in rows}
            missing = [
                s
                for s in swept
                if (s.loss, round(s.angle, 6), s.vertices, s.lr, s.seed) not in known
            ]
            for number, found in enumerate(pool.imap_unordered(_one, missing)):
                rows.append(found)
                write(path, rows)
                print(f"{number + 1} of {len(missing)}: {found}", flush=True)
    return rows


def draw(rows: list[Found], pictures: dict[str, np.ndarray], path: Path) -> None:
    """Both curves, and predicted polygons of each loss."""
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    by_angle, by_vertices = top.subplots(1, 2, sharey=True)
    for number, loss in enumerate(LOSSES):
        for axes, points in (
            (by_angle, [(angle, angle, REFERENCE) for angle in ANGLES]),
            (by_vertices, [(vertices, math.pi, vertices) for vertices in VERTICES]),
        ):
            values = []
            for _, angle, vertices in points:
                lr = best(rows, loss, angle, vertices)
                values.append(
                    [
                        row.test
                        for row in rows
                        if (row.loss, row.vertices, row.lr) == (loss, vertices, lr)
                        and math.isclose(row.angle, angle)
                    ]
                )
            middle = [np.mean(v) for v in values]
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            axes.errorbar(
                [x for x, _, _ in points], middle, spread, marker="os^D"[number], capsize=3,
                color=f"C{number}", label=loss,
            )  # fmt: skip
    by_angle.set(
        xlabel="largest rotation of the polygons", ylabel="quality, −ln irregularity",
        xticks=ANGLES, xticklabels=["0", "π/4", "π/2", "3π/4", "π"], title=f"{REFERENCE} vertices",
    )  # fmt: skip
    by_vertices.set(xlabel="vertices", title="rotated by up to π", xscale="log")
    by_vertices.set_xticks(VERTICES, [str(v) for v in VERTICES], minor=False)
    by_vertices.minorticks_off()
    by_angle.legend(frameon=False)
    for axes in (by_angle, by_vertices):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    cells = bottom.subplots(2, 8)
    for number, (loss, polygons) in enumerate(pictures.items()):
        for k in range(4):
            axes = cells[number // 2, 4 * (number % 2) + k]
            points = polygons[k] - polygons[k].mean(axis=0)
            draw_polygon(axes, points, f"C{number}")
            if k == 0:
                axes.set_title(loss, fontsize=9, color=f"C{number}", loc="left")
    bottom.suptitle("predicted polygons, data rotated by up to π", fontsize=10)
    figure.set_dpi(130)
    with atomic_replace(path) as output, output.temporary.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def pictures(rows: list[Found]) -> dict[str, Any]:
    """Typical polygons of each loss at the largest angle."""
    return {
        loss: measured(
            Setting(loss, math.pi, REFERENCE, best(rows, loss, math.pi, REFERENCE), SEEDS[0])
        )[1]
        for loss in LOSSES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw the figure")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, default=ASSETS / "shapes.csv")
    parser.add_argument("--figure", type=Path, default=ASSETS / "shapes.png")
    arguments = parser.parse_args()
    rows = (
        read(arguments.csv, Found)
        if arguments.draw
        else measure(arguments.csv, arguments.processes)
    )
    draw(rows, pictures(rows), arguments.figure)
    for loss, angle, vertices in places():
        lr = best(rows, loss, angle, vertices)
        values = [
            r.test
            for r in rows
            if (r.loss, r.vertices, r.lr) == (loss, vertices, lr) and math.isclose(r.angle, angle)
        ]
        print(f"{loss:14} angle {angle:.3f} vertices {vertices:3} lr {lr:g}: "
              f"{np.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})")  # fmt: skip


if __name__ == "__main__":
    main()
