"""Links, paths and tasks that the Markdown files of the repository name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("assets", "benchmarks", "configs", "docs", "molgen_energy", "scripts", "tests")
PAGES = sorted({*ROOT.glob("*.md"), *(page for f in FOLDERS for page in (ROOT / f).rglob("*.md"))})

pytestmark = pytest.mark.skipif(
    not (ROOT / "CONTRIBUTING.md").exists(), reason="no checkout around the tests"
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@each_page
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@each_page
def test_paths_exist(page):
    """Those in code, from the root of the repository: `docs/formats.md`, `tests/*/test_*.py`.

    NAME stands for any name.
    """
    names = "|".join(FOLDERS)
    paths = re.findall(rf"`((?:{names})/[\w./*-]*)`", page.read_text(encoding="utf-8"))
    patterns = {path: path.rstrip("/").replace("NAME", "*") for path in paths}
    assert [path for path, pattern in patterns.items() if not any(ROOT.glob(pattern))] == []


@each_page
def test_scripts_and_tasks_exist(page):
    """Those that commands run, in blocks and in code."""
    text = page.read_text(encoding="utf-8")
    tasks = runpy.run_path(str(ROOT / "scripts" / "tasks.py"))["TASKS"]
    for script, arguments in re.findall(r"python3? ((?:scripts|benchmarks)/\w+\.py)(.*)", text):
        assert (ROOT / script).exists(), script
        if script == "scripts/tasks.py":
            named = re.match(r"[ a-z]*", arguments).group().split()
            assert set(named) <= set(tasks), arguments


@each_page
def test_nothing_is_left_to_fill_in(page):
    assert not re.findall(r"\$[A-Z]{3,}|TODO|TBD|BENCHMARK", page.read_text(encoding="utf-8"))


def test_the_readme_takes_two_minutes():
    """900 words at most, the table of results included; the site has the rest."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900
