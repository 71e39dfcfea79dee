"""Situations around templates and turns that users have, each with the result that is right, through the public path:
a file of rows, examples, labels, checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sft_recipes.cli import app
from sft_recipes.data.chat_templates import attach_chat_template, shipped_template_names
from sft_recipes.data.labels import LabelledBatch, Labeller
from sft_recipes.data.loading import iter_examples
from sft_recipes.data.reading.rejects import RejectLog
from sft_recipes.data.template_checks import TemplateCheck, check_template
from sft_recipes.errors import InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, TemplateSettings
from tests.data.label_oracle import Conversation, Tokenizer, decode, judge, trained_texts
from tests.data.template_tokenizers import TEMPLATE_FOLDER, build_tokenizer, tokenizer_for

CASES_FOLDER = Path(__file__).parent / "cases"
CASES = {
    case["name"]: case
    for case in json.loads((CASES_FOLDER / "conversations.json").read_text(encoding="utf-8"))
}

# As Mistral's templates do: ids of calls and results have nine characters, or the row is refused.
NINE_CHARACTERS = """
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 -%}
      {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
    {%- endif -%}
    {{- '[RESULT]' + message.tool_call_id + ' ' + message.content + '[/RESULT]' -}}
  {%- elif message.tool_calls is defined and message.tool_calls -%}
    {%- for call in message.tool_calls -%}
      {%- if call.id is not defined or call.id | length != 9 -%}
        {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
      {%- endif -%}
      {{- '[CALL]' + call.id + ' ' + call.function | tojson -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif message.role == 'assistant' -%}
    {{- message.content + eos_token -}}
  {%- else -%}
    {{- '[INST]' + message.content + '[/INST]' -}}
  {%- endif -%}
{%- endfor -%}
"""

Read = Callable[..., list[Example]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads rows the way a recipe does, from a file."""

    def read_rows(rows: Sequence[dict[str, Any]], **source: Any) -> list[Example]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        described = DatasetSource(path=str(path), **source)
        settings = DataSettings(datasets=[described])
        return list(iter_examples(described, settings, RejectLog(settings)))

    return read_rows


def labeller_on(tokenizer: Tokenizer, chat_template: str | None = None) -> Labeller:
    """A labeller on the tokenizer's own template, or on the one a recipe would name."""
    renderer = attach_chat_template(tokenizer, TemplateSettings(chat_template=chat_template))
    return Labeller(renderer, LabelSettings(max_length=None))


def trained_in(labeller: Labeller, batch: LabelledBatch) -> list[str]:
    """The trained texts of all rows."""
    found: list[str] = []
    for row in batch.rows:
        found += trained_texts(labeller.renderer.tokenizer, (row.input_ids, row.labels))
    return found


def faults(tokenizer: Tokenizer, examples: Sequence[Example], batch: LabelledBatch) -> list[str]:
    """What the oracle says about every example."""
    found = []
    for index, example in enumerate(examples):
        conversation = Conversation(tokenizer, example.messages, example.tools)
        rows = [(row.input_ids, row.labels) for row in batch.rows if row.example == index]
        dropped = [row.reason for row in batch.dropped if row.example == index]
        verdict = judge(conversation, rows, dropped)
        found += [*verdict.wrong, *verdict.needless]
    return found


def check_named(name: str, labeller: Labeller, examples: Sequence[Example]) -> TemplateCheck:
    """One of the checks that run before training."""
    return next(check for check in check_template(labeller, examples) if check.name == name)


# -- text that a chat template rendered already ------------------------------------------------------------------------

RENDERED = CASES["pre-rendered chat in text"]["rows"]


def test_rendered_text_keeps_its_control_tokens(read: Read) -> None:
    """Where the recipe says that the text is rendered, what it spells are control ids, and no second end follows."""
    labeller = labeller_on(tokenizer_for("qwen2_5"))
    batch = labeller.label(read(RENDERED, format="rendered"))
    tokenizer = tokenizer_for("qwen2_5")
    assert batch.dropped == []
    assert [row.input_ids for row in batch.rows] == [
        tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in RENDERED
    ]
    assert [row.input_ids.count(tokenizer.eos_token_id) for row in batch.rows] == [2, 2]


def test_raw_text_that_spells_control_tokens_is_refused_by_name(read: Read) -> None:
    """As pieces it would teach a model to spell tokens; the reason names what spells them and the way in."""
    batch = labeller_on(tokenizer_for("qwen2_5")).label(read(RENDERED, format="raw"))
    assert batch.rows == []
    assert [row.reason for row in batch.dropped] == ["control_tokens", "control_tokens"]
    assert all("rendered" in row.detail for row in batch.dropped)


def test_rendered_text_is_never_trained_as_pieces_by_default(read: Read) -> None:
    """Without a format such a file is refused, or its rows are, and the message names `rendered`."""
    try:
        batch = labeller_on(tokenizer_for("qwen2_5")).label(read(RENDERED))
    except InputError as refusal:
        assert "rendered" in str(refusal)
    else:
        assert batch.rows == []
        assert all("rendered" in row.detail for row in batch.dropped)


# -- shapes of conversations -------------------------------------------------------------------------------------------


def test_a_system_column_is_the_system_turn(read: Read) -> None:
    """It is the first message of the conversation, and the template's own default does not stand beside it."""
    rows = CASES["system column beside messages"]["rows"]
    examples = read(rows, format="messages")
    labeller = labeller_on(tokenizer_for("qwen2_5"))
    batch = labeller.label(examples)
    for row, example, labelled in zip(rows, examples, batch.rows, strict=True):
        assert list(example.messages) == [
            {"role": "system", "content": row["system"]},
            *row["messages"],
        ]
        text = decode(labeller.renderer.tokenizer, labelled.input_ids)
        assert text.startswith(f"<|im_start|>system\n{row['system']}<|im_end|>\n<|im_start|>user\n")
    assert faults(tokenizer_for("qwen2_5"), examples, batch) == []


def test_conversations_with_role_and_content_are_messages(read: Read) -> None:
    """The name of the column does not decide how its turns are spelled."""
    rows = CASES["conversations with role and content"]["rows"]
    examples = read(rows)
    assert [list(example.messages) for example in examples] == [
        row["conversations"] for row in rows
    ]
    labeller = labeller_on(tokenizer_for("qwen2_5"))
    assert trained_in(labeller, labeller.label(examples)) == ["On the island.<|im_end|>"]


def test_an_empty_answer_inside_a_conversation_is_refused_by_name(read: Read) -> None:
    """It would teach a model to say nothing, wherever it stands."""
    with pytest.raises(InputError, match=r"messages\[1\].*empty"):
        read(CASES["empty answer inside a conversation"]["rows"])


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_an_answer_that_begins_with_newlines_has_the_ids_a_server_makes(read: Read) -> None:
    """Those of the generation prompt, then those of the answer; not those of a token that joins the two."""
    examples = read(CASES["answer begins with newlines"]["rows"])
    labeller = labeller_on(tokenizer_for("qwen2_5"), "instruction")
    batch = labeller.label(examples)
    assert batch.dropped == []
    judging = tokenizer_for("qwen2_5")
    judging.chat_template = labeller.renderer.tokenizer.chat_template
    for example, row in zip(examples, batch.rows, strict=True):
        question = [dict(message) for message in example.messages[:1]]
        prompt = judging.apply_chat_template(
            question, add_generation_prompt=True, return_dict=False
        )
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[: len(prompt)] == [-100] * len(prompt)
        answer = example.messages[1]["content"] + judging.eos_token
        assert decode(judging, [label for label in row.labels if label != -100]) == answer
    assert faults(judging, examples, batch) == []


def test_every_turn_of_a_llama_2_chat_is_trained(read: Read) -> None:
    """Its template writes BOS before each question, so a row has several; that is no reason to drop it."""
    template = (CASES_FOLDER / "llama2_chat.jinja").read_text(encoding="utf-8")
    examples = read(CASES["Llama-2 chat, several turns"]["rows"])
    labeller = labeller_on(build_tokenizer(template, "<s>", "</s>", "<pad>"))
    batch = labeller.label(examples)
    judging = build_tokenizer(template, "<s>", "</s>", "<pad>")
    assert [row.turns for row in batch.rows] == [(1, 3), (2,)]
    assert [row.input_ids.count(judging.bos_token_id) for row in batch.rows] == [2, 1]
    assert faults(judging, examples, batch) == []


# -- tools -------------------------------------------------------------------------------------------------------------


def test_inline_calls_have_the_ids_of_tool_calls(read: Read) -> None:
    """A call that the answer spells as the template would is a call."""
    rows = CASES["calls written inline as <tool_call>"]["rows"]
    inline = read(rows)
    structured = []
    for row in rows:
        messages: list[dict[str, Any]] = []
        for turn in row["conversations"]:
            role = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
            call = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", turn["value"])
            content = re.sub(r"</?tool_response>\n?", "", turn["value"]).strip()
            if call:
                function = {"type": "function", "function": json.loads(call[1])}
                messages.append({"role": role, "content": "", "tool_calls": [function]})
            else:
                messages.append({"role": role, "content": content})
        structured.append({"messages": messages})
    labeller = labeller_on(tokenizer_for("qwen2_5"))
    batch, expected = labeller.label(inline), labeller.label(read(structured))
    assert batch.dropped == [] == expected.dropped
    assert [row.input_ids for row in batch.rows] == [row.input_ids for row in expected.rows]
    assert [row.labels for row in batch.rows] == [row.labels for row in expected.rows]
    assert [len(row.turns) for row in batch.rows] == [1, 2]


def test_call_ids_are_made_to_fit_the_template(read: Read) -> None:
    """A template that wants nine characters gets them, the same in a call and its result; an id that fits stays."""
    examples = read(CASES["tool call ids that Mistral templates refuse"]["rows"])
    labeller = labeller_on(build_tokenizer(NINE_CHARACTERS, "<s>", "</s>", "<pad>"))
    batch = labeller.label(examples)
    assert batch.dropped == []
    assert [row.turns for row in batch.rows] == [(1, 3)] * 3
    texts = [decode(labeller.renderer.tokenizer, row.input_ids) for row in batch.rows]
    for text in texts:
        called = re.findall(r"\[CALL\]([a-zA-Z0-9]{9}) ", text)
        answered = re.findall(r"\[RESULT\]([a-zA-Z0-9]{9}) ", text)
        assert len(called) == 1
        assert called == answered
    assert "[CALL]abcDEF123 " in texts[2]


# -- what checks say ---------------------------------------------------------------------------------------------------


def test_reasoning_that_the_template_leaves_out_is_named(read: Read) -> None:
    """R1-Distill's template deletes the reasoning of answers; a check says so, and names a template that trains it."""
    examples = read(CASES["reasoning with the R1-Distill template"]["rows"])
    labeller = labeller_on(tokenizer_for("deepseek_r1_distill"))
    check = check_named("reasoning rendered", labeller, examples)
    assert check.outcome in ("note", "failed")
    assert "2 of 2" in check.detail
    (named,) = [
        name for name in shipped_template_names() if re.search(rf"\b{name}\b", check.detail)
    ]
    trains = labeller_on(tokenizer_for("deepseek_r1_distill"), named)
    texts = trained_in(trains, trains.label(examples))
    assert len(texts) == 2
    assert all("7 times 6 is 42." in text and "It is 42." in text for text in texts)
    assert check_named("reasoning rendered", trains, examples).outcome == "ok"


def test_checks_count_every_row_that_brings_what_the_template_leaves_out(read: Read) -> None:
    """A template with a place for neither reasoning nor tools is named for both, for all rows."""
    examples = read(CASES["checks without eval rows"]["rows"])
    labeller = labeller_on(tokenizer_for("gemma"), str(TEMPLATE_FOLDER / "gemma.jinja"))
    for name in ("reasoning rendered", "tools rendered"):
        check = check_named(name, labeller, examples)
        assert check.outcome in ("note", "failed")
        assert "6 of 6" in check.detail


def test_the_checks_of_a_run_see_training_rows(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Without a held-out split the named checks look at the rows that are trained, not at a probe only."""
    rows = CASES["checks without eval rows"]["rows"]
    write_rows(rows)
    result = CliRunner().invoke(app, ["check", str(write_recipe())])
    assert re.search(r"leaves out the reasoning of 6 of 6", result.output)
    assert re.search(r"leaves out the tools of 6 of 6", result.output)
