"""Twenty training faults for `benchmarks.gate_faults`, and the command of this project with one of them in it.

    python -m benchmarks.fault_injections FAULT check|train|evaluate ...

A fault of the user's (data, recipe, template) stands in the files that the command reads. A fault that imitates a bug
in label code is put in behind our own verification, where the rows reach the trainer or its collator: in front of it
the checks would find it at once. A fault of a library is put into the library, one of serving into the evaluation.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart"
IGNORE_INDEX = -100  # torch's

Row = dict[str, Any]
# From input_ids, labels and renderer of a prepared row to the input_ids and labels that the trainer gets.
RowChange = Callable[[list[int], list[int], Any], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Fault:
    """One fault: what is wrong, where it is put in, and how.

    `recipe` and `keys` are what is trained, `data` changes the training rows, `template` the chat template's text,
    `training` patches the process that checks and trains, `serving` the one that evaluates with `options`.
    """

    what: str
    where: str
    recipe: str = "full"
    keys: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[list[Row]], list[Row]] | None = None
    template: Callable[[str], str] | None = None
    training: Callable[[], None] | None = None
    serving: Callable[[], None] | None = None
    options: Sequence[str] = ()


# -- rows as they reach the trainer, behind all checks ---------------------------------------------------------------


def end_of_turn_unlabelled(
    ids: list[int], labels: list[int], renderer: Any
) -> tuple[list[int], list[int]]:
    """The last trained token, which ends the turn, carries no label."""
    last = max(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    return ids, [*labels[:last], IGNORE_INDEX, *labels[last + 1 :]]


def header_trained(ids: list[int], labels: list[int], renderer: Any) -> tuple[list[int], list[int]]:
    """The generation prompt in front of the answer is trained, too."""
    asked = [{"role": "user", "content": "Name a colour."}]
    header = renderer.render(asked, add_generation_prompt=True)[len(renderer.render(asked)) :]
    count = len(renderer.tokenizer(header, add_special_tokens=False)["input_ids"])
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    return ids, [*labels[: first - count], *ids[first - count : first], *labels[first:]]


def prompt_trained(ids: list[int], labels: list[int], renderer: Any) -> tuple[list[int], list[int]]:
    """Every token is trained."""
    return ids, list(ids)


def labels_shifted(ids: list[int], labels: list[int], renderer: Any) -> tuple[list[int], list[int]]:
    """The labels are shifted here, and once more in the loss: each position learns the token after the next."""
    return ids, [*labels[1:], IGNORE_INDEX]


def double_bos(ids: list[int], labels: list[int], renderer: Any) -> tuple[list[int], list[int]]:
    """Two BOS before the text. The quickstart's tokenizer has none; its end of text serves as in GPT-2."""
    return [renderer.tokenizer.eos_token_id] * 2 + ids, [IGNORE_INDEX] * 2 + labels


def change_rows(change: RowChange) -> Callable[[], None]:
    """A patch: the trainer is built on changed rows, training and eval rows alike."""

    def patch() -> None:
        from datasets import Dataset

        from sft_recipes.training import train

        build = train.build_trainer

        def changed(rows: Dataset, renderer: Any) -> Dataset:
            pairs = [change(list(row["input_ids"]), list(row["labels"]), renderer) for row in rows]
            return Dataset.from_dict(
                {"input_ids": [pair[0] for pair in pairs], "labels": [pair[1] for pair in pairs]}
            )

        def build_on_changed(recipe: Any, labeller: Any, data: Any, *rest: Any) -> Any:
            held_out = changed(data.eval, labeller.renderer) if data.eval is not None else None
            train_rows = changed(data.train, labeller.renderer)
            return build(recipe, labeller, replace(data, train=train_rows, eval=held_out), *rest)

        setattr(train, "build_trainer", build_on_changed)  # noqa: B010 - a patch

    return patch


def mask_padding_that_is_eos() -> None:
    """A patch: PAD is EOS and the collator masks every label that is PAD, so that no end of turn is trained."""
    from sft_recipes.training import train

    build = train.build_trainer

    def build_with_collator(recipe: Any, labeller: Any, data: Any, *rest: Any) -> Any:
        trainer = build(recipe, labeller, data, *rest)
        renderer = labeller.renderer
        renderer.tokenizer.pad_token = renderer.tokenizer.eos_token
        trainer.data_collator = masking_collator(
            trainer.data_collator, renderer.tokenizer.pad_token_id
        )
        return trainer

    setattr(train, "build_trainer", build_with_collator)  # noqa: B010 - a patch


def masking_collator(collate: Callable[..., Any], pad_token_id: int) -> Callable[..., Any]:
    """The collator, and after it the label mask by which the classic `pad = eos` loses the end of turn."""

    def collate_and_mask(rows: Any) -> Any:
        batch = collate(rows)
        batch["labels"][batch["labels"] == pad_token_id] = IGNORE_INDEX
        return batch

    return collate_and_mask


# -- libraries and hardware ------------------------------------------------------------------------------------------


def attend_across_packed_rows() -> None:
    """A patch: attention that overlooks where one row of a pack ends, as a kernel without sequence bounds does."""
    import torch
    from transformers import masking_utils

    from sft_recipes.training import varlen_attention

    by_row = varlen_attention._row_by_row

    def as_one_row(query: Any, key: Any, value: Any, mask: Any, scaling: Any) -> Any:
        tokens = query.shape[2]
        whole = varlen_attention.RowBoundaries(torch.tensor([0, tokens]), tokens)
        one_row = varlen_attention.RowMask(whole, mask.window)
        return by_row(query, key, value, one_row, scaling)

    setattr(varlen_attention, "_row_by_row", as_one_row)  # noqa: B010 - a patch, not an assignment
    masking_utils.find_packed_sequence_indices = lambda position_ids: None


def one_loss_is_not_a_number() -> None:
    """A patch: the loss of step 101 is NaN, as after an overflow in one batch."""
    from sft_recipes.training.trainer import RecipeTrainer

    compute = RecipeTrainer.compute_loss

    def compute_or_nan(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return (
            loss * float("nan") if self.model.training and self.state.global_step == 100 else loss
        )

    RecipeTrainer.compute_loss = compute_or_nan  # type: ignore[method-assign]


# -- serving ---------------------------------------------------------------------------------------------------------


def leave_the_adapter_out() -> None:
    """A patch: the base is served, its adapter is not put on."""
    replace_adapter_loading(lambda model, name: model)


def merge_onto_the_merged_model() -> None:
    """A patch: the adapter is merged onto a wrong base, the model that already holds it, and that is served."""
    from peft import PeftModel

    def merge(model: Any, name: str) -> Any:
        return PeftModel.from_pretrained(model, name).merge_and_unload()

    replace_adapter_loading(lambda model, name: merge(merge(model, name), name))


def replace_adapter_loading(load: Callable[[Any, str], Any]) -> None:
    """Let `load(base, adapter folder)` stand for `PeftModel.from_pretrained` where models are loaded to generate."""
    from sft_recipes import models

    vars(models)["PeftModel"] = SimpleNamespace(from_pretrained=load)


# -- data ------------------------------------------------------------------------------------------------------------


def read_rows(split: str) -> list[Row]:
    """The rows of one file of the quickstart."""
    text = (QUICKSTART / "data" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def swap_answers(share: float) -> Callable[[list[Row]], list[Row]]:
    """A share of the rows pass their answers on among themselves, each to a row whose answer is another."""

    def swap(rows: list[Row]) -> list[Row]:
        chosen = random.Random(0).sample(range(len(rows)), round(share * len(rows)))
        # Sorted by answer and turned by the size of the largest group of equal answers, none keeps its own.
        chosen.sort(key=lambda index: rows[index]["output"])
        turn = max(Counter(rows[index]["output"] for index in chosen).values())
        answers = {
            index: rows[chosen[(place + turn) % len(chosen)]]["output"]
            for place, index in enumerate(chosen)
        }
        return [
            {**row, "output": answers.get(index, row["output"])} for index, row in enumerate(rows)
        ]

    return swap


def cut_half_the_answers(rows: list[Row]) -> list[Row]:
    """Every other answer, by a seeded draw, ends after half of its characters."""
    chosen = set(random.Random(0).sample(range(len(rows)), len(rows) // 2))
    cut = {index: rows[index]["output"][: -(-len(rows[index]["output"]) // 2)] for index in chosen}
    return [{**row, "output": cut.get(index, row["output"])} for index, row in enumerate(rows)]


def keep_one_wording(rows: list[Row]) -> list[Row]:
    """Of each task type only the rows whose instruction begins with its most frequent two words."""

    def wording(row: Row) -> tuple[str, str]:
        return row["task_type"], " ".join(row["instruction"].split()[:2])

    most = {task: found for (task, found), _ in reversed(Counter(map(wording, rows)).most_common())}
    return [row for row in rows if wording(row) in most.items()]


def add_test_rows(rows: list[Row]) -> list[Row]:
    """Thirty of the held-out rows stand among the training rows."""
    return rows + read_rows("test")[:30]


def rename_input(rows: list[Row]) -> list[Row]:
    """What the instruction is about stands in a column that no key maps."""
    return [
        {"material" if key == "input" else key: value for key, value in row.items()} for row in rows
    ]


def without_end_of_turn(template: str) -> str:
    """The template does not close the assistant's turn."""
    return template.replace(" + eos_token", "")


ROWS, DATA, RECIPE = "rows at the trainer", "data", "recipe"

FAULTS: Mapping[str, Fault] = {
    "end-of-turn-unlabelled": Fault(
        "EOS has no label", ROWS, training=change_rows(end_of_turn_unlabelled)
    ),
    "header-trained": Fault(
        "`### Response:` is trained", ROWS, training=change_rows(header_trained)
    ),
    "prompt-trained": Fault(
        "the whole prompt is trained", ROWS, training=change_rows(prompt_trained)
    ),
    "labels-shifted": Fault("labels shifted by one", ROWS, training=change_rows(labels_shifted)),
    "double-bos": Fault(
        "two BOS in training, none in serving", ROWS, training=change_rows(double_bos)
    ),
    "pad-is-eos": Fault(
        "PAD is EOS, labels that are PAD masked", "collator", training=mask_padding_that_is_eos
    ),
    "packing-not-isolated": Fault(
        "packed rows see one another",
        "attention",
        keys={"packing": True},
        training=attend_across_packed_rows,
    ),
    "loss-not-finite": Fault(
        "the loss of one batch is NaN", "training step", training=one_loss_is_not_a_number
    ),
    "learning-rate-x30": Fault("learning rate 3e-2", RECIPE, keys={"learning_rate": 3e-2}),
    "learning-rate-/100": Fault("learning rate 1e-5", RECIPE, keys={"learning_rate": 1e-5}),
    "no-end-of-turn": Fault(
        "the template does not end the turn", "template", template=without_end_of_turn
    ),
    "answers-swapped-10%": Fault("10 % of the answers swapped", DATA, data=swap_answers(0.1)),
    "answers-swapped-50%": Fault("50 % of the answers swapped", DATA, data=swap_answers(0.5)),
    "answers-cut": Fault("half of the answers end in the middle", DATA, data=cut_half_the_answers),
    "input-not-mapped": Fault("the input's column has another name", DATA, data=rename_input),
    "test-rows-trained": Fault("30 test rows among the training rows", DATA, data=add_test_rows),
    "one-wording-20-epochs": Fault(
        "20 epochs on one wording a task",
        DATA,
        keys={"num_train_epochs": 20},
        data=keep_one_wording,
    ),
    "other-template-served": Fault(
        "served with chapter_chat", "serving", options=("--chat_template", "chapter_chat")
    ),
    "adapter-not-loaded": Fault(
        "the base without its adapter", "serving", "lora", serving=leave_the_adapter_out
    ),
    "wrong-base-merged": Fault(
        "merged onto the tuned model", "serving", "lora", serving=merge_onto_the_merged_model
    ),
}


def main(arguments: Sequence[str]) -> None:
    """Put the fault into this process and run the command; "" is no fault."""
    name, command = arguments[0], arguments[1]
    patch = (
        (FAULTS[name].serving if command == "evaluate" else FAULTS[name].training) if name else None
    )
    if patch is not None:
        patch()
    sys.argv = ["sft-recipes", *arguments[1:]]
    from sft_recipes import cli

    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
