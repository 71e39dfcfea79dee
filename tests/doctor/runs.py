"""Runs as other tools leave them, made in the process: whole, and each with one fault."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import build_model, build_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"
MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
STATE = "trainer_state.json"
STEPS = 20


def write_project(folder: Path) -> None:
    """A base, an adapter on it as TRL and axolotl save one, its merged model, and a whole model."""
    from peft import LoraConfig, get_peft_model

    tokenizer = build_tokenizer(special=("<|im_start|>",), eos=END)
    tokenizer.chat_template = TEMPLATE
    base = build_model(len(tokenizer))
    base.config.eos_token_id = base.generation_config.eos_token_id = tokenizer.eos_token_id
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.01)
    base.save_pretrained(folder / "full")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.sub_(0.01)
    base = type(base).from_pretrained(folder / "base")
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(base, settings)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder / "lora")
    model.merge_and_unload().save_pretrained(folder / "lora" / "merged")
    for kind in ("full", "lora"):
        tokenizer.save_pretrained(folder / kind)
        write_state(folder / kind / STATE)
        (folder / kind / "training_args.bin").write_bytes(pickle.dumps({"lr": 1}))


def write_state(path: Path, change: Callable[[list[dict[str, Any]]], None] | None = None) -> None:
    """What Trainer logs of twenty steps that went well, with an evaluation at the half and at the end."""
    entries: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        share = step / STEPS
        entry = {
            "step": step,
            "epoch": share,
            "loss": 4 - 3 * share,
            "grad_norm": 1.5,
            "learning_rate": 1e-3 * (1 - share),
        }
        entries.append(entry)
        if step % 10 == 0:
            entries.append({"step": step, "epoch": share, "eval_loss": 4 - 2 * share})
    if change is not None:
        change(entries)
    content = {"global_step": STEPS, "max_steps": STEPS, "log_history": entries}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def named(tensors: dict[str, torch.Tensor], part: str) -> str:
    """The first name with a part in it."""
    return next(name for name in tensors if part in name)
