"""What could not be constructed hours later is refused before a row is read, by check as by train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from sft_recipes.errors import InputError
from sft_recipes.models import clean_generation_config
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import train
from sft_recipes.training.check import check_recipe
from sft_recipes.training.launch_config import read_strategy

EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "eval_split": 0.2}
LORA = {"use_peft": True}
# Keys of a recipe, the key that the refusal is about, and words of it.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "stable decay": (
        {"lr_scheduler_type": "warmup_stable_decay"},
        "lr_scheduler_type",
        "num_decay_steps",
    ),
    "least rate": ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type", "min_lr"),
    "unknown argument": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
        "lr_scheduler_kwargs",
        "cycles",
    ),
    "negative rate": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1}},
        "lr_scheduler_kwargs",
        "the rate would be -",
    ),
    "argument that is no number": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "two"}},
        "lr_scheduler_kwargs",
        "could not convert",
    ),
    "optimizer": ({"optim": "lomo"}, "optim", "lomo"),
    "optimizer arguments": ({"optim": "sgd", "optim_args": "momentum"}, "optim_args", "unpack"),
    "tracker": ({"report_to": "wandb"}, "report_to", "wandb is not installed here"),
    "unknown tracker": ({"report_to": "wandbb"}, "report_to", "there is no tracker 'wandbb'"),
    "layers": (
        {**LORA, "lora_target_modules": ["c_attn", "c_proj"]},
        "lora_target_modules",
        "not found",
    ),
    "one layer": (
        {**LORA, "lora_target_modules": ["q_proj", "w_proj"]},
        "lora_target_modules",
        "the model has no 'w_proj'",
    ),
    "layer to save": (
        {**LORA, "lora_modules_to_save": ["score"]},
        "lora_modules_to_save",
        "the model has no 'score'",
    ),
    "best of other steps": (
        {**EVALUATED, "load_best_model_at_end": True, "save_steps": 3},
        "eval_steps",
        "multiple",
    ),
    "metric": ({**EVALUATED, "metric_for_best_model": "beauty"}, "metric_for_best_model", "beauty"),
    "attention": ({"attn_implementation": "quick"}, "attn_implementation", "knows no attention"),
    "experts": ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef", "no mixture"),
    "offloading": ({"activation_offloading": True}, "activation_offloading", "other memory"),
    "file in the way": ({"output_dir": "./train.jsonl/run"}, "output_dir", "is a file"),
    "template": ({"chat_template": "./nowhere.jinja"}, "chat_template", "there is no template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_and_train_refuse_with_the_same_words(
    case: str, write_recipe: Callable[..., Path]
) -> None:
    """The key, its line and the reason, from both, and nothing is written."""
    keys, key, words = REFUSED[case]
    recipe = load_recipe(write_recipe(**{"report_to": None, "use_cpu": True, **keys}))
    with pytest.raises(InputError) as from_check:
        check_recipe(recipe, progress=False)
    with pytest.raises(InputError) as from_train:
        train.train(recipe)
    assert str(from_check.value) == str(from_train.value)
    problem = from_check.value.problems[0]
    assert problem.field == key
    assert words in problem.what
    assert problem.where.startswith(f"{recipe.path}:")
    assert not recipe.output_dir.exists()


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> Path:
    """A base of its own, to be damaged."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def test_generation_settings_without_effect_are_left_out_and_named(
    base: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A published model's sampling values beside `do_sample: false` end no run at its first save: the
    run says what it leaves out, and its folder loads and decodes greedily as the base does.
    """
    file = base / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    path = write_recipe(model_name_or_path=str(base), max_steps=1, save_steps=1)
    notes = check_recipe(load_recipe(path), progress=False)["notes"]
    assert sum("has no effect without sampling and is left out" in note for note in notes) == 2
    run = train.train(load_recipe(path))
    assert "temperature 0.6 has no effect without sampling" in capsys.readouterr().out
    saved = GenerationConfig.from_pretrained(run)
    assert saved.do_sample is False
    assert saved.temperature is None and saved.top_p is None
    assert (run / "checkpoint-1" / "generation_config.json").is_file()


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, []),
        ({"do_sample": True, "temperature": 0.6}, []),
        ({"temperature": 0.6, "top_k": 20}, ["temperature", "top_k"]),
        ({"length_penalty": 2.0}, ["length_penalty"]),
        ({"num_beams": 2, "length_penalty": 2.0}, []),
    ],
)
def test_only_what_has_no_effect_is_left_out(settings: dict[str, Any], left_out: list[str]) -> None:
    """Known answers: what sampling or beams read stays where there are any."""
    config = GenerationConfig(**settings)
    notes = clean_generation_config(config, "base")
    assert [note.split(": ")[1].split()[0] for note in notes] == left_out
    config.validate(strict=True)


def test_generation_settings_that_cannot_be_saved_are_refused(
    base: Path, write_recipe: Callable[..., Path]
) -> None:
    """What no leaving out mends is refused, by check as by train."""
    settings = {"do_sample": False, "num_return_sequences": 4}
    (base / "generation_config.json").write_text(json.dumps(settings))
    recipe = load_recipe(write_recipe(model_name_or_path=str(base)))
    for refuse in (lambda: check_recipe(recipe, progress=False), lambda: train.train(recipe)):
        with pytest.raises(InputError, match=r"generation.config .*num_return_sequences"):
            refuse()


def test_tokenizer_with_more_ids_than_the_embedding_is_refused_by_check(
    base: Path, write_recipe: Callable[..., Path]
) -> None:
    """Before a row is labelled, at the line that names the model."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    recipe = load_recipe(write_recipe(model_name_or_path=str(base)))
    with pytest.raises(InputError, match=r"recipe.yaml:1: .* ids, the embedding 100 rows"):
        check_recipe(recipe, progress=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an accelerate config is a mapping"),
        ("- a\n", "an accelerate config is a mapping"),
        ("num_processes: many\n", "1: num_processes: expected a whole number from 1"),
        ("num_processes: 0.5\n", "1: num_processes: expected a whole number"),
        ("\ndistributed_type: DEEPSPEED\n", "zero_stage: expected 0, 1, 2 or 3, got None"),
        ("distributed_type: FSDP\nfsdp_config: 3\n", "2: fsdp_config: expected a mapping"),
        ("a: [[", "not plain YAML"),
    ],
)
def test_launch_config_that_is_none_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """With its file, its line and the key."""
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_strategy(path, None)
    assert words in str(refused.value)
    assert str(refused.value).startswith(str(path))


def test_plan_for_other_machines_asks_nothing_of_this_one(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Trackers and optimizers that are not installed here are no fault of a launch elsewhere."""
    launch = tmp_path / "ddp.yaml"
    launch.write_text("distributed_type: MULTI_GPU\n")
    recipe = load_recipe(write_recipe(report_to="wandb", optim="lomo"))
    assert check_recipe(recipe, launch, processes=2, progress=False)["plan"]["steps"] > 0
