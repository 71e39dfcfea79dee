"""Every shipped recipe, found by rglob, is read, and trained for two steps on a tiny model of its architecture with
rows shaped like its data set's. What its comments and README claim and a test can see is tested here.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.formats import detect_format
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.models import load_for_inference, load_model, lora_config
from sft_recipes.recipe import GATE, Recipe, TemplateSettings, shipped_recipes
from sft_recipes.recipe_keys import load_recipe
from tests.tiny_architectures import ARCHITECTURES, build_base, build_real_shape
from tests.training.tiny import logged, weights

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.name != GATE]
PATHS = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in FILES}

# Which tiny model stands in for which recipe folder; the quickstart brings its own base.
STAND_INS = {
    "gemma-3-1b": "gemma3_text",
    "gemma-3-270m": "gemma3_text",
    "llama-3.1-8b": "llama",
    "mistral-7b-v0.3": "mistral",
    "qwen3-0.6b": "qwen3",
    "qwen3-30b-a3b": "qwen3_moe",
    "smollm2-135m": "llama",
    "smollm3-3b": "smollm3",
}
# Ran on real weights, on a CPU; the other READMEs plan for GPUs that nobody here had.
MEASURED = ("gemma-3-270m", "smollm2-135m")
PLANNED = [name for name in PATHS if not name.startswith(("quickstart", *MEASURED))]
# Each architecture, and each kind on one of them; the rest, and the quickstart's larger data, are slow.
FAST = {
    "gemma-3-1b/full",
    "llama-3.1-8b/lora",
    "mistral-7b-v0.3/full",
    "qwen3-0.6b/full",
    "qwen3-0.6b/lora",
    "qwen3-0.6b/qlora",
    "qwen3-30b-a3b/lora",
    "smollm2-135m/full",
    "smollm3-3b/full",
}

SMALL: dict[str, Any] = {
    "max_steps": 2,
    "max_rows": 16,
    "max_length": 256,
    "global_batch_size": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "no",
    "evaluation": {"rows": 2, "max_new_tokens": 4},
    "disable_tqdm": True,
}


def chat(index: int, turns: int = 1, system: bool = False) -> list[dict[str, str]]:
    """A short conversation of user and assistant turns."""
    start = [{"role": "system", "content": "You are a helpful assistant."}] if system else []
    pairs = [
        {"role": role, "content": content}
        for turn in range(turns)
        for role, content in (
            ("user", f"Say {index} and {turn}."),
            ("assistant", f"{index}, then {turn}."),
        )
    ]
    return start + pairs


def dolly(index: int) -> dict[str, Any]:
    """A row as in databricks/databricks-dolly-15k."""
    context = "The quick brown fox." if index % 3 == 0 else ""
    answer = " ".join(["Blue."] * (index % 5 + 1))
    return {
        "instruction": f"Name {index}.",
        "context": context,
        "response": answer,
        "category": "open_qa",
    }


def smoltalk(index: int) -> dict[str, Any]:
    """A row as in HuggingFaceTB/smoltalk: some with a system turn, some with several turns."""
    return {"messages": chat(index, index % 3 + 1, index % 4 == 0), "source": "smol-magpie-ultra"}


def magpie(index: int) -> dict[str, Any]:
    """A row as in the smol-magpie-ultra part of HuggingFaceTB/smoltalk, scores and all."""
    return {
        **smoltalk(index),
        "category": "math",
        "difficulty": "easy",
        "quality": "good",
        "conversation_tokens": 40,
    }


def tulu(index: int) -> dict[str, Any]:
    """A row as in allenai/tulu-3-sft-mixture."""
    return {
        "id": f"row_{index}",
        "messages": chat(index, index % 2 + 1),
        "source": "ai2-adapt-dev/oasst1_converted",
    }


def personas(index: int) -> dict[str, Any]:
    """A row as in allenai/tulu-3-sft-personas-instruction-following."""
    messages = chat(index)
    return {
        "id": f"row_{index}",
        "prompt": messages[0]["content"],
        "messages": messages,
        "constraints": ["keywords"],
    }


def ultrachat(index: int) -> dict[str, Any]:
    """A row as in HuggingFaceH4/ultrachat_200k."""
    messages = chat(index, index % 3 + 1)
    return {"prompt": messages[0]["content"], "prompt_id": f"{index:064x}", "messages": messages}


def question_task(index: int) -> dict[str, Any]:
    """A row as in the data of the small recipes."""
    return {
        "instruction": "Answer with the number.",
        "input": f"Ann has {index} pens. How many pens does Ann have?",
        "output": str(index),
        "task_type": "numbers",
        "expected_format": {"regex": "^[0-9]+$"},
    }


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "databricks/databricks-dolly-15k": dolly,
    "HuggingFaceTB/smol-smoltalk": smoltalk,
    "HuggingFaceTB/smoltalk": magpie,
    "allenai/tulu-3-sft-mixture": tulu,
    "allenai/tulu-3-sft-personas-instruction-following": personas,
    "HuggingFaceH4/ultrachat_200k": ultrachat,
}


@dataclass
class Run:
    """A finished small run and what was seen on the way."""

    recipe: Recipe
    folder: Path
    trainer: Any
    before: dict[str, torch.Tensor]
    with_gradient: set[str] = field(default_factory=set)

    @property
    def trainable(self) -> dict[str, torch.Tensor]:
        """The trained tensors as they are after the run."""
        return {
            name: one for name, one in self.trainer.model.named_parameters() if one.requires_grad
        }


def small_recipe(name: str, folder: Path) -> Recipe:
    """The recipe as shipped, on a tiny base and 24 local rows of its data set's shape, cut down to two steps."""
    recipe = load_recipe(PATHS[name])
    changed: dict[str, Any] = {**SMALL, "output_dir": str(folder / "run")}
    if not Path(recipe.model_name).is_dir():
        base = build_base(STAND_INS[PATHS[name].parent.name], folder / "base")
        changed["model_name_or_path"] = str(base)
        changed |= stand_in_data(recipe, folder / "data")
    if recipe.data.eval_split:
        changed["eval_split"] = 4
    return load_recipe(PATHS[name], changed)


def stand_in_data(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """24 local rows of the shape of the recipe's data set, short ones; the keys that name them.

    Data beside a recipe has rows for its test split, too.
    """
    source = recipe.data.datasets[0]
    shape = question_task if Path(source.path).is_dir() else ROWS[source.path]
    rows = [json.dumps(shape(index)) for index in range(24)]
    folder.mkdir()
    split = 24 if recipe.data.test_split is None else 16
    (folder / f"{source.split}.jsonl").write_text("\n".join(rows[:split]) + "\n", "utf-8")
    if rows[split:]:
        text = "\n".join(rows[split:]) + "\n"
        (folder / f"{recipe.data.test_split}.jsonl").write_text(text, "utf-8")
    return {"dataset_name": str(folder), "dataset_config": None}


def train_small(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Run:
    """Run `train()` on the small recipe and watch which tensors get a gradient."""
    page = importlib.import_module("sft_recipes.training.train")
    recipe = small_recipe(name, folder)
    watched: list[Run] = []

    def build_and_watch(*arguments: Any) -> Any:
        trainer = build_trainer(*arguments)
        run = Run(recipe, recipe.output_dir, trainer, weights(trainer.model))
        for tensor_name, tensor in run.trainable.items():
            tensor.register_hook(lambda _, seen=tensor_name: run.with_gradient.add(seen))
        watched.append(run)
        return trainer

    build_trainer = page.build_trainer
    patch.setattr(page, "build_trainer", build_and_watch)
    page.train(recipe)
    return watched[0]


def check_trained(run: Run) -> None:
    """Finished, finite, and every tensor that should learn got a gradient and moved; nothing else moved."""
    assert json.loads((run.folder / "run_state.json").read_text())["state"] == "finished"
    losses = [*logged(run.folder), *logged(run.folder, "eval_loss")]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    counted = json.loads((run.folder / "data.json").read_text())
    assert counted["train"]["rows"] and counted["eval"]["rows"]
    assert all(source["rows_in"] == source["rows_kept"] for source in counted["sources"])
    trainable = run.trainable
    assert run.with_gradient == set(trainable)
    moved = {
        name
        for name, one in run.trainer.model.named_parameters()
        if not torch.equal(one, run.before[name])
    }
    # In the first steps A learns only as far as B has left zero: B is what shows that an adapter is trained.
    must_move = {name for name in trainable if "lora_A" not in name}
    assert must_move and must_move <= moved <= set(trainable)
    # Rows that share a flattened batch are kept apart by rows; one row alone needs nothing.
    flattened = run.trainer.padding_free
    expected = "varlen_attn" if flattened else "sdpa"
    assert run.trainer.model.config._attn_implementation == expected


def check_adapters(run: Run) -> None:
    """LoRA trains adapters only, on every linear layer of the body; experts where the recipe names them."""
    names = set(run.trainable)
    assert names and all("lora_" in name for name in names)
    layers = run.trainer.model.config.num_hidden_layers
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert sum(f"{projection}.lora_B" in name for name in names) == layers
    experts = [name for name in names if ".experts." in name and "lora_B" in name]
    if run.recipe.model.get("lora_target_parameters"):
        assert len(experts) == 2 * layers and not any(".mlp.gate." in name for name in names)
    else:
        assert sum("down_proj.lora_B" in name for name in names) == layers


def test_all_recipes_are_found_and_have_a_stand_in() -> None:
    """What `init` lists is what is tested here, and every folder but the quickstart names an architecture."""
    assert set(PATHS) == {recipe.name for recipe in shipped_recipes()}
    folders = {name.partition("/")[0] for name in PATHS}
    assert folders == {*STAND_INS, "quickstart"} and set(STAND_INS.values()) == set(ARCHITECTURES)
    assert set(PATHS) >= FAST


@pytest.mark.parametrize("name", PATHS)
def test_recipe_reads_and_says_what_it_is(name: str) -> None:
    """Every key is known, the first line is the summary `init` shows, the run folder carries the recipe's name, the
    README names the file, and nothing is pushed or reported."""
    recipe = load_recipe(PATHS[name])
    text = PATHS[name].read_text(encoding="utf-8")
    assert re.match(r"# \S.{20,118}\.\n", text)
    assert recipe.training["output_dir"] == f"runs/{name.replace('/', '-')}"
    assert "push_to_hub" not in recipe.values and "report_to" not in recipe.values
    assert recipe.data.eval_split or recipe.data.test_split
    assert "evaluation" in recipe.values and recipe.training["eval_strategy"] != "no"
    if not name.startswith("quickstart"):
        readme = (PATHS[name].parent / "README.md").read_text(encoding="utf-8")
        assert f"recipes/{name}.yaml" in readme and recipe.model_name in readme
        assert ("Measured" if name.startswith(MEASURED) else "never run") in readme
        assert Path(recipe.data.datasets[0].path).name in readme


@pytest.mark.parametrize("name", PLANNED)
def test_recipe_numbers(name: str) -> None:
    """The batch is stated in rows and, in its comment, rightly in tokens; it divides on 1, 2, 4 and 8 devices; epochs
    are the chapter's 1 to 3; a rate outside the chapter's 1e-5 to 5e-5 has its source in the comment above it."""
    recipe = load_recipe(PATHS[name])
    text = PATHS[name].read_text(encoding="utf-8")
    found = re.search(
        r"^global_batch_size: (\d+)  # (\d+) x ([\d,]+) = ([\d,]+) tokens a step at most$",
        text,
        re.M,
    )
    assert found
    rows, again, length, tokens = (int(number.replace(",", "")) for number in found.groups())
    assert rows == again == recipe.global_batch_size
    assert length == recipe.labels.max_length and rows * length == tokens
    assert all(
        rows % (recipe.training["per_device_train_batch_size"] * devices) == 0
        for devices in (1, 2, 4, 8)
    )
    assert 1 <= recipe.training["num_train_epochs"] <= 3
    comment = re.search(r"((?:^#.*\n)+)(?:^\w.*\n)*?^learning_rate:", text, re.M)
    sources = r"torchtune|axolotl|open-instruct|TRL|handbook|smollm3|same file"
    assert comment and re.search(sources, comment[1])


@pytest.mark.parametrize("data", ROWS)
def test_rows_have_the_format_the_recipe_relies_on(data: str) -> None:
    """No recipe names a format: it is detected from the columns of its data set."""
    mapping = {"input": "context", "output": "response"} if data.endswith("dolly-15k") else {}
    assert detect_format(ROWS[data](0), mapping, data) == ("instruction" if mapping else "messages")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in PATHS]
)
def test_recipe_trains_two_steps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with the recipe's own keys leave a finished run with finite losses in which every trainable tensor got
    a gradient and moved; adapters sit where the recipe says; the saved folder loads with the weights that were trained.
    """
    run = train_small(name, tmp_path, monkeypatch)
    check_trained(run)
    peft = bool(run.recipe.model.get("use_peft"))
    if peft:
        check_adapters(run)
    loaded = load_for_inference(str(run.folder))
    assert loaded.kind == ("adapter" if peft else "model")
    saved = dict(loaded.model.named_parameters())
    assert all(torch.equal(saved[key], one) for key, one in run.trainable.items())


@pytest.mark.parametrize("name", [name for name in PATHS if name.startswith("qwen3")])
def test_qwen_recipes_serve_without_think_block(name: str, tmp_path: Path) -> None:
    """The base's own template would put a think block before the answer; the recipe's does not, and it ends turns with
    a token that the base has."""
    base = str(build_base(STAND_INS[PATHS[name].parent.name], tmp_path / "base"))
    own = attach_chat_template(load_tokenizer(base), TemplateSettings("tokenizer"))
    chosen = attach_chat_template(load_tokenizer(base), load_recipe(PATHS[name]).template)
    assert "<think>" in own.render(chat(1)) and "<think>" not in chosen.render(chat(1))
    assert chosen.tokenizer.eos_token == "<|im_end|>" and len(chosen.tokenizer) == len(
        own.tokenizer
    )


def test_4bit_leaves_experts_as_they_are(tmp_path: Path) -> None:
    """Why the mixture of experts has no qlora.yaml: bitsandbytes quantizes linear layers, and its experts are none."""
    build_base("qwen3_moe", tmp_path / "base")
    overrides = {
        "model_name_or_path": str(tmp_path / "base"),
        "load_in_4bit": True,
        "output_dir": str(tmp_path),
    }
    model = load_model(load_recipe(PATHS["qwen3-30b-a3b/lora"], overrides))
    kinds = {name: one.dtype for name, one in model.named_parameters()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == torch.uint8
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"] == torch.float32


def planned_bytes(recipe: Recipe, architecture: str) -> tuple[int, float]:
    """Trained parameters, and bytes of weights, gradients and optimizer, by the formula that the READMEs state."""
    from peft import get_peft_model

    model: Any = build_real_shape(architecture)
    total = model.num_parameters()
    linear = [
        module for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    quantized = sum(module.weight.numel() for module in linear) - model.lm_head.weight.numel()
    adapter = lora_config(recipe, model)
    if adapter is None:
        return total, 16 * total
    with torch.device("meta"):
        adapted: Any = get_peft_model(model, adapter)
    trained = adapted.num_parameters(only_trainable=True)
    if not recipe.model.get("load_in_4bit"):
        return trained, 2 * total + 16 * trained
    constants = 8 / 64 + 32 / (64 * 256) if recipe.model.get("use_bnb_nested_quant") else 32 / 64
    return trained, (4 + constants) / 8 * quantized + 2 * (total - quantized) + 16 * trained


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_readme_figures_follow_from_the_recipe(name: str) -> None:
    """Trained parameters and planned memory in the README are those of the real model's shape and the recipe's keys."""
    trained, size = planned_bytes(load_recipe(PATHS[name]), STAND_INS[PATHS[name].parent.name])
    readme = (PATHS[name].parent / "README.md").read_text(encoding="utf-8")
    assert f"| `recipes/{name}.yaml` | {trained:,} | {size / 1e9:.1f} GB |" in readme
