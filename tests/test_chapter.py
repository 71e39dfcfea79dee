"""The chapter's names: its text byte for byte, its shapes, its numbers, the named deviations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_recipes.chapter import (
    ChatDataset,
    ChatMessage,
    DataQualityAnalyzer,
    InstructionExample,
    ResponseOnlyCollator,
    SFTEvaluator,
    SupervisedFineTuningDataset,
    create_sft_dataloader,
    detect_format_overfitting,
    evaluate_quality,
)
from sft_recipes.errors import InputError
from sft_recipes.evaluation import generation
from tests.data.template_tokenizers import build_tokenizer

HAIKU = InstructionExample(
    instruction="Write a haiku about programming",
    output="Code flows like water\nDebugging through the long night\nSoftware born at dawn",
)
FRENCH = InstructionExample(
    instruction="Translate the following text to French",
    input="Hello, how are you?",
    output="Bonjour, comment allez-vous ?",
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A base model's tokenizer: no chat template.

    EOS also serves as padding, as in many base models.
    """
    made = build_tokenizer("", None, "</s>", "</s>")
    made.chat_template = None
    return made


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Iterator[LlamaForCausalLM]:
    threads = torch.get_num_threads()
    # A model this small only loses time to threads, much of it on a busy machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    yield LlamaForCausalLM(config)
    torch.set_num_threads(threads)


def test_instruction_format_is_the_chapters() -> None:
    """The chapter's two layouts, byte for byte; an empty input counts as none."""
    assert HAIKU.format_for_training() == (
        "### Instruction:\nWrite a haiku about programming\n\n### Response:\n"
        "Code flows like water\nDebugging through the long night\nSoftware born at dawn"
    )
    assert FRENCH.format_for_training() == (
        "### Instruction:\nTranslate the following text to French\n\n"
        "### Input:\nHello, how are you?\n\n"
        "### Response:\nBonjour, comment allez-vous ?"
    )
    assert (
        InstructionExample("a", "").format_for_training()
        == "### Instruction:\na\n\n### Response:\n"
    )


def test_chat_format_is_the_chapters() -> None:
    """Role headers, contents and one closing <|end|>, byte for byte."""
    messages = [
        ChatMessage(
            "system", "You are a helpful AI assistant that provides clear and accurate information."
        ),
        ChatMessage("user", "What's the capital of France?"),
        ChatMessage("assistant", "The capital of France is Paris."),
    ]
    assert ChatDataset.format_conversation(messages) == (
        "<|system|>\nYou are a helpful AI assistant that provides clear and accurate information.\n"
        "<|user|>\nWhat's the capital of France?\n"
        "<|assistant|>\nThe capital of France is Paris.\n<|end|>"
    )
    assert ChatDataset.format_conversation([]) == "<|end|>"


def test_unknown_roles_are_refused() -> None:
    """The chapter drops such a message silently; here its index and role are named."""
    with pytest.raises(InputError, match=r"messages\[1\]\.role: unknown role 'bot'"):
        ChatDataset.format_conversation([ChatMessage("user", "a"), ChatMessage("bot", "b")])


@pytest.mark.parametrize("example", [HAIKU, FRENCH])
def test_dataset_rows(tokenizer: PreTrainedTokenizerFast, example: InstructionExample) -> None:
    """The chapter's text plus EOS, padded to max_length; exactly the answer and EOS are trained."""
    row = SupervisedFineTuningDataset([example], tokenizer, max_length=256)[0]
    assert set(row) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.shape == (256,) and tensor.dtype == torch.long for tensor in row.values())
    length = int(row["attention_mask"].sum())
    assert row["attention_mask"].tolist() == [1] * length + [0] * (256 - length)
    assert tokenizer.decode(row["input_ids"][:length]) == example.format_for_training() + "</s>"
    assert tokenizer.decode(row["labels"][row["labels"] != -100]) == example.output + "</s>"
    assert (row["labels"][length:] == -100).all()


def test_training_on_a_row_reaches_eos_though_eos_is_the_padding_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Padding is told from EOS by position, so EOS keeps its label.

    The caller's tokenizer is left as it was.
    """
    row = SupervisedFineTuningDataset([HAIKU], tokenizer, max_length=256)[0]
    assert (row["labels"] == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.chat_template is None
    assert tokenizer.pad_token == "</s>"


def test_markers_inside_the_answer_do_not_move_the_labels(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The chapter searches for `### Response:`.

    An instruction that contains it would have trained the prompt.
    """
    example = InstructionExample("Repeat: ### Response:\nno", output="### Response:\nyes")
    labels = SupervisedFineTuningDataset([example], tokenizer, max_length=256)[0]["labels"]
    assert tokenizer.decode(labels[labels != -100]) == "### Response:\nyes</s>"


def test_rows_that_do_not_fit_or_answer_nothing_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A long answer is not cut and an empty one not trained: both are named by index."""
    length = int(SupervisedFineTuningDataset([HAIKU], tokenizer)[0]["attention_mask"].sum())
    assert len(SupervisedFineTuningDataset([HAIKU], tokenizer, max_length=length)) == 1
    with pytest.raises(InputError, match=rf"examples\[1\].*max_length \(now {length - 1}\)"):
        SupervisedFineTuningDataset(
            [InstructionExample("a", output="b"), HAIKU], tokenizer, max_length=length - 1
        )
    with pytest.raises(InputError, match=r"examples\[0\]: output: it has no words"):
        SupervisedFineTuningDataset([InstructionExample("a")], tokenizer)


def test_dataloader(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    """The chapter's shapes; every example once per epoch; a model takes the batch as it is."""
    examples = [InstructionExample(f"say {index}", output=str(index)) for index in range(6)]
    batches = list(create_sft_dataloader(examples, tokenizer, batch_size=4, max_length=64))
    assert [batch["input_ids"].shape for batch in batches] == [(4, 64), (2, 64)]
    answers = []
    for batch in batches:
        answers += [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert sorted(answers) == [f"{index}</s>" for index in range(6)]
    assert torch.isfinite(model(**batches[0]).loss)


def test_collator_is_trls() -> None:
    """On rows with labels, the response-only collator returns what TRL's own collator returns."""
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [7, 0, 9], "labels": [-100, 0, 9]},
    ]
    ours = ResponseOnlyCollator(pad_token_id=0)(rows)
    theirs = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        assert torch.equal(tensor, ours[key])


def test_quality_analyzer() -> None:
    """The chapter's three analyses on numbers that can be counted by hand."""
    examples = [InstructionExample("one two three", output="a b")] * 6 + [
        InstructionExample("x", output="c d e f")
    ] * 2
    analyzer = DataQualityAnalyzer(examples)
    assert analyzer.analyze_length_distribution() == {
        "avg_instruction_length": 20 / 8,
        "avg_output_length": 20 / 8,
        "max_instruction_length": 3,
        "max_output_length": 4,
    }
    assert analyzer.detect_repetitive_patterns() == {
        "repetitive_instructions": ["one two three"],
        "repetitive_outputs": ["a b"],
    }
    assert analyzer.diversity_score() == 2 / 8


def test_repetition_needs_more_than_five_and_compares_twenty_characters() -> None:
    """Five equal openings are not reported, six are.

    What differs after character 20 counts as equal.
    """
    opening = "abcdefghijklmnopqrst"
    five = [InstructionExample(opening + str(index), output=str(index)) for index in range(5)]
    assert DataQualityAnalyzer(five).detect_repetitive_patterns()["repetitive_instructions"] == []
    six = [*five, InstructionExample(opening, output="z")]
    assert DataQualityAnalyzer(six).detect_repetitive_patterns()["repetitive_instructions"] == [
        opening
    ]


def test_no_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    """Zero examples have no mean: an error says so where the chapter divides by zero."""
    with pytest.raises(InputError, match="no examples"):
        DataQualityAnalyzer([])
    with pytest.raises(InputError, match="no examples"):
        SFTEvaluator(None, tokenizer).evaluate_instruction_following([])
    with pytest.raises(InputError, match="no examples"):
        SupervisedFineTuningDataset([], tokenizer)


class Answers:
    """Stands in for `generate`: answers by prompt text, and keeps what it was asked."""

    def __init__(self, by_prompt: dict[str, str]) -> None:
        self.by_prompt = by_prompt
        self.asked: list[dict[str, Any]] = []

    def __call__(
        self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **options: Any
    ) -> list[generation.Generation]:
        self.asked.append(options)
        texts = [self.by_prompt[tokenizer.decode(list(prompt))] for prompt in prompts]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [
            generation.Generation(each, text, "eos") for each, text in zip(ids, texts, strict=True)
        ]


def test_instruction_following_known_answers(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Length ratio, keyword coverage and format score of given answers, as the chapter has them."""
    answers = Answers(
        {
            "### Instruction:\nName a River\n\n### Response:\n": "A river: Rhine ",
            "### Instruction:\nSum\n\n### Input:\n1 2\n\n### Response:\n": "### Response: 3",
            "### Instruction:\nSay nothing\n\n### Response:\n": "  ",
        }
    )
    monkeypatch.setattr(generation, "generate", answers)
    examples = [
        InstructionExample("Name a River", output="Rhine Main"),
        InstructionExample("Sum", input="1 2", output="3"),
        InstructionExample("Say nothing"),
    ]
    scores = SFTEvaluator(None, tokenizer).evaluate_instruction_following(examples)
    assert scores == {
        "avg_length_ratio": pytest.approx((3 / 2 + 3 / 1 + 0 / 1) / 3),
        "completion_rate": pytest.approx((2 / 3 + 0 + 0) / 3),
        "format_adherence": pytest.approx((1.0 + 0.5 + 0.0) / 3),
    }
    assert [asked["max_new_tokens"] for asked in answers.asked] == [150]
    assert answers.asked[0]["stop_ids"] == (tokenizer.eos_token_id,)


def test_an_instruction_without_words_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """There is no share of zero keywords."""
    with pytest.raises(InputError, match=r"examples\[1\]: instruction: it has no words"):
        SFTEvaluator(None, tokenizer).evaluate_instruction_following(
            [HAIKU, InstructionExample(" ")]
        )


def test_evaluate_quality_shows_five(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chapter's keys for the first five examples, at most 100 tokens each."""
    examples = [InstructionExample(f"n {index}", output=str(index)) for index in range(7)]
    answers = Answers(
        {example.format_prompt(): f" answer {example.output} " for example in examples}
    )
    monkeypatch.setattr(generation, "generate", answers)
    results = evaluate_quality(None, tokenizer, examples)
    assert list(results) == [f"example_{index}" for index in range(5)]
    assert results["example_3"] == {"instruction": "n 3", "expected": "3", "generated": "answer 3"}
    assert answers.asked[0]["max_new_tokens"] == 100


def test_format_overfitting_known_answers(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than twice as long with the format, or `###` without it.

    Exactly twice as long is not reported.
    """
    answers = {"long": ("12345", "12"), "twice": ("1234", "12"), "leak": ("1", "### Response:")}
    by_prompt = {
        f"### Instruction:\n{name}\n\n### Response:\n": pair[0] for name, pair in answers.items()
    }
    monkeypatch.setattr(
        generation,
        "generate",
        Answers(by_prompt | {name: pair[1] for name, pair in answers.items()}),
    )
    assert detect_format_overfitting(None, tokenizer, list(answers)) == {
        "overfitting_indicators": [
            {
                "prompt": "long",
                "formatted_response_length": 5,
                "unformatted_response_length": 2,
                "format_leaked": False,
            },
            {
                "prompt": "leak",
                "formatted_response_length": 1,
                "unformatted_response_length": 13,
                "format_leaked": True,
            },
        ]
    }


def test_a_real_model_answers(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    """The whole path runs on a model, twice with the same numbers, and leaves it in training."""
    model.train()
    evaluator = SFTEvaluator(model, tokenizer)
    scores = evaluator.evaluate_instruction_following([HAIKU, FRENCH])
    assert set(scores) == {"avg_length_ratio", "completion_rate", "format_adherence"}
    assert scores == evaluator.evaluate_instruction_following([HAIKU, FRENCH])
    assert set(detect_format_overfitting(model, tokenizer, ["Name a river"])) == {
        "overfitting_indicators"
    }
    assert model.training


def test_importing_the_chapter_imports_no_torch() -> None:
    """The names are exported at the top of the package, so importing them must stay cheap."""
    code = (
        "import sys, sft_recipes.chapter\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
