"""What `review score` prints, from the result of the votes."""

from collections.abc import Mapping
from typing import Any

from sft_recipes.messages import visible
from sft_recipes.report.number_texts import decimals, format_estimate, spaced, where

Content = Mapping[str, Any]

# Fewer make resampled intervals too narrow.
RELIABLE_ITEMS = 20
# Decisive items that a two-sided sign test at 0.05 needs for power 0.8, by the true share of wins
# in percent (computed; a test keeps it).
NEEDED_ITEMS = {55: 783, 60: 194, 65: 85, 70: 47}


def review_text(result: Content) -> str:
    """Win rate, agreement, consistency, position and length, a line each, and the comments."""
    lines = [*_voted(result), "", *_won(result), "", *_trusted(result)]
    for system in ("candidate", "baseline"):
        acceptable = result["acceptable"][system]
        lines.append(
            f"{system:17} acceptable {format_estimate(acceptable)}, n {acceptable['n']}; "
            f"tags: {_tally(result['tags'][system])}"
        )
    if result["comments"]:
        lines += ["", "comments"]
    for comment in result["comments"]:
        lines.append(f"  {where(comment)}, {comment['rater']}: {comment['comment']}")
    return visible("\n".join(lines) + "\n")


def _voted(result: Content) -> list[str]:
    rated = f"{result['win_rate']['n']} of {result['items']['page']} items"
    return [
        f"candidate         {result['systems']['candidate']}",
        f"baseline          {result['systems']['baseline']}",
        f"raters            {_tally(result['raters'])} votes, on {rated}; "
        f"{result['answered_alike']} prompts answered alike were left out",
        f"choices           {spaced(_tally(result['choices']))}",
    ]


def _won(result: Content) -> list[str]:
    rate = result["win_rate"]
    items = result["items"]
    doubt = ""
    if rate["n"] < RELIABLE_ITEMS:
        doubt = f"; fewer than {RELIABLE_ITEMS} items: intervals are unreliable"
    needed = ", ".join(f"{percent} %: {count}" for percent, count in NEEDED_ITEMS.items())
    lines = [
        f"win rate          {format_estimate(rate)} of the candidate; a tie counts half{doubt}",
        f"sign test         {items['won']} items won, {items['lost']} lost, {items['tied']} tied: "
        f"p = {result['p_value']:.3g}",
        f"decisive items    {items['won'] + items['lost']}; "
        f"needed (power 0.8) where the true share of wins is {needed}",
    ]
    for third in result["length_terciles"]:
        ratios = third["ratios"]
        lines.append(
            f"by length         {format_estimate(third)} where the candidate is "
            f"{min(ratios):.2f} to {max(ratios):.2f} times as long, n {third['n']}"
        )
    return lines


def _trusted(result: Content) -> list[str]:
    agreement = result["agreement"]
    again = result["self_consistency"]
    left = result["left_chosen"]
    alpha = decimals(result["alpha"])
    return [
        f"agreement         {format_estimate(agreement)} of pairs of raters, n {agreement['n']}; "
        f"Krippendorff's alpha {alpha}",
        f"self-consistency  {format_estimate(again)} on repeated items, n {again['n']}",
        f"left side chosen  {format_estimate(left)} of decisive votes, n {left['n']}: "
        f"p = {result['left_p_value']:.3g}",
    ]


def _tally(counts: Mapping[str, int]) -> str:
    if not counts:
        return "none"
    return ", ".join(f"{name} {count}" for name, count in counts.items())
