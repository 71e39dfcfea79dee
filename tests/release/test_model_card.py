"""The model card: everything the run wrote, "not recorded" for the rest, nothing of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.local_paths import is_hub_name, public, recipe_text
from sft_recipes.release.model_card import MARK, render_card, write_card
from tests.release.conftest import write_evaluation

GATE = {
    "verdict": "fail",
    "exit_code": 1,
    "smoke": False,
    "lines": [
        {
            **{
                "name": "exact_match",
                "compared_with": None,
                "group": "",
                "side": "at_least",
                "limit": 0.9,
            },
            **{"value": 0.75, "bound": 0.3, "n": 4, "n_min": 100, "verdict": "fail"},
        }
    ],
}


def test_the_card_says_what_the_run_wrote(make_run: Callable[..., Path]) -> None:
    """Data with fingerprint and counts, labels, hyperparameters, metrics with interval, gate, samples, versions."""
    run = make_run("lora")
    write_evaluation(run, gate=GATE)
    card, data = render_card(run), json.loads((run / "data.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    source = data["sources"][0]
    for text in (
        data["fingerprint"],
        f"| train | {source['rows_in']} | none | {source['tokens_kept']:,} |",
        f"{data['train']['tokens']:,} tokens, {data['train']['trained_tokens']:,} of them trained",
        "| Loss covers | the assistant's turns with their end tokens, nothing else |",
        "| lora_r | 4 |",
        "| learning_rate | 0.01 |",
        "| Optimizer steps | 2 |",
        "| Exact match | 0.750&nbsp;[0.30,&nbsp;0.95] | 4 |",
        "eval: **fail**",
        "| Exact match | 0.750 | 0.300 | at least 0.9 | 4 | fail |",
        "question 2",
        f"| transformers | {environment['versions']['transformers']} |",
        "Safety, bias and factual accuracy: not recorded.",
    ):
        assert text in card, text


def test_tables_fit_the_hub_and_have_no_empty_cell(make_run: Callable[..., Path]) -> None:
    """At most six columns, each with a heading; a cell says something, and no cell holds a long text."""
    run = make_run("lora")
    write_evaluation(run, gate=GATE)
    rows = [line for line in render_card(run).splitlines() if line.startswith("|")]
    assert len(rows) > 20
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) <= 6
        assert all(cells), row
        assert max(map(len, cells)) <= 100


def test_each_data_set_of_a_mixture_has_its_lines(make_run: Callable[..., Path]) -> None:
    """Exact match and loss by data set stand in the table with interval and n, and in the metadata."""
    run = make_run()
    match = {"value": 0.5, "n": 3, "ci_low": 0.1, "ci_high": 0.9, "unit": "proportion"}
    loss = {"value": 1.25, "n": 6, "ci_low": 1.0, "ci_high": 1.5, "unit": "nats a token"}
    write_evaluation(run, data_sets={"chat": match}, data_set_losses={"code": loss})
    card = render_card(run)
    assert "| Exact match: chat | 0.500&nbsp;[0.10,&nbsp;0.90] | 3 |" in card
    assert "| Loss of held-out rows: code | 1.250&nbsp;[1.00,&nbsp;1.50] | 6 |" in card
    (result,) = ModelCard(card).data.to_dict()["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [0.75, 0.5, 1.25]


def test_what_was_not_measured_stands_in_no_table(make_run: Callable[..., Path]) -> None:
    """A metric without a value is named in one line, and keys that were not set in another."""
    run = make_run("lora")
    folder = write_evaluation(run)
    path = folder / "metrics.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    nothing = {"value": None, "n": 0, "ci_low": None, "ci_high": None}
    content["metrics"]["tool_calls"] = {
        **content["metrics"]["exact_match"],
        **nothing,
        "label": "Calls",
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    card = render_card(run)
    assert "These rows say nothing of: Calls." in card
    assert "| Calls |" not in card
    assert re.search(r"^Not set, so left to .*`use_dora`.*`weight_decay`", card, re.MULTILINE)
    assert "| weight_decay |" not in card


def test_a_prompt_stands_as_people_read_it(make_run: Callable[..., Path]) -> None:
    """One message is shown without the template around it, several with who said them."""
    run = make_run("full")
    folder = write_evaluation(run)
    answer = {"role": "assistant", "content": "yes"}
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "Is it?"}
    row = {"prompt": "<|im_start|>", "reference": "yes", "response": "yes", "exact_match": True}
    rows = [{**row, "messages": [user, answer]}, {**row, "messages": [system, user, answer]}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
    card = render_card(run)
    assert "<|im_start|>" not in card
    assert "**Asked**\n\n    Is it?\n\n" in card
    assert "    system: Be brief.\n    \n    user: Is it?\n" in card


def test_the_metadata_is_what_the_hub_reads(make_run: Callable[..., Path]) -> None:
    """The client parses the card; model-index holds every metric with its n and interval."""
    run = make_run("full")
    write_evaluation(run)
    data = ModelCard(render_card(run, repo="me/model")).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers",
        "text-generation",
        None,
    )
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("exact_match", 0.75)
    assert result.metric_args == {"n": 4, "interval_95": [0.3006, 0.9544]}
    assert (result.dataset_type, result.dataset_name) == ("eval", "./questions.jsonl")


def test_names_on_the_hub_are_linked(make_run: Callable[..., Path]) -> None:
    """A base and data from the Hub stand in the metadata, as finetune or adapter; the merged model is a finetune."""
    run = make_run("lora", model_name_or_path="me/base", dataset_name="you/data")
    card = ModelCard(render_card(run)).data
    assert (card.base_model, card.base_model_relation) == ("me/base", "adapter")
    assert (card.datasets, card.library_name) == (["you/data"], "peft")
    merged = ModelCard(render_card(run, run / "export")).data
    assert (merged.base_model_relation, merged.library_name) == ("finetune", "transformers")


def test_what_is_unknown_says_so(make_run: Callable[..., Path]) -> None:
    """A run folder without its side files still gives a card, with "not recorded" in their place."""
    run = make_run("full")
    for name in ("data.json", "environment.json", "log.jsonl"):
        (run / name).unlink()
    card = render_card(run)
    for text in (
        "## Training data\n\nNot recorded.\n",
        "Fingerprint of the prepared data: `not recorded`",
        "| Processes | not recorded |",
        "| Mean training loss | not recorded |",
        "| Python | not recorded |",
        "Not recorded. `sft-recipes evaluate RUN` writes it.",
        "License: not recorded.",
    ):
        assert text in card, text
    assert (
        len(re.findall(r"^Not recorded", card, re.MULTILINE)) == 4
    )  # data, evaluation, gate, samples


def test_a_gate_without_a_verdict_is_named(make_run: Callable[..., Path]) -> None:
    """A recipe with a gate that nobody asked does not read like one without."""
    run = make_run("full", gate=[{"metric": "exact_match", "at_least": 0.9, "n": 100}])
    assert (
        "Not recorded: the recipe has a gate, and no evaluation was judged by it."
        in render_card(run)
    )


def test_samples_cannot_leave_their_block_and_are_masked(make_run: Callable[..., Path]) -> None:
    """Backticks, HTML, hidden characters, secrets, addresses and local paths in answers stay inert or are masked."""
    run = make_run("full")
    folder = write_evaluation(run)
    bad = "```\n# out\n<script>alert(1)</script>\u202e me@zwei.org /home/me/x hf_" + "Ab1" * 12
    row = {"prompt": "p", "reference": None, "response": bad, "exact_match": False}
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    card = render_card(run)
    lines = ["```", "# out", "<script>alert(1)</script>⟨U+202E⟩ [email] [local path] [access key]"]
    assert "**Answered**\n\n" + "".join(f"    {line}\n" for line in lines) + "\n" in card


def test_wrong_answers_are_shown_first(make_run: Callable[..., Path]) -> None:
    """Samples are not a choice of good ones: the wrong one of four comes first."""
    run = make_run("full")
    write_evaluation(run)
    shown = re.findall(r"question (\d)", render_card(run))
    assert shown == ["2", "0", "1", "3"]


def test_nothing_local_is_in_card_and_recipe(make_run: Callable[..., Path]) -> None:
    """Absolute paths of base, data and evaluations are shortened to their last name."""
    run = make_run("lora")
    values = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    values |= {
        "model_name_or_path": str(run.parent / "base"),
        "dataset_name": str(run.parent / "train.jsonl"),
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    write_evaluation(run)
    recipe = yaml.safe_load(recipe_text(load_recipe(run / "recipe.yaml")))
    assert (recipe["model_name_or_path"], recipe["dataset_name"]) == ("./base", "./train.jsonl")
    assert str(run.parent) not in render_card(run, run / "export")


def test_only_cards_written_by_libraries_are_replaced(make_run: Callable[..., Path]) -> None:
    """TRL's card is replaced, ours is renewed, one that people wrote is kept and goes along with the export."""
    run = make_run("lora")
    assert MARK in (run / "export" / "README.md").read_text(encoding="utf-8")
    assert MARK in (run / "README.md").read_text(encoding="utf-8")  # the run's own, written last
    (run / "README.md").write_text(
        "---\ntags: [generated_from_trainer]\n---\n", encoding="utf-8"
    )  # TRL's
    write_card(run)
    assert MARK in (run / "README.md").read_text(encoding="utf-8")
    write_evaluation(run)
    assert "0.750&nbsp;[0.30,&nbsp;0.95]" in write_card(run).read_text(encoding="utf-8")
    (run / "README.md").write_text("mine", encoding="utf-8")
    write_card(run)
    assert (run / "README.md").read_text(encoding="utf-8") == "mine"
    assert write_card(run, run / "export").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/a/b/c", "./c"),
        ("~/runs/x/", "./x"),
        ("../../b/c.jsonl", "./c.jsonl"),
        ("C:\\data\\rows.csv", "./rows.csv"),
        ("me/model", "me/model"),
        ("the run's own eval rows", "the run's own eval rows"),
        (
            {"datasets": [{"path": "/a/b"}], "system_prompt": "/no_think"},
            {"datasets": [{"path": "./b"}], "system_prompt": "/no_think"},
        ),
    ],
)
def test_public(value: object, shown: object) -> None:
    """Folders go, names stay, and text for the model is not taken for a path."""
    assert public(value) == shown


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        ("me/model", True),
        ("gpt2", True),
        ("./base", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("rows.jsonl", False),
    ],
)
def test_is_hub_name(
    name: str, on_hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub name has at most one slash and no file here."""
    assert is_hub_name(name) is on_hub
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert not is_hub_name("me/model")
