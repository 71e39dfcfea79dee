"""Blind human A/B review: a page that does not tell who answered, its sealed key, and the result of the votes."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.metrics import read_samples
from sft_recipes.report.page import macros, visible
from sft_recipes.run_folder import SCHEMA_VERSION, write_json
from sft_recipes.statistics import (
    Estimate,
    bootstrap_estimate,
    proportion,
    proportion_of,
    sign_test,
)

Vote = dict[str, Any]
SYSTEMS = ("candidate", "baseline")
# What each choice of the page is worth to the answer on the left.
CHOICES = {
    "left_much": 1.0,
    "left": 1.0,
    "same": 0.5,
    "right": 0.0,
    "right_much": 0.0,
    "both_bad": 0.5,
}
TAGS = {tag: tag for tag in ("wrong", "unsafe", "off-format", "too long")}
ACCEPTABLE = {None: None, True: 1.0, False: 0.0}


def build(
    candidate: Path, baseline: Path, output: Path, rows: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Write a page of at most `rows` prompts, without those answered alike, and its key; InputError if not paired."""
    files = [folder / "samples.jsonl" for folder in (candidate, baseline)]
    samples = [*map(read_samples, (candidate, baseline))]
    if [row["messages"][:-1] for row in samples[0]] != [row["messages"][:-1] for row in samples[1]]:
        raise _error(
            files[1],
            "messages",
            f"other prompts than in {files[0]}",
            "evaluate both on the same data",
        )
    pairs = [
        pair for pair in zip(*samples, strict=True) if pair[0]["response"] != pair[1]["response"]
    ]
    if not pairs:
        raise _error(
            files[1],
            "response",
            f"every answer is that of {files[0]}",
            "compare systems that differ",
        )
    origin = [seed, rows, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    page, items, sealed = _digest(origin)[:16], [], {}
    for digest, index in sorted((_digest([*origin, index]), index) for index in range(len(pairs)))[
        :rows
    ]:
        # The page shows the start of the digest. Its last digit, which decides the order, does not follow from that.
        pair, item, first = pairs[index], digest[:12], int(digest[-1], 16) % 2
        turns = [
            (turn["role"], turn.get("content") or json.dumps(turn))
            for turn in pair[0]["messages"][:-1]
        ]
        answers = [visible(pair[which]["response"]) for which in (first, 1 - first)]
        items.append(
            {"item": item, "turns": [[*map(visible, turn)] for turn in turns], "answers": answers}
        )
        ratio = len(pair[0]["response"]) / max(1, len(pair[1]["response"]))
        place = {name: pair[0].get(name) for name in ("source", "row")}
        sealed[item] = {"first": SYSTEMS[first], "length_ratio": ratio, **place}
    key = output.with_suffix(".key.json")
    if key.exists() and _read(key, "review key")["page"] != page:
        raise _error(key, "page", "is the key of another page", "choose another --output")
    systems = {"candidate": str(candidate), "baseline": str(baseline), "samples_sha256": origin[2:]}
    about = {
        "page": page,
        "seed": seed,
        "systems": systems,
        "answered_alike": len(samples[0]) - len(pairs),
    }
    write_json(key, {"kind": "review key", **about, "items": sealed})
    output.write_text(
        macros("review.html").page({"page": page, "items": items}, TAGS), encoding="utf-8"
    )
    return {"output": str(output), "key": str(key), "items": len(items), **about}


def score(key_file: Path, vote_files: Sequence[Path]) -> dict[str, Any]:
    """The result of one or several raters' votes; repeated items count for `self_consistency` only.

    Rates are means over items, whose raters are averaged first: they are not independent. A tie is half a win and no
    part of the sign test. `agreement`: pairs of raters with the same one of candidate, tie, baseline. Length ratios:
    characters, candidate to baseline. Raises InputError for votes that do not belong to the key.
    """
    key, votes = _read(key_file, "review key"), list[Vote]()
    for file in vote_files:
        found = _read_votes(file, key)
        if known := {vote["rater"] for vote in votes} & {vote["rater"] for vote in found}:
            raise _error(
                file,
                "rater",
                f"{known.pop()!r} voted in another file, too",
                "give one file of each rater",
            )
        votes += found
    first = [vote for vote in votes if not vote["repeat"]]
    items = {
        item: found
        for item in key["items"]
        if (found := [vote for vote in first if vote["item"] == item])
    }
    credits = {item: [vote["credit"] for vote in found] for item, found in items.items()}
    signs = Counter(int(np.sign(np.mean(values) - 0.5)) for values in credits.values())
    left = [vote["credit"] == vote["left"] for vote in first if vote["credit"] != 0.5]
    once = {(vote["rater"], vote["item"]): vote["credit"] for vote in first}
    again = [
        (vote["credit"], once.get((vote["rater"], vote["item"])))
        for vote in votes
        if vote["repeat"]
    ]
    ratios = {item: key["items"][item]["length_ratio"] for item in credits}
    thirds = [
        part for part in np.array_split(sorted(ratios, key=ratios.__getitem__), 3) if len(part)
    ]
    return {
        "systems": key["systems"],
        "answered_alike": key["answered_alike"],
        "raters": Counter(vote["rater"] for vote in first),
        "items": {"page": len(key["items"]), "won": signs[1], "lost": signs[-1], "tied": signs[0]},
        "choices": Counter(vote["choice"] for vote in first),
        "win_rate": _rate(credits.values()),
        "p_value": sign_test(signs[1], signs[1] + signs[-1]),
        "agreement": _rate(
            [a == b for a, b in combinations(values, 2)] for values in credits.values()
        ),
        "alpha": krippendorff_alpha(credits.values()),
        "self_consistency": proportion_of(
            [now == before for now, before in again if before is not None]
        ).as_json(),
        "left_chosen": proportion_of(left).as_json(),
        "left_p_value": sign_test(sum(left), len(left)),
        "length_terciles": [
            _rate(credits[i] for i in part) | {"ratios": [ratios[i] for i in part]}
            for part in thirds
        ],
        "acceptable": {
            name: _rate([v["acceptable"][name] for v in one] for one in items.values())
            for name in SYSTEMS
        },
        "tags": {
            name: Counter(tag for vote in first for tag in vote["tags"][name]) for name in SYSTEMS
        },
        "comments": [vote | key["items"][vote["item"]] for vote in votes if vote["comment"]],
    }


def krippendorff_alpha(items: Iterable[Sequence[Any]]) -> float | None:
    """Krippendorff's alpha (2011) for nominal values by item, one per rater; None where nothing could differ."""
    shared = [Counter(values) for values in items if len(values) > 1]
    total = sum(shared, Counter[Any]())
    # Ordered pairs of values that differ: as found among the raters of one item, and among all values.
    found = sum(
        (n.total() ** 2 - sum(count**2 for count in n.values())) / (n.total() - 1) for n in shared
    )
    expected = total.total() ** 2 - sum(count**2 for count in total.values())
    return 1 - (total.total() - 1) * found / expected if expected else None


def _rate(items: Iterable[Sequence[float | None]]) -> dict[str, Any]:
    """Mean over items of their mean value, from 0 to 1: Wilson where all are 0 or 1, else items are resampled."""
    means = [
        sum(known) / len(known)
        for one in items
        if (known := [value for value in one if value is not None])
    ]
    if set(means) <= {0, 1}:
        return proportion(int(sum(means)), len(means)).as_json()
    if len(set(means)) > 1:
        return bootstrap_estimate(means, statistic=np.mean, unit="proportion").as_json()
    # All items alike, as when all are ties: what Wilson's bound on the share of other items leaves open.
    value, n, reach = means[0], len(means), proportion(0, len(means)).ci_high or 0.0
    return Estimate(
        value, n, 0, value - value * reach, value + (1 - value) * reach, "proportion"
    ).as_json()


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _error(where: object, field: str, what: str, fix: str) -> InputError:
    return InputError(Problem(str(where), field, what, fix))


def _read(file: Path, kind: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content["kind"], content["schema_version"]) == (kind, SCHEMA_VERSION):
            return content
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _error(file, "", f"cannot be read: {error}", f"name the {kind}") from error
    raise _error(
        file, "kind", f"expected {kind!r} of schema version {SCHEMA_VERSION}", f"name the {kind}"
    )


def _read_votes(file: Path, key: Mapping[str, Any]) -> list[Vote]:
    """The votes in terms of candidate and baseline. Looking up each value refuses unknown ones."""
    content, found = _read(file, "review votes"), dict[tuple[str, bool], Vote]()
    if content.get("page") != key["page"]:
        raise _error(
            file,
            "page",
            "the votes are of another page",
            "use the key that was written beside their page",
        )
    try:
        for raw in content["votes"]:
            # 1 where the candidate is on the left.
            left = int(
                (key["items"][raw["item"]]["first"] == SYSTEMS[1]) == (0, 1).index(raw["left"])
            )
            names, worth = SYSTEMS if left else SYSTEMS[::-1], CHOICES[raw["choice"]]
            vote = {
                "rater": str(content["rater"]),
                "item": raw["item"],
                "repeat": raw["repeat"],
                "left": left,
            }
            vote["credit"] = worth if left else 1 - worth
            vote["choice"] = raw["choice"].replace("left", names[0]).replace("right", names[1])
            vote["acceptable"] = dict(
                zip(names, (ACCEPTABLE[value] for value in raw["acceptable"]), strict=True)
            )
            vote["tags"] = dict(
                zip(names, ([TAGS[tag] for tag in tags] for tags in raw["tags"]), strict=True)
            )
            vote["comment"] = raw["comment"]
            if found.setdefault((vote["item"], vote["repeat"]), vote) is not vote:
                raise ValueError(f"a second vote on {vote['item']!r}")
    except (LookupError, TypeError, ValueError) as error:
        raise _error(
            file, f"votes[{len(found)}]", f"does not fit the page: {error}", "download it again"
        ) from error
    return list(found.values())
