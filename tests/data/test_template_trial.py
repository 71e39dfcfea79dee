"""Templates that do not end, that take all memory, or that are no templates are named, and quickly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_recipes.data import template_trial, workers
from sft_recipes.data.guarded import Limits, run_guarded
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import instruction_rows

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MANY = "range(99999)"
ENDLESS = f"{{% for a in {MANY} %}}{{% for b in {MANY} %}}{{% for c in {MANY} %}}"
ENDLESS += "{% endfor %}{% endfor %}{% endfor %}"
GROWING = (
    "{% set n = namespace(text='xxxxxxxx') %}"
    "{% for i in range(99) %}{% set n.text = n.text ~ n.text %}{% endfor %}"
)
HOSTILE = {
    "endless": (ENDLESS, "the template does not end"),
    "endless macro": (
        f"{{% macro m() %}}{ENDLESS}{{% endmacro %}}{{{{ m() }}}}",
        "the template does not end",
    ),
    "growing": (GROWING, "the template takes more than"),
    "one large text": ("{{ 'x' * 99999999999 }}", "the template takes more than"),
    "large list": ("{% set a = [0] * 99999999999 %}", "the template takes more than"),
    "division": ("\n{{ 1 / 0 }}", "(ZeroDivisionError"),
    "large range": ("{% for i in range(10 ** 9) %}{% endfor %}", "(OverflowError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "(RecursionError"),
    "not defined": ("{{ nobody.knows }}", "(UndefinedError"),
    "refusal": ("{{ raise_exception('never') }}", "never"),
    "deep brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "(RecursionError"),
    "syntax": ("\n\n{% for m in %}", "syntax error: "),
    "unknown tag": ("{% include_all %}", "syntax error: "),
    "not closed": ("{% if messages %}", "syntax error: "),
    "a file": ("{% include '/etc/passwd' %}", "the template cannot render"),
}


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "TRIAL", Limits(seconds=1, growth=2**28))
    monkeypatch.setattr(template_trial, "ROW", Limits(seconds=1, growth=2**28))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_named(
    name: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """What no template may do is an error with its file, its line where Python knows it, and the
    reason.
    """
    text, reason = HOSTILE[name]
    (tmp_path / "own.jinja").write_text(text + TURNS)
    recipe = load_recipe(write_recipe(chat_template="./own.jinja"))
    with pytest.raises(InputError) as refused:
        open_labeller(recipe)
    (problem,) = refused.value.problems
    assert problem.field == "chat_template"
    assert problem.where.startswith(str(tmp_path / "own.jinja"))
    assert reason in problem.what


@pytest.mark.parametrize(("name", "line"), [("syntax", 3), ("division", 2)])
def test_the_line_of_a_fault_is_told(
    name: str, line: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """FILE:LINE, for a template that cannot be compiled and for one that fails while it runs."""
    (tmp_path / "own.jinja").write_text(HOSTILE[name][0] + TURNS)
    recipe = load_recipe(write_recipe(chat_template="./own.jinja"))
    with pytest.raises(InputError, match=rf"own\.jinja:{line}: chat_template: "):
        open_labeller(recipe)


@pytest.mark.parametrize("text", [ENDLESS, GROWING], ids=["endless", "growing"])
def test_row_on_which_a_template_does_not_end_is_named(
    text: str,
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A template that is good for its probe and for all rows but one names that row and itself."""
    monkeypatch.setattr(workers, "BATCH_SECONDS", 1)
    monkeypatch.setattr(workers, "BATCH_GROWTH", 2**28)
    rows = instruction_rows(20)
    rows[13]["instruction"] = "open sesame"
    write_rows(rows)
    trap = "{% if 'sesame' in messages[0].content %}" + text + "{% endif %}"
    (tmp_path / "own.jinja").write_text(trap + TURNS)
    recipe = load_recipe(write_recipe(chat_template="./own.jinja"))
    labeller = open_labeller(recipe)
    with pytest.raises(InputError, match=r"train\.jsonl:14: chat_template: .*own\.jinja"):
        prepare(recipe, labeller, tmp_path / "prepared", progress=False)


def test_shipped_and_plain_templates_pass(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A template that ends is taken as before, and what was asked of it in the trial is asked again."""
    (tmp_path / "own.jinja").write_text(TURNS)
    labeller = open_labeller(load_recipe(write_recipe(chat_template="./own.jinja")))
    assert labeller.renderer.stop_ids
    assert labeller.renderer.template_place == str(tmp_path / "own.jinja")


def test_template_of_a_tokenizer_is_named_by_its_file(
    write_recipe: Callable[..., Path], base_folder: Path, tmp_path: Path
) -> None:
    """The model's own template is tried, too."""
    base = tmp_path / "base"
    base.mkdir()
    for path in base_folder.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in %}"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = load_recipe(write_recipe(model_name_or_path=str(base)))
    with pytest.raises(InputError, match=r"tokenizer_config\.json:1: chat_template: syntax error"):
        open_labeller(recipe)


def test_outcomes_are_told_apart() -> None:
    """Work that is done, that raises, and that is ended for its time; the last note is kept."""

    def loop(note: Callable[[int], None]) -> None:
        note(5)
        while True:
            pass

    limits = Limits(seconds=0.3, growth=2**28)
    assert run_guarded(lambda note: note(3), limits).noted == 3
    assert run_guarded(lambda _: 1 / 0, limits).error == "ZeroDivisionError: division by zero"
    ended = run_guarded(loop, limits)
    assert (ended.kind, ended.noted) == ("time", 5)
