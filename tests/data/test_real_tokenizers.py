"""The label contract with real vocabularies, where the environment names some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest

from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.messages import Example
from sft_recipes.recipe import LabelSettings, TemplateSettings
from tests.data.conversations import KINDS, generate
from tests.data.hostile import Message, hostile_conversation
from tests.data.label_oracle import Tokenizer
from tests.data.real_tokenizers import SHIPPED, VARIABLE, Case, cases, load, some_control_tokens
from tests.data.test_hostile import Tally, tally

CASES = [pytest.param(case, id=str(case)) for case in cases()] or [
    pytest.param(None, marks=pytest.mark.skip(reason=f"{VARIABLE} names no tokenizer folders"))
]
ANSWERS = [
    "\n\n- one\n- two",
    "    four spaces",
    "\n",
    " one",
    "\tx",
    "\r\n\r\nx",
    "\n \n x",
    "  \n\n\n\n  x",
    "x\n\n",
    "x  ",
]


@dataclass(frozen=True)
class Bench:
    """A case ready for work: a labeller on one tokenizer, and another one with the same template for the oracle."""

    case: Case
    labeller: Labeller
    tokenizer: Tokenizer
    begins_with_bos: bool

    @property
    def control_tokens(self) -> list[str]:
        return some_control_tokens(self.tokenizer)

    def tally(self, conversations: Iterable[list[Message]]) -> Tally:
        """What became of the conversations."""
        found = Tally()
        tally(self.tokenizer, self.labeller, conversations, str(self.case), found)
        print(found)
        return found


# Of the module, so that the tests of one tokenizer follow one another and it is loaded once.
@pytest.fixture(scope="module", params=CASES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    case = request.param
    attached, judging = load(case.folder, "attached"), load(case.folder, "judging")
    template, eos, pad = attached.chat_template, attached.eos_token, attached.pad_token
    renderer = attach_chat_template(attached, TemplateSettings(chat_template=case.chat_template))
    judging.chat_template = attached.chat_template
    bos = judging.bos_token_id
    begins_with_bos = bos is not None and judging("a")["input_ids"][0] == bos
    yield Bench(case, Labeller(renderer, LabelSettings(max_length=None)), judging, begins_with_bos)
    # As it was loaded, for the next template.
    attached.chat_template, attached.eos_token, attached.pad_token = template, eos, pad


def odd_answers() -> list[list[Message]]:
    """Conversations whose answers begin or end in whitespace, in the first turn, in the last and in both."""
    odd = [answer if answer.strip() else f"{answer}x" for answer in ANSWERS]
    made = []
    for answer, other in zip(odd, odd[1:] + odd[:1], strict=True):
        user = {"role": "user", "content": "Write a list."}
        first, second, plain = (
            {"role": "assistant", "content": text} for text in (answer, other, "Done.")
        )
        made += [
            [user, first],
            [user, first, user, second],
            [user, plain, user, first],
            [user, first, user, plain],
        ]
    return made


def test_ordinary_conversations(bench: Bench) -> None:
    """Every kind of generated conversation is labelled as it is served."""
    tokens = bench.control_tokens
    found = bench.tally(
        [generate(kind, seed, tokens).messages for kind in KINDS for seed in range(3)]
    )
    assert (found.wrong, found.needless) == ([], [])


def test_answers_that_begin_or_end_in_whitespace(bench: Bench) -> None:
    """Their ids are those of the prompt and then those of the answer, and none of them is lost."""
    found = bench.tally(odd_answers())
    assert (found.wrong, found.needless) == ([], [])


def test_hostile_conversations(bench: Bench) -> None:
    """No text makes a label wrong, and no text that the template keeps makes a turn vanish."""
    found = bench.tally(
        [hostile_conversation(f"real-{seed}", bench.control_tokens) for seed in range(25)]
    )
    assert (found.wrong, found.needless) == ([], [])


@pytest.mark.slow
def test_many_hostile_conversations(bench: Bench) -> None:
    """The same property on many more."""
    found = bench.tally(
        [hostile_conversation(f"many-{seed}", bench.control_tokens) for seed in range(400)]
    )
    assert (found.wrong, found.needless) == ([], [])


def test_a_row_begins_as_the_tokenizer_begins_a_text(bench: Bench) -> None:
    """Under a template of this project a row has the one BOS that the model was pretrained with, and no other."""
    if bench.case.chat_template not in SHIPPED:
        pytest.skip("what this template writes is its own affair")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    row = bench.labeller.label([Example(messages, "one", 0)]).rows[0]
    bos = bench.tokenizer.bos_token_id
    expected = 1 if bench.begins_with_bos else 0
    assert row.input_ids.count(bos) == expected
    assert row.input_ids[:expected] == [bos] * expected
