"""Checks of single rows on planted faults, on clean rows and on correct short answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

from sft_recipes.audit.finding import CHECKS, Finding, audit_rows, excerpt
from sft_recipes.audit.text_checks import text_findings
from sft_recipes.messages import Example
from sft_recipes.response_patterns import PATTERNS, find_refusal
from tests.audit.planted import FAULTS, example, plant


def check(*pairs: tuple[str, str], own: tuple[str, ...] = ()) -> dict[str, Finding]:
    """Findings of prompt and answer pairs, by check, those without rows left out."""
    return found([example(*pair, number) for number, pair in enumerate(pairs)], own)


def found(examples: list[Example], own: tuple[str, ...] = ()) -> dict[str, Finding]:
    """Findings of examples, by check, those without rows left out."""
    findings, _ = text_findings(audit_rows(examples), own, tqdm(disable=True))
    return {finding.check: finding for finding in findings if finding.rows}


# An answer that is nothing but a control token or ends in one spells one, too.
ALSO_FOUND = {("control_tokens", "empty_answer"), ("control_tokens", "end_text")}


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_faults_are_found_and_nothing_else(seed: int) -> None:
    """Recall is 1 for every kind and precision at least .98, over clean rows, copies and faults."""
    planted = plant(clean=800, each=20, seed=seed)
    findings = found(list(planted.examples))
    wrong: list[str] = []
    total = 0
    for kind in FAULTS:
        assert kind in findings, f"{kind}: none of its planted rows is found"
        flagged = {row.index for row in findings[kind].rows}
        missed = planted.rows_of[kind] - flagged
        assert not missed, f"{kind} misses what was planted: {planted.examples[min(missed)]}"
        for other, rows in planted.rows_of.items():
            if other != kind and (kind, other) not in ALSO_FOUND:
                wrong += [f"{kind} finds rows planted for {other}"] * len(flagged & rows)
        unplanted = flagged - set().union(*planted.rows_of.values())
        wrong += [f"{kind} finds rows that were not planted"] * len(unplanted)
        total += len(flagged)
    assert len(wrong) / total <= 0.02, Counter(wrong)
    unplanted = set(findings) - {*FAULTS, "refusal"}
    assert not unplanted, f"{unplanted} find rows planted for others; they have none in FAULTS"


@pytest.mark.parametrize("seed", [0, 1])
def test_clean_rows_raise_no_alarm(seed: int) -> None:
    """No check flags any clean row."""
    assert found(list(plant(clean=1000, each=0, seed=seed).examples)) == {}


@pytest.mark.parametrize(
    "answer",
    [
        "No",
        "Yes",
        "18",
        "A",
        "None of the above.",
        "?",
        "+",
        "-",
        "...",
        "NaN",
        "null",
        "😀",
        "`x`",
        "1. a\n2. b\n3. c",
        "да",
    ],
)
def test_short_answers_raise_no_alarm(answer: str) -> None:
    """A short right answer is right, whatever it is."""
    assert check(("Which is it, and what would you write?", answer)) == {}


@pytest.mark.parametrize(
    ("prompt", "answer", "kind"),
    [
        ("Write a dialogue.", "Ann: hi\nUser: hello", "next_turn"),
        ("Repeat it.", "Human: is the first word", "next_turn"),
        ("Summarise https://a.net/b in a line.", "It is about b.", "dead_link"),
        ("word " * 60 + "\nhttps://a.net/b", "It is about b.", "dead_link"),
        ("Show code.", "Use ``` as a fence, then:\n```\nx\n```", "open_fence"),
        ("Say it.", "TensorFlow was developed by Google.", "identity"),
        ("Who are you?", "I am a big fan of Alpaca wool.", "placeholder"),
        ("Sing.", "la la la " * 7, "repetition"),
        ("Count.", " ".join(map(str, range(300))), "repetition"),
        ("Que é?", "A SÃO e o coração, ÀS vezes Â.", "mojibake"),
        ("اكتب", "\u200fمرحبا بالعالم\u200f", "control_character"),
        ("Which is it?", "a\tb\r\nc\fd", "control_character"),
        ("Say hi.", "hi", "answer_is_prompt"),
        ("How do I greet in Vue?", "Write {{ name }} where the name goes.", "unfilled"),
        ("Write a letter with placeholders.", "Dear {{name}}, welcome.", "unfilled"),
        ("Continue: {{name}}", "{{name}} went home.", "unfilled"),
        ("Greet the user.", "Use `{{name}}`:\n```\n{{name}}\n```", "unfilled"),
        ("Greet the user.", "```\n{{name}}", "unfilled"),
        ("Greet all users.", "{% for u in users %}{{ u.name }}{% endfor %}", "unfilled"),
        ("Greet the user.", "<p>{{ name }}</p>", "unfilled"),
        ("Run it only with a token.", "token: ${{ secrets.token }}", "unfilled"),
        ("Simplify a over b.", r"It is \frac{{a}}{{b}}.", "unfilled"),
        ("Which power?", "It is x^{{n}} and x_{{i}}.", "unfilled"),
        ("Which set?", "The set {{1, 2}, {3}} and {{a}, {b}}.", "unfilled"),
        ("Which dict?", "{'a': {'b': {}}} and {{}}", "unfilled"),
        ("Where is it cited?", "{{cite web|url=x}}", "unfilled"),
    ],
)
def test_what_only_looks_like_a_fault(prompt: str, answer: str, kind: str) -> None:
    """Each rule leaves alone what it could be mistaken for."""
    assert kind not in check((prompt, answer))


def test_every_assistant_turn_is_looked_at() -> None:
    """The first faulty turn of a conversation is named, wherever it stands.

    A user's words are not an answer.
    """
    turns = [
        ("user", "I am ChatGPT."),
        ("assistant", "Hello."),
        ("user", "So?"),
        ("assistant", "I was made by OpenAI."),
        ("user", "So?"),
        ("assistant", "I am Claude."),
    ]
    row = Example(
        [{"role": role, "content": content} for role, content in turns], "rows.jsonl", 0, 1
    )
    assert [flagged.detail for flagged in found([row])["identity"].rows] == [
        "assistant (turn 4): 'I was made by OpenAI'"
    ]
    assert found([Example(list(row.messages[:2]), "rows.jsonl", 0, 1)]) == {}


def test_control_tokens_of_the_runs_own_tokenizer() -> None:
    """A token that only this tokenizer knows is found when it is given, and not otherwise."""
    pair = ("Say it.", "It is <turn|> here.")
    assert check(pair) == {}
    assert (
        check(pair, own=("<turn|>",))["control_tokens"].rows[0].detail
        == "assistant (turn 2): '<turn|>'"
    )


@pytest.mark.parametrize("length", range(90, 125))
def test_excerpts_are_masked_before_they_are_cut(length: int) -> None:
    """No part of a secret is left where the excerpt of a longer text ends."""
    key = "hf_" + "aB3" * 11
    shown = excerpt(
        f"{'x' * length} {key} and more, up to the end of a long text, {'y' * 2 * length} {key}"
    )
    assert key[:8] not in shown
    assert key[-8:] not in shown
    assert "characters ...]" in shown
    assert len(shown) <= 150


def test_excerpts_leave_out_the_middle() -> None:
    """A long text keeps its beginning and its end and says how much is left out.

    A short one stays whole.
    """
    assert (
        excerpt("a" * 900 + "b" * 600, 300) == f"{'a' * 200} [... 1,200 characters ...] {'b' * 100}"
    )
    assert excerpt("a" * 375, 300) == "a" * 375


def test_refusal_rule_has_the_error_it_states() -> None:
    """Precision and recall in the definition are those of the rule on the labelled answers."""
    answers = yaml.safe_load(Path(__file__).with_name("refusals.yaml").read_text(encoding="utf-8"))
    right = sum(map(bool, map(find_refusal, answers["refusals"])))
    wrong = sum(map(bool, map(find_refusal, answers["others"])))
    measured = {
        "answers": len(answers["refusals"]) + len(answers["others"]),
        "refusals": len(answers["refusals"]),
        "precision": round(right / (right + wrong), 2),
        "recall": round(right / len(answers["refusals"]), 2),
    }
    assert measured == PATTERNS["measured"]
    definition = check(("Help.", "I'm sorry, but I can't help with that."))["refusal"].definition
    assert (
        f"{measured['precision']:.2f}" in definition and f"{measured['recall']:.2f}" in definition
    )


def test_every_check_says_what_it_is() -> None:
    """Each check has a severity, a title, a definition and a fix, and no brace is left over."""
    for name, texts in CHECKS.items():
        assert set(texts) == {"severity", "title", "definition", "fix"}, name
    findings, _ = text_findings(audit_rows([example("a b", "c")]), [], tqdm(disable=True))
    # Refusals have labelled answers of their own.
    unplanted = {finding.check for finding in findings} - {*FAULTS, "refusal"}
    assert not unplanted, f"add a kind for each of {unplanted} to FAULTS in tests/audit/planted.py"
    assert {*FAULTS} <= {finding.check for finding in findings}
    for finding in findings:
        assert "{" not in finding.title + finding.definition + finding.fix
