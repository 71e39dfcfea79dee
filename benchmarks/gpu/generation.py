"""Greedy answers in batches of several sizes: how fast, and whether a batch changes an answer."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.children import Setting
from benchmarks.gpu.results import ItemReport
from benchmarks.gpu.runs import (
    ON_CUDA,
    llama_config,
    random_model,
    synchronize,
    tiny_tokenizer,
)
from benchmarks.gpu.shapes import Answers
from sft_recipes.evaluation.generation import Generation, generate

SHORTEST_PROMPT = 4


def generation(setting: Setting, report: ItemReport) -> None:
    """Tokens a second at each batch size, and how many answers are those of the smallest."""
    shape = setting.shape
    dtype = torch.bfloat16 if ON_CUDA else torch.float32
    model = random_model(llama_config(shape.full), dtype)
    prompts = make_prompts(shape.answers, shape.full.vocabulary)
    sizes = shape.answers.batch_sizes
    _answer(model, prompts[: sizes[0]], sizes[0], new_tokens=2)  # sets the kernels up
    reference: list[Generation] = []
    for size in sizes:
        synchronize()
        started = time.perf_counter()
        answers = _answer(model, prompts, size, shape.answers.new_tokens)
        synchronize()
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.ids) for answer in answers)
        report.number(f"batches of {size}", tokens / seconds, "tokens/s")
        reference = reference or answers
        if answers is not reference:
            share = 100 * same_answers(answers, reference)
            report.number(f"answers as in batches of {sizes[0]}", share, "%")
            # In float32 a batch must not show; in bfloat16 two ids may be as likely.
            report.require(ON_CUDA or share == 100, f"answers in batches of {size} differ")


def make_prompts(answers: Answers, vocabulary: int) -> list[list[int]]:
    """Prompts of random ids and lengths, the same each time."""
    generator = np.random.default_rng(0)
    prompts = []
    for _ in range(answers.prompts):
        length = generator.integers(SHORTEST_PROMPT, answers.longest_prompt, endpoint=True)
        prompts.append(generator.integers(3, vocabulary, length).tolist())
    return prompts


def _answer(model: Any, prompts: list[list[int]], size: int, new_tokens: int) -> list[Generation]:
    tokenizer = tiny_tokenizer()
    return generate(
        model,
        tokenizer,
        prompts,
        stop_ids=[tokenizer.eos_token_id],
        max_new_tokens=new_tokens,
        batch_size=size,
        progress=False,
    )


def same_answers(answers: list[Generation], references: list[Generation]) -> float:
    """The share of answers whose ids are all the same."""
    pairs = zip(answers, references, strict=True)
    return sum(answer.ids == reference.ids for answer, reference in pairs) / len(answers)
