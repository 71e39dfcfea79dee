"""Answers of a model in float32 and as `evaluate` gives them on this CPU: seconds, equal answers, exact match.

    python -m benchmarks.answer_precision MODEL_OR_RUN --data ROWS.jsonl [--rows 110] [--max_new_tokens 64]

Also how long the output layer takes for the last position of 32 rows, as a slice of all positions and as one block of
memory, which is what `evaluation/generation.py` makes of it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from sft_recipes.data.loading import read_held_out
from sft_recipes.evaluation.evaluator import Evaluation, evaluate
from sft_recipes.evaluation.open_run import open_run
from sft_recipes.models import load_for_inference
from sft_recipes.recipe import DatasetSource, DataSettings

ROWS, POSITIONS = 32, 100


def seconds(work: Callable[[], Any]) -> float:
    """How long something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def answers(options: argparse.Namespace, dtype: str | None) -> tuple[Evaluation, float, Any]:
    """The evaluation of the first rows, the seconds of its answers, and the model."""
    loaded = load_for_inference(options.model, dtype)
    labeller = open_run(options.model, loaded.tokenizer, None).labeller
    source = DatasetSource(path=options.data)
    examples = read_held_out([source], DataSettings(datasets=(source,)))[: options.rows]
    asked = [labeller.for_template(example) for example in examples]
    started = time.perf_counter()
    evaluation = evaluate(
        loaded.model,
        labeller.renderer,
        asked,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.rows,
        progress=False,
    )
    return evaluation, time.perf_counter() - started, loaded.model


def main() -> None:
    """Answer in both precisions and print what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=110)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    exact, exact_seconds, _ = answers(options, "float32")
    fast, fast_seconds, model = answers(options, None)
    for evaluation, took, name in (
        (exact, exact_seconds, "float32"),
        (fast, fast_seconds, str(model.dtype)),
    ):
        right = sum(bool(row["exact_match"]) for row in evaluation.rows)
        print(f"{name:15} {took:6.1f} s, exact match on {right} of {len(evaluation.rows)} rows")
    pairs = zip(exact.rows, fast.rows, strict=True)
    equal = sum(one["response"] == other["response"] for one, other in pairs)
    print(f"equal answers   {equal} of {len(exact.rows)}")
    head = model.get_output_embeddings()
    hidden = torch.randn(ROWS, POSITIONS, head.weight.shape[1], dtype=model.dtype)
    last = hidden[:, -1:, :]
    with torch.no_grad():
        block = seconds(lambda: head(last.contiguous()))
        part = seconds(lambda: head(last))
    print(f"output layer    {part:.2f} s for {ROWS} rows as a slice, {block:.2f} s as one block")


if __name__ == "__main__":
    main()
