"""The examples that the help of each command ends in: the road from own rows to a pushed model."""

from collections.abc import Mapping

import typer

# By command, "" for `sft-recipes --help`. `mine` is what the first example of `init` writes.
EXAMPLES: Mapping[str, tuple[str, str]] = {
    "": (
        "sft-recipes init --model Qwen/Qwen3-0.6B --data rows.jsonl --output mine",
        "sft-recipes check mine/recipe.yaml",
    ),
    "init": (
        "sft-recipes init --model Qwen/Qwen3-0.6B --data rows.jsonl --output mine",
        "sft-recipes init --from axolotl.yaml --output mine",
    ),
    "check": (
        "sft-recipes check mine/recipe.yaml",
        "sft-recipes check mine/recipe.yaml --learning_rate 1e-5 --launch ddp",
    ),
    "inspect": (
        "sft-recipes inspect mine/recipe.yaml --rows 5",
        "sft-recipes inspect rows.jsonl --tokenizer Qwen/Qwen3-0.6B",
    ),
    "audit": (
        "sft-recipes audit mine/recipe.yaml",
        "sft-recipes audit rows.jsonl --clean cleaned --drop duplicate_row",
    ),
    "prepare": (
        "sft-recipes prepare mine/recipe.yaml",
        "sft-recipes prepare mine/recipe.yaml --output_dir mine/other --reuse mine/run",
    ),
    "train": (
        "sft-recipes train mine/recipe.yaml --num_train_epochs 1",
        "sft-recipes train mine/recipe.yaml --launch ddp --num_processes 2",
    ),
    "evaluate": (
        "sft-recipes evaluate mine/run --base Qwen/Qwen3-0.6B",
        "sft-recipes evaluate mine/run --data test.jsonl --max_rows 100",
    ),
    "chat": (
        "sft-recipes chat mine/run",
        "echo 'Name a bird.' | sft-recipes chat mine/run --json",
    ),
    "replay": (
        "sft-recipes replay Qwen/Qwen3-0.6B --prompts general.jsonl --rows 500",
        "sft-recipes replay mine/run --prompts general.jsonl --rows 9 --data_seed 1",
    ),
    "doctor": (
        "sft-recipes doctor mine/run",
        "sft-recipes doctor other/run --base other/base --merged other/merged --json",
    ),
    "export": (
        "sft-recipes export mine/run",
        "sft-recipes export mine/run --output served --dtype bfloat16",
    ),
    "push": (
        "sft-recipes push mine/run --repo me/my-model",
        "sft-recipes push mine/run --repo me/my-model --adapter_only --public",
    ),
    "review": (
        "sft-recipes review build mine/run/evaluations/eval other/run/evaluations/eval",
        "sft-recipes review score review.key.json votes.json",
    ),
    "review build": (
        "sft-recipes review build mine/run/evaluations/eval other/run/evaluations/eval",
        "sft-recipes review build candidate baseline --rows 50 --output review.html",
    ),
    "review score": (
        "sft-recipes review score review.key.json votes.json",
        "sft-recipes review score review.key.json anna.json ben.json --json",
    ),
}


def add_examples(app: typer.Typer, group: str = "") -> None:
    """End the help of a group, and of each command in it, in its examples."""
    app.info.epilog = _epilog(group)
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        command.epilog = _epilog(f"{group} {name}".strip())
    for inner in app.registered_groups:
        if inner.typer_instance is not None and inner.name:
            inner.epilog = _epilog(inner.name)
            add_examples(inner.typer_instance, inner.name)


def _epilog(command: str) -> str:
    # An empty line between two keeps each on a line of its own.
    return "\n\n".join(("Examples:", *EXAMPLES[command]))
