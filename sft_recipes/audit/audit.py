"""The audit of a data set: read it, run every check, write `audit.json`, `flagged.jsonl` and `report.html`.

All rows are held in memory; the checks go over them once each and keep only what they found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.audit import cleaning, contamination, diversity, duplicates, lengths
from sft_recipes.audit.finding import SEVERITIES, Finding, FlaggedRow
from sft_recipes.audit.rows import AuditRow, audit_rows
from sft_recipes.audit.text_checks import CHECKS, excerpt, make_finding, text_findings
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.json_reader import display_path
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.data.loading import RejectLog, iter_examples, source_files
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import place
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings
from sft_recipes.report.audit_report import write_audit_report
from sft_recipes.response_patterns import mask

AUDIT, FLAGGED, REPORT = "audit.json", "flagged.jsonl", "report.html"
_SAMPLES, _SENTENCES, _PLACES, _LONGEST = 20, 5, 3, 4000


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """What is audited. `renderer` None: no tokenizer is known, so nothing is counted in tokens.

    `eval_data`: sets that no row may repeat, by the name that messages show. `clean`: folder for the cleaned rows.
    """

    name: str
    data: DataSettings
    labels: LabelSettings
    output: Path
    renderer: ChatRenderer | None = None
    eval_data: Mapping[str, DatasetSource] = dataclasses.field(default_factory=dict)
    clean: Path | None = None
    policy: Path | None = None
    progress: bool = True


def run_audit(request: AuditRequest) -> dict[str, Any]:
    """Run the audit, write its files, and return what `audit.json` says.

    Raises InputError for data that cannot be read, a wrong policy, and several data sets where `clean` is asked for.
    """
    started = time.perf_counter()
    if request.clean is not None and len(request.data.datasets) > 1:
        problem = Problem(request.name, "--clean", "several data sets do not fit into one file", "clean each by itself")
        raise InputError(problem)
    policy = cleaning.read_policy(request.policy, [*CHECKS, *duplicates.CHECKS])
    rows, malformed, files = read_rows(request.data)
    findings, content = _check(request, rows, malformed)
    findings.sort(key=lambda one: (SEVERITIES.index(one.severity), -len(one.rows)))
    reasons, rows_in = cleaning.reasons_by_row(findings, policy), len(rows) + len(malformed)
    first = Counter(some[0] for some in reasons.values())
    head = {
        "source": request.name,
        "files": files,
        "settings": _settings(request, policy),
        "versions": {"sft_recipes": sft_recipes.__version__, **{one: version(one) for one in ("rensa", "tokenizers")}},
        "seconds": round(time.perf_counter() - started, 2),
        **{"rows_in": rows_in, "rows_malformed": len(malformed), "rows_read": len(rows)},
        "verdict": _verdict(findings, rows_in, len(reasons)),
        "findings": [finding.as_json() for finding in findings if finding.rows],
        "passed": [{"check": one.check, "title": one.title} for one in findings if not one.rows],
        "waterfall": [{"reason": check, "rows": first[check]} for check in policy],
    }
    content = _masked({**head, **content, "samples": _samples(request, rows, reasons)})
    request.output.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(request.output / AUDIT, content)
    with (request.output / FLAGGED).open("w", encoding="utf-8") as file:
        for finding in findings:
            for row in finding.rows:
                entry = {"check": finding.check, "severity": finding.severity, **dataclasses.asdict(row)}
                file.write(json.dumps(_masked(entry), ensure_ascii=False) + "\n")
    write_audit_report(request.output)
    if request.clean is not None:
        content["cleaned"] = cleaning.write_cleaned(request.data.datasets[0], reasons, request.clean)
    return content


def _settings(request: AuditRequest, policy: Sequence[str]) -> dict[str, Any]:
    settings = {"max_length": request.labels.max_length, "seed": request.data.seed, "policy": policy}
    settings |= {"eval_data": list(request.eval_data), "tokenizer": None, "template_sha256": None}
    if (renderer := request.renderer) is not None:
        template = hashlib.sha256(renderer.template_text.encode()).hexdigest()
        settings |= {"tokenizer": renderer.tokenizer.name_or_path, "template_sha256": template}
    return settings


def _labeller(request: AuditRequest) -> Labeller | None:
    """Labels as in training, but no row is dropped for its length or for the control tokens that it spells."""
    settings = dataclasses.replace(request.labels, max_length=None, control_tokens="neutralize")
    return Labeller(request.renderer, settings) if request.renderer is not None else None


def read_rows(settings: DataSettings) -> tuple[list[AuditRow], list[FlaggedRow], list[dict[str, Any]]]:
    """The rows of all sources, numbered over the whole input, the malformed ones among them, and the files.

    Raises InputError for a source of which no row can be read.
    """
    settings = dataclasses.replace(settings, on_bad_rows="skip", max_rejected=1.0)
    rows, malformed, files = list[AuditRow](), list[FlaggedRow](), list[dict[str, Any]]()
    # The log holds rows as they are, secrets included, so it does not stay.
    with tempfile.TemporaryDirectory() as folder:
        for source in settings.datasets:
            rejects = RejectLog(settings, log := Path(folder) / "rejects.jsonl")
            examples = list(iter_examples(source, settings, rejects=rejects))
            lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []
            rejected = [json.loads(line) for line in lines]
            count = Counter([one.source for one in examples] + [one["source"] for one in rejected])
            paths, first = {display_path(path): path for path in source_files(source)}, dict[str, int]()
            for name in paths or [source.path]:
                first[name] = sum(file["rows"] for file in files)
                digest = hashlib.sha256(paths[name].read_bytes()).hexdigest() if paths else None
                entry = {"path": name, "sha256": digest, "rows": count[name], "format": rejects.formats[source.path]}
                files.append(entry)
            for example in examples:
                rows += audit_rows((example,), first[example.source] + example.row)
            for one in rejected:
                where, index = place(one["source"], one["row"], one["line"]), first[one["source"]] + one["row"]
                malformed.append(FlaggedRow(index, where, one["reason"]))
    return rows, malformed, files


def _check(
    request: AuditRequest, rows: Sequence[AuditRow], malformed: Sequence[FlaggedRow]
) -> tuple[list[Finding], dict[str, Any]]:
    """Every finding, empty ones included, and what the report shows beside them."""
    labeller = _labeller(request)
    steps = len(rows) * (1 + (labeller is not None))
    with tqdm(total=steps, desc="audit", unit=" checks", disable=not request.progress, leave=False) as bar:
        tokens, own = None, list[str]()
        if labeller is not None:
            tokens = lengths.measure_tokens(labeller, rows, bar)
            added = (token.content for token in labeller.renderer.tokenizer.added_tokens_decoder.values())
            own = list(filter(labeller.renderer.control_tokens.occur_in, added))
        text, private = text_findings(rows, own, bar)
    findings = [make_finding("malformed", malformed, len(rows) + len(malformed))]
    findings.append(make_finding("no_labels", _unlabelled(rows, tokens), len(rows)))
    tokens = tokens if tokens is not None and len(tokens.total) else None
    content: dict[str, Any] = {"lengths": lengths.summarise_lengths(rows, tokens), "truncation": [], "ecdf": {}}
    if tokens is not None:
        limit, fitting = request.labels.max_length, lengths.smallest_fitting(tokens)
        candidates = sorted({*lengths.CANDIDATE_LENGTHS, fitting, limit or fitting})
        content |= {"truncation": lengths.forecast(tokens, candidates), "ecdf": lengths.ecdf(tokens)}
        content["smallest_max_length"] = fitting
        pairs = zip(tokens.row.tolist(), tokens.total.tolist(), strict=True)
        long = {at: total for at, total in pairs if limit and total > limit}
        cut = [FlaggedRow(rows[at].index, rows[at].where, f"{total} tokens") for at, total in long.items()]
        findings.append(make_finding("truncation", cut, len(rows), max_length=limit, fitting=fitting))
    spread, content["patterns"] = diversity.find_patterns(rows)
    repeated, content["duplicates"] = duplicates.check_duplicates(rows)
    leaks, content["contamination"] = _compare_with_eval(request, rows)
    content |= {"diversity": diversity.measure_diversity(rows), "private_data": private}
    content["scripts"] = content["patterns"].pop("scripts")
    return [*findings, *text, *spread, *repeated, *leaks], content


def _compare_with_eval(request: AuditRequest, rows: Sequence[AuditRow]) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Rows that repeat the recipe's own test split or any other evaluation set."""
    own, sources = request.data.test_split, {name: [source] for name, source in request.eval_data.items()}
    if own:
        sources[f"split {own}"] = [dataclasses.replace(source, split=own) for source in request.data.datasets]
    sets: dict[str, list[AuditRow]] = {}
    for name, some in sources.items():
        sets[name], malformed, _ = read_rows(dataclasses.replace(request.data, datasets=some))
        if malformed:
            fix = "repair the evaluation data; what cannot be read cannot be compared"
            raise InputError([Problem(row.where, "", row.detail, fix) for row in malformed])
    leaks = [contamination.check_split_leak(rows, sets[f"split {own}"])] if own else []
    found, tables = contamination.check_contamination(rows, sets)
    return ([*leaks, found] if sets else []), tables


def _unlabelled(rows: Sequence[AuditRow], tokens: lengths.TokenLengths | None) -> list[FlaggedRow]:
    """The rows of which nothing is trained; without a tokenizer only those that say so themselves."""
    if tokens is not None:
        labelled = set(tokens.row.tolist())
        lost = [(rows[at], f"{one.reason}: {one.detail}") for at, one in tokens.dropped if at not in labelled]
    else:
        marked = [row for row in rows if row.example.train]  # set only where a turn is marked untrained
        bare = [row for row in marked if not any(map(row.example.is_trainable, range(len(row.turns))))]
        lost = [(row, "every turn is marked untrained") for row in bare]
    return [FlaggedRow(row.index, row.where, why) for row, why in lost]


def _verdict(findings: Sequence[Finding], rows_in: int, dropped: int) -> list[str]:
    """How many rows, how many findings, and the five that matter most, each with where it is first seen."""
    found = [finding for finding in findings if finding.rows]
    counts = Counter(finding.severity for finding in found)
    kinds = ", ".join(f"{counts[one]} {one}{'s' * (counts[one] != 1)}" for one in SEVERITIES[:2])
    lines = [f"{rows_in:,} rows, of which cleaning would keep {rows_in - dropped:,}; {kinds}, {counts['info']} notes"]
    for finding in found[:_SENTENCES]:
        places = list(dict.fromkeys(row.where for row in finding.rows))
        where = ", ".join(places[:_PLACES]) + " ..." * (len(places) > _PLACES)
        count = f"{len(places):,} row{'s' * (len(places) != 1)} ({finding.share:.1%})"
        lines.append(f"{finding.severity}: {finding.title}: {count}, {where}")
    return lines


def _samples(
    request: AuditRequest, rows: Sequence[AuditRow], reasons: Mapping[int, Sequence[str]]
) -> dict[str, list[dict[str, Any]]]:
    """20 kept and 20 dropped rows by seed, as the trainer sees them: pieces of text and whether they are trained."""
    labeller, samples = _labeller(request), dict[str, list[dict[str, Any]]]()
    for name in ("kept", "dropped"):
        some = [row for row in rows if (row.index in reasons) == (name == "dropped")]
        samples[name] = [
            {"where": row.where, "reasons": reasons.get(row.index, []), "text": _pieces(row, labeller)}
            for row in random.Random(request.data.seed).sample(some, min(_SAMPLES, len(some)))
        ]
    return samples


def _pieces(row: AuditRow, labeller: Labeller | None) -> list[tuple[str, bool]]:
    labelled = labeller.label([row.example]).rows if labeller is not None else []
    if labeller is None or not labelled:
        return [(excerpt(text, _LONGEST), role == "assistant" and labeller is None) for role, text in row.turns]
    tokens = zip(labelled[-1].input_ids, labelled[-1].labels, strict=True)
    runs = [(trained, [ids for ids, _ in run]) for trained, run in groupby(tokens, lambda one: one[1] != IGNORE_INDEX)]
    decode = labeller.renderer.tokenizer.decode
    texts = ((decode(ids, clean_up_tokenization_spaces=False), trained) for trained, ids in runs)
    return [(excerpt(text, _LONGEST), trained) for text, trained in texts]


def _masked(value: Any) -> Any:
    """A copy of plain data with private data masked in every text."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {mask(key): _masked(item) for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, (list, tuple)) else value
