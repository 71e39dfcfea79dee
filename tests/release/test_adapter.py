"""An adapter that does nothing, or stands on another base than its own, is not released."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sft_recipes.errors import CheckFailed, InputError
from sft_recipes.path_contents import record_contents
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.export import export
from sft_recipes.release.hub import push
from tests.release.hub_server import Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
ADAPTER = "adapter_model.safetensors"
KINDS = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def write_adapter(run: Path, kind: str, change: Callable[[str, torch.Tensor], None]) -> None:
    """Give a run a new adapter, which changes nothing until `change` has written into its tensors."""
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **KINDS[kind]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                change(name, tensor)
    model.save_pretrained(run)


def leave(name: str, tensor: torch.Tensor) -> None:
    """No training at all."""


def train_a_little(name: str, tensor: torch.Tensor) -> None:
    """What ten steps at a tenth of the usual learning rate leave in the matrices that begin as zeros."""
    if "lora_B" in name:
        tensor.add_(1e-4 * torch.randn_like(tensor))


def train_the_head(name: str, tensor: torch.Tensor) -> None:
    """Only a module that is trained as a whole."""
    if "modules_to_save" in name:
        tensor.add_(1e-4 * torch.randn_like(tensor))


def train_hardly(name: str, tensor: torch.Tensor) -> None:
    """A change below the distance of two numbers in bfloat16."""
    if "lora_B" in name:
        tensor.add_(1e-5 * torch.randn_like(tensor))


def in_bfloat16(run: Path) -> None:
    """The adapter's file in half of its precision."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(run / ADAPTER).items()}
    save_file(tensors, run / ADAPTER, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_without_effect_is_refused(make_run: Callable[..., Path], kind: str) -> None:
    """LoRA, rsLoRA, DoRA (whose rounding alone moves logits) and whole modules as they begin: code 1, no folder."""
    run = make_run("lora", exported=False)
    write_adapter(run, kind, leave)
    with pytest.raises(CheckFailed, match=rf"{ADAPTER}: the adapter changes nothing.*Fix: ") as no:
        export(run, progress=False)
    assert no.value.exit_code == 1
    assert not list(run.glob("*export*"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_an_adapter_with_a_small_effect_passes(
    make_run: Callable[..., Path], kind: str, half: bool
) -> None:
    """What hardly moves a logit is still exported exactly, from files of either precision."""
    run = make_run("lora", exported=False)
    change = train_the_head if kind == "modules_to_save" else train_a_little
    write_adapter(run, kind, change)
    if half:
        in_bfloat16(run)
    compared = export(run, progress=False).compared
    assert compared["base"].logit_difference < 0.05 * compared["base"].largest_logit
    assert compared["saved"].logit_difference < 0.1 * compared["base"].logit_difference


def test_zeros_in_a_trained_adapter(make_run: Callable[..., Path]) -> None:
    """A run's own adapter passes; with its `lora_B` zeroed in the file it does not; NaN is named as such."""
    run = make_run("lora", exported=False)
    tensors = load_file(run / ADAPTER)
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
    save_file(tensors, run / ADAPTER, {"format": "pt"})
    with pytest.raises(CheckFailed, match="the adapter changes nothing"):
        export(run, progress=False)
    for name in tensors:
        tensors[name].fill_(torch.nan)
    save_file(tensors, run / ADAPTER, {"format": "pt"})
    with pytest.raises(CheckFailed, match="it holds NaN"):
        export(run, progress=False)


def test_what_is_lost_in_less_precision(make_run: Callable[..., Path]) -> None:
    """On a base of bfloat16's own numbers a tiny change is rounded away in bfloat16: refused; float32 keeps it."""
    run = make_run("lora", exported=False)
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.bfloat16)
    base.save_pretrained(run.parent / "base")
    record_contents(load_recipe(run / "recipe.yaml"))
    write_adapter(run, "lora", train_hardly)
    with pytest.raises(CheckFailed, match=r"in bfloat16 what the adapter changed is lost.*float32"):
        export(run, dtype="bfloat16", progress=False)
    assert not list(run.glob("*export*"))
    assert export(run, dtype="float32", progress=False).dtype == "float32"


def change_base(run: Path) -> None:
    """Other weights under the same names, as another version of the same base has."""
    path = run.parent / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.1
    save_file(tensors, path, {"format": "pt"})


def test_another_base_is_refused(make_run: Callable[..., Path]) -> None:
    """Weights that the adapter was not trained on are wrong input; where none were recorded, that is said."""
    run = make_run("lora", exported=False)
    checks = export(run, progress=False).checks
    assert {check.name: check.outcome for check in checks}["base of the adapter"] == "ok"
    change_base(run)
    with pytest.raises(InputError, match=r"this is not the base .*contents\.json") as no:
        export(run, run / "second", progress=False)
    assert no.value.exit_code == 2
    assert not (run / "second").exists()
    (run / "contents.json").unlink()
    checks = export(run, run / "second", progress=False).checks
    assert {check.name: check.outcome for check in checks}["base of the adapter"] == "not looked at"


def test_a_whole_model_needs_no_base(make_run: Callable[..., Path]) -> None:
    """A full run is exported without its base, whatever became of that."""
    run = make_run("full", exported=False)
    change_base(run)
    found: Any = export(run, progress=False)
    assert found.compared.keys() == {"saved"}
    assert "base of the adapter" not in {check.name for check in found.checks}


@pytest.mark.parametrize("alone", [False, True], ids=["merged", "adapter_only"])
def test_push_refuses_the_same(make_run: Callable[..., Path], hub: Hub, alone: bool) -> None:
    """Merged or alone, an adapter without effect or on another base never reaches the Hub."""
    run = make_run("lora", exported=False)
    trained = load_file(run / ADAPTER)
    write_adapter(run, "lora", leave)
    with pytest.raises(CheckFailed, match="the adapter changes nothing"):
        push(run, "me/model", adapter_only=alone, base_model="me/base", progress=False)
    save_file(trained, run / ADAPTER, {"format": "pt"})
    change_base(run)
    with pytest.raises(InputError, match="this is not the base"):
        push(run, "me/model", adapter_only=alone, base_model="me/base", progress=False)
    assert not hub.repositories


def test_push_refuses_an_export_of_before(make_run: Callable[..., Path], hub: Hub) -> None:
    """What an earlier version exported was never compared with its base: it is to be exported again."""
    run = make_run("lora")
    path = run / "export" / "export.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    del found["compared"]["base"]
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(InputError, match=rf"sft-recipes export {run} --force"):
        push(run, "me/model", progress=False)
    assert not hub.repositories


@pytest.mark.parametrize("content", [[], None, 3, "x"])
def test_damaged_records_are_named(
    make_run: Callable[..., Path], hub: Hub, content: object
) -> None:
    """A record of another kind is the file's fault, with what to do, whether the base's or the export's."""
    run = make_run("lora")
    text = json.dumps({"schema_version": 1, "contents": content, "compared": content})
    (run / "contents.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"contents\.json: .*Fix: delete it"):
        export(run, run / "second", progress=False)
    (run / "export" / "export.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"export\.json: .*Fix: sft-recipes export {run} --force"):
        push(run, "me/model", progress=False)


@pytest.mark.parametrize("damage", [b"", b"7", b"cut"])
def test_damaged_weights_are_wrong_input(make_run: Callable[..., Path], damage: bytes) -> None:
    """A file of adapter weights that is empty, none, or cut off: InputError that names the run."""
    run = make_run("lora")
    write_adapter(run, "lora", train_a_little)
    content = (run / ADAPTER).read_bytes()[:-8] if damage == b"cut" else damage
    (run / ADAPTER).write_bytes(content)
    with pytest.raises(InputError, match="adapter could not be loaded"):
        export(run, run.parent / "out")
