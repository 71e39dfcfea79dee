"""What lies in a folder with a model, whichever tool saved it. No torch here.

transformers, TRL, axolotl and LLaMA-Factory save into `checkpoint-N` while they train, torchtune
into `epoch_N` and `step_N`.
"""

import re
from pathlib import Path

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"(checkpoint-|epoch_|step_)(\d+)")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_WEIGHTS = ("*model*.safetensors", "*model*.bin")
# What a tool leaves beside a model that it trained.
_TRACES = (TRAINER_STATE, "training_args.bin", ADAPTER_CONFIG)


def holds_model(folder: Path) -> bool:
    """Whether a model or an adapter was saved in this folder itself."""
    return any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


def holds_two_models(folder: Path) -> bool:
    """Whether a whole model and an adapter were saved into one folder, as torchtune does.

    Which of the two is meant nobody agrees on: transformers puts the adapter on the weights beside it
    (which torchtune has merged already), peft on the base, vLLM leaves it out.
    """
    has_both = all((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))
    return has_both and any(folder.glob("model*.safetensors"))


def apart(folder: Path) -> str:
    """The command that moves an adapter out of the folder of a whole model."""
    target = folder / "adapter"
    return f"mkdir {target} && mv {folder}/adapter_* {target}/"


def was_trained(folder: Path) -> bool:
    """Whether a tool left its traces: the folder of a run, not of a model as it was published."""
    return any((folder / name).is_file() for name in _TRACES)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer was saved in this folder itself."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return _CHECKPOINT.fullmatch(folder.name) is not None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    paths: list[Path] = []
    for path in folder.iterdir():
        if path.is_dir() and is_checkpoint(path):
            paths.append(path)
    return sorted(paths, key=_step)


def model_of(folder: Path) -> Path:
    """The folder itself, or its newest checkpoint with weights where it holds none itself.

    axolotl writes configurations and tokenizer before it trains: they alone are no model.
    """
    if not _holds_weights(folder):
        for path in reversed(checkpoints(folder)):
            if holds_model(path) and _holds_weights(path):
                return path
    return folder


def _holds_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def _step(checkpoint: Path) -> int:
    return int(re.split(r"[-_]", checkpoint.name)[-1])
