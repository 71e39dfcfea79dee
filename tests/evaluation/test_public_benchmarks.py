"""Public benchmarks: how a model is asked is settled and stored, what fails says why, and lm-eval's
own functions give the numbers that this project gives.

lm-eval is an extra. Where it is not installed the slow tests are skipped, and the fast ones put a
package of that name in its place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sft_recipes import cli
from sft_recipes.errors import HubUnavailable, InputError, TrainingFault
from sft_recipes.evaluation import public_benchmarks as benchmarks
from sft_recipes.evaluation.constraints import broken_constraints
from sft_recipes.evaluation.lm_eval_process import explain, write_local_tasks
from sft_recipes.report.benchmark_report import results_text, settings_text

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(
    not HAS_LM_EVAL, reason="lm-eval is not installed: pip install 'sft-recipes[benchmarks]'"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the test's own; the processes that it starts find this package."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chat_model(here: Path, make_tokenizer: Callable[..., Any]) -> str:
    """A tiny random model whose template writes no BOS and whose tokenizer would add one."""
    from tests.conftest import build_model

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(here / "chat")
    build_model(len(tokenizer), max_position_embeddings=1024).save_pretrained(here / "chat")
    return str(here / "chat")


@pytest.fixture
def stand_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a package `lm_eval` in the place of the real one; `body` is what loading data does."""

    def write(body: str) -> None:
        package = here / "stand_in" / "lm_eval"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("", encoding="utf-8")
        (package / "__main__.py").write_text("def cli_evaluate():\n    pass\n", encoding="utf-8")
        (package / "tasks.py").write_text(
            "import os, signal, sys, time\n"
            "class TaskManager:\n"
            "    all_tasks = ['gsm8k']\n"
            "    task_index = {}\n"
            "    def __init__(self, include_path=None):\n        pass\n"
            "    def match_tasks(self, names):\n"
            "        return [name for name in names if name in self.all_tasks]\n"
            f"    def load(self, names):\n        {body}\n",
            encoding="utf-8",
        )
        paths = [str(package.parent), str(ROOT), os.environ["PYTHONPATH"]]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *more: True if name == "lm_eval" else find_spec(name, *more),
        )

    return write


def request_of(model: str, folder: Path, **more: Any) -> benchmarks.BenchmarkRequest:
    return benchmarks.BenchmarkRequest(model, ["gsm8k"], folder, **more)


def test_settings_are_those_of_serving(
    chat_model: str, here: Path, stand_in: Callable[[str], None]
) -> None:
    """With a template it is applied, examples are turns, and nobody adds a BOS; remote code is off,
    and nothing is told to a tracker. What lm-eval reads is what is returned."""
    stand_in("pass")
    request = request_of(chat_model, here / "out", system_prompt="Be brief.", max_rows=5, shots=2)
    settings = benchmarks.write_settings(request)
    written = yaml.safe_load((here / "out/lm_eval/settings.yaml").read_text(encoding="utf-8"))
    assert written == settings
    assert settings["apply_chat_template"] and settings["fewshot_as_multiturn"]
    assert settings["model_args"] == {
        "pretrained": chat_model,
        "dtype": "auto",
        "add_bos_token": False,
    }
    assert settings["system_instruction"] == "Be brief."
    assert (settings["limit"], settings["num_fewshot"]) == (5, 2)
    assert settings["trust_remote_code"] is False
    assert not {"wandb_args", "trackio_args", "hf_hub_log_args"} & settings.keys()
    text = settings_text(settings)
    assert "the first 5 of each: nothing to compare with others" in text
    assert "2, a turn each" in text


def test_a_base_without_template_is_asked_without(
    base_folder: Path, here: Path, stand_in: Callable[[str], None]
) -> None:
    """No template is made up for it, and BOS is left to its tokenizer; the settings say so."""
    stand_in("pass")
    settings = benchmarks.write_settings(request_of(str(base_folder), here / "out"))
    assert settings["apply_chat_template"] is False
    assert settings["fewshot_as_multiturn"] is False
    assert "add_bos_token" not in settings["model_args"]
    assert "none: the model has none" in settings_text(settings)


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base_folder: Path
) -> None:
    """Exit code 2 and the line to copy."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None)
    assert cli.run(["evaluate", str(base_folder), "--benchmark", "gsm8k"]) == 2
    assert "pip install 'sft-recipes[benchmarks]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--benchmark", "gsm8k", "--data", "rows.jsonl"],
        ["--benchmark", "gsm8k", "--gate", "recipe"],
        ["--benchmark", "gsm8k", "--max_length", "7"],
        ["--benchmark_data", "rows"],
    ],
)
def test_options_of_other_evaluations_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], base_folder: Path
) -> None:
    """None is taken and forgotten: the last option of each line is named, with a fix."""
    assert cli.run(["evaluate", str(base_folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert arguments[-2] in error and "Fix: " in error


@pytest.mark.parametrize(
    ("value", "stderr", "values", "interval"),
    [
        (0.0, 0.0, [0, 0, 0, 0], (0.0, 0.4899)),  # Wilson
        (0.75, 0.25, [True, True, True, False], (0.3006, 0.9544)),  # Wilson
        (12.5, 2.0, [10.0, 15.0], (8.58, 16.42)),  # value +- 1.96 standard errors
        (0.6, 0.1, [], (0.404, 0.796)),  # a group, which has no rows
        (0.5, "N/A", [[True, False], [True, False]], (None, None)),
    ],
)
def test_known_intervals(value: float, stderr: Any, values: list[Any], interval: Any) -> None:
    """lm-eval's value stays; where nothing was right the interval does not shrink to nothing."""
    estimate = benchmarks.estimate_of(value, stderr, values, 10)
    assert estimate.value == pytest.approx(value)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(interval, abs=1e-4)


INDEX = {
    "gsm8k": SimpleNamespace(
        cfg={"task": "gsm8k", "test_split": "test", "fewshot_split": "train"},
        yaml_path=Path("/lm_eval/gsm8k.yaml"),
    ),
    "mmlu": SimpleNamespace(cfg={"group": "mmlu", "task": []}, yaml_path=Path("/lm_eval/m.yaml")),
}


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n", encoding="utf-8")


def test_local_rows_take_the_place_of_the_hubs(tmp_path: Path) -> None:
    """A folder TASK with its splits is lm-eval's task on these rows; the rest of it stays."""
    data = tmp_path / "data"
    put(data / "gsm8k/test.jsonl", data / "gsm8k/train.jsonl", data / "README.md")
    write_local_tasks(data, INDEX, tmp_path / "tasks")
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["gsm8k.yaml"]
    task = yaml.safe_load((tmp_path / "tasks/gsm8k.yaml").read_text(encoding="utf-8"))
    assert task["include"] == "/lm_eval/gsm8k.yaml"
    assert task["dataset_path"] == "json"
    assert task["dataset_kwargs"]["data_files"] == {
        "test": str(data / "gsm8k/test.jsonl"),
        "train": str(data / "gsm8k/train.jsonl"),
    }


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("gsm8k/test.jsonl", "gsm8k/train.jsonl"),  # the split with examples is missing
        ("gsm8/test.jsonl", "did you mean 'gsm8k'?"),
        ("mmlu/test.jsonl", "no task's name"),  # a group has no rows
    ],
)
def test_folders_that_no_task_reads_are_refused(tmp_path: Path, file: str, words: str) -> None:
    """By name, with what to put where."""
    put(tmp_path / "data" / file)
    with pytest.raises(InputError, match="--benchmark_data") as caught:
        write_local_tasks(tmp_path / "data", INDEX, tmp_path / "tasks")
    assert words in str(caught.value)


def test_what_lm_eval_raises_becomes_an_error_of_ours() -> None:
    """A Hub that does not answer is 3, a wish to stay offline 2 with the way to local rows, anything
    else 2 with lm-eval's words; Ctrl-C stays Ctrl-C."""
    down = explain(ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub"))
    assert isinstance(down, HubUnavailable) and "--benchmark_data DIR" in str(down)
    offline = explain(ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"))
    assert isinstance(offline, InputError) and "HF_HUB_OFFLINE" in str(offline)
    other = explain(ValueError("max_gen_toks is\ntoo large"))
    assert isinstance(other, InputError) and "ValueError: max_gen_toks is too large" in str(other)
    interrupt = KeyboardInterrupt()
    assert explain(interrupt) is interrupt


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("raise ConnectionError('no route')", 3, "the Hub did not answer"),
        ("raise ValueError('no such split')", 2, "no such split"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("pass", 0, ""),
    ],
)
def test_exit_codes_of_the_process(
    body: str,
    code: int,
    words: str,
    chat_model: str,
    here: Path,
    stand_in: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What went wrong in it is told once, in a line, and is its exit code; no traceback."""
    stand_in(body)
    request = request_of(chat_model, here / "out")
    benchmarks.write_settings(request)
    assert benchmarks.ask(request) == code
    error = capfd.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_folder_of_somebody_else_is_kept(
    chat_model: str, here: Path, stand_in: Callable[[str], None]
) -> None:
    """`--output .` beside a folder that happens to have the name of ours: refused, not emptied."""
    stand_in("pass")
    put(here / "lm_eval/mine.txt")
    with pytest.raises(InputError, match="--output"):
        benchmarks.write_settings(request_of(chat_model, here))
    assert (here / "lm_eval/mine.txt").is_file()


def test_an_unknown_benchmark_is_named(
    chat_model: str,
    here: Path,
    stand_in: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Before anything is loaded, with the name that was meant."""
    stand_in("pass")
    request = benchmarks.BenchmarkRequest(chat_model, ["gsm8"], here / "out")
    benchmarks.write_settings(request)
    assert benchmarks.ask(request) == 2
    assert "did you mean 'gsm8k'?" in capfd.readouterr().err


def test_a_process_that_was_killed_is_a_fault(
    chat_model: str, here: Path, stand_in: Callable[[str], None]
) -> None:
    """As by a system without memory: no result, and not the exit code of a signal."""
    stand_in("os.kill(os.getpid(), signal.SIGKILL)")
    request = request_of(chat_model, here / "out")
    benchmarks.write_settings(request)
    with pytest.raises(TrainingFault, match="--batch_size"):
        benchmarks.ask(request)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_lm_eval_too(
    number: signal.Signals,
    code: int,
    chat_model: str,
    here: Path,
    stand_in: Callable[[str], None],
) -> None:
    """The process that asks leaves nobody behind, and says what ended it."""
    stand_in("open('pid', 'w').write(str(os.getpid())); time.sleep(600)")
    command = [sys.executable, "-m", "sft_recipes", "evaluate", chat_model, "--benchmark", "gsm8k"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    pid = here / "pid"
    while not (pid.is_file() and pid.read_text(encoding="utf-8")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code, error
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text(encoding="utf-8")), 0)


SUMS = {
    "task": "sums",
    "dataset_path": "json",
    "output_type": "generate_until",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "num_fewshot": 1,
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": 8},
    "filter_list": [
        {"name": "number", "filter": [{"function": "regex"}, {"function": "take_first"}]}
    ],
}
IFEVAL = [
    ("Write without commas.", ["punctuation:no_comma"], [{}]),
    ("Use the word tail.", ["keywords:existence"], [{"keywords": ["tail"]}]),
]


@pytest.fixture
def local_benchmarks(here: Path, write_rows: Callable[..., Path]) -> Path:
    """A task of gsm8k's type of our own, and rows of IFEval's form; no sentences are counted."""
    data = here / "data"
    numbers = [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(6)]
    write_rows(numbers[:4], "data/sums/test.jsonl")
    write_rows(numbers[4:], "data/sums/train.jsonl")
    (data / "sums.yaml").write_text(yaml.safe_dump(SUMS), encoding="utf-8")
    rows = []
    for key, (prompt, names, arguments) in enumerate(IFEVAL):
        row = {"key": key, "prompt": prompt, "instruction_id_list": names, "kwargs": arguments}
        rows.append(row)
    write_rows(rows, "data/ifeval/train.jsonl")
    (data / "nltk_data/tokenizers/punkt_tab").mkdir(parents=True)
    return data


@pytest.mark.slow
@needs_lm_eval
def test_benchmarks_end_to_end(
    chat_model: str,
    local_benchmarks: Path,
    here: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A task of gsm8k's type and IFEval itself, offline: every prompt is the rendering that the
    model is served with, and the means of the stored answers' scores, scored once more by lm-eval's
    own functions, are the values that are reported."""
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.tasks.ifeval.utils import process_results
    from transformers import AutoTokenizer

    arguments = ["--benchmark", "sums,ifeval", "--benchmark_data", str(local_benchmarks)]
    command = ["evaluate", chat_model, *arguments, "--max_new_tokens", "8", "--output", "out"]
    assert cli.run(command) == 0
    printed = capfd.readouterr().out
    sums = json.loads((here / "out/benchmark_sums.json").read_text(encoding="utf-8"))
    ifeval = json.loads((here / "out/benchmark_ifeval.json").read_text(encoding="utf-8"))
    assert sums["schema_version"] == ifeval["schema_version"] == 1
    assert (sums["rows"], sums["shots"], ifeval["rows"]) == (4, 1, 2)
    assert results_text([sums, ifeval]) in printed
    assert "How ifeval was asked" in (here / "out/report.html").read_text(encoding="utf-8")

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    answers = benchmarks._samples("ifeval", here / "out/lm_eval")
    scores = []
    for row in answers:
        turn = {"role": "user", "content": row["doc"]["prompt"]}
        rendered = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        assert row["arguments"]["gen_args_0"]["arg_0"] == rendered
        score = process_results(row["doc"], row["filtered_resps"])
        scores.append(score["prompt_level_strict_acc"])
    assert value_of(ifeval, "prompt_level_strict_acc") == sum(scores) / len(scores)

    rows = benchmarks._samples("sums", here / "out/lm_eval")
    # One example, a turn of its own, before the question.
    assert rows[0]["arguments"]["gen_args_0"]["arg_0"].count("<|im_start|>") == 4
    again = exact_match_fn(
        predictions=[row["filtered_resps"][0] for row in rows],
        references=[row["target"] for row in rows],
    )
    assert value_of(sums, "exact_match") == again["exact_match"]


def value_of(result: dict[str, Any], name: str) -> float:
    return next(metric["value"] for metric in result["metrics"] if metric["metric"] == name)


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize("has_data", [True, False])
def test_offline_without_rows(
    has_data: bool,
    chat_model: str,
    local_benchmarks: Path,
    here: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """HF_HUB_OFFLINE is set, as in all tests, and gsm8k is in no folder: exit code 2 and both ways
    out of it, before a model is loaded."""
    arguments = ["evaluate", chat_model, "--benchmark", "gsm8k"]
    if has_data:
        arguments += ["--benchmark_data", str(local_benchmarks)]
    assert cli.run(arguments) == 2
    error = capfd.readouterr().err
    assert "HF_HUB_OFFLINE" in error and "--benchmark_data DIR" in error
    assert "Traceback" not in error and "Loading weights" not in error


@pytest.mark.slow
@needs_lm_eval
def test_stored_answers_have_lm_evals_exact_match(
    chat_model: str, here: Path, write_rows: Callable[..., Path]
) -> None:
    """`samples.jsonl` of an evaluation, scored once more by lm-eval: the same number, which is 1/3
    since one of three references is what the model answers."""
    from lm_eval.api.metrics import exact_match_fn

    def answered(references: list[str]) -> list[dict[str, Any]]:
        """The stored samples of an evaluation against these references."""
        rows = []
        for question, reference in zip(["one", "two", "Paris is"], references, strict=True):
            rows.append({"instruction": question, "output": reference})
        data = write_rows(rows, "questions.jsonl")
        own = ["--data", str(data), "--max_new_tokens", "8", "--output", "own"]
        assert cli.run(["evaluate", chat_model, *own]) == 0
        text = (here / "own/samples.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    first = answered(["a", "b", "c"])
    samples = answered([first[0]["response"], "b", "c"])
    theirs = exact_match_fn(
        predictions=[row["response"].strip() for row in samples],
        references=[row["reference"].strip() for row in samples],
    )
    ours = json.loads((here / "own/metrics.json").read_text(encoding="utf-8"))
    assert ours["metrics"]["exact_match"]["value"] == pytest.approx(theirs["exact_match"])
    assert theirs["exact_match"] == pytest.approx(1 / 3)


PROSE = ["four", "Paris, the capital of France.", "NO COMMAS HERE", "the tail of a cat"]
ANSWERS = [*PROSE, "- a\n- b\n- c", "* a\n* b", '{"a": [1, 2]}']
FEWER = {"num_words": 4, "relation": "less than"}
MORE = {"num_words": 3, "relation": "at least"}


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize(
    ("ours", "name", "arguments", "answers"),
    [
        ({"no_commas": True}, "punctuation:no_comma", {}, ANSWERS),
        ({"bullets": 3}, "detectable_format:number_bullet_lists", {"num_bullets": 3}, ANSWERS),
        ({"keywords": ["tail"]}, "keywords:existence", {"keywords": ["tail"]}, ANSWERS),
        (
            {"forbidden": ["Paris"]},
            "keywords:forbidden_words",
            {"forbidden_words": ["Paris"]},
            ANSWERS,
        ),
        ({"json": True}, "detectable_format:json_format", {}, ANSWERS),
        ({"max_words": 3}, "length_constraints:number_words", FEWER, PROSE),
        ({"min_words": 3}, "length_constraints:number_words", MORE, PROSE),
    ],
)
def test_constraints_agree_with_ifevals(
    ours: dict[str, Any], name: str, arguments: dict[str, Any], answers: list[str], here: Path
) -> None:
    """Where both state the same constraint, both find the same answers to keep it, and some break it."""
    met = follows(name, arguments)
    kept = [answer for answer in answers if not broken_constraints(answer, ours)]
    assert kept == [answer for answer in answers if met(answer)]
    assert 0 < len(kept) < len(answers)


@pytest.mark.slow
@needs_lm_eval
@pytest.mark.parametrize(
    ("answer", "ours", "name", "arguments"),
    [
        ("entails", {"keywords": ["tail"]}, "keywords:existence", {"keywords": ["tail"]}),
        ('```json\n{"a": 1}\n```', {"json": True}, "detectable_format:json_format", {}),
        ("-a\n-b", {"bullets": 2}, "detectable_format:number_bullet_lists", {"num_bullets": 2}),
        ("- a\n- b", {"max_words": 3}, "length_constraints:number_words", FEWER),
    ],
)
def test_where_ifeval_is_more_lenient(
    answer: str, ours: dict[str, Any], name: str, arguments: dict[str, Any], here: Path
) -> None:
    """The differences that the docs name: parts of words, fences around JSON, `-` without a space,
    marks that are no words."""
    assert broken_constraints(answer, ours)
    assert follows(name, arguments)(answer)


def follows(name: str, arguments: dict[str, Any]) -> Callable[[str], bool]:
    """lm-eval's own checker; NLTK's sentences, which it wants to download, are not needed."""
    import nltk

    nltk.data.path.insert(0, str(Path.cwd()))
    (Path.cwd() / "tokenizers/punkt_tab").mkdir(parents=True, exist_ok=True)
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    instruction = INSTRUCTION_DICT[name](name)
    instruction.build_description(**arguments)
    return instruction.check_following
