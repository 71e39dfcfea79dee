"""Context parallel: planned and launched rightly; what it would train wrong is refused. It needs two GPUs to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
    _HeadTailLoadBalancer,
)
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.errors import InputError
from sft_recipes.recipe import launch_config
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training import launch as launch_page
from sft_recipes.training.announce import rows_a_step
from sft_recipes.training.arguments import accumulation_steps, sft_config
from sft_recipes.training.check import check_recipe
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.context_parallel import check_context_parallel, row_multiple
from sft_recipes.training.launch_config import read_strategy
from sft_recipes.training.memory import Batch
from sft_recipes.training.record import run_facts
from tests.training.tiny import first_batch, prepared, trainer_for

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SMALL, intermediate_size=64)
REFUSED: dict[str, dict[str, Any]] = {
    "packing": {"packing": True},
    "padding_free": {"padding_free": True},
    "attn_implementation": {"attn_implementation": "eager"},
    "pad_to_multiple_of": {"pad_to_multiple_of": 6},
    "evaluation": {"eval_split": 4, "eval_strategy": "epoch"},
}


def model_of(config: Any) -> Any:
    """A model of shapes alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def shares_batches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this process be one of four that were launched, two to a batch."""

    def launched(rank: int = 0) -> None:
        variables = {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_CP_SIZE": "2",
            "WORLD_SIZE": "4",
            "RANK": str(rank),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_would_be_trained_wrong_are_refused(
    key: str, write_recipe: Callable[..., Path]
) -> None:
    """By name and line for two processes to a batch; for one they are as they always were."""
    path = write_recipe(**REFUSED[key])
    recipe = load_recipe(path)
    check_context_parallel(recipe, model_of(LLAMA), 1)
    with pytest.raises(InputError) as refused:
        check_context_parallel(recipe, model_of(LLAMA), 2)
    (problem,) = refused.value.problems
    assert problem.field == key
    if key in REFUSED[key]:
        lines = path.read_text().splitlines()
        (number,) = [place for place, line in enumerate(lines, 1) if line.startswith(f"{key}:")]
        assert problem.where == f"{path}:{number}"


def test_the_fix_for_answers_in_training_works(write_recipe: Callable[..., Path]) -> None:
    """The evaluation block that the error says to set is accepted, and the loss is still evaluated."""
    keys = {"eval_split": 4, "eval_strategy": "epoch", "evaluation": {"during_training": False}}
    check_context_parallel(load_recipe(write_recipe(**keys)), model_of(LLAMA), 2)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8), "sliding_attention"),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), "self_attn"),
        (LlamaConfig(**SMALL, intermediate_size=64, attn_implementation="eager"), "eager"),
    ],
    ids=["sliding window", "other names", "eager"],
)
def test_models_that_need_a_mask_are_refused(
    config: Any, what: str, write_recipe: Callable[..., Path]
) -> None:
    """Windows, attention that accelerate does not find, and attention other than sdpa."""
    with pytest.raises(InputError, match=what):
        check_context_parallel(load_recipe(write_recipe()), model_of(config), 2)


def test_the_plan_counts_batches_not_processes(write_recipe: Callable[..., Path]) -> None:
    """Two processes read one batch: as many steps as one process, half of the tokens and of the weights a device."""
    path = write_recipe(global_batch_size=8, per_device_train_batch_size=4, padding_free=False)
    recipe = load_recipe(path)
    plans = {}
    for launch, processes in (("single", 1), ("fsdp2", 2), ("fsdp2_cp", 2), ("fsdp2_cp", 4)):
        checked = check_recipe(recipe, launch, processes, progress=False)
        plans[launch, processes] = checked["plan"]
    alone = plans["single", 1]
    shared = plans["fsdp2_cp", 2]
    assert shared["rows a step"] == plans["fsdp2_cp", 4]["rows a step"] == alone["rows a step"] == 8
    assert shared["steps"] == alone["steps"] == 5
    assert shared["processes that share a batch"] == 2
    assert shared["strategy"] == "fsdp2_cp on 2 processes"
    of_device = {name: plan["bytes a device"] for name, plan in plans.items()}
    for part in ("weights", "optimizer"):
        assert of_device["fsdp2_cp", 2][part] == of_device["fsdp2", 2][part]
    halves = of_device["fsdp2_cp", 2]["activations"] / of_device["fsdp2", 2]["activations"]
    assert 0.4 < halves <= 0.51, "half of the tokens, and no mask"
    assert Batch(101, 11, 5000).cut(2) == Batch(51, 6)


def test_accumulation_and_records_count_batches(
    write_recipe: Callable[..., Path], shares_batches: Callable[..., None]
) -> None:
    """Of four processes two read batches: 16 rows a step of 4 rows a batch are two micro-steps."""
    shares_batches()
    recipe = load_recipe(write_recipe(global_batch_size=16, per_device_train_batch_size=4))
    assert accumulation_steps(recipe) == 2
    facts = run_facts(recipe, 4, "data")
    assert (facts["world_size"], facts["global_batch_size"]) == (4, 16)

    class Arguments:
        per_device_train_batch_size = 4
        gradient_accumulation_steps = 2
        world_size = 4

    assert rows_a_step(Arguments()) == 16


def test_rows_are_padded_to_what_can_be_cut(
    write_recipe: Callable[..., Path],
    shares_batches: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unset, `pad_to_multiple_of` is two parts a process; a stated multiple of that is kept."""
    shares_batches()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert row_multiple(2) == 4
    found = sft_config(load_recipe(write_recipe()), processes=1).pad_to_multiple_of
    kept = sft_config(load_recipe(write_recipe(pad_to_multiple_of=8)), 1).pad_to_multiple_of
    assert (found, kept) == (4, 8)


@pytest.mark.parametrize(("rank", "count"), [(0, 8), (1, 0), (2, 8), (3, 0)])
def test_one_process_of_a_group_counts_its_rows(
    rank: int, count: int, write_recipe: Callable[..., Path], shares_batches: Callable[..., None]
) -> None:
    """Both get the whole batch; together they count each row once."""
    path = write_recipe(padding_free=False)
    batch = first_batch(trainer_for(path))
    recipe = load_recipe(path)
    _, data = prepared(recipe)
    shares_batches(rank)
    consumption = Consumption(data, recipe, torch.device("cpu"))
    consumption.count(batch)
    assert int(consumption._counts.sum()) == count
    assert len(consumption.step) == 1, "each can name the rows of a step that went wrong"


def test_every_label_is_predicted_in_one_part(write_recipe: Callable[..., Path]) -> None:
    """Labels shifted before rows are cut, as transformers does it: the parts' losses add up to the batch's, with the
    token behind each cut in one of them. Shifted after, some would be lost.
    """
    keys = {"padding_free": False, "train_on": "all", "pad_to_multiple_of": row_multiple(2)}
    trainer = trainer_for(write_recipe(**keys))
    batch = first_batch(trainer)
    trainer.model.eval()
    labels = batch["labels"]
    shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()
    with torch.no_grad():
        whole = trainer.model(**batch, fused_lm_head=True)
        output = trainer.model(**batch, shift_labels=shifted, fused_lm_head=True)
    length = labels.shape[1]
    order = _HeadTailLoadBalancer(length, 2, "cpu")._generate_indices()[0].long()
    parts = order.split(length // 2)
    losses = [float(output.log_probs[:, part].sum()) for part in parts]
    counts = [int((shifted[:, part] != IGNORE_INDEX).sum()) for part in parts]
    assert sum(losses) == pytest.approx(float(whole.log_probs.sum()), rel=1e-5)
    assert sum(counts) == int((labels[:, 1:] != IGNORE_INDEX).sum()) and min(counts) > 0
    after = sum(int((labels[:, part][:, 1:] != IGNORE_INDEX).sum()) for part in parts)
    assert after < sum(counts)


def test_accelerate_makes_the_mesh_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the option that `train --launch` adds for four processes, as accelerate's launcher reads them."""
    config = str(launch_config("fsdp2_cp"))
    options = ["--config_file", config, "--num_processes", "4"]
    options += ["--parallelism_config_dp_shard_size", "2", "script.py"]
    arguments = launch_command_parser().parse_args(options)
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.use_fsdp and arguments.use_parallelism_config and arguments.fsdp_version == 2
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("PARALLELISM_CONFIG_"):
            monkeypatch.setenv(name, value)
    mesh = ParallelismConfig()
    assert (mesh.cp_size, mesh.dp_shard_size, mesh.total_size) == (2, 2, 4)


def test_the_launch_command_has_the_rest_of_the_mesh(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train --launch fsdp2_cp --num_processes 6` shards over three groups of two."""
    commands: list[list[str]] = []

    def run(command: list[str], _: Path) -> Any:
        commands.append(command)
        return launch_page._Ending(0, {}, [])

    monkeypatch.setattr(launch_page, "_run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch_page.launch_training(write_recipe(), "fsdp2_cp", 6, []) == 0
    (command,) = commands
    place = command.index("--parallelism_config_dp_shard_size")
    assert command[place + 1] == "3" and place < command.index("-m", 3)


@pytest.mark.parametrize(
    ("mesh", "processes", "what"),
    [
        ({"parallelism_config_cp_size": 2}, 3, "3 processes cannot be divided into groups of 2"),
        ({"parallelism_config_cp_size": "two"}, 2, "expected a whole number, got 'two'"),
        ({"parallelism_config_tp_size": 2}, 2, "tp_size is not supported"),
        ({"parallelism_config_sp_size": 2}, 2, "sp_size is not supported"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(
    mesh: dict[str, Any], processes: int, what: str, tmp_path: Path
) -> None:
    """By the line of the file that says so, before anything is launched or planned."""
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "FSDP", "parallelism_config": mesh}))
    with pytest.raises(InputError, match=what) as refused:
        read_strategy(path, processes)
    assert str(refused.value).startswith(f"{path}:2: parallelism_config")
