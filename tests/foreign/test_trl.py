"""What the keys of TRL, the alignment handbook and open-r1 mean here, by known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.foreign.account import as_json
from sft_recipes.foreign.reading import Group, Reading
from sft_recipes.foreign.translation import tools, translate
from sft_recipes.recipe_checks import REFUSED, RENAMED

FIXTURES = Path(__file__).parent / "fixtures" / "trl"
MINIMAL = "model_name_or_path: a/b\ndataset_name: a/c\noutput_dir: runs/x\n"


def read(name: str, remote_code_is_not_needed: bool = False) -> Reading:
    """The translation of a fixture."""
    return translate(FIXTURES / f"{name}.yaml", "trl", remote_code_is_not_needed)


def read_text(tmp_path: Path, text: str) -> Reading:
    """The translation of a small config with these lines in it."""
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + text)
    return translate(path, "trl")


def found(reading: Reading) -> str:
    """All findings as one text."""
    return "\n".join(str(finding) for finding in reading.findings)


def test_a_config_of_today() -> None:
    """Keys go on as they are; what TRL does by itself, and this project does not, is written out."""
    reading = read("sft")
    assert reading.recipe == {
        "model_name_or_path": "example-org/tiny-base",
        "use_peft": True,
        "lora_r": 8,
        "dataset_name": "example-org/chats",
        "learning_rate": 2e-4,
        "eval_strategy": "steps",
        "eval_steps": 50,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "packing": True,
        "packing_strategy": "bfd",
        "output_dir": "runs/sft",
        "report_to": "trackio",
        "dataset_num_proc": 4,
        "train_on": "assistant",
        "lora_target_modules": ["all-linear"],
        "max_length": 1024,
        "dataset_test_split": "test",
    }
    assert "prompts are trained where rows are messages" in found(reading)
    assert "packed rows see one another" in found(reading)


def test_a_mixture_of_the_handbook() -> None:
    """Its weights are ours, its template becomes a file, its push is private, what it trains on is found."""
    reading = read("handbook")
    recipe = reading.recipe
    assert recipe["datasets"] == [
        {
            "path": "example-org/first",
            "name": "default",
            "split": "train_sft",
            "columns": ["messages"],
            "weight": 0.5,
        },
        {"path": "example-org/first", "split": "test_sft", "columns": ["messages"]},
    ]
    assert (recipe["eval_split"], recipe["data_seed"]) == (100, 3)
    assert reading.files == {"chat_template.jinja": reading.tree["chat_template"]}
    assert recipe["chat_template"] == "./chat_template.jinja" and recipe["train_on"] == "assistant"
    assert recipe["push_to_hub"] is True and recipe["hub_model_id"] == "my-model"
    assert "private" in reading.outcomes["push_to_hub"].say
    for key in ("overwrite_output_dir", "use_liger_kernel", "hub_strategy", "do_eval"):
        assert reading.outcomes[key].group is Group.NO_EFFECT
    findings = found(reading)
    assert "test_sft of example-org/first: rows for evaluation are trained" in findings
    assert (
        "stops on what it does not know: torch_dtype, overwrite_output_dir, warmup_ratio"
        in findings
    )
    assert "prompts are trained" not in findings


def test_a_mixer_of_older_handbooks() -> None:
    """Three keys make one mixture, and a push without a name takes that of the run's folder."""
    recipe = read("old_handbook").recipe
    assert recipe["datasets"] == [
        {"path": "example-org/first", "name": "all", "split": "train_sft"},
        {"path": "example-org/second", "name": "small", "split": "train_sft", "weight": 0.25},
    ]
    assert recipe["dataset_test_split"] == "test_sft" and recipe["eval_strategy"] == "epoch"
    assert recipe["hub_model_id"] == "old" and recipe["max_length"] == 1024


def test_all_that_stands_in_the_way_is_said_at_once() -> None:
    """Other stages, losses of their own, remote code and unknown keys, each with its reason."""
    reading = read("blocked")
    assert {outcome.rule_key for outcome in reading.blocked} == {
        "trust_remote_code",
        "dataset_mixture",
        "beta",
        "reward_funcs",
        "label_smoothing_factor",
        "model_init_kwargs",
        "warmup_ratio",
        "learning_rte",
        "chat_template_path",
    }
    assert "did you mean 'learning_rate'" in reading.outcomes["learning_rte"].say
    other = read("blocked", remote_code_is_not_needed=True)
    assert other.outcomes["trust_remote_code"].group is Group.DIFFERENT


@pytest.mark.parametrize(
    ("lines", "ours"),
    [
        ("completion_only_loss: true\n", {"train_on": "assistant"}),
        ("completion_only_loss: false\n", {"train_on": "all"}),
        ("max_length: null\n", {"max_length": None}),
        ("warmup_ratio: 0.1\n", {"warmup_steps": 0.1}),
        ("group_by_length: true\n", {"train_sampling_strategy": "group_by_length"}),
        ("optim: adamw_hf\n", {"optim": "adamw_torch"}),
        ("text_column: body\n", {"format": "raw", "column_mapping": {"text": "body"}}),
        (
            "use_peft: true\nlora_target_modules: all-linear\n",
            {"lora_target_modules": ["all-linear"]},
        ),
        ("dataset_configs: [all]\n", {"dataset_config": "all"}),
        ("test_split_size: 0.1\n", {"eval_split": 0.1}),
        ("chat_template: chatml\n", {"chat_template": "chatml"}),
        (
            "gradient_checkpointing: true\ngradient_checkpointing_use_reentrant: false\n",
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": False},
            },
        ),
    ],
)
def test_single_keys(tmp_path: Path, lines: str, ours: dict[str, Any]) -> None:
    """Each of these becomes these keys of ours."""
    reading = read_text(tmp_path, lines)
    assert not reading.blocked
    assert {key: reading.recipe[key] for key in ours} == ours


def test_evaluation_without_rows(tmp_path: Path) -> None:
    """A mixture that holds nothing out is not evaluated, and a split for evaluation that is trained is found."""
    path = tmp_path / "config.yaml"
    sets = "dataset_mixture: {datasets: [{id: a/c, split: test_sft, weight: 2}]}\n"
    path.write_text(
        f"model_name_or_path: a/b\noutput_dir: r\n{sets}eval_strategy: epoch\neval_delay: 2\n"
    )
    reading = translate(path, "trl")
    assert not reading.blocked and "eval_strategy" not in reading.recipe
    assert reading.outcomes["eval_strategy"].group is Group.DIFFERENT
    assert reading.outcomes["eval_delay"].group is Group.NO_EFFECT
    assert "evaluation is asked for, and the mixture holds no rows out" in found(reading)
    assert "a weight above 1" in found(reading)
    assert "rows for evaluation are trained" in found(
        read_text(tmp_path, "dataset_train_split: test\n")
    )


def test_launchers(tmp_path: Path) -> None:
    """FSDP and DeepSpeed inside a config name one of the launch configs that ship."""
    assert read_text(tmp_path, "fsdp: full_shard auto_wrap\n").launch == "fsdp2"
    text = "deepspeed: {zero_optimization: {stage: 3, offload_param: {device: cpu}}}\n"
    assert read_text(tmp_path, text).launch == "zero3_offload"


def test_a_token_is_not_repeated() -> None:
    """A token in a config is found, and stands in no output."""
    reading = read("handbook")
    assert "a token stands in the file" in found(reading)
    assert "hf_not_a_token" not in str(as_json(reading))


@pytest.mark.parametrize("key", sorted({*RENAMED, *REFUSED}))
def test_every_old_or_refused_key_has_a_rule(key: str) -> None:
    """No key that recipes know of, and do not take, is met with "no such key"."""
    tool = tools()["trl"]
    assert key in tool.rules or key in tool.table.rules
