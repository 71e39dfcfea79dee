"""All checks of a run in one table, and what they come to.

Each check reads files and nothing else: no model is loaded, no pickle opened, no network asked.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from sft_recipes.doctor import (
    file_checks,
    lora_checks,
    token_checks,
    training_checks,
    weight_checks,
)
from sft_recipes.doctor.finding import Look, NotSeen, Report
from sft_recipes.doctor.folder import Run, open_run
from sft_recipes.doctor.weight_files import pickles
from sft_recipes.errors import InputError, Problem

Check = Callable[[Run, Look], None]


# In the order in which they are told. The docstring of each says what has to hold.
CHECKS: Mapping[str, Check] = {
    "checkpoints are whole": training_checks.checkpoints_are_whole,
    "files are whole": file_checks.files_are_whole,
    "shapes fit the config": file_checks.shapes_fit,
    "training loss": training_checks.loss_is_sound,
    "gradients": training_checks.gradients_are_sound,
    "learning rate": training_checks.schedule_ended,
    "evaluated": training_checks.was_evaluated,
    "evaluation loss": training_checks.evaluation_loss_is_sound,
    "weights are numbers": weight_checks.weights_are_numbers,
    "differs from its base": weight_checks.model_differs_from_base,
    "adapter has an effect": weight_checks.adapter_has_effect,
    "head and embedding": weight_checks.head_is_tied_as_said,
    "base of the adapter": lora_checks.base_is_the_adapters,
    "merged weights": lora_checks.merged_is_the_sum,
    "tokenizer": token_checks.tokenizer_is_there,
    "chat template": token_checks.template_is_there,
    "template of the base": token_checks.template_is_the_bases,
    "end of an answer": token_checks.ends_agree,
    "padding": token_checks.padding_is_no_end,
    "ids have embeddings": token_checks.ids_have_embeddings,
    "new tokens": token_checks.new_tokens_are_trained,
}


def examine(
    folder: Path, base: Path | None = None, merged: Path | None = None, progress: bool = False
) -> Report:
    """Run every check on a run folder or checkpoint of any tool.

    `base`: the model before training, where the run does not name it or it lies elsewhere. `merged`:
    the merged model, where it does not lie inside the run. Raises InputError where there is nothing
    to look at.
    """
    run = open_run(folder, base, merged, progress)
    kind = run.kind  # a damaged adapter_config.json ends it here: nothing is known without
    looks: list[Look] = []
    told: set[str] = set()
    for name, check in CHECKS.items():
        look = Look(name)
        looks.append(look)
        _make(check, run, look, told)
    report = Report(folder, run.model, kind, looks, _not_read(run))
    if not report.looked_at:
        reasons = "; ".join(sorted({look.not_seen for look in looks}))
        what = f"nothing in it could be looked at ({reasons})"
        fix = "name the output folder of a training run, or one of its checkpoints"
        raise InputError(Problem(str(folder), "", what, fix))
    return report


def _make(check: Check, run: Run, look: Look, told: set[str]) -> None:
    """Run one check. A file that is damaged is a finding of the first check that needs it."""
    try:
        check(run, look)
    except NotSeen as reason:
        look.not_seen = str(reason)
    except InputError as error:
        for problem in error.problems:
            if str(problem) in told:
                look.not_seen = f"{problem.where} cannot be read"
                continue
            told.add(str(problem))
            look.find("error", problem.where, problem.what, "", problem.fix)


def _not_read(run: Run) -> list[str]:
    """The pickles beside the model, `training_args.bin` among them."""
    folders = dict.fromkeys((run.folder, run.model))
    names: dict[str, None] = {}
    for folder in folders:
        for path in pickles(folder):
            names[path.name] = None
    return list(names)
