"""An extension of mkdocstrings: the section *Returns* of a docstring is prose here.

The parser of NumPy's style expects a type in its first line. It gets a name for the value, and the
type from the annotation.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_RETURNS = re.compile(
    r"^Returns\n-+\n(?P<prose>.+?)(?=\n\n[A-Z]\w+\n-{3,}|\Z)", re.DOTALL | re.MULTILINE
)


class ProseReturns(griffe.Extension):
    """Indent what is returned below a name."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _RETURNS.sub(_named, obj.docstring.value)


def _named(match: re.Match[str]) -> str:
    prose = "\n".join(f"    {line}".rstrip() for line in match["prose"].split("\n"))
    return f"Returns\n-------\nresult :\n{prose}"
