"""The `evaluate` command's work: which rows, which base, what is written and by whom."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes import models, run_folder
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.errors import InputError
from sft_recipes.evaluation import answering
from sft_recipes.evaluation.evaluate_command import EvaluationResult, run_evaluation
from sft_recipes.evaluation.evaluation_request import EvaluationRequest
from sft_recipes.evaluation.format_overfitting import TEMPLATE, VARIANTS
from sft_recipes.recipe_keys import load_recipe

Save = Callable[..., str]


@pytest.fixture
def rows(write_rows) -> str:
    return str(
        write_rows(
            [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
        )
    )


@pytest.fixture
def save(
    tmp_path: Path, make_tokenizer: Callable[..., Any], make_model: Callable[..., Any]
) -> Save:
    """Save a tiny model with a tokenizer of the given special tokens; `rows` of its embedding may
    be too few."""

    def write(
        name: str, special: tuple[str, ...] = (), rows: int | None = None, seed: int = 0
    ) -> str:
        tokenizer = make_tokenizer(special)
        model = make_model(seed)
        model.resize_token_embeddings(len(tokenizer) if rows is None else rows)
        tokenizer.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def ask(model: str, rows: str | None, tmp_path: Path, **options: Any) -> EvaluationResult:
    settings = {
        "data": rows,
        "max_new_tokens": 4,
        "batch_size": 2,
        "output": tmp_path / "out",
    } | options
    return run_evaluation(EvaluationRequest(model, **settings), progress=False)


def test_base_and_tuned_answer_the_same_rows_one_model_at_a_time(
    save, rows, tmp_path, monkeypatch
) -> None:
    """Both are written with their own files, compared; the tuned model is gone before the base is
    loaded."""
    loaded: list[weakref.ref[Any]] = []
    load = models.load_for_inference

    def spy(*arguments: Any) -> Any:
        assert [reference for reference in loaded if reference() is not None] == []
        opened = load(*arguments)
        loaded.append(weakref.ref(opened.model))
        return opened

    monkeypatch.setattr(models, "load_for_inference", spy)
    gc.disable()
    try:
        result = ask(save("tuned", seed=1), rows, tmp_path, base=save("base"))
    finally:
        gc.enable()
    assert len(loaded) == 2
    assert result.base is not None
    assert result.base.rows[0]["prompt"] == result.evaluation.rows[0]["prompt"]
    for folder, model in ((tmp_path / "out", "tuned"), (tmp_path / "out" / "base", "base")):
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        assert (Path(content["info"]["model"]).name, content["n"]) == (model, 3)
        assert (folder / "report.html").is_file()
    assert set(result.as_json()) >= {"folder", "n", "metrics", "base", "differences"}


def test_an_earlier_evaluation_is_a_base(save, rows, tmp_path) -> None:
    """Its answers are read, not generated again, whatever its tokenizer was."""
    ask(save("other", ("<|x|>",)), rows, tmp_path, output=tmp_path / "earlier")
    result = ask(save("tuned"), rows, tmp_path, base=str(tmp_path / "earlier"))
    assert result.base is not None
    assert not (tmp_path / "out" / "base").exists()


def test_a_base_with_another_vocabulary_is_refused_before_anything_is_generated(
    save, rows, tmp_path, monkeypatch
) -> None:
    """The tuned model's ids would mean other text to it; the error says how to compare all the
    same."""
    monkeypatch.setattr(
        answering, "answer", lambda *_, **__: pytest.fail("nothing may be generated")
    )
    with pytest.raises(
        InputError, match=r"base: --base: .*another vocabulary.*Fix: evaluate it by itself"
    ):
        ask(save("tuned", ("<|x|>",)), rows, tmp_path, base=save("base", ("<|y|>",)))


def test_a_base_with_too_few_embedding_rows_is_refused(save, rows, tmp_path) -> None:
    """Equal vocabularies, but ids without a row would index out of the embedding."""
    with pytest.raises(InputError, match=r"base: --base: .*embedding 50 rows.* Fix: "):
        ask(save("tuned"), rows, tmp_path, base=save("base", rows=50))


def test_only_the_main_process_writes(save, rows, tmp_path, monkeypatch) -> None:
    """Another rank has the same result, touches no file and prints nothing."""
    from accelerate import PartialState

    assert PartialState().is_main_process
    monkeypatch.setattr(PartialState, "is_main_process", False)
    result = ask(save("tuned"), rows, tmp_path, max_rows=2)
    assert len(result.evaluation.rows) == 2 and not result.is_main
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run(save, write_rows, tmp_path) -> str:
    """A run folder as training leaves it, of 30 rows of two task types, without the training."""
    trained = [
        {"instruction": f"Say {name} {index}.", "output": f"{name} {index}", "task_type": name}
        for name in ("low", "high")
        for index in range(15)
    ]
    write_rows(trained)
    folder = Path(save("run", seed=1))
    keys = {
        "model_name_or_path": save("base"),
        "dataset_name": "../train.jsonl",
        "output_dir": "./",
    }
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**keys, "system_prompt": "Be brief."}), encoding="utf-8"
    )
    (folder / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 1, "eval_loss": 1.5}\n', encoding="utf-8"
    )
    recipe = load_recipe(folder / "recipe.yaml")
    labeller = open_labeller(recipe, str(folder))
    labeller.renderer.tokenizer.save_pretrained(folder)
    data = prepare(recipe, labeller, folder / "prepared", progress=False)
    run_folder.write_json(folder / "data.json", dict(data.summary))
    return str(folder)


@pytest.fixture
def mixed(write_rows) -> str:
    rows = [("low", "Say low 3."), ("low", "Say low 99."), ("new", "Say new.")]
    return str(
        write_rows(
            [{"instruction": text, "output": "x", "task_type": name} for name, text in rows],
            "mixed.jsonl",
        )
    )


def test_everything_at_once(run, mixed, general, tmp_path, monkeypatch) -> None:
    """Base, shots, an earlier evaluation, formats and safety: each asked once, written, compared,
    reported in order."""
    ask(run, mixed, tmp_path, output=tmp_path / "before")
    asked: list[int] = []
    real = answering.answer

    def spy(model: Any, renderer: Any, examples: Any, **options: Any) -> Any:
        asked.append(len(examples))
        return real(model, renderer, examples, **options)

    monkeypatch.setattr(answering, "answer", spy)
    options: dict[str, Any] = {
        "base": str(tmp_path / "base"),
        "compare": [str(tmp_path / "before")],
        "shots": "2",
    }
    (tmp_path / "own.csv").write_text("prompt,label\nHow?,safe\nWhy?,unsafe\n", encoding="utf-8")
    options |= {"safety_data": str(tmp_path / "own.csv"), "format_overfitting": True}
    options["retention_data"] = general
    result = ask(run, mixed, tmp_path, **options)
    # The data; three neutral formats; the safety prompts under four formats and without the system
    # prompt; the general prompts.
    assert asked[:10] == [3, 3, 3, 3, *[2] * 5, 3]
    # The base: the data, the same in groups that are shown the same rows, and then everything else.
    assert asked[10:] == [3, 2, 1, *asked[1:10]]
    out = tmp_path / "out"
    assert {str(path.parent.relative_to(out)) for path in out.rglob("samples.jsonl")} == {
        ".",
        *(f"{model}{part}" for model in ("", "base/") for part in PARTS),
        "base",
        "base/shots",
    }
    content = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in content["comparisons"]] == [
        "base",
        "base, 2 shots",
        str(tmp_path / "before"),
    ]
    assert content["task_differences"]["new"]["training_rows"] == 0
    assert content["task_differences"]["low"]["training_rows"] == 15
    assert content["training_curves"] == {"loss": [[1, 2.0]], "eval_loss": [[1, 1.5]]}
    assert content["format_overfitting"]["indicators"]["format_gap_did"]["n"] == 3
    assert content["safety"]["prompts"] == str(tmp_path / "own.csv")
    shots = [
        json.loads(line)
        for line in (out / "base" / "shots" / "samples.jsonl").read_text("utf-8").split("\n")
        if line
    ]
    for row in shots:
        assert row["messages"] == result.evaluation.rows[row["row"]]["messages"]
        assert row["prompt"].count("### Response:") == 3 and row["prompt"].startswith("Be brief.")
        assert row["prompt"].count("Say low 3.") == (row["row"] == 0)
    page = (out / "report.html").read_text(encoding="utf-8")
    places = [page.index(f"<h2>{title}</h2>") for title in TITLES]
    assert places == sorted(places)
    result.print(examples=0)


PARTS = [
    *(f"formats/{name}" for name in (TEMPLATE, *VARIANTS)),
    *(f"safety/{name}" for name in (TEMPLATE, *VARIANTS, "no_system_prompt")),
    "retention",
]
TITLES = (
    "Verdict",
    "Answers",
    "Differences",
    "Metrics",
    "Task types",
    "Format overfitting",
    "Health of the output",
    "During training",
    "Safety",
    "Retention",
    "Provenance",
)


def test_a_run_whose_training_data_is_gone_is_still_evaluated(run, mixed, tmp_path, capsys) -> None:
    """What is printed under the verdict says why, and there is no table of task types; asked for shots it is an
    error."""
    (tmp_path / "train.jsonl").unlink()
    result = ask(run, mixed, tmp_path)
    assert result.extra["task_differences"]["low"] == {"training_rows": None}
    content = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert "train.jsonl" in content["training_rows"]["unknown"]
    result.print(examples=0)
    said = capsys.readouterr().out
    assert "exact match by task type" not in said, "nothing to compare"
    verdict, warning = said.split("WARNING: ")
    assert verdict.startswith("The tuned model ") and "\n\n" not in verdict
    assert warning.startswith("whether these rows were trained on is not known:")
    with pytest.raises(InputError, match=r"train\.jsonl"):
        ask(run, mixed, tmp_path, base=str(tmp_path / "base"), shots="1")


def test_the_number_of_shots_is_chosen_and_said(run, mixed, tmp_path, capsys) -> None:
    """`auto` tries 0, 2 and more training rows that are not asked; output and report name the way
    that the tuned model was compared with."""
    result = ask(run, mixed, tmp_path, base=str(tmp_path / "base"), shots="auto")
    prompting = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))["prompting"]
    tried = [entry["shots"] for entry in prompting["shots"]["tried"]]
    assert tried[:2] == [0, 2] and prompting["shots"]["shots"] in tried
    assert 0 < prompting["shots"]["rows"] <= 15
    result.print(examples=0, everything=True)
    assert "tuning beat a prompt" in capsys.readouterr().out
    assert "uning beat a prompt" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_shots_need_a_run_and_a_base(run, save, mixed, tmp_path) -> None:
    """A model without training rows, and a run without a base to show them to, are refused."""
    for model, base in ((run, None), (save("plain"), save("other"))):
        with pytest.raises(
            InputError,
            match=r"--shots: .*both are needed. Fix: evaluate a run folder and add --base",
        ):
            ask(model, mixed, tmp_path, base=base, shots="1")


def test_shots_that_do_not_fit_are_refused_before_anything_is_generated(
    run, mixed, tmp_path, monkeypatch
) -> None:
    """The prompts with shots are the longest: none of the others is answered first."""
    monkeypatch.setattr(
        answering, "answer", lambda *_, **__: pytest.fail("nothing may be generated")
    )
    with pytest.raises(
        InputError, match=r"mixed\.jsonl:1: prompt: .* exceed the model's 512 positions"
    ):
        ask(run, mixed, tmp_path, base=str(tmp_path / "base"), shots="14", max_new_tokens=400)


def test_raw_text_is_refused_with_its_place(run, write_rows, tmp_path) -> None:
    """A row without a question cannot be answered, in whatever way it is asked."""
    raw = str(write_rows([{"text": "once upon a time"}], "raw.jsonl"))
    for more in ({}, {"format_overfitting": True}, {"base": str(tmp_path / "base"), "shots": "1"}):
        with pytest.raises(
            InputError, match=r"raw\.jsonl:1: messages: there is no prompt and answer"
        ):
            ask(run, raw, tmp_path, data_options={"format": "raw"}, **more)


@pytest.mark.slow
def test_two_processes_share_the_work_and_say_it_once(save, rows, tmp_path) -> None:
    """Under `accelerate launch` on CPU the ranks find each other: one JSON object, equal to that of
    one process."""
    model, root = save("tuned"), Path(__file__).parents[2]
    options = [
        "evaluate",
        model,
        "--data",
        rows,
        "--max_new_tokens",
        "4",
        "--output",
        str(tmp_path / "out"),
        "--json",
    ]
    launch = [
        "accelerate.commands.launch",
        "--config_file",
        str(root / "accelerate_configs" / "ddp_cpu.yaml"),
    ]
    found = []
    for command in (["sft_recipes"], [*launch, "--num_processes", "2", "-m", "sft_recipes"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, *options],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] and found[0]["n"] == 3


def test_nothing_to_answer_is_an_error(save, rows, tmp_path) -> None:
    """A model without --data, and data of which no row is asked for, say what to add."""
    with pytest.raises(InputError, match="--data: is needed"):
        ask(save("tuned"), None, tmp_path)
    with pytest.raises(InputError, match="there are no eval rows"):
        ask(save("tuned"), rows, tmp_path, max_rows=0)


@pytest.fixture
def general(write_rows) -> str:
    """Three general prompts that a rule judges."""
    rule = {"min_words": 1}
    rows = [
        {"prompt": f"Write {n} words.", "task_type": "length", "expected_format": rule}
        for n in (1, 2, 3)
    ]
    return str(write_rows(rows, "general.jsonl"))


def test_retention_asks_the_model_that_the_recipe_names(run, mixed, general, tmp_path) -> None:
    """Without --base it answers the general prompts alone, with the run's system prompt, in a folder
    of its own and within their own budget; the rows of the data are not compared."""
    result = ask(run, mixed, tmp_path, retention_data=general)
    assert result.base is None
    content = result.extra["retention"]
    assert content["before"] == str((tmp_path / "base").resolve())
    assert content["base"]["n"] == content["tuned"]["n"] == 3
    out = tmp_path / "out"
    assert not (out / "base" / "samples.jsonl").exists()
    for place in ("retention", "base/retention"):
        stored = json.loads((out / place / "metrics.json").read_text(encoding="utf-8"))
        assert (stored["n"], stored["info"]["max_new_tokens"]) == (3, 64)
        (first, *_) = (out / place / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(first)["prompt"].startswith("Be brief.")
    assert "Retention" in (out / "report.html").read_text(encoding="utf-8")


def test_a_gate_on_retention_asks_for_it(run, mixed, general, tmp_path) -> None:
    """With --base it is one of the models that are asked anyway; a gate is judged on its prompts."""
    (tmp_path / "gate.yaml").write_text(
        "gate: [{metric: retention_loss, at_most: 0.5, n: 50}]", encoding="utf-8"
    )
    options = {"base": str(tmp_path / "base"), "retention_data": general}
    result = ask(
        run, mixed, tmp_path, gate=str(tmp_path / "gate.yaml"), allow_trained_rows=True, **options
    )
    (line,) = result.extra["gate"]["lines"]
    assert (line["name"], line["n"], line["verdict"]) == ("retention_loss", 3, "insufficient_n")


def test_retention_needs_the_model_before_tuning(
    save, rows, run, general, tmp_path, monkeypatch
) -> None:
    """A model of which nobody knows where it came from, and one whose base is gone, are an error with
    the option that helps, before anything is generated."""
    monkeypatch.setattr(
        answering, "answer", lambda *_, **__: pytest.fail("nothing may be generated")
    )
    with pytest.raises(InputError, match=r"--retention: .*not known. Fix: .*--base MODEL"):
        ask(save("alone"), rows, tmp_path, retention_data=general)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"no such folder. Fix: .*--base MODEL"):
        ask(run, rows, tmp_path, retention_data=general)


def test_the_verdict_is_said_first_and_all_only_when_asked(save, rows, tmp_path, capsys) -> None:
    """One sentence, the same in `--json` and `metrics.json`; five figures and what to do next; every figure with
    `--all`. Three rows decide nothing, so the next step is no chat."""
    result = ask(save("tuned", seed=1), rows, tmp_path, base=save("base"))
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    sentence = result.as_json()["verdict"]
    assert stored["verdict"] == sentence and sentence.startswith("The tuned model answers 0 of 3 ")
    capsys.readouterr()
    printed = {}
    for everything in (False, True):
        result.print(examples=1, everything=everything)
        printed[everything] = capsys.readouterr().out
        assert " ".join(printed[everything].split()).startswith(sentence)
        assert printed[everything].count("---- ") == 1
        assert "\nnext: ask more rows" in printed[everything]
        assert f"report: {tmp_path / 'out'}/report.html" in printed[everything]
    assert "ROUGE-L" not in printed[False] and "add --all" in printed[False]
    assert "ROUGE-L" in printed[True] and "add --all" not in printed[True]
    assert "Chapter: completion rate: Share of the instruction's words" in printed[True]
