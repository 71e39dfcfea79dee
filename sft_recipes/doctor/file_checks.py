"""What the files of weights say by themselves: whether all are there, and fit the configuration."""

import re
from collections.abc import Mapping

from sft_recipes.doctor.finding import Look, python
from sft_recipes.doctor.folder import Run
from sft_recipes.doctor.weight_files import Weights, pickles
from sft_recipes.model_folder import ADAPTER_CONFIG, CONFIG, apart, holds_two_models
from sft_recipes.report.number_texts import counted

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_SAVE_MODEL = (
    "import sys; from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[1])"
)
_SAVE_ADAPTER = (
    "import sys, torch; from safetensors.torch import save_file; "
    "old = torch.load(sys.argv[1], weights_only=True); "
    "save_file({k: v.contiguous() for k, v in old.items()}, sys.argv[2], {'format': 'pt'})"
)
_ADAPTER_PICKLE = "adapter_model.bin"


def files_are_whole(run: Run, look: Look) -> None:
    """Every file of weights is there and can be read. Found are cut files, absent shards, shards without an
    index, tensors without numbers, pickles in place of safetensors, and an adapter beside a whole model.
    """
    if not run.weights.files and not run.adapter_weights.files:
        _find_no_weights(run, look)
        return
    if run.adapter is not None and not run.adapter_weights.files:
        _find_no_weights(run, look)
    seen: list[str] = []
    for what, weights in (("adapter", run.adapter_weights), ("model", run.weights)):
        for fault in weights.faults:
            look.find("error", fault.where, fault.what, fault.why, fault.fix)
        if weights.tensors:
            files = counted(len(weights.files), "file")
            seen.append(f"{what}: {len(weights.tensors)} tensors in {files}")
    if holds_two_models(run.model):
        what = "a whole model and an adapter lie in one folder"
        why = "transformers puts the adapter on these weights, peft on the base, vLLM leaves it out"
        look.find("error", run.model / ADAPTER_CONFIG, what, why, apart(run.model))
    look.seen = "; ".join(seen)


def _find_no_weights(run: Run, look: Look) -> None:
    """No safetensors: say what is there instead."""
    folder = run.model
    found = [path for path in pickles(folder) if path.name.startswith(("pytorch_model", "adapter"))]
    if found:
        what = "the weights are a pickle, and were not read"
        why = "opening one may run code, and servers refuse it"
        fix = "if the file is yours: " + python(_SAVE_MODEL, folder)
        if (folder / _ADAPTER_PICKLE).is_file():
            target = folder / "adapter_model.safetensors"
            fix = "if the file is yours: " + python(_SAVE_ADAPTER, folder / _ADAPTER_PICKLE, target)
        look.find("error", found[0], what, why, fix)
        return
    what = "there are no weights"
    why = "nothing can be loaded"
    fix = "copy *.safetensors here from where it was trained, or save the model again"
    if any(folder.glob("pytorch_model_fsdp_*")):
        what = "there are only the parts that FSDP saved"
        fix = f"accelerate merge-weights {folder}/pytorch_model_fsdp_0 {folder}"
    elif any(folder.glob("global_step*")):
        what = "there are only the parts that DeepSpeed saved"
        fix = f"python {folder}/zero_to_fp32.py {folder} {folder} --safe_serialization"
    look.find("error", folder, what, why, fix)


def shapes_fit(run: Run, look: Look) -> None:
    """A whole model has the layers and the vocabulary that its configuration says, and is quantized where
    that says so.
    """
    weights = run.require_whole()
    config = run.text_config
    where = run.configs / CONFIG
    rows = embedding_rows(weights)
    layers = layers_of(weights)
    fix = "put the config.json back that the model was trained with, or copy all shards"
    expected = {"vocab_size": rows, "num_hidden_layers": layers}
    for key, count in expected.items():
        stated = config.get(key)
        if isinstance(stated, int) and count is not None and stated != count:
            what = f"{key} is {stated}, the weights have {count}"
            why = "the model does not load, or is filled up with random numbers"
            look.find("error", where, what, why, fix)
    _check_quantization(run, look)
    look.seen = f"{layers} layers, {rows} rows of embeddings"


def _check_quantization(run: Run, look: Look) -> None:
    stated = run.config.get("quantization_config")
    packed = [tensor for tensor in run.weights.tensors.values() if not tensor.is_float]
    if not isinstance(stated, Mapping) or packed:
        return
    what = f"quantization_config says {stated.get('quant_method')}, and no tensor is quantized"
    why = "a server quantizes the model again, or refuses to load it"
    fix = python(
        "import json, sys; p = sys.argv[1]; c = json.load(open(p)); "
        "del c['quantization_config']; json.dump(c, open(p, 'w'), indent=2)",
        run.configs / CONFIG,
    )
    look.find("error", run.configs / CONFIG, what, why, fix)


def embedding_rows(weights: Weights) -> int | None:
    """How many ids the embedding of a model has rows for."""
    for name, tensor in weights.tensors.items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
            return tensor.shape[0]
    return None


def layers_of(weights: Weights) -> int | None:
    """How many layers the weights of a model have."""
    numbers: list[int] = []
    for name in weights.tensors:
        match = _LAYER.search(name)
        if match and not is_encoder(name):
            numbers.append(int(match[1]))
    return max(numbers) + 1 if numbers else None


def is_encoder(name: str) -> bool:
    """Whether a tensor is one of an encoder for images or sound."""
    return re.search(r"vision|visual|image|audio|speech", name) is not None
