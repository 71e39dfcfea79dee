"""An adapter that a run cannot go on from as it says is refused with the fix, before a row is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_recipes.errors import InputError
from sft_recipes.path_contents import fingerprint
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.check import check_recipe
from sft_recipes.training.train import train
from tests.conftest import build_model, build_tokenizer
from tests.training.tiny import trainer_for

WEIGHTS = "adapter_model.safetensors"
ON_BASE = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
GOES_ON = {"use_peft": True, "adapter_name_or_path": "./adapter"}


def save_adapter(base: Path, folder: Path, config: Any = None) -> Path:
    """An adapter that no run here made, with numbers in all of its matrices."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config or LoraConfig(r=4, lora_alpha=8, **ON_BASE))
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base_folder: Path, tmp_path: Path) -> Path:
    """Such an adapter beside the recipe."""
    return save_adapter(base_folder, tmp_path / "adapter")


def refused(recipe_file: Path) -> InputError:
    """The refusal of a recipe, of which check and train say the same, with nothing written."""
    recipe = load_recipe(recipe_file)
    with pytest.raises(InputError) as from_check:
        check_recipe(recipe, progress=False)
    with pytest.raises(InputError) as from_train:
        train(recipe)
    assert str(from_check.value) == str(from_train.value)
    assert not recipe.output_dir.exists()
    return from_check.value


def change_weights(adapter: Path, change: Callable[[str, torch.Tensor], None]) -> None:
    """Write into the tensors of an adapter."""
    tensors = load_file(adapter / WEIGHTS)
    for name, tensor in tensors.items():
        change(name, tensor)
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})


# Keys of the recipe beside an adapter of rank 4 and alpha 8 on q_proj and v_proj, the key to blame, and its message.
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "rank": ({"lora_r": 8}, "lora_r", r"was trained with 4\. Fix: write lora_r: 4, or remove"),
    "scale": ({"lora_alpha": 16}, "lora_alpha", r"with 8\. Fix: write lora_alpha: 8"),
    "root": ({"use_rslora": True}, "use_rslora", r"with false\. Fix: write use_rslora: false"),
    "direction": ({"use_dora": True}, "use_dora", "with false"),
    "layers": (
        {"lora_target_modules": ["k_proj"]},
        "lora_target_modules",
        r"is on other layers \(q_proj, v_proj\)\. Fix: remove the key",
    ),
    "fewer layers": ({"lora_target_modules": ["q_proj"]}, "lora_target_modules", "other layers"),
    "whole layers": ({"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save", "other layers"),
    "full": ({"use_peft": None}, "adapter_name_or_path", "no effect with use_peft: not set"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_keys_that_contradict_the_adapter(
    case: str, write_recipe: Callable[..., Path], adapter: Path
) -> None:
    """What scales or places that which was learned is refused under its key and line, with what to write."""
    keys, key, words = CONTRADICTIONS[case]
    error = refused(write_recipe(**{**GOES_ON, **keys}))
    (problem,) = error.problems
    assert problem.field == key and re.search(words, str(problem))
    assert re.match(r".*recipe\.yaml:\d+: ", str(problem))


def test_keys_that_agree_with_the_adapter(write_recipe: Callable[..., Path], adapter: Path) -> None:
    """Stated and equal they are taken; dropout, which is how a stage is trained, may be another. The model gets the
    adapter's numbers, all trainable, and check plans with its size.
    """
    keys = {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["v_proj", "q_proj"],
        "lora_dropout": 0.1,
    }
    path = write_recipe(**GOES_ON, **keys)
    trainer = trainer_for(path)
    assert trainer.model.peft_config["default"].lora_dropout == 0.1
    saved = load_file(adapter / WEIGHTS)
    trained = {
        name.replace(".default", ""): parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], saved[name]) for name in saved)
    plan = check_recipe(load_recipe(write_recipe(**GOES_ON)), progress=False)["plan"]
    assert plan["trained parameters"] == sum(tensor.numel() for tensor in saved.values())


def zero(name: str, tensor: torch.Tensor) -> None:
    """As before any training."""
    if "lora_B" in name:
        tensor.zero_()


def spoil(name: str, tensor: torch.Tensor) -> None:
    """One number that is none."""
    tensor[0, 0] = torch.nan


@pytest.mark.parametrize(("change", "words"), [(zero, "changes nothing"), (spoil, "holds NaN")])
def test_adapter_without_sense(
    change: Callable[[str, torch.Tensor], None],
    words: str,
    write_recipe: Callable[..., Path],
    adapter: Path,
) -> None:
    """One that does nothing would be a fresh one without a word; one with NaN would end in the first step."""
    change_weights(adapter, change)
    assert words in str(refused(write_recipe(**GOES_ON)))


def test_other_bases(
    write_recipe: Callable[..., Path], adapter: Path, base_folder: Path, tmp_path: Path
) -> None:
    """Of other shapes, of other layers, of other weights by content, of another name on the Hub."""
    tokenizer = build_tokenizer()
    wide = tmp_path / "wide"
    tokenizer.save_pretrained(wide)
    build_model(len(tokenizer), hidden_size=64).save_pretrained(wide)
    other = write_recipe(**GOES_ON, model_name_or_path=str(wide))
    assert f"was trained on {base_folder}, whose weights" in str(refused(other))

    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, words in (("/nowhere/base", "size mismatch"), ("me/base", "size mismatch")):
        content = json.dumps({**config, "base_model_name_or_path": name})
        (adapter / "adapter_config.json").write_text(content)
        assert words in str(refused(other))
    content = json.dumps({**config, "target_modules": ["c_attn"]})
    (adapter / "adapter_config.json").write_text(content)
    (problem,) = refused(write_recipe(**GOES_ON)).problems
    assert problem.field == "adapter_name_or_path" and "not found" in problem.what


def test_base_of_a_run_is_known_by_its_content(
    write_recipe: Callable[..., Path], base_folder: Path, tmp_path: Path
) -> None:
    """A copy of the base elsewhere is the base; other weights of the same shapes under its name are not."""
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    here = {"model_name_or_path": str(base), "max_steps": 1}
    run = train(load_recipe(write_recipe(**here, use_peft=True, output_dir="./one")))
    second = {**here, "use_peft": True, "adapter_name_or_path": str(run)}
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    check_recipe(load_recipe(write_recipe(**{**second, "model_name_or_path": str(copy)})))
    before = fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"].mul_(2)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert fingerprint(base) != before
    assert "whose weights or config are others" in str(refused(write_recipe(**second)))


def test_pickled_weights(write_recipe: Callable[..., Path], adapter: Path) -> None:
    """They are not opened; the command of the fix writes them anew, and then the adapter is taken."""
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    before = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    path = write_recipe(**GOES_ON)
    (problem,) = refused(path).problems
    assert "pickled" in problem.what
    command = re.search(r'python -c "(.*)"', problem.fix)
    assert command
    exec(command[1], {})
    after = load_file(adapter / WEIGHTS)
    assert all(torch.equal(after[name], before[name]) for name in before)
    check_recipe(load_recipe(path), progress=False)


def test_folders_that_hold_no_lora(
    write_recipe: Callable[..., Path], base_folder: Path, tmp_path: Path
) -> None:
    """A whole model, an empty folder, one that is not there, another kind of adapter, and an adapter as the model:
    each with what to write instead.
    """
    (tmp_path / "empty").mkdir()
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    save_adapter(base_folder, tmp_path / "ia3", ia3)
    cases = {
        str(base_folder): f"Fix: write model_name_or_path: {base_folder}, and remove",
        "./empty": "holds no adapter",
        "./nowhere": "there is no such run folder",
        "./ia3": "is no LoRA but",
    }
    for name, words in cases.items():
        path = write_recipe(**{**GOES_ON, "adapter_name_or_path": name})
        assert words in str(refused(path)), name
    adapter = save_adapter(base_folder, tmp_path / "adapter")
    path = write_recipe(model_name_or_path="./adapter")
    fix = f"model_name_or_path: {base_folder}, adapter_name_or_path: {adapter} and use_peft: true"
    assert fix in str(refused(path))


DAMAGE = [
    ("adapter_config.json", "{"),
    ("adapter_config.json", "[]"),
    ("adapter_config.json", "{}"),
    ("adapter_config.json", '{"peft_type": "NONE"}'),
    ("adapter_config.json", '{"peft_type": "LORA", "r": "four"}'),
    (WEIGHTS, ""),
    (WEIGHTS, "no tensors"),
]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_damaged_files(
    name: str, content: str, write_recipe: Callable[..., Path], adapter: Path
) -> None:
    """What cannot be read is wrong input, under the key that names it."""
    (adapter / name).write_text(content)
    assert "adapter_name_or_path" in str(refused(write_recipe(**GOES_ON)))


def test_another_chat_template_is_told(write_recipe: Callable[..., Path], adapter: Path) -> None:
    """An adapter that was trained with another template is gone on from, and the note says how to keep its own."""
    path = write_recipe(**GOES_ON)
    assert not _notes(path)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    (note,) = _notes(path)
    assert note.endswith(f"write chat_template: {adapter}/chat_template.jinja")


def _notes(path: Path) -> list[str]:
    notes = check_recipe(load_recipe(path), progress=False)["notes"]
    return [note for note in notes if "chat template" in note]
