"""What `upstream/trainer.py` takes from TRL and transformers is still called, in this order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from sft_recipes.upstream.trainer import TrainerWithMoments
from tests.conftest import build_model, build_tokenizer


class Witness(TrainerWithMoments):
    """Writes down its moments, with the step at which they came."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[str, int]] = []
        self.norms: list[float] = []
        super().__init__(*args, **kwargs)

    def before_first_step(self) -> None:
        assert self.model_wrapped is not None and self.optimizer is not None
        self.seen.append(("first step", self.state.global_step))

    def before_optimizer_step(self, gradient_norm: Any) -> None:
        self.norms.append(float(gradient_norm))
        self.seen.append(("optimizer step", self.state.global_step))

    @contextlib.contextmanager
    def around_checkpoint(self, folder: Path) -> Iterator[None]:
        assert not list(folder.glob("*.safetensors"))
        self.seen.append(("save begins", self.state.global_step))
        yield
        names = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
        self.seen.append(("save ends", self.state.global_step))


class WeightsBefore(TrainerCallback):
    """The step that transformers says it is about to take; called after the norm is known."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        self.steps.append(state.global_step)


def make_trainer(folder: Path, **settings: Any) -> Witness:
    """A trainer of four rows, two a step, which saves each step."""
    tokenizer = build_tokenizer()
    rows = {
        "input_ids": [[5, 6, 7, 8], [7, 8, 9], [3, 4, 5], [9, 9, 4, 2]],
        "labels": [[-100, 6, 7, 8], [-100, 8, 9], [-100, 4, 5], [-100, 9, 4, 2]],
    }
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        **settings,
    )
    model = build_model(len(tokenizer))
    return Witness(
        model, args=config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
    )


def test_moments_come_in_their_order(tmp_path: Path) -> None:
    """Once before the first step, once before each optimizer step with a norm, around each save: none is left out."""
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    clock = WeightsBefore()
    trainer.add_callback(clock)
    trainer.train()
    expected = [("first step", 0)]
    for step in range(4):
        expected.append(("optimizer step", step))
        expected.append(("save begins", step + 1))
        expected.append(("save ends", step + 1))
    assert trainer.seen == expected
    assert clock.steps == [0, 1, 2, 3]
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert trainer.norms == logged and all(norm > 0 for norm in logged)


def test_a_run_that_has_taken_its_steps_takes_none(tmp_path: Path) -> None:
    """Resumed in the middle of an epoch after its last step it begins, and trains nothing."""
    make_trainer(tmp_path, max_steps=1).train()
    again = make_trainer(tmp_path, max_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.seen == [("first step", 1)]
    assert again.state.global_step == 1


def test_noted_numbers_are_logged(tmp_path: Path) -> None:
    """What is noted of a batch stands in TRL's log under TRL's names, averaged or counted as TRL does."""
    trainer = make_trainer(tmp_path)
    assert trainer.tokens_seen == 0
    trainer.model.train()
    trainer.tokens_seen = 100
    trainer.note_batch(0.25, 10)
    trainer.note_batch(0.75, 20)
    trainer.log({"loss": 1.0})
    entry = trainer.state.log_history[-1]
    assert (entry["mean_token_accuracy"], entry["num_tokens"]) == (0.5, 130)
    trainer.model.eval()
    trainer.note_batch(0.1, 10)
    trainer.forget_evaluation()
    trainer.log({"eval_loss": 1.0})
    assert "eval_mean_token_accuracy" not in trainer.state.log_history[-1]
    assert trainer.tokens_seen == 130


def test_trl_counts_tokens_under_the_same_name(tmp_path: Path) -> None:
    """TRL's own loss adds its tokens to the count that this project resumes."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.tokens_seen == trainer.state.log_history[0]["num_tokens"] > 0
