"""A mixture of experts: its experts get gradients where rows pass through them, and how many are trained is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, PretrainedConfig

from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.check import check_recipe, check_text
from sft_recipes.training.experts import count_experts
from sft_recipes.training.train import train
from tests.conftest import build_tokenizer
from tests.tiny_architectures import SHAPE, build_base
from tests.training.tiny import first_batch, trainer_for

EXPERTS = 4
LORA = {
    "use_peft": True,
    "lora_r": 2,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE: two layers of four experts, two of which a token passes through. Read only."""
    return build_base("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss, whose experts peft reaches by no name of a layer. Read only."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    config: PretrainedConfig = GptOssConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def only_through(chosen: Sequence[int]) -> Callable[..., Any]:
    """A hook for routers: every token passes through these experts, in equal parts."""

    def route(_: Any, __: Any, routed: Any) -> Any:
        logits, scores, indices = routed
        tokens = len(indices)
        picked = torch.tensor(chosen).expand(tokens, len(chosen))
        return logits, torch.full_like(scores, 1 / len(chosen)), picked

    return route


def parts_with_gradient(model: torch.nn.Module) -> dict[str, list[int]]:
    """Of each trained tensor in the experts: which of them have a gradient that is not zero in it.

    A weight and its adapter's A have the experts in front; the columns of B go through them in turn.
    """
    reached: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".experts." not in name or not parameter.requires_grad:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if "lora_B" in name:
            gradient = gradient.T.reshape(-1, EXPERTS, gradient.shape[0]).transpose(0, 1)
        sizes = gradient.reshape(EXPERTS, -1).abs().amax(dim=1)
        reached[name] = sizes.nonzero().flatten().tolist()
    return reached


@pytest.mark.parametrize("chosen", [(0, 1), (1, 3), (2, 0)])
@pytest.mark.parametrize(
    "keys", [{}, {**LORA, "lora_target_parameters": BOTH}], ids=["full", "lora"]
)
def test_experts_that_rows_pass_through_get_a_gradient(
    keys: dict[str, Any],
    chosen: tuple[int, int],
    write_recipe: Callable[..., Path],
    qwen3_moe: Path,
) -> None:
    """With the router forced, known answers: in every expert tensor of every layer the chosen experts have a gradient
    and the others have none; under LoRA neither the experts' own weights nor the router are trained.
    """
    trainer = trainer_for(write_recipe(model_name_or_path=str(qwen3_moe), **keys))
    model = trainer.model.train()
    fill_adapters(model)
    for module in model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.register_forward_hook(only_through(chosen))
    trainer.compute_loss(model, first_batch(trainer)).backward()
    reached = parts_with_gradient(model)
    tensors = 2 * 2 * (2 if keys else 1)
    assert len(reached) == tensors
    assert set(map(tuple, reached.values())) == {tuple(sorted(chosen))}
    if keys:
        assert all("lora_" in name for name in reached)
        router = [name for name, _ in model.named_parameters() if ".mlp.gate." in name]
        assert router and not any(model.get_parameter(name).requires_grad for name in router)


def fill_adapters(model: torch.nn.Module) -> None:
    """LoRA starts with B = 0, which gives A no gradient."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_all_experts_learn(write_recipe: Callable[..., Path], qwen3_moe: Path) -> None:
    """As the model routes them, its rows pass through all experts, and every part of every expert tensor is reached."""
    keys = {**LORA, "lora_target_parameters": BOTH}
    trainer = trainer_for(write_recipe(model_name_or_path=str(qwen3_moe), **keys))
    model = trainer.model.train()
    fill_adapters(model)
    for batch in trainer.get_train_dataloader():
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()
    reached = parts_with_gradient(model)
    assert len(reached) == 8
    assert all(experts == list(range(EXPERTS)) for experts in reached.values())


# Keys of a recipe, how many of the four expert tensors get an adapter, and whether the router does.
COVERED: dict[str, tuple[dict[str, Any], int, bool]] = {
    "both": ({"lora_target_parameters": BOTH}, 4, False),
    "one": ({"lora_target_parameters": BOTH[1:]}, 2, False),
    "none": ({}, 0, False),
    # peft turns names of layers that older versions of transformers had into those of parameters.
    "by old names": (
        {"lora_target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        4,
        False,
    ),
    "all linear": ({"lora_target_modules": None}, 4, True),
}


# peft warns of a pattern that it made itself, and applies it.
TRANSLATED = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")


@TRANSLATED
@pytest.mark.parametrize("case", COVERED)
def test_coverage_is_counted(
    case: str,
    write_recipe: Callable[..., Path],
    qwen3_moe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check and banner say how many expert tensors LoRA is on, and what to write where it is on none."""
    keys, count, router = COVERED[case]
    path = write_recipe(model_name_or_path=str(qwen3_moe), **{**LORA, **keys}, max_steps=1)
    line = f"4 x 2 layers, LoRA on {count} of 4 expert tensors{' and on the router' * router}"
    checked = check_text(check_recipe(load_recipe(path), progress=False))
    train(load_recipe(path))
    printed = capsys.readouterr().out
    advice = f"to train them, write lora_target_parameters: [{BOTH[0]}, {BOTH[1]}]"
    assert line in checked and f"experts     {line}\n" in printed
    assert (advice in checked) == (advice in printed) == (count == 0)


def test_all_linear_that_passes_experts_by(
    write_recipe: Callable[..., Path], gpt_oss: Path
) -> None:
    """Where peft knows them by no layer's name, `all-linear` says so; the keys of the advice adapt them all."""
    keys = {**LORA, "lora_target_modules": None, "model_name_or_path": str(gpt_oss)}
    checked = check_recipe(load_recipe(write_recipe(**keys)), progress=False)
    assert checked["plan"]["experts"] == "4 x 2 layers, LoRA on 0 of 4 expert tensors"
    (note,) = [note for note in checked["notes"] if "experts" in note]
    assert "write lora_target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]" in note
    advised = load_recipe(write_recipe(**keys, lora_target_parameters=BOTH))
    plan = check_recipe(advised, progress=False)["plan"]
    assert plan["experts"] == "4 x 2 layers, LoRA on 4 of 4 expert tensors"


# Keys that name experts, and the key to blame.
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "pattern of parameters": (
        {"lora_target_parameters": ["mlp.experts.*"]},
        "lora_target_parameters",
    ),
    "misspelt": ({"lora_target_parameters": ["mlp.experts.up_proj"]}, "lora_target_parameters"),
    "pattern of layers": (
        {"lora_target_modules": ["q_proj", r".*experts\.\d+\.up_proj"]},
        "lora_target_modules",
    ),
    "the module": ({"lora_target_modules": ["mlp.experts"]}, "lora_target_modules"),
}


@pytest.mark.parametrize("case", NAMED)
def test_experts_that_are_named_and_get_no_adapter(
    case: str, write_recipe: Callable[..., Path], qwen3_moe: Path
) -> None:
    """Refused at the key, with the parameters that this model's experts are."""
    keys, key = NAMED[case]
    path = write_recipe(model_name_or_path=str(qwen3_moe), **{**LORA, **keys})
    with pytest.raises(InputError) as refused:
        check_recipe(load_recipe(path), progress=False)
    (problem,) = refused.value.problems
    assert problem.field == key
    assert "gate_up_proj" in problem.fix and "down_proj" in problem.fix


def test_dropout_on_experts_is_refused_with_the_fix(
    write_recipe: Callable[..., Path], qwen3_moe: Path
) -> None:
    """`all-linear` reaches experts, which peft adapts without dropout only: the fix is about dropout."""
    keys = {"use_peft": True, "lora_dropout": 0.1, "model_name_or_path": str(qwen3_moe)}
    with pytest.raises(InputError, match=r"lora_dropout: .* Fix: set it to 0\.0"):
        check_recipe(load_recipe(write_recipe(**keys)), progress=False)


def test_a_model_without_experts(write_recipe: Callable[..., Path]) -> None:
    """Has no line about them; full fine-tuning of one with experts trains them all."""
    checked = check_recipe(load_recipe(write_recipe(use_peft=True)), progress=False)
    assert "experts" not in checked["plan"]


def test_full_fine_tuning_trains_all_experts(qwen3_moe: Path) -> None:
    """The count is of what is trained, with or without an adapter."""
    counted = count_experts(AutoModelForCausalLM.from_pretrained(qwen3_moe))
    assert str(counted) == "4 x 2 layers, 4 of 4 expert tensors trained"
    assert counted and not list(counted.notes())


@TRANSLATED
@pytest.mark.parametrize("case", ["both", "all linear"])
def test_a_second_stage_goes_on_from_experts(
    case: str, write_recipe: Callable[..., Path], qwen3_moe: Path
) -> None:
    """The adapter of a mixture is gone on from with every number, also where peft translated its names."""
    keys = {**LORA, **COVERED[case][0], "learning_rate": 0.1}
    here = {"model_name_or_path": str(qwen3_moe), "max_steps": 1}
    one = train(load_recipe(write_recipe(**here, **keys, output_dir="./one")))
    two = trainer_for(write_recipe(**here, use_peft=True, adapter_name_or_path=str(one)))
    saved = load_file(one / "adapter_model.safetensors")
    started = get_peft_model_state_dict(two.model)
    assert started.keys() == saved.keys() and any("experts" in name for name in saved)
    assert all(torch.equal(started[name], saved[name]) for name in saved)
