"""An adapter before it is released: on the base that it was trained on, and not without effect.

An adapter with zeros in it loads, merges and answers like any other, as its base did; on weights
that it was not trained on it answers like neither. Both look like a bad training run.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel

from sft_recipes.data.chat_templates import PROBE, ChatRenderer
from sft_recipes.data.opening import load_tokenizer, loading
from sft_recipes.data.template_checks import TemplateCheck
from sft_recipes.errors import CheckFailed, InputError, Problem
from sft_recipes.model_folder import ADAPTER_CONFIG
from sft_recipes.models import base_of_adapter, match_embeddings
from sft_recipes.path_contents import fingerprint, read_contents
from sft_recipes.recipe import Recipe
from sft_recipes.release.comparison import Answer, Comparison, Questions, compare, load_exactly
from sft_recipes.release.finished_run import ADAPTER
from sft_recipes.run_folder import CONTENTS, RECIPE, is_run_folder
from sft_recipes.text_files import RESTORE, read_json

_BASE = "model_name_or_path"
_CHECK = "base of the adapter"
# Largest difference of a logit, as a share of the largest logit, that is rounding alone. Measured on
# SmolLM2-135M: an untouched adapter 0, one whose matrices moved by 1e-6, as a single step at that
# learning rate leaves them, 3.7e-6.
ROUNDING = 1e-6


class Base(NamedTuple):
    """What an adapter was trained on, and whether what stands there now is that."""

    name: str
    revision: str | None
    check: TemplateCheck


class Adapted(NamedTuple):
    """A base in float32 with its adapter on it, what it answers, and how its base compares."""

    model: Any
    answers: Sequence[Answer]
    base: Comparison
    check: TemplateCheck  # whether the base is the one that was trained on


def require_adapter(recipe: Recipe, run: Path, progress: bool) -> None:
    """Raise InputError for a base other than the run's, CheckFailed if the adapter does nothing."""
    renderer = ChatRenderer(load_tokenizer(str(run)), recipe.template.chat_template_kwargs)
    prompts = [renderer.prompt_ids(PROBE[:1])]
    load_adapted(base_of(recipe, run), run, Questions(prompts, renderer, progress))


def base_of(recipe: Recipe | None, run: Path) -> Base:
    """The base of a run's adapter: its recipe's, or what the adapter of another tool names.

    Raises InputError for one that is not here, or is another.
    """
    if recipe is not None:
        check = _check_base(recipe, run)
        return Base(recipe.model_name, recipe.model.get("model_revision"), check)
    revision = read_json(run / ADAPTER_CONFIG, RESTORE).get("revision")
    check = TemplateCheck(_CHECK, "not looked at", "nothing was recorded to know it by")
    return Base(base_of_adapter(run), revision, check)


def load_adapted(base: Base, run: Path, questions: Questions) -> Adapted:
    """The base with the run's adapter. Raises CheckFailed if the adapter does nothing."""
    model = load_exactly(base.name, base.revision)
    match_embeddings(model, run)
    without = questions.ask("base", model)
    with loading(str(run), "adapter"):
        model = PeftModel.from_pretrained(model, str(run)).eval()
    answers = questions.ask("trained", model)
    compared = compare(answers, without)
    difference = compared.logit_difference
    if math.isnan(difference) or difference <= ROUNDING * compared.largest_logit:
        what = (
            f"the adapter changes nothing: its logits differ by {difference:.2g} from those of "
            f"{base.name} alone"
        )
        if math.isnan(difference):
            what = "with the adapter there are no logits: it holds NaN"
        fix = f"put what was trained back, or see what else is wrong: sft-recipes doctor {run}"
        if is_run_folder(run):
            fix = (
                f"put what was trained back, or train again: sft-recipes train {run / RECIPE} "
                "--output_dir NEW"
            )
        raise CheckFailed(str(Problem(str(run / ADAPTER), "", what, fix)))
    return Adapted(model, answers, compared, base.check)


def require_effect_kept(compared: Mapping[str, Comparison], dtype: str) -> None:
    """Raise CheckFailed if rounding to the precision of the file undid half of what the adapter
    changed, or more.
    """
    if "base" not in compared:
        return
    rounded = compared["saved"].logit_difference
    learned = compared["base"].logit_difference
    if rounded >= learned / 2:
        what = (
            f"in {dtype} what the adapter changed is lost: rounding moves logits by {rounded:.2g}, "
            f"the adapter by {learned:.2g}"
        )
        raise CheckFailed(str(Problem("saved", "--dtype", what, "export with --dtype float32")))


def _check_base(recipe: Recipe, run: Path) -> TemplateCheck:
    """Whether the base's folder holds what was trained on. Raises InputError if not."""
    base = Path(recipe.model_name)
    recorded = read_contents(run).get(_BASE)
    if recorded is None or not base.is_dir():
        return TemplateCheck(_CHECK, "not looked at", "nothing was recorded to know it by")
    if fingerprint(base) != recorded:
        what = "this is not the base that the adapter was trained on: its weights or config differ"
        fix = (
            f"put that base back, or name its folder in {run / RECIPE} ({_BASE}); if the same "
            f"weights were only saved again, delete {run / CONTENTS}"
        )
        raise InputError(Problem(str(base), _BASE, what, fix))
    return TemplateCheck(_CHECK, "ok", "the weights that the adapter was trained on")
