"""`eval_NAME_loss` is the loss of that data set's rows alone, however batches are made, from one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes.data.prepared import PreparedData
from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.evaluate_while_training import rehearse_evaluation
from sft_recipes.training.train import train
from sft_recipes.training.trainer import RecipeTrainer
from tests.conftest import instruction_rows
from tests.training.test_two_processes import launch
from tests.training.tiny import logged, prepared, trainer_for

BATCHES: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "flattened": {"padding_free": True},
    "packed": {"packing": True, "max_length": 128},
    "padded to a multiple": {"padding_free": False, "pad_to_multiple_of": 8},
    "all tokens trained": {"train_on": "all", "padding_free": False},
}
NO_ANSWERS = {"during_training": False}


@pytest.fixture
def mixture(
    write_rows: Callable[..., Path], write_recipe: Callable[..., Path]
) -> Callable[..., Path]:
    """A recipe for two data sets, `words` and `long`, with shared rows and 16 rows held out."""
    rows = instruction_rows(60)
    longer = [{**row, "output": f"{row['output']} and ten more"} for row in rows[36:]]
    write_rows([*rows[:36], rows[0]], "words.jsonl")
    write_rows([*longer, *rows[:12]], "long.jsonl")

    def write(**keys: Any) -> Path:
        fixed = {
            "datasets": ["./words.jsonl", "./long.jsonl"],
            "eval_split": 16,
            "per_device_eval_batch_size": 3,
            "eval_strategy": "epoch",
            "evaluation": NO_ANSWERS,
        }
        return write_recipe(**{**fixed, **keys})

    return write


def rows_of(data: PreparedData, name: str) -> list[dict[str, Any]]:
    """The held-out rows of a data set."""
    assert data.held_out is not None and data.eval is not None
    number = list(data.held_out.names).index(name)
    places = (data.held_out.numbers == number).nonzero()[0]
    return list(data.eval.select(places))


def loss_alone(model: Any, rows: Sequence[dict[str, Any]]) -> float:
    """The mean loss a trained token, each row through the model by itself, by the library's own shift."""
    total, tokens = 0.0, 0
    model.eval()
    for row in rows:
        labels = torch.tensor([list(row["labels"])])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([list(row["input_ids"])]), labels=labels)
        count = int((labels[:, 1:] != -100).sum())
        total += float(output.loss) * count
        tokens += count
    return total / tokens


def evaluated(trainer: RecipeTrainer) -> dict[str, float]:
    return {name: value for name, value in trainer.evaluate().items() if name.endswith("_loss")}


@pytest.mark.parametrize("fused", [False, True], ids=["trained positions", "TRL's head"])
@pytest.mark.parametrize("case", BATCHES)
def test_each_loss_is_that_of_the_rows_alone(
    case: str, fused: bool, mixture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sets, one with a row that the other has, too; and `eval_loss` is what it is without them."""
    path = mixture(**BATCHES[case])
    trainer = trainer_for(path)
    if fused:
        monkeypatch.setattr(trainer, "trained_positions_only", False)
    _, data = prepared(load_recipe(path))
    assert data.held_out is not None
    assert len(set(data.held_out.fingerprints)) < len(data.held_out.fingerprints), "none is shared"
    losses = evaluated(trainer)
    assert losses.keys() == {"eval_loss", "eval_words_loss", "eval_long_loss"}
    for name in ("words", "long"):
        expected = loss_alone(trainer.model, rows_of(data, name))
        assert losses[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)
    assert losses["eval_words_loss"] != pytest.approx(losses["eval_long_loss"], rel=1e-4)
    trainer.data_set_losses = None
    assert evaluated(trainer) == {"eval_loss": losses["eval_loss"]}


def test_one_pass_over_the_model(mixture: Callable[..., Path]) -> None:
    """The model is asked as often with the losses of the sets as without."""
    trainer = trainer_for(mixture())
    calls: list[int] = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.evaluate()
    with_losses = len(calls)
    trainer.data_set_losses = None
    trainer.evaluate()
    assert len(calls) == 2 * with_losses > 0


def test_dft_is_the_loss_that_is_asked_for(mixture: Callable[..., Path]) -> None:
    """With `loss_type: dft` each set's loss is of that kind: in one batch their mean is `eval_loss`."""
    path = mixture(loss_type="dft", padding_free=False, per_device_eval_batch_size=64)
    trainer = trainer_for(path)
    _, data = prepared(load_recipe(path))
    losses = evaluated(trainer)
    total, tokens = 0.0, 0
    for name in ("words", "long"):
        for row in rows_of(data, name):
            count = sum(label != -100 for label in row["labels"][1:])
            total += losses[f"eval_{name}_loss"] * count
            tokens += count
    assert total / tokens == pytest.approx(losses["eval_loss"], rel=1e-5)


def test_a_set_that_is_not_held_out_and_a_single_one_have_none(
    mixture: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """With rows of one data set held out there is `eval_loss` alone."""
    write_rows(instruction_rows(80)[60:], "beside.jsonl")
    beside = {"path": "./beside.jsonl", "held_out": False}
    one = trainer_for(mixture(datasets=["./words.jsonl"]))
    two = trainer_for(mixture(datasets=["./words.jsonl", beside], output_dir="./two"))
    for trainer in (one, two):
        assert evaluated(trainer).keys() == {"eval_loss"}


def test_the_best_model_may_be_chosen_by_one_set(mixture: Callable[..., Path]) -> None:
    """`metric_for_best_model` takes the loss of a data set, lower is better, though no batch need have its rows."""
    keys = {"load_best_model_at_end": True, "save_strategy": "epoch"}
    trainer = trainer_for(mixture(metric_for_best_model="long_loss", **keys))
    rehearse_evaluation(trainer)
    assert trainer.args.greater_is_better is False
    trainer = trainer_for(mixture(metric_for_best_model="short_loss", **keys))
    with pytest.raises(InputError, match="no evaluation gives 'eval_short_loss'"):
        rehearse_evaluation(trainer)


def test_answers_of_each_set_are_scored_in_training(mixture: Callable[..., Path]) -> None:
    """log.jsonl has exact match by data set beside the losses; the line on the terminal says the total."""
    answers = {"rows": 16, "max_new_tokens": 4}
    run = train(load_recipe(mixture(evaluation=answers)))
    for name in ("words", "long"):
        assert (
            len(logged(run, f"eval_{name}_exact_match"))
            == len(logged(run, f"eval_{name}_loss"))
            == 1
        )


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["padded", "flattened"])
def test_two_processes_tell_the_same_losses(
    batches: str, mixture: Callable[..., Path], tmp_path: Path
) -> None:
    """17 held-out rows on two ranks of 3: rows that fill up the last batch count once, as in one process."""
    path = mixture(
        eval_split=17, global_batch_size=8, per_device_train_batch_size=4, **BATCHES[batches]
    )
    result = launch(path)
    assert result.returncode == 0, result.stderr[-3000:]
    one = train(load_recipe(path, {"output_dir": str(tmp_path / "one")}))
    for name in ("words", "long"):
        key = f"eval_{name}_loss"
        assert logged(tmp_path / "run", key) == pytest.approx(logged(one, key), rel=1e-4)
