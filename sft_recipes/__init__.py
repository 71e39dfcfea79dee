"""Supervised fine-tuning on Hugging Face TRL in which every step is checked.

Layers, imports point only downward (`tests/test_architecture.py` keeps it):

    __main__ > cli > cli_doctor, cli_init, cli_review > cli_examples, cli_options, cli_output > chapter > training
        > audit, doctor, evaluation, foreign, release > models, report > data, devices > upstream
        > recipe, recipe_keys, recipe_checks, messages, run_folder, model_folder, text_files, stop_request, crash,
        errors, statistics, shingles, similarity, overlap, response_patterns

The names below load on first use, so that importing the package loads no torch.
"""

import importlib
import logging
import os
from typing import Any

# Read when Hugging Face libraries are imported; nothing is sent unless the user sets it otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# bitsandbytes, where installed, asks at every import on a CPU for a package that fetches compiled kernels from the Hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

_CHAPTER = """ChatDataset ChatMessage DataQualityAnalyzer InstructionExample ResponseOnlyCollator SFTEvaluator
SupervisedFineTuningDataset create_sft_dataloader detect_format_overfitting evaluate_quality""".split()
_EXPORTS = {
    **dict.fromkeys(_CHAPTER, "chapter"),
    **{"Recipe": "recipe", "load_recipe": "recipe_keys", "train": "training.train"},
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sft_recipes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sft_recipes.{_EXPORTS[name]}"), name)
