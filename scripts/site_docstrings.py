"""An extension of mkdocstrings: two habits of our docstrings that NumPy's style does not have.

The section *Returns* is prose, where the parser expects a type in the first line: it gets a name
for the value, and the type from the annotation. Examples stand where they explain.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_RETURNS = re.compile(
    r"^Returns\n-+\n(?P<prose>.+?)(?=\n\n[A-Z]\w+\n-{3,}|\Z)", re.DOTALL | re.MULTILINE
)
_EXAMPLE = re.compile(r"^>>> .+(?:\n.+)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = _RETURNS.sub(_named, text)


def _named(match: re.Match[str]) -> str:
    prose = "\n".join(f"    {line}".rstrip() for line in match["prose"].split("\n"))
    return f"Returns\n-------\nresult :\n{prose}"
