"""Labels of a dozen templates, written out by hand: the full text of each row and the text that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import LabelledBatch, Labeller
from sft_recipes.data.template_checks import check_template
from sft_recipes.errors import CheckFailed, InputError
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.label_oracle import decode, trained_texts
from tests.data.template_tokenizers import build_tokenizer, tokenizer_for

PLAIN: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
REASONED: list[dict[str, Any]] = [PLAIN[0], {**PLAIN[1], "reasoning_content": "R1"}, *PLAIN[2:]]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOL_USE: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": "18 C"},
    {"role": "assistant", "content": "Mild"},
]
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "W", "parameters": {}}}
]

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# template -> (text of the one row, trained spans)
ONE_ROW: dict[str, tuple[str, list[str]]] = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nCiao<|eot_id|>",
        ["Hello<|eot_id|>", "Ciao<|eot_id|>"],
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nCiao<end_of_turn>\n",
        ["Hello<end_of_turn>", "Ciao<end_of_turn>"],
    ),
    "qwen2_5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>\n",
        ["Hello<|im_end|>", "Ciao<|im_end|>"],
    ),
    "phi3": (
        "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\nCiao<|end|>\n"
        "<|endoftext|>",
        ["Hello<|end|>", "Ciao<|end|>"],
    ),
    "deepseek_r1_distill": (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>Hello<｜end▁of▁sentence｜>"
        "<｜User｜>Bye<｜Assistant｜>Ciao<｜end▁of▁sentence｜>",
        ["Hello<｜end▁of▁sentence｜>", "Ciao<｜end▁of▁sentence｜>"],
    ),
    "glm4moe": (
        "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think></think>\nHello<|user|>\nBye<|assistant|>\n"
        "<think></think>\nCiao<|user|>",
        ["Hello<|user|>", "Ciao<|user|>"],
    ),
}

# our own templates on a plain base tokenizer (bos <s>, eos </s>)
SHIPPED: dict[str, tuple[str, list[str]]] = {
    "instruction": (
        "### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\nCiao</s>",
        ["Hello</s>", "Ciao</s>"],
    ),
    "chapter_chat": (
        "<|user|>\nHi\n<|assistant|>\nHello</s>\n<|user|>\nBye\n<|assistant|>\nCiao</s>\n",
        ["Hello</s>", "Ciao</s>"],
    ),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\nCiao</s>",
        ["Hello</s>", "Ciao</s>"],
    ),
}

# our own templates on a tokenizer with the tokens that they need
SHIPPED_WITH_TOKENS: dict[str, tuple[str, str, list[str]]] = {
    "chatml": (
        "<|im_start|><|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao<|im_end|>\n",
        ["Hello<|im_end|>", "Ciao<|im_end|>"],
    ),
    "llama3": (
        "<|start_header_id|><|end_header_id|><|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nCiao<|eot_id|>",
        ["Hello<|eot_id|>", "Ciao<|eot_id|>"],
    ),
    "gemma": (
        "<start_of_turn><end_of_turn>",
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nCiao<end_of_turn>\n",
        ["Hello<end_of_turn>", "Ciao<end_of_turn>"],
    ),
}


def label(
    tokenizer: Any, messages: list[dict[str, Any]], template: str | None = None, **settings: Any
) -> LabelledBatch:
    renderer = attach_chat_template(tokenizer, TemplateSettings(chat_template=template))
    settings = {"max_length": None, **settings}
    tools = TOOLS if messages is TOOL_USE else None
    return Labeller(renderer, LabelSettings(**settings)).label(
        [Example(messages, "hand", 0, tools=tools)]
    )


def read(tokenizer: Any, batch: LabelledBatch) -> list[tuple[str, list[str]]]:
    """(text, trained spans) of each row; nothing was dropped and every label is its input id."""
    assert batch.dropped == []
    for row in batch.rows:
        assert all(
            label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True)
        )
        assert (
            row.input_ids
            == tokenizer(decode(tokenizer, row.input_ids), add_special_tokens=False)["input_ids"]
        )
    return [
        (decode(tokenizer, row.input_ids), trained_texts(tokenizer, (row.input_ids, row.labels)))
        for row in batch.rows
    ]


def trained(name: str, messages: list[dict[str, Any]], **settings: Any) -> list[list[str]]:
    tokenizer = tokenizer_for(name)
    return [texts for _, texts in read(tokenizer, label(tokenizer, messages, **settings))]


@pytest.mark.parametrize("name", ONE_ROW)
def test_two_turns_in_one_row(name: str) -> None:
    """Both answers are trained in one row, each through its terminator and no further."""
    tokenizer = tokenizer_for(name)
    assert read(tokenizer, label(tokenizer, PLAIN)) == [ONE_ROW[name]]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_plain_text_templates(name: str) -> None:
    """Our templates for base models: the chapter's text, EOS after each answer and trained, no new token."""
    tokenizer = build_tokenizer("", None, "</s>", "<pad>")
    size = len(tokenizer)
    assert read(tokenizer, label(tokenizer, PLAIN, template=name)) == [SHIPPED[name]]
    assert len(tokenizer) == size


@pytest.mark.parametrize("name", SHIPPED_WITH_TOKENS)
def test_shipped_templates_with_tokens(name: str) -> None:
    """Templates that need tokens of the vocabulary: each answer ends in the one that becomes EOS."""
    tokens, text, answers = SHIPPED_WITH_TOKENS[name]
    tokenizer = build_tokenizer(tokens, None, "<|endoftext|>", "<pad>")
    assert read(tokenizer, label(tokenizer, PLAIN, template=name)) == [(text, answers)]
    assert answers[0] == f"Hello{tokenizer.eos_token}"


def test_mistral_style(tmp_path: Path) -> None:
    """No generation prompt at all beyond [/INST]; the space before the answer is the model's to write."""
    path = tmp_path / "mistral.jinja"
    path.write_text(MISTRAL, encoding="utf-8")
    tokenizer = build_tokenizer(MISTRAL, "<s>", "</s>", "<unk>")
    expected = [
        ("<s>[INST] Hi [/INST] Hello</s>[INST] Bye [/INST] Ciao</s>", [" Hello</s>", " Ciao</s>"])
    ]
    assert read(tokenizer, label(tokenizer, PLAIN, template=str(path))) == expected


def test_a_template_without_terminator_is_refused() -> None:
    """Old Vicuna style ends turns with a space only: the run is refused and the message says what would go wrong."""
    tokenizer = build_tokenizer(VICUNA, "<s>", "</s>", "<unk>")
    with pytest.raises(CheckFailed, match="would not learn to stop"):
        label(tokenizer, PLAIN)


def test_qwen3_history_expand() -> None:
    """Qwen3 strips earlier reasoning, so each turn becomes a row in which it is the last; the empty block is masked."""
    tokenizer = tokenizer_for("qwen3")
    head = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    first = "<think>\nR1\n</think>\n\nHello<|im_end|>"
    second = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert read(tokenizer, label(tokenizer, REASONED, history="expand")) == [
        (head + first + "\n", [first]),
        (head + "Hello<|im_end|>\n" + second + "Ciao<|im_end|>\n", ["Ciao<|im_end|>"]),
    ]


def test_qwen3_history_mask() -> None:
    """`history: mask` leaves the turn that renders differently untrained, and counts it."""
    tokenizer = tokenizer_for("qwen3")
    batch = label(tokenizer, REASONED, history="mask")
    assert [texts for _, texts in read(tokenizer, batch)] == [["Ciao<|im_end|>"]]
    assert batch.masked_turns == 1


def test_qwen3_empty_think_train() -> None:
    """`empty_think: train` teaches exactly the empty block; reasoning that is there is trained either way."""
    assert trained("qwen3", REASONED, empty_think="train") == [
        ["<think>\nR1\n</think>\n\nHello<|im_end|>"],
        ["<think>\n\n</think>\n\nCiao<|im_end|>"],
    ]


def test_glm_empty_think_train() -> None:
    """GLM's block, with the line breaks around it, is what stands between its generation prompt and the answer."""
    texts = ["\n<think></think>\nHello<|user|>", "\n<think></think>\nCiao<|user|>"]
    assert trained("glm4moe", PLAIN, empty_think="train") == [texts]


def test_glm_role_token_is_a_stop_id() -> None:
    """The role token that ends a turn also ends generation."""
    tokenizer = tokenizer_for("glm4moe")
    renderer = attach_chat_template(tokenizer, TemplateSettings())
    assert tokenizer.convert_tokens_to_ids("<|user|>") in renderer.stop_ids


def test_gptoss_channels_and_return() -> None:
    """The channel header is the model's to write, and every trained answer ends in <|return|>, as when served."""
    final = "<|channel|>final<|message|>"
    analysis = "<|channel|>analysis<|message|>R1<|end|><|start|>assistant"
    assert trained("gptoss", REASONED) == [
        [f"{analysis}{final}Hello<|return|>"],
        [f"{final}Ciao<|return|>"],
    ]
    assert trained("gptoss", PLAIN, history="mask") == [[f"{final}Ciao<|return|>"]]


def test_gptoss_history_in_context_ends_in_end() -> None:
    """The earlier answer stands in the second row's prompt with <|end|>, untrained."""
    tokenizer = tokenizer_for("gptoss")
    _, (text, _) = read(tokenizer, label(tokenizer, PLAIN))
    assert (
        "<|start|>assistant<|channel|>final<|message|>Hello<|end|><|start|>user<|message|>Bye<|end|>"
        in text
    )


@pytest.mark.parametrize(
    ("name", "call", "answer"),
    [
        (
            "qwen2_5",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "Mild<|im_end|>",
        ),
        (
            "llama3_1",
            '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>',
            "Mild<|eot_id|>",
        ),
        (
            "qwen3",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "Mild<|im_end|>",
        ),
        (
            "gptoss",
            ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
            "<|channel|>final<|message|>Mild<|return|>",
        ),
        (
            "glm4moe",
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
            "<|observation|>",
            "Mild<|user|>",
        ),
        (
            "gemma4",
            '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|><|tool_response>',
            "Mild<turn|>",
        ),
    ],
)
def test_tool_calls(name: str, call: str, answer: str) -> None:
    """The whole call is trained with its own terminator; the tool's result is not."""
    texts = [text for row in trained(name, TOOL_USE) for text in row]
    assert [text.lstrip("\n") for text in texts] == [call, answer]


def test_train_on() -> None:
    """`last_assistant` trains the last answer only, `all` every position of the row."""
    assert trained("llama3", PLAIN, train_on="last_assistant") == [["Ciao<|eot_id|>"]]
    (row,) = label(tokenizer_for("llama3"), PLAIN, train_on="all").rows
    assert row.labels == row.input_ids


def test_a_turn_the_data_does_not_allow_is_not_trained() -> None:
    """`train: false` on a message masks that turn and leaves the others."""
    tokenizer = tokenizer_for("llama3")
    renderer = attach_chat_template(tokenizer, TemplateSettings())
    example = Example(PLAIN, "hand", 0, train=(False, False, False, True))
    batch = Labeller(renderer, LabelSettings()).label([example])
    assert [texts for _, texts in read(tokenizer, batch)] == [["Ciao<|eot_id|>"]]


@pytest.mark.parametrize(
    ("overlength", "rows"), [("drop", []), ("truncate", [["Hello<|eot_id|>"]])]
)
def test_an_answer_is_never_cut(overlength: str, rows: list[list[str]]) -> None:
    """One token too many: the row goes, or its whole last turn does; no answer is ever shortened."""
    tokenizer = tokenizer_for("llama3")
    (full,) = label(tokenizer, PLAIN).rows
    batch = label(
        tokenizer_for("llama3"), PLAIN, max_length=len(full.input_ids) - 1, overlength=overlength
    )
    assert [trained_texts(tokenizer, (row.input_ids, row.labels)) for row in batch.rows] == rows
    assert len(batch.dropped) == (1 if overlength == "drop" else 0)


def test_a_call_that_the_template_leaves_out_is_not_trained_as_an_empty_answer() -> None:
    """A template that ignores tool calls would render the turn as nothing but its end: such a turn is dropped."""
    ignores_calls = (
        "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
    )
    tokenizer = tokenizer_for("qwen2_5")
    tokenizer.chat_template = ignores_calls
    labeller = Labeller(attach_chat_template(tokenizer, TemplateSettings()), LabelSettings())
    batch = labeller.label([Example(TOOL_USE, "rows", 0, tools=TOOLS)])
    assert [row.turns for row in batch.rows] == [(3,)]
    assert [(lost.reason, lost.detail[:11]) for lost in batch.dropped] == [
        ("unverified", "messages[1]")
    ]


def test_inline_reasoning_is_trained_as_the_models_own() -> None:
    """`<think>` written into the content gives the same ids as reasoning in its own field: the model's own tokens,
    not their spelling as text; a user's `<think>` stays text.
    """
    labeller = Labeller(
        attach_chat_template(tokenizer_for("qwen3"), TemplateSettings()), LabelSettings()
    )
    user = {"role": "user", "content": "What does <think> mean?"}
    inline = {"role": "assistant", "content": "<think>\nIt is a tag.\n</think>\n\nA tag."}
    apart = {"role": "assistant", "content": "A tag.", "reasoning_content": "It is a tag."}
    rows = labeller.label(
        [Example([user, inline], "rows", 0), Example([user, apart], "rows", 1)]
    ).rows
    assert rows[0].input_ids == rows[1].input_ids and rows[0].labels == rows[1].labels
    think = labeller.renderer.tokenizer.convert_tokens_to_ids("<think>")
    assert rows[0].labels.count(think) == rows[0].input_ids.count(think) == 1


SYSTEM_WHILE_ASKED = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}"
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_an_answer_stands_behind_the_prompt_that_a_server_makes() -> None:
    """Mistral writes the system message only while a question waits for its answer: it is in every row all the same."""
    tokenizer = tokenizer_for("llama3")
    tokenizer.chat_template = SYSTEM_WHILE_ASKED
    labeller = Labeller(attach_chat_template(tokenizer, TemplateSettings()), LabelSettings())
    system = {"role": "system", "content": "Be brief."}
    batch = labeller.label([Example([system, *PLAIN], "hand", 0)])
    assert not batch.dropped
    for row in batch.rows:
        (turn,) = row.turns
        prompt = labeller.renderer.prompt_ids([system, *PLAIN][:turn])
        assert row.input_ids[: len(prompt)] == prompt and "Be brief." in tokenizer.decode(prompt)
        start, end = row.spans[0]
        assert start == len(prompt) and end == len(row.ids)
        assert (
            tokenizer.decode(row.input_ids[start:])
            == [system, *PLAIN][turn]["content"] + tokenizer.eos_token
        )
    checks = check_template(labeller, [Example([system, *PLAIN], "hand", 0)])
    assert [check for check in checks if check.outcome == "failed"] == []


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_a_text_that_is_too_long_for_certain_is_not_tokenized_whole(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million words only the beginning is tokenized; the row is dropped, cut or refused like any over-long one."""
    tokenizer = tokenizer_for("llama3")
    labeller = Labeller(
        attach_chat_template(tokenizer, TemplateSettings()),
        LabelSettings(max_length=64, overlength=policy),
    )
    encoded: list[int] = []
    real = labeller.renderer.encoder.encode

    def counting(rows: Any) -> Any:
        encoded.extend(len(segment) for row in rows for segment in row.segments)
        return real(rows)

    monkeypatch.setattr(labeller.renderer.encoder, "encode", counting)
    huge = [
        *PLAIN[:2],
        {"role": "user", "content": "More?"},
        {"role": "assistant", "content": "word " * 1_000_000},
    ]
    if policy == "error":
        with pytest.raises(InputError, match=r"about .* tokens, max_length is 64"):
            labeller.label([Example(huge, "hand", 0)])
    else:
        batch = labeller.label([Example(huge, "hand", 0)])
        assert [row.turns for row in batch.rows] == ([(1,)] if policy == "truncate" else [])
        assert [row.reason for row in batch.dropped] == (
            [] if policy == "truncate" else ["overlength"]
        )
        lost = sum(row.trained_tokens for row in batch.dropped) + sum(
            row.lost_tokens for row in batch.rows
        )
        whole = len(tokenizer("word " * 100_000, add_special_tokens=False)["input_ids"]) * 10
        assert 0.8 * whole < lost < 1.2 * whole
    assert sum(encoded) < 2_000_000
