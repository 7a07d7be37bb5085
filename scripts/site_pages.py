"""Pages of the documentation site that lie outside of `docs/`, or are notebooks; MkDocs calls it.

Changelog, model cards and the notes on bundled data are pages of the site, and links to them lead
there. Links to other files of the repository lose their target, since the site has none. A notebook
becomes a page with its stored outputs: `scripts/run_notebooks.py` executes it.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "assets/README.md": "results/bundled_data.md",
    "assets/shapes.png": "images/shapes.png",
    "assets/weights/qm9_energy/card.md": "results/qm9_energy.md",
    "assets/weights/qm9_mse/card.md": "results/qm9_mse.md",
    "assets/weights/ccd_energy/card.md": "results/ccd_energy.md",
    "assets/weights/ccd_mse/card.md": "results/ccd_mse.md",
}
"""Files of the repository, and where they are in the site."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
INTERVAL = re.compile(r"(?<=\d )(\[[-+.\de]+, [-+.\de]+\])(?=[^<]*</td>)")
_outputs: dict[str, str] = {}
"""HTML of outputs of notebooks, by the text that stands for it in Markdown."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_bytes()))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        uri = notebook.src_uri.removesuffix(".ipynb") + ".md"
        assert notebook.abs_src_path is not None
        content = json.loads(Path(notebook.abs_src_path).read_text(encoding="utf-8"))
        files.append(File.generated(config, uri, content=page_of(content, uri)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site."""
    uri = page.file.src_uri
    source = next((source for source, here in PAGES.items() if here == uri), f"docs/{uri}")

    def relinked(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        found = PAGES.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if found is None:
            return text
        found = re.sub(r"\.ipynb$", ".md", found) if found != download(uri) else found
        relative = posixpath.relpath(found, posixpath.dirname(uri) or ".")
        return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(relinked, part) for part in parts)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the outputs of a notebook where they belong, and keep intervals in one line."""
    content = INTERVAL.sub(r'<span class="interval">\1</span>', content)
    return re.sub(r"<p>(notebook-output-[\w-]+)</p>", lambda match: _outputs[match[1]], content)


def download(uri: str) -> str:
    """The notebook of a page."""
    return uri.removesuffix(".md") + ".ipynb"


def page_of(notebook: dict[str, Any], uri: str) -> str:
    """A notebook as Markdown."""
    name = posixpath.basename(download(uri))
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if number == 0:
                parts.append(f"[Download this page as a notebook]({name}){{.notebook}}")
            continue
        parts.append(f"```python\n{source}\n```")
        for k, output in enumerate(cell["outputs"]):
            key = f"notebook-output-{uri.removesuffix('.md').replace('/', '-')}-{number}-{k}"
            _outputs[key] = f'<div class="notebook-output">{html_of(output)}</div>'
            parts.append(key)
    return "\n\n".join(parts) + "\n"


def html_of(output: dict[str, Any]) -> str:
    """The richest form of an output."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/html" in data:
        return "".join(data["text/html"])
    if "image/svg+xml" in data:
        return "".join(data["image/svg+xml"])
    if "image/png" in data:
        encoded = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="Picture made by the code above" src="data:image/png;base64,{encoded}">'
    return f"<pre>{html.escape(''.join(data['text/plain']))}</pre>"
