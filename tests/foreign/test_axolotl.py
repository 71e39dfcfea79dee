"""What axolotl's keys mean here, by known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.foreign.reading import Group, Reading
from sft_recipes.foreign.translation import translate

FIXTURES = Path(__file__).parent / "fixtures" / "axolotl"
BASE = {"base_model": "a/b", "learning_rate": 2e-4, "micro_batch_size": 1}


def read(name: str) -> Reading:
    """The translation of a fixture."""
    return translate(FIXTURES / f"{name}.yaml", "axolotl")


def read_text(tmp_path: Path, text: str) -> Reading:
    """The translation of a small config with these lines in it."""
    path = tmp_path / "config.yaml"
    head = "base_model: a/b\nmicro_batch_size: 1\nlearning_rate: 2e-4\n"
    data = "datasets:\n  - path: rows.jsonl\n    type: alpaca\n"
    path.write_text(head + ("" if "\ndatasets:" in f"\n{text}" else data) + text)
    return translate(path, "axolotl")


def group_of(reading: Reading, key: str) -> Group:
    """The group of a key."""
    return reading.outcomes[key].group


def found(reading: Reading) -> str:
    """All findings as one text."""
    return "\n".join(str(finding) for finding in reading.findings)


def test_a_lora_config() -> None:
    """Every key of a common config carries over; the split and the packing are said to differ."""
    reading = read("lora")
    assert reading.recipe == {
        "model_name_or_path": "example-org/tiny-base",
        "output_dir": "outputs/lora",
        "dataset_name": "rows/questions.jsonl",
        "format": "instruction",
        "chat_template": "alpaca",
        "eval_split": 0.05,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "max_length": 1024,
        "packing": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "learning_rate": 2e-4,
        "warmup_steps": 0.1,
        "activation_checkpointing": True,
        "eval_strategy": "steps",
        "eval_steps": 0.25,
        "save_strategy": "steps",
        "save_steps": 0.5,
        "save_total_limit": 4,
        "logging_steps": 5,
        "weight_decay": 0.0,
    }
    different = {
        outcome.rule_key for outcome in reading.decided if outcome.group is Group.DIFFERENT
    }
    assert different == {"val_set_size", "sequence_len", "sample_packing", "evals_per_epoch"}
    assert reading.findings == []


def test_a_mixture_of_conversations() -> None:
    """Columns, keys of turns and roles carry over by entry; a builder's name with a file is that file."""
    reading = read("qlora_conversations")
    assert reading.recipe["datasets"] == [
        {
            "path": "example-org/dialogues",
            "format": "messages",
            "split": "train",
            "column_mapping": {"messages": "turns"},
            "message_mapping": {"role": "speaker", "content": "words"},
            "role_mapping": {"assistant": ["bot"], "user": ["customer"]},
        },
        {"path": "rows/extra.jsonl", "format": "messages"},
    ]
    assert reading.recipe["load_in_4bit"] and reading.recipe["use_bnb_nested_quant"]
    assert reading.recipe["eval_split"] == 200
    assert reading.launch == "zero2"
    assert reading.recipe["push_to_hub"] is True
    assert "LoRA at 1e-05" in found(reading)


def test_full_fine_tuning_on_texts() -> None:
    """Texts are `raw`, weights are bfloat16 as axolotl loads them, and an evaluation that never comes is found."""
    reading = read("full")
    assert reading.recipe["format"] == "raw"
    assert reading.recipe["column_mapping"] == {"text": "body"}
    assert reading.recipe["dtype"] == "bfloat16"
    assert reading.recipe["lr_scheduler_type"] == "cosine_with_min_lr"
    assert reading.recipe["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert reading.recipe["eval_strategy"] == "epoch"
    assert reading.launch == "fsdp2"
    assert "it never evaluates" in found(reading)
    assert "no checkpoint before the end" in found(reading)
    assert "weights in bfloat16" in found(reading)
    assert group_of(reading, "fsdp_config.auto_wrap_policy") is Group.DIFFERENT


def test_what_is_wrong_with_a_config_is_found() -> None:
    """Each fault of the fixture has its finding, at its line."""
    text = found(read("odd"))
    for line, key, what in (
        (7, "evals_per_epoch", "no rows are held out"),
        (9, "sequence_lenght", "did you mean 'sequence_len'"),
        (10, "sample_packing", "rows see one another"),
        (11, "train_on_inputs", "prompts are trained"),
        (13, "evaluation_strategy", "reads `eval_strategy`"),
        (5, "chat_template", "no rows are written in it"),
        (3, "datasets", "Alpaca text in a model that was tuned to chat"),
        (12, "learning_rate", "a rate of LoRA"),
    ):
        finding = next(one for one in text.splitlines() if f": {key}: " in one and what in one)
        assert finding.partition(": ")[0].endswith(f"odd.yaml:{line}")


def test_all_blockers_are_named_at_once() -> None:
    """One pass names everything that stands in the way; off keys of the same kind block nothing."""
    reading = read("blocked")
    assert {outcome.rule_key for outcome in reading.blocked} == {
        "trust_remote_code",
        "rl",
        "qat",
        "unfrozen_parameters",
        "tokens",
        "datasets.0.type",
        "context_parallel_size",
        "sage_attention",
    }


def test_a_model_with_its_own_class_needs_no_remote_code() -> None:
    """The flag that says so takes that one block away."""
    path = FIXTURES / "blocked.yaml"
    before = {outcome.rule_key for outcome in translate(path, "axolotl").blocked}
    after = {outcome.rule_key for outcome in translate(path, "axolotl", True).blocked}
    assert before - after == {"trust_remote_code"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "adapter: lora\nload_in_8bit: true\nlora_target_linear: true\n",
            {"load_in_8bit": True, "use_peft": True},
        ),
        ("optimizer: ao_adamw_8bit\n", {"optim": "adamw_torch_8bit"}),
        ("batch_size: 32\nmicro_batch_size_: 1\n", {"gradient_accumulation_steps": 32}),
        ("group_by_length: true\n", {"train_sampling_strategy": "group_by_length"}),
        ("excess_length_strategy: truncate\n", {"overlength": "truncate"}),
        ("gradient_checkpointing: offload\n", {"activation_checkpointing": True}),
        (
            "",
            {
                "max_length": 512,
                "num_train_epochs": 1,
                "warmup_steps": 0.03,
                "activation_checkpointing": False,
            },
        ),
        (
            "chat_template_jinja: '{{ messages }}'\ndatasets:\n  - {path: a, type: chat_template}\n",
            {"chat_template": "./chat_template.jinja"},
        ),
        (
            "test_datasets:\n  - {path: rows.jsonl, split: test, type: alpaca}\n",
            {"dataset_test_split": "test"},
        ),
        ("use_wandb: true\nwandb_name: mine\n", {"report_to": ["wandb"], "run_name": "mine"}),
        (
            "adapter: qlora\nload_in_4bit: true\nbnb_config_kwargs: {bnb_4bit_use_double_quant: false}\n",
            {"use_bnb_nested_quant": False},
        ),
        (
            "datasets:\n  - {path: a.jsonl, type: alpaca, split: 'train[:10%]'}\n",
            {"datasets": None, "weight": 0.1, "dataset_train_split": "train"},
        ),
        (
            "datasets:\n  - {path: a.jsonl, type: alpaca, split: 'train[:500]'}\n",
            {"max_rows": 500, "dataset_train_split": "train"},
        ),
        (
            "val_set_size: 0.1\nearly_stopping_patience: 3\neval_steps: 50\nsave_steps: 50\n",
            {"load_best_model_at_end": True},
        ),
        # Rows to evaluate in another file: none are evaluated during training.
        (
            "test_datasets:\n  - {path: val.jsonl, type: alpaca}\neval_steps: 50\n",
            {"eval_strategy": None, "eval_steps": None, "dataset_test_split": None},
        ),
        # The optimizer has float32 weights under ZeRO and FSDP1, and not under FSDP2.
        ("bf16: true\ndeepspeed: zero2.json\n", {"dtype": None, "bf16": True}),
        ("bf16: true\nfsdp: [full_shard]\n", {"dtype": None}),
        (
            "bf16: true\nfsdp_version: 2\nfsdp_config: {offload_params: false}\n",
            {"dtype": "bfloat16"},
        ),
        ("weight_decay: '1e-2'\n", {"weight_decay": 0.01}),
    ],
)
def test_values_that_need_a_rule(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    """The keys of ours that these keys of theirs set, and the defaults of axolotl where ours are others."""
    recipe = read_text(tmp_path, text).recipe
    assert {key: recipe.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "adapter: llama-adapter\n",
        "load_in_4bit: true\n",
        "lr_scheduler: rex\n",
        "optimizer: muon\n",
        "optimizer: no_such_optimizer\n",
        "plugins: [mine.Plugin]\n",
        "plugins: [axolotl.integrations.kd.KDPlugin]\n",
        "datasets:\n  - {path: a, type: {format: '{instruction}'}}\n",
        "datasets:\n  - {path: a}\n",
        "datasets:\n  - {path: a, type: alpaca}\n  - {path: b, type: chat_template}\n",
        "deepspeed: my.json\n",
        "warmup_steps: 10\nwarmup_ratio: 0.1\n",
        "datasets:\n  - {path: a, type: chat_template, roles_to_train: []}\n",
        "datasets:\n  - {path: a, type: chat_template, roles_to_train: [assistant, user]}\n",
        "datasets:\n  - {path: a, type: alpaca, split: train+test}\n",
    ],
)
def test_what_is_not_done_here_blocks(tmp_path: Path, text: str) -> None:
    """No recipe comes of a config that asks for it."""
    assert read_text(tmp_path, text).blocked


def test_what_nearly_carries_over_is_called_different(tmp_path: Path) -> None:
    """Prompts trained in conversations, and weights that axolotl moves to the CPU, are not the same here."""
    chat = "train_on_inputs: true\ndatasets:\n  - {path: a, type: chat_template}\n"
    reading = read_text(tmp_path, chat)
    assert group_of(reading, "train_on_inputs") is Group.DIFFERENT
    reading = read_text(tmp_path, "fsdp_config: {offload_params: true}\n")
    assert "nothing moves to the CPU" in reading.outcomes["fsdp_config.offload_params"].say


def test_a_config_is_not_blamed_for_what_is_fine(tmp_path: Path) -> None:
    """PAD as EOS masks nothing in axolotl, other files are evaluated, and data that is not read is not judged."""
    text = (
        "adapter: lora\nlora_target_linear: true\n"
        "special_tokens: {pad_token: </s>, eos_token: </s>}\n"
        "test_datasets:\n  - {path: val.jsonl, type: alpaca}\n"
    )
    assert found(read_text(tmp_path, text)) == ""
    preferences = (
        "adapter: lora\nlora_target_linear: true\nrl: dpo\nchat_template: llama3\nval_set_size: 0.1\neval_steps: 5\n"
        "datasets:\n  - {path: a, type: chat_template.default}\n"
    )
    assert found(read_text(tmp_path, preferences)) == ""


def test_blockers_inside_a_data_set_are_all_named(tmp_path: Path) -> None:
    """A type that is not read does not hide what else stands in the way."""
    text = "datasets:\n  - {path: a, type: oasst, roles_to_train: [user], split: a+b}\n"
    keys = {outcome.rule_key for outcome in read_text(tmp_path, text).blocked}
    assert keys == {"datasets.0.type", "datasets.0.roles_to_train", "datasets.0.split"}


def test_a_switched_off_key_blocks_nothing(tmp_path: Path) -> None:
    """null, false, 0 and empty lists of refused keys are without effect."""
    reading = read_text(
        tmp_path,
        "rl: null\nqat:\ngptq: false\ntokens: []\ncontext_parallel_size: 1\nrelora: false\n",
    )
    assert not reading.blocked
    assert group_of(reading, "gptq") is Group.NO_EFFECT


def test_the_zero_stage_is_read_from_the_file(tmp_path: Path) -> None:
    """A DeepSpeed file beside the config says its stage, whatever its name."""
    (tmp_path / "ds.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}'
    )
    assert read_text(tmp_path, "deepspeed: ds.json\n").launch == "zero3_offload"


def test_a_value_that_no_rule_can_use_is_the_config_s_fault(tmp_path: Path) -> None:
    """A batch of nothing and a word for a number are errors with their line, not faults of the program."""
    for text, line in (
        ("batch_size: 8\nmicro_batch_size: 0\n", 1),
        ("val_set_size: 0.1\nevals_per_epoch: many\n", 2),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(f"{text}base_model: a/b\nlearning_rate: 1e-4\n")
        with pytest.raises(InputError, match=rf"config.yaml:{line}: .*does not hold what belongs"):
            translate(path, "axolotl")


def test_a_blocked_config_has_its_other_faults_named_too(tmp_path: Path) -> None:
    """What our keys refuse is said in the same pass as what is not done here."""
    reading = read_text(tmp_path, "rl: dpo\nweight_decay: heavy\n")
    assert {outcome.rule_key for outcome in reading.blocked} == {"rl", "weight_decay"}
