"""How rows share a batch: padded, or flattened to one sequence, with attention that keeps them apart."""

from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers.utils import is_flash_attn_2_available
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.devices import accelerator_has_bf16, computes_on_cpu
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import Recipe
from sft_recipes.training.arguments import batch_per_device
from sft_recipes.training.processes import launched_with
from sft_recipes.training.varlen_attention import VARLEN, supports_varlen, use_varlen
from sft_recipes.upstream.attention import attention_of, takes_row_boundaries

FLASH = "flash_attention_2"
# What accelerate's autocast computes in. Logits come back as float32 all the same.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Relative, of all logits of a row. Attention that isolates rows gave differences of 2e-7 in float32 on every backend
# tried, leaks 0.2 and more.
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_16_BITS = 0.05
# Alone a row may run through another kernel, and in 16 bits choose another expert. A wrong window gave 0.55.
ALONE_TOLERANCE = {torch.float32: 1e-3}
ALONE_TOLERANCE_16_BITS = 0.2


def choose_batching(recipe: Recipe, model: Any, pad_token_id: int) -> bool:
    """Whether batches are flattened. The attention of a model whose batches are flattened is set for it.

    They are where the recipe asks for it (packing, padding_free), and on a CPU wherever attention can go row by row:
    then no batch costs more than padded. Measured with Gemma-3-270m, LoRA, bf16, two cores: 6.8 s a step flattened,
    9.0 s padded. A stated `padding_free: false` is kept.
    """
    check_stated_attention(recipe, model)
    stated = recipe.model.get("attn_implementation")
    asked = _asks_for_flattening(recipe)
    padded = _asks_for_padding(recipe)
    on_cpu = computes_on_cpu(recipe)
    if asked or stated == VARLEN:
        set_attention(recipe, model)
        return True
    if padded or stated or not on_cpu or launched_with("DEEPSPEED"):
        return False
    if supports_varlen(model):
        return False
    before = attention_of(model)
    use_varlen(model)
    if not isolation_fault(model, model.device, pad_token_id):
        return True
    model.set_attn_implementation(before)
    return False


def check_stated_attention(recipe: Recipe, model: Any) -> None:
    """Raise InputError where the recipe names our attention by rows and it could not be used.

    `model` may be one of shapes alone, so that this is known before weights are loaded.
    """
    if recipe.model.get("attn_implementation") != VARLEN:
        return
    what = ""
    fix = "remove the key"
    flattened = _asks_for_flattening(recipe) or computes_on_cpu(recipe)
    if _asks_for_padding(recipe) or not flattened:
        what = "has no effect on padded batches"
        fix = "set packing: true, or remove it"
    elif reason := _varlen_fault(recipe, model):
        what = f"{VARLEN}: {reason}"
    if what:
        key = "attn_implementation"
        raise InputError(Problem(recipe.place(key), key, what, fix))


def _asks_for_flattening(recipe: Recipe) -> bool:
    return bool(recipe.training.get("packing") or recipe.training.get("padding_free"))


def _asks_for_padding(recipe: Recipe) -> bool:
    """Whether batches are padded because the recipe says so, or hold one row."""
    is_padded = recipe.training.get("padding_free") is False or batch_per_device(recipe) == 1
    return is_padded and not _asks_for_flattening(recipe)


def _varlen_fault(recipe: Recipe, model: Any) -> str:
    """Why attention by rows cannot be used with this model on this device; empty if it can."""
    device = _device_type(recipe)
    reason = supports_varlen(model, device)
    if not reason and device != "cpu" and not _computes_in_half(recipe, model):
        return "its kernel takes numbers of 16 bits, set bf16: true"
    return reason


def set_attention(recipe: Recipe, model: Any) -> None:
    """Attention that is told where rows begin, unless the recipe names another: FlashAttention where it is installed,
    else torch's own kernel; where neither can run, transformers' default with a mask over the whole batch.
    """
    check_stated_attention(recipe, model)
    stated = recipe.model.get("attn_implementation")
    device = _device_type(recipe)
    half = device == "cpu" or _computes_in_half(recipe, model)
    reason = _varlen_fault(recipe, model)
    flash = device == "cuda" and is_flash_attn_2_available() and takes_row_boundaries(model)
    if stated is None and flash and half:
        model.set_attn_implementation(FLASH)
    elif stated == VARLEN or (stated is None and not reason):
        use_varlen(model)


def _device_type(recipe: Recipe) -> str:
    if computes_on_cpu(recipe):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps"


def _computes_in_half(recipe: Recipe, model: Any) -> bool:
    """Whether attention gets numbers of 16 bits, the only ones that the kernels on CUDA take."""
    training = recipe.training
    if model.dtype in (torch.bfloat16, torch.float16) or training.get("fp16"):
        return True
    return bool(training.get("bf16", accelerator_has_bf16(recipe)))


def isolation_fault(
    model: Any, device: torch.device, pad_token_id: int, computes_in: torch.dtype | None = None
) -> str:
    """What is wrong with rows that share a flattened batch, in words; empty if nothing is. `model` may be wrapped.

    `computes_in`: the precision under autocast, whose logits come back as float32; None: that of the logits.

    Two rows of 6 and 5 tokens. The first is changed and the second must not notice: recurrent layers without sequence
    boundaries do. And the second must have the logits that it has alone: attention that is given other boundaries or
    another window than the model's own has not.
    """
    collator = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)
    second = [5, 3, 9, 4, 7]
    was_training = model.training
    model.eval()
    logits = []
    try:
        with torch.no_grad():
            for first in ([2, 8, 6, 3, 5, 9], [7, 1, 4, 9, 8, 2]):
                batch = collator([{"input_ids": first}, {"input_ids": second}])
                batch.pop("labels")
                inputs = send_to_device(batch, device)
                logits.append(model(**inputs, use_cache=False).logits[0, len(first) :])
            ids = torch.tensor([second], device=device)
            alone = model(input_ids=ids, use_cache=False).logits[0]
    except ValueError as error:  # a layer's own word that it cannot do this
        return " ".join(str(error).split())
    finally:
        model.train(was_training)
    dtype = computes_in or alone.dtype
    if _relative(logits[0], logits[1]) > TOLERANCE.get(dtype, TOLERANCE_16_BITS):
        return "rows of one batch see one another"
    if _relative(logits[0], alone) > ALONE_TOLERANCE.get(dtype, ALONE_TOLERANCE_16_BITS):
        return "a row has other logits in a flattened batch than alone"
    return ""


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far logits are from others, as a share of those."""
    return float((found - expected).float().norm() / expected.float().norm())
