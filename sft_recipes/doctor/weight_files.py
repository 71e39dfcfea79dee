"""Files with weights: which there are, what their headers say, what is missing. No tensor is read here.

Pickles (`.bin`, `.pt`, `.pth`) are named and never opened: they may run code.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from sft_recipes.doctor.finding import python
from sft_recipes.errors import InputError
from sft_recipes.text_files import interpreting, read_json

FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_ADAPTER = "adapter_model"
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")
_RENAME = (
    "import sys; from safetensors.torch import load_file, save_file; file, prefix = sys.argv[1:]; "
    "save_file({k.replace(prefix, ''): v for k, v in load_file(file).items()}, file, {'format': 'pt'})"
)
_RESTORE = "copy the file here again from where it was trained, or use an earlier checkpoint"


class Tensor(NamedTuple):
    """A tensor as a header describes it."""

    name: str
    file: Path
    shape: Sequence[int]
    dtype: str  # in the words of safetensors, such as BF16

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that training changes, not packed ones."""
        return self.dtype in FLOATS


class Fault(NamedTuple):
    """What is wrong with files of weights."""

    where: Path
    what: str
    why: str
    fix: str


@dataclass
class Weights:
    """The tensors of a model or of an adapter by name, and what is wrong with their files."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def read_adapter(folder: Path) -> Weights:
    """The weights of the adapter in a folder."""
    return _read(folder, _ADAPTER)


def read_model(folder: Path) -> Weights:
    """The weights of the whole model in a folder, an adapter beside it left out."""
    return _read(folder, "model")


def pickles(folder: Path) -> list[Path]:
    """The files in a folder that are never opened."""
    paths: list[Path] = []
    for pattern in PICKLES:
        paths += folder.glob(pattern)
    return sorted(paths)


def _read(folder: Path, stem: str) -> Weights:
    weights = Weights()
    placed = _placed(folder, stem, weights)
    for path in weights.files:
        for tensor in _header(path, weights):
            weights.tensors[tensor.name] = tensor
    for name, file in placed.items():
        is_readable = folder / file in weights.files
        if is_readable and name not in weights.tensors and not weights.faults:
            what = f"the index places {name} in {file}, which does not hold it"
            why = "it would be filled with random numbers"
            weights.faults.append(Fault(_index(folder, stem), what, why, _RESTORE))
            break
    weights.faults += [*_empty(weights), *_wrapped(weights)]
    return weights


def _index(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors.index.json"


def _placed(folder: Path, stem: str, weights: Weights) -> Mapping[str, str]:
    """Which tensor the index places in which file; notes the files that are there."""
    index = _index(folder, stem)
    whole = folder / f"{stem}.safetensors"
    # In this order transformers looks for them, too.
    if whole.is_file():
        weights.files.append(whole)
        return {}
    if index.is_file():
        return _from_index(index, weights)
    _add_shards(folder, stem, weights)
    return {}


def _from_index(index: Path, weights: Weights) -> dict[str, str]:
    placed: dict[str, str] = {}
    try:
        with interpreting(index, _RESTORE):
            for name, file in read_json(index, _RESTORE)["weight_map"].items():
                placed[str(name)] = str(file)
    except InputError as error:
        what = error.problems[0].what
        weights.faults.append(Fault(index, what, "the model does not load", _RESTORE))
    for file in sorted(set(placed.values())):
        path = index.parent / file
        if Path(file).name != file:
            what = f"the index leads out of its folder ({file!r})"
            weights.faults.append(Fault(index, what, "no tool writes such an index", _RESTORE))
        elif path.is_file():
            weights.files.append(path)
        else:
            number = sum(place == file for place in placed.values())
            what = f"the index names {file}, which is not there"
            why = f"{number} tensors are missing, and the model does not load"
            weights.faults.append(Fault(index, what, why, _RESTORE))
    return placed


def _add_shards(folder: Path, stem: str, weights: Weights) -> None:
    """Shards without their index, which nothing loads."""
    shards: list[Path] = []
    expected = 0
    for path in sorted(folder.glob(f"{stem}-*.safetensors")):
        match = _SHARD.fullmatch(path.name)
        if match:
            shards.append(path)
            expected = int(match[3])
    if not shards:
        return
    weights.files += shards
    what = f"{len(shards)} of {expected} shards are here, and their index is not"
    why = "the model does not load"
    weights.faults.append(Fault(_index(folder, stem), what, why, _RESTORE))


def _header(path: Path, weights: Weights) -> Iterator[Tensor]:
    """The tensors of a file; one that is cut or damaged is a fault."""
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_slice(name)
                yield Tensor(name, path, tensor.get_shape(), tensor.get_dtype())
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        what = f"cannot be read ({error}; {size:,} bytes)"
        why = "its save or its copy broke off"
        weights.faults.append(Fault(path, what, why, _RESTORE))


def _empty(weights: Weights) -> list[Fault]:
    """Tensors without numbers: what a process of ZeRO-3 or FSDP holds of a weight elsewhere."""
    empty = [tensor for tensor in weights.tensors.values() if 0 in tensor.shape]
    if not empty:
        return []
    first = empty[0]
    what = f"{len(empty)} of {len(weights.tensors)} tensors are empty, such as {first.name}"
    why = "a sharded run saved the part of one process, and the rest is lost here"
    fix = (
        "take the weights from a checkpoint's shards (DeepSpeed's zero_to_fp32.py, `accelerate "
        "merge-weights` of FSDP), and set stage3_gather_16bit_weights_on_model_save for the next run"
    )
    return [Fault(first.file, what, why, fix)]


def _wrapped(weights: Weights) -> list[Fault]:
    """Names that torch.compile, FSDP or DDP put in front: a loader looks for others."""
    faults: list[Fault] = []
    for prefix in _WRAPPERS:
        names = [name for name in weights.tensors if prefix in name]
        if names:
            file = weights.tensors[names[0]].file
            what = f"{len(names)} tensors have {prefix} in their names, such as {names[0]}"
            why = "they are left out when it is loaded"
            faults.append(Fault(file, what, why, python(_RENAME, file, prefix)))
    return faults
