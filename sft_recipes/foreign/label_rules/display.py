"""A row as it is trained here, and as another tool trains it, one above the other."""

from typing import Any

from rich.console import Console
from rich.text import Text

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.inspection import coloured, row_json
from sft_recipes.data.labelled_rows import DroppedRow
from sft_recipes.foreign.label_rules.comparison import LabelDifference
from sft_recipes.foreign.label_rules.rows import DroppedThere


def show_difference(
    renderer: ChatRenderer, difference: LabelDifference, tool: str, console: Console
) -> None:
    """Print both rows for people, trained text green, and in words what differs."""
    console.rule(difference.example.where, align="left", style="grey50")
    sides = {tool: difference.theirs, "here": difference.ours}
    for name, row in sides.items():
        console.print(f"{name}:", style="bold", markup=False)
        if isinstance(row, DroppedRow | DroppedThere):
            console.print(f"dropped: {_reason(row)}", style="red", markup=False, soft_wrap=True)
        else:
            console.print(coloured(renderer, row), soft_wrap=True)
    for sentence in difference.words:
        console.print(Text(f"- {sentence}"), soft_wrap=True)


def difference_json(
    renderer: ChatRenderer, difference: LabelDifference, tool: str
) -> dict[str, Any]:
    """The same for programs; both rows as `inspect --json` writes them."""
    sides: dict[str, Any] = {}
    for name, row in {"theirs": difference.theirs, "ours": difference.ours}.items():
        if isinstance(row, DroppedRow | DroppedThere):
            sides[name] = {"dropped": _reason(row)}
        else:
            sides[name] = row_json(renderer, difference.example, row)
    return {
        "row": difference.example.row,
        "source": difference.example.source,
        "tool": tool,
        "differs": list(difference.words),
        **sides,
    }


def _reason(row: DroppedRow | DroppedThere) -> str:
    if isinstance(row, DroppedRow):
        return f"{row.reason}, {row.detail}"
    return row.reason
