"""The oracle itself: it accepts right labels written out by hand and finds every deliberate mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.data.label_oracle import (
    Conversation,
    Reference,
    find_faults,
    judge,
    trained_texts,
    turn_truth,
)
from tests.data.template_tokenizers import (
    IDENTITIES,
    build_metaspace_tokenizer,
    build_tokenizer,
    tokenizer_for,
)
from tests.data.template_variants import LLAMA3_FIRST, LLAMA3_FLAGGED

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
    return find_faults(
        Conversation(tokenizer_for(name), MESSAGES), [row_from(name, pieces)], foreign=["umark"]
    )


@pytest.mark.parametrize("name", ["llama3", "phi3", "glm4moe"])
def test_right_labels_pass(name: str) -> None:
    """Labels written out by hand are accepted, so the oracle does not simply reject everything."""
    assert faults(name, RIGHT[name]) == []
    assert trained_texts(tokenizer_for(name), row_from(name, RIGHT[name])) == [
        t for t, on in RIGHT[name] if on
    ]


def change(
    position: int, text: str, trained: bool
) -> Callable[[list[tuple[str, bool]]], list[tuple[str, bool]]]:
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
    "first word not trained": lambda pieces: [
        *pieces[:2],
        ("one", False),
        (" final<|eot_id|>", True),
        *pieces[3:],
    ],
    "hole in the answer": lambda pieces: [
        *pieces[:2],
        ("one", True),
        (" ", False),
        ("final<|eot_id|>", True),
        *pieces[3:],
    ],
    "another answer": change(5, "four<|eot_id|>", True),
    "BOS twice": change(0, "<|begin_of_text|>" + RIGHT["llama3"][0][0], False),
    "BOS missing": change(0, RIGHT["llama3"][0][0].removeprefix("<|begin_of_text|>"), False),
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
    assert find_faults(Conversation(tokenizer, MESSAGES), [row]) == []
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
    assert any(
        "drops the content" in fault
        for fault in find_faults(conversation, [row_from("idefics3", pieces)])
    )


SECTION_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '### ' + message.role + ':\n' + message.content -}}"
    "{{- (eos_token if message.role == 'assistant' else '') + '\n\n' -}}"
    "{%- endfor -%}"
    "{{- '### assistant:\n' if add_generation_prompt -}}"
)
ASKED = [{"role": "user", "content": "umark list"}]


def joint_rows(tokenizer: object, answer: str) -> dict[str, tuple[list[int], list[int]]]:
    """Rows of an answer that begins with line breaks: with the ids a server makes, and wrong in the ways one can be."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]

    conversation = Conversation(tokenizer, [*ASKED, {"role": "assistant", "content": answer}])
    truth = turn_truth(conversation, 1)
    end = "</s>"
    after = encode("a" + truth.text[truth.end :])[1:]
    prompt = encode(truth.prompt)
    # The answer goes on after a letter, which none of its tokens joins.
    goes_on = encode("a" + answer + end)[1:]
    bare = encode("a" + answer.lstrip() + end)[1:]
    whole = encode(truth.text)
    shared = next(
        i for i, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]
    )

    def row(head: list[int], trained: list[int], tail: list[int]) -> tuple[list[int], list[int]]:
        return [*head, *trained, *tail], [*[-100] * len(head), *trained, *[-100] * len(tail)]

    return {
        "right": row(prompt, goes_on, after),
        "joined": row(whole[:shared], whole[shared : len(whole) - len(after)], after),
        "joined, the joint untrained": row(
            whole[: shared + 1], whole[shared + 1 : len(whole) - len(after)], after
        ),
        "line breaks lost": row(prompt, bare, after),
        "encoded as the beginning of a text": row(prompt, encode(answer + end), after),
    }


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_an_answer_that_begins_with_line_breaks_has_the_ids_a_server_makes(kind: str) -> None:
    """Those of the prompt, then those of the answer: no token joins the two, nothing is lost, and no space is put
    before the answer, as a tokenizer of the SentencePiece kind does at the beginning of a text.
    """
    tokenizer = build_tokenizer(SECTION_TEMPLATE, "<s>", "</s>", "<pad>")
    if kind == "metaspace":
        tokenizer = build_metaspace_tokenizer(SECTION_TEMPLATE)
    answer = "\n\nDone. maybe"
    conversation = Conversation(tokenizer, [*ASKED, {"role": "assistant", "content": answer}])
    rows = joint_rows(tokenizer, answer)
    assert find_faults(conversation, [rows.pop("right")], foreign=["umark"]) == []
    for name, row in rows.items():
        is_the_same = name.startswith("encoded") and kind == "byte level"
        assert bool(find_faults(conversation, [row])) is not is_the_same, name


FIRST_LLAMA3_ROW = [
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\numark hi<|eot_id|>", False),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
    ("one final<|eot_id|>", True),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
]


@pytest.mark.parametrize("knows_the_original", [False, True])
def test_a_header_that_follows_the_answer_is_not_its_end(knows_the_original: bool) -> None:
    """Where a template always writes the next header, its first token looks like a part of the terminator."""
    tokenizer = build_tokenizer(LLAMA3_FIRST, *IDENTITIES["llama3"])
    original = build_tokenizer(LLAMA3_FLAGGED, *IDENTITIES["llama3"])
    reference = Reference(original, str, always_opens=True) if knows_the_original else None
    conversation = Conversation(tokenizer, MESSAGES[:2], reference=reference)
    wrong = [
        *FIRST_LLAMA3_ROW[:2],
        ("one final<|eot_id|><|start_header_id|>", True),
        ("assistant<|end_header_id|>\n\n", False),
    ]
    assert find_faults(conversation, [row_from("llama3", FIRST_LLAMA3_ROW)]) == []
    assert find_faults(conversation, [row_from("llama3", wrong)]) != []


def test_bos_stands_as_often_as_the_template_writes_it() -> None:
    """A template that writes BOS before every question has it several times; one less or one more is a fault."""
    template = (
        "{%- for message in messages -%}"
        "{{- bos_token + 'user: ' + message.content + '\n' if message.role == 'user' -}}"
        "{{- message.content + eos_token if message.role == 'assistant' -}}"
        "{%- endfor -%}"
    )
    tokenizer = build_tokenizer(template, "<s>", "</s>", "<pad>")

    def row(between: str) -> tuple[list[int], list[int]]:
        pieces = [
            ("<s>user: umark hi\n", False),
            ("one final</s>", True),
            (between + "user: umark again\n", False),
            ("three</s>", True),
        ]
        ids: list[int] = []
        labels: list[int] = []
        for text, trained in pieces:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if trained else [-100] * len(tokens)
        return ids, labels

    conversation = Conversation(tokenizer, MESSAGES)
    assert find_faults(conversation, [row("<s>")]) == []
    assert find_faults(conversation, [row("")]) != []
    assert find_faults(conversation, [row("<s><s>")]) != []


def test_a_row_ends_with_its_last_trained_turn() -> None:
    """What follows the last trained turn in the conversation is not part of the row."""
    conversation = Conversation(tokenizer_for("llama3"), MESSAGES)
    pieces = RIGHT["llama3"]
    alone = row_from("llama3", pieces[:3])
    longer = row_from("llama3", [*pieces[:5], (pieces[5][0], False)])
    assert find_faults(conversation, [alone], turns=[1]) == []
    assert find_faults(conversation, [longer], turns=[1]) != []


def test_spelled_control_tokens_have_the_ids_of_text() -> None:
    """A control token in the text of a message stays text; its id there is a fault."""
    tokenizer = tokenizer_for("llama3")
    messages = [
        {"role": "user", "content": "umark <|eot_id|> hi"},
        {"role": "assistant", "content": "one"},
    ]
    conversation = Conversation(tokenizer, messages)
    ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
    naive = tokenizer.apply_chat_template(messages, return_dict=False)
    trained = len(tokenizer("one<|eot_id|>", add_special_tokens=False)["input_ids"])

    def row(ids: list[int]) -> tuple[list[int], list[int]]:
        return ids, [*[-100] * (len(ids) - trained), *ids[-trained:]]

    assert find_faults(conversation, [row(ids)]) == []
    assert find_faults(conversation, [row(naive)]) != []


def test_turns_that_vanish_are_found() -> None:
    """A turn that is neither trained nor dropped with a reason is a fault; dropped without need is told apart."""
    conversation = Conversation(tokenizer_for("llama3"), MESSAGES)
    row = row_from("llama3", RIGHT["llama3"][:3])
    silent = judge(conversation, [row], [])
    spoken = judge(conversation, [row], ["token_boundary: a token joins the two"])
    assert silent.wrong != []
    assert (spoken.wrong, spoken.excused) == ([], [])
    assert spoken.needless == ["turn 3 (token_boundary: a token joins the two)"]
