"""The documentation: builds strictly, opens without a network, and its tutorials run."""

from __future__ import annotations

import json
import logging
import re
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

import pytest
from conftest import imported_script

from molgen_energy.api.reference import PAGES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="no documentation beside the tests")


class Resources(HTMLParser):
    """What a page loads, and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "a":
            self.links += [values.get("href") or ""]
        elif tag in ("script", "img", "link", "iframe", "source"):
            self.loaded += [values.get("src") or values.get("href") or ""]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `mkdocs build --strict` does."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    build = pytest.importorskip("mkdocs.commands.build")
    config = pytest.importorskip("mkdocs.config")
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.chdir(ROOT)
        logging.getLogger("mkdocs").setLevel(logging.WARNING)
        loaded = config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        loaded.plugins.on_startup(command="build", dirty=False)
        build.build(loaded)
        loaded.plugins.on_shutdown()
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_the_network_and_links_lead_somewhere(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 40
    for page in pages:
        found = Resources(page)
        remote = [path for path in found.loaded if re.match(r"(https?:)?//", path)]
        assert remote == [], page
        paths = [path.partition("#")[0] for path in found.loaded + found.links]
        local = [path for path in paths if path and not re.match(r"[a-z]+:", path)]
        assert [path for path in local if not (page.parent / path).exists()] == [], page


@pytest.mark.slow
def test_the_site_shows_outputs_of_notebooks_and_public_names(site):
    for notebook in NOTEBOOKS:
        page = (site / "tutorials" / f"{notebook.stem}.html").read_text(encoding="utf-8")
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = sum(len(cell.get("outputs", ())) for cell in cells)
        assert outputs >= 3
        assert page.count('class="notebook-output"') == outputs
        assert "notebook-output-" not in page
    reference = "".join(page.read_text("utf-8") for page in (site / "api").glob("*.html"))
    names = {name for page in PAGES for name in page.entries}
    missing = {name for name in names if f'id="{name}"' not in reference}
    assert missing == set()


def kinds_of_outputs(cells) -> list[list[str]]:
    """Of each cell; of text that was printed piece by piece, once."""
    outputs = [
        (number, sorted(output.get("data", {output.get("name"): None})))
        for number, cell in enumerate(cells)
        for output in cell.get("outputs", ())
    ]
    return [kinds for (_, kinds), _ in groupby(outputs)]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorials_run(path, tmp_path, monkeypatch):
    """On the CPU and without a file; the stored outputs are those of the same cells."""
    pytest.importorskip("nbclient", reason="the extra docs is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with imported_script("run_notebooks") as script:
        notebook = script.without_traces(script.executed(path, tmp_path))
    stored = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert kinds_of_outputs(notebook.cells) == kinds_of_outputs(stored)
