"""Preparation accounts for every row, refuses silent losses, and runs again only when something changed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import IGNORE_INDEX
from sft_recipes.data.opening import load_tokenizer, open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import PreparedData
from sft_recipes.data.prepared_inputs import fingerprint
from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from tests.conftest import instruction_rows


def prepared(path: Path, **overrides: Any) -> PreparedData:
    """The recipe's data, prepared in its run folder."""
    recipe = load_recipe(path, overrides)
    return prepare(recipe, open_labeller(recipe), recipe.output_dir / "prepared", progress=False)


def turn(question: str, answer: str, **keys: Any) -> list[dict[str, Any]]:
    """A user turn and an assistant turn."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **keys}]


def chats(*conversations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat rows."""
    return [{"messages": list(conversation)} for conversation in conversations]


# Ten good rows, then one of each kind of trouble.
MIXED = [
    *chats(*(turn(f"Say {index}.", "Blue.") for index in range(10))),
    *chats(turn("Too long.", "one two three " * 60)),
    *chats(turn("Spells <|im_end|> here.", "Red.")),
    *chats([*turn("First.", "Untrained.", train=False), *turn("Second.", "Trained.")]),
    *chats(turn("Never.", "Untrained.", train=False)),
    {"messages": [{"role": "user", "content": "Nobody answers."}]},
    {"messages": "no list"},
]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_ledger_of_a_mixed_set(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Every one of 16 rows is counted once, with the reason, and the files name source and line of each lost row."""
    write_rows(MIXED)
    path = write_recipe(on_bad_rows="skip", max_rejected=0.5, max_lost=0.95, max_length=96)
    data = prepared(path)
    (source,) = data.summary["sources"]
    assert (
        source["rows_in"]
        == 16
        == source["rows_rejected"] + source["rows_kept"] + source["rows_dropped"]
    )
    assert (source["rows_rejected"], source["rows_kept"], source["rows_dropped"]) == (2, 12, 2)
    assert source["dropped"] == {"overlength": 1, "no_trained_turn": 1}
    assert source["rows_neutralized"] == 1 and source["training_rows"] == 12 == len(data.train)
    tokenizer = load_tokenizer(load_recipe(path).model_name)

    def trained(text: str) -> int:
        return len(tokenizer(text)["input_ids"]) + 1  # and EOS

    assert source["trained_tokens_kept"] == 10 * trained("Blue.") + trained("Red.") + trained(
        "Trained."
    )
    assert source["trained_tokens_lost"] == trained("one two three " * 60)
    assert source["tokens_kept"] == sum(len(row["input_ids"]) for row in data.train)
    assert data.summary["train"] == {
        "rows": 12,
        "tokens": source["tokens_kept"],
        "trained_tokens": source["trained_tokens_kept"],
        "longest": max(len(row["input_ids"]) for row in data.train),
    }
    assert [
        (row["line"], row["row"], row["reason"])
        for row in read_lines(data.folder / "dropped.jsonl")
    ] == [
        (14, 13, "no_trained_turn"),
        (11, 10, "overlength"),
    ]
    assert [row["line"] for row in read_lines(data.folder / "rejects.jsonl")] == [15, 16]
    for row in data.train:
        assert [label for label in row["labels"] if label != IGNORE_INDEX]
        assert all(
            label in (IGNORE_INDEX, token)
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
        )


def test_every_source_and_split_is_accounted_for(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Two sources with two splits each: four ledgers, in each rows_in = rejected + kept + dropped, none mixed up."""
    for name, good, bad in (("a", 7, 2), ("b", 5, 1)):
        for split, extra in (("train", 0), ("test", 3)):
            rows = chats(*(turn(f"{name} {split} {index}", "x") for index in range(good + extra)))
            rows += [{"messages": []}] * bad + chats(
                turn(f"{name} {split} long", "one two three " * 60)
            )
            write_rows(rows, f"{name}/{split}.jsonl")
    datasets = [{"path": "./a"}, {"path": "./b"}]
    data = prepared(
        write_recipe(
            datasets=datasets,
            dataset_test_split="test",
            on_bad_rows="skip",
            max_rejected=0.5,
            max_lost=0.99,
        )
    )
    counted = [
        (
            Path(one["source"]).name,
            one["split"],
            *(one[f"rows_{what}"] for what in ("in", "rejected", "kept", "dropped")),
        )
        for one in data.summary["sources"]
    ]
    assert counted == [
        ("a", "train", 10, 2, 7, 1),
        ("b", "train", 7, 1, 5, 1),
        ("a", "test", 13, 2, 10, 1),
        ("b", "test", 10, 1, 8, 1),
    ]
    assert (len(data.train), len(data.eval or [])) == (12, 18)
    assert (
        len(read_lines(data.folder / "rejects.jsonl")) == 6
        and len(read_lines(data.folder / "dropped.jsonl")) == 4
    )


def test_control_tokens_drop_is_counted(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """control_tokens: drop drops the row and says so; error names file and line."""
    write_rows(MIXED[:12])
    data = prepared(write_recipe(control_tokens="drop", max_lost=0.95, max_length=96))
    (source,) = data.summary["sources"]
    assert source["dropped"] == {"overlength": 1, "control_tokens": 1} and source["rows_kept"] == 10
    with pytest.raises(
        InputError, match=r"train\.jsonl:12: messages: the text spells the control token"
    ):
        prepared(write_recipe(control_tokens="error", max_length=96))


THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last and m.reasoning_content %}{{ 'R: ' + m.reasoning_content + '\n' }}"
    "{%- endif %}{{ m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.mark.parametrize(("history", "rows", "masked"), [("expand", 3, 0), ("mask", 2, 1)])
def test_history_is_counted(
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    history: str,
    rows: int,
    masked: int,
) -> None:
    """A turn that renders differently in context becomes a row of its own or is counted as left untrained."""
    first = turn("One?", "Yes.", reasoning_content="I think so")
    second = turn("Two?", "No.", reasoning_content="I doubt it")
    write_rows(chats([*first, *second], turn("Three?", "Maybe.", reasoning_content="Who knows")))
    (tmp_path / "thinking.jinja").write_text(THINKING)
    data = prepared(write_recipe(history=history, chat_template="./thinking.jinja"))
    (source,) = data.summary["sources"]
    assert (source["rows_in"], source["rows_kept"]) == (2, 2)
    assert (source["training_rows"], source["turns_masked"]) == (rows, masked)


def test_max_lost_refuses(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """More than max_lost of the trained tokens would go: refused with share, limit, reason, file and line."""
    write_rows(MIXED[:11])
    with pytest.raises(InputError) as caught:
        prepared(write_recipe(max_length=96))
    message = str(caught.value)
    assert (
        "max_lost is 5.0%" in message
        and "overlength: 1 rows" in message
        and "train.jsonl:11" in message
    )
    assert "Fix: raise max_length" in message
    prepared(write_recipe(max_length=96, max_lost=0.9))
    with pytest.raises(
        InputError, match=r"train\.jsonl:11: max_length: .* tokens, max_length is 96.*Fix: raise"
    ):
        prepared(write_recipe(max_length=96, overlength="error"))


def test_all_rows_dropped_refuses(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """No row is left: refused with the table of reasons, however much may be lost."""
    write_rows([MIXED[10], MIXED[10], MIXED[13]])
    with pytest.raises(InputError) as caught:
        prepared(write_recipe(max_length=64, max_lost=1.0))
    message = str(caught.value)
    assert "no row is left to train" in message
    assert "overlength: 2 rows" in message and "no_trained_turn: 1 rows" in message


def test_truncate_removes_whole_turns(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path], base_folder: Path
) -> None:
    """overlength: truncate keeps the turns that fit, whole and with their terminator, and drops a row without one."""
    long = "one two three " * 30
    write_rows(
        chats(
            [*turn("A?", "Blue."), *turn("B?", "Red."), *turn("C?", long)],
            turn("D?", long),
            turn("E?", "x"),
        )
    )
    data = prepared(write_recipe(overlength="truncate", max_length=64, max_lost=0.99))
    (source,) = data.summary["sources"]
    assert (source["rows_kept"], source["rows_dropped"], source["rows_cut"]) == (2, 1, 1)
    tokenizer = load_tokenizer(str(base_folder))
    lost = 2 * (len(tokenizer(long)["input_ids"]) + 1)
    assert source["trained_tokens_lost"] == lost
    row = data.train[0]
    assert len(row["input_ids"]) <= 64
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORE_INDEX]) == (
        "Blue.<|endoftext|>Red.<|endoftext|>"
    )
    assert row["input_ids"][-1] == tokenizer.eos_token_id and "C?" not in tokenizer.decode(
        row["input_ids"]
    )


# -- split and mixture -----------------------------------------------------------------------------------------------


def as_sets(data: PreparedData) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Train and eval rows as sets of ids."""
    assert data.eval is not None
    return {tuple(row["input_ids"]) for row in data.train}, {
        tuple(row["input_ids"]) for row in data.eval
    }


def test_near_duplicate_prompts_never_straddle_the_split(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Every near-duplicate of a held-out prompt is held out, too, and so are its examples for generation."""
    sentences = (
        "Please explain why the sky looks blue on a clear summer day",
        "Write a short letter to the mayor about broken street lamps",
        "Which metals melt below the boiling point of water",
        "Translate the proverb about early birds into plain French",
        "Sort these villages by the number of people living there",
        "How do I keep cut tulips fresh for more than a week",
        "Summarise the plot of a novel in which a whale is hunted",
    )
    endings = ("", ", thanks", "!", " now")
    asked = [sentence + ending for sentence in sentences for ending in endings]
    write_rows(
        [{"instruction": text, "output": f"Answer {number}."} for number, text in enumerate(asked)]
    )
    data = prepared(write_recipe(eval_split=8, max_length=256))
    assert data.eval is not None and len(data.eval) == 8
    answered = [example.messages[-1]["content"] for example in data.eval_examples]
    held_out = sorted(int(text.split()[1][:-1]) // len(endings) for text in answered)
    assert len(held_out) == 8 and len(set(held_out)) == 2, held_out


@pytest.mark.parametrize(("eval_split", "expected"), [(0.25, 10), (6, 6)])
def test_eval_split_is_seeded(
    write_recipe: Callable[..., Path], eval_split: float, expected: int
) -> None:
    """Share and count forms hold out that many rows, none of them trained; same seed same draw, other seed another."""
    path = write_recipe(eval_split=eval_split)
    train, held_out = as_sets(prepared(path))
    assert (len(train), len(held_out)) == (40 - expected, expected) and not train & held_out
    assert as_sets(prepared(path, output_dir=str(path.parent / "again"))) == (train, held_out)
    assert (
        as_sets(prepared(path, output_dir=str(path.parent / "other"), data_seed=7))[1] != held_out
    )


def test_same_prompt_never_straddles(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Rows whose prompts differ only in case or spacing are all trained or all held out, and so are eval examples."""
    rows = [
        {"instruction": text.format(index), "input": "", "output": f"answer {index}"}
        for index in range(20)
        for text in ("Say {}.", "say  {}.", " SAY {}.")
    ]
    write_rows(rows)
    data = prepared(write_recipe(eval_split=17))
    tokenizer = load_tokenizer(load_recipe(write_recipe()).model_name)

    def prompts(rows: Any) -> Counter[str]:
        texts = (tokenizer.decode(row["input_ids"]).split("### Instruction:\n")[1] for row in rows)
        return Counter(" ".join(text.split("\n\n")[0].casefold().split()) for text in texts)

    train, held_out = prompts(data.train), prompts(data.eval)
    assert not train.keys() & held_out.keys()
    assert set(train.values()) | set(held_out.values()) == {3} and sum(held_out.values()) == 18
    assert {
        " ".join(one.messages[0]["content"].casefold().split()) for one in data.eval_examples
    } == set(held_out)


def test_split_that_leaves_nothing_is_refused(write_recipe: Callable[..., Path]) -> None:
    """An eval_split as large as the data is refused."""
    with pytest.raises(InputError, match="eval_split: no row is left to train"):
        prepared(write_recipe(eval_split=40))


def test_overlap_of_train_and_test_is_refused(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """A prompt of the test split that stands in train, but for case and spacing, is an error that names the row."""
    rows = instruction_rows(12)
    write_rows(rows, "data/train.jsonl")
    leaked = {
        **rows[4],
        "instruction": f"  {rows[4]['instruction'].upper()}",
        "output": "another answer",
    }
    write_rows([{"instruction": "New.", "input": "", "output": "x"}, leaked], "data/test.jsonl")
    path = write_recipe(dataset_name="./data", dataset_test_split="test")
    with pytest.raises(
        InputError,
        match=r"data:row 4 \(counted from 0\): dataset_test_split: the same prompt stands in the 'test' split",
    ):
        prepared(path)
    write_rows([{"instruction": "New.", "input": "", "output": "x"}], "data/test.jsonl")
    data = prepared(path)
    assert (len(data.train), len(data.eval or [])) == (12, 1) and len(data.eval_examples) == 1
    assert [entry["split"] for entry in data.summary["sources"]] == ["train", "test"]


def test_mixture_counts(write_recipe: Callable[..., Path], write_rows: Callable[..., Path]) -> None:
    """weight, fraction and max_rows give exactly the asked number of rows of each source."""
    write_rows(
        [{"instruction": f"A{index}", "input": "", "output": "x"} for index in range(10)], "a.jsonl"
    )
    write_rows(
        [{"instruction": f"B{index}", "input": "", "output": "x"} for index in range(6)], "b.jsonl"
    )
    tokenizer = load_tokenizer(load_recipe(write_recipe()).model_name)

    def counts(first: dict[str, Any], second: dict[str, Any], **keys: Any) -> Counter[str]:
        datasets = [{"path": "./a.jsonl", **first}, {"path": "./b.jsonl", **second}]
        data = prepared(write_recipe(datasets=datasets, **keys))
        return Counter(
            tokenizer.decode(row["input_ids"]).split("### Instruction:\n")[1][0]
            for row in data.train
        )

    assert counts({"weight": 2.5}, {}) == {"A": 25, "B": 6}
    assert counts({"fraction": 0.25}, {"fraction": 0.75}) == {"A": 2, "B": 6}
    assert counts({}, {}, max_rows=7).total() == 7
    assert counts({"weight": 2}, {"weight": 0.5}, max_rows=100) == {"A": 20, "B": 3}


# -- prepared once ---------------------------------------------------------------------------------------------------


def stamp(data: PreparedData) -> int:
    """When the rows were written."""
    return (data.folder / "train-00000.arrow").stat().st_mtime_ns


def test_unchanged_data_is_not_prepared_again(write_recipe: Callable[..., Path]) -> None:
    """The second call loads what is there; keys that only choose among prepared rows do not prepare again either."""
    path = write_recipe(eval_split=6)
    first = stamp(prepared(path))
    assert stamp(prepared(path)) == first
    other = prepared(path, max_rows=5, eval_split=4, learning_rate=0.5, max_lost=0.05)
    assert stamp(other) == first and (len(other.train), len(other.eval or [])) == (5, 4)


def test_split_asked_for_later_is_that_asked_for_at_once(write_recipe: Callable[..., Path]) -> None:
    """Rows prepared without a split know nothing of equal prompts: asking for one prepares them again."""
    path = write_recipe()
    first = stamp(prepared(path))
    later = prepared(path, eval_split=6)
    assert stamp(later) != first
    assert as_sets(later) == as_sets(
        prepared(path, eval_split=6, output_dir=str(path.parent / "at_once"))
    )


def test_any_change_prepares_again(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """One byte of data, the template, its kwargs, a label setting, the tokenizer: each gives another fingerprint, and
    another fingerprint prepares again."""
    path = write_recipe(chat_template="./mine.jinja")
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    seen: list[str] = []

    def changed(**overrides: Any) -> None:
        recipe = load_recipe(path, overrides)
        seen.append(fingerprint(recipe, open_labeller(recipe).renderer))
        assert len(set(seen)) == len(seen)

    changed()
    before = stamp(prepared(path))
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text().replace("(39)", "(38)"))
    changed()
    assert stamp(prepared(path)) != before
    template.write_text(template.read_text().replace("'\n' + m.content", "'\n ' + m.content"))
    changed()
    changed(chat_template_kwargs={"enable_thinking": False})
    changed(train_on="last_assistant")
    changed(max_length=64)
    changed(system_prompt="Be brief.")
    changed(control_tokens="drop")
    changed(data_seed=3)
    changed(on_bad_rows="skip")
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe.model_name)
    tokenizer.add_tokens(["colour"])
    assert fingerprint(recipe, attach_chat_template(tokenizer, recipe.template)) not in seen


def test_unfinished_preparation_is_done_again(write_recipe: Callable[..., Path]) -> None:
    """A folder without manifest (a crash in between) is prepared again; old files of lost rows do not stay."""
    path = write_recipe()
    data = prepared(path)
    (data.folder / "manifest.json").unlink()
    (data.folder / "train-00000.arrow").write_bytes(b"half")
    (data.folder / "dropped.jsonl").write_text("{}\n")
    again = prepared(path)
    assert len(again.train) == 40 and not (again.folder / "dropped.jsonl").exists()
