"""What LLaMA-Factory's keys mean here, by known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.foreign.reading import Group, Reading
from sft_recipes.foreign.translation import translate

FIXTURES = Path(__file__).parent / "fixtures" / "llamafactory"
HEAD = {
    "model_name_or_path": "a/b",
    "output_dir": "out",
    "do_train": "true",
    "dataset": "alpaca_en",
    "template": "llama3",
}


def read(name: str) -> Reading:
    """The translation of a fixture."""
    return translate(FIXTURES / f"{name}.yaml", "llamafactory")


def read_keys(tmp_path: Path, **keys: str) -> Reading:
    """The translation of a small config with these keys in it; None leaves one out."""
    path = tmp_path / "config.yaml"
    lines = [f"{key}: {value}\n" for key, value in {**HEAD, **keys}.items() if value is not None]
    path.write_text("".join(lines))
    return translate(path, "llamafactory")


def found(reading: Reading) -> str:
    """All findings as one text."""
    return "\n".join(str(finding) for finding in reading.findings)


def said(reading: Reading, key: str) -> str:
    """What is said of a key."""
    return reading.outcomes[key].say


def test_a_lora_config() -> None:
    """Every key of a common config carries over, and the differences are those of its data and its split."""
    reading = read("lora")
    assert str(reading.recipe.pop("dataset_name")).endswith("llamafactory/data/questions.jsonl")
    assert reading.recipe == {
        "model_name_or_path": "example-org/tiny-base",
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
        "format": "instruction",
        "columns": ["instruction", "input", "output"],
        "chat_template": "./chat_template.jinja",
        "max_length": 1024,
        "max_rows": 500,
        "packing": True,
        "dataloader_num_workers": 4,
        "output_dir": "saves/lora",
        "logging_steps": 10,
        "save_steps": 500,
        "save_only_model": False,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": True,
        "eval_split": 0.1,
        "per_device_eval_batch_size": 1,
        "eval_strategy": "steps",
        "eval_steps": 500,
    }
    different = {
        outcome.rule_key for outcome in reading.decided if outcome.group is Group.DIFFERENT
    }
    assert different == {
        "dataset",
        "template",
        "cutoff_len",
        "max_samples",
        "neat_packing",
        "val_size",
    }
    assert reading.findings == []


def test_a_mixture_of_data_sets() -> None:
    """Columns, keys of turns, roles and shares come from `dataset_info.json`; what is not said there stays unread."""
    reading = read("qlora_mixture")
    dialogues, answers, drawn = reading.recipe["datasets"]
    assert str(dialogues.pop("path")).endswith("data/dialogues.jsonl")
    assert dialogues == {
        "format": "sharegpt",
        "column_mapping": {"conversations": "turns", "system": "intro"},
        "message_mapping": {"role": "speaker", "content": "words"},
        "role_mapping": {"user": "customer", "assistant": "seller"},
        "fraction": 0.5,
    }
    assert answers == {
        "path": "example-org/answers",
        "name": "small",
        "split": "train_sft",
        "format": "instruction",
        "columns": ["question", "answer"],
        "column_mapping": {"instruction": "question", "output": "answer"},
        "fraction": 0.3,
    }
    assert drawn["fraction"] == 0.2
    for note in ("it skips them", "`on_bad_rows: skip`", "not 50: set `weight`"):
        assert note in said(reading, "dataset")


def test_keys_that_decide_together() -> None:
    """Quantization, adapters, thinking, launchers and the Hub: each by the keys that belong to it."""
    reading = read("qlora_mixture")
    recipe = reading.recipe
    assert recipe["load_in_4bit"] and recipe["use_bnb_nested_quant"] is False
    assert (recipe["lora_r"], recipe["lora_alpha"], recipe["use_rslora"]) == (8, 64, True)
    assert recipe["lora_target_modules"] == ["q_proj", "v_proj"]
    assert recipe["lora_modules_to_save"] == ["embed_tokens", "lm_head"]
    assert recipe["chat_template_kwargs"] == {"enable_thinking": False}
    assert recipe["train_on"] == "last_assistant"
    assert recipe["train_sampling_strategy"] == "group_by_length"
    assert recipe["max_length"] == 2048
    assert recipe["eval_split"] == 200
    assert recipe["push_to_hub"] and recipe["hub_model_id"] == "example-org/tuned"
    assert reading.launch == "zero2"
    assert said(reading, "trust_remote_code").startswith("the model's class in transformers")


def test_full_fine_tuning_with_galore() -> None:
    """Its numbers become transformers' `optim_args`, weights are bfloat16, and FSDP is a launch config."""
    reading = read("full")
    recipe = reading.recipe
    assert recipe["optim"] == "galore_adafactor"
    assert recipe["optim_target_modules"] == ["mlp", "self_attn"]
    assert recipe["optim_args"] == "rank=128,update_proj_gap=200,scale=2.0,proj_type=std"
    assert recipe["dtype"] == "bfloat16" and recipe["bf16"] is False
    assert recipe["chat_template"] == "chatml" and recipe["system_prompt"] == "Be brief."
    assert recipe["activation_checkpointing"] is False
    assert recipe["train_sampling_strategy"] == "sequential"
    assert "use_peft" not in recipe
    assert reading.launch == "fsdp2"
    assert "writes 'detailed thinking off' as system prompt" in found(reading)
    assert "no checkpoint before the end" in found(reading)


@pytest.mark.parametrize(
    ("line", "key", "what"),
    [
        (2, "hf_hub_token", "a secret stands in the file"),
        (4, "use_dora", "does not take use_dora without LoRA"),
        (5, "dataset", "identity has {{name}}"),
        (6, "eval_dataset", "questions: the rows that are evaluated are trained as well"),
        (6, "eval_dataset", "does not take val_size and eval_dataset together"),
        (7, "template", "the template of another model"),
        (8, "train_on_prompt", "prompts are trained"),
        (9, "packing", "the rows of a pack see one another"),
        (12, "pref_beta", "only preference stages read it"),
        (13, "evaluation_strategy", "which is called `eval_strategy`"),
        (None, "", "do_train is not set"),
    ],
)
def test_what_is_wrong_with_a_config_is_found(line: int | None, key: str, what: str) -> None:
    """Each fault of the fixture has its finding, at its line, and no secret is shown."""
    reading = read("odd")
    place = f"odd.yaml:{line}: " if line else "odd.yaml: "
    matching = [row for row in found(reading).splitlines() if what in row]
    assert [place in row and (not key or f": {key}: " in row) for row in matching] == [True]
    assert "not-a-token" not in found(reading) + str(reading.recipe)


def test_all_blockers_are_named_at_once() -> None:
    """One pass names everything that stands in the way, each data set with its own reason."""
    reading = read("blocked")
    assert {outcome.rule_key for outcome in reading.blocked} == {
        "trust_remote_code",
        "add_special_tokens",
        "rope_scaling",
        "stage",
        "finetuning_type",
        "use_muon",
        "fp8",
        "dataset",
        "lr_scheduler_type",
        "resume_from_checkpoint",
        "cutoff_length",
    }
    data = said(reading, "dataset")
    for reason in (
        "pairs: pairs of answers",
        "pictures: rows with images",
        "elsewhere: its rows lie in no file",
        "nowhere: it is not in ",
    ):
        assert reason in data
    assert "did you mean 'cutoff_len'" in said(reading, "cutoff_length")
    assert "no EOS is trained" in found(reading)


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        ({"quantization_bit": "8"}, {"load_in_8bit": True}),
        ({"lora_rank": "32"}, {"lora_r": 32, "lora_alpha": 64}),
        ({"learning_rate": None}, {"learning_rate": 5e-5}),
        ({"bf16": None}, {"bf16": False}),
        ({"fp16": "true"}, {"fp16": True, "bf16": False}),
        ({"warmup_ratio": "0.1", "warmup_steps": "20"}, {"warmup_steps": 20}),
        ({"flash_attn": "disabled"}, {"attn_implementation": "eager"}),
        ({"template": "qwen"}, {"chat_template": "tokenizer"}),
        ({"template": None}, {"chat_template": "tokenizer"}),
        ({"template": "vicuna"}, {"chat_template": "./chat_template.jinja"}),
        ({"use_dft_loss": "true"}, {"loss_type": "dft"}),
        ({"max_samples": "10", "dataset": "alpaca_en,lima"}, {"max_rows": 20}),
        (
            {"dataset": "identity", "dataset_dir": "REMOTE:llamafactory/demo_data"},
            {"dataset_name": "llamafactory/demo_data", "dataset_config": "identity"},
        ),
        ({"dataset": "who/rows", "dataset_dir": "ONLINE"}, {"dataset_name": "who/rows"}),
        ({"dataset": "alpaca_en_demo"}, {"dataset_name": "data/alpaca_en_demo.json"}),
        (
            {"finetuning_type": "full", "use_apollo": "true", "apollo_layerwise": "true"},
            {"optim": "apollo_adamw_layerwise", "optim_target_modules": ["all-linear"]},
        ),
    ],
)
def test_a_key_and_what_comes_of_it(
    keys: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    """Known answers, one rule each; a key that is not set is what LLaMA-Factory takes by itself."""
    recipe = read_keys(tmp_path, **keys).recipe
    assert {key: recipe.get(key) for key in ours} == ours


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"eval_strategy": "steps"}, "does not take evaluations without rows"),
        ({"val_size": "0.1"}, "nothing says when to evaluate them"),
        ({"template": "lama3"}, "does not take the template 'lama3'; did you mean 'llama3'?"),
        ({"quantization_method": "bitsandbytes"}, "which is called `bnb`"),
        ({"streaming": "true"}, "does not take streaming without max_steps"),
        ({"interleave_probs": "1"}, "without an interleaved mix_strategy"),
        ({"finetuning_type": "full", "use_galore": "true"}, "with `optim: adamw_torch` it does"),
        ({"model_name_or_path": "x/y-Instruct", "template": "alpaca"}, "was tuned to chat"),
        ({"template": "qwen3"}, "the model learns not to think"),
        ({"dataset": "identity"}, "85 of its 91 answers"),
    ],
)
def test_a_fault_and_its_finding(keys: dict[str, str], what: str, tmp_path: Path) -> None:
    """Each has one finding, which a config without the fault does not have."""
    assert found(read_keys(tmp_path, **keys)).count(what) == 1
    assert what not in found(read_keys(tmp_path))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"packing": "true", "neat_packing": "true"}, "see one another"),
        (
            {"packing": "true", "flash_attn": "fa2", "per_device_train_batch_size": "1"},
            "see one another",
        ),
        ({"template": "qwen3", "enable_thinking": "null"}, "not to think"),
        ({"template": "qwen3", "enable_thinking": "false"}, "not to think"),
        ({"template": "chatml", "model_name_or_path": "x/Llama-3-8B"}, "another model"),
        ({"template": "qwen3_nothink", "model_name_or_path": "x/Qwen3-8B"}, "another model"),
        ({"streaming": "true", "max_steps": "10"}, "does not take"),
    ],
)
def test_what_only_looks_like_a_fault(keys: dict[str, str], what: str, tmp_path: Path) -> None:
    """A setting that is right has no finding."""
    assert what not in found(read_keys(tmp_path, **keys))


def test_rows_of_your_own_stand_in_for_what_is_not_at_hand(tmp_path: Path) -> None:
    """Without them the data set is in the way; the message says which, and what to give."""
    keys = {"dataset": "mine,mllm_demo"}
    why = said(read_keys(tmp_path, **keys), "dataset")
    assert "mine: data/dataset_info.json is not there" in why and "--data FILE" in why
    reading = translate(tmp_path / "config.yaml", "llamafactory", data="rows.jsonl")
    assert not reading.blocked
    assert reading.recipe["dataset_name"] == "rows.jsonl"
    assert reading.outcomes["dataset"].group is Group.DIFFERENT


def test_quantized_weights_are_not_sharded_by_zero_3(tmp_path: Path) -> None:
    """FSDP2 does what ZeRO-3 does for others."""
    keys = {"deepspeed": "ds_z3_config.json"}
    assert read_keys(tmp_path, **keys).launch == "zero3"
    assert read_keys(tmp_path, **keys, quantization_bit="4").launch == "fsdp2_qlora"


def test_placeholders_that_were_filled_in_are_no_finding(tmp_path: Path) -> None:
    """The file itself is looked at where it is there."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text('{"identity": {"file_name": "identity.json"}}')
    (folder / "identity.json").write_text('[{"instruction": "Who?", "output": "I am Ann."}]')
    assert "identity" not in found(read_keys(tmp_path, dataset="identity"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset", "3"),
        ("max_samples", "many"),
        ("val_size", "[1]"),
        ("warmup_ratio", "some"),
        ("lora_target", "{a: b}"),
        ("interleave_probs", "0.5,half"),
        ("template", "[a, b]"),
        ("quantization_bit", "four"),
        ("deepspeed", "[1]"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_line(
    key: str, value: str, tmp_path: Path
) -> None:
    """It is refused or stands in the way; nothing is guessed and nothing crashes."""
    keys = {key: value, "mix_strategy": "interleave_under"}
    if key != "dataset":
        keys["dataset"] = "alpaca_en,lima"
    try:
        reading = read_keys(tmp_path, **keys)
    except InputError as error:
        assert "config.yaml:" in str(error)
    else:
        assert reading.blocked or reading.findings


def test_a_damaged_list_of_data_sets_is_an_error_with_its_line(tmp_path: Path) -> None:
    """So is an entry that is none."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text('{"rows":\n {"file_name": }}')
    with pytest.raises(InputError, match=r"dataset_info.json:2: is no JSON"):
        read_keys(tmp_path, dataset="rows")
    (folder / "dataset_info.json").write_text('{"rows": 3}')
    with pytest.raises(
        InputError, match=r"dataset_info.json: rows: does not hold what belongs there"
    ):
        read_keys(tmp_path, dataset="rows")


def test_evaluation_data_of_its_own(tmp_path: Path) -> None:
    """It is named for `evaluate`, and nothing is evaluated during training without rows."""
    reading = read_keys(tmp_path, eval_dataset="lima", eval_strategy="steps", eval_steps="5")
    assert said(reading, "eval_dataset").endswith(
        "sft-recipes evaluate RUN --data llamafactory/lima"
    )
    assert "eval_strategy" not in reading.recipe and "eval_steps" not in reading.recipe
    assert reading.outcomes["eval_strategy"].group is Group.DIFFERENT
    assert "without rows" not in found(reading)


def test_templates_of_its_own_are_written_as_it_writes_them() -> None:
    """Turns, EOS and the line break between an instruction and its input are LLaMA-Factory's, byte for byte."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text = read("lora").files["chat_template.jinja"]
    question = {"role": "user", "content": "Add.\n\n1, 2", "instruction": "Add.", "input": "1, 2"}
    messages = [
        {"role": "system", "content": "Be brief."},
        question,
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Thanks."},
    ]
    template = ImmutableSandboxedEnvironment().from_string(text)
    rendered = template.render(messages=messages, eos_token="</s>", add_generation_prompt=True)
    assert rendered == (
        "System: Be brief.</s>\nHuman: Add.\n1, 2</s>\nAssistant:3</s>\nHuman: Thanks.</s>\nAssistant:"
    )
