"""Blocks of a report that show a PNG picture."""

from __future__ import annotations

import base64
from collections.abc import Callable

from molgen_energy.metrics.report.html import render
from molgen_energy.metrics.report.model import BlockContent, ReportBlock


def picture_block(title: str, name: str, draw: Callable[[], bytes]) -> ReportBlock:
    """A block with one picture, also written to the file `name`.png.

    Parameters
    ----------
    draw
        Returns the picture as PNG.
    """

    def content() -> BlockContent:
        picture = draw()
        encoded = base64.b64encode(picture).decode()
        html = render("picture.html.j2", title=title, data=encoded)
        return BlockContent(html, {f"{name}.png": picture})

    return ReportBlock(title, content)
