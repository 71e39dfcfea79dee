"""The files of a blind review: its sealed key, and votes turned from sides into systems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem
from sft_recipes.run_folder import SCHEMA_VERSION
from sft_recipes.text_files import interpreting, read_json

CANDIDATE = "candidate"
BASELINE = "baseline"
SYSTEMS = (CANDIDATE, BASELINE)
KEY = "review key"
VOTES = "review votes"

# What each choice of the page is worth to the answer on the left.
CHOICES = {
    "left_much": 1.0,
    "left": 1.0,
    "same": 0.5,
    "right": 0.0,
    "right_much": 0.0,
    "both_bad": 0.5,
}
TIE = 0.5
TAGS = ("wrong", "unsafe", "off-format", "too long")
_ACCEPTABLE = {None: None, True: 1.0, False: 0.0}


@dataclass(frozen=True, slots=True)
class Vote:
    """One judgement of a rater, in terms of candidate and baseline.

    `credit`: what it is worth to the candidate, from 0 to 1. `choice`: the page's choice with the
    systems' names for the sides. `acceptable` (1.0, 0.0 or None) and `tags` by system. `repeat`:
    the rater saw the item for the second time, sides swapped.
    """

    rater: str
    item: str
    repeat: bool
    candidate_is_left: bool
    credit: float
    choice: str
    acceptable: Mapping[str, float | None]
    tags: Mapping[str, list[str]]
    comment: str

    @property
    def is_tie(self) -> bool:
        """Whether neither system won."""
        return self.credit == TIE

    @property
    def left_won(self) -> bool:
        """Whether the answer on the left won, where one did."""
        return (self.credit > TIE) == self.candidate_is_left

    def as_json(self) -> dict[str, Any]:
        """Plain data; `left` is 1 where the candidate stood there."""
        return {
            "rater": self.rater,
            "item": self.item,
            "repeat": self.repeat,
            "left": int(self.candidate_is_left),
            "credit": self.credit,
            "choice": self.choice,
            "acceptable": dict(self.acceptable),
            "tags": dict(self.tags),
            "comment": self.comment,
        }


def review_error(where: object, field: str, what: str, fix: str) -> InputError:
    """What is wrong with a file of a review."""
    return InputError(Problem(str(where), field, what, fix))


def read_key(file: Path) -> dict[str, Any]:
    """The key that was written beside a page. Raises InputError for any other file."""
    key = _read(file, KEY)
    with interpreting(file, f"name the {KEY}"):
        for item in key["items"].values():
            SYSTEMS.index(item["first"])
            float(item["length_ratio"])
        _ = key["page"], key["systems"], key["answered_alike"]
    return key


def read_votes(file: Path, key: Mapping[str, Any]) -> list[Vote]:
    """The votes that one rater downloaded. Raises InputError if they do not belong to the key."""
    content = _read(file, VOTES)
    if content.get("page") != key["page"]:
        fix = "use the key that was written beside their page"
        raise review_error(file, "page", "the votes are of another page", fix)
    votes: list[Vote] = []
    seen = set()
    try:
        rater = str(content["rater"])
        for raw in content["votes"]:
            vote = _vote(raw, rater, key["items"])
            if (vote.item, vote.repeat) in seen:
                raise ValueError(f"a second vote on {vote.item!r}")
            seen.add((vote.item, vote.repeat))
            votes.append(vote)
    except (LookupError, TypeError, ValueError) as error:
        what = f"does not fit the page: {error}"
        raise review_error(file, f"votes[{len(votes)}]", what, "download it again") from error
    return votes


def _vote(raw: Mapping[str, Any], rater: str, items: Mapping[str, Any]) -> Vote:
    """A vote in terms of the systems.

    Raises LookupError, TypeError or ValueError for what no page can have cast: each value is looked
    up among those that it may have.
    """
    # Which of the item's two answers stood on the left.
    left_answer = (0, 1).index(raw["left"])
    candidate_answer = SYSTEMS.index(items[raw["item"]]["first"])
    candidate_is_left = left_answer == candidate_answer
    left, right = SYSTEMS if candidate_is_left else SYSTEMS[::-1]
    worth = CHOICES[raw["choice"]]
    marks = [_ACCEPTABLE[mark] for mark in raw["acceptable"]]
    tags = list(map(_known_tags, raw["tags"]))
    return Vote(
        rater=rater,
        item=raw["item"],
        repeat=raw["repeat"],
        candidate_is_left=candidate_is_left,
        credit=worth if candidate_is_left else 1 - worth,
        choice=raw["choice"].replace("left", left).replace("right", right),
        acceptable=dict(zip((left, right), marks, strict=True)),
        tags=dict(zip((left, right), tags, strict=True)),
        comment=raw["comment"],
    )


def _known_tags(tags: Sequence[str]) -> list[str]:
    return [TAGS[TAGS.index(tag)] for tag in tags]


def _read(file: Path, kind: str) -> dict[str, Any]:
    fix = f"name the {kind}"
    content = read_json(file, fix)
    is_right = content.get("kind") == kind and content.get("schema_version") == SCHEMA_VERSION
    if not is_right:
        what = f"expected {kind!r} of schema version {SCHEMA_VERSION}"
        raise review_error(file, "kind", what, fix)
    return content
