"""Copies of the shipped recipes, which work and are described from their new place."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.recipe import shipped_recipes

# Where a copied recipe's run goes, as that of one written by `init --model --data` does.
RUN = "run"
_CODE_BLOCK = re.compile(r"^```bash.*?^```$", re.M | re.S)
_DESCRIBING = (".md", ".yaml")


def copy_recipe(name: str, output: Path, force: bool = False) -> list[Path]:
    """Copy a shipped recipe and what belongs to it into `output`; returns the files written.

    Paths in its texts are seen from there. Raises InputError, with nothing written, for an unknown
    or unsafe name and for files that exist already (unless `force`) or would lie outside of
    `output`.
    """
    recipes = {recipe.name: recipe.path for recipe in shipped_recipes()}
    if name not in recipes:
        what = f"there is no shipped recipe {name!r}"
        raise InputError(Problem("command line", "RECIPE", what, suggest(name, recipes)))
    chosen = recipes[name]
    others = set(recipes.values())
    sources = [chosen]
    for path in sorted(chosen.parent.rglob("*")):
        if path.is_file() and path not in others:
            sources.append(path)
    targets = [output / source.relative_to(chosen.parent) for source in sources]
    for target in targets:
        _check_target(target, output, force)
    place = _Place(*name.split("/"))
    for source, target in zip(sources, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.parent == chosen.parent and source.suffix in _DESCRIBING:
            text = source.read_text(encoding="utf-8")
            target.write_text(place.seen_from(text), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    return targets


def _check_target(target: Path, output: Path, force: bool) -> None:
    """Raise InputError for a file that must not be written."""
    if not target.resolve().is_relative_to(output.resolve()) or target.is_symlink():
        what = "lies outside the output folder"
        raise InputError(Problem(str(target), "", what, "choose another --output"))
    if target.exists() and not force:
        fix = "choose another --output, or add --force"
        raise InputError(Problem(str(target), "", "exists already", fix))


@dataclass(frozen=True, slots=True)
class _Place:
    """The folder of a copy of `recipes/MODEL/KIND.yaml`, for texts that speak of it."""

    model: str
    kind: str

    def seen_from(self, text: str) -> str:
        """A text of the shipped folder as it has to stand in the copy."""
        own_run = f"runs/{self.model}-{self.kind}"
        text = text.replace(f"output_dir: {own_run}\n", f"output_dir: ./{RUN}\n")
        text = _CODE_BLOCK.sub(self._commands, text)
        # Of the other recipes there is only a name here, which `init` takes.
        siblings = rf"recipes/({self.model}/(?!{self.kind}\.|gate\.)[\w-]+)\.yaml"
        text = re.sub(siblings, r"\1", text)
        text = text.replace(own_run, RUN).replace(f"recipes/{self.model}/", "")
        heading, newline, rest = text.partition("\n")
        if not heading.startswith("# ") or "```bash" not in rest:
            return text
        note = (
            f"Copied by `sft-recipes init {self.model}/{self.kind}`. Commands are run in this folder;"
            "\n`make`, `scripts/` and `tests/` are those of the project's repository."
        )
        return f"{heading}{newline}\n{note}\n{rest}"

    def _commands(self, block: re.Match[str]) -> str:
        """The commands of a block for the recipe that was copied, each once."""
        any_recipe = rf"recipes/{self.model}/(?!gate\.)[\w-]+\.yaml"
        any_run = rf"runs/{self.model}-[\w-]+"
        lines: list[str] = []
        for line in block[0].splitlines():
            line = re.sub(any_recipe, f"{self.kind}.yaml", line)
            line = re.sub(any_run, RUN, line)
            if line not in lines or line.startswith("```"):
                lines.append(line)
        return "\n".join(lines)
