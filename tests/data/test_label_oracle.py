"""The oracle itself: it accepts right labels written out by hand and finds every deliberate mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.data.label_oracle import Conversation, find_faults, trained_texts
from tests.data.template_tokenizers import tokenizer_for

MESSAGES = [
    {"role": "user", "content": "umark hi"},
    {"role": "assistant", "content": "one final"},
    {"role": "user", "content": "umark again"},
    {"role": "assistant", "content": "three"},
]

# name -> pieces of the training text, (text, is it trained)
RIGHT: dict[str, list[tuple[str, bool]]] = {
    "llama3": [
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\numark hi<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("one final<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\numark again<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("three<|eot_id|>", True),
    ],
    "phi3": [
        ("<|user|>\numark hi<|end|>\n<|assistant|>\n", False),
        ("one final<|end|>", True),
        ("\n<|user|>\numark again<|end|>\n<|assistant|>\n", False),
        ("three<|end|>", True),
        ("\n<|endoftext|>", False),
    ],
    "glm4moe": [
        ("[gMASK]<sop><|user|>\numark hi<|assistant|>\n<think></think>\n", False),
        ("one final<|user|>", True),
        ("\numark again<|assistant|>\n<think></think>\n", False),
        ("three<|user|>", True),
    ],
    "cohere2": [],
}


def row_from(name: str, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    tokenizer = tokenizer_for(name)
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if trained else [-100] * len(tokens)
    return ids, labels


def faults(name: str, pieces: list[tuple[str, bool]]) -> list[str]:
    return find_faults(Conversation(tokenizer_for(name), MESSAGES), [row_from(name, pieces)], foreign=["umark"])


@pytest.mark.parametrize("name", ["llama3", "phi3", "glm4moe"])
def test_right_labels_pass(name: str) -> None:
    """Labels written out by hand are accepted, so the oracle does not simply reject everything."""
    assert faults(name, RIGHT[name]) == []
    assert trained_texts(tokenizer_for(name), row_from(name, RIGHT[name])) == [t for t, on in RIGHT[name] if on]


def change(position: int, text: str, trained: bool) -> Callable[[list[tuple[str, bool]]], list[tuple[str, bool]]]:
    def apply(pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
        return [*pieces[:position], (text, trained), *pieces[position + 1 :]]

    return apply


LLAMA_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
MISTAKES = {
    "header trained": change(1, LLAMA_HEADER, True),
    "user text trained": change(0, RIGHT["llama3"][0][0], True),
    "second user text trained": change(3, RIGHT["llama3"][3][0], True),
    "a turn not trained": change(5, "three<|eot_id|>", False),
    "terminator not trained": lambda pieces: [*pieces[:5], ("three", True), ("<|eot_id|>", False)],
    "terminator missing": change(5, "three", True),
    "terminator twice": change(5, "three<|eot_id|><|eot_id|>", True),
    "first word not trained": lambda pieces: [*pieces[:2], ("one", False), (" final<|eot_id|>", True), *pieces[3:]],
    "hole in the answer": lambda pieces: [
        *pieces[:2],
        ("one", True),
        (" ", False),
        ("final<|eot_id|>", True),
        *pieces[3:],
    ],
    "another answer": change(5, "four<|eot_id|>", True),
    "BOS twice": change(0, "<|begin_of_text|>" + RIGHT["llama3"][0][0], False),
    "padding trained": lambda pieces: [*pieces, ("<|finetune_right_pad_id|>", True)],
    "nothing trained": lambda pieces: [(text, False) for text, _ in pieces],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_labels_are_found(mistake: str) -> None:
    """Every way of being wrong that the contract names makes the oracle complain."""
    assert faults("llama3", MISTAKES[mistake](RIGHT["llama3"])) != []


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_labels_are_found(shift: int) -> None:
    """Labels shifted by one position (the model shifts them itself) are wrong, trained ids copied or not."""
    ids, labels = row_from("llama3", RIGHT["llama3"])
    conversation = Conversation(tokenizer_for("llama3"), MESSAGES)
    moved = labels[-shift:] + labels[:-shift]
    assert find_faults(conversation, [(ids, moved)]) != []
    copied = [token if label != -100 else -100 for token, label in zip(ids, moved, strict=True)]
    assert find_faults(conversation, [(ids, copied)]) != []


def test_trailing_newline_and_final_eos_are_found() -> None:
    """What a template writes after the terminator is not the model's to write."""
    pieces = RIGHT["phi3"]
    assert faults("phi3", [*pieces[:3], ("three<|end|>\n", True), ("<|endoftext|>", False)]) != []
    assert faults("phi3", [*pieces[:4], ("\n<|endoftext|>", True)]) != []


def test_an_empty_reasoning_block_counts_only_where_it_is_masked() -> None:
    """`empty_think` decides on which side of the block the span starts; the other side is a fault."""
    messages = MESSAGES[:2]
    head = ("<|im_start|>user\numark hi<|im_end|>\n<|im_start|>assistant\n", False)
    tail = ("\n", False)
    block = "<think>\n\n</think>\n\n"
    masked = row_from("qwen3", [head, (block, False), ("one final<|im_end|>", True), tail])
    trained = row_from("qwen3", [head, (block + "one final<|im_end|>", True), tail])
    for row, mode, right in [
        (masked, "mask", True),
        (trained, "mask", False),
        (masked, "train", False),
        (trained, "train", True),
    ]:
        found = find_faults(Conversation(tokenizer_for("qwen3"), messages, empty_think=mode), [row])
        assert (found == []) is right


def test_half_a_terminator_is_found() -> None:
    """Where two tokens end a turn, both are trained."""
    conversation = Conversation(tokenizer_for("cohere2"), MESSAGES[:2])
    text = conversation.render(MESSAGES[:2])
    head = text[: text.index("one final")]
    half = [(head, False), ("one final<|END_RESPONSE|>", True), ("<|END_OF_TURN_TOKEN|>", False)]
    whole = [(head, False), ("one final<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", True)]
    assert find_faults(conversation, [row_from("cohere2", half)]) != []
    assert find_faults(conversation, [row_from("cohere2", whole)]) == []


def test_a_turn_trained_twice_or_in_foreign_ids_is_found() -> None:
    """Each turn is trained once over all rows, and ids are the tokenizer's own."""
    tokenizer = tokenizer_for("llama3")
    row = row_from("llama3", RIGHT["llama3"])
    assert find_faults(Conversation(tokenizer, MESSAGES), [row, row]) != []
    assert find_faults(Conversation(tokenizer, MESSAGES, None), [row], hostile=True) == []
    letters = [("one fi", True), ("nal<|eot_id|>", True)]
    split = row_from("llama3", [*RIGHT["llama3"][:2], *letters, *RIGHT["llama3"][3:]])
    assert find_faults(Conversation(tokenizer, MESSAGES), [split]) != []


def test_a_template_that_drops_the_content_is_found() -> None:
    """Idefics3 given a string renders no text at all; training on that is a fault."""
    conversation = Conversation(tokenizer_for("idefics3"), MESSAGES[:2])
    pieces = [
        ("<|begin_of_text|>User: <end_of_utterance>\nAssistant:", False),
        (" <end_of_utterance>", True),
        ("\n", False),
    ]
    assert any("drops the content" in fault for fault in find_faults(conversation, [row_from("idefics3", pieces)]))
