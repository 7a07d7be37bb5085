"""The page of formats says what is declared."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from molgen_energy.api.formats import FORMATS
from molgen_energy.systems.registry import SYSTEMS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "CONTRIBUTING.md").exists(), reason="no checkout around the tests"
)


def test_the_page_is_current():
    page = runpy.run_path(str(ROOT / "scripts" / "document_formats.py"))["page"]()
    written = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert written == page, "run `python scripts/document_formats.py`"
    for text in ("`bonds/order`", "1, 2, 3 or 12", "`progress.step`", "integers from 1 to 118"):
        assert text in page


def test_every_system_declares_its_files():
    for name, system in SYSTEMS.items():
        own = system.file_format.system
        assert FORMATS[own] is system.file_format
        assert own == (name if name != "properties" else "molecules")
