"""Train a recipe. This page is the whole run, top to bottom.

    sft-recipes train recipes/quickstart/full.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml -m sft_recipes.training.train --config RECIPE

Both are the same run; `--key value` after either overrides a key of the recipe.
"""

import contextlib
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sft_recipes import run_folder
from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import write_prepared
from sft_recipes.data.prepared import PreparedData, load_prepared
from sft_recipes.data.template_checks import check_template, require
from sft_recipes.devices import computes_on_cpu
from sft_recipes.errors import InputError, Preempted, Problem, SFTRecipesError, TrainingFault
from sft_recipes.models import agree_on_special_tokens, check_vocabulary, load_model, lora_config
from sft_recipes.recipe import Recipe, parse_overrides
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.hub import push_after_training
from sft_recipes.release.model_card import write_card
from sft_recipes.training.announce import banner, next_steps
from sft_recipes.training.arguments import (
    launched_processes,
    sft_config,
)
from sft_recipes.training.batching import choose_batching
from sft_recipes.training.callbacks import LogWriter, Preemption
from sft_recipes.training.checkpoints import (
    check_contract,
    check_same_run,
    newest_checkpoint,
    sealed_precision,
)
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.evaluate_while_training import generation_metrics, rehearse_evaluation
from sft_recipes.training.precision import choose_precision, precision_of
from sft_recipes.training.processes import on_main
from sft_recipes.training.record import record_failure, record_start, record_state, run_facts
from sft_recipes.training.run_lock import run_lock
from sft_recipes.training.settings_checks import check_settings, launched_with
from sft_recipes.training.trainer import RecipeTrainer


def train(
    recipe: Recipe, allow_changed: Sequence[str] = (), allow_hub_kernels: bool = False
) -> Path:
    """Run the recipe to its end, or resume it, and return the run folder.

    `allow_changed` names what may differ from the run that is resumed: keys, data, world_size, global_batch_size.
    `allow_hub_kernels`: the recipe may name attention that is downloaded as native code.
    Raises InputError for anything wrong before training, CheckFailed for a template that would train the wrong thing,
    TrainingFault for a run that went wrong, Preempted for one that a signal ended.
    """
    check_settings(recipe, allow_hub_kernels=allow_hub_kernels)
    process = _process(recipe)
    before = on_main(lambda: check_same_run(recipe, allow_changed))
    if before.get("state") == "finished":
        process.print(
            f"{recipe.output_dir} is already complete ({before['step']} steps). Nothing to do."
        )
        return recipe.output_dir
    with (
        contextlib.ExitStack() as to_the_end,
        Preemption(recipe.output_dir / run_folder.LOCK) as preemption,
    ):
        on_main(lambda: to_the_end.enter_context(run_lock(recipe.output_dir)))
        if process.is_main_process:
            record_start(recipe, before.get("allowed_changes", {}))

        labeller = open_labeller(recipe)
        folder = recipe.output_dir / run_folder.PREPARED
        on_main(
            lambda: write_prepared(recipe, labeller, folder)
        )  # the others neither read nor hash the sources
        data = load_prepared(recipe, folder)
        checks = check_template(labeller, data.check_examples)
        require(checks)
        consumption = Consumption(data, recipe, process.device)
        facts = run_facts(recipe, process.num_processes, consumption.fingerprint)
        checkpoint = on_main(lambda: _resume_from(recipe, facts, allow_changed))

        trainer = build_trainer(recipe, labeller, data, sealed_precision(checkpoint))
        facts = {**facts, "precision": precision_of(trainer.args)}
        check_active(recipe, trainer)
        if process.is_main_process:
            run_folder.write_json(recipe.output_dir / run_folder.DATA, data.summary)
            print(banner(recipe, labeller.renderer, data, trainer, checks), flush=True)
        trainer.secure(facts, preemption, consumption, checkpoint)
        if trainer.args.eval_strategy != "no":
            trainer.rehearsal = partial(rehearse_evaluation, trainer)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except pickle.UnpicklingError as error:
            raise TrainingFault(
                f"{checkpoint} holds code, which is not run: {error}. Fix: remove it."
            ) from error
        if preemption.agreed:
            raise Preempted(
                f"stopped by a signal; checkpoint-{trainer.state.global_step} is sealed. Run it to go on."
            )
        return save(recipe, trainer, consumption)


def _resume_from(
    recipe: Recipe, facts: Mapping[str, Any], allow_changed: Sequence[str]
) -> Path | None:
    """The checkpoint to resume from, if there is one; what may differ from it is recorded."""
    checkpoint = newest_checkpoint(recipe.output_dir)
    if checkpoint is not None and (changes := check_contract(checkpoint, facts, allow_changed)):
        before = run_folder.read_state(recipe.output_dir)
        record_start(recipe, {**before["allowed_changes"], **changes})
    return checkpoint


def build_trainer(
    recipe: Recipe, labeller: Labeller, data: PreparedData, resumed: str | None = None
) -> RecipeTrainer:
    """The model with its adapter, TRL's arguments, and the trainer that holds them together.

    `resumed`: the precision of the run that goes on, which a recipe that states none keeps.
    """
    # Transformers holds the arguments weakly and asks them, while a model loads, whether ZeRO-3 is to partition it.
    arguments = sft_config(recipe)
    renderer = labeller.renderer
    model = load_model(recipe)
    check_vocabulary(model, renderer.tokenizer)
    agree_on_special_tokens(model, renderer.tokenizer, renderer.stop_ids)
    flatten = choose_batching(recipe, model, renderer.tokenizer.pad_token_id)
    decided = choose_precision(recipe, model, data.train, resumed)
    if flatten and not recipe.training.get("packing"):
        decided["padding_free"] = True
    config = sft_config(recipe, decided=decided)
    del arguments
    trainer = RecipeTrainer(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=renderer.tokenizer,
        peft_config=lora_config(recipe, model),
        callbacks=[LogWriter(recipe.output_dir / run_folder.LOG)],
    )
    # TRL mirrors its own idea of EOS and PAD onto the model while it is built; ours is the one that is served.
    agree_on_special_tokens(model, renderer.tokenizer, renderer.stop_ids)
    trainer.generation_metrics = generation_metrics(recipe, labeller, data, model)
    chosen_by_loss = str(config.metric_for_best_model or "loss").endswith("loss")
    trainer.generation_share = recipe.evaluation.max_share if chosen_by_loss else None
    return trainer


def _process(recipe: Recipe) -> PartialState:
    """This process among those launched; refuses a launch whose processes do not know of one another."""
    timeout = timedelta(
        seconds=int(recipe.training.get("ddp_timeout", 1800))
    )  # transformers' default
    process = PartialState(cpu=computes_on_cpu(recipe), timeout=timeout)
    if process.num_processes != launched_processes():
        what = (
            f"{launched_processes()} processes were launched, {process.num_processes} work together"
        )
        fix = "use a config from accelerate_configs/; on CPU one with distributed_type: MULTI_GPU and use_cpu: true"
        raise InputError(Problem("launch", "num_processes", what, fix))
    return process


def check_active(recipe: Recipe, trainer: Any) -> None:
    """Raise InputError if a strategy that was asked for is not what the trainer is about to run."""
    asked = {name: launched_with(name) for name in ("FSDP", "DEEPSPEED")}
    active = {name: getattr(trainer, f"is_{name.lower()}_enabled") for name in asked}
    asked |= {
        f"{bits}-bit weights": bool(recipe.model.get(f"load_in_{bits}bit")) for bits in (4, 8)
    }
    active |= {
        f"{bits}-bit weights": getattr(trainer.model, f"is_loaded_in_{bits}bit", False)
        for bits in (4, 8)
    }
    for name in asked:
        if asked[name] != bool(active[name]):
            what = f"{name}: asked for {asked[name]}, active {bool(active[name])}"
            raise InputError(
                Problem(recipe.name, "launch", what, "launch with another of accelerate_configs/")
            )


def save(recipe: Recipe, trainer: RecipeTrainer, consumption: Consumption) -> Path:
    """Save the model (or adapter), the tokenizer it is served with and how often each row was trained, over all ranks
    and resumptions; then mark the run as finished.
    """
    trainer.save_model(str(recipe.output_dir))
    total = consumption.total(trainer.accelerator)
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.generation_config.save_pretrained(recipe.output_dir)
        account = consumption.account(total, trainer.state.epoch or 0)
        run_folder.write_json(recipe.output_dir / run_folder.CONSUMPTION, account)
        record_state(recipe, "finished", step=trainer.state.global_step)
        write_card(recipe.output_dir)
        print(next_steps(recipe, trainer))
    trainer.accelerator.wait_for_everyone()
    return recipe.output_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sft_recipes.training.train --config RECIPE [--key value]`; returns the exit code.

    `--allow_changed KEY,KEY` lets a resumed run differ in these; `--allow_hub_kernels` lets the recipe name attention
    that is downloaded.
    """
    values = parse_overrides(list(sys.argv[1:] if arguments is None else arguments))
    path = values.pop("config", None)
    allowed = str(values.pop("allow_changed", "")).split(",")
    allow_hub_kernels = bool(values.pop("allow_hub_kernels", False))
    recipe: Recipe | None = None
    try:
        if not path:
            raise InputError(
                Problem("command line", "--config", "is missing", "add --config RECIPE.yaml")
            )
        recipe = load_recipe(str(path), values)
        train(recipe, allowed, allow_hub_kernels)
        if int(os.environ.get("RANK", "0")) == 0:
            push_after_training(recipe)
    except SFTRecipesError as error:
        print(error, file=sys.stderr)
        if recipe is not None and int(os.environ.get("RANK", "0")) == 0:
            record_failure(recipe, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
