"""The gate: every bound by hand, every verdict from rows made for it, and the exit codes a pipeline
sees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from sft_recipes import cli, models
from sft_recipes.errors import InputError
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.evaluator import Evaluation, evaluation_from_rows, write_evaluation
from sft_recipes.evaluation.gate import check_possible, judge, parse_gate, read_gate
from sft_recipes.evaluation.gate_bounds import Bound, least_rows
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.report.evaluation_tables import gate_text
from sft_recipes.statistics import mean_of_differences, proportion_of
from tests.conftest import build_model, build_tokenizer

Z = 1.6448536269514722
# Each row of `answers` asks something else: rows with an equal prompt would count once.
NUMBERS = itertools.count()


def answers(
    right: int, wrong: int = 0, task: str | None = None, **more: Any
) -> list[dict[str, Any]]:
    """Scored rows: these many right and wrong answers of one task type."""
    found = []
    for index in range(right + wrong):
        response = "Blue." if index < right else "Red."
        scores = score_row(
            Answer(
                "Name a colour.", "Blue.", response, "eos", response_tokens=3, reference_tokens=2
            )
        )
        where = {
            "row": index,
            "source": "test.jsonl",
            "task_type": task,
            "messages": [],
            "prompt": f"Name a colour ({next(NUMBERS)}).",
            "n_tokens": 3,
        }
        found.append(where | scores | more)
    return found


def judged(
    line: Mapping[str, Any], rows: list[dict[str, Any]], base: list[dict[str, Any]] | None = None
) -> Any:
    """The verdict lines of a gate of one bound."""
    (bound,) = parse_gate([dict(line)], "gate.yaml:1")
    return judge(
        [bound], evaluation_from_rows(rows), None if base is None else evaluation_from_rows(base)
    )["lines"]


def only(
    line: Mapping[str, Any], rows: list[dict[str, Any]], base: list[dict[str, Any]] | None = None
) -> Any:
    (found,) = judged(line, rows, base)
    return found


@pytest.mark.parametrize(("right", "wrong"), [(95, 5), (60, 40), (1, 99), (0, 50), (50, 0)])
def test_a_share_has_wilsons_one_sided_bound(right: int, wrong: int) -> None:
    """The bound is the one scipy gives for a one-sided alternative, on the bad side of the
    limit."""
    n = right + wrong
    for side, alternative, end in (("at_least", "greater", "low"), ("at_most", "less", "high")):
        expected = stats.binomtest(right, n, alternative=alternative).proportion_ci(
            0.95, method="wilson"
        )
        found = only({"metric": "exact_match", side: 0.5}, answers(right, wrong))
        assert found["bound"] == pytest.approx(getattr(expected, end))
        assert (found["value"], found["n"], found["side"]) == (right / n, n, side)


def test_zero_events_in_300_rows_rule_out_one_percent() -> None:
    """z^2 / (n + z^2) is 0.0089 for 300 rows and 0.0101 for 267: the one passes, the other can
    decide nothing and is too few, as a line without `n` finds out by itself."""
    line = {"flag": "loop", "at_most": 0.01}
    assert only(line, answers(300))["bound"] == pytest.approx(Z**2 / (300 + Z**2))
    found = [only(line, answers(n)) for n in (300, 268, 267)]
    assert [one["verdict"] for one in found] == ["pass", "pass", "insufficient_n"]
    assert {one["n_min"] for one in found} == {268}
    one_event = answers(299) + answers(1, flags=["loop"])
    assert only(line, one_event)["verdict"] == "inconclusive"


def test_a_difference_is_paired_and_adjusted() -> None:
    """10 of 100 rows gained, 5 lost: one of each is added, as by Bonett and Price, and the normal
    bound taken."""
    base, tuned = answers(5) + answers(0, 95), answers(0, 5) + answers(10) + answers(0, 85)
    centre = (11 - 6) / 102
    reach = Z * (((11 + 6) / 102 - centre**2) / 102) ** 0.5
    line = {"metric": "exact_match", "compared_with": "base", "at_least": -0.05}
    found = only(line, tuned, base)
    assert found["value"] == pytest.approx(0.05)
    assert (found["ci_low"], found["ci_high"]) == (
        pytest.approx(centre - reach),
        pytest.approx(centre + reach),
    )
    assert found["verdict"] == "pass"
    same = only(line, answers(100), answers(100))
    assert (same["value"], same["bound"]) == (0.0, pytest.approx(-Z * (2 / 102 / 102) ** 0.5))
    flags = only(
        {"flag": "loop", "compared_with": "base", "at_most": 0.02},
        answers(9, flags=["loop"]),
        answers(9),
    )
    assert (flags["value"], flags["verdict"]) == (1.0, "insufficient_n")


def test_a_mean_has_students_bound_and_a_median_the_bootstraps() -> None:
    """Half the rows at 1, half at 2; one-sided 95 %, not the ends of the two-sided interval."""
    rows = answers(40, chapter_length_ratio=1.0, length_ratio=1.0) + answers(
        40, chapter_length_ratio=2.0, length_ratio=2
    )
    reach = stats.t.ppf(0.95, 79) * np.std([1, 2] * 40, ddof=1) / 80**0.5
    mean = only({"metric": "chapter_length_ratio", "at_most": 2}, rows)
    assert (mean["value"], mean["bound"]) == (1.5, pytest.approx(1.5 + reach))
    base = answers(80, chapter_length_ratio=1.0)
    paired = only(
        {"metric": "chapter_length_ratio", "compared_with": "base", "at_most": 2}, rows, base
    )
    assert (paired["value"], paired["bound"]) == (0.5, pytest.approx(0.5 + reach))
    median = only({"metric": "length_ratio", "at_most": 2}, rows)
    assert (median["value"], median["bound"], median["verdict"]) == (1.5, 2.0, "pass")


@pytest.mark.parametrize(
    ("right", "wrong", "verdict"),
    [
        (100, 0, "pass"),
        (96, 4, "pass"),
        (90, 10, "inconclusive"),
        (84, 16, "fail"),
        (49, 0, "insufficient_n"),
    ],
)
def test_verdicts(right: int, wrong: int, verdict: str) -> None:
    """At least 0.9: the bounds for 96, 90 and 84 of 100 are 0.914, 0.840 to 0.940, and 0.892 from
    above."""
    assert (
        only({"metric": "exact_match", "at_least": 0.9}, answers(right, wrong))["verdict"]
        == verdict
    )
    mirrored = only(
        {"flag": "empty", "at_most": 0.1}, answers(right) + answers(wrong, flags=["empty"])
    )
    assert mirrored["verdict"] == verdict


def test_the_worst_line_decides() -> None:
    """fail beats insufficient_n beats inconclusive beats pass; exit codes 1, 4, 4, 0."""
    lines = {
        "pass": {"metric": "eos_rate", "at_least": 0.9},
        "inconclusive": {"metric": "exact_match", "at_least": 0.9},
        "insufficient_n": {"metric": "eos_rate", "at_least": 0.9, "n": 101},
        "fail": {"metric": "exact_match", "at_most": 0.5},
    }
    evaluation = evaluation_from_rows(answers(90, 10))
    chosen, codes = [], []
    for verdict in lines:
        chosen.append(lines[verdict])
        found = judge(parse_gate(chosen, ""), evaluation)
        assert found["verdict"] == verdict == found["lines"][-1]["verdict"]
        codes.append(found["exit_code"])
    assert codes == [0, 4, 4, 1]
    assert (
        not found["smoke"]
        and judge(parse_gate([lines["pass"]], ""), evaluation_from_rows(answers(49)))["smoke"]
    )


def test_no_rows_decide_nothing() -> None:
    """n = 0, one row of a mean, and task types that do not exist: no value or no bound, never a
    pass."""
    for line in (
        {"metric": "exact_match", "at_most": 0.9},
        {"flag": "loop", "at_most": 0.9},
    ):
        found = only(line, [])
        assert (found["value"], found["bound"], found["n"], found["verdict"]) == (
            None,
            None,
            0,
            "insufficient_n",
        )
    assert (
        only({"metric": "chapter_length_ratio", "at_most": 9, "n": 2}, answers(1))["verdict"]
        == "insufficient_n"
    )
    by_task = {"metric": "exact_match", "by": "task_type", "at_least": 0.1}
    assert only(by_task, answers(100))["verdict"] == "insufficient_n"


@pytest.mark.parametrize(
    ("right", "verdicts"),
    [
        # p = Phi((right - 90) / 3) against at_least 0.9: 83 gives 0.0098, 84 0.0228, 85 0.0478.
        ([83, 84, 85], ["fail", "fail", "fail"]),  # <= .05/3, .05/2, .05
        ([84, 85, 97], ["inconclusive", "inconclusive", "pass"]),  # 0.0228 > .05/3
        ([83, 85, 97], ["fail", "inconclusive", "pass"]),  # 0.0478 > .05/2
        ([84], ["fail"]),
        ([85, 83, 84], ["fail", "fail", "fail"]),
    ],
)
def test_groups_fail_by_holms_procedure(right: list[int], verdicts: list[str]) -> None:
    """Each group has 100 rows; a group alone fails at 0.05, among m at Holm's levels. A group too
    small is no part."""
    rows = [
        row
        for index, count in enumerate(right)
        for row in answers(count, 100 - count, f"task {index}")
    ]
    line = {"metric": "exact_match", "by": "task_type", "at_least": 0.9, "n": 100}
    found = judged(line, rows + answers(99, 0, "small") + answers(99))
    assert [one["group"] for one in found] == [
        "small",
        *(f"task {index}" for index in range(len(right))),
    ]
    assert [one["verdict"] for one in found] == ["insufficient_n", *verdicts]


def test_groups_are_compared_with_their_own_base_rows() -> None:
    """Under `by` with a base, each task type has its own paired difference."""
    tuned = answers(60, 0, "a") + answers(30, 30, "b")
    base = answers(30, 30, "a") + answers(60, 0, "b")
    line = {"metric": "exact_match", "by": "task_type", "compared_with": "base", "at_least": -0.05}
    assert [(one["value"], one["verdict"]) for one in judged(line, tuned, base)] == [
        (0.5, "pass"),
        (-0.5, "fail"),
    ]
    for other in (base[:-1], base[::-1]):
        with pytest.raises(InputError, match="evaluate both on the same data"):
            judged(line, tuned, other)


def test_format_indicators_are_judged_by_prompt() -> None:
    """Gaps have the paired bound, leak rates Wilson's, also for shares of several answers."""
    values = {
        "format_gap_did": [0.0] * 90 + [1.0] * 10,
        "leak_rate_off_template": [1 / 3] * 3 + [0.0] * 297,
    }
    lines = [
        {"metric": "format_gap_did", "at_most": 0.1},
        {"metric": "leak_rate_off_template", "at_most": 0.05, "n": 300},
    ]
    found = judge(parse_gate(lines, ""), evaluation_from_rows(answers(100)), None, values)["lines"]
    assert [one["value"] for one in found] == [0.1, pytest.approx(1 / 300)]
    assert (
        found[0]["bound"] == mean_of_differences(values["format_gap_did"], confidence=0.9).ci_high
    )
    whole = stats.binomtest(1, 300, alternative="less").proportion_ci(0.95, method="wilson")
    assert found[1]["bound"] == pytest.approx(whole.high)
    assert [one["verdict"] for one in found] == ["inconclusive", "pass"]


REFUSED: Sequence[tuple[Any, str]] = (
    ("exact_match", r"gate\[0\]: expected a mapping, got 'exact_match'"),
    ({"metric": "exact_mach", "at_least": 1}, r"gate\[0\].metric: unknown metric .* did you mean 'exact_match'\?"),
    ({"flag": "template_leek", "at_most": 1}, r"gate\[0\].flag: unknown flag .* did you mean 'template_leak'\?"),
    ({"metric": "exact_match", "atleast": 1}, r"gate\[0\].atleast: unknown key. Fix: did you mean 'at_least'\?"),
    ({"metric": "exact_match", "at_least": "0.9x"}, r"gate\[0\].at_least: '0.9x' does not fit"),
    ({"metric": "exact_match", "at_least": True}, r"gate\[0\].at_least: True does not fit"),
    ({"metric": "exact_match", "at_least": 0.9, "n": 0}, r"gate\[0\].n: 0 rows decide nothing"),
    ({"metric": "exact_match", "at_least": 0.9, "by": "source"}, r"gate\[0\].by: 'source' does not fit"),
    ({"metric": "exact_match", "at_least": 0.9, "compared_with": "old"}, r"\.compared_with: 'old' does not fit"),
    ({"metric": "exact_match"}, r"gate\[0\]: needs one number"),
    ({"metric": "exact_match", "at_least": 0, "at_most": 1}, r"gate\[0\]: needs one number"),
    ({"metric": "exact_match", "at_least": float("nan")}, r"gate\[0\]: needs one number"),
    ({"at_least": 0.9}, r"gate\[0\]: needs one metric or one flag"),
    ({"metric": "exact_match", "flag": "loop", "at_least": 0}, r"gate\[0\]: needs one metric or one flag"),
    ({"metric": "length_ratio", "compared_with": "base", "at_most": 1}, "length_ratio is no mean of rows"),
    ({"metric": "format_gap", "compared_with": "base", "at_most": 1}, "format_gap has its own comparison"),
    ({"metric": "format_gap_did", "by": "task_type", "at_most": 1}, "format_gap_did has its own comparison"),
    ({"metric": "over_refusal", "at_most": 0.1, "n": 199}, "fewer prompts of a kind decide nothing"),
    ({"metric": "exact_match", "at_least": -5}, r"at_least: nothing could fail -5: exact_match lies between 0 and 1"),
    ({"metric": "exact_match", "at_least": 0}, r"nothing could fail 0: .* Fix: write a number between 0 and 1"),
    ({"metric": "token_f1", "at_most": 2}, r"at_most: nothing could fail 2: token_f1 lies between 0 and 1"),
    ({"metric": "exact_match", "at_least": 1}, r"nothing could pass 1: the bound of exact_match stays between"),
    ({"metric": "exact_match", "at_most": -0.1}, r"at_most: nothing could pass -0.1"),
    ({"flag": "loop", "at_most": 1}, r"at_most: nothing could fail 1: flag loop lies between 0 and 1"),
    ({"flag": "loop", "at_most": 0}, r"at_most: nothing could pass 0"),
    ({"metric": "length_ratio", "at_least": 0}, r"at_least: nothing could fail 0: length_ratio lies above 0"),
    ({"metric": "eos_rate", "compared_with": "base", "at_least": -1}, r"nothing could fail -1: .* between -1 and 1"),
    ({"metric": "format_gap", "at_most": 1}, r"nothing could fail 1: format_gap lies between -1 and 1"),
    ({"metric": "format_gap_did", "at_most": 2}, r"nothing could fail 2: format_gap_did lies between -2 and 2"),
    ({"metric": "unsafe_compliance_did", "at_most": 1, "n": 300}, r"nothing could fail 1"),
    ({"metric": "exact_match", "at_least": 0.9, "n": 1}, r"n: so few rows cannot decide it.* write n: 25 or more"),
    ({"metric": "exact_match", "at_least": 0.1, "n": 24}, r"n: so few rows cannot decide it.* write n: 25 or more"),
    ({"metric": "length_ratio", "at_most": 2, "n": 1}, r"n: so few rows cannot decide it.* Fix: write n: 2 or more"),
    ({"metric": "chapter_length_ratio", "compared_with": "base", "at_least": -9, "n": 1}, r"Fix: write n: 2 or more"),
)  # fmt: skip


@pytest.mark.parametrize(("line", "message"), REFUSED)
def test_lines_that_are_no_bounds_are_refused(line: Any, message: str) -> None:
    """Each mistake is named with its place and what to write instead; a right line beside it
    changes nothing."""
    with pytest.raises(InputError, match=message):
        parse_gate([line, {"metric": "exact_match", "at_least": 0.9}], "gate.yaml:1")


@pytest.mark.parametrize("limit", [0.02, 0.3, 0.5, 0.75, 0.94, 0.99])
@pytest.mark.parametrize("side", ["at_least", "at_most"])
@pytest.mark.parametrize("compared", [None, "base"])
def test_the_least_rows_of_a_line_can_pass_and_fail_it(
    limit: float, side: str, compared: str | None
) -> None:
    """A line without `n` needs as many rows as decide it: that many best answers pass, that many
    worst ones fail, and with one row less one of the two does not happen."""
    line = {"metric": "exact_match", side: limit}
    if compared:
        line["compared_with"] = compared
    bound = Bound(**line)
    least = least_rows(bound)

    def verdicts(n: int) -> set[str]:
        right, wrong = answers(n), answers(0, n)
        pairs = ((right, wrong), (wrong, right)) if compared else ((right, None), (wrong, None))
        found = set()
        for rows, base in pairs:
            other = None if base is None else evaluation_from_rows(base)
            found.add(judge([replace(bound, n=n)], evaluation_from_rows(rows), other)["verdict"])
        return found

    assert verdicts(least) == {"pass", "fail"}
    assert least == 1 or verdicts(least - 1) != {"pass", "fail"}
    (read,) = parse_gate([line], "")
    assert read.n == max(50, least)


def test_a_gate_is_a_short_list_written_beforehand(tmp_path: Path) -> None:
    """None, an empty list, nine bounds and a file without `gate:` are refused with file and line;
    eight are read."""
    line = {"metric": "exact_match", "at_least": 0.9}
    for entries in (None, [], {"exact_match": 0.9}, [line] * 9):
        with pytest.raises(
            InputError, match=r"gate.yaml:3: gate: expected a list of 1 to 8 bounds"
        ):
            parse_gate(entries, "gate.yaml:3")
    path = tmp_path / "gate.yaml"
    path.write_text(yaml.safe_dump({"learning_rate": 1, "gate": [line] * 8}, sort_keys=False))
    assert len(read_gate(path)) == 8
    path.write_text(yaml.safe_dump({"learning_rate": 1, "gate": [line] * 9}, sort_keys=False))
    with pytest.raises(InputError, match=r"gate.yaml:2: gate: expected"):
        read_gate(path)
    path.write_text("gates: []\n")
    with pytest.raises(InputError, match="expected a list"):
        read_gate(path)


def test_the_quickstarts_gate_fits_its_test_rows() -> None:
    """It asks for exactly the rows and the task types that there are, and a perfect model passes
    it."""
    quickstart = Path(__file__).parents[2] / "recipes" / "quickstart"
    bounds = read_gate(quickstart / "gate.yaml")
    tasks = [
        json.loads(line)["task_type"]
        for line in (quickstart / "data" / "test.jsonl").read_text().splitlines()
    ]
    assert {bound.n for bound in bounds if not bound.by} == {len(tasks)}
    assert {bound.n for bound in bounds if bound.by} == {tasks.count(task) for task in tasks}
    right, wrong = (
        [row for task in tasks for row in answers(*one, task)] for one in ((1, 0), (0, 1))
    )
    assert (
        judge(bounds, evaluation_from_rows(right), evaluation_from_rows(wrong))["verdict"] == "pass"
    )


def test_a_base_that_is_missing_is_said_before_anything_is_generated() -> None:
    """A comparison needs a base's answers, a difference of gaps its model."""
    compared, gap = parse_gate(
        [
            {"metric": "exact_match", "compared_with": "base", "at_least": 0},
            {"metric": "format_gap_did", "at_most": 0.1},
        ],
        "",
    )
    check_possible([compared, gap], model=True, answers=True)
    check_possible([compared], model=False, answers=True)
    for bound, answers_there in ((compared, False), (gap, True)):
        with pytest.raises(InputError, match=r"there is no base to .*Fix: add --base MODEL"):
            check_possible([bound], model=False, answers=answers_there)


def test_the_card_comes_first_and_says_the_verdict_in_words(tmp_path: Path) -> None:
    """The report's first section names verdict, exit code and every line; the terminal shows the
    same numbers."""
    rows = answers(30, 10, "<i>a") + answers(40, 0, "b")
    bounds = [
        {"metric": "exact_match", "by": "task_type", "at_least": 0.8, "n": 40},
        {"flag": "loop", "at_most": 0.5, "n": 99},
    ]
    evaluation = evaluation_from_rows(rows)
    gate = judge(parse_gate(bounds, ""), evaluation)
    write_evaluation(evaluation, tmp_path, info={"model": "tiny"}, extra={"gate": gate})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("<h2>Gate</h2>") < page.index("<h2>Metrics</h2>")
    card = page[page.index("<h2>Gate</h2>") : page.index("<h2>Metrics</h2>")]
    for text in (
        "TOO FEW ROWS",
        "exit code 4",
        "inconclusive",
        "pass",
        "Exact match: &lt;i&gt;a",
        "at least 0.8",
        "0.624",
    ):
        assert text in card
    terminal = gate_text({"gate": gate, **evaluation.as_json()})
    assert "\nExact match: <i>a " in terminal
    assert "gate: TOO FEW ROWS" in terminal and "smoke" not in terminal
    row = next(line for line in terminal.splitlines() if line.startswith("Exact match: b"))
    assert row.split() == [
        "Exact",
        "match:",
        "b",
        "1.000",
        "0.937",
        "at",
        "least",
        "0.8",
        "40",
        "of",
        "40",
        "pass",
    ]
    assert json.loads((tmp_path / "metrics.json").read_text())["gate"] == gate


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: a tiny model that answers nothing right, its recipe with a gate, and 60
    rows."""
    folder = tmp_path_factory.mktemp("gate") / "run"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_model(len(tokenizer)).save_pretrained(folder)
    rows = [
        {"instruction": f"Say {index}.", "output": "one", "task_type": "say"} for index in range(60)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model_name_or_path": "./",
        "dataset_name": "./test.jsonl",
        "output_dir": "./",
        "eval_split": 0.5,
    }
    recipe |= {"gate": [{"metric": "exact_match", "at_most": 0.1, "n": 60}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def evaluate_at(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gate: str,
    *more: str,
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `evaluate RUN --gate GATE`."""
    arguments = ["evaluate", str(folder), "--data", str(folder / "test.jsonl"), "--gate", gate]
    arguments += ["--max_new_tokens", "2", "--output", str(folder / "out"), *more]
    monkeypatch.setattr("sys.argv", ["sft-recipes", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("line", "code", "verdict"),
    [
        ({"metric": "exact_match", "at_most": 0.1, "n": 60}, 0, "pass"),
        ({"metric": "exact_match", "at_least": 0.5}, 1, "fail"),
        ({"metric": "exact_match", "at_most": 0.01}, 4, "insufficient_n"),
        ({"metric": "exact_match", "at_most": 0.1, "n": 61}, 4, "insufficient_n"),
        (None, 0, "pass"),
    ],
)
def test_exit_codes(
    line: Any,
    code: int,
    verdict: str,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0 pass, 1 fail, 4 nothing decided, with metrics.json and report written; `recipe` names the
    run's own gate."""
    gate = run_folder / "gate.yaml"
    gate.write_text(yaml.safe_dump({"gate": [line]}))
    ended, out, _ = evaluate_at(run_folder, capsys, monkeypatch, str(gate) if line else "recipe")
    said = "too few rows" if verdict == "insufficient_n" else verdict
    assert ended == code and f"gate: {said.upper()}" in out
    assert (
        json.loads((run_folder / "out" / "metrics.json").read_text())["gate"]["verdict"] == verdict
    )
    assert said.upper() in (run_folder / "out" / "report.html").read_text()


def test_the_command_prints_json_and_asks_other_formats_for_their_bounds(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound on a format indicator is reason enough to measure it; every format's answers are
    written."""
    gate = run_folder / "gate.yaml"
    gate.write_text(yaml.safe_dump({"gate": [{"metric": "format_gap_did", "at_most": 0.5}]}))
    code, out, _ = evaluate_at(
        run_folder, capsys, monkeypatch, str(gate), "--base", str(run_folder), "--json"
    )
    content = json.loads(out)
    assert (code, content["gate"]["verdict"]) == (0, "pass")
    assert content["format_overfitting"]["indicators"]["format_gap_did"]["value"] == 0.0
    for place in ("formats/plain", "base/formats/plain"):
        info = json.loads((run_folder / "out" / place / "metrics.json").read_text())["info"]
        assert (info["asked_as"], info["model"]) == (place, str(run_folder))


def test_a_gate_that_cannot_be_judged_ends_before_the_model_is_loaded(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong names, a missing file and a missing base are wrong input, exit code 2."""
    monkeypatch.setattr(
        models, "load_for_inference", lambda *_: pytest.fail("nothing may be loaded")
    )
    gate = run_folder / "gate.yaml"
    for line in (
        {"metric": "exact_mach", "at_least": 1},
        {"metric": "eos_rate", "compared_with": "base", "at_least": 0},
    ):
        gate.write_text(yaml.safe_dump({"gate": [line]}))
        code, _, err = evaluate_at(run_folder, capsys, monkeypatch, str(gate))
        assert code == 2 and "Fix:" in err
    code, _, err = evaluate_at(run_folder, capsys, monkeypatch, str(run_folder / "none.yaml"))
    assert code == 2 and "none.yaml" in err


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 100, 300, 600])
def test_bounds_keep_their_coverage(n: int) -> None:
    """How often the one-sided 95 % bounds miss the truth, in 2,000 draws each, also where few rows
    differ.

    At most 9 % for differences. For shares near 0 and 1, where Wilson's bounds lean, at most 8 % on the side that could
    let a model pass wrongly and 13 % on the side that could fail one wrongly.
    """
    rng = np.random.default_rng(0)

    def misses(values: Any, estimate: Callable[..., Any], truth: float) -> tuple[float, float]:
        found = [estimate(row.tolist(), confidence=0.9) for row in values]
        low, high = ([getattr(one, end) for one in found] for end in ("ci_low", "ci_high"))
        return float(np.mean(np.array(low) > truth + 1e-12)), float(
            np.mean(np.array(high) < truth - 1e-12)
        )

    drawn = rng.random((2000, n))
    for share in (0.01, 0.05, 0.5, 0.95, 0.98):
        towards_end = misses(drawn < share, proportion_of, share)
        low, high = towards_end if share <= 0.5 else towards_end[::-1]
        assert low <= 0.13 and high <= 0.08, (share, towards_end)
    for lost, gained in ((0.01, 0.0), (0.05, 0.0), (0.05, 0.02), (0.2, 0.05), (0.1, 0.1)):
        values = np.where(drawn < lost, -1.0, np.where(drawn < lost + gained, 1.0, 0.0))
        assert max(found := misses(values, mean_of_differences, gained - lost)) <= 0.09, (
            lost,
            gained,
            found,
        )
    for gap in (0.01, 0.1):  # a prompt falls under one variant of three, or under all
        values = np.where(drawn < gap, rng.choice([1 / 3, 1.0], drawn.shape), 0.0)
        assert max(found := misses(values, mean_of_differences, gap * 2 / 3)) <= 0.09, (gap, found)


def test_leaks_and_unfinished_answers_reach_the_gate() -> None:
    """The flags of metrics.json are the gate's words: a leaked header fails a limit of 1 % at
    once."""
    leaked = score_row(
        Answer("x", "Blue.", "### Response:\nBlue.", "eos", template_segments=["### Response:"])
    )
    rows = answers(290) + [row | leaked for row in answers(10)]
    evaluation: Evaluation = evaluation_from_rows([row | {"length_ratio": None} for row in rows])
    found = judge(
        parse_gate([{"flag": "template_leak", "at_most": 0.01, "n": 300}], ""), evaluation
    )
    assert (found["verdict"], found["lines"][0]["value"]) == ("fail", pytest.approx(10 / 300))
