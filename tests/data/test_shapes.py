"""Shapes that data sets have: each is trained as its writer meant it, or refused by a message whose settings work.

`cases/shapes.jsonl` holds the documented formats of other tools; the tables below hold neighbours of each kind.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import RejectLog, iter_examples
from sft_recipes.errors import InputError
from sft_recipes.recipe import (
    DatasetSource,
    DataSettings,
    LabelSettings,
    TemplateSettings,
    parse_overrides,
)
from tests.data.template_tokenizers import tokenizer_for

SHAPES = [
    json.loads(line)
    for line in (Path(__file__).parent / "cases" / "shapes.jsonl").read_text().splitlines()
]
ASK = {"role": "user", "content": "Question?"}
ANSWER = {"role": "assistant", "content": "Answer."}
OTHER = {"role": "assistant", "content": "Another."}
Write = Callable[..., Path]


@dataclass
class Outcome:
    """What became of the rows of a file: the trained texts, all texts, and what was said of the columns."""

    trained: str
    whole: str
    log: RejectLog


@cache
def labeller(train_on: str) -> Labeller:
    """A labeller for a template that knows tools, and system turns anywhere."""
    renderer = attach_chat_template(tokenizer_for("qwen2_5"), TemplateSettings("tokenizer"))
    return Labeller(renderer, LabelSettings(train_on=train_on, max_length=None))  # type: ignore[arg-type]


def outcome(path: Path, train_on: str = "assistant", **settings: Any) -> Outcome:
    """Read and label the rows of a file as preparation does. Raises InputError where they are refused."""
    empty = settings.pop("allow_empty_output", False)
    data = DataSettings([DatasetSource(str(path), **settings)], allow_empty_output=empty)
    log = RejectLog(data)
    examples = list(iter_examples(data.datasets[0], data, log))
    batch = labeller(train_on).label(examples)
    assert not batch.dropped
    trained: list[str] = []
    whole: list[str] = []
    for row in batch.rows:
        whole.append(decode(row.input_ids))
        trained += [decode(row.input_ids[start:end]) for start, end in row.spans]
    return Outcome("\n".join(trained), "\n".join(whole), log)


def decode(ids: Sequence[int]) -> str:
    """The text of ids, as it is."""
    return str(
        labeller("assistant").renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    )


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        outcome(path, **settings)
    return str(error.value)


def offered(message: str) -> list[dict[str, Any]]:
    """The settings that a message prints, one dictionary for each choice it offers."""
    fix = re.sub(r" \(on the command line [^)]*\)", "", message.partition(" Fix: ")[2])
    choices: list[dict[str, Any]] = []
    for part in re.split(r",? or |; ", fix):
        settings = {}
        for match in re.finditer(r"`(\w+): ([^`]*)`", part):
            settings[match[1]] = yaml.safe_load(match[2])
        if settings:
            choices.append(settings)
    return choices


def check(result: Outcome, case: Mapping[str, Sequence[str]]) -> None:
    for text in case["trained"]:
        assert text in result.trained
    for text in case["in_prompt"]:
        assert text in result.whole and text not in result.trained
    for text in case["not_trained"]:
        assert text not in result.trained


# What must be refused although no setting makes it right, with what the message says to do.
BY_HAND = {
    "context_qa.load_404 (no answer column)": "no column seems to hold the answer: add one, say ANSWER, and set "
    "`column_mapping: {instruction: unanswerable_question, input: article, output: ANSWER}`",
    "pretokenized (type: empty)": "input_ids: rows that are tokenized already are not taken",
    "content parts with train: false": "split the turn, or set `train` on the whole turn",
    "images <image> tag": "images: this row comes with images, video or sound, and only text is trained",
}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["name"])
def test_documented_shape(shape: dict[str, Any], write_rows: Write) -> None:
    """A shape is trained as documented: at once, or with the first setting that its refusal prints."""
    path = write_rows(shape["rows"])
    if shape["name"] == "training on user turn (train: true on user)":
        check(outcome(path, train_on="all"), shape)
        return
    if shape["name"] in BY_HAND:
        assert BY_HAND[shape["name"]] in refusal(path)
        return
    try:
        result = outcome(path)
    except InputError as error:
        result = outcome(path, **offered(str(error))[0])
    check(result, shape)


# name -> row, then texts that are trained, in the prompt, and not trained; recognised unasked.
READ: dict[str, tuple[Any, list[str], list[str], list[str]]] = {
    "OpenOrca": (
        {"id": "x", "system_prompt": "Be kind.", "question": "Why?", "response": "So."},
        ["So."],
        ["Be kind.", "Why?"],
        [],
    ),
    "Dolly": (
        {"instruction": "Why?", "context": "It rains.", "response": "So.", "category": "qa"},
        ["So."],
        ["Why?", "It rains."],
        [],
    ),
    "TruthfulQA": (
        {"Type": "x", "Question": "Why?", "Best Answer": "So.", "Source": "s"},
        ["So."],
        ["Why?"],
        [],
    ),
    "capitals": ({"Instruction": "Why?", "Output": "So."}, ["So."], ["Why?"], []),
    "CNN": (
        {"id": "x", "article": "It rained.", "highlights": "Rain."},
        ["Rain."],
        ["It rained."],
        [],
    ),
    "SAMSum": (
        {"dialogue": "A: hi B: ho", "summary": "Greetings."},
        ["Greetings."],
        ["A: hi B: ho"],
        [],
    ),
    "user and assistant": ({"user": "Why?", "assistant": "So."}, ["So."], ["Why?"], []),
    "prompt of messages, response": (
        {"prompt": [ASK], "response": "So."},
        ["So."],
        ["Question?"],
        [],
    ),
    "completion of messages": (
        {"prompt": "Why?", "completion": [ANSWER]},
        ["Answer."],
        ["Why?"],
        [],
    ),
    "messages with from and value": (
        {"messages": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        ["So."],
        ["Why?"],
        [],
    ),
    "dialogue of turns": (
        {"dialogue": [ASK, ANSWER], "topic": "x"},
        ["Answer."],
        ["Question?"],
        [],
    ),
    "chat as JSON text": ({"chat": json.dumps([ASK, ANSWER])}, ["Answer."], ["Question?"], []),
    "turns as JSON texts": (
        {"messages": [json.dumps(ASK), json.dumps(ANSWER)]},
        ["Answer."],
        ["Question?"],
        [],
    ),
    "struct of lists": (
        {
            "conversation": {
                "role": ["user", "assistant"],
                "content": ["Why?", "So."],
                "name": [None, None],
            }
        },
        ["So."],
        ["Why?"],
        [],
    ),
    "speaker and text": (
        {"turns": [{"speaker": "User", "text": "Why?"}, {"speaker": "Assistant", "text": "So."}]},
        ["So."],
        ["Why?"],
        [],
    ),
    "exchanges": (
        {
            "conversation": [
                {"system": "Be kind.", "input": "Why?", "output": "So."},
                {"input": "And?", "output": "Ok."},
            ]
        },
        ["So.", "Ok."],
        ["Be kind.", "Why?", "And?"],
        [],
    ),
    "a bare list": ([ASK, ANSWER], ["Answer."], ["Question?"], []),
    "call turns": (
        {
            "messages": [
                ASK,
                {"role": "tool_call", "content": '{"name": "sky", "arguments": {"at": null}}'},
                {"role": "tool_response", "content": "clear"},
                ANSWER,
            ]
        },
        ["sky", '"at": null', "Answer."],
        ["Question?", "clear"],
        [],
    ),
    "history of messages": (
        {"history": [ASK, ANSWER], "question": "Why?", "answer": "So."},
        ["Answer.", "So."],
        ["Question?", "Why?"],
        [],
    ),
    "functions": (
        {"functions": [json.dumps({"name": "sky"})], "messages": [ASK, ANSWER]},
        ["Answer."],
        ["sky"],
        [],
    ),
    "system column": (
        {"system": "Be kind.", "messages": [ASK, ANSWER]},
        ["Answer."],
        ["Be kind."],
        [],
    ),
    "system column beside prompt": (
        {"system": "Be kind.", "prompt": "Why?", "completion": "So."},
        ["So."],
        ["Be kind."],
        [],
    ),
    "system column once more": (
        {
            "system": "Be kind.",
            "messages": [{"role": "system", "content": "Be kind."}, ASK, ANSWER],
        },
        ["Answer."],
        ["Be kind."],
        [],
    ),
    "flag of an exchange": (
        {
            "conversation": [
                {"human": "Why?", "gpt": "No.", "train": False},
                {"human": "And?", "gpt": "Ok."},
            ]
        },
        ["Ok."],
        ["Why?"],
        ["No."],
    ),
    "parts that agree": (
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": [{"type": "text", "text": "No.", "weight": 0}]},
                ASK,
                ANSWER,
            ]
        },
        ["Answer."],
        [],
        ["No."],
    ),
    "empty columns": (
        {
            "instruction": "Why?",
            "output": "So.",
            "labels": None,
            "images": [],
            "rejected": "",
            "weight": 1,
            "label": 3,
        },
        ["So."],
        ["Why?"],
        [],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_neighbour_is_read(name: str, write_rows: Write) -> None:
    """Names and structures in common use are read without a setting, and only what is meant is trained."""
    row, trained, in_prompt, not_trained = READ[name]
    result = outcome(write_rows([row]))
    check(result, {"trained": trained, "in_prompt": in_prompt, "not_trained": not_trained})


# name -> row, and how the refusal begins behind the place.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two answers": (
        {"question": "q", "answer": "a", "response": "r"},
        "column_mapping: the columns answer and resp",
    ),
    "output and response": (
        {"instruction": "q", "output": "a", "response": "r"},
        "column_mapping: the columns output",
    ),
    "two questions": (
        {"instruction": "i", "question": "q", "answer": "a"},
        "column_mapping: the columns instruction",
    ),
    "two texts": (
        {"text": "t", "article": "a", "summary": "s"},
        "column_mapping: the columns article and text",
    ),
    "two articles": (
        {"document": "t", "article": "a", "summary": "s"},
        "column_mapping: the columns document and",
    ),
    "text beside a pair": (
        {"question": "q", "answer": "a", "text": "t"},
        "column_mapping: 'text' may be what",
    ),
    "two conversations": (
        {"chat": [ASK, ANSWER], "dialog": [ASK, OTHER]},
        "column_mapping: the columns chat and",
    ),
    "two formats": (
        {"messages": [ASK, ANSWER], "prompt": "p", "completion": "c"},
        "format: the columns (messages,",
    ),
    "SQuAD": (
        {"context": "c", "question": "q", "answers": {"text": ["a"], "start": [1]}},
        "format: the columns (cont",
    ),
    "unknown names": (
        {"foo": "Why?", "bar": "So."},
        "format: the columns (foo, bar) fit no format",
    ),
    "translation": (
        {"source": "hello", "target": "hallo"},
        "format: the columns (source, target) fit no format",
    ),
    "one text": (
        {"id": "x", "url": "y", "content": "A story."},
        "format: the columns (id, url, content) fit no",
    ),
    "one text of lines": (
        {"id": "x", "lines": ["A story.", "Its end."]},
        "format: the columns (id, lines) fit no",
    ),
    "rendered text": (
        {"text": "<|im_start|>user\nhi<|im_end|>\n"},
        "format: the columns (text) fit no format",
    ),
    "rendered, other name": (
        {"sample": "[INST] hi [/INST] ho</s>"},
        "format: the columns (sample) fit no format",
    ),
    "KTO": (
        {"prompt": "q", "completion": "a", "label": True},
        "label: True says whether the answer",
    ),
    "KTO of messages": (
        {"messages": [ASK, ANSWER], "kto_tag": False},
        "kto_tag: False says whether the answer",
    ),
    "DPO": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "format: the columns (prompt, chosen, rejected) fit",
    ),
    "DPO of messages": (
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
        "format: the columns (prompt,",
    ),
    "DPO of whole conversations": (
        {"prompt": "Question?", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        "format: the columns (prompt, chosen, rejected) fit no format",
    ),
    "UltraFeedback": (
        {
            "messages": [ASK, ANSWER],
            "chosen": [ASK, ANSWER],
            "rejected": [ASK, OTHER],
            "score_chosen": 1.0,
        },
        "chosen: preference data",
    ),
    "chosen beside a pair": (
        {"instruction": "q", "output": "a", "rejected": "b"},
        "rejected: preference data",
    ),
    "image path": (
        {"instruction": "q", "output": "a", "image_path": "x.jpg"},
        "image_path: this row comes with",
    ),
    "audio": (
        {"messages": [ASK, ANSWER], "audios": ["x.wav"]},
        "audios: this row comes with images, video or",
    ),
    "placeholder": (
        {"messages": [{"role": "user", "content": "<image> what?"}, ANSWER], "images": None},
        "messages[0].content: <image> stands for what a column of the row holds",
    ),
    "row weight": (
        {"instruction": "q", "output": "a", "weight": 0.5},
        "weight: this row asks for the weight 0.5",
    ),
    "labels": (
        {"messages": [ASK, ANSWER], "labels": [1]},
        "labels: this column is refused because",
    ),
    "template": (
        {"prompt": "q", "completion": "a", "chat_template": "x"},
        "chat_template: this column is refused",
    ),
    "choices": (
        {"question": "q", "choices": ["a", "b"], "answer": "b"},
        "choices: this column belongs to the",
    ),
    "choices in a struct": (
        {"question": "q", "options": {"label": ["A"], "text": ["x"]}, "answer": "A"},
        "options: this column belongs to the question",
    ),
    "context of a prompt": (
        {"prompt": "q", "completion": "a", "context": "c"},
        "context: this column belongs to",
    ),
    "context beside an input": (
        {"instruction": "q", "input": "i", "output": "a", "context": "c"},
        "context: this column belongs to",
    ),
    "history of a prompt": (
        {"prompt": "q", "completion": "a", "history": [["x", "y"]]},
        "history: the turns before the prompt would be passed over",
    ),
    "row flag": (
        {"instruction": "q", "output": "a", "train": False},
        "train: this row says that it is not to be",
    ),
    "completion from the start": (
        {"prompt": "Question?", "completion": [ASK, ANSWER]},
        "completion[0].role: two user messages in a row",
    ),
    "reasoning": (
        {"question": "q", "answer": "a", "reasoning": "r"},
        "reasoning: this column changes what the",
    ),
    "two systems": (
        {"system": "a", "system_prompt": "b", "question": "q", "answer": "r"},
        "system_prompt: 'system' is read as system",
    ),
    "roles": (
        {"messages": [{"role": "Customer", "content": "q"}, {"role": "Clerk", "content": "a"}]},
        "messages[0].role: unknown role 'Customer'",
    ),
    "one role": (
        {"messages": [ASK, {"role": "narrator", "content": "a"}]},
        "messages[1].role: unknown role 'narrator'",
    ),
    "keys": (
        {
            "messages": [
                {"who": "user", "said": "Why is it so?"},
                {"who": "assistant", "said": "Because it is."},
            ]
        },
        "messages[0]: no 'role' (found: who, said)",
    ),
    "two texts of a turn": (
        {"messages": [ASK, ANSWER | {"value": "Other."}]},
        "messages[1]: both 'content' and 'value' hold a text",
    ),
    "two turns in a row": (
        {"messages": [ASK, ANSWER, OTHER]},
        "messages[2].role: two assistant messages in a row",
    ),
    "two questions in a row": (
        {"messages": [ASK, ASK, ANSWER]},
        "messages[1].role: two user messages in a row",
    ),
    "empty answer": (
        {"messages": [ASK, {"role": "assistant", "content": ""}, ASK, ANSWER]},
        "messages[1].content: the answer is empty",
    ),
    "other flag": (
        {"messages": [ASK, OTHER, ASK, {"role": "assistant", "content": "a", "loss": False}]},
        "messages[3].loss: this says whether the turn is trained",
    ),
    "lines": ({"question": "q", "answer": ["a", "b"]}, "output: expected a string, got list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_neighbour_is_refused_with_settings_that_work(name: str, write_rows: Write) -> None:
    """What cannot be guessed is refused by name, and each setting that the message prints makes the row trainable."""
    row, expected = REFUSED[name]
    path = write_rows([row])
    message = refusal(path)
    assert message.startswith(f"{path}:1: {expected}")
    choices = offered(message)
    assert choices
    for choice in choices:
        if "weight" not in choice:
            assert outcome(path, **choice).trained or choice.get("format")


@pytest.mark.parametrize(
    "name", ["two answers", "one text", "rendered, other name", "roles", "labels", "lines"]
)
def test_settings_are_printed_for_the_command_line_as_well(name: str, write_rows: Write) -> None:
    """The form for the command line says the same as the one for the file."""
    message = refusal(write_rows([REFUSED[name][0]]))
    first = offered(message)[0]
    arguments = re.findall(r"--(\w+) ('[^']*'|\w+)", message)
    given = list(
        itertools.chain.from_iterable((f"--{key}", value.strip("'")) for key, value in arguments)
    )
    overrides = parse_overrides(given)
    assert {key: overrides[key] for key in first} == first


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {
                "messages": [
                    ASK,
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "a", "train_detail": [1]}],
                    },
                ]
            },
            "messages[1].content[0].train_detail: parts of a turn cannot be trained",
        ),
        (
            {"messages": [ASK, ANSWER | {"train_detail": [{"begin_offset": 0, "train": False}]}]},
            "messages[1].train_detail: parts of a turn cannot be trained",
        ),
        (
            {
                "messages": [
                    ASK,
                    ANSWER
                    | {"train": True, "content": [{"type": "text", "text": "a", "train": False}]},
                ]
            },
            "messages[1].content[0]: parts of a turn cannot be trained",
        ),
        (
            {"messages": [ASK | {"images": ["x"]}, ANSWER]},
            "messages[0].images: this turn comes with images",
        ),
        (
            {"messages": [ASK | {"tools": [{"name": "f"}]}, ANSWER]},
            "messages[0].tools: tools of a single turn",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, ASK, ANSWER], "system": "b"},
            "system: the column and the conversation's own system turn say different things",
        ),
        ({"role": "user", "content": "a"}, "these are the turns of one conversation, not rows"),
        (
            {"messages": {"role": ["user", "assistant"], "content": ["q"]}},
            "messages: lists of different lengths (role: 2, content: 1)",
        ),
    ],
)
def test_what_no_setting_can_mend_is_refused_by_name(
    row: Any, message: str, write_rows: Write
) -> None:
    """Flags of parts, media and tools of single turns, and contradictions have a message of their own."""
    path = write_rows([row])
    assert refusal(path).startswith(f"{path}:1: {message}")


def test_flags_of_other_turns_are_kept(write_rows: Write) -> None:
    """A user turn that the data asks to train is told apart from one of which it says nothing."""
    path = write_rows(
        [{"messages": [ASK | {"train": True}, ANSWER]}, {"messages": [ASK | {"weight": 1}, ANSWER]}]
    )
    path = write_rows(
        [
            *map(json.loads, path.read_text().splitlines()),
            {"messages": [ASK, ANSWER | {"train": True}]},
        ]
    )
    data = DataSettings([DatasetSource(str(path))])
    asked, weighed, plain = iter_examples(data.datasets[0], data, RejectLog(data))
    assert (asked.train, asked.asks_to_train_others) == ((True, True), 0)
    assert (weighed.train, weighed.asks_to_train_others) == ((True, True), 0)
    assert (plain.train, plain.asks_to_train_others) == ((), None)


def test_merged_turns(write_rows: Write) -> None:
    """`merge` joins turns in a row by a blank line, and refuses by name where something would be lost or moved."""
    call = {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}
    path = write_rows([{"messages": [ASK, ASK, ANSWER, OTHER]}])
    result = outcome(path, consecutive_turns="merge")
    assert "Answer.\n\nAnother." in result.trained
    assert "Question?\n\nQuestion?" in result.whole
    assert (
        '"f"'
        in outcome(
            write_rows([{"messages": [ASK, ANSWER, call]}]), consecutive_turns="merge"
        ).trained
    )
    for turns in (
        [call, ANSWER],
        [ANSWER, OTHER | {"train": False}],
        [ANSWER | {"name": "Bo"}, OTHER],
    ):
        message = refusal(write_rows([{"messages": [ASK, *turns]}]), consecutive_turns="merge")
        assert "messages[2]: this turn cannot be merged with the one before" in message


def test_recognised_columns_are_announced_once(write_rows: Write) -> None:
    """What was read under another name, what was not read, and nothing else, is said, each in one line."""
    rows: list[dict[str, Any]] = [{"question": "q", "answer": "a", "id": 1}] * 3
    rows.append({"question": "q", "answer": "a", "context": "late"})
    path = write_rows(rows)
    result = outcome(path)
    assert result.log.recognised == {
        str(path): {"instruction": "question", "output": "answer", "input": "context"}
    }
    assert result.log.lines() == [
        f"{path}: columns read as ours: question -> instruction, answer -> output, context -> input",
        f"{path}: columns not used: id",
    ]
    assert "late" in result.whole
    assert outcome(write_rows([{"instruction": "q", "output": "a"}])).log.lines() == []


def test_later_rows_do_not_change_what_columns_mean(write_rows: Write) -> None:
    """A file whose later rows hold the question under another name is no file of one format."""
    path = write_rows([{"question": "q", "answer": "a"}, {"query": "q", "response": "a"}])
    assert refusal(path).startswith(
        f"{path}:2: instruction: the column is missing (found: query, response)."
    )


def test_settings_that_name_nothing_are_refused(write_rows: Write) -> None:
    """A listed column that no row has, and names that are not ours, are errors instead of being passed over."""
    path = write_rows([{"instruction": "q", "output": "a"}])
    assert "columns: no row has a column 'outptu'. Fix: did you mean 'output'?" in refusal(
        path, columns=["instruction", "output", "outptu"]
    )
    assert "message_mapping: 'contents' is no name of ours" in refusal(
        path, message_mapping={"contents": "x"}
    )
    assert "role_mapping: 'bot' is no name of ours" in refusal(path, role_mapping={"bot": "x"})
    path = write_rows([{"messages": [ASK, ANSWER | {"trained": False}, ASK, ANSWER]}])
    assert (
        f"{path}: message_mapping: no turn has 'trianed'. Fix: did you mean 'trained'?"
        in refusal(path, message_mapping={"train": "trianed"})
    )
    assert "role_mapping: no turn has 'agent'" in refusal(
        path, role_mapping={"user": ["user", "agent"]}
    )
    assert outcome(path, message_mapping={"train": "trained"}).trained.count("Answer.") == 1


def test_several_columns_in_one(write_rows: Write) -> None:
    """A list of columns in `column_mapping` joins their texts by blank lines; lists of lines are joined by newlines."""
    path = write_rows([{"a": "One", "b": None, "c": ["Two", "Three"], "d": "Four"}])
    result = outcome(path, column_mapping={"instruction": "d", "output": ["a", "b", "c"]})
    assert "One\n\nTwo\nThree" in result.trained
    message = refusal(path, column_mapping={"messages": ["a", "b"]})
    assert (
        "column_mapping: 'messages' is given a list of columns. Fix: name one column; only"
        in message
    )
