"""The verdict of an evaluation in one plain sentence, from the figures alone, and what follows.

Terminal and report say the same sentence. It claims what the intervals carry: a difference whose
interval holds zero is not decided, however large it looks.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from sft_recipes.overlap import trained_on
from sft_recipes.report.evaluation_parts import Row
from sft_recipes.report.number_texts import counted, whole_percent

Content = Mapping[str, Any]

# Below it a share moves by more than three points with a single row, and no interval is narrow.
FEW_ROWS = 30
# A judgement: the shipped recipes for 135M and 270M models learned half of their tasks from 960.
FEW_TRAINED_ROWS = 960
# Answers as long are seldom equal to what was expected, word for word, even where they are right.
LONG_ANSWER_WORDS = 20
# Of the answers; by so much more than before, or as a share of all, form counts as learned.
FORM_GAINED = 0.2
FORM_LEARNED = 0.5
# Beyond it "more rows" is no advice.
MOST_ROWS_ADVISED = 20_000

NO_ROWS = "no rows"
NO_EXPECTED = "no expected answers"
NOTHING_RIGHT = "nothing right"
ALONE = "no base"
BETTER = "better"
WORSE = "worse"
UNDECIDED = "undecided"

_UNDECIDED_GATES = ("inconclusive", "insufficient_n")
# What tells right from wrong, the strictest first.
_COUNTED = ("exact_match", "tool_call_exact")
_DOES = {
    "exact_match": "answers {} as expected",
    "tool_call_exact": "makes the expected tool calls in {}",
}
_SHARED_WORDS = "token_f1"


class Verdict(NamedTuple):
    """The sentence, what it comes to, and how many rows would decide what is open (0: unknown)."""

    sentence: str
    outcome: str
    rows_needed: int
    is_few: bool

    @property
    def is_open(self) -> bool:
        """Whether more rows are what is missing."""
        return self.outcome == UNDECIDED or self.is_few


def verdict_of(content: Content, base: Content | None, samples: Sequence[Row]) -> Verdict:
    """What an evaluation comes to: `content` and `base` as in `metrics.json`."""
    if not content["n"]:
        return Verdict("No rows were answered, so nothing can be said.", NO_ROWS, 0, False)
    is_few = content["n"] < FEW_ROWS
    metric = _telling_metric(content, base)
    difference = _difference(content, metric)
    outcome = _outcome(content, base, metric, difference, samples)
    needed = _rows_needed(difference) if outcome == UNDECIDED else 0
    parts = [_what_it_answers(content, base, metric), _conclusion(content, base, outcome, samples)]
    text = ": ".join(part for part in parts if part)
    for doubt in _doubts(content, outcome, needed, is_few):
        text += f"; {doubt}"
    return Verdict(text + ".", outcome, needed, is_few)


def _telling_metric(content: Content, base: Content | None) -> str:
    """The strictest metric that any system moves; empty without one."""
    if "metric" in content.get("prompting", {}):
        return str(content["prompting"]["metric"])
    for name in (*_COUNTED, _SHARED_WORDS):
        for evaluation in (content, base):
            if evaluation is not None and _value(evaluation, name):
                return name
    return ""


def _value(evaluation: Content, metric: str) -> float:
    return evaluation["metrics"][metric]["value"] or 0.0


def _has_expected(content: Content) -> bool:
    return any(content["metrics"][name]["n"] for name in _COUNTED)


def _difference(content: Content, metric: str) -> Content | None:
    """To the best way of asking the base, or else to what stands as the base."""
    if "difference" in content.get("prompting", {}):
        difference: Content = content["prompting"]["difference"]
        return difference
    return content.get("differences", {}).get(metric)


def _outcome(
    content: Content,
    base: Content | None,
    metric: str,
    difference: Content | None,
    samples: Sequence[Row],
) -> str:
    if not _has_expected(content):
        return NO_EXPECTED
    if metric not in _COUNTED and not _are_long(samples):
        return NOTHING_RIGHT
    if base is None:
        return ALONE
    if difference is None or difference["ci_low"] is None:
        return UNDECIDED
    if difference["ci_low"] > 0:
        return BETTER
    return WORSE if difference["ci_high"] < 0 else UNDECIDED


def _are_long(samples: Sequence[Row]) -> bool:
    words = [len(row["reference"].split()) for row in samples if row["reference"]]
    return bool(words) and median(words) > LONG_ANSWER_WORDS


def _rows_needed(difference: Content | None) -> int:
    """How many rows would take zero out of the interval, if the difference stays what it is.

    The width of an interval goes with the root of the number of rows.
    """
    if difference is None or not difference["value"] or difference["ci_low"] is None:
        return 0
    half_width = (difference["ci_high"] - difference["ci_low"]) / 2
    needed = difference["n"] * (half_width / abs(difference["value"])) ** 2
    # To two digits: it is an estimate of an estimate.
    digits = 1 - int(math.log10(max(needed, 10)))
    rounded = math.ceil(needed * 10**digits) * 10**-digits
    return round(rounded) if needed <= MOST_ROWS_ADVISED else 0


def _what_it_answers(content: Content, base: Content | None, metric: str) -> str:
    """How many are right, of the tuned model and of the base at its best."""
    if not _has_expected(content):
        return _how_it_ends(content)
    is_known = base is not None or content.get("training", {}).get("rows")
    subject = "The tuned model" if is_known else "The model"
    counted_by = metric if metric in _COUNTED else _COUNTED[0]
    if not content["metrics"][counted_by]["n"]:
        counted_by = _COUNTED[1]
    own = content["metrics"][counted_by]
    does = _DOES[counted_by].format(f"{_right(own)} of {_asked(content, own['n'])}")
    text = f"{subject} {does}{_share(own)}"
    if base is not None:
        best = _best_base(content, base)
        of_base = best.metrics[counted_by]
        text += f", {best.name} {_right(of_base)}{_share(of_base)}"
    return text


def _right(estimate: Content) -> int:
    return round((estimate["value"] or 0) * estimate["n"])


def _share(estimate: Content) -> str:
    """` (47 %)`; nothing beside a zero."""
    return f" ({whole_percent(estimate['value'])})" if estimate["value"] else ""


def _asked(content: Content, number: int) -> str:
    """Rows; where several have one prompt, which then counts once, prompts."""
    return counted(number, "row" if content["n"] == content["rows"] else "prompt")


class _Base(NamedTuple):
    """The base as it does best, and that way in words."""

    name: str
    metrics: Content


def _best_base(content: Content, base: Content) -> _Base:
    prompting = content.get("prompting", {})
    for system in content.get("comparisons", ()):
        if len(prompting.get("ways", ())) > 1 and system["name"] == prompting.get("best"):
            way = system["name"].removeprefix("base").removeprefix(", ")
            return _Base(f"the base at its best ({way or 'as it is'})", system["metrics"])
    return _Base("the base", base["metrics"])


def _how_it_ends(content: Content) -> str:
    ended = content["metrics"]["eos_rate"]
    well_formed = content["metrics"]["format_adherence"]
    return (
        f"No row has an expected answer, so right and wrong are not known; "
        f"{whole_percent(ended['value'])} of {_asked(content, content['n'])} end by themselves, "
        f"{whole_percent(well_formed['value'])} are well formed"
    )


def _conclusion(
    content: Content, base: Content | None, outcome: str, samples: Sequence[Row]
) -> str:
    if outcome in (NO_EXPECTED, ALONE):
        return ""
    if outcome == NOTHING_RIGHT:
        return _what_was_learned(content, base)
    prompting = content.get("prompting")
    if prompting is None:
        words = {BETTER: "better than the base", WORSE: "worse than the base"}
        verdict = words.get(outcome, "which of the two is better is not decided")
    else:
        prompt = "a prompt" if "shots" in prompting else "a prompt without examples"
        words = {BETTER: f"tuning beat {prompt}", WORSE: f"{prompt} beat tuning"}
        verdict = words.get(outcome, f"whether tuning beat {prompt} is not decided")
    if _telling_metric(content, base) == _SHARED_WORDS:
        verdict += _by_shared_words(content, base)
    return verdict


def _by_shared_words(content: Content, base: Content | None) -> str:
    """Said where no answer is equal to what was expected, as with long ones."""
    own = whole_percent(_value(content, _SHARED_WORDS))
    text = f", by words shared with the long expected answers ({own}"
    if base is not None:
        best = _best_base(content, base)
        text += f", {best.name} {whole_percent(best.metrics[_SHARED_WORDS]['value'])}"
    return text + ")"


def _what_was_learned(content: Content, base: Content | None) -> str:
    form = _value(content, "completion_rate")
    before = 0.0 if base is None else _value(base, "completion_rate")
    trained = content.get("training", {}).get("rows")
    if not trained:
        return "the form is right, the facts are not" if form >= FORM_LEARNED else ""
    text = "it learned neither the form nor the facts"
    if form >= FORM_LEARNED:
        text = "the form is right, the facts are not"
    if form >= FORM_LEARNED and form - before >= FORM_GAINED:
        text = "it learned the form, not the facts"
    if trained < FEW_TRAINED_ROWS:
        text += f"; {trained:,} training rows are few for this"
    return text


def _doubts(content: Content, outcome: str, needed: int, is_few: bool) -> list[str]:
    """What makes the sentence worth less than it sounds."""
    doubts = []
    if outcome == ALONE and content.get("training", {}).get("rows"):
        doubts.append("without a base to compare with it is not known what tuning did")
    if is_few:
        verb = "is" if content["n"] == 1 else "are"
        doubts.append(f"{_asked(content, content['n'])} {verb} few to judge by")
    if needed:
        doubts.append(f"about {needed:,} rows would decide it, if the difference stays")
    by_rule = content.get("training_rows", {}).get("by_rule")
    if by_rule:
        seen = sum(by_rule.values())
        doubts.append(f"{seen:,} of them {trained_on(by_rule)}, which flatters it")
    return doubts


def next_step(verdict: Verdict, content: Content, model: str, base: str | None) -> str:
    """The command that helps most now; `base`: one that can be asked."""
    beside = f" --base {base}" if base else ""
    training = content.get("training", {})
    if verdict.outcome == ALONE and training.get("model"):
        return f"sft-recipes evaluate {model} --base {training['model']}     what did tuning do?"
    gate = content.get("gate", {"verdict": ""})
    if gate["verdict"] == "fail":
        return "read where the gate fails, change data or settings, train again"
    if verdict.is_open or gate["verdict"] in _UNDECIDED_GATES:
        rows = f"about {verdict.rows_needed:,} rows" if verdict.rows_needed else "more rows"
        return (
            f"ask {rows}: sft-recipes evaluate {model}{beside} --data FILE with others that were not trained; "
            "or hold out more (eval_split) and train again into another --output_dir"
        )
    if verdict.outcome == NOTHING_RIGHT and training.get("rows"):
        return (
            "read the answers in the report; then train on more rows or longer "
            "(num_train_epochs), or evaluate a larger model"
        )
    return f"sft-recipes chat {model}{beside}"
