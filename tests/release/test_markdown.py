"""Nothing that data, settings or names of folders hold is live in a card: it is read by a CommonMark parser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sft_recipes.messages import visible
from sft_recipes.release import model_card
from sft_recipes.release.finished_run import finished_run
from sft_recipes.release.markdown import fenced, inline
from tests.release.conftest import write_evaluation
from tests.release.test_model_card import GATE

# CommonMark with the tables of GitHub.
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ADDRESS = re.compile(r"://|www\.|\w@\w|mailto:")

HOSTILE = (
    "[click](https://evil.example)",
    "![seen](https://evil.example/pixel.png)",
    "<img src=https://evil.example onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<https://evil.example>",
    "https://evil.example",
    "www.evil.example",
    "me@evil.example",
    "a\n\n# Heading\n\nb",
    "a\r\n\r\nSetext\r\n===\r\n",
    "a\n---\nb: c",
    "# Heading",
    "> quote",
    "- item",
    "1. item",
    "+ item",
    "```\n# out\n",
    "~~~\n# out\n",
    "`code` and ``more`` and ```three```",
    "`",
    "\\`[x](y)`",
    "a|b|c",
    "a\\|b",
    "|",
    "\\",
    "a\\",
    "| x | y |\n|---|---|\n| 1 | 2 |",
    "*bold* **bold** __bold__ _it_ ~~gone~~",
    "&lt;b&gt; &#60;b&#62; &#x5b;a](b)",
    "[x]: https://evil.example",
    "[^1]: note",
    "<!-- comment",
    "--> <b>x</b>",
    "{{ 7 * 7 }} {% for x in y %}",
    "---\nlicense: mit\n---",
    "\u202etxt.exe\u2066 \u200b\ufeff\x00\x1b[31m\x85\u2028# x\u2029# y",
    "\ud800",
    "\U0001f600 ok",
    "$\\href{https://evil.example}{x}$",
    " `a` ",
    "    indented",
    "\tindented",
    "",
    "   ",
    "x" * 3000 + "!",
)


def live(tokens: list[Token]) -> Iterator[str]:
    """What a reader sees as structure, in order; text and code are left out, as they do nothing."""
    for token in tokens:
        if token.type == "inline":
            for child in token.children or []:
                if child.type not in ("text", "code_inline", "softbreak", "text_special"):
                    yield child.type
                elif child.type == "text":
                    assert not ADDRESS.search(child.content), child.content
        elif token.type in ("fence", "code_block"):
            yield f"{token.type} {token.info}"
        else:
            yield f"{token.type} {token.tag}"


def structure(text: str) -> list[str]:
    """Of a Markdown text without its front matter."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
    return list(live(PARSER.parse(body)))


Word = Callable[[], str]


def read(path: Path) -> dict[str, Any]:
    """A JSON file of the run."""
    return json.loads(path.read_text(encoding="utf-8"))


def data_with(content: Mapping[str, Any], word: Word) -> dict[str, Any]:
    """What `data.json` says, with other names of sources, splits and reasons."""
    reasons = {word(): 1, f"b{word()}": 2}
    source = {**content["sources"][0], "source": word(), "split": word(), "dropped": reasons}
    return {**content, "sources": [source], "fingerprint": word()}


def environment_with(content: Mapping[str, Any], word: Word) -> dict[str, Any]:
    """What `environment.json` says, with other versions and names."""
    texts = {key: word() for key in ("sft_recipes", "python", "device", "processes")}
    return {**content, **texts, "versions": {"trl": word(), f"x{word()}": word()}}


def export_with(content: Mapping[str, Any], word: Word) -> dict[str, Any]:
    """What `export.json` says, with other names, outcomes and error texts."""
    (compared, *_) = content["compared"].values()
    check = {"name": word(), "outcome": word(), "detail": word()}
    older = {"name": "transformers 4.57", "outcome": "note", "detail": f"d{word()}"}
    return {
        **content,
        "dtype": word(),
        "compared": {f"c{word()}": compared},
        "checks": [check, older],
    }


def evaluation_with(content: Mapping[str, Any], word: Word) -> dict[str, Any]:
    """What `metrics.json` says, with other metrics, task types (groups), bounds and verdicts."""
    info = {key: word() for key in ("data", "decoding", "max_new_tokens")}
    metric = content["metrics"]["exact_match"] | {"label": word(), "definition": word()}
    names = ("name", "side", "limit", "verdict", "compared_with")
    bound = GATE["lines"][0] | {key: word() for key in names} | {"group": f"g{word()}"}
    return {
        **content,
        "info": {**info, "base": f"b{word()}"},
        "metrics": {f"m{word()}": metric, "exact_match": metric},
        "differences": {"exact_match": metric},
        "gate": {**GATE, "verdict": word(), "lines": [bound]},
    }


def recipe_with(recipe: Any, word: Word) -> Any:
    """The recipe with other texts, past the checks of its reader."""
    names = ("lr_scheduler_type", "optim", "model_name_or_path", "chat_template")
    values = {**{name: f"v{word()}" for name in names}, "lora_target_modules": [word()]}
    template = replace(
        recipe.template, chat_template=word(), chat_template_kwargs={f"k{word()}": word()}
    )
    return replace(
        recipe,
        values={**recipe.values, **values},
        model={**recipe.model, "model_revision": f"r{word()}"},
        data=replace(recipe.data, datasets=[replace(recipe.data.datasets[0], path=word())]),
        labels=replace(recipe.labels, system_prompt=f"s{word()}"),
        template=template,
    )


CHANGES = {
    "data.json": data_with,
    "environment.json": environment_with,
    "export/export.json": export_with,
    "evaluations/first/metrics.json": evaluation_with,
}


def card_with(run: Path, monkeypatch: pytest.MonkeyPatch, word: Word) -> str:
    """The card of a copy of an exported run, with words in every place that a text reaches it from."""
    copy = run.with_name("copy")
    shutil.copytree(run, copy, dirs_exist_ok=True)
    for name, change in CHANGES.items():
        (copy / name).write_text(json.dumps(change(read(run / name), word)), encoding="utf-8")
    texts = {key: word() for key in ("prompt", "reference", "response")}
    row = json.dumps({**texts, "exact_match": False})
    (copy / "evaluations/first/samples.jsonl").write_text(row + "\n", encoding="utf-8")
    log = json.dumps({"train_loss": word(), "train_runtime": word()})
    (copy / "log.jsonl").write_text(log + "\n", encoding="utf-8")
    recipe = recipe_with(finished_run(run), word)
    monkeypatch.setattr(model_card, "finished_run", lambda _: recipe)
    path = model_card.write_card(copy, copy / "export", f"me/{word()}")
    return path.read_text(encoding="utf-8")


def test_no_text_is_live_in_a_card(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hostile texts in every place, alone and mixed, a card has the structure of one with plain words: the same
    headings, tables, cells and blocks, no link, image or HTML; and its metadata is still read.
    """
    run = make_run("lora")
    write_evaluation(run, "first", gate=GATE)
    expected = structure(card_with(run, monkeypatch, lambda: "word"))
    assert expected.count("heading_open h2") == 11 and "link_open" not in expected
    random = Random(0)
    words: list[Word] = [lambda text=text: text for text in HOSTILE]
    words += [lambda: " ".join(random.choices(HOSTILE, k=random.randint(1, 3)))] * 10
    for word in words:
        card = card_with(run, monkeypatch, word)
        assert structure(card) == expected, word()
        front = card.split("\n---\n")[0]
        assert yaml.safe_load(front)["library_name"] == "transformers"
        assert len(ModelCard(card).data.eval_results) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_inline_text_says_what_it_said(text: str) -> None:
    """In a cell and in a heading the reader sees the text itself, on one line, with hidden characters spelled out."""
    shown = visible(" ".join(text.split())) or "(empty)"
    table = f"| a | b |\n|---|---|\n| {inline(text)} | x |"
    assert said(table, 2) == shown
    assert said(f"# {inline(text)}", 0) == shown
    assert said(f"see {inline(text)}", 0) == f"see {shown}"


def said(line: str, index: int) -> str:
    """What a reader sees of one of the lines, cells and headings of a text."""
    inlines = [token for token in PARSER.parse(line) if token.type == "inline"]
    return "".join(child.content for child in inlines[index].children or [])


@pytest.mark.parametrize(
    "text",
    [
        "0.75",
        "-1",
        "1e-05",
        "2.13.0+cpu",
        "0.750 [0.30, 0.95]",
        "+0.125 [+0.02, +0.23]",
        "the assistant's turns with their end tokens, nothing else",
        "ok: 24 of 24 prompts",
        "not set: TRL's default",
        "lora_r",
        "me/model",
        "Grüße",
        "(version not recorded)",
    ],
)
def test_plain_words_stay(text: str) -> None:
    """What means nothing to a renderer is not dressed up as code."""
    assert inline(text) == text


def test_a_fence_is_longer_than_those_inside() -> None:
    """Backticks of any length stay inside."""
    (token,) = PARSER.parse(fenced("a\n````\n# x", "yaml"))
    assert token.type == "fence" and token.content == "a\n````\n# x\n"


def test_a_long_text_takes_no_time() -> None:
    """A megabyte that is almost plain is decided at once."""
    assert inline("a" * 500_000 + " b," * 100_000 + "!").startswith("`")
