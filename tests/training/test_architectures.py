"""In every causal architecture of transformers a row of a flattened batch is what it is alone, or it is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.training.batching import isolation_fault
from sft_recipes.training.varlen_attention import supports_varlen, use_varlen

LENGTHS = (5, 30, 1, 13)
# Every name that configs have for a size. A window shorter than the rows shows who applies one, and to what.
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
}
# Some configs derive these from the others, and refuse them.
OFTEN_REFUSED = ((), ("head_dim",), ("head_dim", "num_key_value_heads", "sliding_window"))
LARGEST = 30_000_000


def build(architecture: str) -> Any:
    """A tiny random model in evaluation mode, or None where these sizes do not make one."""
    config_class = CONFIG_MAPPING[architecture]
    for refused in OFTEN_REFUSED:
        sizes = {name: size for name, size in SIZES.items() if name not in refused}
        try:
            config = config_class(**sizes)
            with torch.device("meta"):
                parameters = AutoModelForCausalLM.from_config(config).num_parameters()
            if parameters > LARGEST:
                return None
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            model(input_ids=torch.ones(1, 2, dtype=torch.long))
            return model
        except Exception:  # noqa: BLE001 - whatever a config says of sizes that it does not know
            continue
    return None


def logits_alone_and_together(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[tokens, vocabulary]` of four rows, each alone under the model's own attention, and in one batch."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        rows.append({"input_ids": torch.randint(1, 100, (length,), generator=generator).tolist()})
    batch: Any = DataCollatorForLanguageModeling(0, padding_free=True)(rows)
    batch.pop("labels")
    with torch.no_grad():
        alone = []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            alone.append(model(input_ids=ids, use_cache=False).logits[0])
        use_varlen(model)
        together = model(**batch, use_cache=False).logits[0]
    return torch.cat(alone), together


@pytest.mark.parametrize("architecture", ["olmoe", "phimoe", "stablelm", "nemotron", "gemma3_text"])
def test_rows_and_window_come_from_the_mask(architecture: str) -> None:
    """Models that pass a window which their mask does not have (OLMoE, PhiMoE), or no row boundaries (StableLM,
    Nemotron), have the logits of each row alone.
    """
    model = build(architecture)
    assert model is not None and not supports_varlen(model)
    alone, together = logits_alone_and_together(model)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not isolation_fault(model, torch.device("cpu"), 0)


def test_a_model_that_refuses_is_named() -> None:
    """Convolutions of Qwen3-Next that cannot keep rows apart on a CPU say so, and the fault repeats their words."""
    model = build("qwen3_next")
    use_varlen(model)
    assert "packed sequences apart" in isolation_fault(model, torch.device("cpu"), 0)


def test_what_changes_scores_is_not_left_out() -> None:
    """Capped scores that a model passes to attention by rows raise; they are not ignored."""
    from sft_recipes.training import varlen_attention

    tensors = [torch.zeros(1, 2, 3, 8) for _ in range(3)]
    boundaries = varlen_attention.RowBoundaries(torch.tensor([0, 3]), 3)
    mask = varlen_attention.RowMask(boundaries, None)
    with pytest.raises(ValueError, match="knows no softcap"):
        varlen_attention.varlen_attention(torch.nn.Identity(), *tensors, mask, softcap=50.0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_all_architectures(architecture: str) -> None:
    """A row is the same alone and together, or `supports_varlen` or the probe says why not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of configs that are given sizes which they do not know
        model = build(architecture)
        if model is None or not hasattr(model.config.get_text_config(), "num_attention_heads"):
            pytest.skip("these sizes do not make one")
        if supports_varlen(model):
            return
        use_varlen(model)
        if isolation_fault(model, torch.device("cpu"), 0):
            return
        alone, together = logits_alone_and_together(build(architecture))
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
