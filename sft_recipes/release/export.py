"""Export a finished run, or what another tool trained: one folder with the whole model that a server
loads, compared with what was trained.

An adapter is merged into its base at full precision, whatever the base was held in while it was
trained. What stands in the new folder is then loaded again and compared on real prompts: logits,
greedy text, and the ids that a server makes of the prompts. A folder that differs is not left
behind.
"""

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import loading
from sft_recipes.data.template_checks import TemplateCheck, require
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.model_folder import ADAPTER_CONFIG
from sft_recipes.models import agree_on_special_tokens, check_vocabulary
from sft_recipes.release.adapter import base_of, load_adapted, require_effect_kept
from sft_recipes.release.comparison import (
    TOLERANCES,
    Answer,
    Comparison,
    Questions,
    compare,
    load_exactly,
    require_same,
)
from sft_recipes.release.finished_run import EXPORT
from sft_recipes.release.links import require_no_outside_links
from sft_recipes.release.lint import lint
from sft_recipes.release.local_paths import recipe_text
from sft_recipes.release.markdown import TERMINAL
from sft_recipes.release.model_card import write_card
from sft_recipes.release.modelfile import write_modelfile
from sft_recipes.release.older_transformers import CHECK, write_for_older
from sft_recipes.release.source import Source, open_source

FOLDER = "export"  # inside the run folder
PROMPTS = 8  # that are answered


@dataclass(frozen=True)
class Export:
    """An exported folder: its precision, how it compares with what was trained, what was checked.

    `compared` holds by name what was compared with the trained model: `base`, without its adapter,
    and `merged` (adapters only), and `saved`.
    """

    folder: Path
    dtype: str
    compared: Mapping[str, Comparison]
    checks: Sequence[TemplateCheck]
    has_card: bool  # which only a run of this project has

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


@dataclass(slots=True)
class _Trained:
    """The whole model in float32, its answers as it was trained, what was compared with them."""

    model: Any
    answers: Sequence[Answer]
    compared: dict[str, Comparison]
    dtype: str  # the precision of its file, unless another is asked for
    checks: list[TemplateCheck]  # of the adapter's base


def export(
    run: Path,
    output: Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Export:
    """Write the servable folder of a finished run or of another tool's, `RUN/export` unless `output`
    says otherwise.

    `dtype` is the precision of the file; left out it is float32 for a merged adapter, and the run's
    own for a whole model. Raises InputError for an unfinished run or a folder that exists (`force`
    replaces an earlier export), and CheckFailed, leaving nothing behind, if the exported model or
    its template is not what was trained.
    """
    source = open_source(run)
    folder = output or run / FOLDER
    _check_request(folder, dtype, force)
    require_no_outside_links(run)
    renderer = source.renderer
    questions = _questions(source, run, progress)
    trained = _trained_model(source, run, questions)
    dtype = dtype or trained.dtype
    # Written beside its place and moved there at the end: a folder that failed is never seen.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_servable(trained.model.to(getattr(torch, dtype)), renderer, partial)
        older = write_for_older(partial)
        model = _load_again(partial, trained, questions, dtype)
        checks = [
            *trained.checks,
            *lint(model, partial, renderer, source.labels, source.examples),
            older,
            write_modelfile(partial, renderer, source.labels.system_prompt),
        ]
        require(checks)
        exported = Export(folder, dtype, trained.compared, checks, source.recipe is not None)
        run_folder.write_json(partial / EXPORT, exported.found())
        if source.recipe is not None:
            text = recipe_text(source.recipe)
            (partial / run_folder.RECIPE).write_text(text, encoding="utf-8")
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


def _questions(source: Source, run: Path, progress: bool) -> Questions:
    """The beginnings of the first rows. Raises InputError where the template makes no row."""
    labelled = Labeller(source.renderer, source.labels).label(source.examples).rows[:PROMPTS]
    if not labelled:
        what = "no row can be made with it whose answer is known to the token"
        fix = "see `sft-recipes inspect ROWS --tokenizer RUN` for why, and correct the template"
        raise InputError(Problem(str(run), "chat_template", what, fix))
    prompts = [row.input_ids[: max(1, row.spans[0][0])] for row in labelled]
    return Questions(prompts, source.renderer, progress)


def _trained_model(source: Source, run: Path, questions: Questions) -> _Trained:
    """The model of a run, its adapter merged.

    Raises InputError for an adapter on another base than its own, CheckFailed for one that changes
    nothing and for a merge that went wrong.
    """
    if not (run / ADAPTER_CONFIG).is_file():
        model = load_exactly(str(run))
        check_vocabulary(model, source.renderer.tokenizer, str(run))
        with loading(str(run), "config"):
            own_dtype = str(AutoConfig.from_pretrained(str(run)).dtype or model.dtype)
        answers = questions.ask("trained", model)
        return _Trained(model, answers, {}, own_dtype.removeprefix("torch."), [])
    adapted = load_adapted(base_of(source.recipe, run), run, questions)
    model = adapted.model.merge_and_unload(safe_merge=True)
    check_vocabulary(model, source.renderer.tokenizer, str(run))
    merged = compare(adapted.answers, questions.ask("merged", model))
    require_same("merged", merged, "float32")
    compared = {"base": adapted.base, "merged": merged}
    return _Trained(model, adapted.answers, compared, "float32", [adapted.check])


def _load_again(folder: Path, trained: _Trained, questions: Questions, dtype: str) -> Any:
    """What was saved, compared with what was trained, which is let go first: it is as large.

    Raises CheckFailed where the two differ.
    """
    trained.model = None
    gc.collect()
    model = load_exactly(str(folder))
    trained.compared["saved"] = compare(trained.answers, questions.ask("saved", model))
    require_same("saved", trained.compared["saved"], dtype)
    require_effect_kept(trained.compared, dtype)
    return model


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
