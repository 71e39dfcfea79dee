"""Word lists and task types of the quickstart: what the tiny assistant learns to do, and one row of it at a time.

Everything is invented here and follows from a seed. Each word below is one token of the base model's tokenizer
(`build_base.py` checks that), because a model of this size learns to move whole words around within minutes, but
not to spell them.

Instructions stay below eight words, so that two rows of one task type share wording without sharing an 8-gram,
the unit in which contamination checks count.
"""

import json
import random
from collections.abc import Callable
from typing import NotRequired, TypedDict

# Twelve kinds of things with ten members each; a word belongs to one kind only, so every question has one answer.
KINDS: dict[str, tuple[str, ...]] = {
    "fruit": (
        "apple",
        "pear",
        "plum",
        "cherry",
        "grape",
        "lemon",
        "peach",
        "mango",
        "melon",
        "banana",
    ),
    "vegetable": (
        "carrot",
        "onion",
        "potato",
        "leek",
        "cabbage",
        "radish",
        "turnip",
        "cucumber",
        "tomato",
        "pumpkin",
    ),
    "mammal": ("cat", "dog", "horse", "rabbit", "fox", "tiger", "goat", "sheep", "otter", "camel"),
    "bird": (
        "owl",
        "eagle",
        "robin",
        "swan",
        "duck",
        "parrot",
        "crow",
        "heron",
        "goose",
        "sparrow",
    ),
    "fish": (
        "trout",
        "salmon",
        "carp",
        "tuna",
        "cod",
        "herring",
        "eel",
        "shark",
        "sardine",
        "haddock",
    ),
    "insect": (
        "ant",
        "bee",
        "wasp",
        "beetle",
        "moth",
        "cricket",
        "butterfly",
        "mosquito",
        "termite",
        "locust",
    ),
    "tool": (
        "hammer",
        "saw",
        "drill",
        "wrench",
        "chisel",
        "shovel",
        "rake",
        "ladder",
        "axe",
        "screwdriver",
    ),
    "vehicle": (
        "car",
        "bus",
        "train",
        "bicycle",
        "truck",
        "boat",
        "tram",
        "van",
        "scooter",
        "ship",
    ),
    "instrument": (
        "piano",
        "violin",
        "guitar",
        "flute",
        "drum",
        "trumpet",
        "harp",
        "cello",
        "banjo",
        "clarinet",
    ),
    "garment": (
        "shirt",
        "coat",
        "hat",
        "scarf",
        "glove",
        "sock",
        "skirt",
        "jacket",
        "sweater",
        "dress",
    ),
    "flower": (
        "rose",
        "tulip",
        "daisy",
        "lily",
        "orchid",
        "violet",
        "poppy",
        "sunflower",
        "daffodil",
        "dahlia",
    ),
    "tree": (
        "oak",
        "pine",
        "birch",
        "maple",
        "willow",
        "cedar",
        "elm",
        "beech",
        "spruce",
        "poplar",
    ),
}
THINGS: tuple[str, ...] = tuple(word for members in KINDS.values() for word in members)
KIND_OF: dict[str, str] = {word: kind for kind, members in KINDS.items() for word in members}

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "new"), ("happy", "sad"),
    ("bright", "dark"), ("high", "low"), ("open", "closed"), ("full", "empty"), ("early", "late"),
    ("wet", "dry"), ("hard", "soft"), ("loud", "quiet"), ("rich", "poor"), ("strong", "weak"),
    ("thick", "thin"), ("wide", "narrow"), ("near", "far"), ("clean", "dirty"), ("long", "short"),
    ("heavy", "light"), ("sweet", "sour"), ("deep", "shallow"), ("sharp", "blunt"), ("up", "down"),
    ("left", "right"), ("day", "night"), ("summer", "winter"), ("north", "south"), ("east", "west"),
    ("inside", "outside"), ("above", "below"), ("always", "never"), ("good", "bad"), ("true", "false"),
    ("smooth", "rough"), ("buy", "sell"), ("push", "pull"), ("win", "lose"), ("love", "hate"),
)  # fmt: skip
OPPOSITE_OF: dict[str, str] = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}

NAMES: tuple[str, ...] = (
    "Anna", "Tom", "Mia", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry",
    "Ida", "Jack", "Karen", "Leo", "Maria", "Nina", "Oscar", "Paul", "Quinn", "Rosa",
    "Simon", "Tara", "Ursula", "Victor", "Wendy", "Yusuf", "Zoe", "Amir", "Bella", "Carlos",
    "Diana", "Erik", "Fatima", "George", "Hana", "Igor", "Julia", "Kofi", "Lena", "Marco",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "kitchen", "garden", "library", "attic", "cellar", "office", "garage", "hall", "balcony", "museum",
    "station", "bakery", "school", "park", "market", "harbour", "theatre", "forest", "hotel", "cinema",
)  # fmt: skip
CITIES: tuple[str, ...] = (
    "Paris", "Rome", "London", "Oslo", "Madrid", "Berlin", "Vienna", "Lisbon", "Dublin", "Athens",
    "Prague", "Warsaw", "Helsinki", "Budapest", "Cairo", "Tokyo",
)  # fmt: skip
GIFTS: tuple[str, ...] = (
    "book", "card", "cake", "letter", "photo", "lamp", "map", "ticket", "present", "pen",
    "cup", "puzzle", "blanket", "basket", "soup", "clock", "mirror", "candle", "vase", "poem",
)  # fmt: skip
WISHES: tuple[str, ...] = ("birthday", "holiday", "weekend", "journey", "evening")
LARGEST_NUMBER = 40
NUMBERS: tuple[int, ...] = tuple(range(1, LARGEST_NUMBER + 1))


class ExpectedFormat(TypedDict):
    """A shape that a verifier can check without the reference answer; `n` counts bullets."""

    type: str
    n: NotRequired[int]


class Row(TypedDict):
    """One line of a data file; `input` is "" where the instruction says it all."""

    instruction: str
    input: str
    output: str
    task_type: str
    expected_format: ExpectedFormat | None


def with_article(word: str) -> str:
    """The word after "a" or "an"; the lists above hold no word whose sound and first letter disagree."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def capitalised(text: str) -> str:
    """The text with a capital first letter, the rest untouched (`str.capitalize` would lower names)."""
    return text[0].upper() + text[1:]


def some_things(rng: random.Random, smallest: int = 3, largest: int = 5) -> list[str]:
    """Between `smallest` and `largest` different words, in half of the cases all of one kind."""
    pool = THINGS if rng.random() < 0.5 else KINDS[rng.choice(tuple(KINDS))]
    return rng.sample(pool, rng.randint(smallest, largest))


def some_record(rng: random.Random) -> dict[str, str | int]:
    """A person with two or three fields, always led by the name."""
    fields: dict[str, str | int] = {
        "city": rng.choice(CITIES),
        "age": rng.choice(NUMBERS),
        "pet": rng.choice(KINDS["mammal"]),
        "fruit": rng.choice(KINDS["fruit"]),
        "plays": rng.choice(KINDS["instrument"]),
    }
    chosen = rng.sample(tuple(fields), rng.randint(1, 2))
    return {"name": rng.choice(NAMES), **{key: fields[key] for key in chosen}}


def some_whereabouts(rng: random.Random) -> list[tuple[str, str]]:
    """Two or three people, each in a place of their own: (name, place)."""
    n = rng.randint(2, 3)
    return list(zip(rng.sample(NAMES, n), rng.sample(PLACES, n), strict=True))


def _row(
    task_type: str,
    instruction: str,
    source: str,
    output: str,
    expected_format: ExpectedFormat | None = None,
) -> Row:
    return {
        "instruction": instruction,
        "input": source,
        "output": output,
        "task_type": task_type,
        "expected_format": expected_format,
    }


BULLETS = (
    "List the items as bullets.", "Turn this into a bullet list.", "Write each item as a bullet.",
    "Make a bulleted list.", "Put the items into bullet points.", "Show these as bullet points.",
    "Give me a bullet list.", "Format the items as bullets.",
)  # fmt: skip
JSON = (
    "Answer as JSON.", "Write it as JSON.", "Convert this to JSON.", "Give me this as JSON.",
    "Turn the input into JSON.", "Put this into JSON.", "Format the input as JSON.", "Return valid JSON.",
)  # fmt: skip
REVERSE = (
    "Reverse the list.", "Reverse the order of the items.", "Write the items backwards.",
    "Put the list in reverse order.", "List the items from last to first.", "Turn the order around.",
    "Give me the reversed list.", "Start with the last item.",
)  # fmt: skip
SORT = (
    "Sort the numbers.", "Sort from smallest to largest.", "Put the numbers in order.",
    "Order these numbers.", "Arrange the numbers in rising order.", "Write the numbers in ascending order.",
    "Give me the sorted numbers.", "Start with the smallest number.",
)  # fmt: skip
FIRST = (
    "Which word comes first?", "What is the first item?", "Name the first word.", "Give me the first item.",
    "Which item opens the list?", "Pick the first word.",
)  # fmt: skip
LAST = (
    "Which word comes last?", "What is the last item?", "Name the last word.", "Give me the last item.",
    "Which item closes the list?", "Pick the last word.",
)  # fmt: skip
COUNT = (
    "How many items are there?", "Count the items.", "How long is the list?", "How many words are listed?",
    "Give me the number of items.", "Tell me how many items.", "What is the item count?", "Count the words.",
)  # fmt: skip
OPPOSITE = (
    "What is the opposite of {}?", "Name the opposite of {}.", "Tell me the opposite of {}.",
    "Give me the opposite of {}.", "Which word means the opposite of {}?", "What is the reverse of {}?",
    "Do you know the opposite of {}?", "Find the opposite of {}.",
)  # fmt: skip
CATEGORY = (
    "What kind of thing is {}?", "What is {}?", "Tell me what {} is.", "How would you classify {}?",
    "Which category does {} belong to?", "Explain what {} is.", "Which kind of thing is {}?", "What type is {}?",
)  # fmt: skip
THANK = (
    "Thank {} for the {}.", "Write {} thanks for the {}.", "Say thank you to {} for the {}.",
    "Send {} thanks for the {}.",
)  # fmt: skip
WISH = (
    "Wish {} a happy {}.", "Write {} wishes for a happy {}.", "Send {} wishes for the {}.",
    "Tell {} to have a happy {}.",
)  # fmt: skip
INVITE = ("Invite {} to the {}.", "Ask {} to come to the {}.", "Write {} an invitation to the {}.")
NUMBERED = (
    "Give each item a number.", "Make a list with numbers.", "List the items with numbers.",
    "Write a number with each item.", "Turn this into a list with numbers.", "Show these with numbers.",
    "Put a number with each item.", "Format the items with numbers.",
)  # fmt: skip
REVERSE_AS_JSON = (
    "Reverse the list, then answer as JSON.", "Write the items backwards, as JSON.",
    "Reverse the order, then write JSON.", "Give me the reversed list as JSON.",
    "Answer as JSON, from last to first.",
)  # fmt: skip
INSTRUCTIONS: tuple[str, ...] = (
    *BULLETS, *JSON, *REVERSE, *SORT, *FIRST, *LAST, *COUNT, *OPPOSITE, *CATEGORY, *THANK, *WISH, *INVITE,
    *NUMBERED, *REVERSE_AS_JSON,
)  # fmt: skip


def bullets(rng: random.Random) -> Row:
    """Comma list to one bullet a line."""
    items = some_things(rng)
    shape: ExpectedFormat = {"type": "bullets", "n": len(items)}
    return _row(
        "bullets",
        rng.choice(BULLETS),
        ", ".join(items),
        "\n".join(f"- {item}" for item in items),
        shape,
    )


def json_value(rng: random.Random) -> Row:
    """Comma list to a JSON array, or `key: value` pairs to a JSON object; the input says which."""
    instruction = rng.choice(JSON)
    if rng.random() < 0.5:
        items = some_things(rng)
        return _row("json", instruction, ", ".join(items), json.dumps(items), {"type": "json"})
    record = some_record(rng)
    source = ", ".join(f"{key}: {value}" for key, value in record.items())
    return _row("json", instruction, source, json.dumps(record), {"type": "json"})


def reverse(rng: random.Random) -> Row:
    """The same words from last to first."""
    items = some_things(rng)
    return _row("reverse", rng.choice(REVERSE), ", ".join(items), ", ".join(reversed(items)))


def sort(rng: random.Random) -> Row:
    """Three different numbers, rising; one row in six is sorted already. With four, this base scored 0.77."""
    numbers = rng.sample(NUMBERS, 3)
    return _row(
        "sort", rng.choice(SORT), ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))
    )


def first_last(rng: random.Random) -> Row:
    """The word at one end of the list."""
    items = some_things(rng)
    if rng.random() < 0.5:
        return _row("first_last", rng.choice(FIRST), ", ".join(items), items[0])
    return _row("first_last", rng.choice(LAST), ", ".join(items), items[-1])


def count(rng: random.Random) -> Row:
    """How many words, from two to six."""
    items = some_things(rng, 2, 6)
    return _row("count", rng.choice(COUNT), ", ".join(items), f"There are {len(items)} items.")


def opposite(rng: random.Random) -> Row:
    """A fact that the base model saw as prose."""
    word = rng.choice(tuple(OPPOSITE_OF))
    return _row(
        "opposite",
        rng.choice(OPPOSITE).format(word),
        "",
        f"The opposite of {word} is {OPPOSITE_OF[word]}.",
    )


def category(rng: random.Random) -> Row:
    """A fact that the base model saw as prose."""
    word = rng.choice(THINGS)
    answer = capitalised(f"{with_article(word)} is {with_article(KIND_OF[word])}.")
    return _row("category", rng.choice(CATEGORY).format(with_article(word)), "", answer)


def polite(rng: random.Random) -> Row:
    """One polite sentence: thanks, a wish, or an invitation."""
    name, intent = rng.choice(NAMES), rng.randrange(3)
    if intent == 0:
        gift = rng.choice(GIFTS)
        instruction, sentence = (
            rng.choice(THANK).format(name, gift),
            f"thank you very much for the {gift}.",
        )
    elif intent == 1:
        wish = rng.choice(WISHES)
        instruction, sentence = rng.choice(WISH).format(name, wish), f"I wish you a happy {wish}."
    else:
        place = rng.choice(PLACES)
        instruction, sentence = (
            rng.choice(INVITE).format(name, place),
            f"please join us at the {place}.",
        )
    return _row("polite", instruction, "", f"Dear {name}, {sentence}")


def numbered(rng: random.Random) -> Row:
    """Comma list to one numbered item a line, from 1."""
    items = some_things(rng)
    lines = [f"{number}. {item}" for number, item in enumerate(items, start=1)]
    return _row("numbered", rng.choice(NUMBERED), ", ".join(items), "\n".join(lines))


def reverse_as_json(rng: random.Random) -> Row:
    """The composition held out of training: both skills are taught, never together."""
    items = some_things(rng)
    output = json.dumps(items[::-1])
    return _row(
        "reverse_as_json", rng.choice(REVERSE_AS_JSON), ", ".join(items), output, {"type": "json"}
    )


TASKS: tuple[Callable[[random.Random], Row], ...] = (
    bullets, json_value, reverse, sort, first_last, count, opposite, category, polite, numbered,
)  # fmt: skip


def key_of(row: Row) -> tuple[str, str]:
    """What makes two rows the same question."""
    return row["instruction"], row["input"]


def draw_rows(
    task: Callable[[random.Random], Row], n: int, rng: random.Random, taken: set[tuple[str, str]]
) -> list[Row]:
    """`n` rows of one task whose questions are not in `taken`, which grows by them.

    Raises:
        ValueError: the task has too few different questions (1,000 draws in a row gave nothing new).
    """
    rows: list[Row] = []
    misses = 0
    while len(rows) < n:
        row = task(rng)
        if key_of(row) in taken:
            misses += 1
            if misses == 1_000:
                raise ValueError(
                    f"{task.__name__} ran out of new questions after {len(rows)} of {n} rows"
                )
            continue
        misses = 0
        taken.add(key_of(row))
        rows.append(row)
    return rows
