"""Greedy generation from token ids, in one process or shared among several.

The ids of the prompt go to `model.generate` as they are, so nothing is tokenised twice. What counts as the answer is
decided on ids too: it ends before the first stop id, whatever the padding token is.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from sft_recipes.errors import InputError, Problem


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `ids` are the generated ids before the stop id; `text` decodes them with control tokens shown.

    `stop_reason` is `eos` or `length`.
    """

    ids: list[int]
    text: str
    stop_reason: str


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> list[Generation]:
    """Answer each prompt (ids) greedily; the result is in input order and the same on every process.

    `batch_size` counts prompts per process (None: `default_batch_size`). Where one does not fit
    into the device's memory it is halved, unless the model is sharded: then every process has to
    make the same calls. `names` say where each prompt comes from, for errors. `model` is not
    wrapped in DDP; its modes and generation config and the random state are as before afterwards.
    Raises InputError for empty prompts, prompts that leave no room for `max_new_tokens`, and
    missing stop ids.
    """
    check_prompts(model, prompts, max_new_tokens, names)
    if not stop_ids:
        raise InputError(
            Problem(
                "evaluation",
                "stop_ids",
                "nothing ends an answer",
                "give the tokenizer an eos_token",
            )
        )
    state = PartialState()
    # Longest first: a batch that does not fit into memory fails at once, and batches hold prompts of like length.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    shard: list[int] = order[state.process_index :: state.num_processes]
    # Every process makes the same number of calls: parameters sharded by ZeRO-3 or FSDP are gathered in each of them.
    rounds, own = -(-len(prompts) // state.num_processes), len(shard)
    shard += order[-1:] * (rounds - own)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        # Any id does: padding is masked on the left, and on the right it stands behind a stop id.
        pad_token_id=stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        use_cache=True,
    )
    size = batch_size or default_batch_size()
    sharded = state.num_processes > 1 and _is_sharded(model)
    done: list[tuple[int, Generation]] = []
    hidden = not progress or not state.is_main_process
    with (
        _generation_mode(model, config),
        tqdm(total=rounds, desc="generating", disable=hidden, leave=False) as bar,
    ):
        while len(done) < rounds:
            indices = shard[len(done) : len(done) + size]
            batch = [prompts[index] for index in indices]
            answers = _generate_batch(model, batch, config, may_fail=size > 1 and not sharded)
            if answers is None:
                size //= 2
                bar.write(
                    f"a batch of {len(batch)} prompts did not fit into memory, going on with {size}"
                )
                continue
            for index, ids in zip(indices, answers, strict=True):
                done.append((index, _cut(ids, stop_ids, tokenizer)))
            bar.update(len(indices))
    by_index: dict[int, Generation] = dict(gather_object(done[:own]))
    return [by_index[index] for index in range(len(prompts))]


def default_batch_size() -> int:
    """Prompts per process and batch. Decoding on a GPU waits for kernels to start, not for arithmetic, so more fit."""
    return 64 if torch.cuda.is_available() else 32


def _is_sharded(model: Any) -> bool:
    """Whether a forward pass gathers parameters from other processes, as transformers sees it."""
    fsdp2 = any(hasattr(parameter, "to_local") for parameter in model.parameters())
    return bool(fsdp2 or is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def check_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
) -> None:
    """Raise InputError for every prompt that is empty or leaves no room for `max_new_tokens` in the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    problems = []
    places = names or [f"prompt {index} (counted from 0)" for index in range(len(prompts))]
    for where, prompt in zip(places, prompts, strict=True):
        if not prompt:
            problems.append(
                Problem(
                    where, "prompt", "it has no tokens", "remove the row or change the template"
                )
            )
        elif limit is not None and len(prompt) + max_new_tokens > limit:
            what = f"{len(prompt)} prompt tokens + {max_new_tokens} new tokens exceed the model's {limit} positions"
            problems.append(
                Problem(where, "prompt", what, "shorten or remove the row, or lower max_new_tokens")
            )
    if problems:
        raise InputError(problems)


@contextmanager
def _generation_mode(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, which also rests gradient checkpointing, with `config` as the model's own; undone at the end.

    transformers fills whatever a given config leaves open from the model's own (a repetition penalty, say), so the
    model's own has to step aside for the decoding to be plainly greedy.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own_config = owner.generation_config
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        try:
            owner.generation_config = config
            model.eval()
            yield
        finally:
            owner.generation_config = own_config
            for module, training in modes:
                module.training = training


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, may_fail: bool = False
) -> list[list[int]] | None:
    """Generated ids of one left-padded batch, `[batch, new]` as lists, prompt removed.

    None if memory did not suffice and `may_fail`: what the attempt held is freed by then.
    """
    try:
        return _decode(model, prompts, config)
    except torch.OutOfMemoryError:
        if not may_fail:
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _decode(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    rows = [torch.tensor(prompt, device=model.device) for prompt in prompts]
    ids, mask = (
        pad(rows, padding_value=config.pad_token_id),
        pad([torch.ones_like(row) for row in rows]),
    )
    # synced_gpus is left to transformers: on exactly under ZeRO-3 and FSDP with more than one process.
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    answers: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return answers


def _cut(ids: list[int], stop_ids: Sequence[int], tokenizer: Any) -> Generation:
    end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
    answer = ids[:end]
    text = tokenizer.decode(answer, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Generation(answer, text, "length" if end is None else "eos")
