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
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def holds_model(folder: Path) -> bool:
    """Whether a model or an adapter was saved in this folder itself."""
    return any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG))


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


def newest_model(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that holds a model, if there is one."""
    for path in reversed(checkpoints(folder)):
        if holds_model(path):
            return path
    return None


def _step(checkpoint: Path) -> int:
    return int(re.split(r"[-_]", checkpoint.name)[-1])
