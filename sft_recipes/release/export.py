"""Export a finished run: one folder with the whole model that a server loads, compared with what
was trained.

An adapter is merged into its base at full precision, whatever the base was held in while it was
trained. What stands in the new folder is then loaded again and compared on real prompts: logits,
greedy text, and the ids that a server makes of the prompts. A folder that differs is not left
behind.
"""

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoConfig

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.kept_examples import read_examples
from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import load_tokenizer, loading
from sft_recipes.data.template_checks import TemplateCheck, require
from sft_recipes.errors import CheckFailed, InputError, Problem, suggest
from sft_recipes.messages import Example
from sft_recipes.models import agree_on_special_tokens, load_weights
from sft_recipes.recipe import Recipe
from sft_recipes.release.finished_run import ADAPTER_CONFIG, EXPORT, finished_run
from sft_recipes.release.links import require_no_outside_links
from sft_recipes.release.lint import lint
from sft_recipes.release.local_paths import recipe_text
from sft_recipes.release.markdown import TERMINAL
from sft_recipes.release.model_card import write_card
from sft_recipes.release.older_transformers import CHECK, write_for_older

FOLDER = "export"  # inside the run folder
ROWS = 200  # that are linted
PROMPTS = 8  # that are answered
NEW_TOKENS = 32  # of each answer
POSITIONS = 16  # at the end of each prompt whose logits are compared
# Largest difference of a logit as a share of the largest logit: rounding, and nothing else.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Comparison:
    """A model against the one that was trained: the largest difference of a logit, the largest
    logit, and on how many of the prompts the greedy text is the same.
    """

    logit_difference: float
    largest_logit: float
    equal_texts: int
    prompts: int


@dataclass(frozen=True)
class Export:
    """An exported folder: its precision, how it compares with what was trained, what was checked.

    `compared` holds the steps by name: `merged` (adapters only) and `saved`.
    """

    folder: Path
    dtype: str
    compared: Mapping[str, Comparison]
    checks: Sequence[TemplateCheck]

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {**self.found(), "folder": str(self.folder)}

    def found(self) -> dict[str, Any]:
        """What was compared and checked, as it is written into the folder itself."""
        return {
            "dtype": self.dtype,
            "compared": {step: asdict(comparison) for step, comparison in self.compared.items()},
            "checks": [asdict(check) for check in self.checks],
        }

    @property
    def needs_version_5(self) -> bool:
        """Whether 4.57 of transformers was found not to read the folder."""
        return any(check.name == CHECK and check.outcome != "ok" for check in self.checks)

    def as_text(self, run: Path) -> str:
        """The same for the terminal, with the next steps."""
        template = TERMINAL.get_template("export.txt.jinja")
        return template.render(export=self, run=run, path=self.folder.absolute())


class _Answer(NamedTuple):
    """What a model says to one prompt."""

    logits: torch.Tensor  # [positions, vocabulary], at the end of the prompt
    ids: list[int]  # of the greedy text


class _Trained(NamedTuple):
    """The whole model in float32, its answers as it was trained, a merge compared with them."""

    model: Any
    answers: Sequence[_Answer]
    compared: dict[str, Comparison]
    dtype: str  # the precision of its file, unless another is asked for


@dataclass(frozen=True)
class _Questions:
    """Prompts, as ids, that each model is asked."""

    prompts: Sequence[Sequence[int]]
    renderer: ChatRenderer
    progress: bool

    def ask(self, name: str, model: Any) -> list[_Answer]:
        """The answers of a model; `name` is what the progress bar calls it."""
        title = f"asking the {name} model"
        answers = []
        for prompt in tqdm(self.prompts, title, disable=not self.progress, leave=False):
            ids = torch.tensor([prompt], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, -POSITIONS:].cpu()
                generated = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                    eos_token_id=list(self.renderer.stop_ids),
                    pad_token_id=self.renderer.tokenizer.pad_token_id,
                )
            answers.append(_Answer(logits, generated[0, len(prompt) :].tolist()))
        return answers


def export(
    run: Path,
    output: Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Export:
    """Write the servable folder of a finished run, `RUN/export` unless `output` says otherwise.

    `dtype` is the precision of the file; left out it is float32 for a merged adapter, and the run's
    own for a whole model. Raises InputError for an unfinished run or a folder that exists (`force`
    replaces an earlier export), and CheckFailed, leaving nothing behind, if the exported model or
    its template is not what was trained.
    """
    recipe = finished_run(run)
    folder = output or run / FOLDER
    _check_request(folder, dtype, force)
    require_no_outside_links(run)
    renderer = ChatRenderer(load_tokenizer(str(run)), recipe.template.chat_template_kwargs)
    examples = _real_examples(run)
    labelled = Labeller(renderer, recipe.labels).label(examples).rows[:PROMPTS]
    prompts = [row.input_ids[: max(1, row.spans[0][0])] for row in labelled]
    questions = _Questions(prompts, renderer, progress)

    model, answers, compared, own_dtype = _trained_model(recipe, run, questions)
    dtype = dtype or own_dtype
    # Written beside its place and moved there at the end: a folder that failed is never seen.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_servable(model.to(getattr(torch, dtype)), renderer, partial)
        older = write_for_older(partial)
        del model
        gc.collect()  # before the same weights are loaded once more
        model = _load(str(partial))
        compared["saved"] = _compare("saved", answers, questions.ask("saved", model), dtype)
        checks = [*lint(model, partial, renderer, recipe.labels, examples), older]
        require(checks)
        exported = Export(folder, dtype, compared, checks)
        run_folder.write_json(partial / EXPORT, exported.found())
        (partial / run_folder.RECIPE).write_text(recipe_text(recipe), encoding="utf-8")
        write_card(run, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _check_request(folder: Path, dtype: str | None, force: bool) -> None:
    """Raise InputError for a folder that is not to be replaced and for an unknown precision."""
    replaceable = force and (folder / EXPORT).is_file()
    if folder.is_symlink():
        what = "this is a link, and an export would be written through it"
        raise InputError(Problem(str(folder), "--output", what, "name the folder that it leads to"))
    if folder.exists() and not replaceable:
        fix = "choose another --output, or add --force to replace an earlier export"
        raise InputError(Problem(str(folder), "--output", "the folder exists", fix))
    if dtype and dtype not in TOLERANCES:
        what = f"{dtype!r} is no precision"
        raise InputError(Problem("command line", "--dtype", what, suggest(dtype, TOLERANCES)))


def _real_examples(run: Path) -> list[Example]:
    """Rows of the run's data, held-out ones where there are any."""
    path = run / run_folder.PREPARED / "eval_examples.jsonl"
    if not path.is_file():
        fix = f"run `sft-recipes prepare {run / run_folder.RECIPE}` first"
        raise InputError(Problem(str(path), "", "there are no rows to compare on", fix))
    examples = []
    for grouped in islice(read_examples(path), ROWS):
        examples.append(grouped.example)
    return examples


def _trained_model(recipe: Recipe, run: Path, questions: _Questions) -> _Trained:
    """The model of a run, its adapter merged. Raises CheckFailed for a merge that went wrong."""
    if not (run / ADAPTER_CONFIG).is_file():
        model = _load(str(run))
        with loading(str(run), "config"):
            own_dtype = str(AutoConfig.from_pretrained(str(run)).dtype or model.dtype)
        answers = questions.ask("trained", model)
        return _Trained(model, answers, {}, own_dtype.removeprefix("torch."))
    base = _load(recipe.model_name, recipe.model.get("model_revision"))
    with loading(str(run), "adapter"):
        model = PeftModel.from_pretrained(base, str(run)).eval()
    answers = questions.ask("trained", model)
    model = model.merge_and_unload(safe_merge=True)
    merged = _compare("merged", answers, questions.ask("merged", model), "float32")
    return _Trained(model, answers, {"merged": merged}, "float32")


def _load(source: str, revision: str | None = None) -> Any:
    """The model in float32. Raises InputError where its weights are stored quantized.

    Loaded so, not made so: what a model computes when it is built, as the scale of Gemma's
    embeddings, is rounded to the precision in which it is loaded, and stays rounded.
    """
    model = load_weights(source, torch.float32, revision)
    if getattr(model, "is_quantized", False):
        what = "its weights are stored quantized"
        fix = "name the full-precision model and train with load_in_4bit: true"
        raise InputError(Problem(source, "model_name_or_path", what, fix))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def save_servable(model: Any, renderer: ChatRenderer, folder: Path) -> None:
    """Save a model and its tokenizer as a server needs them: end tokens agree, the cache is on, and
    the arguments that the template was trained with are its defaults.
    """
    tokenizer = renderer.tokenizer
    agree_on_special_tokens(model, tokenizer, renderer.stop_ids)
    model.config.get_text_config().use_cache = True  # off while training
    model.save_pretrained(folder)
    template = tokenizer.chat_template
    defaults = ""
    for key, value in renderer.chat_template_kwargs.items():
        defaults += f"{{% set {key} = {key} if {key} is defined else {value!r} +%}}"
    if defaults:
        tokenizer.chat_template = defaults + template
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = template


def _compare(
    step: str, trained: Sequence[_Answer], other: Sequence[_Answer], dtype: str
) -> Comparison:
    """Two models by their answers. Raises CheckFailed where rounding does not explain a difference.

    In less than float32 a near tie may fall the other way, so there texts are counted and need not
    be equal.
    """
    pairs = list(zip(trained, other, strict=True))
    difference = _largest([before.logits - after.logits for before, after in pairs])
    largest = _largest([before.logits for before, _ in pairs])
    equal = sum(before.ids == after.ids for before, after in pairs)
    prompts = len(pairs)
    is_rounding = difference <= TOLERANCES[dtype] * largest
    if not is_rounding or (dtype == "float32" and equal < prompts):
        what = (
            f"this is not the model that was trained: logits differ by {difference:.3g}, "
            f"greedy text is equal on {equal} of {prompts} prompts"
        )
        fix = "nothing was exported; report the model and its adapter settings"
        raise CheckFailed(str(Problem(step, "", what, fix)))
    return Comparison(difference, largest, equal, prompts)


def _largest(values: Sequence[torch.Tensor]) -> float:
    """The largest absolute value; NaN, which no tolerance allows, if there is one."""
    return float(torch.stack([value.abs().max() for value in values]).max())
