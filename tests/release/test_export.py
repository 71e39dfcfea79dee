"""Exporting a run: the folder holds what was trained, and says so when it does not."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    PreTrainedTokenizerBase,
)

from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.errors import CheckFailed, InputError
from sft_recipes.messages import Example
from sft_recipes.path_contents import record_contents
from sft_recipes.recipe import LabelSettings, TemplateSettings
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.export import export, save_servable
from sft_recipes.release.lint import lint
from tests.conftest import build_model
from tests.data.template_tokenizers import tokenizer_for

# Exported folders of real weights, for which no test has the time by itself.
REAL_EXPORTS = [path for path in os.environ.get("SFT_RECIPES_MODELS", "").split(os.pathsep) if path]
PROMPTS = [
    "What is the capital of France?",
    "Sentence 1: He left.\nSentence 2: He went away.\n\nDo they mean the same? Yes or no?",
    "Tom has 12 apples and eats 3.  How many are left?",
    "Écris « bonjour » en japonais: 日本語 🙂",
    "def add(a, b):\n    return a + b\n\nWhat does it do?\n",
]
SERVING = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "export.json",
    "generation_config.json",
}
SERVING |= {
    "model.safetensors",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "Modelfile",
}


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Logits of a prompt, in float32."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits.float()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_export_is_what_was_trained(make_run: Callable[..., Path], kind: str) -> None:
    """A whole model is kept bit for bit; a merged adapter gives the unmerged model's logits, and not the base's."""
    run = make_run(kind, exported=False)
    found = export(run, progress=False)
    folder = run / "export"
    assert {path.name for path in folder.iterdir()} == SERVING and found.folder == folder
    assert not list(run.glob(".export*"))
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained: Any = AutoModelForCausalLM.from_pretrained(
        run.parent / "base" if kind == "lora" else run
    )
    ids = list(range(2, 40))
    if kind == "full":
        assert found.compared["saved"].logit_difference == 0
        assert torch.equal(logits(exported, ids), logits(trained, ids))
    else:
        base = logits(trained, ids)
        unmerged = logits(PeftModel.from_pretrained(trained, str(run)).eval(), ids)
        assert torch.allclose(logits(exported, ids), unmerged, atol=1e-5)
        assert float((unmerged - base).abs().max()) > 1e-2
        assert 0 < found.compared["merged"].logit_difference < 1e-5
    assert found.compared["saved"].equal_texts == found.compared["saved"].prompts > 0
    assert all(check.outcome in ("ok", "not looked at") for check in found.checks)
    recorded = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    del recorded["schema_version"]
    assert {**recorded, "folder": str(folder)} == found.as_json()


def test_tokenizer_config_and_generation_config_agree(make_run: Callable[..., Path]) -> None:
    """In the exported folder EOS and PAD are the same wherever a server looks, and the cache is on."""
    folder = make_run("lora") / "export"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    config, generation = model.config, model.generation_config
    assert (
        config.eos_token_id == tokenizer.eos_token_id
        and generation.eos_token_id == tokenizer.eos_token_id
    )
    assert (
        config.pad_token_id
        == tokenizer.pad_token_id
        == generation.pad_token_id
        != tokenizer.eos_token_id
    )
    assert config.use_cache and tokenizer.chat_template


def test_a_file_in_less_precision_is_counted_and_not_hidden(make_run: Callable[..., Path]) -> None:
    """`dtype` halves the file; the merge itself stays exact and the rounding of the saved file is reported."""
    run = make_run("lora")
    small = export(run, run / "small", dtype="bfloat16", progress=False)
    assert small.dtype == "bfloat16"
    rounding = small.compared["merged"].logit_difference
    assert small.compared["saved"].logit_difference > 10 * rounding
    sizes = [(run / name / "model.safetensors").stat().st_size for name in ("small", "export")]
    assert sizes[0] < 0.6 * sizes[1]
    assert AutoModelForCausalLM.from_pretrained(run / "small").dtype == torch.bfloat16


def test_what_a_model_computes_when_it_is_built_is_not_rounded(
    make_run: Callable[..., Path],
) -> None:
    """A base that is stored in bfloat16 with a scaled embedding, as Gemma's: the reference is the model in float32, so
    the exported float32 file has its logits.
    """
    run = make_run("lora", exported=False)
    tokenizer = AutoTokenizer.from_pretrained(run)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=40,  # its root is none of bfloat16's numbers
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).bfloat16()
    base.save_pretrained(run.parent / "base")
    record_contents(load_recipe(run / "recipe.yaml"))
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base.float(), settings).save_pretrained(run)
    found = export(run, progress=False)
    assert found.compared["saved"].logit_difference < 1e-5


def wrong_merge(model: Any, **_: Any) -> Any:
    """The base without its adapter, as a merge that lost it would give."""
    return model.unload()


def test_a_merge_that_loses_the_adapter_is_refused(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged weights with other logits end in exit code 1 and leave no folder behind."""
    monkeypatch.setattr(PeftModel, "merge_and_unload", wrong_merge, raising=False)
    run = make_run("lora", exported=False)
    with pytest.raises(
        CheckFailed, match=r"merged: this is not the model that was trained: logits differ by"
    ) as no:
        export(run, progress=False)
    assert (
        no.value.exit_code == 1
        and not list(run.glob("*export*"))
        and not list(run.glob(".export*"))
    )


def damage_saved_folders(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Damage every folder behind its last save, which is that of the tokenizer."""
    save = PreTrainedTokenizerBase.save_pretrained

    def save_and_damage(self: Any, folder: Path, **settings: Any) -> Any:
        saved = save(self, folder, **settings)
        damage(Path(folder))
        return saved

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_and_damage)


def test_a_damaged_file_is_refused(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is the file on disk: one tensor changed behind the save is noticed."""
    from safetensors.torch import load_file, save_file

    def double_a_tensor(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"] *= 2
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    damage_saved_folders(monkeypatch, double_a_tensor)
    run = make_run("full", exported=False)
    with pytest.raises(CheckFailed, match="saved: this is not the model that was trained"):
        export(run, progress=False)
    assert not list(run.glob("*export*")) and not list(run.glob(".export*"))


@pytest.mark.parametrize(
    ("file", "change", "refusal"),
    [
        (
            "generation_config.json",
            {"eos_token_id": 7},
            "EOS: tokenizer, config, generation_config: [",
        ),
        ("config.json", {"eos_token_id": 7}, "EOS: tokenizer, config, generation_config: ["),
        (
            "generation_config.json",
            {"pad_token_id": 7},
            "PAD: tokenizer, config, generation_config: [",
        ),
        (
            "chat_template.jinja",
            "Response:\\n|Answer:\\n",
            "training ids are serving ids: 0 of 24 prompts; not ",
        ),
    ],
)
def test_the_lint_finds_a_broken_folder(
    make_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    change: Any,
    refusal: str,
) -> None:
    """Another EOS, PAD or template than in training, in any one file of the folder, is refused by name."""

    def damage(folder: Path) -> None:
        text = (folder / file).read_text(encoding="utf-8")
        if isinstance(change, str):
            assert change.split("|")[0] in text
            (folder / file).write_text(text.replace(*change.split("|")), encoding="utf-8")
        else:
            (folder / file).write_text(json.dumps({**json.loads(text), **change}), encoding="utf-8")

    damage_saved_folders(monkeypatch, damage)
    with pytest.raises(CheckFailed) as refused:
        export(make_run("full", exported=False), progress=False)
    assert refusal in str(refused.value)


def test_template_arguments_become_the_defaults(make_run: Callable[..., Path]) -> None:
    """A server that passes no arguments renders as in training; one that passes its own still can."""
    run = make_run("full", exported=False, chat_template_kwargs={"mood": "it's {sad}"})
    (run / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ mood }}: {{ m.content }} =>{% else %}{{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}",
        encoding="utf-8",
    )
    found = export(run, progress=False)
    assert all(check.outcome != "failed" for check in found.checks)
    tokenizer, chat = (
        AutoTokenizer.from_pretrained(run / "export"),
        [{"role": "user", "content": "hi"}],
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "it's {sad}: hi =>"
    assert tokenizer.apply_chat_template(chat, tokenize=False, mood="glad") == "glad: hi =>"


@pytest.mark.parametrize(
    ("name", "arguments", "outcome"),
    [
        ("llama3", {}, "ok"),
        ("gemma3", {}, "ok"),
        ("gptoss", {}, "ok"),
        ("qwen3", {}, "ok"),
        ("qwen3", {"enable_thinking": False}, "ok"),
        # The prompt opens a reasoning block: in these rows its line break and the next are one token.
        ("qwen3_6", {}, "note"),
        ("qwen3_6", {"enable_thinking": False}, "ok"),
        # The prompt opens a reasoning block that the rows do not have: said before training, too.
        ("deepseekv3", {}, "note"),
    ],
)
def test_the_lint_knows_real_templates(
    tmp_path: Path, name: str, arguments: dict[str, Any], outcome: str
) -> None:
    """Several turns under real templates: the exported template renders as in training without being told how."""
    tokenizer = copy.deepcopy(tokenizer_for(name))
    renderer = attach_chat_template(tokenizer, TemplateSettings(None, arguments))
    turns = [("user", "one?"), ("assistant", "One."), ("user", "and then?"), ("assistant", "Two.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    model = build_model(len(tokenizer))
    save_servable(model, renderer, tmp_path)
    examples = [Example(messages=messages, source="rows.jsonl", row=row) for row in range(3)]
    checks = {
        check.name: check for check in lint(model, tmp_path, renderer, LabelSettings(), examples)
    }
    assert checks["training ids are serving ids"].outcome == outcome
    assert all(check.outcome != "failed" for check in checks.values())
    plain = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages[:3], tokenize=False, add_generation_prompt=True
    )
    assert plain == renderer.render(messages[:3], add_generation_prompt=True)


def test_rows_with_an_input_are_explained(make_run: Callable[..., Path]) -> None:
    """Rows whose input had a section of its own in training are counted apart, with what a client has to send."""
    run = make_run("full")
    found = json.loads((run / "export" / "export.json").read_text(encoding="utf-8"))
    ids = {check["name"]: check["detail"] for check in found["checks"]}[
        "training ids are serving ids"
    ]
    lines = (run / "prepared" / "eval_examples.jsonl").read_text(encoding="utf-8").splitlines()
    inputs = sum("input" in json.loads(line)["messages"][0] for line in lines)
    assert ids.startswith(
        f"{len(lines) - inputs} of {len(lines)} prompts, {inputs} more if the client writes"
    )
    assert 0 < inputs < len(lines)
    assert "### Input:" in export(run, force=True, progress=False).as_text(run)


def test_what_cannot_be_exported(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """No run folder, an unfinished run, a folder that exists, a run without its prepared rows: each says what to do."""
    with pytest.raises(InputError, match="the folder holds no model"):
        export(tmp_path, progress=False)
    run = make_run("full")
    with pytest.raises(InputError, match=r"the folder exists.*--force"):
        export(run, progress=False)
    (run / "mine").mkdir()
    with pytest.raises(InputError, match="the folder exists"):
        export(run, run / "mine", force=True, progress=False)
    with pytest.raises(
        InputError, match=r"--dtype: 'bflot16' is no precision. Fix: did you mean 'bfloat16'"
    ):
        export(run, run / "new", dtype="bflot16", progress=False)
    (run / "prepared" / "eval_examples.jsonl").unlink()
    with pytest.raises(InputError, match="sft-recipes prepare"):
        export(run, run / "new", progress=False)
    (run / "run_state.json").write_text(
        '{"schema_version": 1, "state": "running"}', encoding="utf-8"
    )
    with pytest.raises(InputError, match="the run is running, not finished"):
        export(run, run / "new", progress=False)


def test_force_replaces_an_earlier_export(make_run: Callable[..., Path]) -> None:
    """With `force` nothing of the earlier export is left."""
    run = make_run("full")
    (run / "export" / "old.txt").write_text("old", encoding="utf-8")
    export(run, force=True, progress=False)
    assert {path.name for path in (run / "export").iterdir()} == SERVING


def test_a_quantized_base_is_not_merged_into(make_run: Callable[..., Path]) -> None:
    """Weights that are stored in 4 bits are no full-precision base."""
    run = make_run("lora", exported=False)
    pytest.importorskip("bitsandbytes")
    path = run.parent / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    quantized = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps({**config, "quantization_config": quantized}), encoding="utf-8")
    record_contents(load_recipe(run / "recipe.yaml"))
    with pytest.raises(InputError, match="its weights are stored quantized"):
        export(run, progress=False)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """`transformers serve` on an exported folder: its address, once it answers. It ends when it is told to."""
    why = "transformers serve needs pip install 'sft-recipes[serving]'"
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module, reason=why)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = str(Path(sys.executable).parent / "transformers")
    place = ["--device", "cpu", "--host", "127.0.0.1", "--port", port]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [program, "serve", str(folder), *place], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        for _ in range(240):
            try:
                if httpx2.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx2.HTTPError:
                assert process.poll() is None, process.stdout and process.stdout.read().decode()
            time.sleep(0.5)
        yield url
        process.terminate()
        assert process.wait(timeout=30) is not None
    finally:
        process.kill()
        process.communicate()


def require_served_as_trained(folder: Path, prompts: Sequence[str], new_tokens: int) -> None:
    """A server answers each prompt as generate() does on the ids of our own renderer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    renderer = ChatRenderer(load_tokenizer(str(folder)))
    with serving(folder) as url:
        for prompt in prompts:
            chat = [{"role": "user", "content": prompt}]
            request = {"model": str(folder), "messages": chat, "temperature": 0}
            answer = httpx2.post(
                f"{url}/v1/chat/completions",
                json={**request, "max_tokens": new_tokens},
                timeout=300,
                trust_env=False,
            ).json()
            ids = torch.tensor([renderer.prompt_ids(chat)])
            expected = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
            )[0, ids.shape[1] :]
            text = renderer.tokenizer.decode(expected, skip_special_tokens=True)
            choice = answer["choices"][0]
            assert choice["message"]["content"] == text
            assert answer["usage"]["prompt_tokens"] == ids.shape[1]
            ended = int(expected[-1]) in renderer.stop_ids
            assert choice["finish_reason"] == ("stop" if ended else "length")


@pytest.mark.slow
def test_the_export_is_served(make_run: Callable[..., Path]) -> None:
    """`transformers serve` loads the folder, answers a chat as generate() does on the same ids, and ends when told."""
    require_served_as_trained(make_run("lora") / "export", ["Say one and two (10)."], 12)


@pytest.mark.slow
@pytest.mark.parametrize("folder", REAL_EXPORTS or [None])
def test_real_exports_are_served(folder: str | None) -> None:
    """The same for exported folders of real weights, which SFT_RECIPES_MODELS names, on prompts of several kinds."""
    if folder is None:
        pytest.skip("SFT_RECIPES_MODELS names no exported folders")
    require_served_as_trained(Path(folder), PROMPTS, 24)


@pytest.mark.slow
def test_dpo_starts_from_the_export(make_run: Callable[..., Path]) -> None:
    """The next step: `trl dpo` trains two steps on the exported folder."""
    run = make_run("lora")
    pair = {
        "prompt": [{"role": "user", "content": "Say one."}],
        "chosen": [{"role": "assistant", "content": "one"}],
        "rejected": [{"role": "assistant", "content": "two"}],
    }
    data = run / "preferences"
    data.mkdir()
    (data / "train.jsonl").write_text((json.dumps(pair) + "\n") * 8, encoding="utf-8")
    command = [
        str(Path(sys.executable).parent / "trl"),
        "dpo",
        "--model_name_or_path",
        str(run / "export"),
    ]
    command += [
        "--dataset_name",
        str(data),
        "--output_dir",
        str(run / "dpo"),
        "--max_steps",
        "2",
        "--use_cpu",
        "true",
    ]
    command += ["--bf16", "false", "--per_device_train_batch_size", "2", "--report_to", "none"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (run / "dpo" / "model.safetensors").is_file()
