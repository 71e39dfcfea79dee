"""Tables for the terminal, never wider than a page: what is too long goes on in the next line."""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_recipes.messages import visible

WIDTH = 100


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns as wide as they need to be; the first `left` hold words, the others numbers."""
    table = _bare_table()
    for place, title in enumerate(header):
        if place < left:
            table.add_column(_cell(title), overflow="fold")
        else:
            table.add_column(_cell(title), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(_cell, row))
    return _drawn(table)


def side_by_side(columns: Sequence[tuple[str, str]]) -> str:
    """Texts beside one another under their titles, each as wide as the others."""
    table = _bare_table()
    table.expand = True
    for title, _ in columns:
        table.add_column(_cell(title), ratio=1, overflow="fold")
    table.add_row(*[_cell(text) for _, text in columns])
    return _drawn(table)


def paragraph(text: str) -> str:
    """A text in lines of that width."""
    return _drawn(_cell(text))


def _bare_table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")


def _cell(text: str) -> Text:
    """Text that neither the terminal nor the library reads anything into."""
    return Text(visible(text))


def _drawn(content: Table | Text) -> str:
    page = io.StringIO()
    console = Console(file=page, width=WIDTH, color_system=None, legacy_windows=False)
    console.print(content)
    lines = [line.rstrip() for line in page.getvalue().splitlines()]
    return "\n".join(lines) + "\n"
