"""The estimate of `check` beside the peak memory of real training steps on a CPU. Needs Linux.

    python -m benchmarks.memory [--models DIR,DIR] [--json FILE] [--shapes NAME,NAME]

Each shape is trained for two steps in a process of its own, from the recipe on. Measured is by how
much its resident memory grows at most from right before the model is loaded, so what the libraries
take is not in it. glibc gives large blocks back at once here; with its defaults the peak of a
flattened batch was 1.58 GB instead of 1.38 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.material import WORDS, chatml_tokenizer

WANTED_WITHIN = 0.25
MEGA = 1e6
# The optimizer's states are there from the second step on.
STEPS = 2


@dataclass(frozen=True)
class Words:
    """The fewest and the most words of a text; most words here are one token."""

    fewest: int
    most: int


@dataclass(frozen=True)
class Shape:
    """A recipe to measure: a model of `MODELS` or in a folder, `rows` to train on, and its keys.

    Where there are as many rows as a batch holds, both steps train the same batch.
    """

    name: str
    model: str
    rows: int
    prompt: Words
    completion: Words
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """Bytes estimated and measured for a shape, the estimate's parts, seconds of training."""

    name: str
    estimated: int
    measured: int
    seconds: float
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Estimated over measured."""
        return self.estimated / self.measured


# Llama's own settings; the wide one has the vocabulary and the width of Gemma-3-270m.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "94M": {
        "vocab_size": 32_000,
        "hidden_size": 640,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "wide": {
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "narrow": {
        "vocab_size": 16_000,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
    },
}
SHORT = Words(20, 300)
LONG = Words(1500, 1900)
ANSWER = Words(10, 60)
LONG_ANSWER = Words(100, 150)
FULL: Mapping[str, Any] = {"per_device_train_batch_size": 8, "bf16": False}
LORA: Mapping[str, Any] = {"use_peft": True, "lora_r": 16, "dtype": "float32"}
CHECKPOINTING: Mapping[str, Any] = {"activation_checkpointing": True}
SHAPES = (
    Shape("full", "94M", 8, SHORT, ANSWER, FULL),
    Shape("full, checkpointing", "94M", 8, SHORT, ANSWER, {**FULL, **CHECKPOINTING}),
    Shape("full, bf16 autocast", "94M", 8, SHORT, ANSWER, {**FULL, "bf16": True}),
    Shape("wide vocabulary, full", "wide", 4, SHORT, LONG_ANSWER, {**FULL, **CHECKPOINTING}),
    Shape("wide vocabulary, LoRA", "wide", 4, SHORT, LONG_ANSWER, {**FULL, **LORA}),
    Shape(
        "4 x 2,048 padded, checkpointing",
        "narrow",
        4,
        LONG,
        ANSWER,
        {**FULL, **CHECKPOINTING, "padding_free": False, "per_device_train_batch_size": 4},
    ),
    Shape(
        "packed 2 x 1,024",
        "narrow",
        64,
        SHORT,
        ANSWER,
        {**FULL, "packing": True, "max_length": 1024, "per_device_train_batch_size": 2},
    ),
)


def shapes_of(folder: str) -> list[Shape]:
    """The shapes that real weights are measured in."""
    name = Path(folder).name
    return [
        Shape(f"{name}, full, checkpointing", folder, 4, SHORT, ANSWER, {**FULL, **CHECKPOINTING}),
        Shape(f"{name}, LoRA", folder, 4, SHORT, ANSWER, {**FULL, **LORA}),
    ]


def run_shape(shape: Shape, folder: Path) -> Result:
    """Train a shape in a process of its own; its files stand in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = _write_recipe_keys(shape, folder)
    (folder / "keys.json").write_text(json.dumps(keys), encoding="utf-8")
    # Every tensor of a megabyte and more gets pages of its own, which go back when it is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.memory", "--child", str(folder)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{shape.name}: {child.stderr}")
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    return Result(name=shape.name, **figures)


def _write_recipe_keys(shape: Shape, folder: Path) -> dict[str, Any]:
    """Write rows, tokenizer and weights of a random model; return the keys of their recipe."""
    model = shape.model
    if model in MODELS:
        model = str(chatml_tokenizer(folder / "model"))
        _save_random_model(MODELS[shape.model], model)
    generator = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(shape.rows):
            row = {
                "prompt": _text(generator, shape.prompt),
                "completion": _text(generator, shape.completion),
            }
            file.write(json.dumps(row) + "\n")
    return {
        "model_name_or_path": model,
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"),
        "max_length": 2048,
        "use_cpu": True,
        "activation_checkpointing": False,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **shape.keys,
    }


def _text(generator: random.Random, words: Words) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(words.fewest, words.most)))


def _save_random_model(sizes: Mapping[str, Any], folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)


def measure(folder: Path) -> None:
    """Train the recipe of `folder` in this process, and leave the figures there."""
    from sft_recipes.data.opening import open_labeller
    from sft_recipes.data.prepare import prepare
    from sft_recipes.recipe_keys import make_recipe
    from sft_recipes.training.arguments import sft_config
    from sft_recipes.training.check import make_plan
    from sft_recipes.training.construction import meta_model
    from sft_recipes.training.measure import PeakMemory
    from sft_recipes.training.memory import Strategy
    from sft_recipes.training.train import build_trainer

    recipe = make_recipe(json.loads((folder / "keys.json").read_text(encoding="utf-8")))
    labeller = open_labeller(recipe)
    data = prepare(recipe, labeller, folder / "prepared", progress=False)
    plan = make_plan(recipe, data, sft_config(recipe), Strategy(), meta_model(recipe))
    _warm_up()
    memory = PeakMemory()
    trainer = build_trainer(recipe, labeller, data)
    started = time.perf_counter()
    trainer.train()
    figures = {
        "estimated": plan["bytes at peak, estimated"],
        "measured": memory.bytes(),
        "seconds": round(time.perf_counter() - started, 1),
        "parts": plan["bytes a device"],
    }
    (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def _warm_up() -> None:
    """A first step makes the libraries load and set up what they then keep."""
    import torch

    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(64, 64)).sum().backward()
    optimizer.step()


def print_table(results: Sequence[Result]) -> None:
    """One line for each shape."""
    print(f"{'shape':40} {'estimate':>10} {'measured':>10} {'ratio':>6} {'seconds':>8}")
    for result in results:
        sizes = f"{result.estimated / MEGA:7,.0f} MB {result.measured / MEGA:7,.0f} MB"
        print(f"{result.name:40} {sizes} {result.ratio:6.2f} {result.seconds:8.1f}")
    outside = [result for result in results if abs(result.ratio - 1) > WANTED_WITHIN]
    print(f"within {WANTED_WITHIN:.0%}: {len(results) - len(outside)} of {len(results)}")


def main() -> None:
    """Measure the shapes one after another and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="", help="folders of real weights, with commas between")
    parser.add_argument("--shapes", default="", help="parts of names, with commas between")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child)
        return
    shapes = list(SHAPES)
    if options.models:
        shapes = []
        for folder in options.models.split(","):
            shapes += shapes_of(folder)
    if options.shapes:
        wanted = options.shapes.split(",")
        shapes = [shape for shape in shapes if any(part in shape.name for part in wanted)]
    results = []
    with tempfile.TemporaryDirectory() as name:
        for number, shape in enumerate(shapes):
            results.append(run_shape(shape, Path(name) / str(number)))
            print(f"{shape.name}: {results[-1].ratio:.2f}", flush=True)
    print_table(results)
    if options.json:
        records = [{**asdict(result), "ratio": result.ratio} for result in results]
        options.json.write_text(json.dumps(records, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
