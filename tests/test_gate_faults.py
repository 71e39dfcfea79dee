"""The benchmark of the gate: each fault changes what it says and nothing else, and the score counts what happened."""

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import fault_injections, gate_faults
from benchmarks.fault_injections import FAULTS, IGNORE_INDEX, QUICKSTART, Row, read_rows

Labelled = tuple[list[int], list[int]]


@pytest.fixture(scope="module")
def renderer() -> Any:
    """The quickstart's tokenizer with its template."""
    from sft_recipes.data.chat_templates import attach_chat_template
    from sft_recipes.data.opening import load_tokenizer
    from sft_recipes.recipe import TemplateSettings

    return attach_chat_template(load_tokenizer(str(QUICKSTART / "base")), TemplateSettings())


@pytest.fixture(scope="module")
def labelled(renderer: Any) -> list[Labelled]:
    """Ids and labels of ten test rows, as prepared."""
    from sft_recipes.data.labels import Labeller
    from sft_recipes.messages import Example
    from sft_recipes.recipe import LabelSettings

    turns = [(row["instruction"], row["output"]) for row in read_rows("test")[:10]]
    chats = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        for ask, answer in turns
    ]
    examples = [Example(messages, source="test", row=row) for row, messages in enumerate(chats)]
    rows = Labeller(renderer, LabelSettings()).label(examples).rows
    return [(list(row.input_ids), list(row.labels)) for row in rows]


@pytest.fixture(scope="module")
def train_rows() -> list[Row]:
    """The quickstart's training rows."""
    return read_rows("train")


def trained(labels: list[int]) -> list[int]:
    """The trained positions."""
    return [index for index, label in enumerate(labels) if label != IGNORE_INDEX]


def test_there_are_twenty_faults_and_each_is_put_in_somewhere() -> None:
    """Twenty faults; none is the quickstart as it ships."""
    assert len(FAULTS) == 20
    for name, fault in FAULTS.items():
        assert fault.what and fault.where, name
        assert any(
            (fault.keys, fault.data, fault.template, fault.training, fault.serving, fault.options)
        ), name


def test_end_of_turn_unlabelled(renderer: Any, labelled: list[Labelled]) -> None:
    """Only the label of EOS is gone."""
    for ids, labels in labelled:
        same, changed = fault_injections.end_of_turn_unlabelled(ids, labels, renderer)
        lost = set(trained(labels)) - set(trained(changed))
        assert (
            same == ids
            and {ids[index] for index in lost} == {renderer.tokenizer.eos_token_id}
            and len(lost) == 1
        )


def test_header_trained(renderer: Any, labelled: list[Labelled]) -> None:
    """The newly trained tokens spell the generation prompt and stand directly before the answer."""
    for ids, labels in labelled:
        same, changed = fault_injections.header_trained(ids, labels, renderer)
        first, new = trained(labels)[0], trained(changed)[: -len(trained(labels))]
        assert same == ids and new == list(range(first - len(new), first))
        assert renderer.tokenizer.decode([changed[index] for index in new]) == "### Response:\n"


def test_prompt_trained(renderer: Any, labelled: list[Labelled]) -> None:
    """Every token is its own label."""
    assert all(
        fault_injections.prompt_trained(*row, renderer) == (row[0], row[0]) for row in labelled
    )


def test_labels_shifted(renderer: Any, labelled: list[Labelled]) -> None:
    """Each label stands one position before its token."""
    for ids, labels in labelled:
        same, changed = fault_injections.labels_shifted(ids, labels, renderer)
        assert same == ids and changed != labels and len(changed) == len(ids)
        assert all(changed[index] == ids[index + 1] for index in trained(changed))


def test_double_bos(renderer: Any, labelled: list[Labelled]) -> None:
    """Two untrained tokens more at the start, the rest as it was; the tokenizer itself writes none."""
    assert renderer.tokenizer.bos_token_id is None
    for ids, labels in labelled:
        changed = fault_injections.double_bos(ids, labels, renderer)
        assert changed == ([renderer.tokenizer.eos_token_id] * 2 + ids, [IGNORE_INDEX] * 2 + labels)


def test_the_trainer_gets_the_changed_rows(
    renderer: Any, labelled: list[Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch changes training and eval rows on their way to the trainer, and nothing else of the data."""
    from datasets import Dataset

    from sft_recipes.data.prepared import PreparedData
    from sft_recipes.training import train

    monkeypatch.setattr(train, "build_trainer", lambda recipe, labeller, data: data)
    fault_injections.change_rows(fault_injections.prompt_trained)()
    rows = Dataset.from_dict(
        {"input_ids": [ids for ids, _ in labelled], "labels": [labels for _, labels in labelled]}
    )
    data = PreparedData(Path(), rows, rows, [], [], {"rows": 10}, np.empty(0, dtype=np.int64))
    labeller = SimpleNamespace(renderer=renderer)
    given: Any = train.build_trainer(None, labeller, data)  # type: ignore[arg-type]
    assert given.summary == data.summary and given.train["input_ids"][:] == rows["input_ids"][:]
    assert (
        given.train["labels"][:]
        == given.eval["labels"][:]
        == rows["input_ids"][:]
        != rows["labels"][:]
    )


def test_pad_is_eos(
    renderer: Any, labelled: list[Labelled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collator's batches have no label that is EOS; all other labels stay."""
    import torch

    from sft_recipes.training import train

    def collate(rows: Any) -> dict[str, Any]:
        return {"labels": torch.tensor(rows[0])}

    monkeypatch.setattr(train, "build_trainer", lambda *_: SimpleNamespace(data_collator=collate))
    tokenizer = SimpleNamespace(eos_token="<|endoftext|>", pad_token="<|pad|>", pad_token_id=0)
    labeller = SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer))
    fault_injections.mask_padding_that_is_eos()
    trainer: Any = train.build_trainer(None, labeller, None)  # type: ignore[arg-type]
    labels = labelled[0][1]
    found = trainer.data_collator([labels])["labels"].tolist()
    assert tokenizer.pad_token == tokenizer.eos_token
    assert 0 in labels and found == [IGNORE_INDEX if label == 0 else label for label in labels]


def test_packing_not_isolated(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the patch rows of one pack see one another, without it they do not."""
    from transformers import AutoModelForCausalLM, masking_utils

    from sft_recipes.training import varlen_attention
    from sft_recipes.training.batching import isolation_fault

    # Put back at the end what the patch replaces.
    find = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", find)
    monkeypatch.setattr(varlen_attention, "_row_by_row", varlen_attention._row_by_row)
    by_mask, by_row = (AutoModelForCausalLM.from_pretrained(base_folder) for _ in range(2))
    varlen_attention.use_varlen(by_row)
    for model in (by_mask, by_row):
        assert not isolation_fault(model, model.device, 1)
    fault_injections.attend_across_packed_rows()
    for model in (by_mask, by_row):
        assert isolation_fault(model, model.device, 1)


def test_loss_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """One training step's loss is NaN: the one after a hundred; the loss of evaluation never is."""
    from sft_recipes.training.trainer import RecipeTrainer

    monkeypatch.setattr(RecipeTrainer, "compute_loss", lambda self: 1.0)
    fault_injections.one_loss_is_not_a_number()

    def loss(step: int, training: bool) -> Any:
        state, model = SimpleNamespace(global_step=step), SimpleNamespace(training=training)
        return RecipeTrainer.compute_loss(SimpleNamespace(state=state, model=model))  # type: ignore[arg-type, call-arg]

    assert [loss(step, True) == 1.0 for step in (99, 100, 101)] == [True, False, True]
    assert loss(100, False) == 1.0


@pytest.mark.parametrize("times", [0, 2])
def test_adapter_served_wrongly(
    times: int, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the adapter the base is served; merged onto the merged model its change is there twice."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sft_recipes import models

    base: Any = AutoModelForCausalLM.from_pretrained(base_folder)
    before = base.model.layers[0].mlp.up_proj.weight.detach().clone()
    adapted: Any = get_peft_model(
        base, LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    (change,) = (
        adapted.base_model.model.model.layers[0]
        .mlp.up_proj.get_delta_weight("default")
        .detach()[None]
    )
    fault = {
        0: fault_injections.leave_the_adapter_out,
        2: fault_injections.merge_onto_the_merged_model,
    }[times]
    monkeypatch.setattr(models, "PeftModel", models.PeftModel)
    fault()
    fresh = AutoModelForCausalLM.from_pretrained(base_folder)
    served: Any = models.PeftModel.from_pretrained(fresh, str(tmp_path))
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(
        served.model.layers[0].mlp.up_proj.weight.detach(), before + times * change
    )


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_answers_swapped(share: float, train_rows: list[Row]) -> None:
    """Exactly that share of the rows has another answer, all answers are still there, and only answers changed."""
    swapped = fault_injections.swap_answers(share)(train_rows)
    changed = [new["output"] != old["output"] for new, old in zip(swapped, train_rows, strict=True)]
    assert sum(changed) == round(share * len(train_rows))
    assert Counter(row["output"] for row in swapped) == Counter(row["output"] for row in train_rows)
    assert [{**row, "output": ""} for row in swapped] == [
        {**row, "output": ""} for row in train_rows
    ]


def test_answers_cut(train_rows: list[Row]) -> None:
    """Half of the answers are half as long, the others whole."""
    cut = fault_injections.cut_half_the_answers(train_rows)
    shorter = [
        (new["output"], old["output"])
        for new, old in zip(cut, train_rows, strict=True)
        if new != old
    ]
    assert len(shorter) == len(train_rows) // 2
    assert all(old.startswith(new) and len(new) == (len(old) + 1) // 2 for new, old in shorter)


def test_one_wording(train_rows: list[Row]) -> None:
    """Every task type is left, with one beginning each, and the rows are a part of those that ship."""
    kept = fault_injections.keep_one_wording(train_rows)
    wordings = {(row["task_type"], *row["instruction"].split()[:2]) for row in kept}
    assert len(wordings) == len({row["task_type"] for row in train_rows}) == 10
    assert 0 < len(kept) < len(train_rows) / 4 and all(row in train_rows for row in kept)


def test_test_rows_trained_and_input_renamed(train_rows: list[Row]) -> None:
    """Thirty rows of the test set stand behind the training rows; the renamed column holds what `input` held."""
    assert fault_injections.add_test_rows(train_rows) == train_rows + read_rows("test")[:30]
    renamed = fault_injections.rename_input(train_rows)
    assert all("input" not in row for row in renamed)
    assert [row["material"] for row in renamed] == [row["input"] for row in train_rows]


def test_template_without_end_of_turn(renderer: Any) -> None:
    """The template differs from the shipped one in the missing EOS only."""
    changed = fault_injections.without_end_of_turn(renderer.template_text)
    assert changed != renderer.template_text and "eos_token" not in changed
    conversation = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
    whole = renderer.tokenizer.apply_chat_template(conversation, tokenize=False)
    cut = renderer.tokenizer.apply_chat_template(
        conversation, tokenize=False, chat_template=changed
    )
    assert cut + renderer.tokenizer.eos_token == whole


@pytest.mark.parametrize("name", FAULTS)
def test_overrides_make_a_recipe(name: str, tmp_path: Path) -> None:
    """What a case passes on is read as a recipe that holds the fault's keys and changed files and the case's folder."""
    from sft_recipes.recipe import parse_overrides
    from sft_recipes.recipe_keys import load_recipe

    fault = FAULTS[name]
    values = parse_overrides(gate_faults.overrides(fault, tmp_path))
    recipe = load_recipe(QUICKSTART / f"{fault.recipe}.yaml", values)
    assert {key: recipe.values[key] for key in fault.keys} == fault.keys
    assert recipe.output_dir == tmp_path / "run" and recipe.evaluation.max_share is None
    written = (tmp_path / "data" / "train.jsonl").is_file(), (tmp_path / "template.jinja").is_file()
    assert written == (fault.data is not None, fault.template is not None)
    assert (recipe.data.datasets[0].path == str(tmp_path / "data")) == written[0]
    assert (recipe.template.chat_template == str(tmp_path / "template.jinja")) == written[1]


def test_faults_stand_in_their_own_command_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training fault is not in the evaluation, a serving fault not in training, and without a name there is none."""
    from sft_recipes import cli

    done: list[str] = []
    fault = fault_injections.Fault(
        "", "", training=lambda: done.append("t"), serving=lambda: done.append("s")
    )
    monkeypatch.setattr(fault_injections, "FAULTS", {"both": fault})
    monkeypatch.setattr(cli, "main", lambda: done.append(" ".join(fault_injections.sys.argv)))
    monkeypatch.setattr(fault_injections.sys, "argv", [])
    for arguments in (
        ["both", "check", "a"],
        ["both", "train"],
        ["both", "evaluate"],
        ["", "train"],
    ):
        fault_injections.main(arguments)
    told = ["sft-recipes check a", "sft-recipes train", "sft-recipes evaluate", "sft-recipes train"]
    assert done == ["t", told[0], "t", told[1], "s", *told[2:]]


@pytest.mark.parametrize(
    ("exact_match", "eos_rate", "expected"),
    [
        (63 / 64, 1.0, []),
        (58 / 64, 1.0, []),
        (50 / 64, 1.0, ["exact_match"]),
        (1.0, 0.5, ["eos_rate"]),
    ],
)
def test_callback_reads_the_last_values(
    exact_match: float, eos_rate: float, expected: list[str], tmp_path: Path
) -> None:
    """The last logged values decide, and only beyond what 64 rows leave open."""
    entries: list[dict[str, Any]] = [
        {"eval_exact_match": 0.0, "eval_eos_rate": 0.0},
        {"eval_exact_match": exact_match, "eval_eos_rate": eos_rate},
        {"train_loss": 0.1},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    assert gate_faults.broken_limits(log) == expected


def fake_command(codes: dict[str, int], verdict: str = "pass") -> Callable[..., tuple[int, str]]:
    """Stands for the commands: their exit codes, and what `evaluate` prints."""
    metrics = {"exact_match": {"value": 0.9}, "eos_rate": {"value": 1.0}}
    lines = [{"name": "exact_match", "group": "sort", "verdict": verdict}]

    def run(fault: str, step: str, *arguments: str, log: Path) -> tuple[int, str]:
        log.write_text(
            f"$ check\nIs said. Fix: no.\n$ {step}\n{step} is wrong. Fix: this.\nAnd more.\n"
        )
        return codes.get(step, 0), json.dumps(
            {"metrics": metrics, "gate": {"verdict": verdict, "lines": lines}}
        )

    return run


@pytest.mark.parametrize(
    ("codes", "verdict", "expected"),
    [
        ({"check": 1}, "pass", "check refused"),
        ({"train": 2}, "pass", "train refused"),
        ({"train": 3}, "pass", "training fault"),
        ({}, "fail", "gate"),
        ({}, "inconclusive", "gate inconclusive"),
        ({}, "pass", ""),
    ],
)
def test_first_refusal_is_named(
    codes: dict[str, int],
    verdict: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A case names the first that refuses it; an inconclusive gate has a name of its own; no run folder stays."""
    monkeypatch.setattr(gate_faults, "run_command", fake_command(codes, verdict))
    case = gate_faults.run_case("learning-rate-/100", FAULTS["learning-rate-/100"], tmp_path)
    assert case["caught_by"] == expected
    assert case["message"] == (f"{next(iter(codes))} is wrong. Fix: this." if codes else "")
    assert case["broken"] == (["exact_match sort"] if not codes and verdict != "pass" else [])
    assert not (tmp_path / "learning-rate--100" / "run").exists()


def test_finished_cases_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call with the same folder runs only what `results.jsonl` does not hold, and returns all in order."""
    ran: list[str] = []

    def run_case(name: str, fault: Any, work: Path) -> dict[str, Any]:
        ran.append(name)
        return {"name": name}

    monkeypatch.setattr(gate_faults, "run_case", run_case)
    monkeypatch.setattr(gate_faults, "run_command", fake_command({}))
    seeds = {f"seed-{seed}": gate_faults.healthy(seed) for seed in (1, 2)}
    gate_faults.run_cases({"seed-2": seeds["seed-2"]}, tmp_path, jobs=1)
    results = gate_faults.run_cases(seeds, tmp_path, jobs=2)
    assert ran == ["seed-2", "seed-1"] and [case["name"] for case in results] == [
        "seed-1",
        "seed-2",
    ]


def test_a_case_of_other_code_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured with another state of the code is no part of this measurement."""
    ran: list[str] = []

    def run_case(name: str, fault: Any, work: Path) -> dict[str, Any]:
        ran.append(name)
        return {"name": name}

    monkeypatch.setattr(gate_faults, "run_case", run_case)
    monkeypatch.setattr(gate_faults, "run_command", fake_command({}))
    cases = {"seed-1": gate_faults.healthy(1)}
    for code in ("a", "a", "b", "b"):
        monkeypatch.setattr(gate_faults, "fingerprint", lambda code=code: code)
        (case,) = gate_faults.run_cases(cases, tmp_path, jobs=1)
        assert case["code"] == code
    assert ran == ["seed-1", "seed-1"]


def test_processes_at_the_same_cases_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four calls at once with one folder run every case once, and all return every case."""
    ran: list[str] = []

    def run_case(name: str, fault: Any, work: Path) -> dict[str, Any]:
        ran.append(name)
        time.sleep(0.01)
        return {"name": name}

    monkeypatch.setattr(gate_faults, "run_case", run_case)
    monkeypatch.setattr(gate_faults, "run_command", fake_command({}))
    monkeypatch.setattr(gate_faults, "fingerprint", lambda: "a")
    cases = {f"seed-{seed}": gate_faults.healthy(seed) for seed in range(8)}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(gate_faults.run_cases, cases, tmp_path, 2) for _ in range(4)]
        results = [call.result() for call in calls]
    assert sorted(ran) == sorted(cases)
    for result in results:
        assert [case["name"] for case in result] == list(cases)


def test_suspected_rows_are_counted(tmp_path: Path, train_rows: list[Row]) -> None:
    """Of three listed rows two have another answer than the one that ships; added rows are not compared."""
    changed = [dict(row) for row in train_rows]
    for index in (4, 9, 14):
        changed[index]["output"] = "something else"
    (tmp_path / "data").mkdir()
    (tmp_path / "evaluation").mkdir()
    path = tmp_path / "data" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in changed), encoding="utf-8")
    listed = [{"where": f"/data/train.jsonl:{line}"} for line in (5, 10, 11)]
    text = "".join(json.dumps(row) + "\n" for row in listed)
    (tmp_path / "evaluation" / "suspects.jsonl").write_text(text, encoding="utf-8")
    found = gate_faults.suspected_rows(tmp_path)
    assert found == {"listed": 3, "faulty_listed": 2, "faulty": 3, "rows": len(train_rows)}
    said = gate_faults.suspects_as_text(
        {"listed": 30, "faulty_listed": 29, "faulty": 10, "rows": 100}
    )
    assert said == "of 30 rows listed as hardest 29 have the fault, which 10 of 100 have (10.0 %)"
    path.write_text("".join(json.dumps(row) + "\n" for row in changed[1:]), encoding="utf-8")
    assert gate_faults.suspected_rows(tmp_path) is None


def test_a_breakdown_catches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that dies with a traceback is an error of the benchmark, a refusal is not."""
    stderr = "recipe: data: is wrong. Fix: this."
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr=stderr, stdout="x")
    )
    assert gate_faults.run_command("", "check", log=tmp_path / "log") == (1, "x")
    stderr = "Traceback (most recent call last):\n  ..."
    with pytest.raises(RuntimeError, match="healthy check: exit code 1"):
        gate_faults.run_command("", "check", log=tmp_path / "log")


def test_score_counts_faults_and_seeds_apart() -> None:
    """Caught, inconclusive and passed faults; flagged and inconclusive seeds; the table names each case."""
    case = {"message": "", "callback": [], "gate": "pass", "broken": [], "exact_match": 1.0}
    found = [
        ("a", "data", "gate"),
        ("b", "data", "check refused"),
        ("c", "data", ""),
        ("d", "data", "gate"),
    ]
    found += [
        ("e", "data", "gate inconclusive"),
        ("s1", "", ""),
        ("s2", "", "gate"),
        ("s3", "", "gate inconclusive"),
    ]
    results = [{**case, "name": name, "where": where, "caught_by": by} for name, where, by in found]
    summary = gate_faults.summarise(results)
    assert (summary["faults"], summary["caught"], summary["faults_inconclusive"]) == (5, 3, 1)
    assert (summary["seeds"], summary["flagged"], summary["seeds_inconclusive"]) == (3, 1, 1)
    assert summary["caught_by"] == {
        "gate": 2,
        "check refused": 1,
        "nothing": 1,
        "gate inconclusive": 1,
    }
    text = gate_faults.as_text(results, summary)
    assert "3 of 5 faults caught" in text and "1 of 3 healthy seeds flagged" in text
    assert all(
        any(line.startswith(f"{name} ") for line in text.splitlines()) for name, _, _ in found
    )
