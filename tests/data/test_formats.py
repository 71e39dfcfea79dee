"""Row formats: what each row becomes, and the exact message where it cannot become an example."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft_recipes.data.formats import RowFormat, convert_row, detect_format
from sft_recipes.data.reading.json_reader import RowProblem
from sft_recipes.data.reading.known_formats import FORMATS
from sft_recipes.errors import InputError
from sft_recipes.messages import Example

ALPACA = {"instruction": "Say hi", "output": "Hi"}
ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def convert(values: dict[str, Any], format: str | None = None, **options: Any) -> Example:
    mapping = options.pop("column_mapping", {})
    format = format or detect_format(values, mapping, "f.jsonl:7")
    return convert_row(values, RowFormat(format, mapping, **options), "f.jsonl", 6, 7)


def problem(values: dict[str, Any], format: str | None = None, **options: Any) -> str:
    with pytest.raises(RowProblem) as error:
        convert(values, format, **options)
    return str(error.value.at("f.jsonl:7"))


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def sharegpt(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["instruction", "output"], "instruction"),
        (["text", "instruction", "input", "output"], "instruction"),
        (["messages", "prompt", "prompt_id"], "messages"),
        (["id", "conversations"], "sharegpt"),
        (["prompt", "completion"], "prompt_completion"),
    ],
)
def test_format_is_told_from_the_columns(columns: list[str], expected: str) -> None:
    """Each format is known by the columns it requires; further columns do not matter."""
    assert detect_format(columns, {}, "f.jsonl:1") == expected


def test_format_through_a_mapping() -> None:
    """Mapped columns count under our names and no longer under their own."""
    mapping = {"instruction": "question", "output": "answers.0.text"}
    assert detect_format(["question", "answers"], mapping, "") == "instruction"
    assert detect_format(["conversations"], {"messages": "conversations"}, "") == "messages"


def test_unknown_columns_are_explained() -> None:
    """The error lists the columns found, the formats and how to map; raw is never assumed."""
    with pytest.raises(InputError) as error:
        detect_format(["id", "text"], {}, "f.jsonl:1")
    known = "; ".join(f"{name} ({', '.join(format.required)})" for name, format in FORMATS.items())
    assert "instruction (instruction, output); messages (messages)" in known
    assert str(error.value) == (
        f"f.jsonl:1: format: the columns (id, text) fit no format; known are {known}. "
        "Fix: write the rows in one of these formats; no column holds text."
    )
    with pytest.raises(
        InputError,
        match=r"Fix: to train the text as it stands: set `format: raw` \(on the command ",
    ):
        detect_format({"id": 1, "text": "x"}, {}, "f.jsonl:1")


def test_several_fitting_formats_are_not_guessed() -> None:
    """Columns of two formats need a word from the user."""
    with pytest.raises(
        InputError,
        match=r"\(messages, prompt, completion\) fit messages and prompt_completion. Fix: set `format: mess",
    ):
        detect_format(["messages", "prompt", "completion"], {}, "f.jsonl:1")


def test_mapping_and_format_names_are_checked() -> None:
    """A name that no format has is refused instead of ignored."""
    RowFormat("instruction", {"input": "x", "task_type": "y"}, ["task_type"]).check("f.jsonl")
    with pytest.raises(
        InputError,
        match=r"column_mapping: 'inptu' is no column of format instruction\. Fix: map one of ",
    ):
        RowFormat("instruction", {"inptu": "x"}).check("f.jsonl")
    with pytest.raises(
        InputError, match=r"unknown format 'alpaca'\. Fix: use one of instruction, messages, "
    ):
        RowFormat("alpaca", {}).check("f.jsonl")
    with pytest.raises(
        InputError, match=r"unknown format 'share_gpt'\. Fix: did you mean 'sharegpt'\?"
    ):
        RowFormat("share_gpt", {}).check("f.jsonl")


@pytest.mark.parametrize("empty", [{}, {"input": None}, {"input": ""}])
def test_instruction_without_input(empty: dict[str, Any]) -> None:
    """A missing, null or empty input leaves no trace in the prompt."""
    example = convert(ALPACA | empty)
    assert example.messages == [
        {"role": "user", "content": "Say hi", "instruction": "Say hi"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert (example.source, example.row, example.line, example.where) == (
        "f.jsonl",
        6,
        7,
        "f.jsonl:7",
    )
    assert (example.train, example.tools, example.text) == ((), None, None)


def test_instruction_with_everything() -> None:
    """Input joins with a blank line and stays available; system and history come before."""
    row = ALPACA | {
        "input": "to Bob",
        "system": "Be kind.",
        "history": [["q1", "a1"], ["q2", "a2"]],
    }
    messages = convert(row).messages
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Be kind."),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "Say hi\n\nto Bob"),
        ("assistant", "Hi"),
    ]
    assert (messages[5]["instruction"], messages[5]["input"]) == ("Say hi", "to Bob")


def test_prompt_kept_in_input() -> None:
    """An empty instruction with an input is a plain prompt."""
    assert convert({"instruction": "", "input": "q", "output": "a"}).messages == [ASK, ANSWER]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": 5}, "output: expected a string, got int. Fix: write a string."),
        (
            {"output": ["b"]},
            "output: expected a string, got list. Fix: write a string, or join the lines: "
            "set `column_mapping: {output: output}` ",
        ),
        ({"output": [1]}, "output: expected a string, got list. Fix: write a string."),
        ({"output": None}, "output: expected a string, got null. Fix: write a string."),
        ({"instruction": 1.5}, "instruction: expected a string, got float. Fix: write a string."),
        ({"input": {}}, "input: expected a string, got dict. Fix: write a string."),
        ({"system": True}, "system: expected a string, got bool. Fix: write a string."),
        ({"history": "x"}, "history: expected a list of [question, answer] pairs, got str."),
        (
            {"history": [["q"]]},
            "history[0]: not a [question, answer] pair. Fix: write two strings.",
        ),
        ({"history": [["q", 3]]}, "history[0]: expected a string, got int."),
        (
            {"instruction": " \n"},
            "instruction: the prompt is empty. Fix: write it or remove the row.",
        ),
        (
            {"output": "\t "},
            "output: the answer is empty. Fix: write it, remove the row, or set `allow_empty_output: true`.",
        ),
        ({"output": ""}, "output: the answer is empty."),
    ],
)
def test_instruction_rows_are_checked_not_converted(change: dict[str, Any], message: str) -> None:
    """D6, D7: wrong types and empty texts are refused with the column's name."""
    assert problem(ALPACA | change).startswith(f"f.jsonl:7: {message}")


def test_missing_column() -> None:
    """D6: a missing required column is named, with those that are there."""
    assert problem({"instruction": "x", "input": ""}, "instruction") == (
        "f.jsonl:7: output: the column is missing (found: instruction, input). Fix: add it or set `column_mapping`."
    )


def test_empty_output_can_be_allowed() -> None:
    """D7: `allow_empty_output` keeps an empty answer, never an empty prompt or a null."""
    assert convert(ALPACA | {"output": ""}, allow_empty_output=True).messages[-1]["content"] == ""
    assert "the prompt is empty" in problem(ALPACA | {"instruction": ""}, allow_empty_output=True)
    assert "got null" in problem(ALPACA | {"output": None}, allow_empty_output=True)


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        (
            chat(ASK, ANSWER),
            "instruction",
            "this row looks like messages (messages), the file is instruction (instruction, output)",
        ),
        (
            ALPACA,
            "messages",
            "this row looks like instruction (instruction, output), the file is messages (messages)",
        ),
        (
            {"text": "x"},
            "sharegpt",
            "this row looks like raw (text), the file is sharegpt (conversations)",
        ),
    ],
)
def test_mixed_formats(row: dict[str, Any], format: str, message: str) -> None:
    """D9: a row of another format names both schemas."""
    assert problem(row, format) == f"f.jsonl:7: {message}. Fix: keep one format per file."


@pytest.mark.parametrize(
    "name", ["labels", "input_ids", "attention_mask", "chat_template", "chat_template_kwargs"]
)
def test_columns_that_steer_training_are_refused(name: str) -> None:
    """D13: such columns are refused unless somebody asked for them by name."""
    row = ALPACA | {name: "x"}
    assert problem(row) == (
        f"f.jsonl:7: {name}: this column is refused because labels and templates are made here, not taken from rows. "
        "Fix: remove the column, or set `columns: [instruction, output]` "
        "(on the command line `--columns '[instruction, output]'`)."
    )
    for empty in (None, [], "", {}):
        assert convert(ALPACA | {name: empty}).messages[-1]["content"] == "Hi"
    assert convert(row, extra=[name]).columns == {name: "x"}
    assert (
        convert({"instruction": "i", name: "a"}, column_mapping={"output": name}).messages[-1][
            "content"
        ]
        == "a"
    )


def test_unused_and_extra_columns() -> None:
    """Columns nobody asked for are listed; those asked for are kept under our names."""
    row = {"id": 1, "q": {"text": "i"}, "output": "o", "kind": "qa", "input": ""}
    mapping = {"instruction": "q.text", "task_type": "kind"}
    assert set(row) - RowFormat("instruction", mapping, ["task_type", "absent"]).used_columns() == {
        "id"
    }
    assert set(row) - RowFormat("instruction", mapping).used_columns() == {"id", "kind"}
    example = convert(row, "instruction", column_mapping=mapping, extra=["task_type", "absent"])
    assert example.columns == {"task_type": "qa"}


def test_mapping_paths() -> None:
    """Mapped names may be dotted paths with list indices, or column names that hold dots."""
    row = {"instruction": "i", "instances": [{"input": "x", "output": "o"}], "a.b": "z"}
    mapping = {
        "instruction": "instruction",
        "input": "instances.0.input",
        "output": "instances.0.output",
    }
    assert [m["content"] for m in convert(row, column_mapping=mapping).messages] == ["i\n\nx", "o"]
    assert convert(row, column_mapping=mapping | {"output": "a.b"}).messages[-1]["content"] == "z"
    for path, step in [
        ("instances.1.output", "1"),
        ("instances.0.outptu", "outptu"),
        ("instances.x", "x"),
        ("no", "no"),
    ]:
        assert problem(row, "instruction", column_mapping=mapping | {"input": path}) == (
            f"f.jsonl:7: column_mapping leads to {path!r}, which this row does not have (at {step!r}). "
            "Fix: correct the mapping; the row has instruction, instances, a.b."
        )


def test_a_mapped_column_is_not_used_twice() -> None:
    """A column that was given another name no longer counts under its own."""
    row = {"input": "question", "output": "o"}
    messages = convert(row, column_mapping={"instruction": "input"}).messages
    assert messages[0] == {"role": "user", "content": "question", "instruction": "question"}
    row = {"input": {"text": "question"}, "output": "o"}
    assert convert(row, column_mapping={"instruction": "input.text"}).messages == messages


def test_messages_keep_what_templates_know() -> None:
    """Aliases are mapped, reasoning gets one name, text parts join, unknown keys are left behind."""
    row = chat(
        {"role": "developer", "content": "s", "id": 4},
        {
            "role": "human",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "Bo",
        },
        {
            "role": "assistant",
            "content": "x",
            "thinking": "hm",
            "reasoning_content": None,
            "refusal": None,
        },
    )
    assert convert(row).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab", "name": "Bo"},
        {"role": "assistant", "content": "x", "reasoning_content": "hm"},
    ]


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}])
@pytest.mark.parametrize("nested", [True, False])
def test_tool_calls_have_one_shape(arguments: Any, nested: bool) -> None:
    """Calls arrive as OpenAI writes them or flat, arguments as JSON text or object; they leave in one shape."""
    function = {"name": "f", "arguments": arguments}
    call = (
        {"id": "c1", "type": "function", "function": function}
        if nested
        else function | {"id": "c1"}
    )
    row = chat(
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ANSWER | {"tool_calls": []},
    ) | {"tools": [{"name": "f", "parameters": {}}]}
    example = convert(row)
    assert example.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}
        ],
    }
    assert example.messages[2:] == [{"role": "tool", "content": "42", "tool_call_id": "c1"}, ANSWER]
    assert example.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_the_old_form_of_a_tool_call_is_read() -> None:
    """`function_call`, one call beside the content, becomes a tool call like any other."""
    row = chat(
        ASK,
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "f", "arguments": '{"x": 1}'},
        },
    )
    function = {"name": "f", "arguments": {"x": 1}}
    assert convert(row).messages[-1]["tool_calls"] == [{"type": "function", "function": function}]


def test_a_tool_call_is_an_answer() -> None:
    """A row may end in a call without text."""
    row = chat(
        ASK, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    )
    assert convert(row).messages[-1]["content"] == ""


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"weight": 0.0}])
def test_turns_may_be_left_untrained(flag: dict[str, Any]) -> None:
    """`train: false` and `weight: 0` switch off one turn; flags align with the messages."""
    example = convert(chat(ASK, ANSWER | flag, ASK, ANSWER | {"train": True, "weight": 1}))
    assert [example.is_trainable(index) for index in range(4)] == [False, False, False, True]
    assert example.messages == [ASK, ANSWER, ASK, ANSWER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "x"}, "messages: expected a list of messages, got str."),
        (chat("x"), "messages[0]: expected an object with role and content, got str."),
        (chat(ASK, ANSWER | {"content": 3}), "messages[1].content: expected a string, got int."),
        (
            chat(ASK, {"role": "assistant"}),
            "messages[1].content: expected a string, got missing or null.",
        ),
        (chat({"role": 3, "content": "x"}), "messages[0].role: expected a string, got int."),
        (
            chat({"who": "human", "said": "something"}),
            "messages[0]: no 'role' (found: who, said). Fix: say which key is which, as in "
            "`message_mapping: {role: who, content: said}` ",
        ),
        (chat(ASK, ANSWER | {"train": 0}), "messages[1].train: expected true or false, got int."),
        (chat(ASK, ANSWER | {"weight": 0.5}), "messages[1].weight: expected 0 or 1, got 0.5."),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER),
            "messages[0].content[0]: a part of type 'image_url'; images are not supported, nor",
        ),
        (
            chat(ASK, ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}),
            "messages[1].tool_calls[0].arguments: inv",
        ),
        (
            chat(ASK, ANSWER | {"tool_calls": [{"name": "f", "arguments": "3"}]}),
            "messages[1].tool_calls[0].arguments: exp",
        ),
        (
            chat(ASK, ANSWER | {"tool_calls": [{"arguments": {}}]}),
            "messages[1].tool_calls[0].name: expected a string, got",
        ),
        (
            chat(ASK | {"tool_calls": [{"name": "f"}]}, ANSWER),
            "messages[0].tool_calls: a user turn cannot call tools.",
        ),
        (
            chat(ASK, ANSWER | {"reasoning": 3}),
            "messages[1].reasoning: expected a string, got int.",
        ),
        (chat(), "messages: the conversation is empty."),
        (
            chat({"role": "narrator", "content": "x"}),
            "messages[0].role: unknown role 'narrator'. Fix: use one of system, ",
        ),
        (chat(ASK, ANSWER, ASK), "messages[2].role: the last turn is 'user', not 'assistant'."),
        (chat(ASK, ASK, ANSWER), "messages[1].role: two user messages in a row."),
        (chat(ASK), "messages: there is no assistant turn."),
        (chat(ASK | {"content": " "}, ANSWER), "messages[0].content: the prompt is empty."),
        (chat(ASK, ANSWER | {"content": " "}), "messages[1].content: the answer is empty."),
        (
            chat(ASK, ANSWER | {"content": ""}, ASK, ANSWER),
            "messages[1].content: the answer is empty. Fix: write it, remove the row, or set `allow_empty_output",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_conversations(row: dict[str, Any], message: str) -> None:
    """D8: every broken rule names the file, the line and the turn."""
    assert problem(row).startswith(f"f.jsonl:7: {message}")


def test_sharegpt_with_tools() -> None:
    """Calls become tool_calls, a call right behind text joins its turn, observations become tool messages."""
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    row = sharegpt(
        ("human", "q"),
        ("gpt", "Let me see."),
        ("function_call", call),
        ("observation", "7"),
        ("gpt", "a"),
    )
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    example = convert(row | {"system": "s", "tools": tools})
    made = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert example.messages == [
        {"role": "system", "content": "s"},
        ASK,
        {"role": "assistant", "content": "Let me see.", "tool_calls": made},
        {"role": "tool", "content": "7"},
        ANSWER,
    ]
    assert example.tools == [{"type": "function", "function": {"name": "f"}}]


def test_sharegpt_call_alone_and_several_at_once() -> None:
    """A call without text before it is a turn of its own; a list of calls is one turn with all of them."""
    calls = json.dumps([{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}])
    messages = convert(
        sharegpt(("human", "q"), ("function_call", calls), ("observation", "7"), ("gpt", "a"))
    ).messages
    assert messages[1]["content"] == ""
    assert [call["function"]["name"] for call in messages[1]["tool_calls"]] == ["f", "g"]


def test_a_turn_without_text_takes_the_call_behind_it() -> None:
    """A turn whose text is null is refused, unless a call joins it."""
    row = sharegpt(("human", "q"), ("gpt", None), ("function_call", '{"name": "f"}'))
    made = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert convert(row).messages[1:] == [{"role": "assistant", "content": "", "tool_calls": made}]
    assert "conversations[1].value: expected a string, got missing or null" in problem(
        sharegpt(("human", "q"), ("gpt", None))
    )


def test_joined_turns_join_their_flags() -> None:
    """A call that must not be trained keeps the text it joins from being trained."""
    row = sharegpt(
        ("human", "q"),
        ("gpt", "x"),
        ("function_call", '{"name": "f"}'),
        ("observation", "7"),
        ("gpt", "a"),
    )
    row["conversations"][2]["weight"] = 0
    example = convert(row)
    assert [example.is_trainable(index) for index in range(4)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (
            {"system": "s", **chat(ASK, ANSWER, ASK, ANSWER | {"content": " "})},
            "messages[3].content",
        ),
        ({"system": "s", **chat(ASK, ASK, ANSWER)}, "messages[1].role"),
        ({"system": "s", **sharegpt(("human", " "), ("gpt", "a"))}, "conversations[0].value"),
        (sharegpt(("human", "q"), ("gpt", "")), "conversations[1].value"),
        (sharegpt(("human", "q"), ("narrator", "a")), "conversations[1].from"),
        (sharegpt(), "conversations"),
        (ALPACA | {"history": [["q1", "a1"], [" ", "a2"]]}, "history[1]"),
        (ALPACA | {"history": [ASK, ANSWER | {"content": ""}]}, "history[1].content"),
        (ALPACA | {"system": "s", "output": ""}, "output"),
        ({"messages": [{"human": "", "gpt": "a"}]}, "messages[0]"),
        (
            chat(
                ASK,
                ANSWER,
                {"role": "function_call", "content": '{"name": "f"}'},
                {"role": "tool", "content": "7"},
                ANSWER | {"content": ""},
            ),
            "messages[4].content",
        ),
    ],
)
def test_a_problem_names_a_field_of_the_row(row: dict[str, Any], field: str) -> None:
    """The column, the turn and the key that the row has: not a number of a message behind others."""
    assert problem(row).startswith(f"f.jsonl:7: {field}: ")


@pytest.mark.parametrize("tools", [None, "", " ", "[]", []])
def test_empty_tools_are_none(tools: Any) -> None:
    """All spellings of no tools give None."""
    assert convert(sharegpt(("human", "q"), ("gpt", "a")) | {"tools": tools}).tools is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            sharegpt(("human", "q"), ("function_call", "f(1)")),
            "conversations[1]: invalid JSON at column 1 (expecting value)",
        ),
        (
            sharegpt(("human", "q"), ("function_call", 3)),
            "conversations[1]: expected a string, got int.",
        ),
        (
            sharegpt(("human", "q"), ("function_call", "{}")),
            "conversations[1].tool_calls[0].name: expected a string, got",
        ),
        (
            sharegpt(("human", "q"), ("gpt", "x"), ("function_call", "[]")),
            "conversations[2].tool_calls[0].name: expected a string, got",
        ),
        (
            sharegpt(("human", "q"), ("gpt", "a")) | {"tools": "x"},
            "tools: invalid JSON at column 1 (expecting value)",
        ),
        (
            sharegpt(("human", "q"), ("gpt", "a")) | {"tools": {"a": 1}},
            "tools: expected a list of tool definitions, got",
        ),
        (
            sharegpt(("human", "q"), ("observation", "7"), ("gpt", "a")),
            "conversations[1].from: a tool message without a tool",
        ),
    ],
)
def test_bad_sharegpt(row: dict[str, Any], message: str) -> None:
    """Broken calls, turns of another format and broken tools are named."""
    assert problem(row).startswith(f"f.jsonl:7: {message}")


def test_prompt_completion() -> None:
    """Text becomes a user and an assistant turn; of conversations only the completion is trained."""
    assert convert({"prompt": "q", "completion": "a"}).messages == [ASK, ANSWER]
    assert convert({"prompt": "q", "completion": [ANSWER]}).messages == [ASK, ANSWER]
    assert convert({"prompt": [ASK], "completion": "a"}).messages == [ASK, ANSWER]
    example = convert({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})
    assert example.messages == [ASK, ANSWER, ASK, ANSWER]
    assert [example.is_trainable(index) for index in range(4)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "completion": 3}, "completion: expected a string, got int."),
        (
            {"prompt": "q", "completion": ["a"]},
            "completion[0]: expected an object with role and content, got str.",
        ),
        ({"prompt": [ASK], "completion": []}, "completion: there is no assistant turn."),
        ({"prompt": "q", "completion": ""}, "completion: the answer is empty."),
        ({"prompt": "", "completion": "a"}, "prompt: the prompt is empty."),
        (
            {"prompt": [ASK], "completion": [ASK]},
            "completion[0].role: two user messages in a row.",
        ),
        (
            {"prompt": [ASK, ANSWER], "completion": "a"},
            "completion: two assistant messages in a row.",
        ),
    ],
)
def test_bad_prompt_completion(row: dict[str, Any], message: str) -> None:
    """D6 to D8 for this format."""
    assert problem(row).startswith(f"f.jsonl:7: {message}")


def test_raw_is_kept_as_text() -> None:
    """Raw text stands alone; it must be text and not blank."""
    example = convert({"text": " as is "}, "raw")
    assert (example.text, list(example.messages)) == (" as is ", [])
    assert problem({"text": " "}, "raw").startswith("f.jsonl:7: text: empty.")
    assert problem({"text": None}, "raw").startswith(
        "f.jsonl:7: text: expected a string, got null."
    )


@pytest.mark.parametrize(
    "text",
    [
        "\ue000\U000f0000",
        "a\x00b",
        "\u202e\u05d0\u200b",
        "{{7*7}} {x.__class__} {input}",
        "### Response:",
        "x" * 10**6,
    ],
)
def test_hostile_text_is_only_text(text: str) -> None:
    """D11, D12: content goes through unchanged in every place."""
    row = {"instruction": text, "input": text, "output": text}
    assert [m["content"] for m in convert(row).messages] == [f"{text}\n\n{text}", text]
    assert [m["content"] for m in convert(sharegpt(("human", text), ("gpt", text))).messages] == [
        text,
        text,
    ]
