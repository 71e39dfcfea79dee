"""The model card: `README.md` of a run folder, rendered from what the run wrote about itself.

Whatever the run did not write says "not recorded". What the card says is gathered here, its layout
is `model_card.md.jinja`; the metadata, with every metric as `model-index`, follows
https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sft_recipes import run_folder
from sft_recipes.model_folder import ADAPTER_CONFIG
from sft_recipes.recipe import LabelSettings, Recipe
from sft_recipes.release.card import Card, Line, Score, ScoredEvaluation, metadata, usage
from sft_recipes.release.card_samples import EVALUATE_AGAIN, read_samples
from sft_recipes.release.finished_run import (
    EXPORT,
    evaluations,
    finished_run,
)
from sft_recipes.release.local_paths import is_hub_name, public, recipe_text
from sft_recipes.release.markdown import CARDS, inline, three_digits
from sft_recipes.release.older_transformers import CHECK
from sft_recipes.release.stages import card_stages
from sft_recipes.report.benchmark_report import fewer_rows, longest_answer, settings_in_words
from sft_recipes.report.number_texts import format_estimate, sentence, spaced, thousands
from sft_recipes.text_files import RESTORE, interpreting, read_json, read_json_lines, read_text

CARD = "README.md"
MARK = (
    "<!-- Rendered by sft-recipes from the run folder. Delete this line to keep your own edits. -->"
)
# TRL and peft write cards at every checkpoint. A card without any of these was written by people
# and is kept.
_REPLACED = (
    MARK,
    "generated_from_trainer",
    "has been trained using [TRL]",
    "# Model Card for Model ID",
)
_UNKNOWN = "(version not recorded)"

# Keys of the recipe that the card shows as set, and names where they are not.
_LORA_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_dora",
    "use_rslora",
)
# What peft calls them where not alike.
_IN_ADAPTERS = {"lora_r": "r", "lora_target_modules": "target_modules"}
_TRAINING_KEYS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "packing",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "dtype",
    "bf16",
)
# Choices of the recipe in the card's words.
_LOSS_COVERS = {
    "assistant": "the assistant's turns with their end tokens, nothing else",
    "last_assistant": "the last assistant turn with its end token, nothing else",
    "all": "every token",
}
_EARLIER_TURNS = {"expand": "a row of their own each", "mask": "not trained"}
_EMPTY_REASONING = {"mask": "not trained", "train": "trained"}
_LONGER_ROWS = {
    "drop": "dropped",
    "truncate": "whole trailing turns removed, else dropped",
    "error": "refused",
}


def write_card(run: Path, folder: Path | None = None, repo: str | None = None) -> Path:
    """Write the card of a run to its README.md, or to that of the folder it was exported to.

    A card that people wrote into the run folder is kept, and copied to `folder`. `repo` is its name
    on the Hub.
    """
    text = MARK
    own_card = run / CARD
    if own_card.is_file():
        text = read_text(own_card, "save it as UTF-8, or delete it")
    if any(written_by_library in text for written_by_library in _REPLACED):
        text = render_card(run, folder, repo)
    path = (folder or run) / CARD
    path.write_text(text, encoding="utf-8")
    return path


def render_card(run: Path, exported: Path | None = None, repo: str | None = None) -> str:
    """The card as Markdown, of what stands in the run folder or of the model `exported` from it."""
    card = read_card(run, exported, repo)
    return CARDS.get_template("model_card.md.jinja").render(
        card=card, metadata=Markup(metadata(card)), usage=usage(card), mark=Markup(MARK)
    )


def read_card(run: Path, exported: Path | None = None, repo: str | None = None) -> Card:
    """What the card of a finished run says, from the files that the run wrote."""
    recipe = finished_run(run)
    environment = _read(run / run_folder.ENVIRONMENT)
    scored = evaluations(run)
    benchmarks = run / run_folder.EVALUATIONS / run_folder.BENCHMARKS
    has_lora = (run / ADAPTER_CONFIG).is_file()
    is_adapter = has_lora and exported is None
    is_merged = has_lora and exported is not None
    origin = "A model fine-tuned from"
    if is_adapter:
        origin = "A LoRA adapter for"
    elif is_merged:
        origin = "A model fine-tuned (LoRA, merged) from"
    export = _read(exported / EXPORT) if exported is not None else {}
    paths = [source.path for source in recipe.data.datasets]
    values = _values(recipe, run)
    return Card(
        name=repo or run.resolve().name,
        library="peft" if is_adapter else "transformers",
        base=public(recipe.model_name),
        base_on_hub=is_hub_name(public(recipe.model_name)),
        relation="adapter" if is_adapter else "finetune",
        origin=origin,
        revision=recipe.model.get("model_revision"),
        quantized_bits=_quantized_bits(recipe),
        is_adapter=is_adapter,
        is_merged=is_merged,
        datasets_on_hub=list(filter(is_hub_name, paths)),
        sft_recipes=environment.get("sft_recipes", _UNKNOWN),
        trl=environment.get("versions", {}).get("trl", _UNKNOWN),
        system_prompt=recipe.labels.system_prompt,
        template_arguments=recipe.template.chat_template_kwargs,
        data=_read(run / run_folder.DATA),
        stages=card_stages(run, repo or run.resolve().name),
        trained=_trained_lines(recipe.labels, recipe),
        hyperparameters=_hyperparameter_lines(recipe, run, values, environment),
        unset_keys=[key for key in _shown_keys(has_lora) if key not in values],
        evaluations=[*_scored_evaluations(run, scored), *_benchmarks(benchmarks)],
        has_gate=bool(recipe.values.get("gate")),
        samples=read_samples(run / run_folder.EVALUATIONS / next(iter(scored), "")),
        export=_export_lines(export),
        older_transformers=_needs_newer(export),
        versions=_version_lines(environment, run),
        recipe=recipe_text(recipe),
    )


def _quantized_bits(recipe: Recipe) -> int | None:
    """The bits of each weight of the base while it was trained on, if it was quantized."""
    for bits in (4, 8):
        if recipe.model.get(f"load_in_{bits}bit"):
            return bits
    return None


def _trained_lines(labels: LabelSettings, recipe: Recipe) -> list[Line]:
    """What the loss covers, and what becomes of rows and turns that are out of the ordinary."""
    template = recipe.template
    own = "the tokenizer's own, or the instruction template where it has none"
    return [
        Line("Loss covers", _LOSS_COVERS[labels.train_on]),
        Line("Chat template", template.chat_template or own),
        Line("Template arguments", template.chat_template_kwargs or "none"),
        Line("System prompt", labels.system_prompt or "none"),
        Line("Earlier turns that render otherwise", _EARLIER_TURNS[labels.history]),
        Line("Empty reasoning blocks", _EMPTY_REASONING[labels.empty_think]),
        Line("Longest row, tokens", labels.max_length or "no limit"),
        Line("Longer rows", _LONGER_ROWS[labels.overlength]),
    ]


def _shown_keys(has_lora: bool) -> Sequence[str]:
    """Keys of the recipe that belong to the method."""
    return (*_LORA_KEYS, *_TRAINING_KEYS) if has_lora else _TRAINING_KEYS


def _values(recipe: Recipe, run: Path) -> dict[str, Any]:
    """The keys as they were set, and what an adapter that was gone on from decided."""
    values: dict[str, Any] = {}
    if recipe.adapter_name is not None:
        config = read_json(run / ADAPTER_CONFIG, RESTORE)
        for key in _LORA_KEYS:
            values[key] = config.get(_IN_ADAPTERS.get(key, key))
    return {**values, **public(recipe.values)}


def _hyperparameter_lines(
    recipe: Recipe, run: Path, values: Mapping[str, Any], environment: Mapping[str, Any]
) -> list[Line]:
    """The method, its keys, and what the run made of them."""
    has_lora = (run / ADAPTER_CONFIG).is_file()
    method = "full fine-tuning"
    if recipe.model.get("load_in_4bit"):
        method = "QLoRA"
    elif has_lora:
        method = "LoRA"
    lines = [Line("Method", method)]
    for key in _shown_keys(has_lora):
        if key in values:
            lines.append(Line(key, values[key]))
    log = _last_logged(run / run_folder.LOG)
    return [
        *lines,
        Line("Processes", environment.get("processes")),
        Line("Optimizer steps", run_folder.read_state(run).get("step")),
        Line("Mean training loss", _rounded(log.get("train_loss"), 4)),
        Line("Training time, seconds", _rounded(log.get("train_runtime"), 0)),
    ]


def _rounded(number: Any, digits: int) -> Any:
    """A number with so many decimals; a log has names for those that are not finite."""
    return f"{number:.{digits}f}" if isinstance(number, float) else number


def _last_logged(path: Path) -> dict[str, Any]:
    """The last value of everything that a run logged."""
    last: dict[str, Any] = {}
    if path.is_file():
        for line in read_json_lines(path, "delete that line"):
            last |= line.content
    return last


def _scored_evaluations(
    run: Path, contents: Mapping[str, Mapping[str, Any]]
) -> list[ScoredEvaluation]:
    evaluations = []
    for name, content in contents.items():
        path = run / run_folder.EVALUATIONS / name / "metrics.json"
        with interpreting(path, EVALUATE_AGAIN):
            evaluations.append(_scored_evaluation(name, content))
    return evaluations


def _benchmarks(folder: Path) -> list[ScoredEvaluation]:
    """The public benchmarks that the run was measured on, by name."""
    benchmarks = []
    for path in sorted(folder.glob(run_folder.BENCHMARK_FILE)):
        content = run_folder.read_json(path, EVALUATE_AGAIN)
        with interpreting(path, EVALUATE_AGAIN):
            benchmarks.append(_benchmark(content))
    return benchmarks


def _benchmark(content: Mapping[str, Any]) -> ScoredEvaluation:
    """One benchmark as an evaluation; how it was asked belongs to its numbers."""
    scores = []
    for metric in content["metrics"]:
        scores.append(
            Score(
                metric=metric["metric"],
                label=f"{sentence(spaced(metric['metric']))}, {metric['filter']}",
                definition="As lm-eval defines and scores it.",
                n=metric["n"],
                value=metric["value"],
                ci_low=metric["ci_low"],
                ci_high=metric["ci_high"],
                estimate=format_estimate(metric),
                difference=None,
            )
        )
    asked = [f"lm-eval {content['versions']['lm_eval']}, shots: {content['shots']}"]
    for setting in settings_in_words(public(content["settings"]))[1:]:  # the model is this one
        asked.append(f"{setting.label.lower()}: {setting.value}")
    return ScoredEvaluation(
        name=content["benchmark"],
        data="public benchmark",
        answers=content["rows"],
        warnings=fewer_rows(content),
        decoding="; ".join(asked),
        max_new_tokens=longest_answer(content),
        base=None,
        scores=scores,
        gate=None,
    )


def _scored_evaluation(name: str, content: Mapping[str, Any]) -> ScoredEvaluation:
    """One evaluation, from its `metrics.json`."""
    info = content["info"]
    differences = content.get("differences") or {}
    scores = []
    for metric, estimate in content["metrics"].items():
        label = estimate.get("label", metric)
        scores.append(_score(metric, label, estimate, differences.get(metric)))
    for data_set, estimate in content.get("data_sets", {}).items():
        scores.append(_score("exact_match", f"Exact match: {data_set}", estimate))
    for data_set, estimate in content.get("data_set_losses", {}).items():
        scores.append(_score("loss", f"Loss of held-out rows: {data_set}", estimate))
    return ScoredEvaluation(
        name=name,
        data=public(info["data"]),
        answers=content.get("rows", content["n"]),
        warnings=list(content.get("warnings", ())),
        decoding=info.get("decoding", "decoding not recorded"),
        max_new_tokens=info.get("max_new_tokens", "(not recorded)"),
        base=public(info["base"]) if differences else None,
        scores=scores,
        gate=content.get("gate"),
    )


def _score(
    metric: str,
    label: str,
    estimate: Mapping[str, Any],
    difference: Mapping[str, Any] | None = None,
) -> Score:
    """A metric and its estimate, from `metrics.json`."""
    return Score(
        metric=metric,
        label=label,
        definition=estimate.get("definition"),
        n=estimate["n"],
        value=estimate["value"],
        ci_low=estimate["ci_low"],
        ci_high=estimate["ci_high"],
        estimate=format_estimate(estimate),
        difference=format_estimate(difference, "+") if difference else None,
    )


def _export_lines(export: Mapping[str, Any]) -> list[Line]:
    """What the export compared and checked."""
    if not export:
        return []
    lines = [Line("Saved as", export["dtype"])]
    for name, compared in export["compared"].items():
        difference = f"largest logit difference {compared['logit_difference']:.2g}"
        equal = f"{compared['equal_texts']} of {compared['prompts']} prompts"
        lines.append(Line(name, f"{difference}, greedy text equal on {equal}"))
    for check in export["checks"]:
        lines.append(Line(check["name"], f"{check['outcome']}: {check['detail']}"))
    return lines


def _needs_newer(export: Mapping[str, Any]) -> str | None:
    """What the export noted of an older transformers that cannot load the folder."""
    for check in export.get("checks", []):
        if check["name"] == CHECK and check["outcome"] != "ok":
            return str(check["detail"])
    return None


def _version_lines(environment: Mapping[str, Any], run: Path) -> list[Line]:
    """What the run ran on."""
    lines = [
        Line("sft-recipes", environment.get("sft_recipes")),
        Line("Python", environment.get("python")),
    ]
    for name, version in environment.get("versions", {}).items():
        lines.append(Line(name, version))
    lines.append(Line("Device", environment.get("device")))
    lines.append(Line("Finished", run_folder.read_state(run).get("time")))
    return lines


def _read(path: Path) -> dict[str, Any]:
    return run_folder.read_json(path) if path.is_file() else {}


def _left_out(source: Mapping[str, Any]) -> str:
    """How many rows of a source were not trained, and why."""
    reasons = []
    if source["rows_rejected"]:
        reasons.append(f"rejected {thousands(source['rows_rejected'])}")
    for reason, count in source["dropped"].items():
        reasons.append(f"{spaced(reason)} {thousands(count)}")
    return ", ".join(reasons) or "none"


def _unbroken(text: str) -> Markup:
    """A number with its interval on one line, however narrow its column is."""
    return Markup(str(inline(text)).replace(" ", "&nbsp;"))


CARDS.filters |= {
    "public": public,
    "number": thousands,
    "spaced": spaced,
    "left_out": _left_out,
    "unbroken": _unbroken,
    "three_digits": three_digits,
}
