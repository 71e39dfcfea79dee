"""`init --model M --data D`: a commented recipe for your own model and data, from a look at its rows.

Every setting that the data asks for is written with the reason, so that what follows runs without an edit: which
columns are which, how long rows may be, what share of them is lost, and what is to be done with rows that are broken.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.inspection import InspectedRow
from sft_recipes.data.labels import LONGEST_MEASURED, LabelledRow, Labeller
from sft_recipes.data.ledger import SourceLedger
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.data.opening import loading, open_renderer
from sft_recipes.data.prepared_batch import batches
from sft_recipes.data.template_trial import RowBlame
from sft_recipes.data.workers import Workers
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example
from sft_recipes.recipe import DataSettings, LabelSettings, relative_path
from sft_recipes.recipe_keys import NAMES_INSIDE, SOURCE_KEYS, make_data_recipe
from sft_recipes.training.announce import TEXTS
from sft_recipes.training.construction import base_config
from sft_recipes.training.rates import SMALL_MODEL, first_rates

# More rows than this are not looked at; `sft-recipes check` reads them all.
LOOKED_AT = 20_000
NEW_TOKENS = (32, 64, 128, 256)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SHOWN_ROWS = 3
HELD_OUT = 0.05
# With 50 rows a share of a half is known to 14 points either way; below 30 `evaluate` says that they are few.
ENOUGH_TO_JUDGE = 50
# Rows up to here leave room for everything that the backward pass of a small model needs: four of
# them take about 3 GB on SmolLM2-135M.
SHORT_ROWS = 512
# What a recipe loses without being asked (`max_lost`, `max_rejected`).
DEFAULT_LOSS = 0.05
# What templates of hybrid models call the switch between answering at once and reasoning first (Qwen3 and SmolLM3;
# DeepSeek-V3.1).
REASONING_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class RecipeRequest:
    """What `init` was asked for. `options`: recipe keys of the data set and the template.

    `replay`: general rows that are mixed in, as `sft-recipes replay` writes them. `full`: train all
    weights; None if that was not said.
    """

    model: str
    data: str
    options: Mapping[str, Any]
    output: Path
    force: bool = False
    replay: str | None = None
    full: bool | None = None


@dataclass(frozen=True)
class NewRecipe:
    """The file written, its first rows as the trainer would see them, the renderer that made them, and what a user has
    to know about the data, a line each.
    """

    path: Path
    rows: Sequence[InspectedRow]
    renderer: ChatRenderer
    notes: Sequence[str]


@dataclass
class _Look:
    """What was seen of the data: counts over the examples, lengths of the rows they make."""

    ledger: SourceLedger
    examples: list[Example] = field(default_factory=list)
    rows: list[LabelledRow] = field(default_factory=list)
    first_rows: list[InspectedRow] = field(default_factory=list)
    answers_ending_in_text: int = 0
    reasoned: int = 0
    with_tools: int = 0

    def add(self, labeller: Labeller, examples: Sequence[Example], labelled: Any) -> None:
        """Account for a batch."""
        self.ledger.add(examples, labelled)
        self.rows += labelled.rows
        for row in labelled.rows[: SHOWN_ROWS - len(self.first_rows)]:
            self.first_rows.append(InspectedRow(examples[row.example], row))
        for original in examples:
            example = labeller.for_template(original)
            self.examples.append(example)
            self.with_tools += bool(example.tools)
            self.reasoned += any(message.get("reasoning_content") for message in example.messages)
            last = example.text if example.text is not None else example.messages[-1].get("content")
            self.answers_ending_in_text += labeller.end_texts.at_end_of(last or "") is not None

    def lost_share(self, max_length: int) -> float:
        """What a recipe loses with this `max_length`: the larger share, of trained tokens or of rows (`ledger.py`)."""
        kept = sum(row.trained_tokens for row in self.rows if len(row.ids) <= max_length)
        total = self.ledger.trained_tokens_kept + self.ledger.trained_tokens_lost
        dropped = self.ledger.rows_dropped / max(
            self.ledger.rows_kept + self.ledger.rows_dropped, 1
        )
        return max(1 - kept / total, dropped)

    def lengths(self) -> list[int]:
        """Of the rows in tokens, sorted."""
        return sorted(len(row.ids) for row in self.rows)

    def fitting_length(self) -> int:
        """The smallest length that 99 % of the rows fit."""
        return _smallest(self.lengths(), 0.99, LENGTHS)

    def rejected_share(self, rejects: RejectLog) -> float:
        """The share of rows that are no examples."""
        rejected = rejects.rejected[self.ledger.source].total()
        return rejected / (rejected + len(self.examples))


def write_recipe(request: RecipeRequest, progress: bool = True) -> NewRecipe:
    """Write `output/recipe.yaml` for a model and a data set. `max_length` is the smallest that 99 % of rows fit.

    Broken rows do not stop it: the recipe skips them and says how many there are. Raises InputError, with nothing
    written, for data or a model that cannot be read, data without a row that can be trained, and a file that exists.
    """
    path = request.output / "recipe.yaml"
    if path.is_symlink() or (path.exists() and not request.force):
        raise InputError(
            Problem(str(path), "", "exists already", "choose another --output, or add --force")
        )
    skipping = {"on_bad_rows": "skip", "max_rejected": 1.0}
    settings = make_data_recipe(request.data, {**request.options, **skipping})
    renderer = open_renderer(request.model, settings.template)
    labeller = Labeller(renderer, LabelSettings(max_length=None), longest_text=LONGEST_MEASURED)
    rejects = RejectLog(settings.data)
    looks = [_look(labeller, settings.data, rejects, progress)]
    if request.replay is not None:
        replay = make_data_recipe(request.replay, skipping)
        looks.append(_look(labeller, replay.data, rejects, progress))
    values = _values(request, renderer, looks, rejects)
    text = TEXTS.get_template("new_recipe.yaml.jinja").render(values)
    request.output.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return NewRecipe(path, looks[0].first_rows, renderer, [*rejects.lines(), *_notes(values)])


def _look(labeller: Labeller, data: DataSettings, rejects: RejectLog, progress: bool) -> _Look:
    """Label the rows that are looked at. Raises InputError where none can be trained."""
    source = data.datasets[0]
    look = _Look(SourceLedger(source.path, source.split))
    examples = islice(iter_examples(source, data, rejects=rejects), LOOKED_AT)
    with tqdm(
        examples,
        f"reading {Path(source.path).name}",
        unit=" rows",
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for batch, labelled in Workers(labeller.label, blame=RowBlame(labeller)).map(batches(bar)):
            look.add(labeller, batch, labelled)
    if not look.rows:
        reasons = "; ".join(
            f"{reason}: {places[0]}" for reason, places in look.ledger.places.items()
        )
        fix = f"look at its rows: sft-recipes audit {source.path}"
        raise InputError(Problem(source.path, "", f"no row can be trained ({reasons})", fix))
    return look


def _values(
    request: RecipeRequest, renderer: ChatRenderer, looks: Sequence[_Look], rejects: RejectLog
) -> dict[str, Any]:
    """What the recipe's text is made of; the first of the looks is that at the task's own data."""
    source = request.data
    look = looks[0]
    lengths = sorted(chain.from_iterable(own.lengths() for own in looks))
    # As many as fit of each set: the limits below are those of every single one.
    max_length = max(own.fitting_length() for own in looks)
    lost = max(own.lost_share(max_length) for own in looks)
    rejected_share = max(own.rejected_share(rejects) for own in looks)
    reasons = sum(rejects.rejected.values(), Counter())
    read = len(look.examples)
    answers = sorted(row.trained_tokens for row in look.rows)
    switch = [name for name in REASONING_SWITCHES if name in renderer.template_text]
    reasoned = sum(own.reasoned for own in looks)
    ending_in_text = sum(own.answers_ending_in_text for own in looks)
    return {
        "name": request.output.name,
        "rows": f"{read:,}" if read < LOOKED_AT else "the",
        "data_name": Path(source).name,
        **_source_values(source, request.options, request, rejects),
        "options": {
            key: value for key, value in request.options.items() if not _says_how_to_read(key)
        },
        "replay": _replay_values(request, looks[-1], rejects),
        "unused_columns": rejects.unused_columns[source],
        "model": _yaml_path(request.model, request.output),
        "own_template": renderer.has_own_template,
        **_method_values(request),
        "looked_at": f"{len(lengths):,}",
        "fitting": f"{sum(length <= max_length for length in lengths):,}",
        "unmeasured": sum(own.ledger.dropped["overlength"] for own in looks),
        "longest": lengths[-1],
        "max_length": max_length,
        "short_rows": max_length <= SHORT_ROWS,
        "max_new_tokens": _smallest(answers, 0.95, NEW_TOKENS),
        "lost": lost,
        "max_lost": _with_room(lost) if lost > DEFAULT_LOSS else None,
        "rejected": reasons.total(),
        "reasons": reasons.most_common(3),
        "max_rejected": _with_room(rejected_share) if rejected_share > DEFAULT_LOSS else None,
        "ending_in_text": ending_in_text,
        "strip_end": look.answers_ending_in_text > read / 2,
        "eval_split": _held_out(read),
        "switch": switch[0] if switch else None,
        "reasoned": reasoned,
        "tools": sum(own.with_tools for own in looks),
    }


def _held_out(rows: int) -> float | int:
    """How many rows are held out: 5 %, or of a small file enough to judge by, but no more than a fifth."""
    few = min(ENOUGH_TO_JUDGE, rows // 5)
    if few > HELD_OUT * rows:
        return few
    return HELD_OUT


def _method_values(request: RecipeRequest) -> dict[str, Any]:
    """What the recipe says of LoRA or full fine-tuning, by the size of the model."""
    parameters = parameter_count(request.model)
    rates = first_rates(parameters)
    return {
        "full": bool(request.full),
        "method_is_open": request.full is None,
        "learning_rate": rates.of(lora=not request.full),
        "other_rate": rates.of(lora=bool(request.full)),
        "parameters": parameters,
        "is_small": is_small(parameters),
    }


def _replay_values(
    request: RecipeRequest, look: _Look, rejects: RejectLog
) -> dict[str, Any] | None:
    """What the recipe says of the rows that are mixed in."""
    if request.replay is None:
        return None
    return {**_source_values(request.replay, {}, request, rejects), "rows": len(look.examples)}


def _source_values(
    source: str, options: Mapping[str, Any], request: RecipeRequest, rejects: RejectLog
) -> dict[str, Any]:
    """What the recipe says of one data set: its path, and the keys that say how it is read."""
    own = {}
    for key, value in options.items():
        if _says_how_to_read(key):
            # Inside `datasets` some keys have other names.
            own[NAMES_INSIDE.get(key, key) if request.replay else key] = value
    mapping = own.pop("column_mapping", None) or rejects.recognised.get(source)
    return {
        "data": _yaml_path(source, request.output),
        "format": own.pop("format", None) or rejects.formats[source],
        "column_mapping": mapping or {},
        "reading": own,
    }


def _says_how_to_read(key: str) -> bool:
    """Whether a key belongs to one data set."""
    return key in SOURCE_KEYS or key in NAMES_INSIDE


def _with_room(share: float) -> float:
    """A limit that this share stays below although the rows of a split differ from the rest."""
    return min(1.0, math.ceil(share * 110) / 100)


def _notes(values: Mapping[str, Any]) -> list[str]:
    """What a user has to know before training, in words."""
    notes: list[str] = []
    if not values["own_template"] and "chat_template" not in values["options"]:
        notes.append(
            "the tokenizer has no chat template: rows are written in the instruction template "
            "(another: --chat_template NAME)"
        )
    if values["is_small"] and values["method_is_open"]:
        notes.append(reasons_for_full(values["parameters"]))
    if values["rejected"]:
        notes.append(
            f"{values['rejected']} rows are broken: on_bad_rows: skip leaves them out and lists them"
        )
    if values["max_lost"]:
        notes.append(
            f"{values['lost']:.0%} of what could be trained is lost: max_lost: {values['max_lost']}"
        )
    if values["strip_end"]:
        notes.append(
            "answers end in the text of an end token: control_tokens: strip_end takes it off"
        )
    return notes


def _smallest(lengths: Sequence[int], share: float, choices: Sequence[int]) -> int:
    """The smallest choice that this share of the sorted lengths fits, or the largest choice."""
    needed = lengths[min(len(lengths) - 1, int(share * len(lengths)))]
    for choice in choices:
        if choice >= needed:
            return choice
    return choices[-1]


def parameter_count(model: str) -> int | None:
    """Of a model's config, without its weights; None for a folder that has no config."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return None
    config = base_config(model)
    with loading(model, "model"), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in empty.parameters())


def is_small(parameters: int | None) -> bool:
    """Whether training all weights is worth a proposal."""
    return parameters is not None and parameters < SMALL_MODEL


def reasons_for_full(parameters: int | None) -> str:
    """Why all weights of a small model may be trained as well, and at which rate."""
    rates = first_rates(parameters)
    # SmolLM2-135M, 60 steps, 160 validation rows: exact match 0.61 in full, 0.63 with LoRA.
    return (
        f"the model has {parameters or 0:,} parameters, few enough to train all of them, too (--full): "
        "as good as LoRA on SmolLM2-135M and no adapter to merge, but more memory and more "
        f"forgetting; learning_rate {rates.full:g} in full, {rates.lora:g} with LoRA"
    )


def _yaml_path(name: str, folder: Path) -> str:
    """A path that exists here, relative to the recipe's folder unless it was given in full.

    A Hub name stays as it is.
    """
    if Path(name).is_absolute():
        return name
    return relative_path(Path(name), folder) if Path(name).exists() else name
