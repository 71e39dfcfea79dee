"""What an example becomes in another tool, and how the tools' settings are read from their configs."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from sft_recipes.data.labelled_rows import IGNORE_INDEX
from sft_recipes.messages import Example, Message

_Rules = TypeVar("_Rules")


@dataclass(frozen=True, slots=True)
class TheirRow:
    """A training row of another tool. A label is -100 where nothing is trained.

    `whole`: the row before the tool's length limit cut it, None where it was not cut.
    """

    input_ids: list[int]
    labels: list[int]
    whole: "TheirRow | None" = None

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a label."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True, slots=True)
class DroppedThere:
    """The tool leaves the example out, and why; or stops at it."""

    reason: str


@dataclass(frozen=True, slots=True)
class NotComputed:
    """What the tool makes of the example is not known here, and why."""

    reason: str


TheirOutcome = TheirRow | DroppedThere | NotComputed


class LabelRules(Protocol):
    """The settings of one tool that decide on ids and labels, and what follows from them."""

    @property
    def tool(self) -> str:
        """The tool's name, for messages."""

    def prepare(self, tokenizer: Any) -> None:
        """Change a tokenizer, fresh from its files, as the tool does before it uses it."""

    def row(self, example: Example, tokenizer: Any) -> TheirOutcome:
        """What the tool makes of an example."""


def their_rows(
    examples: Iterable[Example], tokenizer: Any, rules: LabelRules
) -> list[TheirOutcome]:
    """What a tool makes of examples. `tokenizer`: as it was loaded; it is not changed.

    A tokenizer that this project attached a template to has another EOS and another template than
    the tool would find.
    """
    own = copy.deepcopy(tokenizer)
    rules.prepare(own)
    outcomes: list[TheirOutcome] = []
    for example in examples:
        if uses_tools(example):
            outcomes.append(NotComputed("how other tools write tool calls is not followed here"))
        else:
            outcomes.append(rules.row(example, own))
    return outcomes


def rules_from(kind: type[_Rules], *configs: Mapping[str, Any]) -> _Rules:
    """The rules of a tool whose fields are named as its keys; the first config that sets one counts."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        for config in configs:
            value = config.get(field.name)
            if value is not None:
                values.setdefault(field.name, tuple(value) if isinstance(value, list) else value)
    return kind(**values)


def masked(ids: Sequence[int], trained: Iterable[int]) -> list[int]:
    """Labels of a row of which these positions are trained."""
    labels = [IGNORE_INDEX] * len(ids)
    for position in trained:
        labels[position] = ids[position]
    return labels


def cut(row: TheirRow, length: int | None) -> TheirRow:
    """The row without what stands behind its first `length` tokens."""
    if length is None or len(row.input_ids) <= length:
        return row
    return TheirRow(row.input_ids[:length], row.labels[:length], row)


def plain_turns(example: Example) -> list[Message]:
    """The messages as a data set of conversations would hold them."""
    turns: list[Message] = []
    for message in example.messages:
        turn = {key: value for key, value in message.items() if key not in ("instruction", "input")}
        turns.append(turn)
    return turns


class Instruction(NamedTuple):
    """A row of instructions; `input` is "" where it has none."""

    instruction: str
    input: str
    output: str

    @property
    def alpaca_prompt(self) -> str:
        """The prompt of Stanford Alpaca, with a line break at its end."""
        task = "Below is an instruction that describes a task"
        section = ""
        if self.input:
            task += ", paired with an input that provides further context"
            section = f"### Input:\n{self.input}\n\n"
        return (
            f"{task}. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{self.instruction}\n\n{section}### Response:\n"
        )


def as_instruction(example: Example) -> Instruction | None:
    """The example as a row of instructions, without what stands before the question.

    None for a conversation.
    """
    question, answer = example.messages[-2:]
    if len(example.messages) > 2 and "instruction" not in question:
        return None
    instruction = question.get("instruction") or question["content"]
    return Instruction(instruction, question.get("input", ""), answer["content"])


def uses_tools(example: Example) -> bool:
    """Whether an example defines tools or calls them."""
    calls = any(message.get("tool_calls") for message in example.messages)
    return bool(example.tools) or calls or any(m["role"] == "tool" for m in example.messages)


def shared_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many characters, or ids, both begin with."""
    length = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        length += 1
    return length
