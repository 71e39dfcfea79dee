"""Attention by rows gives what attention under a mask gives, in values and gradients, and falls back where it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Qwen3Config,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.training import varlen_attention
from sft_recipes.training.batching import isolation_fault
from sft_recipes.training.varlen_attention import VARLEN, supports_varlen, use_varlen
from tests.conftest import build_model

LENGTHS = (5, 30, 1, 13)
STARTS = [0, 5, 35, 36, 49]
SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "grouped heads": Qwen3Config(**SMALL),
    "every layer slides": MistralConfig(**SMALL, sliding_window=7),
    "some layers slide": Gemma3TextConfig(**SMALL, sliding_window=8),
}


def build(config: Any) -> Any:
    """A random model of the config, the same each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def flattened_batch() -> dict[str, Any]:
    """Four rows of different lengths in one sequence, as TRL's collator makes it."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        rows.append({"input_ids": torch.randint(100, (length,), generator=generator).tolist()})
    batch: dict[str, Any] = DataCollatorForLanguageModeling(0, padding_free=True)(rows)
    batch.pop("labels")
    return batch


def logits_and_gradients(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of a forward pass, and the gradient of every parameter."""
    logits = model(**batch, use_cache=False).logits
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    return [logits.detach(), *gradients]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_equals_attention_under_a_mask(name: str, checkpointing: bool) -> None:
    """Logits and all gradients of a flattened batch are those of sdpa with the mask over the whole batch."""
    model = build(CONFIGS[name])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = flattened_batch()
    expected = logits_and_gradients(model, batch)
    assert not supports_varlen(model)
    use_varlen(model)
    for ours, masked in zip(logits_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-5)
    assert not isolation_fault(model, torch.device("cpu"), 0)


def test_no_mask_is_made_for_a_flattened_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With row boundaries nothing of the size of the batch squared is built; without them the mask is sdpa's."""
    masks: list[Any] = []

    def recorded(**options: Any) -> Any:
        masks.append(varlen_attention.varlen_mask(**options))
        return masks[-1]

    model = build(CONFIGS["some layers slide"])
    use_varlen(model)
    monkeypatch.setitem(varlen_attention.AttentionMaskInterface._global_mapping, VARLEN, recorded)
    model(**flattened_batch(), use_cache=False)
    assert [mask.window for mask in masks] == [None, 8]
    assert all(mask.boundaries.starts.tolist() == STARTS for mask in masks)
    masks.clear()
    ids = torch.arange(12)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert any(mask is not None for mask in masks), "a window of 8 in 12 tokens needs a mask"


def test_padded_batches_and_generation_are_plain_sdpa() -> None:
    """Without row boundaries logits and generated ids are exactly sdpa's."""
    ids = torch.tensor([[7, 7, 3, 9, 11], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model = build(CONFIGS["some layers slide"])
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model(input_ids=ids, attention_mask=mask).logits
    answers = model.generate(input_ids=ids, attention_mask=mask, **settings)
    use_varlen(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), answers)


def test_a_failed_pass_leaves_no_trace() -> None:
    """After a flattened batch that raised, a batch without boundaries is masked again."""
    model = build(CONFIGS["every layer slides"])
    ids = torch.arange(12)[None]
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits
    use_varlen(model)
    broken = flattened_batch() | {"position_ids": "nonsense"}
    with pytest.raises(AttributeError):
        model(**broken, use_cache=False)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_the_kernel_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA torch's kernel gets `[T, heads, width]` in the autocast precision, boundaries, scale and window; with a
    stand-in for it the logits are those of the CPU.
    """
    from torch.nn.attention import varlen

    calls: list[dict[str, Any]] = []

    def stand_in(
        query: Any,
        key: Any,
        value: Any,
        starts: Any,
        ends: Any,
        longest: int,
        _: int,
        **options: Any,
    ) -> Any:
        calls.append({"query": query, "starts": starts, "longest": longest, **options})
        tokens_back = options["window_size"][0]
        window = None if tokens_back < 0 else tokens_back + 1
        rows = varlen_attention._row_by_row(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            varlen_attention.RowMask(varlen_attention.RowBoundaries(ends, longest), window),
            options["scale"],
        )
        return rows[0].transpose(0, 1)

    model = build(CONFIGS["some layers slide"])
    use_varlen(model)
    batch = flattened_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch, use_cache=False).logits
        monkeypatch.setattr(varlen, "varlen_attn", stand_in)
        monkeypatch.setattr(varlen_attention, "_runs_in_kernel", lambda _: True)
        found = model(**batch, use_cache=False).logits
    assert torch.equal(found, expected)
    windows = [call["window_size"] for call in calls]
    assert windows == [(7, 0)] * 5 + [(-1, 0)] + [(7, 0)]
    for call in calls:
        assert call["query"].shape == (sum(LENGTHS), 4, 8)
        assert call["query"].dtype == torch.bfloat16
        assert call["starts"].tolist() == STARTS
        assert call["longest"] == 30
        assert call["enable_gqa"]


def test_what_cannot_use_it() -> None:
    """Capped scores, sinks, dropout and heads that the kernel does not know are named; nothing is switched."""
    gemma2 = build(Gemma2Config(**SMALL, query_pre_attn_scalar=8))
    assert supports_varlen(gemma2) == "the model caps attention scores"
    assert "drops" in supports_varlen(build_model(64, attention_dropout=0.1))
    llama = build_model(64)
    assert supports_varlen(llama) == ""
    assert supports_varlen(llama, "cuda") == "" and supports_varlen(llama, "mps")
    llama.register_parameter("sinks", torch.nn.Parameter(torch.zeros(1)))
    assert "sinks" in supports_varlen(llama)
    assert "heads of 12" in supports_varlen(build(Qwen3Config(**SMALL | {"head_dim": 12})), "cuda")
    odd = build(Qwen3Config(**SMALL | {"head_dim": 12}))
    assert supports_varlen(odd, "cpu") == ""
