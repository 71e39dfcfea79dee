"""Every row is trained as often as it should be, however batches are made; what is not is listed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.consumption import Consumption
from sft_recipes.training.train import train
from tests.conftest import instruction_rows
from tests.training.tiny import first_batch, prepared, trainer_for

FLAT = {"padding_free": True}
BATCHES: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "flattened": FLAT,
    "packed": {"packing": True, "max_length": 64},
    "padded to a multiple": {"padding_free": False, "pad_to_multiple_of": 8},
    "flattened to a multiple": {**FLAT, "pad_to_multiple_of": 8},
    "accumulated, with a remainder": {
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 2,
    },
    "several passes over equal rows": {"weight": 2.5},
    "all tokens trained": {"train_on": "all", **FLAT},
}


@pytest.mark.parametrize("case", BATCHES)
def test_each_row_is_trained_twice_in_two_epochs(
    case: str, write_recipe: Callable[..., Path]
) -> None:
    """Counted where the model gets them, all 41 rows, two of them the same, were trained in both epochs."""
    path = write_recipe(**{"num_train_epochs": 2, "save_strategy": "no", **BATCHES[case]})
    rows = instruction_rows(40)
    (path.parent / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])
    )
    account = json.loads((train(load_recipe(path)) / "consumption.json").read_text())
    count = 102 if case.startswith("several") else 41
    assert (account["rows"], account["times_trained"], account["epochs"]) == (count, 2 * count, 2.0)
    assert (
        account["repeated"],
        account["left_out"],
        account["not_in_the_data"],
        account["shown"],
    ) == (0, 0, 0, [])


def test_broken_epoch_leaves_rows_open(write_recipe: Callable[..., Path]) -> None:
    """Seven steps of eight rows over 40: every row once, sixteen of them twice; nothing is missing or too much."""
    account = json.loads(
        (train(load_recipe(write_recipe(max_steps=7))) / "consumption.json").read_text()
    )
    assert (account["rows"], account["times_trained"], account["epochs"]) == (40, 56, 1.4)
    assert (account["repeated"], account["left_out"]) == (0, 0)


def test_rows_left_out_are_listed(write_recipe: Callable[..., Path]) -> None:
    """Dropping the last batch of 38 rows in batches of 8 leaves 6 out, and the account names them."""
    path = write_recipe(dataloader_drop_last=True, max_rows=38)
    account = json.loads((train(load_recipe(path)) / "consumption.json").read_text())
    assert (account["times_trained"], account["left_out"], account["repeated"]) == (32, 6, 0)
    assert len(account["shown"]) == 6 and {one["trained"] for one in account["shown"]} == {0}
    assert all(
        "train.jsonl:row " in one["row"] and one["row"].endswith("(counted from 0)")
        for one in account["shown"]
    )


def test_documents_that_are_no_row_are_seen(write_recipe: Callable[..., Path]) -> None:
    """One changed token or label in one document of a batch: one document is no row; the others keep their count."""
    path = write_recipe(padding_free=True)
    trainer = trainer_for(path)
    recipe = load_recipe(path)
    batch = first_batch(trainer)
    changed = {
        name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in batch.items()
    }
    changed["input_ids"][0, 3] += 1
    relabelled = {
        name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in batch.items()
    }
    last = int((relabelled["labels"][0] != -100).nonzero()[-1])
    relabelled["labels"][0, last] = -100
    for one, strange in ((batch, 0), (changed, 1), (relabelled, 1)):
        consumption = Consumption(prepared(recipe)[1], recipe, torch.device("cpu"))
        consumption.count(one)
        total = consumption.total(trainer.accelerator)
        assert (int(total[:-1].sum()), int(total[-1])) == (8 - strange, strange)


def test_fingerprint_follows_rows_and_their_order(write_recipe: Callable[..., Path]) -> None:
    """The same rows give the same fingerprint, another order or another label another one."""
    path = write_recipe()
    found = []
    for keys in (
        {},
        {"output_dir": str(path.parent / "again")},
        {"max_rows": 39},
        {"train_on": "all"},
    ):
        recipe = load_recipe(path, keys)
        found.append(Consumption(prepared(recipe)[1], recipe, torch.device("cpu")).fingerprint)
    assert found[0] == found[1] and len(set(found)) == 3
