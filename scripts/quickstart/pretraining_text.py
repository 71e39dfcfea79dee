"""Documents for pretraining the quickstart's base model: notes, lists, letters and facts that simply run on.

The base model has to know what the assistant will need (whole words, their order, a few facts) and must not be an
assistant yet. So these documents use none of the instruction template's section names, and no end-of-text token:
what is read here can be continued, but nothing says when to stop.

A model of this size learns to copy only where text repeats itself, so most documents show one list in several
forms. Documents are about 70 tokens long (at most about 170) and are trained one a row: packing hides the repetition.
"""

import json
import random
from collections.abc import Callable, Iterator

from tasks import (
    CITIES,
    GIFTS,
    KIND_OF,
    KINDS,
    LARGEST_NUMBER,
    NAMES,
    NUMBERS,
    OPPOSITE_OF,
    OPPOSITES,
    PLACES,
    THINGS,
    WISHES,
    capitalised,
    some_record,
    some_things,
    some_whereabouts,
    with_article,
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOLDERS = ("basket", "shelf", "box", "bag", "drawer", "cart", "room", "picture", "page", "window")

VERBS = (
    "Show",
    "Give",
    "Write",
    "List",
    "Put",
    "Turn",
    "Convert",
    "Format",
    "Return",
    "Start",
    "Pick",
    "Order",
)
NOUNS = ("words", "items", "list", "input", "order")
FIRST_STEPS = (
    "Answer",
    "Ask",
    "Count",
    "Explain",
    "Find",
    "Give",
    "Tell",
    "Say",
    "Reverse",
    "Return",
    "Name",
    "Send",
)

# Wordings for each operation on a list; they stand in headings, notes and requests.
BACKWARDS = ("backwards", "reversed", "in reverse order", "from last to first", "turned around")
FORWARDS = ("again", "in the same order", "as before", "once more", "from first to last")
AS_BULLETS = ("as bullets", "as bullet points", "as a bullet list", "one bullet for each item")
AS_JSON = ("as JSON", "in JSON", "as valid JSON", "converted to JSON")
AS_COUNT = ("how many items", "the number of items", "the count", "how long the list is")
AS_FIRST = ("the first word", "the first item", "which word comes first", "what opens the list")
AS_LAST = ("the last word", "the last item", "which word comes last", "what closes the list")


def comma(items: list[str]) -> str:
    """The plainest form of a list."""
    return ", ".join(items)


def _result(operation: str, items: list[str]) -> tuple[tuple[str, ...], str]:
    """(wordings that name the operation, its result for these items)."""
    results: dict[str, tuple[tuple[str, ...], str]] = {
        "backwards": (BACKWARDS, comma(items[::-1])),
        "forwards": (FORWARDS, comma(items)),
        "bullets": (AS_BULLETS, "\n".join(f"- {item}" for item in items)),
        "json": (AS_JSON, json.dumps(items)),
        "count": (AS_COUNT, f"There are {len(items)} items."),
        "first": (AS_FIRST, items[0]),
        "last": (AS_LAST, items[-1]),
    }
    return results[operation]


ANY_WORDS = (*THINGS, *NAMES, *PLACES, *OPPOSITE_OF, *GIFTS, *CITIES, *map(str, NUMBERS))
OPERATIONS = (
    "backwards",
    "backwards",
    "backwards",
    "forwards",
    "bullets",
    "json",
    "count",
    "first",
    "last",
)


def drill_document(rng: random.Random) -> str:
    """The same few words over and over in several forms: nothing else teaches copying in so few tokens."""
    pool = rng.choice((THINGS, THINGS, ANY_WORDS))
    items = rng.sample(pool, rng.randint(3, 6))
    parts = [comma(items)]
    for _ in range(4):
        parts.append(rng.choice((
            comma(items),
            f"Backwards: {comma(items[::-1])}",
            "\n".join(f"- {item}" for item in items),
            json.dumps(items),
        )))  # fmt: skip
    return "\n".join(parts) + "\n"


def list_document(rng: random.Random) -> str:
    """One list, then several of its forms, each under a heading of its own."""
    items = some_things(rng, 2, 6)
    opening = rng.choice((
        f"The {rng.choice(HOLDERS)} holds these items: {comma(items)}",
        f"{rng.choice(NAMES)} wrote a list.\n{comma(items)}",
        f"Items: {comma(items)}",
        f"On {rng.choice(DAYS)} there were: {comma(items)}",
        f"### {rng.choice(NAMES)}\n\n{comma(items)}\n",
        f"### {capitalised(rng.choice(HOLDERS))} on {rng.choice(DAYS)}\n\n{comma(items)}\n",
    ))  # fmt: skip
    parts = [opening]
    for operation in rng.sample(OPERATIONS, rng.randint(2, 4)):
        wording, text = _result(operation, items)
        parts.append(f"{capitalised(rng.choice(wording))}:\n{text}")
    return "\n".join(parts) + "\n"


def request_document(rng: random.Random) -> str:
    """What is wanted, then the list, then the result: the cue stands before the words it is about."""
    items = some_things(rng, 2, 6)
    parts = []
    for _ in range(rng.randint(1, 2)):
        wording, text = _result(rng.choice(OPERATIONS), items)
        cue = rng.choice(wording)
        name = rng.choice(NAMES)
        parts.append(rng.choice((
            f"{name} wants to see the list {cue}.\n\nThe list is:\n{comma(items)}\n\n{name} writes:\n{text}",
            f"{rng.choice(VERBS)} the {rng.choice(NOUNS)} {cue}.\n{comma(items)}\nResult:\n{text}",
            f"{rng.choice(VERBS)} this {cue}.\n\nWords:\n{comma(items)}\n\nResult:\n{text}",
            f"Note: {cue}\nWords: {comma(items)}\n\nOutcome:\n{text}",
            f"Please give {name} {cue}.\n\nItems:\n{comma(items)}\n\nAnd so:\n{text}",
        )))  # fmt: skip
        items = some_things(rng, 2, 6)
    return "\n\n".join(parts) + "\n"


def number_document(rng: random.Random) -> str:
    """Numbers as drawn, then rising; or a stretch of counting."""
    if rng.random() < 0.15:
        step = rng.randint(1, 3)
        first = rng.randint(1, LARGEST_NUMBER - 8 * step)
        return (
            "Counting: " + ", ".join(str(first + step * k) for k in range(rng.randint(6, 9))) + "\n"
        )
    parts = []
    for _ in range(rng.randint(2, 4)):
        numbers = rng.sample(NUMBERS, rng.choice((2, 3, 3, 4, 4, 5)))
        drawn, rising = comma([str(n) for n in numbers]), comma([str(n) for n in sorted(numbers)])
        parts.append(rng.choice((
            f"Numbers: {drawn}\nSorted:\n{rising}",
            f"{rng.choice(NAMES)} wants rising order.\n\nThe numbers are:\n{drawn}\n\nIn order:\n{rising}",
            f"Sort from smallest to largest.\n{drawn}\nResult:\n{rising}",
            f"The numbers {drawn} in ascending order are:\n{rising}",
            f"Arrange these numbers, the smallest at the start.\n\n{drawn}\n\nSorted numbers:\n{rising}",
        )))  # fmt: skip
    return "\n".join(parts) + "\n"


def record_document(rng: random.Random) -> str:
    """`key: value` pairs, and the same as a JSON object."""
    parts = []
    for _ in range(rng.randint(1, 2)):
        record = some_record(rng)
        source = ", ".join(f"{key}: {value}" for key, value in record.items())
        parts.append(rng.choice((
            f"{source}\n{capitalised(rng.choice(AS_JSON))}:\n{json.dumps(record)}",
            f"{rng.choice(VERBS)} the entry {rng.choice(AS_JSON)}.\n\n{source}\n\nResult:\n{json.dumps(record)}",
            f"{rng.choice(NAMES)} keeps records.\n{json.dumps(record)}\nIn words: {source}",
        )))  # fmt: skip
    return "\n".join(parts) + "\n"


def fact_document(rng: random.Random) -> str:
    """Opposites and kinds, as short sentences."""
    sentences = []
    for _ in range(rng.randint(3, 6)):
        word = rng.choice(tuple(OPPOSITE_OF))
        thing = rng.choice(THINGS)
        its_kind = capitalised(f"{with_article(thing)} is {with_article(KIND_OF[thing])}.")
        a, b = rng.choice(OPPOSITES)
        sentences.append(rng.choice((
            f"The opposite of {word} is {OPPOSITE_OF[word]}.",
            f"{rng.choice(NAMES)} asked for the opposite of {word}.\nThe opposite of {word} is {OPPOSITE_OF[word]}.",
            f"If it is not {a}, it may be {b}.",
            its_kind,
            f"What kind of thing is {with_article(thing)}?\n{its_kind}",
            f"Every {thing} belongs to the category {KIND_OF[thing]}.",
        )))  # fmt: skip
    return rng.choice((" ", "\n")).join(sentences) + "\n"


def letter_document(rng: random.Random) -> str:
    """Somebody means to write something kind, and does."""
    parts = []
    for _ in range(rng.randint(1, 2)):
        writer, name = rng.sample(NAMES, 2)
        gift, wish, place = rng.choice(GIFTS), rng.choice(WISHES), rng.choice(PLACES)
        purpose, sentence = rng.choice((
            (f"thank {name} for the {gift}", f"thank you very much for the {gift}."),
            (f"send thanks to {name} for the {gift}", f"thank you very much for the {gift}."),
            (f"wish {name} a happy {wish}", f"I wish you a happy {wish}."),
            (f"send {name} wishes to have a happy {wish}", f"I wish you a happy {wish}."),
            (f"invite {name} to the {place}", f"please join us at the {place}."),
            (f"ask {name} to come to the {place}", f"please join us at the {place}."),
        ))  # fmt: skip
        plan = rng.choice((f"{writer} wants to {purpose}.", f"{capitalised(purpose)}."))
        parts.append(f"{plan}\n\nDear {name}, {sentence}\n\nYours, {writer}")
    return "\n\n".join(parts) + "\n"


def whereabouts_document(rng: random.Random) -> str:
    """Who is where, and somebody asking about each of them, by name or by place, before or after the telling."""
    people = some_whereabouts(rng)
    telling = " ".join(f"{name} is in the {place}." for name, place in people)
    answers = []
    for name, place in rng.sample(people, len(people)):
        question = rng.choice((
            f"Where is {name}?", f"We look for {name}.", f"Find {name}.", f"In which place is {name}?",
            f"Who is in the {place}?", f"Who went to the {place}?", f"Which person is in the {place}?",
        ))  # fmt: skip
        answers.append((question, f"{name} is in the {place}."))
    if rng.random() < 0.5:
        return (
            "\n\n".join((telling, *(f"{question}\n{answer}" for question, answer in answers)))
            + "\n"
        )
    return (
        "\n\n".join(f"{question}\n\n{telling}\n\n{answer}" for question, answer in answers[:2])
        + "\n"
    )


def story_document(rng: random.Random) -> str:
    """A few sentences of everyday prose, for the connecting words."""
    name, other = rng.sample(NAMES, 2)
    a, b, c = some_things(rng, 3, 3)
    kind = rng.choice(tuple(KINDS))
    here, there = rng.sample(PLACES, 2)
    sentences = [
        f"On {rng.choice(DAYS)} {name} went to the {here} in {rng.choice(CITIES)} and found {with_article(a)}.",
        f"{other} would like to know which word means the same, which type it is, and what you can tell me about it.",
        f"{name} gave {other} {with_article(b)} and {with_article(c)}.",
        f"Do you know how to classify {with_article(rng.choice(KINDS[kind]))}? We explain what each item is.",
        f"After the {there}, {name} picked a {kind} for {other} and put it into the {rng.choice(HOLDERS)}.",
        f"{name} is {rng.choice(NUMBERS)} years old and lives in {rng.choice(CITIES)}.",
        f"{other} was in the {there} and ate {with_article(rng.choice(KINDS['fruit']))}.",
        "Make a list, format the input, return it, and write each item where it belongs.",
        f"{rng.choice(FIRST_STEPS)} it first, then answer with this: it does have a sorted, bulleted, listed kind.",
        f"Name the person who can send {other} an invitation, and find the place.",
    ]
    return " ".join(rng.sample(sentences, rng.randint(2, 3))) + "\n"


# Shares of documents. Lists lead, because copying and reversing take the most examples.
MIXTURE: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (drill_document, 0.14),
    (list_document, 0.17),
    (request_document, 0.18),
    (number_document, 0.18),
    (record_document, 0.05),
    (fact_document, 0.08),
    (letter_document, 0.05),
    (whereabouts_document, 0.12),
    (story_document, 0.03),
)


def documents(seed: int, drills_first: int = 0) -> Iterator[str]:
    """An endless stream of documents that depends on nothing but its arguments.

    The first `drills_first` documents are drills; copying, once learned from them, is there for all the others.
    """
    rng = random.Random(seed)
    for _ in range(drills_first):
        yield drill_document(rng)
    kinds = [kind for kind, _ in MIXTURE]
    shares = [share for _, share in MIXTURE]
    while True:
        yield rng.choices(kinds, shares)[0](rng)
