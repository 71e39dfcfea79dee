"""Conversations to be answered and their template, asked of one model at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.evaluation import answering
from sft_recipes.evaluation.answering import Answered
from sft_recipes.evaluation.evaluator import Evaluation, evaluation_from_rows
from sft_recipes.evaluation.generation import check_prompts
from sft_recipes.messages import Example
from sft_recipes.statistics import Estimate

# The data itself; everything else that is asked has a folder of this name below it.
DATA = ""


class Question(NamedTuple):
    """Conversations, how they are rendered, and a token budget of their own where they have one."""

    renderer: ChatRenderer
    examples: Sequence[Example]
    max_new_tokens: int | None = None


Questions = dict[str, Question]
Answers = Mapping[str, Evaluation]
# One value per prompt for each indicator.
Values = dict[str, list[float]]


class Indicator(NamedTuple):
    """A number that is made of several evaluations: what it is, and its estimate from the prompts.

    All are better when lower. A gate may name them beside the metrics of rows. No value lies beyond
    `low` and `high`.
    """

    definition: str
    estimate: Callable[..., Estimate]
    low: float = 0.0
    high: float = 1.0


class Measured(NamedTuple):
    """What a part of an evaluation measured: data for `metrics.json`, and values per prompt."""

    content: dict[str, Any]
    values: Values


@dataclass(frozen=True)
class Asking:
    """How every question is asked; `template_segments` is the training template's own text."""

    max_new_tokens: int
    batch_size: int | None
    template_segments: Sequence[str]
    progress: bool

    def check_lengths(self, model: Any, questions: Iterable[Question]) -> None:
        """Raise InputError for prompts that are too long now, not when half are answered."""
        for question in questions:
            renderer = question.renderer
            prompts = []
            names = []
            for example in question.examples:
                if len(example.messages) > 1:
                    prompts.append(renderer.prompt_ids(example.messages[:-1], example.tools))
                    names.append(example.where)
            check_prompts(model, prompts, self.budget_of(question), names)

    def budget_of(self, question: Question) -> int:
        """The most tokens of an answer to this question."""
        return question.max_new_tokens or self.max_new_tokens

    def answer(self, model: Any, question: Question) -> Answered:
        """The model's answers to one question, not scored yet."""
        return answering.answer(
            model,
            question.renderer,
            question.examples,
            max_new_tokens=self.budget_of(question),
            batch_size=self.batch_size,
            template_segments=self.template_segments,
            progress=self.progress,
        )

    def ask(
        self, model: Any, questions: Questions, known: Answers | None = None
    ) -> dict[str, Evaluation]:
        """The scored answers to each question; what was asked already is not asked again.

        `known`: answers of this model to some of them.
        """
        answers = dict(known or {})
        for name, question in questions.items():
            same = [other for other in answers if questions.get(other) == question]
            if same:
                answers[name] = answers[same[0]]
            else:
                answers[name] = evaluation_from_rows(self.answer(model, question).rows())
        return answers


def answers_below(answers: Answers, folder: str) -> dict[str, Evaluation]:
    """The answers whose names begin with `folder`, by the rest of their names."""
    below = {}
    for name, evaluation in answers.items():
        if name.startswith(folder):
            below[name.removeprefix(folder)] = evaluation
    return below


def estimate_indicators(indicators: Mapping[str, Indicator], values: Values) -> dict[str, Any]:
    """The estimates of those indicators that have values, as plain data."""
    estimates = {}
    for name, of_prompts in values.items():
        estimates[name] = indicators[name].estimate(of_prompts).as_json()
    return estimates
