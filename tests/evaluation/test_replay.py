"""`replay`: which prompts are asked, which answers are written, and what trains on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.evaluation import replay
from sft_recipes.evaluation.answering import Answered
from sft_recipes.evaluation.generation import Generation
from sft_recipes.evaluation.replay import Replay, ReplayRequest, write_replay

Write = Callable[..., Replay]


def prompts_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {number}?"} for number in range(count)]


@pytest.fixture
def written_by(base_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Write:
    """Ask for a replay whose answers are made by a function of the question."""

    def write(
        prompts: Path,
        say: Callable[[str], str] = lambda question: f"About {question}",
        **options: Any,
    ) -> Replay:
        def answer(model: Any, renderer: Any, examples: Any, **settings: Any) -> Answered:
            asked = real(model, renderer, examples, **{**settings, "max_new_tokens": 1})
            generations = []
            for example in examples:
                text = say(example.messages[-2]["content"])
                reason = "length" if text.endswith("...") else "eos"
                generations.append(Generation([1], text, reason))
            return Answered(asked.scorer, examples, asked.references, generations)

        real = replay.answer
        settings = {"rows": 4, "output": tmp_path / "replay.jsonl", "max_new_tokens": 8} | options
        with monkeypatch.context() as patch:
            patch.setattr(replay, "answer", answer)
            return write_replay(
                ReplayRequest(str(base_folder), str(prompts), **settings), progress=False
            )

    return write


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_hold_question_answer_and_where_they_come_from(
    written_by: Write, write_rows: Callable[..., Path], tmp_path: Path, base_folder: Path
) -> None:
    """A seeded draw of the prompts, each a row of messages with source, model and decoding."""
    prompts = write_rows(prompts_of(9), "prompts.jsonl")
    written = written_by(prompts)
    rows = rows_of(written.output)
    assert len(rows) == 4
    for row in rows:
        question, answer = row["messages"]
        assert answer == {"role": "assistant", "content": f"About {question['content']}"}
        line = int(row["source"].rpartition(":")[2])
        assert question == {"role": "user", "content": f"Question {line - 1}?"}
        assert row["model"] == str(base_folder)
        assert row["decoding"] == "greedy, at most 8 new tokens, torch.float32"
    again = written_by(prompts, output=tmp_path / "again.jsonl")
    assert again.output.read_bytes() == written.output.read_bytes()
    other = written_by(prompts, output=tmp_path / "other.jsonl", options={"data_seed": 1})
    assert rows_of(other.output) != rows
    assert not list(tmp_path.glob("*.unfinished"))


BAD = {
    0: "",
    1: "one two three ...",
    2: "again and " * 60,
    3: "Yes.<|endoftext|>",
    4: "Yes.\n\n### Instruction:\nAnd now?",
}


def test_what_teaches_nothing_good_is_left_out_and_counted(
    written_by: Write, write_rows: Callable[..., Path]
) -> None:
    """Empty, cut, looping answers and those with control tokens or template text; both accounts add
    up to what was read and what was asked."""
    rows = [*prompts_of(9), {"prompt": "question  0?"}, {"prompt": "Q " * 2000}]
    prompts = write_rows(rows, "prompts.jsonl")

    def say(question: str) -> str:
        return BAD.get(int(re.sub(r"\D", "", question)), "Yes.")

    written = written_by(prompts, say, rows=50)
    assert written.read == {"drawn": 10, "with a prompt that was there before": 1}
    assert written.asked == {
        "written": 4,
        "empty": 1,
        "cut at the budget": 1,
        "looping": 1,
        "with control tokens": 1,
        "with text of the template": 1,
        "prompt too long for the model": 1,
    }
    assert len(rows_of(written.output)) == 4
    text = written.as_text("MODEL")
    assert "11 rows read: 10 drawn" in text and "10 prompts asked: " in text
    assert f"init --model MODEL --data DATA --replay {written.output}" in text


SHAPES: dict[str, dict[str, Any]] = {
    "a prompt alone": {"prompt": "Why?"},
    "a question alone": {"question": "Why?", "id": 3},
    "an instruction with an answer": {"instruction": "Why?", "output": "Because."},
    "an empty answer": {"instruction": "Why?", "output": None},
    "turns that end with the user": {
        "tags": [{"kind": "x"}],
        "messages": [{"role": "user", "content": "Why?", "train": False}],
    },
    "turns under other keys": {
        "messages": [{"who": "user", "said": "Why?"}, {"who": "assistant", "said": "So."}]
    },
    "turns of another format": {"conversations": [{"from": "human", "value": "Why?"}]},
    "a prompt of turns": {"prompt": [{"role": "user", "content": "Why?"}]},
    "a longer conversation": {
        "messages": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Because."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "Nothing."},
        ]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_data_set_with_prompts_is_read(
    shape: str, written_by: Write, write_rows: Callable[..., Path]
) -> None:
    """Only the first question is asked, whatever the row says of answers."""
    options = {}
    if shape == "turns under other keys":
        options = {"message_mapping": {"role": "who", "content": "said"}}
    written = written_by(write_rows([SHAPES[shape]], "prompts.jsonl"), options=options)
    (row,) = rows_of(written.output)
    assert [message["content"] for message in row["messages"]] == ["Why?", "About Why?"]


def test_nothing_is_overwritten(written_by: Write, write_rows: Callable[..., Path]) -> None:
    """Neither an earlier file, unless --force is given, nor the prompts, whatever is given."""
    prompts = write_rows(prompts_of(3), "prompts.jsonl")
    written = written_by(prompts)
    written.output.write_text("mine")
    with pytest.raises(InputError, match=r"exists already\. Fix: .*--force"):
        written_by(prompts)
    with pytest.raises(InputError, match="the prompts stand there"):
        written_by(prompts, output=prompts, force=True)
    assert written.output.read_text() == "mine"
    written_by(prompts, force=True)
    assert len(rows_of(written.output)) == 3


def test_a_stopped_replay_goes_on(
    written_by: Write, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """What was answered before Ctrl-C is not asked again; another request is refused by name."""
    prompts = write_rows(prompts_of(6), "prompts.jsonl")
    asked: list[str] = []

    def say(question: str) -> str:
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(question)
        return "Yes."

    with pytest.raises(KeyboardInterrupt):
        written_by(prompts, say, rows=6, batch_size=2)
    assert not (tmp_path / "replay.jsonl").exists()
    with pytest.raises(InputError, match=r"unfinished: holds answers to another request\. Fix: "):
        written_by(prompts, rows=5)
    written = written_by(prompts, lambda question: asked.append(question) or "Yes.", rows=6)
    assert sorted(asked) == [f"Question {number}?" for number in range(6)]
    assert written.asked == {"written": 6}
    assert len(rows_of(written.output)) == 6


def test_no_answer_of_use_is_an_error(written_by: Write, write_rows: Callable[..., Path]) -> None:
    """It says what became of the answers, and writes no file."""
    with pytest.raises(InputError, match=r"3 prompts asked: 3 empty.* Fix: raise --max_new_tokens"):
        written_by(write_rows(prompts_of(3), "prompts.jsonl"), lambda question: " ")


def test_a_real_model_answers(
    base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Without a stand-in answers are the model's own; with none of use nothing is left behind, so
    that the fix works."""
    prompts = write_rows([{"instruction": "Say one.", "output": "x"}], "prompts.jsonl")
    request = ReplayRequest(str(base_folder), str(prompts), 5, tmp_path / "r.jsonl", 4)
    with pytest.raises(InputError, match="1 prompts asked: 1 cut at the budget"):
        write_replay(request, progress=False)
    assert not list(tmp_path.glob("r.jsonl*"))
