"""bfloat16 on a CPU: taken where a short trial shows that it pays, for as long as the run lasts.

CPUs with instructions for it multiply bfloat16 matrices faster than float32, but only large ones: an 11-million-
parameter model gains nothing, a step of Gemma-3-270m (LoRA, two cores) took 3.4 s instead of 5.0 s.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch users know
from datasets import Dataset

from sft_recipes.devices import SMALLEST_BF16_MODEL, computes_on_cpu, cpu_has_bf16
from sft_recipes.recipe import Recipe
from sft_recipes.training.processes import launched_with, on_main

# A gain below a fifth is within what one machine measures twice.
LEAST_GAIN = 1.2
# bfloat16 keeps 8 bits of a number. A loss further off than this is no rounding.
LOSS_TOLERANCE = 0.02
TRIAL_TOKENS = 512
TRIAL_POSITIONS = 64


@dataclass
class Trial:
    """Passes under one precision: the seconds of the fastest, and the loss."""

    context: Callable[[], AbstractContextManager[Any]]
    seconds: float = float("inf")
    loss: float = 0.0

    def run(self, model: Any, batch: torch.Tensor) -> None:
        """One pass forward and back to the embeddings: gradients of weights would take their memory.

        The output layer sees a part of the positions, as in training, where only answers have a loss.
        """
        embedded: list[torch.Tensor] = []
        embedding = model.get_input_embeddings()
        started = time.perf_counter()
        with (
            self.context(),
            embedding.register_forward_hook(lambda *parts: embedded.append(parts[-1])),
        ):
            hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[:, -TRIAL_POSITIONS - 1 : -1])
            loss = F.cross_entropy(logits[0].float(), batch[0, -TRIAL_POSITIONS:])
        torch.autograd.grad(loss, embedded[0])
        self.seconds = min(self.seconds, time.perf_counter() - started)
        self.loss = loss.item()


def choose_precision(
    recipe: Recipe, model: Any, rows: Dataset, resumed: str | None
) -> dict[str, bool]:
    """`{"bf16": True}`, `{"bf16": False}`, or nothing where the recipe or the device decides.

    `resumed` is the precision of the run that goes on (no, bf16, fp16): it is kept. Every rank must ask.
    """
    stated = "bf16" in recipe.training or "fp16" in recipe.training
    if stated:
        return {}
    if resumed == "unknown":
        return {}
    if resumed is not None:
        return {"bf16": resumed == "bf16"}
    if not may_take_bfloat16(recipe, model):
        return {}
    return {"bf16": on_main(lambda: bfloat16_pays(model, rows))}


def may_take_bfloat16(recipe: Recipe, model: Any) -> bool:
    """Whether the recipe leaves it open, and this CPU and a model of this size may gain by it."""
    stated = "bf16" in recipe.training or "fp16" in recipe.training
    if stated or not _may_change_weights(recipe) or model.dtype != torch.float32:
        return False
    return bool(cpu_has_bf16() and model.num_parameters() >= SMALLEST_BF16_MODEL)


def _may_change_weights(recipe: Recipe) -> bool:
    """Whether weights lie on the CPU, whole and as they were loaded: not quantized, nor in DeepSpeed's parts."""
    quantized = recipe.model.get("load_in_4bit") or recipe.model.get("load_in_8bit")
    return computes_on_cpu(recipe) and not quantized and not launched_with("DEEPSPEED")


def settle_frozen_weights(recipe: Recipe, model: Any, decided: Mapping[str, bool]) -> None:
    """Under bf16 on a CPU, keep the weights that LoRA leaves alone in bfloat16.

    Autocast would turn each of them into bfloat16 again in every pass, the output layer's with them. What is trained is
    added later, in float32. A stated `dtype` is kept, and so is a base of which whole modules are trained.
    """
    stated = "dtype" in recipe.model or "lora_modules_to_save" in recipe.model
    if stated or not recipe.model.get("use_peft") or not _may_change_weights(recipe):
        return
    if not decided.get("bf16", recipe.training.get("bf16", False)):
        return
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)


def bfloat16_pays(model: Any, rows: Dataset) -> bool:
    """Whether passes under bfloat16 autocast are faster and give the same loss. Prints what was measured."""
    ids = torch.tensor(rows[0]["input_ids"][:TRIAL_TOKENS])
    copies = -(-TRIAL_TOKENS // len(ids))
    batch = ids.repeat(copies)[None, :TRIAL_TOKENS]
    plain = Trial(lambda: nullcontext())
    autocast = Trial(lambda: torch.autocast("cpu", torch.bfloat16))
    for _ in range(2):  # the first pass of each also sets its kernels up
        plain.run(model, batch)
        autocast.run(model, batch)
    gain = plain.seconds / autocast.seconds
    difference = abs(autocast.loss - plain.loss) / max(plain.loss, 1e-6)
    pays = gain >= LEAST_GAIN and difference <= LOSS_TOLERANCE
    print(
        f"precision: {'bf16 autocast' if pays else 'float32'} on this CPU. {TRIAL_TOKENS} tokens took "
        f"{plain.seconds:.2f} s in float32, {autocast.seconds:.2f} s under bf16 autocast ({gain:.2f}x); "
        f"their losses differ by {difference:.1%}. State bf16: true or false to decide yourself.",
        flush=True,
    )
    return pays


def precision_of(args: Any) -> str:
    """What a checkpoint's manifest says: bf16, fp16 or no."""
    if args.bf16:
        return "bf16"
    return "fp16" if args.fp16 else "no"
