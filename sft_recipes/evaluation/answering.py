"""Answer conversations greedily, and score each answer: the rows of `samples.jsonl`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.answer import Answer
from sft_recipes.evaluation.constraints import check_expected_format
from sft_recipes.evaluation.first_answer import first_answer, turn_tokens_of
from sft_recipes.evaluation.generation import Generation, generate
from sft_recipes.evaluation.metrics import score_row
from sft_recipes.evaluation.tool_calls import answer_text, calls_match
from sft_recipes.messages import Example

THINK_END = "</think>"
_MARKUP = re.compile(r"[^\w\s].*[^\w\s]")


@dataclass(frozen=True)
class Answered:
    """What a model wrote to some conversations, to be scored as it came, or up to where it went on
    with a section of its own making (`first_answer.py`)."""

    scorer: "Scorer"
    examples: Sequence[Example]
    references: Sequence[str | None]
    generations: Sequence[Generation]

    def rows(self) -> list[dict[str, Any]]:
        """Scored rows: everything that was written is the answer."""
        return list(map(self.scorer.row, self.examples, self.references, self.generations))

    def first_rows(self) -> list[dict[str, Any]]:
        """Scored rows: what was written before the next section or role is the answer."""
        return list(map(self.scorer.first_row, self.examples, self.references, self.generations))


def joined(parts: Sequence[Answered], places: Sequence[Sequence[int]]) -> Answered:
    """Parts of what was asked as one; `places` says where in it each of their rows stands."""
    order = sorted(range(sum(map(len, places))), key=list(chain.from_iterable(places)).__getitem__)
    examples = list(chain.from_iterable(part.examples for part in parts))
    references = list(chain.from_iterable(part.references for part in parts))
    generations = list(chain.from_iterable(part.generations for part in parts))
    return Answered(
        parts[0].scorer,
        [examples[index] for index in order],
        [references[index] for index in order],
        [generations[index] for index in order],
    )


def answer(
    model: Any,
    renderer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int | None,
    template_segments: Sequence[str] = (),
    progress: bool = True,
) -> Answered:
    """Answer the last turn of each example greedily; the same on every process.

    `renderer` is the `ChatRenderer` of training. An answer is what follows the model's reasoning,
    which the row holds apart as `reasoning`. `template_segments` is the template's own literal
    text, for the `template_leak` flag. Raises InputError for rows without a prompt, unknown
    `expected_format`s and prompts too long.
    """
    references = _references(renderer, examples)
    prompts = []
    names = []
    for example in examples:
        prompts.append(renderer.prompt_ids(example.messages[:-1], example.tools))
        names.append(example.where)
    generations = generate(
        model,
        renderer.tokenizer,
        prompts,
        stop_ids=renderer.stop_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        names=names,
        progress=progress,
    )
    tokens = control_tokens(renderer.tokenizer)
    scorer = Scorer(renderer, tokens, template_segments, max_new_tokens)
    return Answered(scorer, examples, references, generations)


@dataclass(frozen=True)
class Scorer:
    """What all answers of one evaluation are judged by."""

    renderer: Any
    control_tokens: Sequence[str]
    template_segments: Sequence[str]
    max_new_tokens: int

    def row(
        self, example: Example, reference: str | None, generation: Generation
    ) -> dict[str, Any]:
        """The row of `samples.jsonl`: where it stands, what was asked, answered, and its scores."""
        said = self._split_reasoning(generation.text, reference)
        judged = self._judged(example, reference, said.response, generation.stop_reason)
        return self._row(example, generation, said.reasoning, judged)

    def first_row(
        self, example: Example, reference: str | None, generation: Generation
    ) -> dict[str, Any]:
        """The same of the answer before the next section; one that was cut ended by a stop string."""
        said = self._split_reasoning(generation.text, reference)
        judged = self._judged(example, reference, said.response, generation.stop_reason)
        first = first_answer(judged, turn_tokens_of(self.template_segments, self.control_tokens))
        if first != said.response.rstrip():
            judged = self._judged(example, reference, first, "stop_string")
        return self._row(example, generation, said.reasoning, judged)

    def _judged(
        self, example: Example, reference: str | None, response: str, stop_reason: str
    ) -> Answer:
        return Answer(
            instruction=_instruction(example),
            reference=reference,
            response=response,
            stop_reason=stop_reason,
            expected_format=example.columns.get("expected_format"),
            control_tokens=self.control_tokens,
            template_segments=self.template_segments,
            response_tokens=self._count(response),
            reference_tokens=self._count(reference or ""),
            max_new_tokens=self.max_new_tokens,
            calls_match=calls_match(self.renderer, example, response, self.control_tokens),
        )

    def _row(
        self, example: Example, generation: Generation, reasoning: str | None, judged: Answer
    ) -> dict[str, Any]:
        prompt = self.renderer.render(
            example.messages[:-1], example.tools, add_generation_prompt=True
        )
        return {
            "row": example.row,
            "line": example.line,
            "source": example.source,
            "data_set": example.data_set or None,
            "task_type": example.columns.get("task_type"),
            "prompt": prompt,
            "messages": list(map(dict, example.messages)),
            "n_tokens": len(generation.ids),
            "reasoning": reasoning,
            **score_row(judged),
        }

    def _count(self, text: str) -> int:
        return len(self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _split_reasoning(self, text: str, reference: str | None) -> "_Said":
        # A reference that holds reasoning itself is compared with all of the text.
        if THINK_END not in self.control_tokens or THINK_END in (reference or ""):
            return _Said(None, text)
        reasoning, end, answer = text.rpartition(THINK_END)
        if not end:
            return _Said(None, text)
        return _Said(reasoning, answer.lstrip("\n"))


class _Said(NamedTuple):
    """What a model wrote: its reasoning, None without any, and its answer."""

    reasoning: str | None
    response: str


def control_tokens(tokenizer: Any) -> list[str]:
    """Text of every added token that is special or looks like markup (`<think>`, `[INST]`).

    Added plain words are none.
    """
    tokens = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or _MARKUP.fullmatch(token.content):
            tokens.add(token.content)
    return sorted(filter(str.strip, tokens))


def _references(renderer: Any, examples: Sequence[Example]) -> list[str | None]:
    """The answers to compare with, calls as the template writes them.

    Raises InputError listing all that is wrong.
    """
    references = []
    problems: list[Problem] = []
    for example in examples:
        try:
            references.append(_reference(renderer, example))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return references


def _reference(renderer: Any, example: Example) -> str | None:
    if len(example.messages) < 2:
        what = "there is no prompt and answer to compare (raw text cannot be evaluated)"
        fix = "use data with a user turn and an assistant turn"
        raise InputError(Problem(example.where, "messages", what, fix))
    check_expected_format(example.columns.get("expected_format"), example.where)
    answer = dict(example.messages[-1])
    if not answer.get("tool_calls"):
        return answer.get("content")
    # The model may think otherwise and make the same call.
    answer.pop("reasoning_content", None)
    return answer_text(renderer, example, answer)


def _instruction(example: Example) -> str:
    """The last user message as its author wrote it, without the `input` that a format joined."""
    for message in reversed(example.messages):
        if message["role"] == "user":
            return str(message.get("instruction") or message.get("content") or "")
    return ""
