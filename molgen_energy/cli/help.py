"""The text of `--help`: options in panels, in two columns that fit a terminal of 80 characters.

Typer's own text has a column of types, which takes half of such a line.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from molgen_energy.cli.console import wrapped

_WIDEST = 100  # characters in a line; longer ones are hard to read
_NAMES = 28  # characters of the first column; a longer name has its own line
_MARGINS = 6  # characters of a line for borders and spaces
_NARROW, _INDENT = 70, 6  # below this width, each name has its own line
_OTHER = "Other options"


class HelpfulCommand(TyperCommand):
    """A command with this module's help. Its `epilog` are examples, one a line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, in colours on a terminal."""
        arguments = [p.metavar for p in self.params if p.param_type_name == "argument"]
        usage = " ".join([ctx.command_path, "[OPTIONS]", *filter(None, arguments)])
        formatter.write(_rendered(_page(self, ctx, usage)))


class HelpfulGroup(TyperGroup):
    """A group of commands with this module's help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, in colours on a terminal."""
        names = self.list_commands(ctx)
        commands = [command for name in names if (command := self.get_command(ctx, name))]
        rows = [
            (Text(command.name or "", "bold cyan"), _first_sentence(command))
            for command in commands
        ]
        usage = f"{ctx.command_path} {self.subcommand_metavar}"
        width = max(name.cell_len for name, _ in rows)
        formatter.write(_rendered(_page(self, ctx, usage, _panel("Commands", rows, width))))


def _rendered(page: Group) -> str:
    """The text for standard output, with the codes of colours where it is a terminal."""
    console = Console(highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(page, width=_width())
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _width() -> int:
    """Characters in a line."""
    return min(Console().width, _WIDEST)


def _page(command: Any, ctx: Any, usage: str, *panels: Panel) -> Group:
    text = inspect.cleandoc(command.help or "")
    # Rich keeps the line breaks of a source file.
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    head = [Text.assemble(("Usage: ", "yellow"), (usage, "bold")), *map(_marked, paragraphs)]
    parts = [Padding(part, (0, 1, 1, 1)) for part in head]
    return Group(*parts, *panels, *_option_panels(command, ctx), *_examples(command))


def _examples(command: Any) -> Iterator[Panel]:
    lines = (command.epilog or "").strip().splitlines()
    if lines:
        yield _bordered("Examples", Group(*(Text(line, overflow="fold") for line in lines)))


def _option_panels(command: Any, ctx: Any) -> Iterator[Panel]:
    """Arguments, then options in the panels that they name, then those without one."""
    panels: dict[str, list[tuple[Text, str]]] = {"Arguments": []}
    others: list[tuple[Text, str]] = []
    for parameter in command.get_params(ctx):
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            name = Text(parameter.metavar or parameter.name, "bold yellow")
            panels["Arguments"].append((name, _description(parameter)))
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        row = (_names(parameter), _description(parameter))
        (others if panel is None else panels.setdefault(panel, [])).append(row)
    for title, rows in (*panels.items(), (_OTHER if len(panels) > 1 else "Options", others)):
        if rows:
            yield _panel(title, rows)


def _names(option: Any) -> Text:
    short = [name for name in option.opts if not name.startswith("--")]
    long = [name for name in option.opts if name.startswith("--")]
    opposites = "".join(f" / {name}" for name in option.secondary_opts)
    names = ", ".join(short + long) if short else f"    {long[0]}"
    text = Text(names + opposites, "bold cyan")
    if option.metavar and not option.is_flag:
        text.append(f" {option.metavar}", "yellow")
    return text


def _description(parameter: Any) -> str:
    text = parameter.help or ""
    default = parameter.default
    # Where there is no value, the text says what happens.
    if getattr(parameter, "show_default", False) and default not in (None, False, [], ()):
        text += f" [default: {default}]"
    return text


def _first_sentence(command: Any) -> str:
    text = command.short_help or inspect.cleandoc(command.help or "").split("\n\n")[0]
    return " ".join(text.split())


def _marked(text: str) -> Text:
    """A text with its options in colour and its code in bold."""
    marked = Text(text)
    marked.highlight_regex(r"(?<![\w-])--?[a-zA-Z][\w-]*", "cyan")
    marked.highlight_regex(r"`[^`]+`", "bold")
    marked.highlight_regex(r"\[default: [^\]]*\]", "dim")
    return marked


def _panel(title: str, rows: list[tuple[Text, str]], names: int = 0) -> Panel:
    """Names at the left, descriptions at the right or, of a long name, in the next line.

    `names` is the width of the first column, 0 that of options.
    """
    names = names or (_NAMES if _width() >= _NARROW else _INDENT)
    items: list[Table | Text] = []
    for name, description in rows:
        if name.cell_len > names:
            items.append(name)
            name = Text()
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(width=names)
        row.add_row(name, _marked(wrapped(description, _width() - _MARGINS - names)))
        items.append(row)
    return _bordered(title, Group(*items))


def _bordered(title: str, content: Group) -> Panel:
    return Panel(content, title=f"[not dim bold]{title}[/]", title_align="left", border_style="dim")
