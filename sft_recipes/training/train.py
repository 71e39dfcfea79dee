"""Train a recipe. This page is the whole run, top to bottom.

    sft-recipes train recipes/quickstart/full.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml -m sft_recipes.training.train --config RECIPE

Both are the same run; `--key value` after either overrides a key of the recipe.
"""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.prepare import PreparedData, prepare
from sft_recipes.data.template_checks import check_template, require
from sft_recipes.errors import InputError, Problem, SFTRecipesError
from sft_recipes.models import agree_on_special_tokens, check_vocabulary, load_model, load_tokenizer, lora_config
from sft_recipes.recipe import Recipe, parse_overrides
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.announce import banner, next_steps
from sft_recipes.training.arguments import check_settings, has_accelerator, launched_processes, sft_config
from sft_recipes.training.callbacks import LogWriter
from sft_recipes.training.checkpoints import check_same_data, check_same_run, newest_checkpoint
from sft_recipes.training.evaluate_while_training import generation_metrics
from sft_recipes.training.flattening import flattening_pays, keeps_rows_apart
from sft_recipes.training.record import record_failure, record_start, record_state
from sft_recipes.training.trainer import RecipeTrainer


def train(recipe: Recipe) -> Path:
    """Run the recipe to its end, or resume it, and return the run folder.

    Raises InputError for anything wrong before training, CheckFailed for a template that would train the wrong thing,
    TrainingFault for a run that went wrong.
    """
    check_settings(recipe)
    process = _process(recipe)
    before = check_same_run(recipe)
    if before.get("state") == "finished":
        print(f"{recipe.output_dir} is already complete ({before['step']} steps). Nothing to do.")
        return recipe.output_dir
    process.wait_for_everyone()
    if process.is_main_process:
        record_start(recipe)

    tokenizer = load_tokenizer(recipe.model_name, recipe.model.get("model_revision"))
    renderer = attach_chat_template(tokenizer, recipe.template)
    with process.main_process_first():
        folder = recipe.output_dir / run_folder.PREPARED
        data = prepare(recipe, renderer, folder, progress=process.is_main_process)
    check_same_data(recipe.output_dir, data.summary)
    checks = check_template(renderer, Labeller(renderer, recipe.labels), data.eval_examples[:50])
    require(checks)

    trainer = build_trainer(recipe, renderer, data)
    if process.is_main_process:
        run_folder.write_json(recipe.output_dir / run_folder.DATA, data.summary)
        print(banner(recipe, renderer, data, trainer, checks), flush=True)
    checkpoint = newest_checkpoint(recipe.output_dir)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return save(recipe, trainer, renderer)


def build_trainer(recipe: Recipe, renderer: ChatRenderer, data: PreparedData) -> RecipeTrainer:
    """The model with its adapter, TRL's arguments, and the trainer that holds them together."""
    # Transformers holds the arguments weakly and asks them, while a model loads, whether ZeRO-3 is to partition it.
    arguments = sft_config(recipe, flatten=False)
    model = load_model(recipe)
    check_vocabulary(model, renderer.tokenizer)
    agree_on_special_tokens(model, renderer.tokenizer, renderer.stop_ids)
    config = sft_config(recipe, flatten=_flatten(recipe, model, renderer, data))
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
    trainer.generation_metrics = generation_metrics(recipe, renderer, data, model)
    chosen_by_loss = str(config.metric_for_best_model or "loss").endswith("loss")
    trainer.generation_share = recipe.evaluation.max_share if chosen_by_loss else None
    return trainer


def _flatten(recipe: Recipe, model: Any, renderer: ChatRenderer, data: PreparedData) -> bool:
    """Whether batches are flattened to one sequence without padding; a recipe that packs must be able to."""
    asked = bool(recipe.training.get("packing") or recipe.training.get("padding_free"))
    batch_size = int(recipe.training.get("per_device_train_batch_size", 8))
    if not asked and (has_accelerator() or batch_size < 2 or recipe.training.get("padding_free") is False):
        return False
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return asked
    apart = keeps_rows_apart(model, renderer.tokenizer.pad_token_id)
    if asked and not apart:
        key = "packing" if recipe.training.get("packing") else "padding_free"
        what = f"{type(model).__name__} lets rows of one pack see one another"
        raise InputError(Problem(recipe.name, key, what, "remove the key"))
    return asked or (apart and flattening_pays(model, data.train, batch_size))


def _process(recipe: Recipe) -> PartialState:
    """This process among those launched; refuses a launch whose processes do not know of one another."""
    use_cpu = bool(recipe.training.get("use_cpu", not has_accelerator()))
    timeout = timedelta(seconds=int(recipe.training.get("ddp_timeout", 1800)))  # transformers' default
    process = PartialState(cpu=use_cpu, timeout=timeout)
    if process.num_processes != launched_processes():
        what = f"{launched_processes()} processes were launched, {process.num_processes} work together"
        fix = "use a config from accelerate_configs/; on CPU one with distributed_type: MULTI_GPU and use_cpu: true"
        raise InputError(Problem("launch", "num_processes", what, fix))
    return process


def save(recipe: Recipe, trainer: RecipeTrainer, renderer: ChatRenderer) -> Path:
    """Save the model (or adapter) and the tokenizer it is served with, then mark the run as finished."""
    trainer.save_model(str(recipe.output_dir))
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.generation_config.save_pretrained(recipe.output_dir)
        record_state(recipe, "finished", step=trainer.state.global_step)
        print(next_steps(recipe, trainer))
    trainer.accelerator.wait_for_everyone()
    return recipe.output_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sft_recipes.training.train --config RECIPE [--key value]`; returns the exit code."""
    values = parse_overrides(list(sys.argv[1:] if arguments is None else arguments))
    path = values.pop("config", None)
    recipe: Recipe | None = None
    try:
        if not path:
            raise InputError(Problem("command line", "--config", "is missing", "add --config RECIPE.yaml"))
        recipe = load_recipe(str(path), values)
        train(recipe)
    except SFTRecipesError as error:
        print(error, file=sys.stderr)
        if recipe is not None and int(os.environ.get("RANK", "0")) == 0:
            record_failure(recipe, error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
