"""Run the project's tasks: python scripts/tasks.py setup, then check, test, lint, format …

    python scripts/tasks.py            # list them
    python scripts/tasks.py lint types # several, in order, until one fails

`setup` installs the package with everything that the tests use, outside of a virtual environment
into a new one in `.venv`. The other tasks use that one too, or the active environment.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"

INSTALL = "pip install -c constraints.txt -e .[dev,docs,qm9,ccd,geom,spins,fcd,posebusters,xtb]"

# Every command is a module of the environment's Python.
TASKS: dict[str, tuple[str, list[str]]] = {
    "setup": ("install the package, all extras and the tools of development", [INSTALL]),
    "test": ("run all tests, in two processes", ["pytest -n 2"]),
    "quick": ("run the tests that take less than about 5 s each", ["pytest -n 2 -m 'not slow'"]),
    "gpu": ("run the tests that need a GPU", ["pytest -m gpu"]),
    "lint": ("check style and format", ["ruff check .", "ruff format --check ."]),
    "format": ("fix style and format", ["ruff check --fix .", "ruff format ."]),
    "types": ("check types", ["mypy"]),
    "links": ("check links, paths and tasks in all Markdown files", ["pytest tests/test_docs.py"]),
    "docs": (
        "run all that README and site print, and the tutorials",
        ["pytest tests/test_docs.py tests/test_printed.py tests/test_site.py"],
    ),
    "site": ("build the documentation: site/index.html", ["mkdocs build --strict"]),
    "notebooks": ("execute the tutorials and store their outputs", ["scripts.run_notebooks"]),
}
TASKS["check"] = (
    "all that must pass before a commit: lint, types, test (which contains docs)",
    [command for task in ("lint", "types", "test") for command in TASKS[task][1]],
)


def in_environment() -> bool:
    """Whether this Python belongs to a virtual or Conda environment."""
    return sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ


def environment_python() -> Path:
    """Python of `.venv`, or of the active environment."""
    if in_environment():
        return Path(sys.executable)
    scripts = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
    return scripts / ("python.exe" if os.name == "nt" else "python")


def is_installed(command: str) -> bool:
    """Whether the environment has the module of a command."""
    module = command.split()[0]
    if (ROOT / f"{module.replace('.', '/')}.py").exists():
        return True
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([environment_python(), "-c", find]).returncode == 0


def main(tasks: list[str]) -> int:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        for name, (text, _) in TASKS.items():
            print(f"{name:8} {text}")
        return 2
    if not environment_python().exists():
        if "setup" not in tasks:
            print(f"{ENVIRONMENT} does not exist; run `python scripts/tasks.py setup` first")
            return 2
        venv.create(ENVIRONMENT, with_pip=True)
    for task in tasks:
        for command in TASKS[task][1]:
            print(f"$ python -m {command}", flush=True)
            # MkDocs' theme would print a notice about its successor.
            environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
            done = subprocess.run(
                [environment_python(), "-m", *shlex.split(command)], cwd=ROOT, env=environment
            )
            if done.returncode:
                if not is_installed(command):
                    print("the environment lacks it; run `python scripts/tasks.py setup` first")
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
