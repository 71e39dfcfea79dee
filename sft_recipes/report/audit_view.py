"""What each section of the data quality report shows, worked out from `audit.json`.

Every function returns the values that one macro of `audit.html` names; numbers are texts already
where they are not only counted. Long texts are shortened here, so that a page's size is bounded.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from sft_recipes.data.reading.row_files import file_kind
from sft_recipes.report.audit_parts import (
    Audit,
    Bar,
    View,
    bar_width,
    bars,
    checks_by_name,
    compare,
    finding,
    mark_differences,
    mark_shared,
    place,
)
from sft_recipes.report.number_texts import (
    counted,
    percent,
    rounded,
    sentence,
    shortened,
    spaced,
    thousands,
)

_TOP_FINDINGS = 5
_TEXT_CHARACTERS = 400
_PASSAGE_CHARACTERS = 800
_PASSAGES = 12
_TURN_COUNTS = 20
_OVERLAPS = 5
_TEMPLATE_DIGITS = 16
_FILE_KINDS = {
    "jsonl": "JSON Lines",
    "json": "JSON",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
}
_FORMATS = {
    "instruction": "instructions with their outputs",
    "messages": "conversations (role, content)",
    "sharegpt": "conversations (from, value)",
    "prompt_completion": "prompts with their completions",
    "raw": "plain text",
    "rendered": "text as a chat template wrote it",
}
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def _verdict(audit: Audit) -> View:
    severities = Counter(content["severity"] for content in audit["findings"])
    levels = []
    for severity, word in _LEVELS.items():
        count = severities[severity]
        level = {
            "severity": severity if count else "",
            "count": thousands(count),
            "word": word if count == 1 else f"{word}s",
        }
        levels.append(level)
    top = []
    for content in audit["findings"][:_TOP_FINDINGS]:
        top.append(finding(audit, content))
    more = len(audit["findings"]) - len(top)
    settings = audit["settings"]
    template = settings["template_sha256"]
    versions = [f"{name} {version}" for name, version in audit["versions"].items()]
    return {
        "rows_in": audit["rows_in"],
        "rows_kept": _rows_kept(audit),
        "levels": levels,
        "top": top,
        "more": counted(more, "more finding") if more else "",
        "checks": len(audit["passed"]),
        "files": list(map(_file, audit["files"])),
        "has_tokens": bool(audit["truncation"]),
        "tokenizer": settings["tokenizer"],
        "template": template[:_TEMPLATE_DIGITS] if template else "",
        "max_length": settings["max_length"],
        "seed": settings["seed"],
        "versions": ", ".join(versions),
        "seconds": audit["seconds"],
    }


def _file(file: Mapping[str, Any]) -> View:
    """A file with what it is and what its rows are, in words."""
    kind = file_kind(Path(file["path"]))
    rows = _FORMATS.get(file["format"], spaced(file["format"]))
    return {**file, "format": f"{_FILE_KINDS[kind]}: {rows}" if kind else sentence(rows)}


def _rows_kept(audit: Audit) -> int:
    return int(audit["rows_in"]) - sum(step["rows"] for step in audit["waterfall"])


def _rows(audit: Audit) -> View:
    checks = checks_by_name(audit)
    left = audit["rows_in"]
    steps = []
    for dropped in audit["waterfall"]:
        left -= dropped["rows"]
        content = checks.get(dropped["reason"])
        step = {
            "title": sentence(content["title"] if content else dropped["title"]),
            "is_checked": content is not None,
            "rows": dropped["rows"],
            "offset": bar_width(left, audit["rows_in"]),
            "width": bar_width(dropped["rows"], audit["rows_in"]),
            "for_any_reason": content["count"] if content else 0,
        }
        steps.append(step)
    return {
        "rows_in": audit["rows_in"],
        "steps": steps,
        "rows_kept": left,
        "kept_width": bar_width(left, audit["rows_in"]),
    }


def _truncation(audit: Audit) -> View:
    max_length = audit["settings"]["max_length"]
    return {
        "has_tokens": bool(audit["truncation"]),
        "max_length": max_length,
        "smallest": audit.get("smallest_max_length"),
        "costs": audit["truncation"],
    }


def _lengths(audit: Audit) -> View:
    lengths = audit["lengths"]
    turns = list(lengths["turns"].items())
    most = max(lengths["turns"].values())
    # Where the longest rows are all there are, the shortest are the same.
    has_shorter = audit["rows_read"] > len(lengths["shortest"])
    return {
        "has_tokens": bool(audit["truncation"]),
        "lengths": lengths,
        "turns": bars(turns[:_TURN_COUNTS], audit["rows_read"], most),
        "more_turns": max(len(turns) - _TURN_COUNTS, 0),
        "longest": _row_texts(audit, lengths["longest"]),
        "shortest": _row_texts(audit, lengths["shortest"]) if has_shorter else [],
    }


def _row_texts(audit: Audit, rows: Sequence[Mapping[str, Any]]) -> list[View]:
    texts = []
    for row in rows:
        view = {
            "where": place(audit, row["where"]),
            "prompt_words": row["prompt_words"],
            "response_words": row["response_words"],
            "prompt": shortened(row["prompt"], _TEXT_CHARACTERS),
            "response": shortened(row["response"], _TEXT_CHARACTERS),
        }
        texts.append(view)
    return texts


class _GroupSizes(NamedTuple):
    lowest: int
    highest: float
    label: str


_GROUP_SIZES = (
    _GroupSizes(2, 2, "2 rows"),
    _GroupSizes(3, 3, "3 rows"),
    _GroupSizes(4, 5, "4 to 5 rows"),
    _GroupSizes(6, 10, "6 to 10 rows"),
    _GroupSizes(11, 20, "11 to 20 rows"),
    _GroupSizes(21, 50, "21 to 50 rows"),
    _GroupSizes(51, float("inf"), "51 or more rows"),
)
_KINDS_OF_REPEATS = {
    "row": "The whole row, character by character",
    "messages": "All messages, but for case and white space",
    "prompt": "The prompt (the answer may differ)",
    "response": "The answer (the prompt may differ; normal for short answers)",
}


def _duplicates(audit: Audit) -> View:
    found = audit["duplicates"]
    near = found["near"]
    exact = []
    for kind, label in _KINDS_OF_REPEATS.items():
        exact.append((label, found["exact"][kind]))
    pairs = {
        "Just above the threshold: counted as near-duplicates": near["just_above"],
        "Just below the threshold: not counted": near["just_below"],
        "The same text with other numbers: never counted as duplicates": found["template_variants"],
    }
    shown = []
    for title, chosen in pairs.items():
        if chosen:
            shown.append({"title": title, "pairs": _pairs(audit, chosen)})
    return {
        "exact": bars(exact, found["rows"], found["rows"]),
        "near_rows": near["rows"],
        "very_near_rows": near["rows_at_least_0.9"],
        "threshold": f"{100 * near['threshold']:.0f} %",
        "groups": _group_bars(near["clusters_by_size"]),
        "pairs": shown,
    }


def _group_bars(clusters_by_size: Mapping[str, int]) -> list[Bar]:
    counts = []
    longest = 0
    for sizes in _GROUP_SIZES:
        groups = 0
        for size, count in clusters_by_size.items():
            if sizes.lowest <= int(size) <= sizes.highest:
                groups += count
        if groups:
            counts.append((sizes.label, groups))
            longest = max(longest, groups)
    return bars(counts, sum(clusters_by_size.values()), longest)


def _pairs(audit: Audit, pairs: Sequence[Mapping[str, Any]]) -> list[View]:
    views = []
    for pair in pairs:
        left, right = pair["texts"]
        sides = []
        for where, passages in zip(pair["where"], compare(left, right), strict=True):
            sides.append({"where": place(audit, where), "spans": mark_differences(passages)})
        view = {
            "alike": f"{100 * pair['jaccard']:.1f} %",
            "differ_later": left == right,
            "sides": sides,
        }
        views.append(view)
    return views


def _contamination(audit: Audit) -> View:
    sets = []
    for table in audit["contamination"]:
        hits = []
        for hit in table["hits"][:_OVERLAPS]:
            hits.append(_overlap(audit, hit))
        row = {
            "name": table["name"],
            "rows": table["rows"],
            "rows_hit": table["rows_hit"],
            "share": percent(table["share"]),
            "heat": rounded(100 * (table["share"] or 0)),
            "train_rows": table["train_rows"],
            "by_rule": table["rows_hit_by_rule"],
            "hits": hits,
        }
        sets.append(row)
    return {"sets": sets}


def _overlap(audit: Audit, hit: Mapping[str, Any]) -> View:
    held_out, train = compare(*hit["texts"])
    return {
        "rule": hit["rule"],
        "sides": [
            {
                "name": "Evaluation",
                "where": place(audit, hit["eval"]),
                "spans": mark_shared(held_out),
            },
            {
                "name": "Training",
                "where": place(audit, hit["train"]),
                "spans": mark_shared(train),
            },
        ],
    }


def _patterns(audit: Audit) -> View:
    patterns = audit["patterns"]
    return {
        "instruction_openers": _openers(patterns["instruction_openers"]),
        "response_openers": _openers(patterns["response_openers"]),
        "lines": _frequency_bars(patterns["boilerplate"], audit["rows_read"]),
    }


def _frequency_bars(table: Sequence[Mapping[str, Any]], whole: int) -> list[Bar]:
    """Bars of a table whose first entry is the most frequent."""
    if not table:
        return []
    counts = [(entry["text"], entry["rows"]) for entry in table]
    return bars(counts, whole, table[0]["rows"])


def _openers(table: Mapping[str, Any]) -> View:
    top = table["top"]
    if not top:
        return {"bars": []}
    evenness = table["entropy_ratio"]
    return {
        "n": table["n"],
        "top_share": percent(top[0]["share"]),
        "top_ten_share": percent(sum(opener["share"] for opener in top[:10])),
        "evenness": "" if evenness is None else f"{evenness:.2f}",
        "bars": _frequency_bars(top, table["n"]),
    }


def _diversity(audit: Audit) -> View:
    names = {"row": "rows", "instruction": "prompts", "response": "answers"}
    unique = []
    for key, share in audit["diversity"]["unique"].items():
        unique.append({"name": names[key], "share": f"{share:.3f}"})
    return {"rows": audit["rows_read"], "unique": unique}


def _private_data(audit: Audit) -> View:
    return {"counts": audit["private_data"]}


def _control_tokens(audit: Audit) -> View:
    return {"has_tokens": bool(audit["truncation"])}


def _samples(audit: Audit) -> View:
    titles = {"kept": "Kept by cleaning", "dropped": "Dropped by cleaning"}
    groups = []
    for name, title in titles.items():
        samples = []
        for sample in audit["samples"][name]:
            samples.append(_sample(audit, sample))
        groups.append({"title": title, "samples": samples})
    return {
        "seed": audit["settings"]["seed"],
        "has_tokens": bool(audit["truncation"]),
        "groups": groups,
    }


def _sample(audit: Audit, sample: Mapping[str, Any]) -> View:
    checks = checks_by_name(audit)
    passages = []
    # The audit tells control tokens from text; here only what is trained is told from the rest.
    for is_trained, parts in groupby(sample["text"], key=itemgetter(1)):
        text = shortened("".join(map(itemgetter(0), parts)), _PASSAGE_CHARACTERS)
        passages.append({"text": text, "is_trained": is_trained})
    more = max(len(passages) - _PASSAGES, 0)
    first_text = sample["text"][0][0] if sample["text"] else ""
    return {
        "where": place(audit, sample["where"]),
        "reasons": [checks[check]["title"] for check in sample["reasons"]],
        "passages": passages[:_PASSAGES],
        "begins_with_newline": first_text.startswith("\n"),
        "more": counted(more, "more part") if more else "",
    }


def _definitions(audit: Audit) -> View:
    settings = {}
    for name, value in audit["settings"].items():
        settings[name] = _setting(value)
    return {"checks": checks_by_name(audit).values(), "settings": settings}


def _setting(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, (list, tuple)):
        return ", ".join(value) or "none"
    return str(value)


VIEWS: Mapping[str, Callable[[Audit], View]] = {
    "verdict": _verdict,
    "rows": _rows,
    "truncation": _truncation,
    "lengths": _lengths,
    "duplicates": _duplicates,
    "contamination": _contamination,
    "patterns": _patterns,
    "diversity": _diversity,
    "private_data": _private_data,
    "control_tokens": _control_tokens,
    "samples": _samples,
    "definitions": _definitions,
}
