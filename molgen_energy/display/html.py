"""Templates of HTML, and values that a script of a page may hold."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    import jinja2


def display_templates() -> jinja2.PackageLoader:
    """The templates of this package; other environments may include them, such as `viewer.js`."""
    import jinja2

    return jinja2.PackageLoader("molgen_energy.display", "templates")


@cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=display_templates(), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def render(template: str, **values: Any) -> str:
    """Fill in a template of the folder `templates`; text is escaped."""
    return _environment().get_template(template).render(**values)


def script_value(value: Any) -> Markup:
    """A value as JSON that cannot end the script that it stands in, nor begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def page(title: str, body: str) -> str:
    """A whole page that opens offline, light or dark as the browser is set.

    Parameters
    ----------
    title
        Its title, as text.
    body
        Its content, as HTML.
    """
    return render("page.html.j2", title=title, body=Markup(body))
