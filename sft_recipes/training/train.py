"""Train a recipe. This page is the whole run, top to bottom.

    sft-recipes train recipes/quickstart/full.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml -m sft_recipes.training.train --config RECIPE

Both are the same run; `--key value` after either overrides a key of the recipe. The second one takes, too:
--allow_changed KEY,KEY (what may differ from the run that is resumed), --allow_hub_kernels (let attn_implementation
download native code), --debug (show the traceback of an error).
"""

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_recipes import stop_request

if __name__ == "__main__":  # a rank: signals are heard while torch loads
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    stop_request.listen()
    if "LOCAL_RANK" in os.environ or stop_request.PARENT in os.environ:
        stop_request.listen_for_parent(signal.SIGTERM)

from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback

from sft_recipes import crash, run_folder
from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import write_prepared
from sft_recipes.data.prepared import PreparedData, load_prepared
from sft_recipes.data.template_checks import TemplateCheck, check_template, require
from sft_recipes.errors import InputError, Preempted, Problem, TrainingFault
from sft_recipes.models import agree_on_special_tokens, check_vocabulary, load_model
from sft_recipes.recipe import Recipe, parse_overrides
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.hub import check_push, push_after_training
from sft_recipes.release.model_card import write_card
from sft_recipes.training.announce import banner, next_steps
from sft_recipes.training.arguments import sft_config
from sft_recipes.training.batching import choose_batching
from sft_recipes.training.callbacks import LogWriter, Preemption
from sft_recipes.training.checkpoints import (
    check_contract,
    check_same_run,
    newest_checkpoint,
    sealed_precision,
)
from sft_recipes.training.construction import check_construction
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.context_parallel import check_context_parallel
from sft_recipes.training.data_set_losses import held_out_losses
from sft_recipes.training.evaluate_while_training import generation_metrics, rehearse_evaluation
from sft_recipes.training.launch import leave_code
from sft_recipes.training.precision import choose_precision, settle_frozen_weights
from sft_recipes.training.process_count import require_same_steps
from sft_recipes.training.processes import (
    check_active,
    is_first_process,
    join_processes,
    on_main,
    processes_a_batch,
)
from sft_recipes.training.progress import TrainingProgress
from sft_recipes.training.record import (
    earlier_stages,
    record_failure,
    record_start,
    record_state,
    run_facts,
)
from sft_recipes.training.run_lock import run_lock
from sft_recipes.training.settings_checks import check_settings
from sft_recipes.training.start_adapter import load_start, peft_config
from sft_recipes.training.trackers import SampleAnswers
from sft_recipes.training.trainer import Guards, RecipeTrainer
from sft_recipes.upstream.quiet import quiet_libraries


def train(
    recipe: Recipe, allow_changed: Sequence[str] = (), allow_hub_kernels: bool = False
) -> Path:
    """Run the recipe to its end, or resume it, and return the run folder.

    `allow_changed` names what may differ from the run that is resumed: keys, data, world_size, global_batch_size.
    `allow_hub_kernels`: the recipe may name attention that is downloaded as native code.
    Raises InputError for anything wrong before training, CheckFailed for a template that would train the wrong thing,
    TrainingFault for a run that went wrong, Preempted for one that a signal ended.
    """
    stop_request.raise_if_asked("while modules were loaded")
    # May this run start here, or go on?
    check_settings(recipe, allow_hub_kernels=allow_hub_kernels)
    check_push(recipe)
    process = join_processes(recipe)
    if process.num_processes > 1:  # before, one process would have been taken for all
        model = check_construction(recipe)
        check_context_parallel(recipe, model, processes_a_batch())
    before = on_main(lambda: check_same_run(recipe, allow_changed))
    if before.get("state") == "finished":
        process.print(
            f"{recipe.output_dir} is already complete ({before['step']} steps). Nothing to do."
        )
        return recipe.output_dir
    with contextlib.ExitStack() as to_the_end:
        to_the_end.enter_context(stop_request.listening())
        on_main(lambda: to_the_end.enter_context(run_lock(recipe.output_dir)))
        to_the_end.enter_context(_recorded_failures(recipe, on_main(os.getpid)))
        if process.is_main_process:
            record_start(recipe, before.get("allowed_changes", {}))

        # Rows, and what they must look like. The first process reads the sources; all load what it prepared.
        labeller = open_labeller(recipe)
        prepared = recipe.output_dir / run_folder.PREPARED
        on_main(lambda: write_prepared(recipe, labeller, prepared))
        data = load_prepared(recipe, prepared)
        stop_request.raise_if_asked("while rows were prepared")
        checks = check_template(labeller, data.check_examples)
        require(checks)

        # Model and trainer, from the newest checkpoint on if there is one.
        guards = _guards(recipe, data, process, allow_changed)
        trainer = build_trainer(recipe, labeller, data, guards)
        check_active(recipe, trainer)
        stop_request.raise_if_asked("while the model was loaded")
        if process.is_main_process:
            _say_what_starts(recipe, labeller, data, trainer, checks)

        _run_steps(trainer, guards, allow_changed)
        return save(recipe, trainer, guards.consumption)


@contextlib.contextmanager
def _recorded_failures(recipe: Recipe, run_pid: int) -> Iterator[None]:
    """Whatever ends the run on this rank stands in its state, by the process id of the rank that began it."""
    try:
        yield
    except Exception as error:
        known = crash.explain(error)
        text = crash.describe(error) if known is None else str(known)
        record_failure(recipe, run_pid, known, text)
        raise


def _guards(
    recipe: Recipe,
    data: PreparedData,
    process: PartialState,
    allow_changed: Sequence[str],
) -> Guards:
    """What watches over this run, and the checkpoint from which it goes on."""
    consumption = Consumption(data, recipe, process.device)
    facts = run_facts(recipe, process.num_processes, consumption.fingerprint)
    evaluates = recipe.training.get("eval_strategy", "no") != "no"
    return Guards(
        preemption=Preemption(recipe.output_dir / run_folder.LOCK),
        consumption=consumption,
        checkpoint=on_main(lambda: _resume_from(recipe, facts, allow_changed)),
        facts=facts,
        rehearse=rehearse_evaluation if evaluates else None,
    )


def _resume_from(
    recipe: Recipe, facts: Mapping[str, Any], allow_changed: Sequence[str]
) -> Path | None:
    """The checkpoint to resume from, if there is one; what may differ from it is recorded."""
    checkpoint = newest_checkpoint(recipe.output_dir)
    if checkpoint is None:
        return None
    changes = check_contract(checkpoint, facts, allow_changed)
    if changes:
        before = run_folder.read_state(recipe.output_dir)
        record_start(recipe, {**before["allowed_changes"], **changes})
    return checkpoint


def build_trainer(
    recipe: Recipe, labeller: Labeller, data: PreparedData, guards: Guards | None = None
) -> RecipeTrainer:
    """The model with its adapter, TRL's arguments, and the trainer that holds them together."""
    # Transformers holds the arguments weakly and asks them, while a model loads, whether ZeRO-3 is to partition it.
    arguments = sft_config(recipe)
    renderer = labeller.renderer
    tokenizer = renderer.tokenizer
    model = load_model(recipe)
    check_vocabulary(model, tokenizer, recipe.place("model_name_or_path"))
    agree_on_special_tokens(model, tokenizer, renderer.stop_ids)

    # What only the loaded model can tell.
    flatten = choose_batching(recipe, model, tokenizer.pad_token_id)
    resumed = sealed_precision(guards.checkpoint if guards else None)
    decided = choose_precision(recipe, model, data.train, resumed)
    settle_frozen_weights(recipe, model, decided)
    if flatten and not recipe.training.get("packing"):
        decided["padding_free"] = True
    del arguments
    config = sft_config(recipe, decided=decided)

    generation = generation_metrics(recipe, labeller, data, model)
    chosen_by_loss = str(config.metric_for_best_model or "loss").endswith("loss")
    trainer = RecipeTrainer(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        peft_config=peft_config(recipe, model),
        callbacks=[LogWriter(recipe.output_dir / run_folder.LOG)],
        guards=guards,
        generation_metrics=generation,
        generation_share=recipe.evaluation.max_share if chosen_by_loss else None,
        data_set_losses=held_out_losses(data, config.device),
    )
    load_start(recipe, trainer.model)
    if generation is not None:
        trainer.add_callback(SampleAnswers(trainer, generation.take_rows))
    # TRL mirrors its own idea of EOS and PAD onto the model while it is built; ours is the one that is served.
    agree_on_special_tokens(model, tokenizer, renderer.stop_ids)
    return trainer


def _say_what_starts(
    recipe: Recipe,
    labeller: Labeller,
    data: PreparedData,
    trainer: RecipeTrainer,
    checks: Sequence[TemplateCheck],
) -> None:
    summary = {**data.summary, "earlier_stages": earlier_stages(recipe)}
    run_folder.write_json(recipe.output_dir / run_folder.DATA, summary)
    print(banner(recipe, labeller.renderer, data, trainer, checks), flush=True)


def _run_steps(trainer: RecipeTrainer, guards: Guards, allow_changed: Sequence[str]) -> None:
    """Train to the end. Raises Preempted if a signal asked for an earlier one: a checkpoint is sealed by then."""
    checkpoint = guards.checkpoint
    require_same_steps(trainer, checkpoint, allow_changed)
    if checkpoint is not None and trainer.is_world_process_zero():
        print(f"goes on from {checkpoint.name}", flush=True)
    for shown_by_transformers in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown_by_transformers)
    progress = TrainingProgress(
        generates=trainer.generation_metrics is not None, may_be_live=not trainer.args.disable_tqdm
    )
    trainer.add_callback(progress)
    try:
        with progress:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except pickle.UnpicklingError as error:
        raise TrainingFault(
            f"{checkpoint} holds code, which is not run: {error}. Fix: remove it."
        ) from error
    if guards.preemption is not None and guards.preemption.agreed:
        step = trainer.state.global_step
        what = f"stopped by a signal; checkpoint-{step} is sealed. Run it to go on."
        raise Preempted(what, stop_request.asked())


def save(recipe: Recipe, trainer: RecipeTrainer, consumption: Consumption | None) -> Path:
    """Save the model (or adapter), the tokenizer it is served with and how often each row was trained, over all ranks
    and resumptions; then mark the run as finished.
    """
    trainer.save_model(str(recipe.output_dir))
    total = consumption.total(trainer.accelerator) if consumption else None
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.generation_config.save_pretrained(recipe.output_dir)
        if consumption is not None and total is not None:
            account = consumption.account(total, trainer.state.epoch or 0)
            run_folder.write_json(recipe.output_dir / run_folder.CONSUMPTION, account)
        record_state(recipe, "finished", step=trainer.state.global_step)
        write_card(recipe.output_dir)
        print(next_steps(recipe, trainer))
    trainer.accelerator.wait_for_everyone()
    return recipe.output_dir


def run(recipe: Recipe, allow_changed: Sequence[str] = (), allow_hub_kernels: bool = False) -> int:
    """`train`, and the push where the recipe asks for it; prints what went wrong. Returns the exit code."""
    quiet_libraries()
    try:
        train(recipe, allow_changed, allow_hub_kernels)
        if is_first_process():
            with _recorded_failures(recipe, os.getpid()):
                push_after_training(recipe)
    except Exception as error:  # noqa: BLE001 - a launcher shows its own traceback of what passes here
        return crash.tell(error)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sft_recipes.training.train --config RECIPE [--key value]`; returns the exit code."""
    values = parse_overrides(list(sys.argv[1:] if arguments is None else arguments))
    if values.pop("debug", False):
        os.environ[crash.DEBUG] = "1"
    path = values.pop("config", None)
    allow_changed = str(values.pop("allow_changed", "")).split(",")
    allow_hub_kernels = bool(values.pop("allow_hub_kernels", False))
    try:
        if not path:
            fix = "add --config RECIPE.yaml"
            raise InputError(Problem("command line", "--config", "is missing", fix))
        recipe = load_recipe(str(path), values)
    except Exception as error:  # noqa: BLE001 - as in `run`
        return crash.tell(error)
    return run(recipe, allow_changed, allow_hub_kernels)


if __name__ == "__main__":
    sys.exit(leave_code(main()))
