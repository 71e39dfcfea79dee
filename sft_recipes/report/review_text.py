"""What `review score` prints and a report shows, from the result of the votes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sft_recipes.messages import visible
from sft_recipes.report.number_texts import decimals, format_estimate, spaced, where

Content = Mapping[str, Any]

# Fewer make resampled intervals too narrow.
RELIABLE_ITEMS = 20
# Decisive items that a two-sided sign test at 0.05 needs for power 0.8, by the true share of wins
# in percent (computed; a test keeps it).
NEEDED_ITEMS = {55: 783, 60: 194, 65: 85, 70: 47}


class ReviewLine(NamedTuple):
    """One thing that the votes say."""

    label: str
    text: str


def review_text(result: Content) -> str:
    """Win rate, agreement, consistency, position and length, a line each, and the comments."""
    text = "\n\n".join(map(_lines_text, (_voted(result), _won(result), _trusted(result))))
    comments = _comments(result)
    if comments:
        text += "\n\ncomments\n" + "\n".join(f"  {line.label}: {line.text}" for line in comments)
    return visible(text + "\n")


def _lines_text(lines: Sequence[ReviewLine]) -> str:
    return "\n".join(f"{line.label:17} {line.text}" for line in lines)


def review_lines(result: Content) -> list[ReviewLine]:
    """The same for a report."""
    return [*_won(result), *_voted(result), *_trusted(result), *_comments(result)]


def _comments(result: Content) -> list[ReviewLine]:
    lines = []
    for comment in result["comments"]:
        lines.append(ReviewLine(f"{where(comment)}, {comment['rater']}", comment["comment"]))
    return lines


def _voted(result: Content) -> list[ReviewLine]:
    rated = f"{result['win_rate']['n']} of {result['items']['page']} items"
    votes = (
        f"{_tally(result['raters'])} votes, on {rated}; "
        f"{result['answered_alike']} prompts answered alike were left out"
    )
    return [
        ReviewLine("candidate", result["systems"]["candidate"]),
        ReviewLine("baseline", result["systems"]["baseline"]),
        ReviewLine("raters", votes),
        ReviewLine("choices", spaced(_tally(result["choices"]))),
    ]


def _won(result: Content) -> list[ReviewLine]:
    rate = result["win_rate"]
    items = result["items"]
    doubt = ""
    if rate["n"] < RELIABLE_ITEMS:
        doubt = f"; fewer than {RELIABLE_ITEMS} items: intervals are unreliable"
    needed = ", ".join(f"{percent} %: {count}" for percent, count in NEEDED_ITEMS.items())
    counts = f"{items['won']} items won, {items['lost']} lost, {items['tied']} tied"
    decisive = (
        f"{items['won'] + items['lost']}; "
        f"needed (power 0.8) where the true share of wins is {needed}"
    )
    lines = [
        ReviewLine(
            "win rate", f"{format_estimate(rate)} of the candidate; a tie counts half{doubt}"
        ),
        ReviewLine("sign test", f"{counts}: p = {result['p_value']:.3g}"),
        ReviewLine("decisive items", decisive),
    ]
    for third in result["length_terciles"]:
        ratios = third["ratios"]
        text = (
            f"{format_estimate(third)} where the candidate is "
            f"{min(ratios):.2f} to {max(ratios):.2f} times as long, n {third['n']}"
        )
        lines.append(ReviewLine("by length", text))
    return lines


def _trusted(result: Content) -> list[ReviewLine]:
    agreement = result["agreement"]
    again = result["self_consistency"]
    left = result["left_chosen"]
    agreed = (
        f"{format_estimate(agreement)} of pairs of raters, n {agreement['n']}; "
        f"Krippendorff's alpha {decimals(result['alpha'])}"
    )
    chosen = (
        f"{format_estimate(left)} of decisive votes, n {left['n']}: "
        f"p = {result['left_p_value']:.3g}"
    )
    lines = [
        ReviewLine("agreement", agreed),
        ReviewLine(
            "self-consistency", f"{format_estimate(again)} on repeated items, n {again['n']}"
        ),
        ReviewLine("left side chosen", chosen),
    ]
    for system in ("candidate", "baseline"):
        acceptable = result["acceptable"][system]
        text = (
            f"acceptable {format_estimate(acceptable)}, n {acceptable['n']}; "
            f"tags: {_tally(result['tags'][system])}"
        )
        lines.append(ReviewLine(system, text))
    return lines


def _tally(counts: Mapping[str, int]) -> str:
    if not counts:
        return "none"
    return ", ".join(f"{name} {count}" for name, count in counts.items())
