"""Answering prompts: the chapter's one-by-one loop against ours in batches, and whether batches change answers.

    python -m benchmarks.generation [--model recipes/quickstart/base] [--rows 256] [--batch_size 64]

Both decode greedily with the same prompts, stop tokens and budget (150 new tokens, the chapter's), so both have the
same answers to find; the chapter samples, which costs the same. In each round both run once, in turns. An answer
counts as different if any of its ids is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.loading import read_held_out
from sft_recipes.evaluation.generation import generate
from sft_recipes.models import load_for_inference
from sft_recipes.recipe import DatasetSource, DataSettings, TemplateSettings

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(QUICKSTART / "base"))
    parser.add_argument("--data", default=str(QUICKSTART / "data" / "test.jsonl"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    loaded = load_for_inference(options.model)
    model, renderer = loaded.model, attach_chat_template(loaded.tokenizer, TemplateSettings())
    source = DatasetSource(path=options.data)
    examples = read_held_out([source], DataSettings(datasets=(source,)))[: options.rows]
    prompts = [renderer.prompt_ids(example.messages[:-1], example.tools) for example in examples]
    seconds: dict[str, list[float]] = {"one by one": [], "in batches": []}
    for _ in range(options.rounds):
        start = time.perf_counter()
        alone = one_by_one(
            model, loaded.tokenizer, prompts, renderer.stop_ids, options.max_new_tokens
        )
        middle = time.perf_counter()
        answers = generate(
            model,
            loaded.tokenizer,
            prompts,
            stop_ids=renderer.stop_ids,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            progress=False,
        )
        seconds["one by one"].append(middle - start)
        seconds["in batches"].append(time.perf_counter() - middle)
    print(
        f"{len(prompts)} prompts, {sum(map(len, alone))} new tokens, batches of {options.batch_size}, {model.dtype}"
    )
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in seconds.items():
        print(
            f"{name:11} {medians[name]:7.2f} s median of [{' '.join(f'{one:.2f}' for one in found)}]"
        )
    print(f"one by one / in batches  {medians['one by one'] / medians['in batches']:.1f}x")
    different = sum(one != answer.ids for one, answer in zip(alone, answers, strict=True))
    print(
        f"answers that differ between batch 1 and batch {options.batch_size}: {different} of {len(prompts)}"
    )


def one_by_one(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
) -> list[list[int]]:
    """The chapter's loop, greedy: one unpadded prompt at a time; ids before the stop id."""
    found = []
    for prompt in prompts:
        inputs = torch.tensor([prompt], device=model.device)
        with torch.no_grad():
            outputs = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(stop_ids),
                pad_token_id=tokenizer.eos_token_id,
            )
        answer = outputs[0][inputs.shape[1] :].tolist()
        tokenizer.decode(answer, skip_special_tokens=True)
        found.append(list(takewhile(lambda token: token not in stop_ids, answer)))
    return found


if __name__ == "__main__":
    main()
