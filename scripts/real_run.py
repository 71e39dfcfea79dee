"""`make real MODEL=DIR`: the whole loop on real weights, command by command, as a user would type it.

    python scripts/real_run.py DIR [--recipe smollm2-135m/lora] [--output runs/real]

DIR is a folder or Hub name of SmolLM2-135M-Instruct or Gemma-3-270m; the recipe follows from it. Every figure is
measured in this run.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# By `model_type`: the only two that have such a recipe.
RECIPES = {"llama": "smollm2-135m/lora", "gemma3_text": "gemma-3-270m/lora"}
# glibc otherwise returns memory to the system after every step.
FASTER_ON_CPU = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}
# About half of the rows, in batches of 16: what two cores do in a quarter of an hour together with all answers.
SHORTENED = "--max_rows 960 --eval_strategy no --save_strategy no"
# 15 rows of each family.
ANSWERED = "--max_rows 165 --max_new_tokens 64 --batch_size 83"


def commands(model: str, recipe: str, run: str) -> list[tuple[str, str]]:
    """Every step: what it shows, and its command."""
    folder = f"recipes/{recipe.partition('/')[0]}"
    model_key = f"--model_name_or_path {shlex.quote(model)}"
    return [
        (
            "Rows as the trainer sees them: green is trained, grey is only read",
            f"inspect recipes/{recipe}.yaml {model_key} --rows 3",
        ),
        (
            "Supervised fine-tuning",
            f"train recipes/{recipe}.yaml {model_key} --output_dir {run} {SHORTENED}",
        ),
        (
            "The base, the base behind training rows, and the tuned model on 165 test rows; the gate: may it pass?",
            f"evaluate {run} --base {shlex.quote(model)} --shots auto --data {folder}/data --split test {ANSWERED} "
            f"--gate {folder}/gate.yaml",
        ),
    ]


def recipe_of(model: str) -> str:
    """The recipe that belongs to a model. Raises InputError for one that is not there, or has none."""
    from transformers import AutoConfig

    from sft_recipes.data.opening import check_folder, loading
    from sft_recipes.errors import InputError, Problem

    check_folder(model)
    with loading(model, "model"):
        kind = AutoConfig.from_pretrained(model).model_type
    if kind not in RECIPES:
        what = f"no recipe for model type {kind!r}"
        raise InputError(Problem(model, "", what, "name a recipe: --recipe smollm2-135m/lora"))
    return RECIPES[kind]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps from the repository's root up to the first that fails, a gate included; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub name")
    parser.add_argument("--recipe", help="such as smollm2-135m/full")
    parser.add_argument("--output", default="runs/real", help="run folder")
    options = parser.parse_args(arguments)
    model = options.model
    if Path(model).exists():
        model = str(Path(model).resolve())
    try:
        recipe = options.recipe or recipe_of(model)
    except Exception as error:  # noqa: BLE001 - told as the commands tell it
        from sft_recipes import crash

        return crash.tell(error)
    started = time.monotonic()
    steps = commands(model, recipe, options.output)
    code = 0
    for number, (title, command) in enumerate(steps, start=1):
        print(f"\n== {number}/{len(steps)} {title}\n$ sft-recipes {command}\n", flush=True)
        environment = {**FASTER_ON_CPU, **os.environ}
        step = [sys.executable, "-m", "sft_recipes", *shlex.split(command)]
        code = subprocess.run(step, cwd=ROOT, env=environment, check=False).returncode
        if code:
            break
    print(f"\nexit code {code} after {(time.monotonic() - started) / 60:.1f} minutes")
    return code


if __name__ == "__main__":
    sys.exit(main())
