"""What torchtune's keys mean here, by known answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_recipes.foreign.interpolation import Interpolation
from sft_recipes.foreign.reading import Group, Reading
from sft_recipes.foreign.translation import translate

FIXTURES = Path(__file__).parent / "fixtures" / "torchtune"
MODEL = """\
model: {_component_: torchtune.models.llama2.llama2_7b}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: /nowhere/Llama-2-7b-hf}
batch_size: 1
epochs: 1
"""
TOKENIZER = "tokenizer: {_component_: torchtune.models.llama2.llama2_tokenizer}\n"
DATASET = "dataset: {_component_: torchtune.datasets.instruct_dataset, source: org/rows}\n"


def read(name: str) -> Reading:
    """The translation of a fixture."""
    return translate(FIXTURES / f"{name}.yaml", "torchtune")


def read_text(tmp_path: Path, text: str) -> Reading:
    """The translation of a small config with these lines in it, whatever it needs beside them."""
    path = tmp_path / "config.yaml"
    lines = MODEL
    for block in (TOKENIZER, DATASET):
        if block.partition(":")[0] not in text:
            lines += block
    path.write_text(
        "".join(line for line in lines.splitlines(True) if _key(line) not in text) + text
    )
    return translate(path, "torchtune")


def _key(line: str) -> str:
    return line.partition(":")[0] + ":"


def found(reading: Reading) -> str:
    """All findings as one text."""
    return "\n".join(str(finding) for finding in reading.findings)


def said(reading: Reading, key: str) -> str:
    """What is said of a key that is different or in the way."""
    return reading.outcomes[key].say


def test_full_fine_tuning() -> None:
    """Names in values are resolved, steps of each epoch added up, defaults of the builders written out."""
    reading = read("full")
    assert reading.recipe == {
        "output_dir": "/nowhere/runs/full",
        "packing": False,
        "dataset_name": "yahma/alpaca-cleaned",
        "format": "instruction",
        "dataset_train_split": "train[:10%]",
        "model_name_or_path": "example-org/Llama-3-Tiny-Instruct",
        "seed": 7,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "save_strategy": "epoch",
        "max_steps": 150,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 1.0,
        "optim": "paged_adamw_8bit",
        "learning_rate": 2e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "dtype": "bfloat16",
        "activation_checkpointing": True,
        "activation_offloading": False,
        "report_to": "wandb",
        "logging_steps": 5,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "max_length": None,
    }
    assert reading.launch == "fsdp2"
    assert reading.outcomes["folder"].group is Group.NO_EFFECT
    findings = found(reading)
    assert "prompts are trained: `train_on_input` is true in `alpaca_cleaned_dataset`" in findings
    assert "the Alpaca prompt stands inside the Llama 3 headers" in findings
    assert (
        "full.yaml:50: memory_efficient_fsdp_wrap: no recipe of torchtune 0.6 reads it" in findings
    )
    assert "did you mean 'log_every_n_steps'" in findings


def test_qlora_on_a_file() -> None:
    """A builder of QLoRA is a 4-bit base under an adapter; a file type with a file is the file."""
    reading = read("qlora")
    recipe = reading.recipe
    assert recipe["dataset_name"] == "rows/questions.json"
    assert recipe["column_mapping"] == {"prompt": "question", "completion": "answer"}
    assert recipe["lora_target_modules"] == [
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
        "up_proj",
    ]
    numbers = {
        key: recipe[key] for key in ("lora_r", "lora_alpha", "lora_dropout", "max_grad_norm")
    }
    assert numbers == {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "max_grad_norm": 0}
    assert recipe["load_in_4bit"] and recipe["use_bnb_nested_quant"] and recipe["use_peft"]
    assert recipe["model_name_or_path"] == "mistralai/Mistral-7B-v0.1"
    assert recipe["system_prompt"] == "Be brief." and recipe["max_steps"] == 20
    assert recipe["train_sampling_strategy"] == "sequential" and recipe["use_cpu"] is True
    assert reading.launch is None
    assert "its last token becomes EOS: a stop there is trained" in found(reading)
    assert "optimizer_in_bwd: recipes of LoRA never read it" in found(reading)
    assert "prompts" not in found(reading)


def test_sets_of_conversations() -> None:
    """Several builders become `datasets`; Phi's fused layers share an adapter; its answers have no end."""
    reading = read("conversations")
    assert reading.recipe["datasets"] == [
        {
            "path": "example-org/chats",
            "format": "messages",
            "column_mapping": {"messages": "turns"},
            "name": "short",
            "split": "train_sft",
        },
        {"path": "Open-Orca/SlimOrca-Dedup", "format": "sharegpt"},
    ]
    fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert reading.recipe["lora_target_modules"] == fused
    assert "zero3_offload" in said(reading, "fsdp_cpu_offload") and reading.launch == "fsdp2"
    assert "train_on: all" in said(reading, "dataset.0.train_on_input")
    assert "`phi4_tokenizer` writes no <|im_end|> behind an answer" in found(reading)


def test_a_prompt_template_becomes_a_file() -> None:
    """Texts around the turns are written as torchtune writes them: BOS, the texts, EOS behind the answer."""
    reading = read("text")
    assert reading.recipe["chat_template"] == "./chat_template.jinja"
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        reading.files["chat_template.jinja"]
    )
    turns = [("system", "S. "), ("user", "Two?"), ("assistant", "Yes."), ("user", "Sure?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = template.render(messages=messages, bos_token="<bos>", eos_token="<eos>")
    answered = "<bos>S. Question: Two?\n\nAnswer: Yes.\n<eos>"
    assert text == f"{answered}<bos>Question: Sure?\n\nAnswer: "
    assert reading.recipe["dtype"] == "float32" and reading.recipe["bf16"] is False


def test_all_that_stands_in_the_way_is_said_at_once() -> None:
    """Each blocker has its reason, and what belongs to a blocked key is not counted again."""
    blocked = {outcome.rule_key for outcome in read("blocked").blocked}
    assert blocked >= {
        "output_dir",
        "tokenizer._component_",
        "dataset.conversation_style",
        "dataset.filter_fn",
        "dataset.revision",
        "model._component_",
        "teacher_model",
        "loss._component_",
        "quantizer",
        "checkpointer._component_",
        "checkpointer.adapter_checkpoint",
        "checkpointer.recipe_checkpoint",
        "max_steps_per_epoch",
        "optimizer._component_",
        "lr_scheduler._component_",
        "tensor_parallel_dim",
        "dtype",
    }


@pytest.mark.parametrize(
    ("builder", "why"),
    [
        ("torchtune.models.llama3_2_vision.lora_llama3_2_vision_11b", "a model of images"),
        ("torchtune.models.llama2.llama2_reward_7b", "a reward model"),
        ("my.models.tiny", "code of your own"),
    ],
)
def test_models_that_are_not_built_here(tmp_path: Path, builder: str, why: str) -> None:
    """Images, rewards and code of one's own stand in the way."""
    reading = read_text(tmp_path, f"model:\n  _component_: {builder}\n")
    assert why in said(reading, "model._component_")
    assert reading.outcomes["model._component_"].group is Group.BLOCKED


@pytest.mark.parametrize(
    ("builder", "rows"),
    [
        ("stack_exchange_paired_dataset", "a chosen and a rejected answer"),
        ("multimodal.the_cauldron_dataset", "rows with images"),
        ("mine_dataset", "is not known here"),
    ],
)
def test_rows_that_are_not_read(tmp_path: Path, builder: str, rows: str) -> None:
    """Preferences, images and builders of one's own stand in the way."""
    reading = read_text(tmp_path, f"dataset:\n  _component_: torchtune.datasets.{builder}\n")
    assert rows in said(reading, "dataset._component_") and reading.blocked


@pytest.mark.parametrize(
    ("lines", "ours"),
    [
        (
            "source: json\n  data_files: [a.json, b.json]",
            {"path": "json", "data_files": ["a.json", "b.json"]},
        ),
        ("source: ./rows.json", {"path": "rows.json"}),
        ("source: org/rows\n  name: small", {"path": "org/rows", "name": "small"}),
    ],
)
def test_where_rows_come_from(tmp_path: Path, lines: str, ours: dict[str, Any]) -> None:
    """Files of a type, a file, and a set of the Hub with a configuration."""
    reading = read_text(
        tmp_path, f"dataset:\n  _component_: torchtune.datasets.instruct_dataset\n  {lines}\n"
    )
    columns = {"prompt": "input", "completion": "output"}
    rest = {"format": "prompt_completion", "column_mapping": columns}
    named = {"path": "dataset_name", "name": "dataset_config"}
    if "data_files" in ours:
        assert reading.recipe["datasets"] == [{**ours, **rest}]
    else:
        top = {named.get(key, key): value for key, value in {**ours, **rest}.items()}
        assert {key: reading.recipe[key] for key in top} == top


def test_part_of_a_file_is_not_read(tmp_path: Path) -> None:
    """A slice of a set of the Hub is, one of a file is not."""
    text = "dataset:\n  _component_: torchtune.datasets.instruct_dataset\n  source: {}\n  split: train[:5%]\n"
    assert not read_text(tmp_path, text.format("org/rows")).blocked
    reading = read_text(tmp_path, text.format("json\n  data_files: rows.json"))
    assert "max_rows" in said(reading, "dataset.split") and reading.blocked


def test_a_model_that_is_there_is_taken(tmp_path: Path) -> None:
    """A folder with config.json is the model, that of Meta's files inside it as well; else the Hub has it."""
    folder = tmp_path / "Llama-2-7b-hf"
    (folder / "original").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({}))
    for name in ("", "original/"):
        reading = read_text(tmp_path, f"checkpointer:\n  checkpoint_dir: {folder}/{name}\n")
        assert reading.recipe["model_name_or_path"] == str(folder)
        assert reading.outcomes["checkpointer.checkpoint_dir"].group is Group.SAME
    reading = read_text(tmp_path, "checkpointer:\n  checkpoint_dir: /nowhere/Llama-2-7b-hf\n")
    assert reading.recipe["model_name_or_path"] == "meta-llama/Llama-2-7b-hf"
    reading = read_text(tmp_path, "checkpointer:\n  checkpoint_dir: /nowhere/mine\n")
    assert reading.recipe["model_name_or_path"] == "/nowhere/mine"


@pytest.mark.parametrize(
    ("folder", "template"), [("Llama-2-7b-hf", "alpaca"), ("Llama-2-7b-chat-hf", None)]
)
def test_the_alpaca_prompt_inside_another(
    tmp_path: Path, folder: str, template: str | None
) -> None:
    """A base takes the Alpaca prompt alone, a chat model its own template alone; the mixture is found."""
    reading = read_text(
        tmp_path,
        "dataset: {_component_: torchtune.datasets.alpaca_dataset, train_on_input: false}\n"
        f"checkpointer:\n  checkpoint_dir: /nowhere/{folder}\n",
    )
    assert reading.recipe.get("chat_template") == template
    assert "the Alpaca prompt stands inside [INST]" in found(reading)
    assert "prompts are trained" not in found(reading)


def test_bare_alpaca_text_is_the_same(tmp_path: Path) -> None:
    """Gemma's tokenizer writes nothing else around it."""
    text = "dataset: {_component_: torchtune.datasets.alpaca_dataset}\n"
    text += "tokenizer: {_component_: torchtune.models.gemma.gemma_tokenizer}\n"
    reading = read_text(tmp_path, text)
    assert reading.recipe["chat_template"] == "alpaca" and "stands inside" not in found(reading)
    assert reading.outcomes["tokenizer._component_"].group is Group.SAME


def test_names_in_values() -> None:
    """A value that is one name keeps its type, names inside others are filled in, circles and strangers are told."""
    tree = {
        "a": {"b": 3},
        "whole": "${a.b}",
        "part": "n${a.b}/${whole}",
        "list": ["${list.1}", "x"],
        "circle": "${circle}",
        "stranger": "${oc.env:HOME}",
        "missing": "${a.c}",
    }
    filled = Interpolation(tree)
    assert filled.tree["whole"] == 3 and filled.tree["part"] == "n3/3"
    assert filled.tree["list"] == ["x", "x"]
    assert filled.unknown == {"circle", "stranger", "missing"}
    assert filled.used == {"a.b", "whole", "list.1", "circle"}
