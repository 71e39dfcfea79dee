"""Models made on the device, rows made here, trainers on both, and the steps of a run measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu.flops import Work
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.shapes import Batch, ModelShape, Steps
from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.prepared import PreparedData
from sft_recipes.data.row_fingerprint import row_fingerprints
from sft_recipes.models import lora_config
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import make_recipe
from sft_recipes.training.arguments import sft_config
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.trainer import RecipeTrainer

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
# The share of a row that is prompt.
PROMPT = 2 / 3
# Rows made beyond those that are trained, since packs are not quite full.
SPARE = 1.3
# bfloat16 keeps 8 bits of a number, of which a loss loses none but the last.
LOSS_TOLERANCE = 1e-2 if ON_CUDA else 1e-3


def synchronize() -> None:
    """Wait for the device."""
    if ON_CUDA:
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give back what deleted models held, and begin to look for a new peak."""
    gc.collect()
    if ON_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def llama_config(shape: ModelShape, **others: Any) -> LlamaConfig:
    """The model's config; `others` are more of its keys."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **others,
    )


def random_model(config: LlamaConfig, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """A model with random weights, made where it is used; the same for the same config."""
    torch.manual_seed(0)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def tiny_tokenizer() -> Any:
    """A tokenizer of three ids: trainers ask it for the padding id, and rows are ids already."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokenized rows with labels, and what the counting of rows has to know of them."""

    dataset: Dataset
    fingerprints: Any
    longest: int


def make_rows(tokens: int, shortest: int, longest: int, vocabulary: int) -> Rows:
    """Rows of at least so many tokens, the same each time; the last third of a row is trained.

    Lengths are as in chats: many are short and few are long.
    """
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(shortest * (longest / shortest) ** generator.random()))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = generator.integers(3, vocabulary, offsets[-1], dtype=np.int32)
    labels = ids.copy()
    for start, length in zip(offsets[:-1], lengths, strict=True):
        labels[start : start + int(length * PROMPT)] = IGNORE_INDEX
    columns = {
        "input_ids": np.split(ids, offsets[1:-1]),
        "labels": np.split(labels, offsets[1:-1]),
    }
    fingerprints = row_fingerprints(ids, labels, offsets)
    return Rows(Dataset.from_dict(columns), fingerprints, max(lengths))


def rows_for(batch: Batch, steps: int, shortest: int, vocabulary: int, longest: int = 0) -> Rows:
    """Enough rows for so many steps. `longest` row in tokens, if that is not the batch's length."""
    tokens = int(batch.rows * batch.length * steps * SPARE)
    return make_rows(tokens, shortest, longest or batch.length, vocabulary)


def make_keys(folder: Path, batch: Batch, steps: Steps, **others: Any) -> dict[str, Any]:
    """A recipe's keys for a short run, whose weights hardly change."""
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder),
        "output_dir": str(folder / "run"),
        "max_length": batch.length,
        "per_device_train_batch_size": batch.rows,
        "max_steps": steps.total,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "data_seed": 42,
        **others,
    }


def our_trainer(
    model: Any, rows: Rows, keys: Mapping[str, Any], numpy: bool = True, count: bool = True
) -> Any:
    """This project's trainer as its `train` builds it.

    `numpy`: rows are arrays, else lists; `count`: trained rows are counted.
    """
    recipe = make_recipe(keys)
    trainer: Any = RecipeTrainer(
        model,
        args=sft_config(recipe),
        train_dataset=rows.dataset,
        processing_class=tiny_tokenizer(),
        peft_config=lora_config(recipe, model),
    )
    if not numpy:
        trainer.train_dataset = trainer.train_dataset.with_format(None)
    if count:
        trainer.consumption = counting(rows, recipe)
    return trainer


def counting(rows: Rows, recipe: Recipe) -> Consumption:
    """What counts the rows of a run."""
    summary = {"train": {"longest": rows.longest}}
    folder = recipe.output_dir
    data = PreparedData(folder, rows.dataset, None, [], [], summary, rows.fingerprints)
    return Consumption(data, recipe, DEVICE)


def stock_trainer(model: Any, rows: Rows, keys: Mapping[str, Any]) -> Any:
    """TRL's own trainer with the same keys, and its own defaults for the rest."""
    values = {
        "activation_checkpointing": True,
        "bf16": ON_CUDA,
        "use_cpu": not ON_CUDA,
        "dataloader_pin_memory": ON_CUDA,
        **make_recipe(keys).training,
        "max_length": None,  # rows fit
    }
    config = SFTConfig(**values)
    return SFTTrainer(
        model, args=config, train_dataset=rows.dataset, processing_class=tiny_tokenizer()
    )


class StepClock(TrainerCallback):
    """When each optimizer step ended, with the device's work done, and what was logged of it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.logs: list[Mapping[str, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the entry of a step; the last entry of a run is a summary."""
        if logs and "loss" in logs:
            self.logs.append(dict(logs))


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A short run: loss and gradient norm of each step; seconds and tokens of those that count.

    Tokens are real ones, without padding. The peak of memory is 0 where the device does not tell.
    """

    losses: Sequence[float]
    gradient_norms: Sequence[float]
    seconds: Sequence[float]
    tokens: Sequence[int]
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Over the steps that count."""
        return sum(self.tokens) / sum(self.seconds)

    @property
    def step_ms(self) -> float:
        """Milliseconds of the median step."""
        return 1000 * float(np.median(self.seconds))


def run_steps(trainer: Any, steps: Steps) -> Trajectory:
    """Train to the end and return what was measured."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    ends = clock.ends[steps.warm_up - 1 :]
    seen = [int(log["num_tokens"]) for log in clock.logs][steps.warm_up - 1 :]
    return Trajectory(
        losses=[log["loss"] for log in clock.logs],
        gradient_norms=[log["grad_norm"] for log in clock.logs],
        seconds=np.diff(ends).tolist(),
        tokens=np.diff(seen).tolist(),
        peak_bytes=torch.cuda.max_memory_allocated() if ON_CUDA else 0,
    )


def report_memory(report: ItemReport, name: str, run: Trajectory) -> None:
    """The peak of a run's memory, where the device tells."""
    if run.peak_bytes:
        report.number(f"{name}, peak memory", run.peak_bytes / 1e9, "GB")


def largest_difference(values: Sequence[float], references: Sequence[float]) -> float:
    """The largest difference of a value from its reference, as a share of that."""
    pairs = zip(values, references, strict=True)
    return max(abs(value - reference) / abs(reference) for value, reference in pairs)


def work_of(trainer: Any, rows: Rows, shape: ModelShape) -> Work:
    """What the operations of a trainer's steps on packs follow from, averaged over its rows."""
    lengths: list[int] = []
    for pack in trainer.train_dataset["seq_lengths"]:
        lengths.extend(int(length) for length in pack)
    adapter = 0
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            adapter += weight.numel()
    trained = 0
    for labels in rows.dataset.with_format("numpy")["labels"]:
        trained += int((labels != IGNORE_INDEX).sum())
    return Work(
        model=shape,
        adapter=adapter,
        tokens=sum(lengths),
        trained=trained,
        squares=sum(length**2 for length in lengths),
    )
