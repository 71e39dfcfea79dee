"""The names of the chapter "Supervised Fine-tuning (SFT)", on top of this project's own parts.

The two text formats are the chapter's byte for byte. What else differs, on purpose:

- Labels follow this project's contract (`data/labels.py`): the chapter leaves padding in the
  labels, has no EOS, and cuts long answers. Here padding and prompt are -100, EOS is appended and
  trained, a row that does not fit is refused.
- Answers are generated greedily and end at EOS; the chapter samples without a seed.
- Empty input raises InputError where the chapter divides by zero.
- `SFTTrainer` and `LoRASFTTrainer` are not here: TRL's `SFTTrainer` with peft replaces both
  (`training/`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
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

# The chapter's own limits of generated answers, in tokens, and how many answers it shows.
_SCORED_TOKENS = 150
_SHOWN_TOKENS = 100
_SHOWN_EXAMPLES = 5
# The chapter's limits of a repeated opening.
_OPENING_CHARACTERS = 20
_OPENING_COUNT = 5


@dataclass(frozen=True, slots=True)
class InstructionExample:
    """One instruction with its answer; `input` is the material the instruction is about, if any."""

    instruction: str
    input: str | None = None
    output: str = ""

    def format_for_training(self) -> str:
        """The chapter's text of this example: sections and answer, no EOS (training appends it)."""
        return self.format_prompt() + self.output

    def format_prompt(self) -> str:
        """The text up to and including the `### Response:` line, which the model sees served."""
        material = f"### Input:\n{self.input}\n\n" if self.input else ""
        return f"### Instruction:\n{self.instruction}\n\n{material}### Response:\n"

    def to_message(self) -> Message:
        """The user turn.

        The instruction template reads `instruction` and `input`, chat templates read `content`.
        """
        if not self.input:
            return {"role": "user", "content": self.instruction}
        return {
            "role": "user",
            "content": f"{self.instruction}\n\n{self.input}",
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
    """The chapter's chat text.

    For training use `chat_template: chapter_chat`, which ends each answer with EOS.
    """

    @staticmethod
    def format_conversation(messages: Sequence[ChatMessage]) -> str:
        """The conversation as text.

        Unknown roles raise InputError; the chapter leaves such messages out silently.
        """
        text = ""
        for index, message in enumerate(messages):
            if message.role not in ("system", "user", "assistant"):
                what = f"unknown role {message.role!r}"
                fix = "use system, user or assistant"
                raise InputError(Problem("conversation", f"messages[{index}].role", what, fix))
            text += f"<|{message.role}|>\n{message.content}\n"
        return f"{text}<|end|>"


class SupervisedFineTuningDataset:
    """Map-style data set for torch's DataLoader.

    Rows have `input_ids`, `attention_mask` and `labels`, each of `(max_length,)`. The tokenizer
    needs no pad token and is left as it is. Raises InputError for no examples, an example without
    output and one longer than `max_length` tokens, which the chapter cuts.
    """

    def __init__(self, examples: Examples, tokenizer: Any, max_length: int = 512) -> None:
        _refuse_empty(examples, "output")
        self.examples = examples
        self.tokenizer = tokenizer
        self.max_length = max_length
        renderer = instruction_renderer(tokenizer)
        self._collate = ResponseOnlyCollator(renderer.tokenizer.pad_token_id, max_length)
        labeller = Labeller(renderer, LabelSettings(max_length=max_length))
        batch = labeller.label(_conversations(examples))
        fix = f"shorten it or raise max_length (now {max_length})"
        problems = []
        for dropped in batch.dropped:
            problems.append(Problem(f"examples[{dropped.example}]", "", dropped.detail, fix))
        if problems:
            raise InputError(problems)
        self._rows = batch.rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index]
        batch = self._collate([{"input_ids": row.input_ids, "labels": row.labels}])
        return {key: tensor[0] for key, tensor in batch.items()}


def _conversations(examples: Examples) -> list[Example]:
    conversations = []
    for index, example in enumerate(examples):
        answer = {"role": "assistant", "content": example.output}
        conversations.append(Example([example.to_message(), answer], "examples", index))
    return conversations


def instruction_renderer(tokenizer: Any) -> ChatRenderer:
    """The shipped instruction template on a copy of the tokenizer; the caller's keeps its own."""
    settings = TemplateSettings(chat_template="instruction")
    return attach_chat_template(copy.deepcopy(tokenizer), settings)


def create_sft_dataloader(
    examples: Examples, tokenizer: Any, batch_size: int = 4, max_length: int = 512
) -> DataLoader[dict[str, Tensor]]:
    """A shuffling DataLoader over `SupervisedFineTuningDataset`.

    Tensors are `(batch, max_length)`.
    """
    from torch.utils.data import DataLoader

    dataset: Any = SupervisedFineTuningDataset(examples, tokenizer, max_length)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True)


@dataclass(frozen=True, slots=True)
class ResponseOnlyCollator:
    """Pads `input_ids` and `labels` to `width`, else to the longest, as TRL's own collator does."""

    pad_token_id: int
    width: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Tensors `input_ids`, `attention_mask`, `labels` of shape `(len(rows), width)`.

        Labels are padded by -100.
        """
        import torch

        width = self.width or max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[place, :length] = torch.tensor(row["input_ids"])
            attention_mask[place, :length] = 1
            labels[place, :length] = torch.tensor(row["labels"])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
        }


class DataQualityAnalyzer:
    """The chapter's three analyses; `sft-recipes audit` has the full set.

    Raises InputError for no examples.
    """

    def __init__(self, examples: Examples) -> None:
        _refuse_empty(examples)
        self.examples = examples
        self._instructions = [example.instruction for example in examples]
        self._outputs = [example.output for example in examples]

    def analyze_length_distribution(self) -> dict[str, float]:
        """Mean and maximum number of words of instructions and outputs."""
        instruction_words = _count_words(self._instructions)
        output_words = _count_words(self._outputs)
        return {
            "avg_instruction_length": fmean(instruction_words),
            "avg_output_length": fmean(output_words),
            "max_instruction_length": max(instruction_words),
            "max_output_length": max(output_words),
        }

    def detect_repetitive_patterns(self) -> dict[str, list[str]]:
        """First 20 characters that open more than 5 instructions, or more than 5 outputs."""
        return {
            "repetitive_instructions": _repeated_openings(self._instructions),
            "repetitive_outputs": _repeated_openings(self._outputs),
        }

    def diversity_score(self) -> float:
        """Distinct instructions / instructions, in (0, 1]."""
        return len(set(self._instructions)) / len(self._instructions)


def _count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _repeated_openings(texts: Sequence[str]) -> list[str]:
    counts = Counter(text[:_OPENING_CHARACTERS] for text in texts)
    return [opening for opening, count in counts.items() if count > _OPENING_COUNT]


def _refuse_empty(examples: Examples, field: str = "") -> None:
    """Raise InputError for no examples, and for those without words in `field`."""
    if not examples:
        raise InputError(Problem("examples", "", "no examples", "pass at least one"))
    if not field:
        return
    fix = "write some or remove the example"
    problems = []
    for index, example in enumerate(examples):
        if not getattr(example, field).strip():
            problems.append(Problem(f"examples[{index}]", field, "it has no words", fix))
    if problems:
        raise InputError(problems)


class SFTEvaluator:
    """The chapter's three scores over generated answers. Answers are greedy, at most 150 tokens."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def evaluate_instruction_following(self, test_examples: Examples) -> dict[str, float]:
        """Means over the examples, by the chapter's definitions.

        - `avg_length_ratio`: words in the answer / words in the reference (at least 1).
        - `completion_rate`: share of the instruction's words that occur in the answer, ignoring
          case.
        - `format_adherence`: 0 for an empty answer, 0.5 for one that starts with `### `, else 1.

        Raises InputError for no examples, and for an instruction without words (no share of zero
        words).
        """
        from sft_recipes.evaluation import scores

        _refuse_empty(test_examples, "instruction")
        prompts = _Prompts.of(self.tokenizer, test_examples)
        answers = prompts.answers(self.model, prompts.formatted(), _SCORED_TOKENS)
        ratios = []
        completions = []
        formats = []
        for example, generated in zip(test_examples, answers, strict=True):
            answer = generated.strip()
            ratios.append(scores.chapter_length_ratio(example.output, answer))
            completions.append(scores.chapter_completion(example.instruction, answer) or 0)
            formats.append(scores.chapter_format(answer))
        return {
            "avg_length_ratio": fmean(ratios),
            "completion_rate": fmean(completions),
            "format_adherence": fmean(formats),
        }


def evaluate_quality(
    model: Any, tokenizer: Any, test_examples: Examples
) -> dict[str, dict[str, str]]:
    """`example_0` to `example_4`: instruction, expected and generated text.

    Answers are greedy, at most 100 tokens.
    """
    examples = test_examples[:_SHOWN_EXAMPLES]
    prompts = _Prompts.of(tokenizer, examples)
    answers = prompts.answers(model, prompts.formatted(), _SHOWN_TOKENS)
    shown = {}
    for index, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        shown[f"example_{index}"] = {
            "instruction": example.instruction,
            "expected": example.output,
            "generated": answer.strip(),
        }
    return shown


def detect_format_overfitting(
    model: Any, tokenizer: Any, test_prompts: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Prompts whose answer depends on the training format.

    With it the answer is more than twice as long (in characters), or `###` leaks out without it.
    Answers are greedy, at most 100 tokens.
    """
    prompts = _Prompts.of(tokenizer, list(map(InstructionExample, test_prompts)))
    formatted = prompts.answers(model, prompts.formatted(), _SHOWN_TOKENS)
    bare = prompts.answers(model, prompts.bare(), _SHOWN_TOKENS)
    indicators = []
    for prompt, with_format, without in zip(test_prompts, formatted, bare, strict=True):
        is_leaked = "###" in without
        if is_leaked or len(with_format) > 2 * len(without):
            indicator = {
                "prompt": prompt,
                "formatted_response_length": len(with_format),
                "unformatted_response_length": len(without),
                "format_leaked": is_leaked,
            }
            indicators.append(indicator)
    return {"overfitting_indicators": indicators}


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Instructions as token ids, in the training format or as they stand, and their answers."""

    renderer: ChatRenderer
    examples: Examples

    @classmethod
    def of(cls, tokenizer: Any, examples: Examples) -> _Prompts:
        return cls(instruction_renderer(tokenizer), examples)

    def formatted(self) -> list[Sequence[int]]:
        prompts: list[Sequence[int]] = []
        for example in self.examples:
            prompts.append(self.renderer.prompt_ids([example.to_message()]))
        return prompts

    def bare(self) -> list[Sequence[int]]:
        tokenizer = self.renderer.tokenizer
        # BOS by hand, since a tokenizer's own habit may also append EOS.
        bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
        prompts: list[Sequence[int]] = []
        for example in self.examples:
            ids = tokenizer(example.instruction, add_special_tokens=False)["input_ids"]
            prompts.append([*bos, *ids])
        return prompts

    def answers(self, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
        """Greedy answers to prompts."""
        from sft_recipes.evaluation.generation import generate

        tokenizer = self.renderer.tokenizer
        answers = generate(
            model,
            tokenizer,
            prompts,
            stop_ids=self.renderer.stop_ids,
            max_new_tokens=new_tokens,
            batch_size=8,
        )
        return [tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]
