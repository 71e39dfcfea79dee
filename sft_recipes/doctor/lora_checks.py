"""A LoRA adapter, its base and the merged model: whether they belong together, number by number."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from sft_recipes import run_folder
from sft_recipes.doctor.finding import Look, NotSeen, command
from sft_recipes.doctor.folder import Run
from sft_recipes.doctor.tensors import OpenFiles, spans
from sft_recipes.doctor.weight_files import Tensor, Weights, read_model
from sft_recipes.model_folder import ADAPTER_CONFIG

# peft's names: base_model.model.MODULE.lora_A.weight
_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")
# Modules whose weights a file holds under another name, or not at all: tied heads, fused experts.
_STORED_OTHERWISE = re.compile(r"lm_head|embed_tokens|experts")
_LAYER = re.compile(r"layers\.\d+\..*")
# The largest relative error of one rounding. Tools merge in bfloat16 whatever the file is saved in.
_ROUNDING = 2.0**-8
# float16 holds smaller weights to this, not to a share of them.
_SMALLEST = 1e-7
# Of the change that the adapter makes, as much may arrive: less was rounded away, more was added twice
# or with another scale.
_LEAST_KEPT = 0.5
_MOST_KEPT = 1.5


class Pair(NamedTuple):
    """The two matrices of a module, and the weight of the base that they change."""

    module: str
    a: Tensor
    b: Tensor
    weight: Tensor


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """How much of `B @ A` peft adds to the weight of a module whose matrices have that rank."""
    alpha = float(config.get("lora_alpha", rank))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def base_is_the_adapters(run: Run, look: Look) -> None:
    """The base that an adapter names is here, is not stored quantized, and its weights have the names and
    shapes that the adapter changes.
    """
    if run.adapter is None:
        raise NotSeen("the run is no adapter")
    place = run.model / ADAPTER_CONFIG
    fix = f"name it: {command('doctor', run.folder, '--base')} FOLDER, and put that into base_model_name_or_path"
    if run.base_name is None:
        what = "base_model_name_or_path is empty"
        look.find("error", place, what, "nobody can load the adapter", fix)
        return
    if run.base is None and run_folder.looks_local(run.base_name):
        what = f"the base is not at {run.base_name}"
        look.find("error", place, what, "the adapter cannot be loaded", fix)
        return
    _find_quantized(run, look)
    base = run.require_base()
    misfits = list(_misfits(run))
    look.seen = f"{len(run.adapter_weights.tensors)} tensors on {base}"
    if misfits:
        what = f"{len(misfits)} of its modules do not fit {base}: {misfits[0]}"
        why = "the adapter was trained on another model"
        look.find("error", place, what, why, fix)


def _find_quantized(run: Run, look: Look) -> None:
    """A base that is stored quantized cannot be merged into as it is."""
    name = str(run.base_name)
    is_called_so = re.search(r"(bnb-)?4bit|8bit|gptq|awq", name, re.I) is not None
    config = run.config if run.base is not None else {}
    if not is_called_so and "quantization_config" not in config:
        return
    what = f"the base {name} is stored quantized"
    why = "merging needs the full-precision model, and on that it answers a little otherwise"
    fix = "put the full-precision model's name into base_model_name_or_path before you export"
    look.judge("note", run.model / ADAPTER_CONFIG, what, why, fix)


def _misfits(run: Run) -> Iterator[str]:
    names = Names(run.base_weights)
    for module, matrices in _matrices(run.adapter_weights).items():
        weight = names.find(f"{module}.weight")
        if weight is None:
            if not _STORED_OTHERWISE.search(module):
                yield f"it has no {module}"
            continue
        if not weight.is_float or len(weight.shape) != 2:
            continue
        inner = matrices["A"].shape[-1] if "A" in matrices else None
        outer = matrices["B"].shape[0] if "B" in matrices else None
        stored = set(weight.shape)
        if not {inner, outer} - {None} <= stored:
            yield f"{module} is {list(weight.shape)}, the adapter is for {[outer, inner]}"


def _matrices(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """The A and B of each module."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.tensors.items():
        match = _LORA.fullmatch(name)
        if match and "lora_embedding" not in name:
            modules.setdefault(match[1], {})[match[2]] = tensor
    return modules


class Names:
    """Finds tensors by name, or by their name from the layer on where only one ends so: what stands
    before differs between ways of loading a model.
    """

    def __init__(self, weights: Weights) -> None:
        self._tensors = weights.tensors
        self._by_tail: dict[str, list[Tensor]] = {}
        for name, tensor in weights.tensors.items():
            self._by_tail.setdefault(_tail(name), []).append(tensor)

    def find(self, name: str) -> Tensor | None:
        """The tensor that is meant, if it is clear which."""
        if name in self._tensors:
            return self._tensors[name]
        ending = self._by_tail.get(_tail(name), [])
        return ending[0] if len(ending) == 1 else None


def _tail(name: str) -> str:
    match = _LAYER.search(name)
    return match[0] if match else name


# -- the merged model ----------------------------------------------------------------------------------


@dataclass
class Difference:
    """A merged weight against base and adapter, summed over its numbers."""

    error: float = 0.0  # squared distance to base + adapter
    norm: float = 0.0  # squared norm of base + adapter
    arrived: float = 0.0  # the actual change times the adapter's
    change: float = 0.0  # the adapter's change, squared
    is_base: bool = True  # the base's, bit for bit in the merged precision

    @property
    def kept(self) -> float:
        """The share of the adapter's change that is in the merged weight."""
        return self.arrived / self.change if self.change else 1.0

    @property
    def is_wrong(self) -> bool:
        """Whether rounding does not explain it."""
        # NaN lies within no limits, so that it does is what is asked.
        is_near = self.error <= _ROUNDING**2 * self.norm
        return not (is_near and self.kept < _MOST_KEPT)


def merged_is_the_sum(run: Run, look: Look) -> None:
    """The merged model is the base and the adapter, weight by weight: each changed one the sum, rounding
    aside, each other one the base's own.
    """
    folder = run.merged
    if run.adapter is None or folder is None:
        raise NotSeen("a merged model beside its adapter is not here: add --merged FOLDER")
    if run.adapter.get("use_dora") or run.adapter.get("peft_type") != "LORA":
        raise NotSeen("the merge of such an adapter is no plain sum")
    merged = read_model(folder)
    for fault in merged.faults:
        look.find("error", fault.where, fault.what, fault.why, fault.fix)
    pairs = list(_pairs(run))
    if merged.faults:
        return
    if not pairs:
        raise NotSeen("the base has no weights of the adapter's names")
    differences = _differences(run, merged, pairs)
    _judge(run, folder, differences, look)
    _require_others_untouched(run, merged, look)


def _judge(run: Run, folder: Path, differences: Mapping[str, Difference], look: Look) -> None:
    fix = f"merge again: {command('export', run.model, '--output')} NEW"
    wrong = [module for module, difference in differences.items() if difference.is_wrong]
    change = sum(difference.change for difference in differences.values())
    arrived = sum(difference.arrived for difference in differences.values())
    kept = arrived / change if change else 1.0
    look.seen = (
        f"{len(differences)} modules of {folder} hold {kept:.0%} of what the adapter changes"
    )
    if all(difference.is_base for difference in differences.values()):
        what = f"all {len(differences)} modules are the base's: the adapter is not in them"
        why = "what is served is the model before training"
        look.find("error", folder, what, why, fix)
    elif wrong:
        worst = max(wrong, key=lambda module: differences[module].error)
        what = (
            f"{len(wrong)} of {len(differences)} modules are not base + adapter, such as {worst}, which "
            f"holds {differences[worst].kept:.0%} of what the adapter changes"
        )
        why = "what is served is not what was trained"
        look.find("error", folder, what, why, fix)
    elif kept < _LEAST_KEPT:
        what = f"the merged weights hold {kept:.0%} of what the adapter changes"
        why = "the rest was lost when they were rounded"
        look.find("warning", folder, what, why, f"{fix} --dtype float32")


def _pairs(run: Run) -> Iterator[Pair]:
    names = Names(run.base_weights)
    for module, matrices in _matrices(run.adapter_weights).items():
        weight = names.find(f"{module}.weight")
        is_matrix = weight is not None and weight.is_float and len(weight.shape) == 2
        if weight is not None and is_matrix and len(matrices) == 2:
            yield Pair(module, matrices["A"], matrices["B"], weight)


def _differences(run: Run, merged: Weights, pairs: Sequence[Pair]) -> dict[str, Difference]:
    names = Names(merged)
    config = run.adapter or {}
    differences: dict[str, Difference] = {}
    bar = tqdm(pairs, "comparing the merged model", disable=not run.progress, leave=False)
    with OpenFiles() as files:
        for pair in bar:
            tensor = names.find(pair.weight.name)
            a = files.whole(pair.a).float()
            b = files.whole(pair.b).float() * _scale(config, pair.module, pair.a.shape[0])
            if config.get("fan_in_fan_out"):
                a, b = b.T, a.T
            shape = [b.shape[0], a.shape[1]]
            if tensor is None or not tensor.shape == pair.weight.shape == shape:
                differences[pair.module] = Difference(error=math.inf, is_base=False)
            else:
                differences[pair.module] = _difference(files, pair.weight, tensor, a, b)
    return differences


def _difference(
    files: OpenFiles, weight: Tensor, merged: Tensor, a: torch.Tensor, b: torch.Tensor
) -> Difference:
    """A merged weight against its base plus `b @ a`, block by block."""
    difference = Difference()
    for span in spans(merged):
        before = files.rows(weight, span)
        after = files.rows(merged, span)
        change = b[span] @ a
        actual = after.float() - before.float()
        difference.error += float((actual - change).square().sum())
        difference.norm += float((before.float() + change).square().sum())
        difference.arrived += float((actual * change).sum())
        difference.change += float(change.square().sum())
        is_base = torch.equal(after, before.to(after.dtype))
        difference.is_base = difference.is_base and is_base
    return difference


def _require_others_untouched(run: Run, merged: Weights, look: Look) -> None:
    """What the adapter does not touch is the base's, rounded at most."""
    changed = " ".join(run.adapter_weights.tensors)
    names = Names(run.base_weights)
    different: list[Tensor] = []
    with OpenFiles() as files:
        for name, tensor in merged.tensors.items():
            before = names.find(name)
            module = _tail(name).rpartition(".")[0]
            if before is None or f".{module}." in changed:
                continue
            if not _is_rounded(files, before, tensor):
                different.append(tensor)
    if different:
        what = (
            f"{len(different)} tensors that the adapter does not touch are not the base's, such as "
            f"{different[0].name}"
        )
        why = "it was merged into another base"
        fix = f"name that base: {command('doctor', run.folder, '--base')} FOLDER"
        look.find("error", different[0].file, what, why, fix)


def _is_rounded(files: OpenFiles, before: Tensor, after: Tensor) -> bool:
    """Whether a tensor is another one in less precision; those of other shapes are not compared."""
    if before.shape != after.shape or not (before.is_float and after.is_float):
        return True
    for span in spans(after):
        original = files.rows(before, span).float()
        distance = (files.rows(after, span).float() - original).abs()
        if not (distance <= _ROUNDING * original.abs() + _SMALLEST).all():
            return False
    return True
