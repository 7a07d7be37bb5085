"""Damage files of every format, and check that the commands that read them refuse them in one line.

python scripts/fuzz.py -n 10000                         # all formats, minutes on two cores
python scripts/fuzz.py -n 500 --formats run,sdf --seed 3
python scripts/fuzz.py --replay failures/sdf-17         # one failure again, with its traceback

A mutant is a small valid file that the package wrote, changed in one way (`fuzz_mutants.py`,
`fuzz_hdf5.py`). The command that reads it runs in a process of its own, which is forked from one
that has imported everything. It must exit with code 0 or 2, and with 2 after one line on standard
error; it may take 20 s and 2 GB. Where the mutant is outside of what its format declares, it must
not exit with 0, and where it holds the same data, its result must be the same. The same number,
seed and format give the same mutant.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_corpus
import h5py
import numpy as np
import torch
from fuzz_corpus import Command
from fuzz_mutants import REFUSED, SAME, Mutation, pick
from fuzz_targets import TARGETS, Target
from rich.console import Console
from rich.table import Table

import molgen_energy
from molgen_energy.cli import app
from molgen_energy.metrics.bundled import BUNDLED, DEFAULT_REFERENCE, BundledReference
from molgen_energy.metrics.reference import Reference

SECONDS = 20
MEMORY = 2 << 30
_COMMANDS = 100  # that one process runs; each leaves some memory
_TRIES = 20  # at finding a mutator that can change a file


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Exit code; negative the number of the signal that ended it."""
    stdout: str
    stderr: str
    hung: bool
    memory: int
    """Most bytes that the process held."""


@dataclass(frozen=True)
class Failure:
    """A mutant that was not handled as it must be; its files lie in a folder of its name."""

    format: str
    number: int
    seed: int
    file: str
    mutation: str
    expected: str
    command: Command
    got: str
    output: str

    @property
    def name(self) -> str:
        return f"{self.format}-{self.number}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    formats = sorted({target.format for target in TARGETS})
    parser.add_argument("-n", type=int, default=10_000, help="mutants, of all formats together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--formats", default=",".join(formats), help=f"some of {', '.join(formats)}"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("-o", "--output", type=Path, default=Path("failures"), metavar="FOLDER")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="of one failure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.replay is not None:
        return replay(arguments.replay)
    chosen = arguments.formats.split(",")
    if unknown := set(chosen) - set(formats):
        parser.error(f"--formats: no {', '.join(sorted(unknown))}; known are {', '.join(formats)}")
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(Path(folder), chosen, arguments.n, arguments.seed, arguments.jobs,
                     arguments.output)  # fmt: skip
    return 1 if found else 0


def fuzz(
    folder: Path, formats: Sequence[str], count: int, seed: int, jobs: int, output: Path
) -> list[Failure]:
    """Try mutants of some formats, print a table and write failures; `folder` is for work."""
    began = time.perf_counter()
    corpus = folder / "corpus"
    baselines = prepare(corpus, [target for target in TARGETS if target.format in formats])
    print(f"prepared in {time.perf_counter() - began:.0f} s", flush=True)
    work = [(formats[k % len(formats)], k // len(formats)) for k in range(count)]
    failures, tried, refused = [], Counter[str](), Counter[str]()
    global _shared
    _shared = _Run(corpus, folder, seed, baselines, output)  # for the forked processes
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        for name, code, failure in pool.map(_try, work, chunksize=20):
            tried[name] += 1
            refused[name] += code == 2 and failure is None
            if failure is not None:
                failures.append(failure)
                print(f"{failure.name}: {failure.got}: {failure.file}: {failure.mutation}",
                      flush=True)  # fmt: skip
    show(tried, refused, failures, time.perf_counter() - began)
    if failures:
        print(f"\n{len(failures):,} failures in {output}; python scripts/fuzz.py --replay "
              f"{output / failures[0].name}")  # fmt: skip
    return failures


def prepare(corpus: Path, targets: Sequence[Target]) -> dict[tuple[str, Command], str]:
    """Write the corpus, and run each command on it.

    Returns the digest of what each command makes of the files as they are. Training runs in forked
    processes only: PyTorch cannot compute gradients in one that is forked from one that has.
    """
    _import_all()
    if _in_child(lambda: fuzz_corpus.build(corpus)):
        raise RuntimeError("the files to damage could not be written")
    # What does not depend on the mutants is read once.
    qm9 = BUNDLED[DEFAULT_REFERENCE]
    BUNDLED[qm9.name] = _Loaded(**vars(qm9), reference=qm9.load(), hashes=qm9.training_hashes())
    gc.freeze()  # so that collections in forked processes do not copy memory
    jobs = {(target.format, command) for target in targets for command in target.commands}
    return {(name, command): baseline(corpus / name, command) for name, command in sorted(jobs)}


@dataclass(frozen=True)
class _Loaded(BundledReference):
    """A bundled reference that was read."""

    reference: Reference | None = None
    """None reads the file."""
    hashes: Any = None

    def load(self, bonds: str = "perceived", valence: str | None = None) -> Reference:
        return self.reference or super().load(bonds, valence)

    def training_hashes(self, bonds: str = "perceived", loaded: Reference | None = None) -> Any:
        return self.hashes


def _import_all() -> None:
    """Import what commands import when they need it, before processes are forked."""
    for module in pkgutil.walk_packages(molgen_energy.__path__, "molgen_energy."):
        if module.name.rpartition(".")[2] not in ("__main__", "pair_kernels", "fused_kernels"):
            importlib.import_module(module.name)
    importlib.import_module("torch._dynamo")  # of optimisers


def baseline(files: Path, command: Command) -> str:
    """Digest of what a command makes of files as they are, which it must accept."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "work"
        shutil.copytree(files, folder)
        outcome = execute(folder, command, with_traceback=True)
        if outcome.code:
            raise RuntimeError(f"{command}\n{outcome.stdout}\n{outcome.stderr}")
        return digest(folder, command, outcome)


def _in_child(call: Callable[[], None]) -> int:
    """Run a function in a forked process; returns its exit code."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _call(command: Command) -> None:
    """Run a command in this process; raises `SystemExit`."""
    if command.statistics is not None:
        path = str(Path(command.statistics).absolute())
        BUNDLED[DEFAULT_REFERENCE] = replace(
            BUNDLED[DEFAULT_REFERENCE], statistics=path, reference=None
        )
    app([*command.arguments])


def execute(folder: Path, command: Command, with_traceback: bool = False) -> Outcome:
    """Run a command in a folder, in a forked process with limits of time and memory."""
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        if with_traceback:
            os.environ["MOLGEN_ENERGY_TRACEBACK"] = "1"
        code = 1
        try:
            _limit()
            code = _run_here(folder, command)
        finally:
            os._exit(code)
    watched = os.pidfd_open(pid)
    hung = not select.select([watched], [], [], SECONDS)[0]
    os.close(watched)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # also processes that it started
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, *_printed(folder), hung, usage.ru_maxrss << 10)


def _limit() -> None:
    """Limit this process to the memory that it has and `MEMORY` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


_STREAMS = (".stdout", ".stderr")


def _run_here(folder: Path, command: Command) -> int:
    """Run a command in this process and return its exit code.

    What it prints goes into files beside the folder; `_printed` reads them.
    """
    os.chdir(folder)
    for descriptor, end in enumerate(_STREAMS, start=1):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        file = os.open(folder.with_name(folder.name + end), flags)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
    os.environ["COLUMNS"] = "200"
    code: Any = 0
    try:
        _call(command)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def _printed(folder: Path) -> tuple[str, str]:
    """What a command printed on standard output and standard error."""
    texts = []
    for end in _STREAMS:
        path = folder.with_name(folder.name + end)
        texts.append(path.read_bytes().decode("utf-8", "replace") if path.exists() else "")
        path.unlink(missing_ok=True)
    return texts[0], texts[1]


class Executor:
    """A forked process that runs one command after another, which takes less time than forking.

    A process that hangs or dies is replaced. What looks like a failure here is tried again in a
    process of its own, so that no command depends on an earlier one.
    """

    def __init__(self) -> None:
        self._pid, self._left = 0, 0

    def run(self, folder: Path, command: Command) -> Outcome:
        """Run a command in a folder; any exit code but 0 and 2 may be that of the process."""
        if not self._left:
            self.close()
            self._start()
        self._left -= 1
        self._commands.send((folder, command))
        code = 1
        if self._commands.poll(SECONDS):
            with contextlib.suppress(EOFError):
                code = self._commands.recv()
        if code not in (0, 2):
            self.close()
        return Outcome(code, *_printed(folder), hung=False, memory=0)

    def _start(self) -> None:
        self._commands, inside = Pipe()
        self._pid, self._left = os.fork(), _COMMANDS
        if self._pid:
            inside.close()
            return
        os.setpgid(0, 0)
        self._commands.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            _limit()
            while True:
                inside.send(_run_here(*inside.recv()))
        finally:
            os._exit(1)

    def close(self) -> None:
        """End the process."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._commands.close()
        self._pid, self._left = 0, 0


def digest(folder: Path, command: Command, outcome: Outcome) -> str:
    """Hash of what a command printed and of the data that it wrote."""
    found = hashlib.sha256(outcome.stdout.encode())
    if command.output is None:
        return found.hexdigest()
    path = folder / command.output
    if path.suffix != ".h5":
        found.update(path.read_bytes())
        return found.hexdigest()

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            values = item.asstr()[()] if item.dtype == object else item[()]
            found.update(f"{name} {item.dtype} {item.shape}".encode())
            found.update(repr(values.tolist()).encode())

    with h5py.File(path, "r") as file:
        file.visititems(add)
    return found.hexdigest()


class _Run(NamedTuple):
    """What the processes share."""

    corpus: Path
    folder: Path
    seed: int
    baselines: dict[tuple[str, Command], str]
    output: Path


_shared: _Run
_executor = Executor()


def _try(work: tuple[str, int]) -> tuple[str, int, Failure | None]:
    """One mutant: its format, the exit code of its command, and its failure if there is one."""
    name, number = work
    folder, mutant = (_shared.folder / f"{name}-{number}{end}" for end in ("", ".mutant"))
    try:
        target, command, mutation = make_mutant(_shared.corpus, mutant, name, number, _shared.seed)
        expected = _shared.baselines[name, command]
        for run in (_executor.run, execute):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(mutant, folder, symlinks=True)
            outcome = run(folder, command)
            same = outcome.code == 0 and digest(folder, command, outcome) == expected
            got = judge(outcome, mutation, same)
            if got is None:
                break
        if got is None:
            return name, outcome.code, None
        text = outcome.stdout + outcome.stderr
        failure = Failure(name, number, _shared.seed, target.file, mutation.text,
                          mutation.expected, command, got, text)  # fmt: skip
        save(failure, mutant, _shared.output)
        return name, outcome.code, failure
    finally:
        for used in (folder, mutant):
            shutil.rmtree(used, ignore_errors=True)


def make_mutant(
    corpus: Path, folder: Path, name: str, number: int, seed: int
) -> tuple[Target, Command, Mutation]:
    """Copy the files of a format into a new folder, and change one of them."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    target = pick(rng, [target for target in TARGETS if target.format == name])
    shutil.copytree(corpus / name, folder)
    file = next(folder.glob(target.file))
    for _ in range(_TRIES):
        mutation = pick(rng, target.mutators)(file, rng)
        if mutation is not None:
            return target, pick(rng, target.commands), mutation
    raise RuntimeError(f"no mutator changes {target.file}")


_ERROR = re.compile(r"^error: ", re.MULTILINE)
_NOISE = ("Traceback (most recent call last)", "HDF5-DIAG", "RDKit ERROR", "please report it")


def judge(outcome: Outcome, mutation: Mutation, same: bool) -> str | None:
    """What is wrong with how a command ended; None where nothing is.

    `same` says whether its result is that of the file itself.
    """
    text = outcome.stdout + outcome.stderr
    if outcome.hung:
        return f"a hang of {SECONDS} s"
    if outcome.memory > MEMORY or "out of memory" in text:
        return "memory"
    if outcome.code < 0:
        return f"signal {-outcome.code}"
    if outcome.code not in (0, 2):
        return f"code {outcome.code}"
    if any(noise in text for noise in _NOISE):
        return "traceback"
    if any(unicodedata.category(c) == "Cc" and c != "\n" for c in text):
        return "control characters"
    if outcome.code == 2:
        last = outcome.stderr.rstrip("\n").rpartition("\n")[2]
        one = len(_ERROR.findall(outcome.stderr)) == 1 and last.startswith("error: ")
        return None if one else "several lines"
    if mutation.expected == REFUSED or (mutation.expected == SAME and not same):
        return "a silent change"
    return None


def save(failure: Failure, mutant: Path, output: Path) -> None:
    """Write a failure into a folder of its own, with the files of the mutant."""
    folder = output / failure.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(mutant, folder / "files", symlinks=True)
    text = json.dumps(asdict(failure) | {"command": failure.command._asdict()}, indent=2)
    (folder / "failure.json").write_text(text, encoding="utf-8")


def replay(folder: Path) -> int:
    """Run the command of a failure again, with its traceback; returns its exit code."""
    stored = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
    command = Command(**stored.pop("command"))
    command = command._replace(arguments=tuple(command.arguments))
    with tempfile.TemporaryDirectory() as parent:
        work = Path(parent) / "files"
        shutil.copytree(folder / "files", work, symlinks=True)
        outcome = execute(work, command, with_traceback=True)
    for name in ("file", "mutation", "expected", "got"):
        print(f"{name:10}{stored[name]}")
    print(f"{'command':10}{command}\n{'now':10}code {outcome.code}\n")
    print(outcome.stdout, outcome.stderr)
    return outcome.code


def show(
    tried: Counter[str], refused: Counter[str], failures: Sequence[Failure], seconds: float
) -> None:
    """A table: how many mutants of each format were tried and refused, and what failed how."""
    kinds = sorted({failure.got for failure in failures})
    table = Table(title=f"{sum(tried.values()):,} mutants in {seconds:.0f} s")
    for column in ("format", "mutants", "refused", "accepted", *kinds):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, count in tried.items():
        wrong = Counter(failure.got for failure in failures if failure.format == name)
        accepted = count - refused[name] - wrong.total()
        cells = [count, refused[name], accepted, *(wrong[kind] for kind in kinds)]
        table.add_row(name, *(f"{cell:,}" for cell in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
