"""Blind human A/B review: a page that does not tell who answered, and the result of the votes."""

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft_recipes.evaluation.prompts import prompts_of
from sft_recipes.evaluation.review_votes import (
    BASELINE,
    CANDIDATE,
    KEY,
    SYSTEMS,
    TAGS,
    TIE,
    Vote,
    read_key,
    read_votes,
    review_error,
)
from sft_recipes.evaluation.samples import SAMPLES, read_samples
from sft_recipes.messages import visible
from sft_recipes.report.page import macros
from sft_recipes.run_folder import write_json
from sft_recipes.statistics import (
    Estimate,
    bootstrap_estimate,
    proportion,
    proportion_of,
    sign_test,
)

LENGTH_GROUPS = 3


class _Side(NamedTuple):
    """An answer of the page and the keys that mark it, which lie together on a keyboard."""

    name: str
    number: int
    acceptable: str
    not_acceptable: str
    tags: Mapping[str, str]


SIDES = (
    _Side("A", 0, "a", "s", dict(zip(TAGS, "qwer", strict=True))),
    _Side("B", 1, "k", "l", dict(zip(TAGS, "uiop", strict=True))),
)


class _Pair(NamedTuple):
    """The rows of both systems on one prompt, in the order of `SYSTEMS`."""

    candidate: Mapping[str, Any]
    baseline: Mapping[str, Any]

    @property
    def differs(self) -> bool:
        """Whether there is anything to judge."""
        return bool(self.candidate["response"] != self.baseline["response"])


class _Pairs(NamedTuple):
    """Prompts that were answered differently, each once, and how many were answered alike."""

    different: list[_Pair]
    alike: int


def build(
    candidate: Path, baseline: Path, output: Path, rows: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Write a page of at most `rows` prompts and its key, without prompts answered alike.

    Raises InputError if the two did not answer the same prompts.
    """
    pairs = _read_pairs(candidate, baseline)
    hashes = [_sha256_of(candidate / SAMPLES), _sha256_of(baseline / SAMPLES)]
    origin = [seed, rows, *hashes]
    page = _digest(origin)[:16]
    digests = [_digest([*origin, index]) for index in range(len(pairs.different))]
    items = []
    sealed = {}
    for index in sorted(range(len(digests)), key=digests.__getitem__)[:rows]:
        pair = pairs.different[index]
        # The page shows the start of the digest. Its last digit, which decides the order, does not
        # follow from that.
        item = digests[index][:12]
        first = int(digests[index][-1], 16) % 2
        items.append(_shown(item, pair, first))
        sealed[item] = _sealed(pair, first)

    key = output.with_suffix(".key.json")
    if key.exists() and read_key(key)["page"] != page:
        raise review_error(key, "page", "is the key of another page", "choose another --output")
    about = {
        "page": page,
        "seed": seed,
        "systems": {
            "candidate": str(candidate),
            "baseline": str(baseline),
            "samples_sha256": hashes,
        },
        "answered_alike": pairs.alike,
    }
    write_json(key, {"kind": KEY, **about, "items": sealed})
    text = macros("review.html").page({"page": page, "items": items}, SIDES)
    output.write_text(text, encoding="utf-8")
    return {"output": str(output), "key": str(key), "items": len(items), **about}


def _read_pairs(candidate: Path, baseline: Path) -> _Pairs:
    ours = read_samples(candidate)
    theirs = read_samples(baseline)
    if list(map(_prompt, ours)) != list(map(_prompt, theirs)):
        what = f"other prompts than in {candidate / SAMPLES}"
        fix = "evaluate both on the same data"
        raise review_error(baseline / SAMPLES, "messages", what, fix)
    by_prompt: dict[Hashable, _Pair] = {}
    for prompt, pair in zip(prompts_of(ours), map(_Pair, ours, theirs), strict=True):
        # A prompt that stands there twice would count twice in the result.
        if prompt not in by_prompt or not by_prompt[prompt].differs:
            by_prompt[prompt] = pair
    different = [pair for pair in by_prompt.values() if pair.differs]
    if not different:
        what = f"every answer is that of {candidate / SAMPLES}"
        raise review_error(baseline / SAMPLES, "response", what, "compare systems that differ")
    return _Pairs(different, len(by_prompt) - len(different))


def _prompt(row: Mapping[str, Any]) -> Any:
    """Everything that was said before the answer."""
    return row["messages"][:-1]


def _shown(item: str, pair: _Pair, first: int) -> dict[str, Any]:
    """What the page shows of a prompt, the answer of system number `first` before the other."""
    turns = []
    for turn in _prompt(pair.candidate):
        text = turn.get("content") or json.dumps(turn)
        turns.append([visible(turn["role"]), visible(text)])
    answers = [visible(pair[first]["response"]), visible(pair[1 - first]["response"])]
    return {"item": item, "turns": turns, "answers": answers}


def _sealed(pair: _Pair, first: int) -> dict[str, Any]:
    """What only the key says of a prompt."""
    candidate_length = len(pair.candidate["response"])
    baseline_length = len(pair.baseline["response"])
    return {
        "first": SYSTEMS[first],
        "length_ratio": candidate_length / max(1, baseline_length),
        "source": pair.candidate.get("source"),
        "row": pair.candidate.get("row"),
        "line": pair.candidate.get("line"),
    }


def score(key_file: Path, vote_files: Sequence[Path]) -> dict[str, Any]:
    """The result of one or several raters' votes; repeated items count for `self_consistency` only.

    Rates are means over items, whose raters are averaged first: they are not independent. A tie is
    half a win and no part of the sign test. `agreement`: pairs of raters with the same one of
    candidate, tie, baseline. Length ratios: characters, candidate to baseline. Raises InputError
    for votes that do not belong to the key.
    """
    key = read_key(key_file)
    votes = _read_all_votes(vote_files, key)
    first_votes = [vote for vote in votes if not vote.repeat]
    by_item = _by_item(first_votes, key["items"])
    credits = {}
    for item, own in by_item.items():
        credits[item] = [vote.credit for vote in own]
    outcomes = Counter(map(_outcome, credits.values()))
    decisive = [vote.left_won for vote in first_votes if not vote.is_tie]
    return {
        "systems": key["systems"],
        "answered_alike": key["answered_alike"],
        **_tallies(first_votes),
        "items": {
            "page": len(key["items"]),
            "won": outcomes["won"],
            "lost": outcomes["lost"],
            "tied": outcomes["tied"],
        },
        "win_rate": _rate(credits.values()),
        "p_value": sign_test(outcomes["won"], outcomes["won"] + outcomes["lost"]),
        "agreement": _rate(map(_agreements, credits.values())),
        "alpha": krippendorff_alpha(credits.values()),
        "self_consistency": proportion_of(_said_again(votes)).as_json(),
        "left_chosen": proportion_of(decisive).as_json(),
        "left_p_value": sign_test(sum(decisive), len(decisive)),
        "length_terciles": _rates_by_length(credits, key["items"]),
        "acceptable": {
            CANDIDATE: _acceptable(by_item, CANDIDATE),
            BASELINE: _acceptable(by_item, BASELINE),
        },
        "comments": _comments(votes, key["items"]),
    }


def _read_all_votes(files: Sequence[Path], key: Mapping[str, Any]) -> list[Vote]:
    votes: list[Vote] = []
    raters: set[str] = set()
    for file in files:
        own = read_votes(file, key)
        if own and own[0].rater in raters:
            what = f"{own[0].rater!r} voted in another file, too"
            raise review_error(file, "rater", what, "give one file of each rater")
        if own:
            raters.add(own[0].rater)
        votes += own
    return votes


def _tallies(votes: Sequence[Vote]) -> dict[str, Any]:
    """How often each rater voted, each choice was made, and each tag given to a system."""
    raters: Counter[str] = Counter()
    choices: Counter[str] = Counter()
    tags: dict[str, Counter[str]] = {CANDIDATE: Counter(), BASELINE: Counter()}
    for vote in votes:
        raters[vote.rater] += 1
        choices[vote.choice] += 1
        for system, given in vote.tags.items():
            tags[system].update(given)
    return {"raters": raters, "choices": choices, "tags": tags}


def _comments(votes: Sequence[Vote], items: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every vote with a comment, with what the key says of its item."""
    comments = []
    for vote in votes:
        if vote.comment:
            comments.append({**vote.as_json(), **items[vote.item]})
    return comments


def _by_item(votes: Sequence[Vote], items: Iterable[str]) -> dict[str, list[Vote]]:
    """The votes on each item that was voted on, in the key's order."""
    by_item = {}
    for item in items:
        own = [vote for vote in votes if vote.item == item]
        if own:
            by_item[item] = own
    return by_item


def _outcome(credits: Sequence[float]) -> str:
    """What an item came to for the candidate, by the mean of its raters."""
    mean = float(np.mean(credits))
    if mean == TIE:
        return "tied"
    return "won" if mean > TIE else "lost"


def _agreements(credits: Sequence[float]) -> list[float]:
    """For each pair of raters of an item whether they said the same."""
    return [float(credit == other) for credit, other in combinations(credits, 2)]


def _said_again(votes: Sequence[Vote]) -> list[bool]:
    """For each repeated item whether its rater said the same as the first time."""
    before = {(vote.rater, vote.item): vote.credit for vote in votes if not vote.repeat}
    same = []
    for vote in votes:
        if vote.repeat and (vote.rater, vote.item) in before:
            same.append(vote.credit == before[vote.rater, vote.item])
    return same


def _rates_by_length(
    credits: Mapping[str, Sequence[float]], items: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The win rate where the candidate's answers are relatively shortest, middling and longest."""
    order = sorted(credits, key=lambda item: items[item]["length_ratio"])
    rates = []
    for group in np.array_split(order, LENGTH_GROUPS):
        if not len(group):
            continue
        ratios = []
        own_credits = []
        for item in group:
            ratios.append(items[item]["length_ratio"])
            own_credits.append(credits[item])
        rates.append({**_rate(own_credits), "ratios": ratios})
    return rates


def _acceptable(by_item: Mapping[str, Sequence[Vote]], system: str) -> dict[str, Any]:
    """The share of a system's answers that were found acceptable."""
    marks = []
    for votes in by_item.values():
        marks.append([vote.acceptable[system] for vote in votes])
    return _rate(marks)


def krippendorff_alpha(items: Iterable[Sequence[Any]]) -> float | None:
    """Krippendorff's alpha (2011) for nominal values by item, one per rater.

    None where nothing could differ.
    """
    all_values: Counter[Any] = Counter()
    observed = 0.0
    for values in items:
        # Values of one item can only be compared if several raters gave some.
        if len(values) > 1:
            counts = Counter(values)
            all_values += counts
            observed += _differing_pairs(counts) / (len(values) - 1)
    expected = _differing_pairs(all_values)
    if not expected:
        return None
    return 1 - (all_values.total() - 1) * observed / expected


def _differing_pairs(counts: Counter[Any]) -> int:
    """How many ordered pairs of these values differ."""
    equal = sum(count**2 for count in counts.values())
    return counts.total() ** 2 - equal


def _rate(items: Iterable[Sequence[float | None]]) -> dict[str, Any]:
    """Mean over items of their mean value, from 0 to 1; items without a value do not count.

    Wilson's interval where all means are 0 or 1, else items are resampled.
    """
    means = []
    for values in items:
        known = [value for value in values if value is not None]
        if known:
            means.append(sum(known) / len(known))
    if set(means) <= {0, 1}:
        return proportion(int(sum(means)), len(means)).as_json()
    if len(set(means)) > 1:
        return bootstrap_estimate(means, statistic=np.mean, unit="proportion").as_json()
    # All items alike, as when all are ties: what Wilson's bound on the share of other items leaves
    # open.
    value = means[0]
    open_share = proportion(0, len(means)).ci_high or 0.0
    estimate = Estimate(
        value,
        len(means),
        ci_low=value - value * open_share,
        ci_high=value + (1 - value) * open_share,
        unit="proportion",
    )
    return estimate.as_json()


def _sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
