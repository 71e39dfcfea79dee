"""Where this process computes, and in which precisions it can."""

import torch

from sft_recipes.recipe import Recipe

# A smaller model was never faster in bfloat16 on a CPU: its matrices are too small.
SMALLEST_BF16_MODEL = 50_000_000


def has_accelerator() -> bool:
    """Whether this process computes on something else than the CPU."""
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def computes_on_cpu(recipe: Recipe) -> bool:
    """Whether the recipe's run stays on the CPU: because it says so, or because there is nothing else."""
    return bool(recipe.training.get("use_cpu", not has_accelerator()))


def accelerator_has_bf16(recipe: Recipe) -> bool:
    """Whether the run computes on an accelerator that has bfloat16."""
    return not computes_on_cpu(recipe) and cuda_has_bf16()


def cuda_has_bf16() -> bool:
    """Whether there is a CUDA device with bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices; others compute them slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
