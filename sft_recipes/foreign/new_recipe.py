"""`init --from`: read the config of another tool, write the recipe, say what is different."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipes.errors import SFTRecipesError
from sft_recipes.foreign import account, recipe_file
from sft_recipes.foreign.reading import Reading
from sft_recipes.foreign.translation import translate

if TYPE_CHECKING:
    from sft_recipes.foreign.first_rows import FirstRows


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
    """What was read, and the files that were written, the recipe first; none where something stood in the way.

    `rows`: what its tool would train of its first rows; None where they are not at hand, and where they could not be
    looked at, for which `rows_fault` says why.
    """

    reading: Reading
    files: Sequence[Path]
    rows: "FirstRows | None" = None
    rows_fault: str = ""

    @property
    def launch(self) -> str | None:
        """The launch config that does what the config asks for."""
        return self.reading.launch

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **account.as_json(self.reading),
            "files": [str(file) for file in self.files],
            "rows": None if self.rows is None else self.rows.as_json(),
            "rows_fault": self.rows_fault,
        }

    def print_text(self) -> None:
        """For people."""
        for line in account.lines(self.reading):
            print(line)
        if self.rows is not None:
            self.rows.print_text()
        if self.rows_fault:
            print(f"\nthe first rows cannot be trained yet: {self.rows_fault}")
        for number, file in enumerate(self.files):
            print(f"\nwrote {file}" if number == 0 else f"wrote {file}")


def write_foreign(request: ForeignRequest) -> ForeignRecipe:
    """Translate a config and write the recipe. Raises InputError for a file that is no config of a known tool."""
    asked = {"model_name_or_path": request.model, "chat_template": request.chat_template}
    instead = {key: value for key, value in asked.items() if value is not None}
    reading = translate(
        request.config, request.tool, request.remote_code_is_not_needed, instead, request.data
    )
    if reading.blocked:
        return ForeignRecipe(reading, ())
    files = recipe_file.write(reading, request.output, request.force)
    # Imports torch and transformers, which nothing above needs.
    from sft_recipes.foreign import first_rows

    try:
        rows = first_rows.look(reading, files[0], request.data)
    except SFTRecipesError as error:
        return ForeignRecipe(reading, files, rows_fault=str(error))
    return ForeignRecipe(reading, files, rows)
