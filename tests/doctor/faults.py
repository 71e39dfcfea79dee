"""Faults of runs: how each is made in a healthy one, and what the doctor has to say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import build_model
from tests.doctor.runs import (
    ADAPTER,
    END,
    MODEL,
    STATE,
    STEPS,
    TEMPLATE,
    edit_json,
    edit_tensors,
    named,
    write_state,
)

# Turns that end in no token at all.
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OTHER_TEMPLATE = TEMPLATE.replace("add_generation_prompt", "add_generation_prompt | default(false)")


@dataclass(frozen=True)
class Fault:
    """How a healthy project is damaged, and what the doctor has to say of it: in which check, how grave,
    in which words.
    """

    kind: str
    damage: Callable[[Path], Any]
    check: str
    severity: str
    text: str


def _log(key: str, value: float, first: int = 1) -> Callable[[Path], None]:
    """Write a value into the log from a step on."""

    def damage(run: Path) -> None:
        def change(entries: list[dict[str, Any]]) -> None:
            for entry in entries:
                if key in entry and entry["step"] >= first:
                    entry[key] = value

        write_state(run / STATE, change)

    return damage


def _no_evaluation(run: Path) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        entries[:] = [entry for entry in entries if "loss" in entry]

    write_state(run / STATE, change)


def _rising(key: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        def change(entries: list[dict[str, Any]]) -> None:
            for entry in entries:
                if key in entry:
                    entry[key] = 2 + entry["step"] / STEPS

        write_state(run / STATE, change)

    return damage


def _tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        edit_tensors(run / file, change)

    return damage


def _json(file: str, **changes: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        edit_json(run / file, **changes)

    return damage


def _fill(part: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Write a value over all tensors with a part in their name."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if part in name:
                tensors[name].fill_(value)

    return change


def _spoil(part: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Write a value into one number of one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[named(tensors, part)].view(-1)[0] = value

    return change


def _overflow(run: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()
        _spoil("up_proj", float("inf"))(tensors)

    edit_tensors(run / MODEL, change)


def _as_base(run: Path) -> None:
    shutil.copy(run.parent / "base" / MODEL, run / MODEL)


def _cut(file: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        content = (run / file).read_bytes()
        (run / file).write_bytes(content[: len(content) // 2])

    return damage


def _index_names_absent_file(run: Path) -> None:
    tensors = load_file(run / MODEL)
    first = named(tensors, "lm_head")
    parts = {"model-00001-of-00002.safetensors": tensors}
    lost = {first: tensors.pop(first)}
    save_file(tensors, run / "model-00001-of-00002.safetensors", {"format": "pt"})
    places = {name: "model-00001-of-00002.safetensors" for part in parts.values() for name in part}
    places |= dict.fromkeys(lost, "model-00002-of-00002.safetensors")
    edit_json(run / "model.safetensors.index.json", metadata={}, weight_map=places)
    (run / MODEL).unlink()


def _shards_without_index(run: Path) -> None:
    (run / MODEL).rename(run / "model-00001-of-00002.safetensors")


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    name = named(tensors, "q_proj")
    tensors[name] = torch.empty(0)


def _compiled(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def _as_pickle(file: str, new: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        torch.save(load_file(run / file), run / new)
        (run / file).unlink()

    return damage


def _no_tokenizer(run: Path) -> None:
    for path in run.glob("*token*"):
        path.unlink()
    (run / "chat_template.jinja").unlink(missing_ok=True)


def _edit_tokenizer(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(run)
        change(tokenizer)
        tokenizer.save_pretrained(run)

    return damage


def _template(text: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / "chat_template.jinja").write_text(text, encoding="utf-8")

    return damage


def _end_inside(run: Path) -> None:
    """A template that writes a stop in front of each answer."""
    token = "{% if message.role == 'assistant' %}<|pad|>{% endif %}"
    before = "{{ message.content }}"
    _template(TEMPLATE.replace(before, token + before))(run)
    ends = json.loads((run / "generation_config.json").read_text())["eos_token_id"]
    edit_json(run / "generation_config.json", eos_token_id=[ends, 1])


def _remove_template(run: Path) -> None:
    (run / "chat_template.jinja").unlink()


def _remove_templates(run: Path) -> None:
    _remove_template(run)
    _remove_template(run.parent / "base")


def _add_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<|new|>"])


def _room_in_base(run: Path) -> None:
    """A base whose embedding has rows to spare, as that of Qwen, and a token that takes one of them."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    base.resize_token_embeddings(512)
    base.save_pretrained(run.parent / "base")
    shutil.rmtree(run / "merged")
    _edit_tokenizer(_add_token)(run)


def _move_base(run: Path) -> None:
    (run.parent / "base").rename(run.parent / "elsewhere")


def _other_base(run: Path) -> None:
    build_model(400, hidden_size=48, num_attention_heads=4).save_pretrained(run.parent / "base")


def _merged_copy_of_base(run: Path) -> None:
    shutil.copy(run.parent / "base" / MODEL, run / "merged" / MODEL)


def _merged_twice(run: Path) -> None:
    before = load_file(run.parent / "base" / MODEL)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] += tensors[name] - before[name]

    edit_tensors(run / "merged" / MODEL, change)


def _merged_on_another(run: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[named(tensors, "down_proj")].mul_(1.5)

    edit_tensors(run / "merged" / MODEL, change)


def _both_in_one(run: Path) -> None:
    for name in (MODEL, "config.json", "generation_config.json"):
        shutil.move(run / "merged" / name, run / name)
    shutil.rmtree(run / "merged")


def _stopped(run: Path) -> None:
    """Only a checkpoint, of the middle of the run."""
    checkpoint = run / "checkpoint-10"
    checkpoint.mkdir()
    for path in [path for path in run.iterdir() if path.is_file()]:
        shutil.move(path, checkpoint / path.name)
    edit_json(checkpoint / STATE, max_steps=100)


def _broken_save(run: Path) -> None:
    shutil.copytree(run.parent / "base", run / "checkpoint-10")


FAULTS = {
    # the log
    "no evaluation": Fault(
        "lora", _no_evaluation, "evaluated", "warning", "no evaluation ever ran"
    ),
    "loss NaN": Fault(
        "lora",
        _log("loss", float("nan"), 7),
        "training loss",
        "error",
        "NaN or infinite (14 values from step 7 to 20)",
    ),
    "loss 0": Fault(
        "full",
        _log("loss", 0.0),
        "training loss",
        "error",
        "loss is 0 (20 values from step 1 to 20)",
    ),
    "loss rises": Fault(
        "lora",
        _rising("loss"),
        "training loss",
        "warning",
        "the loss never fell: 2.15 in the first quarter, 2.9 in the last",
    ),
    "eval loss NaN": Fault(
        "lora", _log("eval_loss", float("nan")), "evaluation loss", "error", "eval_loss is NaN"
    ),
    "eval loss turned": Fault(
        "lora",
        _rising("eval_loss"),
        "evaluation loss",
        "warning",
        "lowest at step 10 (2.5) and ended at 3",
    ),
    "gradients 0": Fault(
        "lora", _log("grad_norm", 0.0), "gradients", "error", "gradient norm is 0 (20 values"
    ),
    "gradients NaN": Fault(
        "lora",
        _log("grad_norm", float("nan"), 20),
        "gradients",
        "error",
        "NaN or infinite (step 20)",
    ),
    "rate 0": Fault(
        "lora", _log("learning_rate", 0.0), "learning rate", "error", "0 in every step"
    ),
    "rate constant": Fault(
        "lora",
        _log("learning_rate", 1e-3),
        "learning rate",
        "note",
        "ended at 100% of its highest value",
    ),
    "stopped": Fault("full", _stopped, "learning rate", "warning", "stopped at step 20 of 100"),
    "broken save": Fault(
        "lora", _broken_save, "checkpoints are whole", "warning", "no trainer_state.json"
    ),
    # files of weights
    "cut": Fault("lora", _cut(ADAPTER), "files are whole", "error", "cannot be read"),
    "cut model": Fault("full", _cut(MODEL), "files are whole", "error", "cannot be read"),
    "absent shard": Fault(
        "full",
        _index_names_absent_file,
        "files are whole",
        "error",
        "names model-00002-of-00002.safetensors, which is not there",
    ),
    "no index": Fault(
        "full", _shards_without_index, "files are whole", "error", "1 of 2 shards are here"
    ),
    "empty tensors": Fault(
        "full", _tensors(MODEL, _empty), "files are whole", "error", "tensors are empty"
    ),
    "compiled": Fault(
        "full",
        _tensors(MODEL, _compiled),
        "files are whole",
        "error",
        "tensors have _orig_mod. in their names",
    ),
    "pickled": Fault(
        "full",
        _as_pickle(MODEL, "pytorch_model.bin"),
        "files are whole",
        "error",
        "a pickle, and were not read",
    ),
    "pickled adapter": Fault(
        "lora",
        _as_pickle(ADAPTER, "adapter_model.bin"),
        "files are whole",
        "error",
        "a pickle, and were not read",
    ),
    "no weights": Fault(
        "full",
        lambda run: (run / MODEL).unlink(),
        "files are whole",
        "error",
        "there are no weights",
    ),
    "two models": Fault(
        "lora", _both_in_one, "files are whole", "error", "a whole model and an adapter"
    ),
    "other vocabulary": Fault(
        "full",
        _json("config.json", vocab_size=7),
        "shapes fit the config",
        "error",
        "vocab_size is 7, the weights have",
    ),
    "other layers": Fault(
        "full",
        _json("config.json", num_hidden_layers=3),
        "shapes fit the config",
        "error",
        "num_hidden_layers is 3, the weights have 2",
    ),
    "called quantized": Fault(
        "full",
        _json("config.json", quantization_config={"quant_method": "gptq"}),
        "shapes fit the config",
        "error",
        "no tensor is quantized",
    ),
    # numbers
    "NaN": Fault(
        "full",
        _tensors(MODEL, _spoil("up_proj", float("nan"))),
        "weights are numbers",
        "error",
        "hold NaN, such as model.layers.0.mlp.up_proj",
    ),
    "overflow": Fault("full", _overflow, "weights are numbers", "error", "hold infinity"),
    "zeros": Fault(
        "full",
        _tensors(MODEL, _fill("k_proj", 0)),
        "weights are numbers",
        "error",
        "tensors are all zeros",
    ),
    "nothing trained": Fault(
        "full", _as_base, "differs from its base", "error", "are the base's, bit for bit"
    ),
    "no effect": Fault(
        "lora",
        _tensors(ADAPTER, _fill("lora_B", 0)),
        "adapter has an effect",
        "error",
        "the adapter changes nothing",
    ),
    "alpha 0": Fault(
        "lora",
        _json("adapter_config.json", lora_alpha=0),
        "adapter has an effect",
        "error",
        "lora_alpha is 0",
    ),
    "a part without effect": Fault(
        "lora",
        _tensors(ADAPTER, _fill("up_proj.lora_B", 0)),
        "adapter has an effect",
        "note",
        "2 of 4 lora_B matrices are 0",
    ),
    "adapter NaN": Fault(
        "lora",
        _tensors(ADAPTER, _spoil("lora_A", float("nan"))),
        "weights are numbers",
        "error",
        "1 of 8 tensors hold NaN",
    ),
    "no head": Fault(
        "full",
        _tensors(MODEL, lambda tensors: tensors.pop("lm_head.weight")),
        "head and embedding",
        "error",
        "no lm_head.weight was saved",
    ),
    "head thrown away": Fault(
        "full",
        _json("config.json", tie_word_embeddings=True),
        "head and embedding",
        "error",
        "lm_head.weight is not the embedding",
    ),
    # base and merged model
    "base gone": Fault("lora", _move_base, "base of the adapter", "error", "the base is not at"),
    "no base": Fault(
        "lora",
        _json("adapter_config.json", base_model_name_or_path=None),
        "base of the adapter",
        "error",
        "base_model_name_or_path is empty",
    ),
    "other base": Fault(
        "lora", _other_base, "base of the adapter", "error", "4 of its modules do not fit"
    ),
    "not merged": Fault(
        "lora", _merged_copy_of_base, "merged weights", "error", "the adapter is not in them"
    ),
    "merged twice": Fault(
        "lora",
        _merged_twice,
        "merged weights",
        "error",
        "which holds 200% of what the adapter changes",
    ),
    "merged elsewhere": Fault(
        "lora",
        _merged_on_another,
        "merged weights",
        "error",
        "tensors that the adapter does not touch",
    ),
    # tokens
    "no tokenizer": Fault("lora", _no_tokenizer, "tokenizer", "warning", "no tokenizer was saved"),
    "template lost": Fault(
        "lora",
        _remove_template,
        "chat template",
        "error",
        "there is no chat template, and the base has one",
    ),
    "no template": Fault(
        "full", _remove_templates, "chat template", "warning", "there is no chat template"
    ),
    "template of text": Fault(
        "full",
        _template(PLAIN),
        "chat template",
        "error",
        "no special token ends an assistant turn",
    ),
    "template broken": Fault(
        "full", _template("{% for message in %}"), "chat template", "error", "syntax error"
    ),
    "another template": Fault(
        "lora", _template(OTHER_TEMPLATE), "template of the base", "note", "is not the base's"
    ),
    "another end": Fault(
        "full",
        _json("generation_config.json", eos_token_id=1),
        "end of an answer",
        "error",
        "answers end in <|im_end|>, and eos_token_id stops at <|pad|>",
    ),
    "end inside": Fault(
        "full", _end_inside, "end of an answer", "error", "inside an answer, which is a stop"
    ),
    "padding ends": Fault(
        "full",
        _edit_tokenizer(lambda tokenizer: setattr(tokenizer, "pad_token", END)),
        "padding",
        "note",
        "PAD is <|im_end|>, which ends an answer",
    ),
    "no row for an id": Fault(
        "full", _edit_tokenizer(_add_token), "ids have embeddings", "error", "rows"
    ),
    "new token": Fault("lora", _room_in_base, "new tokens", "error", "1 new token (<|new|>)"),
}
