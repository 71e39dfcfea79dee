"""Greedy generation from token ids, in one process or shared among several.

The ids of the prompt go to `model.generate` as they are, so nothing is tokenised twice. What counts
as the answer is decided on ids too: it ends before the first stop id, whatever pads the rest.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.shared_prefix import cache_of, shared_length


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `ids` are the generated ids before the stop id; `text` shows control tokens.

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
    """Answer each prompt (ids) greedily; results are in input order, the same on every process.

    `batch_size` counts prompts per process (None: `default_batch_size`). Where one does not fit
    into the device's memory it is halved, unless the model is sharded: then every process has to
    make the same calls. `names` say where each prompt comes from, for errors. `model` is not
    wrapped in DDP; its modes and generation config and the random state are as before afterwards.
    Raises InputError for empty prompts, prompts that leave no room for `max_new_tokens`, and
    missing stop ids.
    """
    check_prompts(model, prompts, max_new_tokens, names)
    if not stop_ids:
        what = "nothing ends an answer"
        raise InputError(Problem("evaluation", "stop_ids", what, "give the tokenizer an eos_token"))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=_pad_id(tokenizer, stop_ids),
        use_cache=True,
    )
    share = _share_of_this_process(prompts)
    with generation_mode(model, config):
        answers = _answer_in_batches(
            model,
            [prompts[index] for index in share.indices],
            config,
            batch_size or default_batch_size(),
            progress,
        )
    own = []
    # The prompts behind `own` were answered only to make as many calls as every other process.
    for index, ids in zip(share.indices[: share.own], answers, strict=False):
        own.append((index, _cut(ids, stop_ids, tokenizer)))
    by_index: dict[int, Generation] = dict(gather_object(own))
    return [by_index[index] for index in range(len(prompts))]


def _pad_id(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    # Any id does: padding is masked on the left, and on the right it stands behind a stop id.
    if tokenizer.pad_token_id is None:
        return stop_ids[0]
    return int(tokenizer.pad_token_id)


class _Share(NamedTuple):
    """The prompts that this process answers, by index; the first `own` of them are its own."""

    indices: list[int]
    own: int


def _share_of_this_process(prompts: Sequence[Sequence[int]]) -> _Share:
    """Every process gets as many prompts as the others, some of them twice if need be.

    Parameters sharded by ZeRO-3 or FSDP are gathered in each call, so all make as many calls.
    """
    state = PartialState()
    # Longest first: a batch that does not fit into memory fails at once, and batches hold prompts
    # of like length.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    indices = order[state.process_index :: state.num_processes]
    rounds = math.ceil(len(prompts) / state.num_processes)
    missing = rounds - len(indices)
    return _Share(indices + order[-1:] * missing, own=len(indices))


def _answer_in_batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    size: int,
    progress: bool,
) -> list[list[int]]:
    """Generated ids of each prompt, batch by batch; a batch that does not fit is halved."""
    state = PartialState()
    is_sharded = state.num_processes > 1 and _is_sharded(model)
    answers: list[list[int]] = []
    with tqdm(
        total=len(prompts),
        desc="generating",
        disable=None if progress and state.is_main_process else True,
        leave=False,
    ) as bar:
        while len(answers) < len(prompts):
            batch = prompts[len(answers) : len(answers) + size]
            may_fail = size > 1 and not is_sharded
            # In a sharded model every process has to make the same calls.
            generated = _generate_batch(
                model, batch, config, may_fail=may_fail, share=not is_sharded
            )
            if generated is None:
                size //= 2
                bar.write(
                    f"a batch of {len(batch)} prompts did not fit into memory, going on with {size}"
                )
                continue
            answers += generated
            bar.update(len(batch))
    return answers


def default_batch_size() -> int:
    """Prompts per process and batch.

    Decoding on a GPU waits for kernels to start, not for arithmetic, so more fit there.
    """
    return 64 if torch.cuda.is_available() else 32


def _is_sharded(model: Any) -> bool:
    """Whether a forward pass gathers parameters from other processes, as transformers sees it."""
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):  # FSDP 2
        return True
    return bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def check_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
) -> None:
    """Raise InputError for every prompt that is empty or leaves no room for `max_new_tokens`."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    problems = []
    for index, prompt in enumerate(prompts):
        where = names[index] if names else f"prompt {index} (counted from 0)"
        if not prompt:
            fix = "remove the row or change the template"
            problems.append(Problem(where, "prompt", "it has no tokens", fix))
        elif limit is not None and len(prompt) + max_new_tokens > limit:
            what = (
                f"{len(prompt)} prompt tokens + {max_new_tokens} new tokens "
                f"exceed the model's {limit} positions"
            )
            fix = "shorten or remove the row, or lower max_new_tokens"
            problems.append(Problem(where, "prompt", what, fix))
    if problems:
        raise InputError(problems)


@contextmanager
def generation_mode(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, which also rests gradient checkpointing, with `config` as the model's own.

    transformers fills whatever a given config leaves open from the model's own (a repetition
    penalty, say), so the model's own has to step aside for the decoding to be plainly greedy. All
    of it is undone at the end.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own_config = owner.generation_config
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _contiguous_before(owner.get_output_embeddings()):
        try:
            owner.generation_config = config
            model.eval()
            yield
        finally:
            owner.generation_config = own_config
            for module, training in modes:
                module.training = training


@contextmanager
def _contiguous_before(head: Any) -> Iterator[None]:
    """Hand the output layer the last position of each row as one block of memory.

    A slice of all positions is no such block, and torch 2.13 then multiplies a copy of the weights
    for each row: in bfloat16 on a CPU 32 rows of Gemma-3's 262,144 words took 26.7 s instead of
    0.05 s.
    """
    if head is None:
        yield
        return
    with head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:])):
        yield


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    may_fail: bool = False,
    share: bool = True,
) -> list[list[int]] | None:
    """Generated ids of one left-padded batch, `[batch, new]` as lists, prompt removed.

    `share`: what all prompts begin with may be computed once.

    None if memory did not suffice and `may_fail`: what the attempt held is freed by then.
    """
    try:
        return _decode(model, prompts, config, share)
    except torch.OutOfMemoryError:
        if not may_fail:
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _decode(
    model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig, share: bool
) -> list[list[int]]:
    """What all prompts begin with stands in front, padding behind it, then the rest of each."""
    shared = shared_length(model, prompts, config.max_new_tokens) if share else 0
    beginning = torch.tensor(prompts[0][:shared], dtype=torch.long, device=model.device)
    rests = [torch.tensor(prompt[shared:], device=model.device) for prompt in prompts]
    ids = pad_sequence(
        rests,
        batch_first=True,
        padding_value=config.pad_token_id,
        padding_side="left",
    )
    mask = pad_sequence(
        list(map(torch.ones_like, rests)),
        batch_first=True,
        padding_side="left",
    )
    beginnings = beginning.expand(len(prompts), shared)
    ids = torch.cat([beginnings, ids], dim=1)
    mask = torch.cat([torch.ones_like(beginnings), mask], dim=1)
    cache = {}
    if shared:
        cache["past_key_values"] = cache_of(model, prompts[0][:shared], len(prompts))
    # synced_gpus is left to transformers: on exactly under ZeRO-3 and FSDP with several processes.
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **cache)
    answers: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return answers


def _cut(ids: list[int], stop_ids: Sequence[int], tokenizer: Any) -> Generation:
    """The answer before the first stop id."""
    stop_reason = "length"
    answer = ids
    for position, token in enumerate(ids):
        if token in stop_ids:
            answer = ids[:position]
            stop_reason = "eos"
            break
    text = tokenizer.decode(answer, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Generation(answer, text, stop_reason)
