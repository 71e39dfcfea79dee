"""`init --model M --data D`: a commented recipe for your own model and data, from a look at the first rows."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.inspection import InspectedRow
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.errors import InputError, Problem
from sft_recipes.models import load_tokenizer
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, TemplateSettings, relative_path
from sft_recipes.training.announce import TEXTS

LOOKED_AT = 2000
NEW_TOKENS = (32, 64, 128, 256)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
# What templates of hybrid models call the switch between answering at once and reasoning first (Qwen3 and SmolLM3;
# DeepSeek-V3.1).
REASONING_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class NewRecipe:
    """The file written, its first rows as the trainer would see them, and the renderer that made them."""

    path: Path
    rows: list[InspectedRow]
    renderer: ChatRenderer


def write_recipe(model: str, data: str, format: str | None, output: Path, force: bool) -> NewRecipe:
    """Write `output/recipe.yaml` for a model and a data set. `max_length` is the smallest that 99 % of rows fit.

    Looks at the first 2,000 rows only; `sft-recipes check` reads them all. Raises InputError, with nothing written,
    for data or a model that cannot be read and for a file that exists.
    """
    path = output / "recipe.yaml"
    if path.is_symlink() or (path.exists() and not force):
        raise InputError(Problem(str(path), "", "exists already", "choose another --output, or add --force"))
    tokenizer = load_tokenizer(model)
    own_template = bool(tokenizer.chat_template)
    renderer = attach_chat_template(tokenizer, TemplateSettings())
    source = DatasetSource(path=data, format=format)
    settings = DataSettings(datasets=(source,))
    rejects = RejectLog(settings)
    examples = list(islice(iter_examples(source, settings, rejects=rejects), LOOKED_AT))
    labeller = Labeller(renderer, LabelSettings(max_length=None))
    labelled = labeller.label(examples)
    lengths = sorted(len(row.ids) for row in labelled.rows)
    if not lengths:
        raise InputError(Problem(data, "", f"no row can be trained: {labelled.dropped[0].detail}", "look at the rows"))
    max_length = _smallest(lengths, 0.99, LENGTHS)
    rendered = [labeller.for_template(example) for example in examples]
    answers = sorted(row.trained_tokens for row in labelled.rows)
    values: dict[str, Any] = {
        "name": output.name,
        "rows": "the" if len(examples) == LOOKED_AT else f"{len(examples):,}",
        "data_name": Path(data).name,
        "format": format or rejects.formats[data],
        "model": _yaml_path(model, output),
        "own_template": own_template,
        "data": _yaml_path(data, output),
        "looked_at": f"{len(lengths):,}",
        "fitting": f"{sum(length <= max_length for length in lengths):,}",
        "max_length": max_length,
        "max_new_tokens": _smallest(answers, 0.95, NEW_TOKENS),
        "switch": next((name for name in REASONING_SWITCHES if name in renderer.template_text), None),
        "reasoned": sum(any(turn.get("reasoning_content") for turn in one.messages) for one in rendered),
        "tools": sum(bool(example.tools) for example in examples),
    }
    text = TEXTS.get_template("new_recipe.yaml.jinja").render(values)
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return NewRecipe(path, [(examples[row.example], row) for row in labelled.rows[:3]], renderer)


def _smallest(lengths: list[int], share: float, choices: tuple[int, ...]) -> int:
    """The smallest choice that this share of the sorted lengths fits, or the largest choice."""
    needed = lengths[min(len(lengths) - 1, int(share * len(lengths)))]
    return next((choice for choice in choices if choice >= needed), choices[-1])


def _yaml_path(name: str, folder: Path) -> str:
    """A path that exists here, relative to the recipe's folder; a Hub name as it is."""
    return relative_path(Path(name), folder) if Path(name).exists() else name
