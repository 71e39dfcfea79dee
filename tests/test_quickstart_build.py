"""The embedded quickstart: its data are what the scripts generate and claim, its base is small and plain."""

import importlib
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = REPOSITORY / "scripts" / "quickstart"
DATA = REPOSITORY / "recipes" / "quickstart" / "data"
BASE = REPOSITORY / "recipes" / "quickstart" / "base"
MODULES = ("tasks", "pretraining_text", "build_data", "build_base")
MARKERS = ("### Instruction:", "### Input:", "### Response:")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The four scripts as modules; their folder leaves `sys.path` and `sys.modules` again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


def read(name: str) -> list[Row]:
    """The rows of one shipped file."""
    return [
        json.loads(line)
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """All shipped rows."""
    return [row for name in ("train", "test", "composition") for row in read(name)]


def prompt_of(row: Row) -> str:
    """The instruction template, written out a second time here on purpose."""
    source = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{source}### Response:\n"


def test_data_files_are_what_the_script_generates(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    """Generation is a function of the seed: a fresh run equals the shipped files byte for byte."""
    scripts["build_data"].main(["--output", str(tmp_path)])
    for name in ("train.jsonl", "test.jsonl", "composition.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_another_seed_gives_other_rows(scripts: dict[str, ModuleType]) -> None:
    """The seed matters."""
    assert scripts["build_data"].generate(1) != scripts["build_data"].generate(2)


def test_too_few_questions_is_an_error(scripts: dict[str, ModuleType]) -> None:
    """A task that cannot give as many different questions as asked for raises instead of looping."""
    with pytest.raises(ValueError, match="ran out of new questions"):
        scripts["tasks"].draw_rows(scripts["tasks"].opposite, 10_000, random.Random(0), set())


def test_no_question_occurs_twice(rows: list[Row]) -> None:
    """(instruction, input) is unique over all three files, so no test or composition row was trained on."""
    questions = [(row["instruction"], row["input"]) for row in rows]
    assert len(set(questions)) == len(questions)


def test_sizes_and_task_types(rows: list[Row]) -> None:
    """2,939, 600 and 100 rows; train and test cover the same ten task types, all but one of them evenly (the opposites
    have too few questions unlike the test's); the composition is in neither.
    """
    train, test, composition = read("train"), read("test"), read("composition")
    assert (len(train), len(test), len(composition)) == (2939, 600, 100)
    types = {row["task_type"] for row in train}
    assert len(types) == 10
    for task_type in types:
        assert sum(row["task_type"] == task_type for row in train) == (
            239 if task_type == "opposite" else 300
        )
        assert sum(row["task_type"] == task_type for row in test) == 60
    assert {row["task_type"] for row in composition} == {"reverse_as_json"}
    assert all(
        list(row) == ["instruction", "input", "output", "task_type", "expected_format"]
        for row in rows
    )


def test_no_training_row_is_close_to_a_held_out_row(scripts: dict[str, ModuleType]) -> None:
    """The audit finds neither a split leak nor contamination; a test row's twin among the training rows is found."""
    held_out = read("test") + read("composition")
    assert scripts["build_data"].leaking_rows(read("train"), held_out) == []
    twin = {**held_out[0], "instruction": held_out[0]["instruction"].upper() + "!"}
    assert scripts["build_data"].leaking_rows([twin], held_out) == [twin]


def recomputed(row: Row) -> str | None:
    """The answer from the question alone, by other code than the generator's; None where it is a matter of facts."""
    items = row["input"].split(", ")
    match row["task_type"]:
        case "bullets":
            return "- " + "\n- ".join(items)
        case "reverse":
            return ", ".join(items[::-1])
        case "sort":
            return ", ".join(sorted(items, key=int))
        case "first_last":
            at_the_end = re.search(r"\b(last|closes)\b", row["instruction"])
            return items[-1] if at_the_end else items[0]
        case "count":
            return f"There are {row['input'].count(',') + 1} items."
        case "numbered":
            return "\n".join(f"{1 + items.index(item)}. {item}" for item in items)
        case _:
            return None


def test_answers_are_right_where_they_follow_from_the_question(rows: list[Row]) -> None:
    """List tasks, counting and sorting: the reference equals an independent computation."""
    checked = 0
    for row in rows:
        answer = recomputed(row)
        if answer is not None:
            assert row["output"] == answer, row
            checked += 1
    assert checked == 6 * 360


def test_json_answers_hold_the_input(rows: list[Row]) -> None:
    """JSON outputs parse, to the list (reversed in the composition) or to the pairs that the input spells."""
    for row in rows:
        if row["task_type"] not in ("json", "reverse_as_json"):
            continue
        value, parts = json.loads(row["output"]), row["input"].split(", ")
        if isinstance(value, dict):
            assert [f"{key}: {entry}" for key, entry in value.items()] == parts, row
        else:
            assert value == (parts if row["task_type"] == "json" else parts[::-1]), row


def test_facts_are_consistent(rows: list[Row]) -> None:
    """Opposites answer about the word asked for and are mutual; a thing is of one kind in all rows."""
    opposite: dict[str, str] = {}
    kind: dict[str, str] = {}
    for row in rows:
        if row["task_type"] == "opposite":
            found = re.fullmatch(r"The opposite of (\w+) is (\w+)\.", row["output"])
            assert found and re.search(rf"\b{found[1]}[?.]$", row["instruction"]), row
            assert opposite.setdefault(found[1], found[2]) == found[2]
        elif row["task_type"] == "category":
            found = re.fullmatch(r"(An?) (\w+) is an? (\w+)\.", row["output"])
            assert found and f"{found[1].lower()} {found[2]}" in row["instruction"], row
            assert (found[1] == "An") == (found[2][0] in "aeiou"), row
            assert kind.setdefault(found[2], found[3]) == found[3]
    assert all(opposite[opposite[word]] == word for word in opposite)
    assert len(opposite) == 80 and len(kind) > 110


def test_polite_sentences_name_the_person_and_the_matter(rows: list[Row]) -> None:
    """The person and the gift, place or occasion of the instruction are those of the sentence."""
    polite = [row for row in rows if row["task_type"] == "polite"]
    for row in polite:
        found = re.fullmatch(r"Dear (\w+), .* (\w+)\.", row["output"])
        assert found and {found[1], found[2]} <= set(re.findall(r"\w+", row["instruction"])), row
    assert len(polite) == 360


def test_expected_format_holds(rows: list[Row]) -> None:
    """Every stated format is met by the reference, and the tasks that have one state it."""
    for row in rows:
        shape = row["expected_format"]
        if shape is None:
            assert row["task_type"] not in ("json", "bullets", "reverse_as_json")
        elif shape["type"] == "json":
            json.loads(row["output"])
        else:
            lines = row["output"].splitlines()
            assert shape == {"type": "bullets", "n": len(lines)}
            assert all(re.fullmatch(r"- \w+", line) for line in lines)


def test_pretraining_text_is_no_instruction_data(
    scripts: dict[str, ModuleType], rows: list[Row]
) -> None:
    """No document holds a special token, a section name of the template, or ends the way an answer does."""
    eos, pad = scripts["build_base"].EOS, scripts["build_base"].PAD
    for document in itertools.islice(scripts["pretraining_text"].documents(3), 5_000):
        assert eos not in document and pad not in document
        assert not any(marker in document for marker in MARKERS), document
        assert document.endswith("\n"), document


def test_pretraining_text_never_shows_the_composition(scripts: dict[str, ModuleType]) -> None:
    """Every JSON list in a document is in the order of the list it stands for, never reversed."""
    seen = 0
    for document in itertools.islice(scripts["pretraining_text"].documents(4), 3_000):
        for text in re.findall(r"^\[.*\]$", document, flags=re.MULTILINE):
            items = json.loads(text)
            assert ", ".join(items) in document, document
            seen += 1
    assert seen > 100


def test_base_is_small_and_plain() -> None:
    """At most 3 M parameters and 8 MB; a Llama with its own EOS and PAD, no BOS and no chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    assert model.config.model_type == "llama"
    assert model.num_parameters() <= 3_000_000
    assert sum(path.stat().st_size for path in BASE.rglob("*")) <= 8_000_000
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|endoftext|>",
        "<|pad|>",
        None,
    )
    assert tokenizer.chat_template is None
    assert model.config.vocab_size == len(tokenizer) <= 1300
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )


def test_shipped_tokenizer_keeps_text_and_words(
    scripts: dict[str, ModuleType], rows: list[Row]
) -> None:
    """Lossless on rows and on unseen text; words are one token each; no token spans prompt and answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    for text in ("Tabs\tand  spaces\r\n\n", "naïve — 東京 🙂", 'x = {"a": [1, 2]}', " leading"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert scripts["build_base"].split_words(tokenizer) == []
    for row in rows:
        prompt, answer = tokenizer.encode(prompt_of(row)), tokenizer.encode(row["output"])
        assert tokenizer.encode(prompt_of(row) + row["output"]) == prompt + answer
        assert tokenizer.decode(prompt + answer) == prompt_of(row) + row["output"]
        assert len(prompt) + len(answer) <= 128 and len(answer) < 48


def test_shipped_tokenizer_is_what_the_script_trains(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    """The tokenizer follows from word lists and documents alone: a fresh one equals the shipped file."""
    scripts["build_base"].train_tokenizer(scripts["build_base"].Plan()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(
        (BASE / "tokenizer.json").read_text()
    )


def continuations(folder: Path, prompts: list[str], tokens: int) -> tuple[list[str], int]:
    """(greedy continuations, how many of them hold an end-of-text token), one prompt at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    texts: list[str] = []
    stops = 0
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        new = out[0, ids.shape[1] :].tolist()
        stops += tokenizer.eos_token_id in new
        texts.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return texts, stops


def test_base_continues_but_does_not_answer() -> None:
    """Before tuning the base does not stop, and none of twenty answers is right: the tuning has something to teach."""
    sample = read("test")[:20]
    texts, stops = continuations(BASE, [prompt_of(row) for row in sample], tokens=32)
    assert stops == 0
    assert not any(text.strip() == row["output"] for text, row in zip(texts, sample, strict=True))


@pytest.mark.slow
def test_reduced_rebuild(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    """A base of another size, built in under a minute: its loss falls, words are whole, it never stops by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = [
        "--steps",
        "150",
        "--hidden",
        "64",
        "--layers",
        "2",
        "--heads",
        "2",
        "--tokens-per-step",
        "1024",
        "--drills",
        "500",
    ]
    losses = scripts["build_base"].main([*size, "--output", str(tmp_path)])
    assert len(losses) == 150
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 1.5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert model.config.hidden_size == 64 and model.config.vocab_size == len(tokenizer)
    assert scripts["build_base"].split_words(tokenizer) == []
    document = next(scripts["pretraining_text"].documents(9))
    assert tokenizer.decode(tokenizer.encode(document)) == document
    _, stops = continuations(tmp_path, [document, "The ", "Items: apple, "], tokens=48)
    assert stops == 0
