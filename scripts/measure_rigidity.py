"""How often random 2D-regular graphs are globally rigid: Figure 5 of Kaba et al., NeurIPS 2025.

    python scripts/measure_rigidity.py docs/data/rigidity.csv

writes dimension, vertices, number of graphs and of globally rigid graphs, for D = 2 and 3 and
n = 2D+1 … 100. A thousand graphs each take about an hour on one core; rows that are in the file are
not measured again. `scripts/draw_losses.py` draws the figure.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from molgen_energy.losses.rigidity import are_globally_rigid, random_regular_graph


def rigid_count(n: int, dimension: int, graphs: int) -> int:
    """Number of globally rigid graphs among those of seeds 1000·n, 1000·n + 1, …"""
    drawn = [random_regular_graph(n, 2 * dimension, seed=1000 * n + k) for k in range(graphs)]
    return int(are_globally_rigid(np.stack(drawn), n, dimension).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--largest", type=int, default=100)
    options = parser.parse_args()
    done = set()
    if options.output.exists():
        with options.output.open(newline="") as file:
            done = {(int(row["dimension"]), int(row["vertices"])) for row in csv.DictReader(file)}
    with options.output.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not done:
            writer.writerow(["dimension", "vertices", "graphs", "globally_rigid"])
        for dimension in (2, 3):
            for n in range(2 * dimension + 1, options.largest + 1):
                if (dimension, n) not in done:
                    count = rigid_count(n, dimension, options.graphs)
                    writer.writerow([dimension, n, options.graphs, count])
                    file.flush()
                    print(f"D={dimension} n={n}: {count} of {options.graphs}", flush=True)


if __name__ == "__main__":
    main()
