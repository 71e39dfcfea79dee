"""`init --from`: read the config of another tool, write the recipe, say what is different."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.foreign import account, recipe_file
from sft_recipes.foreign.reading import Reading
from sft_recipes.foreign.translation import translate


@dataclass(frozen=True)
class ForeignRequest:
    """What `init --from` was asked for.

    `model` and `chat_template` stand in the place of the config's; `data`: rows to look at in the place of its own.
    """

    config: Path
    output: Path
    tool: str | None = None
    model: str | None = None
    data: str | None = None
    chat_template: str | None = None
    remote_code_is_not_needed: bool = False
    force: bool = False


@dataclass(frozen=True)
class ForeignRecipe:
    """What was read, and the files that were written, the recipe first; none where something stood in the way."""

    reading: Reading
    files: Sequence[Path]

    @property
    def launch(self) -> str | None:
        """The launch config that does what the config asks for."""
        return self.reading.launch

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**account.as_json(self.reading), "files": [str(file) for file in self.files]}

    def print_text(self) -> None:
        """For people."""
        for line in account.lines(self.reading):
            print(line)
        for number, file in enumerate(self.files):
            print(f"\nwrote {file}" if number == 0 else f"wrote {file}")


def write_foreign(request: ForeignRequest) -> ForeignRecipe:
    """Translate a config and write the recipe. Raises InputError for a file that is no config of a known tool."""
    asked = {"model_name_or_path": request.model, "chat_template": request.chat_template}
    instead = {key: value for key, value in asked.items() if value is not None}
    reading = translate(request.config, request.tool, request.remote_code_is_not_needed, instead)
    files: Sequence[Path] = ()
    if not reading.blocked:
        files = recipe_file.write(reading, request.output, request.force)
    return ForeignRecipe(reading, files)
