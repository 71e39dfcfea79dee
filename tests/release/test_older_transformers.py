"""An exported folder is the same model in transformers 4.57 as in version 5, or says that it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.export import TOLERANCES, export
from sft_recipes.release.older_transformers import _SEEN, write_for_older
from tests.conftest import build_tokenizer, instruction_rows
from tests.tiny_architectures import build_base
from tests.training.test_architectures import LARGEST, OFTEN_REFUSED, SIZES

# Version 4.57 with what it needs and version 5 has in another version; torch and the rest are those of this one.
PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2", "requests")
PACKAGES += ("urllib3", "idna", "charset-normalizer", "certifi")
TEXTS = (
    "Name a colour, please.\n\n  And  another:",
    "### Instruction:\n<|im_start|>x</s> Größe 12",
)
# Runs in 4.57: ids and logits of folders, and the greedy text of each.
READ = """
import json, sys
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.57."), transformers.__version__
transformers.utils.logging.set_verbosity_error()
folders, output = json.loads(sys.argv[1]), sys.argv[2]
read = {}
for folder in folders:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.load(f"{folder}/ids.pt")
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
        read[folder] = {"logits": logits}
        if len(sys.argv) > 3:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            read[folder]["ids"] = [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[3])]
            chat = [{"role": "user", "content": "Say one."}]
            keys = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            prompt = tokenizer.apply_chat_template(chat, **keys)
            read[folder]["prompt"] = prompt["input_ids"].tolist()
            answer = model.generate(**prompt, do_sample=False, max_new_tokens=8)
            read[folder]["answer"] = answer.tolist()
    except Exception as error:
        read[folder] = {"error": f"{type(error).__name__}: {error}"}
torch.save(read, output)
"""


@pytest.fixture(scope="session")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4.57, which stands before the installed one on the path."""
    folder = tmp_path_factory.mktemp("transformers_4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    result = subprocess.run(
        [*pip, *PACKAGES], capture_output=True, text=True, timeout=300, check=False
    )
    if result.returncode:
        pytest.skip(f"pip cannot install transformers 4.57: {result.stderr.strip()[-200:]}")
    return folder


def read_in_older(
    older: Path, folders: Sequence[Path], texts: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """What 4.57 makes of folders, each with the ids to ask in `ids.pt`."""
    output = older / "read.pt"
    arguments = [json.dumps([str(folder) for folder in folders]), str(output)]
    if texts:
        arguments.append(json.dumps(texts))
    environment = {**os.environ, "PYTHONPATH": str(older), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, *arguments]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=590, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return torch.load(output)


def logits_of(folder: Path) -> torch.Tensor:
    """Logits of a folder in version 5 on the ids of its `ids.pt`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.load(folder / "ids.pt"), use_cache=False).logits


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 70_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3_000.0},
}
ROPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA3,
    "qwen3": {"rope_type": "default", "rope_theta": 50_000.0},
    "gemma3_text": GEMMA3,
}


def exported_run(folder: Path, architecture: str, use_peft: bool) -> Path:
    """The export of a run of two steps on a tiny base whose theta is not its default."""
    from sft_recipes.training.train import train

    base = build_base(architecture, folder / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = ROPES[architecture]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rows = "".join(json.dumps(row) + "\n" for row in instruction_rows(24))
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    values = {
        "model_name_or_path": "./base",
        "dataset_name": "./train.jsonl",
        "output_dir": "./run",
        "eval_split": 0.25,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "use_peft": use_peft,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    train(load_recipe(path))
    found = export(folder / "run", progress=False)
    assert {check.name: check.outcome for check in found.checks}["transformers 4.57"] == "ok"
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randint(1, 200, (1, 100), generator=generator), found.folder / "ids.pt")
    return found.folder


@pytest.mark.slow
@pytest.mark.parametrize("architecture", list(ROPES))
@pytest.mark.parametrize("use_peft", [False, True])
def test_an_export_is_the_same_in_both(
    older: Path, tmp_path: Path, architecture: str, use_peft: bool
) -> None:
    """Llama-3-, Qwen3- and Gemma-3-shaped models with a theta of their own, whole and merged: equal ids of texts and
    chats, logits within the tolerance of an export, equal greedy text; in version 5 as without the older fields.
    """
    folder = exported_run(tmp_path, architecture, use_peft)
    read = read_in_older(older, [folder], TEXTS)[str(folder)]
    assert "error" not in read, read
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert read["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    chat = [{"role": "user", "content": "Say one."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert read["prompt"] == prompt["input_ids"].tolist()
    expected = logits_of(folder)
    difference = float((read["logits"] - expected).abs().max())
    print(f"{architecture}: logits differ by {difference:.2g} of {float(expected.abs().max()):.3g}")
    assert difference <= TOLERANCES["float32"] * float(expected.abs().max())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert read["answer"] == model.generate(**prompt, do_sample=False, max_new_tokens=8).tolist()
    # Theta matters to these logits, and version 5 takes it from its own field alone.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for field in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        config.pop(field, None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert torch.equal(logits_of(folder), expected)
    wrong = read_in_older(older, [folder])[str(folder)]["logits"]
    assert float((wrong - expected).abs().max()) > 10 * difference


# What the sizes of most types do not fit.
BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
}
OF_GPT = {"vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
IMAGES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
YARN = {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bamba": {
        **BASE,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1, 3],
    },
    "bart": {
        "vocab_size": 100,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
    "codegen": OF_GPT,
    "deepseek_v3": {
        **BASE,
        **EXPERTS,
        **LATENT,
        "head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "dots1": {**BASE, **EXPERTS, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "gemma3": {
        "text_config": {**BASE, "rope_theta": 50_000.0, "rope_local_base_freq": 3_000.0},
        "vision_config": {**IMAGES, "intermediate_size": 16, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {
        **BASE,
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 100,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 5,
        "rope_local_base_freq": 3_000.0,
    },
    "gpt_neo": {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
    "gptj": OF_GPT,
    "llama4": {
        "text_config": {**BASE, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "vision_config": {
            **IMAGES,
            "intermediate_size": 64,
            "patch_size": 14,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
    },
    "olmo3": {
        **BASE,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 50_000.0},
        },
    },
    "phi3": {
        **BASE,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 50_000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    },
}


def sizes_of(model_type: str) -> Iterator[dict[str, Any]]:
    """Settings to try for a tiny model, a theta of its own where one is taken."""
    if model_type in OWN_SIZES:
        yield OWN_SIZES[model_type]
        return
    thetas = {"rope_theta": 50_000.0, "rope_local_base_freq": 3_000.0, "num_hidden_layers": 6}
    for refused in OFTEN_REFUSED:
        sizes = {name: size for name, size in SIZES.items() if name not in refused}
        yield {**sizes, **thetas}
        yield sizes


def tiny_model(model_type: str) -> Any:
    """A tiny random model of a type; None where no sizes make one."""
    for sizes in sizes_of(model_type):
        try:
            config = CONFIG_MAPPING[model_type](**sizes)
            with torch.device("meta"):
                parameters = AutoModelForCausalLM.from_config(config).num_parameters()
            if parameters > LARGEST:
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            model(input_ids=torch.ones(1, 2, dtype=torch.long))
        except Exception:  # noqa: BLE001 - whatever a config says of sizes that it does not know
            continue
        return model
    return None


@pytest.mark.slow
def test_every_listed_model_type_is_the_same_in_both(older: Path, tmp_path: Path) -> None:
    """Each type that an export says 4.57 reads, as far as tiny models can be made: logits within the tolerance."""
    ids = torch.randint(1, 100, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = {}
    tokenizer = build_tokenizer()
    for model_type in _SEEN["model_types"]:
        folder = tmp_path / model_type
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of configs that are given sizes which they do not know
            model = tiny_model(model_type)
            assert model is not None, f"no sizes make a {model_type}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            check = write_for_older(folder)
        assert check.outcome == "ok", check
        torch.save(ids, folder / "ids.pt")
        with torch.inference_mode():
            expected[model_type] = model(input_ids=ids, use_cache=False).logits
    read = read_in_older(older, [tmp_path / model_type for model_type in expected])
    faults = {}
    largest = 0.0
    for model_type, logits in expected.items():
        found = read[str(tmp_path / model_type)]
        if "error" in found:
            faults[model_type] = found["error"]
            continue
        share = float((found["logits"] - logits).abs().max() / logits.abs().max())
        largest = max(largest, share)
        if share > TOLERANCES["float32"]:
            faults[model_type] = f"logits differ by {share:.2g} of the largest"
    print(f"{len(expected)} types compared, logits differ by at most {largest:.2g} of the largest")
    assert not faults


FULL = {"rope_type": "default", "rope_theta": 7.0}
SCALED = {"rope_type": "yarn", "rope_theta": 7.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "rope", "fields"),
    [
        ("llama", FULL, {"rope_theta": 7.0}),
        (
            "llama",
            SCALED,
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
        (
            "glm",
            {**FULL, "partial_rotary_factor": 0.5},
            {"rope_theta": 7.0, "partial_rotary_factor": 0.5},
        ),
        (
            "gpt_neox",
            {**FULL, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 7.0, "rotary_pct": 0.5},
        ),
        (
            "gemma3_text",
            {"full_attention": FULL, "sliding_attention": {**FULL, "rope_theta": 3.0}},
            {"rope_theta": 7.0, "rope_local_base_freq": 3.0},
        ),
        (
            "olmo3",
            {"full_attention": SCALED, "sliding_attention": FULL},
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
    ],
)
def test_what_is_written_for_4_57(
    tmp_path: Path, model_type: str, rope: dict[str, Any], fields: dict[str, Any]
) -> None:
    """Theta, scaling and shares stand under the names that 4.57 has, nothing that stood there is changed."""
    check = write_config(tmp_path, {"model_type": model_type, "rope_parameters": rope})
    assert check.outcome == "ok"
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config == {"model_type": model_type, "rope_parameters": rope, **fields}


def write_config(folder: Path, config: dict[str, Any]) -> Any:
    """The check of a folder with this configuration and some tokenizer."""
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return write_for_older(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gemma4_text"}, "4.57 was not seen to compute a gemma4_text model alike"),
        (
            {"model_type": "llama", "rope_parameters": {**FULL, "rope_type": "proportional"}},
            "4.57 has no rope of type proportional",
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"full_attention": SCALED, "sliding_attention": SCALED},
            },
            "4.57 has no such rope for its sliding layers",
        ),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"full_attention": FULL, "sliding_attention": SCALED},
            },
            "4.57 has no such rope for its sliding layers",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"compressed": FULL, "main": FULL}},
            "4.57 has no rope for compressed, main",
        ),
    ],
)
def test_what_needs_version_5_is_named(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    """A model that 4.57 has no words for is said to need version 5, why, and its configuration stays as it was."""
    check = write_config(tmp_path, config)
    assert (check.outcome, check.detail) == ("note", f"needs transformers 5: {reason}")
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == config


def test_a_tokenizer_has_a_class_of_both(tmp_path: Path) -> None:
    """Class and extra tokens in words of 4.57; what the class decided stands in the file; version 5 reads the same."""
    tokenizer = build_tokenizer(["<|a|>", "<|b|>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|a|>", "<|b|>"]})
    tokenizer.save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert write_for_older(tmp_path).outcome == "ok"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    assert "extra_special_tokens" not in config
    after = AutoTokenizer.from_pretrained(tmp_path)
    for name in ("extra_special_tokens", "model_input_names", "padding_side", "vocab_size"):
        assert getattr(after, name) == getattr(before, name), name
    assert after("a<|a|> b")["input_ids"] == before("a<|a|> b")["input_ids"]


def test_an_export_says_that_it_needs_version_5(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terminal, card and export.json name it and the reason, and the folder is exported all the same."""
    from sft_recipes.release import older_transformers

    monkeypatch.setattr(older_transformers, "_SEEN", {"model_types": [], "rope_types": []})
    run = make_run("full")
    found = export(run, force=True, progress=False)
    assert "transformers 4.57               note: needs transformers 5: 4.57" in found.as_text(run)
    assert "pip install 'transformers>=5'" in found.as_text(run)
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert "It needs transformers 5: 4.57 was not seen to compute" in card
