"""Tokenizer, config and generation config agree on how an answer ends, before training and in the saved folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipes import models
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.errors import InputError
from sft_recipes.models import check_vocabulary, load_for_inference
from sft_recipes.recipe import TemplateSettings
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import train
from tests.conftest import build_model, build_tokenizer
from tests.training.tiny import trainer_for

CONVERSATION = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
]


def without_template(tokenizer: Any) -> None:
    """(a) A base model without chat template; PAD is a token of its own."""


def chatml_with_other_eos(tokenizer: Any) -> None:
    """(b) ChatML, whose turns end in <|im_end|>, on a base whose EOS is <|endoftext|>."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def no_pad_token(tokenizer: Any) -> None:
    """(c) A tokenizer that names no PAD."""
    tokenizer.pad_token = None


def pad_equals_eos(tokenizer: Any) -> None:
    """(d) A tokenizer whose PAD is its EOS."""
    tokenizer.pad_token = tokenizer.eos_token


@pytest.mark.parametrize(
    "change", [without_template, chatml_with_other_eos, no_pad_token, pad_equals_eos]
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_saved_folder_agrees_on_special_tokens(
    write_recipe: Callable[..., Path], tmp_path: Path, change: Callable[[Any], None], lora: bool
) -> None:
    """After training, tokenizer, config.json and generation_config.json name the same EOS and PAD, PAD is no end of a
    turn, the vocabulary is as large as before, and the reloaded template renders the ids that were trained."""
    tokenizer = build_tokenizer()
    change(tokenizer)
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    model = build_model(len(tokenizer))
    # What many bases bring along: ids that belong to nobody in particular.
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    model.save_pretrained(base)
    keys = {"use_peft": True, "lora_r": 2} if lora else {}
    recipe = load_recipe(write_recipe(model_name_or_path="./base", max_steps=1, **keys))
    renderer = attach_chat_template(load_tokenizer(recipe.model_name), recipe.template)
    trained_text, trained_ids = renderer.render(CONVERSATION), None
    trained_ids = renderer.tokenizer(trained_text, add_special_tokens=False)["input_ids"]
    run = train(recipe)

    saved = AutoTokenizer.from_pretrained(run)
    assert len(saved) == len(tokenizer)
    end = "<|im_end|>" if change is chatml_with_other_eos else "<|endoftext|>"
    assert saved.eos_token == end and saved.pad_token_id not in (None, *renderer.stop_ids)
    generation = json.loads((run / "generation_config.json").read_text())
    stops = generation["eos_token_id"]
    assert (stops if isinstance(stops, list) else [stops]) == list(renderer.stop_ids)
    assert (
        saved.eos_token_id == renderer.stop_ids[0]
        and generation["pad_token_id"] == saved.pad_token_id
    )
    if not lora:
        config = json.loads((run / "config.json").read_text())
        assert (config["eos_token_id"], config["pad_token_id"]) == (
            saved.eos_token_id,
            saved.pad_token_id,
        )
        reloaded = AutoModelForCausalLM.from_pretrained(run)
        assert reloaded.get_input_embeddings().weight.shape[0] == len(tokenizer)
        assert reloaded.generation_config.eos_token_id == stops
    ids = saved.apply_chat_template(CONVERSATION, return_dict=False)
    assert ids == trained_ids
    assert ids[-1] == saved.eos_token_id or ids[-2] == saved.eos_token_id
    loaded = load_for_inference(str(run))
    assert loaded.kind == ("adapter" if lora else "model") and not loaded.model.training


def test_chatml_keeps_the_old_eos_as_a_stop() -> None:
    """Where the end of turn differs from the base's EOS, the end of turn becomes EOS and stands first."""
    tokenizer = build_tokenizer()
    renderer = attach_chat_template(tokenizer, TemplateSettings("chatml"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert renderer.stop_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("special", "expected"),
    [(["<|reserved_1|>", "<unk>"], "<|reserved_1|>"), (["<unk>"], "<unk>"), ([], None)],
)
def test_pad_is_an_existing_token(special: list[str], expected: str | None) -> None:
    """Without a PAD, a reserved token is taken, else the unknown token, else any id that ends no turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {
        letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", extra_special_tokens=special
    )
    size = len(tokenizer)
    renderer = attach_chat_template(tokenizer, TemplateSettings())
    assert len(tokenizer) == size
    assert tokenizer.pad_token_id not in (None, *renderer.stop_ids)
    assert expected is None or tokenizer.pad_token == expected


def test_tokenizer_longer_than_embedding_is_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, base_folder: Path
) -> None:
    """A tokenizer with more ids than the embedding has rows is refused with both numbers, before any step."""
    tokenizer = build_tokenizer()
    size = len(tokenizer)
    build_model(size).save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<|extra_1|>", "<|extra_2|>"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(
        InputError, match=f"the tokenizer has {size + 2} ids, the embedding {size} rows"
    ):
        train(load_recipe(write_recipe(model_name_or_path="./base")))
    check_vocabulary(build_model(size + 64), tokenizer)  # padded embeddings are common and fine


@pytest.mark.parametrize("dora", [False, True])
def test_a_loaded_adapter_is_the_one_that_was_trained(
    write_recipe: Callable[..., Path], dora: bool
) -> None:
    """An adapter folder loads to the trained model's logits, which are not the base's; DoRA's magnitudes included."""
    trainer: Any = trainer_for(
        write_recipe(max_steps=2, learning_rate=0.05, use_peft=True, use_dora=dora)
    )
    trainer.train()
    trainer.save_model()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        trained = trainer.model.eval()(ids).logits
        loaded = load_for_inference(str(trainer.args.output_dir)).model(ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(ids).logits
    assert torch.equal(loaded, trained)
    assert (base - trained).abs().max() > 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_answers_in_bfloat16_where_a_cpu_has_it(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    """A large model's weights are bfloat16 then, an adapter merged before; its positions keep their precision, its
    logits differ by rounding alone. A stated precision is taken, and no small model is changed."""
    trainer: Any = trainer_for(write_recipe(max_steps=2, learning_rate=0.05, use_peft=lora))
    trainer.train()
    trainer.save_model()
    folder = str(trainer.args.output_dir)
    monkeypatch.setattr(models, "cpu_has_bf16", lambda: True)
    assert load_for_inference(folder).model.dtype == torch.float32
    monkeypatch.setattr(models, "SMALLEST_BF16_MODEL", 1)
    plain = load_for_inference(folder, "float32").model
    fast = load_for_inference(folder).model
    assert {parameter.dtype for parameter in fast.parameters()} == {torch.bfloat16}
    assert not hasattr(fast, "peft_config")
    assert fast.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        difference = (fast(ids).logits - plain(ids).logits).abs().max()
    assert 0 < difference < 0.1


def test_a_trained_prompt_has_nothing_to_merge(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that another tool made and that is no change of weights loads in bfloat16, too."""
    from peft import PromptTuningConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "prompt")
    build_tokenizer().save_pretrained(tmp_path / "prompt")
    monkeypatch.setattr(models, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(models, "SMALLEST_BF16_MODEL", 1)
    assert load_for_inference(str(tmp_path / "prompt")).model.peft_config


@pytest.mark.parametrize("files", [[], ["recipe.yaml"]])
def test_folder_without_model_is_refused(tmp_path: Path, files: list[str]) -> None:
    """A folder that holds no model, or an unfinished run, is refused with what to do."""
    for name in files:
        (tmp_path / name).write_text("")
    fix = "let the run finish first" if files else "name a folder with config.json"
    with pytest.raises(InputError, match=f"the folder holds no model.*{fix}"):
        load_for_inference(str(tmp_path))
