"""The first rows of a translated config, as they are trained here and as its own tool would train them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.opening import load_tokenizer, open_renderer
from sft_recipes.foreign.label_rules.comparison import LabelComparison, compare_labels
from sft_recipes.foreign.label_rules.display import difference_json, show_difference
from sft_recipes.foreign.label_rules.rows import their_rows
from sft_recipes.foreign.label_rules.tools import label_rules
from sft_recipes.foreign.reading import Reading
from sft_recipes.messages import Example
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.upstream.quiet import quiet_libraries

LOOKED_AT = 200


@dataclass(frozen=True)
class FirstRows:
    """What came of the comparison, of `rows` examples of a source."""

    source: str
    rows: int
    tool: str
    renderer: ChatRenderer
    comparison: LabelComparison

    def as_json(self) -> dict[str, Any]:
        """The counts, and the first row of each kind of difference both ways."""
        return {
            "source": self.source,
            "rows": self.rows,
            "same": self.comparison.same,
            "different": len(self.comparison.differences),
            "not_computed": self.comparison.not_computed,
            "shown": [
                difference_json(self.renderer, difference, self.tool)
                for difference in self.comparison.differences[:1]
            ],
        }

    def print_text(self) -> None:
        """The counts in a sentence, and one row both ways."""
        comparison = self.comparison
        differing = len(comparison.differences)
        print(
            f"\nfirst {self.rows} rows of {self.source}: {comparison.same} trained as in {self.tool}, "
            f"{differing} otherwise, {self.rows - comparison.same - differing} not compared"
        )
        for reason in comparison.not_computed:
            print(f"  not compared: {reason}")
        if comparison.differences:
            show_difference(self.renderer, comparison.differences[0], self.tool, Console())


def look(reading: Reading, recipe: Path, data: str | None) -> FirstRows | None:
    """Compare the first rows of the recipe's first data set, or of `data` in its place.

    None where the rows or the model's tokenizer are not at hand. Raises InputError for rows that cannot be read,
    CheckFailed for a template that would train the wrong thing.
    """
    loaded = load_recipe(recipe)
    source = loaded.data.datasets[0]
    if data is not None:
        source = replace(source, path=data, data_files=None, name=None)
    if not (Path(source.path).exists() and Path(loaded.model_name).is_dir()):
        return None
    quiet_libraries()
    renderer = open_renderer(loaded.model_name, loaded.template)
    rejects = RejectLog(loaded.data)
    examples = list(islice(iter_examples(source, loaded.data, rejects), LOOKED_AT))
    rules = label_rules(
        reading.table.name, _config(reading, rejects.formats[source.path], examples)
    )
    theirs = their_rows(examples, load_tokenizer(loaded.model_name), rules)
    ours = Labeller(renderer, loaded.labels).label(examples)
    comparison = compare_labels(examples, ours, theirs, renderer, rules)
    return FirstRows(source.path, len(examples), reading.table.tool, renderer, comparison)


def _config(reading: Reading, format: str, examples: Sequence[Example]) -> Mapping[str, Any]:
    """The config with what the tools read elsewhere: in `dataset_info.json`, and from the columns."""
    turns = any(len(example.messages) > 2 for example in examples)
    return {"format": format, "turns": turns, **reading.beside_config, **reading.tree}
