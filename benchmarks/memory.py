"""Peak memory of `sample`, `evaluate` and `preprocess` by the number of molecules, and its slope.

python benchmarks/memory.py                             # up to 200,000 records, about 20 minutes
python benchmarks/memory.py --only preprocess --sizes 1000,20000

Each command runs in a process of its own, which says its VmHWM: what it needed at most, with the
modules that it imported. The straight line through the two largest numbers of molecules gives the
slope, and the memory of a million. A network of one layer and four steps samples. Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

_CHILD = """
import re, sys
from pathlib import Path
from molgen_energy.cli import app
try:
    app(sys.argv[2:])
finally:
    status = Path("/proc/self/status").read_text()
    Path(sys.argv[1]).write_text(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""
_TINY = (
    "--set=model.layers=1", "--set=model.width=8", "--set=process.steps=4", "--steps=1",
    "--set=training.validation_molecules=4",
)  # fmt: skip
_MILLION = 1_000_000


class Job(NamedTuple):
    """A command with `{n}` for a number of molecules, and the numbers."""

    name: str
    arguments: str
    sizes: tuple[int, ...]


_EVALUATE = "evaluate {n}.%s --workers 1 --metrics rates,geometry,composition"
JOBS = (
    Job("sample x.sdf", "sample -n {n} --checkpoint run -o {n}.sdf", (1, 500, 5000, 20_000)),
    Job("sample x.h5", "sample -n {n} --checkpoint run -o {n}.h5", (1, 500, 5000, 100_000)),
    Job("preprocess x.xyz", "preprocess {n}.xyz -o out.h5", (1000, 20_000, 200_000)),
    Job("preprocess x.sdf", "preprocess {n}.sdf -o out.h5", (1000, 20_000, 200_000)),
    Job("evaluate x.xyz", _EVALUATE % "xyz", (1000, 5000, 20_000)),
    Job("evaluate x.sdf", _EVALUATE % "sdf", (1000, 5000, 20_000)),
    Job("evaluate x.h5", _EVALUATE % "h5", (1000, 5000, 20_000)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="commands whose name begins so")
    parser.add_argument("--sizes", help="numbers of molecules, instead of those of each command")
    arguments = parser.parse_args()
    given = arguments.sizes and tuple(map(int, arguments.sizes.split(",")))
    table = Table(title="peak memory, MB")
    for column in ("command", "molecules", "MB", "bytes a molecule", "a million, MB"):
        table.add_column(column, justify="left" if column == "command" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            if not job.name.startswith(arguments.only):
                continue
            peaks = dict(measured(job, given or job.sizes, Path(folder)))
            slope, million = fitted(peaks)
            last = max(peaks)
            for size, peak in peaks.items():
                ends = (f"{slope:,.0f}", f"{million / 1e6:,.0f}") if size == last else ("", "")
                table.add_row(job.name if size == min(peaks) else "", f"{size:,}",
                              f"{peak / 1e6:,.0f}", *ends)  # fmt: skip
            table.add_section()
            print(job.name, {size: round(peak / 1e6) for size, peak in peaks.items()}, flush=True)
    Console(width=100).print(table)


def measured(job: Job, sizes: tuple[int, ...], folder: Path) -> Iterator[tuple[int, int]]:
    """Numbers of molecules and the bytes that the command took for them."""
    for size in sizes:
        if job.name.startswith("sample"):
            if not (folder / "run").exists():
                peak_of(("train", "-o", "run", *_TINY), folder)
        else:
            make_input(folder, f"{size}.{job.name.rpartition('.')[2]}", size)
        yield size, peak_of(tuple(job.arguments.format(n=size).split()), folder)


def make_input(folder: Path, name: str, size: int) -> None:
    """A file of so many molecules: those of the bundled sample of QM9, again and again."""
    path = folder / name
    if path.exists():
        return
    if path.suffix == ".h5":
        make_input(folder, f"{size}.xyz", size)
        peak_of(("preprocess", f"{size}.xyz", "-o", name, "--split", "1,0,0"), folder)
        return
    once = folder / f"once{path.suffix}"
    if not once.exists():
        code = (
            "import sys; from pathlib import Path\\n"
            "from molgen_energy.data.hdf5 import MoleculeFile\\n"
            "from molgen_energy.chemistry.molfiles import MoleculeTextWriter\\n"
            "from molgen_energy.resources import bundled_sample\\n"
            "with MoleculeFile(bundled_sample()) as f, MoleculeTextWriter(Path(sys.argv[1]), {}) "
            "as w: w.append(f.load())"
        ).replace("\\n", "\n")
        subprocess.run([sys.executable, "-c", code, once], check=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(islice(_again(once), size))


def _again(path: Path) -> Iterator[str]:
    """The records of a file, endlessly."""
    records = list(_records(path))
    while True:
        yield from records


def _records(path: Path) -> Iterator[str]:
    """The records of an SDF or XYZ file as texts."""
    lines = iter(path.read_text(encoding="utf-8").splitlines(keepends=True))
    if path.suffix == ".sdf":
        record = ""
        for line in lines:
            record += line
            if line == "$$$$\n":
                yield record
                record = ""
        return
    for line in lines:
        yield line + "".join(islice(lines, int(line) + 1))


def peak_of(arguments: tuple[str, ...], folder: Path) -> int:
    """Peak memory in bytes of a command of the package."""
    said = folder / "peak"
    program = [sys.executable, "-c", _CHILD, said, *arguments]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return int(said.read_text()) << 10


def fitted(peaks: dict[int, int]) -> tuple[float, float]:
    """Slope in bytes a molecule between the two largest numbers, and bytes of a million."""
    if len(peaks) < 2:
        return 0.0, float("nan")
    (n1, b1), (n2, b2) = sorted(peaks.items())[-2:]
    slope = (b2 - b1) / (n2 - n1)
    return slope, b2 + slope * (_MILLION - n2)


if __name__ == "__main__":
    main()
