"""The names of the chapter "Supervised Fine-tuning (SFT)", on top of this project's own parts.

The two text formats are the chapter's byte for byte. What else differs from the chapter, on purpose:

- Labels follow this project's contract (`data/labels.py`): the chapter leaves padding in the labels, has no EOS, and
  cuts long answers. Here padding and prompt are -100, EOS is appended and trained, a row that does not fit is refused.
- Answers are generated greedily and end at EOS; the chapter samples without a seed.
- Empty input raises InputError where the chapter divides by zero.
- `SFTTrainer` and `LoRASFTTrainer` are not here: TRL's `SFTTrainer` with peft replaces both (`training/`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sft_recipes.data.chat_templates import ChatRenderer, attach_chat_template, begins_with_bos
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import Example, Message
from sft_recipes.recipe import LabelSettings, TemplateSettings

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader


@dataclass(frozen=True, slots=True)
class InstructionExample:
    """One instruction with its answer; `input` is the optional material the instruction is about."""

    instruction: str
    input: str | None = None
    output: str = ""

    def format_for_training(self) -> str:
        """The chapter's text of this example: sections and answer, no EOS (training appends it)."""
        return self.format_prompt() + self.output

    def format_prompt(self) -> str:
        """The text up to and including the `### Response:` line, which is what the model sees when served."""
        material = f"### Input:\n{self.input}\n\n" if self.input else ""
        return f"### Instruction:\n{self.instruction}\n\n{material}### Response:\n"

    def to_message(self) -> Message:
        """The user turn; the instruction template reads `instruction` and `input`, chat templates read `content`."""
        if not self.input:
            return {"role": "user", "content": self.instruction}
        content = f"{self.instruction}\n\n{self.input}"
        return {
            "role": "user",
            "content": content,
            "instruction": self.instruction,
            "input": self.input,
        }


Examples = Sequence[InstructionExample]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message; `role` is system, user or assistant."""

    role: str
    content: str


class ChatDataset:
    """The chapter's chat text. For training use `chat_template: chapter_chat`, which ends each answer with EOS."""

    @staticmethod
    def format_conversation(messages: Sequence[ChatMessage]) -> str:
        """The conversation as text. Unknown roles raise InputError; the chapter leaves such messages out silently."""
        for index, message in enumerate(messages):
            if message.role not in ("system", "user", "assistant"):
                what, fix = f"unknown role {message.role!r}", "use system, user or assistant"
                raise InputError(Problem("conversation", f"messages[{index}].role", what, fix))
        return (
            "".join(f"<|{message.role}|>\n{message.content}\n" for message in messages) + "<|end|>"
        )


class SupervisedFineTuningDataset:
    """Map-style data set for torch's DataLoader: `input_ids`, `attention_mask`, `labels`, each of `(max_length,)`.

    The tokenizer needs no pad token and is left as it is. Raises InputError for no examples, an example without output
    and one longer than `max_length` tokens, which the chapter cuts.
    """

    def __init__(self, examples: Examples, tokenizer: Any, max_length: int = 512) -> None:
        _refuse_empty(examples, "output")
        self.examples, self.tokenizer, self.max_length = examples, tokenizer, max_length
        renderer = instruction_renderer(tokenizer)
        self._collate = ResponseOnlyCollator(renderer.tokenizer.pad_token_id, max_length)
        rows = [
            Example(
                [example.to_message(), {"role": "assistant", "content": example.output}],
                "examples",
                index,
            )
            for index, example in enumerate(examples)
        ]
        batch = Labeller(renderer, LabelSettings(max_length=max_length)).label(rows)
        if batch.dropped:
            fix = f"shorten it or raise max_length (now {max_length})"
            raise InputError(
                [Problem(f"examples[{row.example}]", "", row.detail, fix) for row in batch.dropped]
            )
        self._rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in batch.rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: tensor[0] for key, tensor in self._collate([self._rows[index]]).items()}


def instruction_renderer(tokenizer: Any) -> ChatRenderer:
    """The shipped instruction template on a copy of the tokenizer, so that the caller's keeps its own template."""
    return attach_chat_template(
        copy.deepcopy(tokenizer), TemplateSettings(chat_template="instruction")
    )


def create_sft_dataloader(
    examples: Examples, tokenizer: Any, batch_size: int = 4, max_length: int = 512
) -> DataLoader[dict[str, Tensor]]:
    """A shuffling DataLoader over `SupervisedFineTuningDataset`; tensors are `(batch, max_length)`."""
    from torch.utils.data import DataLoader

    dataset: Any = SupervisedFineTuningDataset(examples, tokenizer, max_length)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True)


@dataclass(frozen=True, slots=True)
class ResponseOnlyCollator:
    """Pads rows of `input_ids` and `labels` to `width`, else to the longest, as TRL's own collator does."""

    pad_token_id: int
    width: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Tensors `input_ids`, `attention_mask`, `labels` of shape `(len(rows), width)`; labels are padded by -100."""
        import torch

        width = self.width or max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            key: torch.tensor([[*row[key], *[fill] * (width - len(row[key]))] for row in masked])
            for key, fill in fills.items()
        }


class DataQualityAnalyzer:
    """The chapter's three analyses; `sft-recipes audit` has the full set. Raises InputError for no examples."""

    def __init__(self, examples: Examples) -> None:
        _refuse_empty(examples)
        self.examples = examples

    def analyze_length_distribution(self) -> dict[str, float]:
        """Mean and maximum number of words of instructions and outputs."""
        parts = ("instruction", "output")
        words = {
            part: [len(getattr(example, part).split()) for example in self.examples]
            for part in parts
        }
        measures: Mapping[str, Callable[[list[int]], float]] = {"avg": fmean, "max": max}
        return {
            f"{name}_{part}_length": of(words[part])
            for name, of in measures.items()
            for part in parts
        }

    def detect_repetitive_patterns(self) -> dict[str, list[str]]:
        """First 20 characters that open more than 5 instructions, or more than 5 outputs."""
        found = {}
        for part in ("instruction", "output"):
            openings = Counter(getattr(example, part)[:20] for example in self.examples)
            found[f"repetitive_{part}s"] = [
                opening for opening, count in openings.items() if count > 5
            ]
        return found

    def diversity_score(self) -> float:
        """Distinct instructions / instructions, in (0, 1]."""
        return len({example.instruction for example in self.examples}) / len(self.examples)


def _refuse_empty(examples: Examples, field: str = "") -> None:
    problems = [
        Problem(f"examples[{index}]", field, "it has no words", "write some or remove the example")
        for index, example in enumerate(examples)
        if field and not getattr(example, field).strip()
    ]
    if problems or not examples:
        raise InputError(problems or Problem("examples", "", "no examples", "pass at least one"))


class SFTEvaluator:
    """The chapter's three scores over generated answers. Answers are greedy, at most 150 tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def evaluate_instruction_following(self, test_examples: Examples) -> dict[str, float]:
        """Means over the examples, by the chapter's definitions.

        - `avg_length_ratio`: words in the answer / words in the reference (at least 1).
        - `completion_rate`: share of the instruction's words that occur in the answer, ignoring case.
        - `format_adherence`: 0 for an empty answer, 0.5 for one that starts with `### `, else 1.

        Raises InputError for no examples, and for an instruction without words (no share of zero words).
        """
        from sft_recipes.evaluation.metrics import (
            chapter_completion,
            chapter_format,
            chapter_length_ratio,
        )

        _refuse_empty(test_examples, "instruction")
        answers = [text.strip() for text in _answer(self.model, self.tokenizer, test_examples, 150)]
        pairs = list(zip(test_examples, answers, strict=True))
        return {
            "avg_length_ratio": fmean(
                chapter_length_ratio(example.output, answer) for example, answer in pairs
            ),
            "completion_rate": fmean(
                chapter_completion(example.instruction, answer) or 0 for example, answer in pairs
            ),
            "format_adherence": fmean(map(chapter_format, answers)),
        }


def evaluate_quality(
    model: Any, tokenizer: Any, test_examples: Examples
) -> dict[str, dict[str, str]]:
    """`example_0` to `example_4`: instruction, expected and generated text (greedy, at most 100 tokens)."""
    shown = test_examples[:5]
    answers = _answer(model, tokenizer, shown, 100)
    return {
        f"example_{index}": {
            "instruction": each.instruction,
            "expected": each.output,
            "generated": answer.strip(),
        }
        for index, (each, answer) in enumerate(zip(shown, answers, strict=True))
    }


def detect_format_overfitting(
    model: Any, tokenizer: Any, test_prompts: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Prompts whose answer depends on the training format: more than twice as long (in characters) with it, or with
    `###` leaking out without it. Greedy, at most 100 tokens.
    """
    examples = [InstructionExample(prompt) for prompt in test_prompts]
    formatted = _answer(model, tokenizer, examples, 100)
    bare = _answer(model, tokenizer, examples, 100, bare=True)
    found = [
        {
            "prompt": prompt,
            "formatted_response_length": len(with_format),
            "unformatted_response_length": len(without),
            "format_leaked": "###" in without,
        }
        for prompt, with_format, without in zip(test_prompts, formatted, bare, strict=True)
        if len(with_format) > 2 * len(without) or "###" in without
    ]
    return {"overfitting_indicators": found}


def _answer(
    model: Any, tokenizer: Any, examples: Examples, new_tokens: int, bare: bool = False
) -> list[str]:
    """Greedy answers to the prompts in the training format, or (`bare`) to the instructions as they stand."""
    from sft_recipes.evaluation.generation import generate

    renderer = instruction_renderer(tokenizer)
    own = renderer.tokenizer
    prompts = [renderer.prompt_ids([example.to_message()]) for example in examples]
    if bare:  # BOS by hand, since a tokenizer's own habit may also append EOS
        bos = [own.bos_token_id] if begins_with_bos(own) else []
        prompts = [
            [*bos, *own(example.instruction, add_special_tokens=False)["input_ids"]]
            for example in examples
        ]
    answers = generate(
        model, own, prompts, stop_ids=renderer.stop_ids, max_new_tokens=new_tokens, batch_size=8
    )
    return [own.decode(answer.ids, skip_special_tokens=True) for answer in answers]
