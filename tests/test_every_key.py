"""No dead key: every accepted key changes what a run is built from, or is refused where it would change nothing.

What a run is built from is taken from the code that builds it: TRL's `SFTConfig`, the arguments of `from_pretrained`,
peft's `LoraConfig`, the prepared rows with their labels, and what the evaluation inside training is called with.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import shutil
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from sft_recipes import models
from sft_recipes.data import prepare as prepare_page
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.workers import Workers
from sft_recipes.errors import InputError
from sft_recipes.recipe import DatasetSource, EvaluationSettings, Recipe
from sft_recipes.recipe_checks import IDLE, NEEDS, Key
from sft_recipes.recipe_keys import (
    DATA_KEYS,
    OWN_KEYS,
    load_recipe,
    make_recipe,
    trl_keys,
)
from sft_recipes.release.hub import check_push
from sft_recipes.training import evaluate_while_training, processes, settings_checks, train
from tests.conftest import build_model
from tests.training.test_start_adapter import save_adapter

MODEL_KEYS, TRAINING_KEYS = trl_keys()
SOURCE_KEYS = [one.name for one in dataclasses.fields(DatasetSource)]
EVALUATION_KEYS = [one.name for one in dataclasses.fields(EvaluationSettings)]
# An earlier assistant turn is rendered otherwise than the last, which gets an empty reasoning block, and a mood.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m.role == 'user' %}{{ mood }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Try:
    """How a key is tried: a value other than the default, and the other keys without which it could do nothing.

    `refusal`: the key is read, and what it asks for is refused with this.
    """

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""


EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "eval_split": 0.5}
PEFT = {"use_peft": True}
FOUR_BIT = {"use_peft": True, "load_in_4bit": True}
WORKERS = {"dataloader_num_workers": 2}
TURNS = {"dataset_name": "./turns.jsonl", "chat_template": "./mood.jinja"}
LONG = {"dataset_name": "./turns.jsonl", "chat_template": "chatml", "max_length": 48}

# TRL's keys whose type and default do not tell a legal value, and those that work only beside others.
TRL_TRIES: Mapping[str, Try] = {
    "model_name_or_path": Try("./other_base"),
    "model_revision": Try("v2"),
    "dtype": Try("bfloat16"),
    "attn_implementation": Try("eager"),
    "lora_r": Try(4, PEFT),
    "lora_alpha": Try(4, PEFT),
    "lora_dropout": Try(0.5, PEFT),
    "lora_target_modules": Try(["q_proj"], PEFT),
    "lora_target_parameters": Try(
        ["lm_head.weight"],
        {**PEFT, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]},
    ),
    "lora_modules_to_save": Try(["lm_head"], PEFT),
    "use_rslora": Try(True, PEFT),
    "use_dora": Try(True, PEFT),
    "load_in_8bit": Try(True, PEFT),
    "load_in_4bit": Try(True, PEFT),
    "bnb_4bit_quant_type": Try("fp4", FOUR_BIT),
    "use_bnb_nested_quant": Try(True, FOUR_BIT),
    "bnb_4bit_quant_storage": Try("bfloat16", FOUR_BIT),
    "output_dir": Try("other"),
    "lr_scheduler_type": Try("cosine"),
    "lr_scheduler_kwargs": Try({"num_cycles": 2}, {"lr_scheduler_type": "cosine"}),
    "optim": Try("sgd"),
    "optim_args": Try("momentum=0.5", {"optim": "sgd"}),
    "optim_target_modules": Try(["q_proj"], refusal="optim_target_modules: has no effect with"),
    "router_aux_loss_coef": Try(0.5, refusal="the model is no mixture of experts"),
    "max_steps": Try(7),
    "activation_offloading": Try(True, refusal="activation_offloading: on a CPU there is no other"),
    "fp16": Try(True, refusal="fp16: needs a CUDA device"),
    "tf32": Try(False),
    "activation_checkpointing_kwargs": Try({"use_reentrant": False}),
    "torch_compile_backend": Try("eager"),
    "torch_compile_mode": Try("default"),
    "logging_strategy": Try("epoch"),
    "include_num_input_tokens_seen": Try("all"),
    "log_level": Try("error"),
    "log_level_replica": Try("error"),
    "report_to": Try(["flyte"], refusal="report_to: "),
    "run_name": Try("mine", {"report_to": "none"}),
    "project": Try("mine", {"report_to": "none"}),
    "eval_strategy": Try("epoch", {"eval_split": 0.5}),
    "eval_steps": Try(3, EVALUATED),
    "eval_delay": Try(3, EVALUATED),
    "per_device_eval_batch_size": Try(3, EVALUATED),
    "eval_on_start": Try(True, EVALUATED),
    "save_strategy": Try("epoch"),
    "load_best_model_at_end": Try(True, {**EVALUATED, "save_steps": 4}),
    "metric_for_best_model": Try("eval_token_f1", EVALUATED),
    "greater_is_better": Try(True, {**EVALUATED, "metric_for_best_model": "loss"}),
    "use_cpu": Try(False),
    "accelerator_config": Try({"split_batches": True}),
    "dataloader_pin_memory": Try(False, {"use_cpu": False}),
    "dataloader_persistent_workers": Try(True, WORKERS),
    "dataloader_prefetch_factor": Try(4, WORKERS),
    "dataloader_multiprocessing_context": Try("fork", WORKERS),
    "ddp_bucket_cap_mb": Try(5),
    "train_sampling_strategy": Try("sequential"),
    "debug": Try("underflow_overflow"),
    "max_length": Try(48, {"packing": True}),
    "packing_strategy": Try("bfd_split", {"packing": True}),
    "eval_packing": Try(True, {"packing": True}),
    "loss_type": Try("dft"),
}

# This project's keys. They are tried on the files of the fixture `folder`.
OWN_TRIES: Mapping[str, Try] = {
    "dataset_name": Try("./folder/other.jsonl"),
    "dataset_config": Try("main", refusal="local files have no configurations"),
    "dataset_train_split": Try("other", {"dataset_name": "./folder"}),
    "dataset_test_split": Try("test", {"dataset_name": "./folder"}),
    "datasets": Try(["./folder/other.jsonl"], {"dataset_name": None}),
    "format": Try("instruction", {"dataset_name": "./ambiguous.jsonl"}),
    "columns": Try(["instruction", "output"]),
    "column_mapping": Try({"output": "input"}),
    "message_mapping": Try({"role": "who", "content": "said"}, {"dataset_name": "./keys.jsonl"}),
    "role_mapping": Try(
        {"user": "Customer", "assistant": ["Clerk"]}, {"dataset_name": "./roles.jsonl"}
    ),
    "consecutive_turns": Try("merge", {"dataset_name": "./twice.jsonl"}),
    "weight": Try(2.0),
    "eval_split": Try(0.5),
    "chat_template": Try("chatml"),
    "chat_template_kwargs": Try({"mood": "sad"}, TURNS),
    "system_prompt": Try("Be brief."),
    "train_on": Try("last_assistant", TURNS),
    "history": Try("mask", TURNS),
    "empty_think": Try("train", TURNS),
    "overlength": Try("truncate", {**LONG, "max_lost": 1.0}),
    "max_lost": Try(1.0, {**TURNS, "max_length": 48}),
    "control_tokens": Try("drop", {"dataset_name": "./control.jsonl", "max_lost": 1.0}),
    "on_bad_rows": Try("skip", {"dataset_name": "./bad.jsonl", "max_rejected": 0.5}),
    "max_rejected": Try(0.5, {"dataset_name": "./bad.jsonl", "on_bad_rows": "skip"}),
    "allow_empty_output": Try(True, {"dataset_name": "./empty.jsonl"}),
    "adapter_name_or_path": Try("./adapter", PEFT),
    "global_batch_size": Try(16),
    "max_rows": Try(2),
    "evaluation": Try({"rows": 1}, EVALUATED),
    "gate": Try(
        [{"metric": "exact_matc", "at_least": 0.9}],
        refusal="gate[0].metric: unknown metric 'exact_matc'",
    ),
    "dataset_num_proc": Try(1),
    "push_to_hub": Try(True, refusal="push_to_hub: true and hub_model_id go together"),
    "hub_model_id": Try("me/mine", refusal="push_to_hub: true and hub_model_id go together"),
}
SOURCE_TRIES: Mapping[str, Try] = {
    "path": Try("./folder/other.jsonl"),
    "name": Try("main", refusal="local files have no configurations"),
    "data_files": Try({"train": "other.jsonl"}, {"path": "./folder"}),
    "split": Try("other", {"path": "./folder"}),
    "columns": Try(["instruction", "output"]),
    "fraction": Try(0.5),
    "weight": Try(2.0),
    "held_out": Try(False),
    "format": Try("instruction", {"path": "./ambiguous.jsonl"}),
    "column_mapping": Try({"output": "input"}),
    "message_mapping": Try({"role": "who", "content": "said"}, {"path": "./keys.jsonl"}),
    "role_mapping": Try({"user": "Customer", "assistant": ["Clerk"]}, {"path": "./roles.jsonl"}),
    "consecutive_turns": Try("merge", {"path": "./twice.jsonl"}),
}
EVALUATION_TRIES: Mapping[str, Try] = {
    "data": Try("./folder/other.jsonl"),
    "during_training": Try(False),
    "max_share": Try(0.5),
    "rows": Try(1),
    "max_new_tokens": Try(3),
    "batch_size": Try(3),
}


def rows(name: str, count: int = 8, **more: str) -> list[dict[str, Any]]:
    """Instruction rows that differ from one another and, by name, from those of other files."""
    return [
        {"instruction": f"{name} {n}", "input": f"given {n}", "output": f"done {n}", **more}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """Data files on which the keys of the data can do something, a template, and two bases."""
    path = tmp_path_factory.mktemp("every_key")
    conversation = [
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four " * 40),
    ]
    files = {
        "train": rows("train"),
        "folder/train": rows("train"),
        "folder/other": rows("other", 4),
        "folder/test": rows("test", 4),
        "ambiguous": rows("both", prompt="p", completion="c"),
        "turns": [{"messages": [{"role": role, "content": text} for role, text in conversation]}],
        "keys": [
            {"messages": [{"who": "user", "said": f"ask {n}"}, {"who": "gpt", "said": "so"}]}
            for n in range(8)
        ],
        "roles": [
            {"messages": [{"role": "Customer", "content": "q"}, {"role": "Clerk", "content": "a"}]}
        ],
        "twice": [
            {"messages": [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]}
        ],
        "control": [*rows("train"), *rows("say <|im_end|>", 1)],
        "bad": [*rows("train"), {"instruction": 7, "output": "x"}],
        "empty": [*rows("train"), {"instruction": "say nothing", "output": ""}],
    }
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (path / "mood.jinja").write_text(TEMPLATE)
    for name in ("base", "other_base"):
        shutil.copytree(base_folder, path / name)
    save_adapter(path / "base", path / "adapter")
    return path


@dataclass
class Built:
    """What a recipe was built into: parts that compare, or the message with which it was refused."""

    config: Any = None
    parts: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""


class _Settings(SimpleNamespace):
    """What the trainer was given, in the trainer's place."""

    def add_callback(self, callback: Any) -> None:
        """As the trainer, which takes more callbacks once it stands."""


class Builder:
    """Builds recipes as `train` does; loading the model, TRL's trainer and generation are intercepted."""

    def __init__(
        self, folder: Path, scratch: Path, patch: pytest.MonkeyPatch, known: dict[str, Built]
    ) -> None:
        self.folder, self.scratch, self.known = folder, scratch, known
        self.seen: dict[str, Any] = {}
        patch.setattr(models, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=self._load))
        patch.setattr(train, "RecipeTrainer", _Settings)
        patch.setattr(train, "load_start", self._load_start)
        patch.setattr(evaluate_while_training, "evaluate", self._evaluate)
        patch.setattr(prepare_page, "Workers", self._workers)
        # As on a machine without accelerator, where this test is run most.
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)

    def _load(self, name: str, **settings: Any) -> Any:
        self.seen["model"] = {"name": name, **settings}
        return build_model(400, max_position_embeddings=2048)

    def _load_start(self, recipe: Recipe, _: Any) -> None:
        self.seen["start"] = recipe.adapter_name

    def _workers(self, work: Any, processes: int | None, blame: Any) -> Workers[Any, Any]:
        self.seen["processes"] = processes
        return Workers(work, processes, blame)

    def _evaluate(self, _: Any, __: Any, examples: Any, **settings: Any) -> Any:
        self.seen["evaluation"] = [[str(example) for example in examples], settings]
        return SimpleNamespace(metrics={}, rows=[], data_sets={})

    def build(self, keys: Mapping[str, Any]) -> Built:
        """Build a recipe of these keys, once; those given as None are left out."""
        name = json.dumps(keys)
        if name not in self.known:
            self.known[name] = self._build(keys)
        return self.known[name]

    def _build(self, keys: Mapping[str, Any]) -> Built:
        minimal = {
            "model_name_or_path": "./base",
            "dataset_name": "./train.jsonl",
            "output_dir": "run",
        }
        values = {key: value for key, value in {**minimal, **keys}.items() if value is not None}
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        self.seen.clear()
        try:
            recipe = load_recipe(path)
            settings_checks.check_settings(recipe)
            check_push(recipe)
            labeller = open_labeller(recipe)
            data = prepare(recipe, labeller, self.scratch / str(len(self.known)), progress=False)
            trainer: Any = train.build_trainer(recipe, labeller, data)
        except InputError as error:
            return Built(refusal=str(error))
        if trainer.generation_metrics is not None:
            trainer.generation_metrics(trainer.model)
        datasets = [
            split and split.to_dict() for split in (trainer.train_dataset, trainer.eval_dataset)
        ]
        parts = {
            "config": trainer.args.to_dict(),
            "data": datasets,
            "share": trainer.generation_share,
            **self.seen,
        }
        parts["lora"] = trainer.peft_config and trainer.peft_config.to_dict()
        return Built(trainer.args, {name: str(part) for name, part in parts.items()})

    def check(
        self, key: str, one: Try, with_key: Mapping[str, Any], without: Mapping[str, Any]
    ) -> Built:
        """Assert that the key changes something, or is refused as the table says; returns what it built."""
        built = self.build(with_key)
        if one.refusal:
            assert one.refusal in built.refusal
        else:
            assert not built.refusal
        before = self.build(without)
        assert (built.parts, built.refusal) != (before.parts, before.refusal), (
            f"{key} is accepted and changes nothing"
        )
        return built


@pytest.fixture(scope="module")
def known() -> dict[str, Built]:
    """What was built already; a test that changes the code under test must not use it."""
    return {}


@pytest.fixture
def builder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: dict[str, Built]
) -> Builder:
    """Builds recipes in the folder of data files."""
    return Builder(folder, tmp_path / "prepared", monkeypatch, known)


def derived(key: Key, default: Any) -> Any:
    """A value of this key other than the default; fails for a type that needs an entry in `TRL_TRIES`."""
    kinds = {key.kind, *typing.get_args(key.kind)}
    if bool in kinds:
        return not default
    if kinds & {int, float}:
        return next(value for value in ((default or 0) + 1, 0.5) if key.fits(value))
    raise AssertionError(f"add a value of type {key.kind} to TRL_TRIES")


def plain(value: Any) -> Any:
    """A value of SFTConfig as a recipe would write it."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return value.value if isinstance(value, enum.Enum) else value


def check_trl_key(builder: Builder, key: str) -> None:
    """Assert that one of TRL's keys arrives: in SFTConfig as it was set, or in what the model is made of."""
    known = {**MODEL_KEYS, **TRAINING_KEYS}[key]
    default = None if key in TRL_TRIES else getattr(builder.build({}).config, key, False)
    one = TRL_TRIES.get(key) or Try(derived(known, default))
    with_key, without = {**one.beside, key: one.value}, one.beside
    if key in TRAINING_KEYS and not one.refusal:
        built = builder.build(with_key)
        assert not built.refusal
        held = getattr(built.config, key)
        if key == "accelerator_config":
            held = {name: getattr(held, name) for name in one.value}
        assert plain(held) in (one.value, [one.value]), f"{key} is {held} in SFTConfig"
        assert builder.build(without).parts["config"] != built.parts["config"]
    else:
        builder.check(key, one, with_key, without)


@pytest.mark.parametrize("key", [*MODEL_KEYS, *TRAINING_KEYS])
def test_trl_key(builder: Builder, key: str) -> None:
    """TRL's training keys arrive in SFTConfig verbatim, its model keys in what the model and adapter are made of."""
    check_trl_key(builder, key)


@pytest.mark.parametrize("key", [*DATA_KEYS, *OWN_KEYS])
def test_own_key(builder: Builder, key: str) -> None:
    """Each of this project's keys, and of TRL's that it reads itself, changes rows, labels, batches or evaluation."""
    one = OWN_TRIES[key]
    without = {name: value for name, value in one.beside.items() if value is not None}
    builder.check(key, one, {**one.beside, key: one.value}, without)


@pytest.mark.parametrize("key", ["seed", "data_seed", "max_length"])
def test_trl_key_that_also_changes_the_data(builder: Builder, key: str) -> None:
    """Seeds decide which rows are drawn, and max_length which rows fit, besides what SFTConfig does with them."""
    value, beside = (
        (48, {**TURNS, "max_lost": 1.0}) if key == "max_length" else (3, {"max_rows": 3})
    )
    data = [builder.build({**beside, key: one}).parts["data"] for one in (value, None)]
    assert data[0] != data[1]


@pytest.mark.parametrize("key", SOURCE_KEYS)
def test_key_of_a_data_set(builder: Builder, key: str) -> None:
    """Each key inside `datasets:` changes the rows that are trained."""
    one = SOURCE_TRIES[key]
    second = {"path": "./folder/test.jsonl"} | ({"fraction": 0.5} if key == "fraction" else {})
    without = {"path": "./train.jsonl", **one.beside}
    sets = [[{**without, key: one.value}, second], [without, {"path": "./folder/test.jsonl"}]]
    keys = {"dataset_name": None} | ({"eval_split": 4} if key == "held_out" else {})
    first, other = ({**keys, "datasets": entries} for entries in sets)
    builder.check(key, one, first, other)


@pytest.mark.parametrize("key", EVALUATION_KEYS)
def test_key_of_the_evaluation(builder: Builder, key: str) -> None:
    """Each key inside `evaluation:` changes how, or on what, answers are generated inside training."""
    one = EVALUATION_TRIES[key]
    builder.check(key, one, {**EVALUATED, "evaluation": {key: one.value}}, EVALUATED)


@pytest.mark.parametrize("key", [key for key in SOURCE_KEYS if key != "path"])
def test_key_of_the_evaluation_data(builder: Builder, key: str) -> None:
    """Each key inside `evaluation: data:` changes what is answered; those that mix data sets are refused there."""
    one = SOURCE_TRIES[key]
    if key in ("weight", "fraction", "held_out"):
        one = Try(one.value, one.beside, refusal=f"evaluation.data.{key}: unknown key")
    without = {"path": "./train.jsonl", **one.beside}
    blocks = [
        {**EVALUATED, "evaluation": {"data": data}}
        for data in ({**without, key: one.value}, without)
    ]
    builder.check(key, one, *blocks)


def switched(key: str, states: Mapping[str, list[Any]], state: Any) -> dict[str, Any]:
    """A recipe's keys: this one, and each key that switches it in the given state."""
    name, _, inner = key.partition(".")
    if inner:
        value: Any = {inner: EVALUATION_TRIES[inner].value}
    else:
        value = {**TRL_TRIES, **OWN_TRIES}.get(key, Try(0.5)).value
    return {name: value, **dict.fromkeys(states, state)}


@pytest.mark.parametrize("key", NEEDS)
def test_key_that_needs_another_is_refused_alone(builder: Builder, key: str) -> None:
    """Without the key that switches it on it is refused by name; where that key says "off" in words, it may stay."""
    state = "epoch" if None in next(iter(NEEDS[key].values())) else None
    assert f"{key}: has no effect with " in builder.build(switched(key, NEEDS[key], state)).refusal
    for off in (False, "no", 0):
        values = switched(key, NEEDS[key], off)
        assert not settings_checks.dead_keys(
            typing.cast(Recipe, SimpleNamespace(values=values, place=lambda key: "recipe"))
        )


@pytest.mark.parametrize(
    ("key", "switch", "state"), [(k, s, one) for k in IDLE for s in IDLE[k] for one in IDLE[k][s]]
)
def test_key_that_another_switches_off_is_refused(
    builder: Builder, key: str, switch: str, state: Any
) -> None:
    """Beside a key that leaves it without effect it is refused by name, unless it is off itself."""
    values: dict[str, Any] = {
        key: TRL_TRIES[key].value if key in TRL_TRIES else True,
        switch: state,
    }
    recipe = SimpleNamespace(values=values, place=lambda key: "recipe")
    (problem,) = settings_checks.dead_keys(typing.cast(Recipe, recipe))
    assert str(problem).startswith(f"recipe: {key}: has no effect with {switch}: ")
    recipe.values = {**values, key: 0}
    assert not settings_checks.dead_keys(typing.cast(Recipe, recipe))


def test_keys_of_one_data_set_do_not_stand_beside_datasets(builder: Builder) -> None:
    """Keys that describe the data set of `dataset_name` are refused beside `datasets`, which would ignore them."""
    keys = [
        "dataset_config",
        "dataset_train_split",
        "format",
        "columns",
        "column_mapping",
        "weight",
    ]
    for key in [*keys, "message_mapping", "role_mapping", "consecutive_turns"]:
        built = builder.build(
            {"dataset_name": None, "datasets": ["./train.jsonl"], key: OWN_TRIES[key].value}
        )
        assert f"{key}: belongs to one data set" in built.refusal


def test_the_walk_finds_an_ignored_key_of_ours(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is accepted and read by nobody fails the walk."""
    monkeypatch.setitem(typing.cast(dict[str, Any], OWN_KEYS), "fake", Key(int))
    builder.known = {}
    with pytest.raises(AssertionError, match="fake is accepted and changes nothing"):
        builder.check("fake", Try(3), {"fake": 3}, {})


@pytest.mark.parametrize("key", ["learning_rate", "lora_r", "use_peft", "packing", "seed"])
def test_the_walk_finds_a_key_that_is_not_handed_on(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """One of TRL's keys that is accepted, but lost on the way to TRL, fails the walk."""
    check_trl_key(builder, key)

    def forgetful(path: Path, load: Any = load_recipe) -> Recipe:
        recipe: Recipe = load(path)
        kept = (
            {name: value for name, value in part.items() if name != key}
            for part in (recipe.model, recipe.training)
        )
        model, training = kept
        return dataclasses.replace(recipe, model=model, training=training)

    monkeypatch.setitem(globals(), "load_recipe", forgetful)
    builder.known = {}
    with pytest.raises(AssertionError):
        check_trl_key(builder, key)


def test_timeout_reaches_the_process_group(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ddp_timeout is given to the process group when it is made; the group that TRL finds it does not change."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        processes,
        "PartialState",
        lambda **settings: seen.update(settings) or SimpleNamespace(num_processes=1),
    )
    values = {
        "model_name_or_path": "./base",
        "dataset_name": "./train.jsonl",
        "output_dir": "run",
        "ddp_timeout": 7200,
    }
    processes.join_processes(make_recipe(values))
    assert seen["timeout"] == timedelta(seconds=7200)


def test_limit_of_rejected_rows_holds_for_prepared_data(builder: Builder) -> None:
    """A folder prepared under a generous max_rejected is not taken for a recipe with a strict one."""
    keys = OWN_TRIES["max_rejected"].beside
    assert not builder._build({**keys, "max_rejected": 0.5}).refusal
    assert "max_rejected" in builder._build(keys).refusal
