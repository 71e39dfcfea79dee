"""Write the data of the small real-model recipes: tasks over the questions of GSM8K with answers that follow by rule.

    python scripts/question_tasks.py GSM8K.json            # rewrites recipes/smollm2-135m/data, byte for byte

GSM8K.json is a list of rows with the question under `question` or `instruction`, such as GSM8K's train split (MIT,
https://github.com/openai/grade-school-math). A question is used once, so no text stands in two files. Questions whose
numbers, names or sentences a rule could read in two ways are left out. Families of `HELD_OUT` stand in the test alone;
so do the last two wordings of each instruction.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from sft_recipes.overlap import prompt_overlaps

OUTPUT = Path(__file__).resolve().parents[1] / "recipes" / "smollm2-135m" / "data"
SEED = 17
TRAIN_ROWS = 250  # of each family, as for the other two
VALIDATION_ROWS = 20
TEST_ROWS = 40
# The last wordings of each instruction are asked in the test alone.
UNSEEN_WORDINGS = 2
SHORTEST, LONGEST = 80, 320  # characters of a question

# First names that are no other word, those that the questions use most.
NAMES = frozenset(
    """
    Aaron Adam Alan Albert Alex Alexander Alexis Alice Allison Amanda Amy Andrea Andrew Andy Angela Anna Anne Annie
    Anthony Antonio Arthur Barbara Barry Becky Bella Ben Benjamin Beth Betty Billy Blake Bob Bobby Brad Brandon Brenda
    Brian Brittany Bruce Bryan Caleb Calvin Carla Carlos Carly Carrie Carson Cathy Charles Charlie Cheryl Chris
    Christina Christine Christopher Cindy Claire Clara Connie Cynthia Dan Dana Daniel Danielle Danny Daphne Dave David
    Dennis Derek Diana Diane Diego Donna Dorothy Elizabeth Ella Elsa Emily Emma Eric Erica Erin Ernie Ethan Eugene Evan
    Fernanda Fiona Fred Freddy Gabriel Gary George Gerald Gina Gladys Greg Greta Haley Hannah Harold Harry Helen Henry
    Ian Isabella Ivan Jackson Jacob Jake James Jamie Jane Janet Janice Jared Jason Jayden Jeff Jen Jenna Jennifer Jenny
    Jeremy Jerome Jerry Jess Jesse Jessica Jill Jim Jimmy Joan Joe Joel Joey John Johnny Jose Joseph Josh Joshua Juan
    Julia Julie Justin Karen Kate Katherine Kathleen Katie Kayla Kelly Kelsey Ken Kendra Kenneth Kenny Kevin Kim
    Kimberly Kristen Kristin Kyle Kylie Lara Larry Laura Layla Leo Lila Linda Lisa Lola Louis Lucas Lucy Luke Lydia
    Mabel Maddie
    Madeline Maggie Mandy Manny Marcia Marco Marcus Margaret Maria Marie Mario Markus Martha Marta Mary Matt
    Matthew Maurice Maya Megan Melissa Michael Michelle Mike Molly Monica Nancy Natalie Natasha Nathan Neil Nicholas
    Nick Nicole Nina Noah Nora Oliver Olivia Pam Patricia Patrick Paul Paula Pauline Peggy Pete Peter Phil Philip
    Phillip Phoebe Rachel Ralph Randy Raul Rebecca Rhonda Richard Rick Rita Robbie Robert Roger Ron Ryan Sabrina Sally
    Sam Samantha Sammy Samuel Sandra Sara Sarah Scott Sean Shane Sharon Sheila Shelly Simon Sophia Sophie Stacy Stella
    Stephanie Steve Steven Susan Susie Tabitha Talia Tammy Tanya Tara Ted Teresa Theresa Thomas Tiffany Tim Timmy
    Timothy Tina Toby Todd Tom Tommy Tony Tonya Tracy Trevor Tyler Valerie Veronica Victor Vincent Wendy William Zach
    Zachary Zoe
    """.split()
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_MONEY = re.compile(r"\$(\d+(?:\.\d+)?)")
_SENTENCE_END = re.compile(r"(?<=[.?!]) (?=[A-Z0-9$])")
# A title, an initial or an hour, whose dot ends no sentence; fractions, shares, hours, ordinals and units written on.
_UNCLEAR_SENTENCES = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|vs|[A-Za-z]\.[A-Za-z]|[A-Z])\.|\.{2}|[!:;()\"]"
)
_UNCLEAR_NUMBERS = re.compile(
    r"\d[/:,%-]|[/-]\d|\d[A-Za-z]|[A-Za-z]\d|\d\.\d*0\b|\b0\d|(?<!\d)\.\d"
)
_CAPITALISED = re.compile(r"\b[A-Z][a-z]+\b")
_MONEY_ASKED = re.compile(
    r"\bhow much (?:money|more money|change|will|did|does|do|is|was|would)\b|\bhow many (?:more )?dollars\b",
    re.I,
)
_MONEY_WORDS = re.compile(
    r"\b(?:costs?|money|dollars|pay|paid|spend|spent|earn|earned|saved?|charge|owe|change|profit)\b"
)
_TIME_ASKED = re.compile(
    r"\bhow (?:many (?:more )?(?:seconds|minutes|hours|days|weeks|months|years)|long)\b", re.I
)
_COUNT_ASKED = re.compile(r"\bhow many (?:more )?(\w+)", re.I)
_UNITS_OF_TIME_OR_MONEY = re.compile(
    r"\b(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?|time|long|old|dollars?|cents?|money|much)\b", re.I
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question and what the rules read in it; `sentences` is empty where they are not clear."""

    text: str
    sentences: Sequence[str] = field(default_factory=list)

    @property
    def has_clear_numbers(self) -> bool:
        """Whether every number in digits is a whole or decimal number that stands by itself."""
        return _UNCLEAR_NUMBERS.search(self.text) is None

    @property
    def numbers(self) -> list[str]:
        """The numbers in digits as they are written, in their order."""
        return _NUMBER.findall(self.text)


def read_question(text: str) -> Question:
    """The question with single spaces, split into sentences where that is clear."""
    text = " ".join(text.split())
    if _UNCLEAR_SENTENCES.search(text) or not text.endswith("?"):
        return Question(text)
    sentences = _SENTENCE_END.split(text)
    # A sentence that goes on in small letters behind its dot was not understood.
    if any(re.search(r"[.?] ", sentence) for sentence in sentences):
        return Question(text)
    return Question(text, sentences)


def numbers_in_order(question: Question) -> str | None:
    """`89, 3, 7`; None where there are fewer than two or more than eight."""
    if not question.has_clear_numbers or not 2 <= len(question.numbers) <= 8:
        return None
    return ", ".join(question.numbers)


def numbers_as_json(question: Question) -> str | None:
    """`{"numbers": [89, 3, 7]}`."""
    listed = numbers_in_order(question)
    return None if listed is None else f'{{"numbers": [{listed}]}}'


def money_as_json(question: Question) -> str | None:
    """`{"dollars": [12, 3.5]}`; None without any, and where money is written in other ways, too."""
    amounts = _MONEY.findall(question.text)
    if not question.has_clear_numbers or not 1 <= len(amounts) <= 5:
        return None
    if re.search(r"dollars?|cents?|bills?|million|thousand|hundred|\d\$", question.text):
        return None
    return f'{{"dollars": [{", ".join(amounts)}]}}'


def names_in(question: Question, known_words: frozenset[str]) -> list[str]:
    """The names in order of their first mention; empty where another capital might be one."""
    names: dict[str, None] = {}
    for sentence in question.sentences:
        for match in _CAPITALISED.finditer(sentence):
            word = match.group()
            if word in NAMES:
                names[word] = None
            elif match.start() > 0 or word.lower() not in known_words:
                return []
    return list(names)


def asked_for(question: Question) -> str | None:
    """`money`, `time` or `count` by the last sentence; None where that is not clear."""
    if not question.sentences:
        return None
    last = question.sentences[-1]
    if last.lower().count("how ") != 1:
        return None
    if _TIME_ASKED.search(last):
        return None if _MONEY_WORDS.search(last) else "time"
    if _MONEY_ASKED.search(last) and (_MONEY_WORDS.search(last) or "$" in question.text):
        return None if re.search(r"\btime\b|weigh|water|far|long\b", last) else "money"
    if (
        _COUNT_ASKED.search(last)
        and not _UNITS_OF_TIME_OR_MONEY.search(last)
        and not _MONEY_WORDS.search(last)
    ):
        return "count"
    return None


def first_sentence(question: Question) -> str | None:
    """The first of at least two sentences, word for word."""
    return question.sentences[0] if len(question.sentences) > 1 else None


def last_sentence(question: Question) -> str | None:
    """The question that is asked at the end, word for word."""
    return question.sentences[-1] if len(question.sentences) > 1 else None


def sentence_count(question: Question) -> str | None:
    """How many sentences there are, in digits."""
    return str(len(question.sentences)) if question.sentences else None


def largest_number(question: Question) -> str | None:
    """The largest number in digits, which must stand there once, of at least two."""
    return _extreme(question, max)


def smallest_number(question: Question) -> str | None:
    """The smallest number in digits, which must stand there once, of at least two."""
    return _extreme(question, min)


def _extreme(question: Question, choose: Callable[..., str]) -> str | None:
    numbers = question.numbers
    if not question.has_clear_numbers or len(set(numbers)) < 2:
        return None
    chosen = choose(numbers, key=float)
    return chosen if numbers.count(chosen) == 1 else None


def first_words_in_capitals(question: Question) -> str | None:
    """The first three words, in capital letters, without a comma or dot at the end."""
    words = question.text.split()[:3]
    if not all(re.fullmatch(r"[A-Za-z]+", word) for word in words):
        return None
    return " ".join(words).upper()


@dataclass(frozen=True)
class Family:
    """A kind of task: how it is worded, its answer, and what holds for the form of any answer.

    Answers are drawn in equal numbers from the groups that `group_of` puts them in, as far as there are so many.
    """

    wordings: Sequence[str]
    answer: Callable[[Question], str | None]
    expected_format: dict[str, Any] | None
    group_of: Callable[[str], object] = bool


def families(known_words: frozenset[str]) -> dict[str, Family]:
    """Every family by name; those of `HELD_OUT` are asked in the test alone."""

    def names_as_bullets(question: Question) -> str | None:
        names = names_in(question, known_words)
        return "\n".join(f"- {name}" for name in names) or None

    return {
        "numbers": Family(
            (
                "List the numbers written in digits, in order, separated by commas.",
                "Write down every number in digits, in the order of the text, with commas between them.",
                "Which numbers in digits does the text contain? Give them in order, separated by commas.",
                "Extract the numbers (digits only) from left to right as a comma-separated list.",
                "Give me all numbers in digits as they come, with commas in between.",
                "Copy out the numbers in digits, in order, divided by commas.",
                "What are the numbers in digits, in their order? Answer with commas between them.",
                "Name the numbers in digits one after the other, comma-separated.",
            ),
            numbers_in_order,
            {"regex": r"^\d+(\.\d+)?(, \d+(\.\d+)?)*$"},
        ),
        "money_json": Family(
            (
                'Return the sums of money as JSON: {"dollars": [...]}.',
                'Which amounts in dollars are mentioned? Answer as JSON with the key "dollars".',
                'Put every dollar amount into JSON like {"dollars": [1, 2]}.',
                'Extract the prices and other sums in dollars as {"dollars": [...]}.',
                'Give the dollar amounts in order as a JSON object with one list, "dollars".',
                'Write the amounts of money as JSON, in order, under "dollars".',
                'List all dollar amounts as JSON of the form {"dollars": [...]}.',
                'Sums of money, please, in order, as a JSON object with the key "dollars".',
            ),
            money_as_json,
            {"type": "json"},
        ),
        "names": Family(
            (
                "List the names of the people as bullet points.",
                "Who is mentioned by name? One bullet point for each.",
                "Write each person's name on a line of its own that starts with a dash.",
                "Give the first names that occur, each once, as a bulleted list.",
                "Make a bullet list of the people named in the text.",
                "Which people are named? Answer with dashes, one name a line.",
                "Name everybody in the text, one bullet each, in order.",
                "Bullet points: the names of all people, each once.",
            ),
            names_as_bullets,
            {"regex": r"^- \w+(\n- \w+)*$"},
            group_of=lambda answer: min(answer.count("\n"), 2),
        ),
        "asks_for": Family(
            (
                "Does this ask for money, time or a count? Answer with one word: money, time or count.",
                "What is wanted in the end: money, time or count? One word.",
                "Classify the question as money, time or count.",
                "Is the answer to this an amount of money, a time or a count? Reply money, time or count.",
                "Label: money, time or count?",
                "Say in one word what is asked for: money, time or count.",
                "Money, time or count: which does the question ask for?",
                "Decide what the question wants to know. Answer only money, time or count.",
            ),
            asked_for,
            {"choices": ["money", "time", "count"]},
            group_of=str,
        ),
        "first_sentence": Family(
            (
                "Copy the first sentence.",
                "What is the first sentence? Repeat it word for word.",
                "Write out only the first sentence of the text.",
                "Give me the opening sentence, unchanged.",
                "Quote the first sentence exactly, without quotation marks.",
                "Repeat the sentence that the text begins with.",
                "The first sentence only, please.",
                "Return just the sentence at the beginning, as it is.",
            ),
            first_sentence,
            None,
        ),
        "sentence_count": Family(
            (
                "How many sentences are there? Answer with a number.",
                "Count the sentences. Reply with the number only.",
                "Give the number of sentences in digits.",
                "Of how many sentences does the text consist? Only the number.",
                "Sentence count, as a number.",
                "Tell me how many sentences this has, in digits.",
                "What is the number of sentences? Digits only.",
                "Count: how many sentences? Just the number.",
            ),
            sentence_count,
            {"regex": r"^\d+$"},
            group_of=lambda answer: min(int(answer), 5),
        ),
        "largest_number": Family(
            (
                "What is the largest number written in digits? Answer with it alone.",
                "Find the greatest number in digits and write only that.",
                "Which number in digits is the biggest? Only the number.",
                "Give the highest number that is written in digits.",
                "Reply with the largest number in digits.",
                "Pick out the maximum of the numbers in digits. Nothing else.",
                "The biggest number in digits, please, alone.",
                "Of all numbers in digits, which is the largest? Just the number.",
            ),
            largest_number,
            {"regex": r"^\d+(\.\d+)?$"},
        ),
        "first_words": Family(
            (
                "Write the first three words in capital letters.",
                "Give me the first three words, all in upper case.",
                "Repeat the three words at the beginning in capitals.",
                "First three words, in CAPITALS, nothing else.",
                "Which three words come first? Write them in upper-case letters.",
                "Turn the first three words into capitals and return only them.",
                "Return the opening three words in upper case.",
                "The first three words, please, in capital letters.",
            ),
            first_words_in_capitals,
            {"upper_case": True, "max_words": 3},
        ),
        "question": Family(
            (
                "Copy the question at the end.",
                "What is the last sentence? Repeat it word for word.",
                "Write out only the last sentence of the text.",
                "Give me the closing question, unchanged.",
            ),
            last_sentence,
            {"ends_with": "?"},
        ),
        "numbers_json": Family(
            (
                'Return the numbers written in digits, in order, as JSON: {"numbers": [...]}.',
                'Which numbers in digits are mentioned? Answer as JSON with the key "numbers".',
                'Put every number in digits into JSON like {"numbers": [1, 2]}.',
                'Give the numbers in digits in order as a JSON object with one list, "numbers".',
            ),
            numbers_as_json,
            {"type": "json"},
        ),
        "smallest_number": Family(
            (
                "What is the smallest number written in digits? Answer with it alone.",
                "Find the least number in digits and write only that.",
                "Which number in digits is the smallest? Only the number.",
                "Reply with the smallest number in digits.",
            ),
            smallest_number,
            {"regex": r"^\d+(\.\d+)?$"},
        ),
    }


HELD_OUT = ("question", "numbers_json", "smallest_number")


def read_questions(path: Path) -> list[str]:
    """Questions that are printable ASCII and neither short nor long."""
    questions = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        text = " ".join(
            str(row.get("question") or row["instruction"]).replace("\u2019", "'").split()
        )
        if text.isascii() and SHORTEST <= len(text) <= LONGEST:
            questions.append(text)
    return list(dict.fromkeys(questions))


def common_words(questions: Sequence[str]) -> frozenset[str]:
    """Words that the questions write in small letters, too: at the start of a sentence no names."""
    return frozenset(re.findall(r"\b[a-z]+\b", " ".join(questions)))


def draw_rows(
    family: str,
    kinds: dict[str, Family],
    questions: list[Question],
    count: int,
    generator: random.Random,
    wordings: int | None,
) -> list[dict[str, Any]]:
    """Rows of a family from questions that it fits; those are used up."""
    kind = kinds[family]
    groups: dict[object, list[tuple[Question, str]]] = defaultdict(list)
    for question in questions:
        answer = kind.answer(question)
        if answer is not None:
            groups[kind.group_of(answer)].append((question, answer))
    # One of each group in turn; a group that is used up is left out.
    turns = zip_longest(*(groups[key] for key in sorted(groups, key=str)))
    drawn = [pair for pair in chain.from_iterable(turns) if pair is not None][:count]
    if len(drawn) < count:
        raise SystemExit(f"{family}: only {len(drawn)} of {count} rows: give more questions")
    generator.shuffle(drawn)
    rows = []
    for question, answer in drawn:
        questions.remove(question)
        row = {
            "instruction": generator.choice(kind.wordings[:wordings]),
            "input": question.text,
            "output": answer,
            "task_type": family,
            "expected_format": kind.expected_format,
        }
        rows.append(row)
    return rows


def interleaved(rows_of: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row of each family in turn, so that the first rows of a file are a sample of it."""
    return [row for turn in zip(*rows_of, strict=True) for row in turn]


def draw_split(
    kinds: dict[str, Family],
    names: Sequence[str],
    order: Sequence[str],
    questions: list[Question],
    count: int,
    generator: random.Random,
    wordings: int | None,
) -> list[dict[str, Any]]:
    """`count` rows of each named family, drawn in that order, one of each in turn."""
    drawn = {}
    for name in order:
        if name in names:
            drawn[name] = draw_rows(name, kinds, questions, count, generator, wordings)
    return interleaved([drawn[name] for name in names])


def prompt(row: dict[str, Any]) -> str:
    """What a model is asked."""
    return f"{row['instruction']}\n\n{row['input']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    generator = random.Random(SEED)
    texts = read_questions(options.questions)
    kinds = families(common_words(texts))
    questions = list(map(read_question, texts))
    generator.shuffle(questions)
    trained = [name for name in kinds if name not in HELD_OUT]
    # Families that few questions fit come first.
    order = sorted(
        kinds,
        key=lambda name: sum(kinds[name].answer(question) is not None for question in questions),
    )
    held_out = {
        "test": draw_split(kinds, list(kinds), order, questions, TEST_ROWS, generator, None),
        "validation": draw_split(
            kinds, trained, order, questions, VALIDATION_ROWS, generator, -UNSEEN_WORDINGS
        ),
    }
    asked = [prompt(row) for rows in held_out.values() for row in rows]
    state = generator.getstate()
    while True:
        generator.setstate(state)
        pool = list(questions)
        rows = draw_split(kinds, trained, order, pool, TRAIN_ROWS, generator, -UNSEEN_WORDINGS)
        # GSM8K has the same question with other names and numbers: `evaluate --gate` would refuse such test rows.
        hits = {hit.train_row for hit in prompt_overlaps(list(map(prompt, rows)), asked)}
        if not hits:
            break
        leaked = {rows[number]["input"] for number in hits}
        questions = [question for question in questions if question.text not in leaked]
    options.output.mkdir(parents=True, exist_ok=True)
    for split, drawn in {**held_out, "train": rows}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in drawn)
        (options.output / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}.jsonl: {len(drawn):,} rows")


if __name__ == "__main__":
    main()
