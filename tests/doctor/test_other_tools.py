"""Folders as TRL, Trainer, axolotl, LLaMA-Factory and torchtune leave them, evaluated and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_recipes import cli
from sft_recipes.doctor.doctor import examine
from tests.conftest import instruction_rows
from tests.doctor.runs import ADAPTER, MODEL, STATE, edit_json, write_state

pytestmark = pytest.mark.filterwarnings("ignore")
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """Exit code and all output of a command, run in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.run(list(map(str, arguments)))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four rows to answer."""
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(4)))
    return path


def evaluate(say: Say, run: Path, rows: Path, *options: object) -> tuple[int, str]:
    """Ask a folder two tokens for each row."""
    return say("evaluate", run, "--data", rows, "--max_new_tokens", 2, *options)


def served_equals(run: Path, exported: Path) -> None:
    """The exported model computes what base and adapter, or the whole model, do."""
    from sft_recipes.models import load_for_inference

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = load_for_inference(str(run), "float32").model(ids).logits
        after = load_for_inference(str(exported), "float32").model(ids).logits
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_of_another_tool_is_evaluated_and_exported(
    kind: str, project: Path, rows: Path, say: Say
) -> None:
    """As TRL, axolotl and LLaMA-Factory save one: model or adapter, tokenizer, state; nothing is missed."""
    run = project / kind
    shutil.rmtree(run / "merged", ignore_errors=True)
    code, out = evaluate(say, run, rows)
    assert code == 0, out
    assert (Path("evaluations") / kind / "asked/metrics.json").is_file()
    code, out = say("export", run)
    assert code == 0 and "hf upload" in out, out
    assert not (run / "export/README.md").exists() and not (run / "export/recipe.yaml").exists()
    served_equals(run, run / "export")
    # The export lies in the run, so it is compared as its merged model.
    report = examine(run, project / "base")
    assert not report.findings


def test_evaluations_of_checkpoints_do_not_meet(project: Path, rows: Path, say: Say) -> None:
    """Every run has a `checkpoint-5`: the run's name stands in front, and the doctor finds it there."""
    for run in ("one", "two"):
        shutil.copytree(project / "full", project / run / "checkpoint-5")
        assert evaluate(say, project / run / "checkpoint-5", rows)[0] == 0
    names = sorted(path.name for path in Path("evaluations").iterdir())
    assert names == ["one-checkpoint-5", "two-checkpoint-5"]
    checkpoint = project / "one/checkpoint-5"
    (checkpoint / STATE).unlink()
    looks = {look.check: look for look in examine(checkpoint).looks}
    assert "metrics.json is there" in looks["evaluated"].seen


def test_an_adapter_without_a_tokenizer_has_its_bases(project: Path, rows: Path, say: Say) -> None:
    """As peft alone saves one: it is said once, and both commands go on."""
    run = project / "lora"
    for path in (*run.glob("*token*"), run / "chat_template.jinja"):
        path.unlink()
    code, out = evaluate(say, run, rows)
    assert code == 0 and f"that of its base is used, {project / 'base'}" in out
    assert say("export", run)[0] == 0


def test_embeddings_that_grew_with_the_adapter(project: Path, rows: Path, say: Say) -> None:
    """Tokens were added, and peft saved the larger embeddings: the base is made as large."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project / "base")
    tokenizer.add_tokens(["<|new|>", "<|newer|>"])
    model = AutoModelForCausalLM.from_pretrained(project / "base")
    model.resize_token_embeddings(len(tokenizer))
    modules = ["embed_tokens", "lm_head"]
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules)
    model = get_peft_model(model, settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    run = project / "grown"
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    write_state(run / STATE)
    assert not examine(run).findings
    code, out = evaluate(say, run, rows)
    assert code == 0, out
    code, out = say("export", run)
    assert code == 0, out
    served_equals(run, run / "export")
    assert not examine(run).findings


# -- what is refused, in one error with its fix --------------------------------------------------------


def only_a_checkpoint(project: Path) -> Path:
    """Trainer that was stopped before its last save."""
    run = project / "stopped"
    shutil.copytree(project / "full", run / "checkpoint-20")
    return run


def configurations_alone(project: Path) -> Path:
    """axolotl that was stopped: it writes configurations and tokenizer before it trains."""
    run = project / "lora"
    shutil.copytree(run, run / "checkpoint-20", ignore=shutil.ignore_patterns("merged"))
    shutil.copy(project / "base/config.json", run / "config.json")
    (run / ADAPTER).unlink()
    return run


def two_models(project: Path) -> Path:
    """torchtune's epoch: merged weights and the adapter in one folder."""
    run = project / "epoch_0"
    shutil.copytree(project / "lora", run)
    for name in (MODEL, "config.json"):
        shutil.copy(run / "merged" / name, run / name)
    shutil.rmtree(run / "merged")
    return run


def base_gone(project: Path) -> Path:
    """The folder of the base was on another machine."""
    edit_json(project / "lora/adapter_config.json", base_model_name_or_path="/gone/base")
    return project / "lora"


def base_unnamed(project: Path) -> Path:
    """torchtune without a repository's name."""
    edit_json(project / "lora/adapter_config.json", base_model_name_or_path=None)
    return project / "lora"


def ids_without_embeddings(project: Path) -> Path:
    """A token was added, and no embedding for it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(project / "lora")
    tokenizer.add_tokens([f"<|new {number}|>" for number in range(3)])
    tokenizer.save_pretrained(project / "lora")
    return project / "lora"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "only a checkpoint": (only_a_checkpoint, "Fix: name its newest checkpoint, "),
    "configurations alone": (configurations_alone, "Fix: name its newest checkpoint, "),
    "two models": (two_models, "/adapter && mv "),
    "base gone": (
        base_gone,
        "/gone/base: model_name_or_path: no such folder. Fix: put it there, or write",
    ),
    "no base": (
        base_unnamed,
        "base_model_name_or_path: the adapter does not name its base. Fix: write",
    ),
    "ids": (ids_without_embeddings, "ids, the embedding"),
}


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_missing_is_asked_for(
    name: str, command: str, project: Path, rows: Path, say: Say
) -> None:
    """Wrong input, exit code 2, and what to do."""
    make, text = REFUSED[name]
    run = make(project)
    if command == "evaluate":
        code, out = evaluate(say, run, rows)
    else:
        code, out = say("export", run)
    assert code == 2 and text in out, out


def test_an_export_needs_a_template(project: Path, rows: Path, say: Say) -> None:
    """Without one no server can make a prompt; `evaluate` says which one it takes in its place."""
    (project / "full/chat_template.jinja").unlink()
    code, out = say("export", project / "full")
    assert code == 2 and "Fix: save the template that it was trained with as" in out
    code, out = evaluate(say, project / "full", rows)
    assert code == 0 and "the run has no chat template" in out
    code, out = evaluate(say, project / "full", rows, "--chat_template", "instruction")
    assert code == 0 and "the run has no chat template" not in out


# -- runs that the tools themselves made -----------------------------------------------------------------


@pytest.fixture
def train_rows(tmp_path: Path) -> Any:
    """Rows to train on, as messages."""
    import datasets

    conversations = []
    for row in instruction_rows(16):
        user = {"role": "user", "content": row["instruction"]}
        conversations.append([user, {"role": "assistant", "content": row["output"]}])
    return datasets.Dataset.from_dict({"messages": conversations})


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_trl(saved: bool, project: Path, train_rows: Any, rows: Path, say: Say) -> None:
    """SFTTrainer with LoRA, and its folder without the last save: the checkpoint is named, and goes through."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    run = project / "trl"
    settings = SFTConfig(
        output_dir=str(run),
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=str(project / "base"),
        args=settings,
        train_dataset=train_rows,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    if saved:
        trainer.save_model()
    report = examine(run)
    assert {finding.check for finding in report.findings} == {"evaluated"}
    if not saved:
        code, out = evaluate(say, run, rows)
        assert code == 2 and str(run / "checkpoint-8") in out
        run = run / "checkpoint-8"
    code, out = evaluate(say, run, rows)
    assert code == 0, out
    code, out = say("export", run)
    assert code == 0, out
    assert not examine(run).findings


@pytest.mark.slow
def test_trainer(project: Path, train_rows: Any, rows: Path, say: Say) -> None:
    """transformers' Trainer on all weights."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(project / "base")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        return tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))

    encoded = train_rows.map(encode, remove_columns=["messages"])
    run = project / "trainer"
    settings = TrainingArguments(
        output_dir=str(run),
        max_steps=10,
        save_steps=5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=5,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(project / "base"),
        args=settings,
        train_dataset=encoded,
        eval_dataset=encoded,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_model()
    assert not examine(run, project / "base").findings
    code, out = evaluate(say, run, rows)
    assert code == 0, out
    code, out = say("export", run)
    assert code == 0, out
