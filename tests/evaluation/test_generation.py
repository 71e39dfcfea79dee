"""Greedy generation: independent of batching and of processes, and without a trace in the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from sft_recipes.errors import InputError
from sft_recipes.evaluation.generation import generate

PROMPTS = [
    list(range(start, start + length))
    for start, length in ((5, 3), (40, 11), (90, 1), (17, 7), (130, 20), (60, 2))
]
UNUSED = 257


def run(model: Any, tokenizer: Any, prompts: Any = PROMPTS, **settings: Any) -> Any:
    """`generate` with the settings most tests share; the stop id is one that never comes unless a
    test says so."""
    defaults = {"stop_ids": [UNUSED], "max_new_tokens": 12, "batch_size": 4, "progress": False}
    return generate(model, tokenizer, prompts, **(defaults | settings))


def test_batches_do_not_change_answers(make_model, tokenizer) -> None:
    """Batch size 1, 4 and all give the same ids in input order, equal to a plain argmax loop
    without padding."""
    model = make_model()
    by_size = [
        [answer.ids for answer in run(model, tokenizer, batch_size=size)] for size in (1, 4, 100)
    ]
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert by_size == [expected] * 3
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS), (
        "the prompts must be told apart by their answers"
    )


def test_answers_are_cut_before_the_first_stop_id(make_model, tokenizer) -> None:
    """An answer ends before whichever stop id comes first, with reason eos; without one it has all
    tokens, length."""
    model = make_model()
    free = run(model, tokenizer)
    assert [(len(answer.ids), answer.stop_reason) for answer in free] == [(12, "length")] * len(
        PROMPTS
    )
    stop_ids = [free[0].ids[4], free[1].ids[6]]
    for before, after in zip(free, run(model, tokenizer, stop_ids=stop_ids), strict=True):
        position = next(
            (index for index, token in enumerate(before.ids) if token in stop_ids), None
        )
        assert after.ids == before.ids[:position]
        assert after.stop_reason == ("length" if position is None else "eos")


def test_padding_token_equal_to_eos_is_not_taken_for_a_stop(make_model, tokenizer) -> None:
    """With pad = eos, answers that finished early in a batch and those that did not keep their own
    reasons."""
    model = make_model()
    stop = run(model, tokenizer)[3].ids[2]
    separate = run(model, tokenizer, stop_ids=[stop], batch_size=1)
    shared = type(
        "Tokenizer", (), {"pad_token_id": stop, "decode": staticmethod(tokenizer.decode)}
    )()
    assert run(model, shared, stop_ids=[stop], batch_size=6) == separate
    assert {answer.stop_reason for answer in separate} == {"eos", "length"}


def test_control_tokens_stay_visible_in_the_text(make_model, tokenizer) -> None:
    """Text is decoded with special tokens shown, so that a leak can be seen."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[256] = 1.0
        model.model.norm.weight.fill_(1.0)
    answers = run(model, tokenizer, max_new_tokens=2)
    shown = [answer.text for answer in answers if answer.ids == [256, 256]]
    assert shown
    assert set(shown) == {"<eos><eos>"}


def test_the_models_own_generation_config_has_no_say(make_model, tokenizer) -> None:
    """A repetition penalty in the model's generation config changes its own decoding, not ours."""
    model = make_model()
    plain = [answer.ids for answer in run(model, tokenizer)]
    model.generation_config = GenerationConfig(
        repetition_penalty=50.0, eos_token_id=UNUSED, pad_token_id=0
    )
    theirs = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=12, do_sample=False)[
        0, len(PROMPTS[1]) :
    ]
    assert theirs.tolist() != plain[1]
    assert [answer.ids for answer in run(model, tokenizer)] == plain


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_afterwards(make_model, tokenizer, monkeypatch, fails) -> None:
    """Modes per module, checkpointing, configs, random state and padding side are untouched, also
    after an error."""
    model = make_model().train()
    model.model.layers[0].eval()
    model.activation_checkpointing_enable()
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = lambda *_: pytest.fail(
            "generation must not checkpoint activations"
        )
    model.config.use_cache = False
    config, padding_side = model.generation_config, tokenizer.padding_side
    modes = [module.training for module in model.modules()]
    seen = {}

    def spy(**arguments: Any) -> Any:
        seen["training"] = any(module.training for module in model.modules())
        torch.rand(3)
        if fails:
            raise RuntimeError("out of memory")
        return type(model).generate(model, **arguments)

    monkeypatch.setattr(model, "generate", spy)
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(model, tokenizer)
    else:
        run(model, tokenizer)
    assert seen == {"training": False}
    assert [module.training for module in model.modules()] == modes
    assert model.is_activation_checkpointing
    assert (model.generation_config is config, model.config.use_cache) == (True, False)
    assert tokenizer.padding_side == padding_side
    assert torch.equal(torch.get_rng_state(), random_state)


# peft 0.21 reads an attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_lora_models_answer_with_their_adapter(make_model, tokenizer) -> None:
    """A peft model generates through its adapter, and its base's generation config is put back."""
    from peft import LoraConfig, get_peft_model

    base = make_model()
    plain = [answer.ids for answer in run(base, tokenizer)]
    config = base.generation_config
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted = [answer.ids for answer in run(model, tokenizer)]
    assert adapted != plain
    with model.disable_adapter():
        assert [answer.ids for answer in run(model, tokenizer)] == plain
    assert base.generation_config is config


def test_no_prompts_no_answers(make_model, tokenizer) -> None:
    """An empty list is answered by an empty list."""
    assert run(make_model(), tokenizer, []) == []


def test_prompts_without_room_are_all_named(make_model, tokenizer) -> None:
    """Every empty or too long prompt is listed with its place; exactly as long as the context is
    still fine."""
    model = make_model(max_position_embeddings=20)
    names = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    with pytest.raises(InputError) as error:
        run(model, tokenizer, [[5] * 9, [5] * 8, []], names=names)
    assert [problem.where for problem in error.value.problems] == ["a.jsonl:1", "a.jsonl:3"]
    assert "9 prompt tokens + 12 new tokens exceed the model's 20 positions" in str(error.value)
    assert len(run(model, tokenizer, [[5] * 8])[0].ids) == 12


def test_something_must_end_an_answer(make_model, tokenizer) -> None:
    """Without stop ids every answer would run to the budget, so that is refused."""
    with pytest.raises(InputError, match="stop_ids"):
        run(make_model(), tokenizer, stop_ids=[])


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from accelerate import PartialState
import conftest, test_generation
state = PartialState(cpu=True)
assert state.num_processes == 2, state
model, tokenizer = conftest.build_model(), conftest.build_tokenizer()
calls = []
generate = model.generate
model.generate = lambda **arguments: calls.append(0) or generate(**arguments)
results = [test_generation.run(model, tokenizer, test_generation.PROMPTS[:count], batch_size=2) for count in (6, 5, 1)]
ids = [[answer.ids for answer in answers] for answers in results]
with open(sys.argv[2] + str(state.process_index), "w") as file:
    json.dump({"ids": ids, "calls": len(calls)}, file)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(make_model, tokenizer, tmp_path: Path) -> None:
    """Two gloo ranks both hold one process's answers after equally many calls, also with fewer
    prompts than ranks."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    arguments = [str(Path(__file__).parent), str(tmp_path / "out")]
    result = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    outputs = [json.loads((tmp_path / f"out{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    model = make_model()
    expected = [
        [answer.ids for answer in run(model, tokenizer, PROMPTS[:count])] for count in (6, 5, 1)
    ]
    assert outputs[0]["ids"] == outputs[1]["ids"] == expected
    assert outputs[0]["calls"] == outputs[1]["calls"] == 2 + 2 + 1


def test_a_batch_that_does_not_fit_is_halved(
    make_model, tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where memory runs out for more than two prompts, all are answered as by a model with room,
    and it is said."""
    model = make_model()
    expected = run(model, tokenizer)
    real = model.generate

    def small(*, input_ids: torch.Tensor, **settings: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", small)
    assert run(model, tokenizer, batch_size=6) == expected
    assert (
        "a batch of 6 prompts did not fit into memory, going on with 3" in capsys.readouterr().out
    )
    with pytest.raises(torch.OutOfMemoryError):
        monkeypatch.setattr(model, "generate", lambda **_: small(input_ids=torch.zeros(3, 1)))
        run(model, tokenizer, batch_size=1)


def test_what_prompts_begin_with_is_computed_once(
    tokenizer: Any, make_model: Any, monkeypatch: Any
) -> None:
    """Behind a common beginning answers have the ids that they have one by one, whatever the lengths behind it; the
    model sees the beginning once. Without one, with one prompt, or in a window that is too small, nothing is shared."""
    from sft_recipes.evaluation import generation, shared_prefix

    model = make_model(max_position_embeddings=512)
    beginning = list(range(60))
    prompts = [[*beginning, *range(70 + length, 70 + 4 * length)] for length in (1, 5, 2, 9)]
    alone = [ids_of(model, tokenizer, [prompt])[0] for prompt in prompts]
    seen: list[int] = []
    real = shared_prefix.cache_of

    def spy(model: Any, ids: Any, rows: int) -> Any:
        seen.append(len(ids))
        return real(model, ids, rows)

    monkeypatch.setattr(generation, "cache_of", spy)
    assert ids_of(model, tokenizer, prompts) == alone
    assert seen == [60]
    assert shared_prefix.shared_length(model, prompts, 8) == 60
    assert shared_prefix.shared_length(model, [*prompts, [200, *beginning]], 8) == 0
    assert shared_prefix.shared_length(model, prompts[:1], 8) == 0
    assert shared_prefix.shared_length(model, [beginning, beginning], 8) == 59
    model.set_attn_implementation("eager")
    assert shared_prefix.shared_length(model, prompts, 8) == 60
    monkeypatch.setattr(shared_prefix, "attention_of", lambda _: "varlen_attn")
    assert shared_prefix.shared_length(model, prompts, 8) == 0
    monkeypatch.undo()
    model.config.sliding_window = 64
    assert shared_prefix.shared_length(model, prompts, 8) == 0


def ids_of(model: Any, tokenizer: Any, prompts: Any) -> list[list[int]]:
    answers = generate(
        model, tokenizer, prompts, stop_ids=[256], max_new_tokens=12, batch_size=8, progress=False
    )
    return [answer.ids for answer in answers]


def test_the_output_layer_is_given_one_block_of_memory(tokenizer: Any, make_model: Any) -> None:
    """In the pass over a batch of prompts, too, of which only the last position is asked; afterwards as before."""
    model = make_model()
    seen: list[bool] = []
    watch = model.lm_head.register_forward_hook(
        lambda _, given, __: seen.append(given[0].is_contiguous())
    )
    ids_of(model, tokenizer, [[1, 2, 3], [4, 5, 6]])
    assert seen and all(seen)
    seen.clear()
    model(torch.ones(2, 3, dtype=torch.long), logits_to_keep=1)
    watch.remove()
    assert seen == [False], "a plain pass is not changed"
