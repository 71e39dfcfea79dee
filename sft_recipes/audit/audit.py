"""The audit of a data set: read it, run every check, write `audit.json`, `flagged.jsonl` and `report.html`.

All rows are held in memory; the checks go over them once each and keep only what they found.
"""

import dataclasses
import hashlib
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.audit import cleaning, contamination, diversity, duplicates, lengths
from sft_recipes.audit.finding import (
    SEVERITIES,
    AuditRow,
    Finding,
    FlaggedRow,
    audit_rows,
    excerpt,
    flag,
    make_finding,
)
from sft_recipes.audit.text_checks import text_findings
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.inspection import token_runs
from sft_recipes.data.labels import LONGEST_MEASURED, Labeller
from sft_recipes.data.loading import RejectLog, iter_examples, source_files
from sft_recipes.data.reading.json_reader import append_json_lines, display_path
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import place
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings
from sft_recipes.report.audit_report import write_audit_report
from sft_recipes.response_patterns import mask

AUDIT, FLAGGED, REPORT = "audit.json", "flagged.jsonl", "report.html"
_SAMPLES, _LONGEST = 20, 800


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """What is audited. `renderer` None: no tokenizer is known, so nothing is counted in tokens.

    `eval_data`: sets that no row may repeat, by the name that messages show. `clean`: folder for the rows less
    those of the checks in `drop`.
    """

    name: str
    data: DataSettings
    labels: LabelSettings
    output: Path
    renderer: ChatRenderer | None = None
    eval_data: Mapping[str, DatasetSource] = dataclasses.field(default_factory=dict)
    clean: Path | None = None
    drop: Sequence[str] = ()
    progress: bool = True


def run_audit(request: AuditRequest) -> dict[str, Any]:
    """Run the audit, write its files, and return what `audit.json` says.

    Raises InputError for data that cannot be read, an unknown check, a `clean` that exists or has several data sets.
    """
    started = time.perf_counter()
    if request.clean is not None and request.clean.exists():
        raise InputError(
            Problem(str(request.clean), "--clean", "exists already", "name a new folder")
        )
    if request.clean is not None and len(request.data.datasets) > 1:
        problem = Problem(
            request.name,
            "--clean",
            "several data sets do not fit into one file",
            "clean each by itself",
        )
        raise InputError(problem)
    checks = cleaning.dropping(request.drop)
    labeller, template = None, None
    if (renderer := request.renderer) is not None:
        # As in training, but no row is dropped for the control tokens that it spells, nor for its length unless that is
        # too much to be measured.
        labels = dataclasses.replace(request.labels, max_length=None, control_tokens="neutralize")
        labeller, template = (
            Labeller(renderer, labels, LONGEST_MEASURED),
            hashlib.sha256(renderer.template_text.encode()).hexdigest(),
        )
    rows, malformed, files = read_rows(request.data)
    findings, content = _check(request, rows, malformed, labeller)
    findings.sort(key=lambda one: (SEVERITIES.index(one.severity), -len(one.rows)))
    reasons, rows_in = cleaning.reasons_by_row(findings, checks), len(rows) + len(malformed)
    first = Counter(some[0] for some in reasons.values())
    head = {
        "source": request.name,
        "files": files,
        "settings": {
            **{"max_length": request.labels.max_length, "seed": request.data.seed, "drop": checks},
            **{"eval_data": list(request.eval_data), "template_sha256": template},
            "tokenizer": renderer and renderer.tokenizer.name_or_path,
        },
        "versions": {
            "sft_recipes": sft_recipes.__version__,
            **{one: version(one) for one in ("rensa", "tokenizers")},
        },
        "seconds": round(time.perf_counter() - started, 2),
        **{"rows_in": rows_in, "rows_malformed": len(malformed), "rows_read": len(rows)},
        "findings": [finding.as_json() for finding in findings if finding.rows],
        "passed": [finding.as_json() for finding in findings if not finding.rows],
        "waterfall": [{"reason": check, "rows": first[check]} for check in checks],
    }
    content = _masked(
        {**head, **content, "samples": _samples(rows, reasons, labeller, request.data.seed)}
    )
    request.output.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(request.output / AUDIT, content)
    (request.output / FLAGGED).unlink(missing_ok=True)
    for finding in findings:
        kind = {"check": finding.check, "severity": finding.severity}
        entries = (_masked({**kind, **dataclasses.asdict(row)}) for row in finding.rows)
        append_json_lines(request.output / FLAGGED, entries)
    write_audit_report(request.output)
    if request.clean is not None:
        content["cleaned"] = cleaning.write_cleaned(
            request.data.datasets[0], reasons, request.clean
        )
    return content


def read_rows(
    settings: DataSettings,
) -> tuple[list[AuditRow], list[FlaggedRow], list[dict[str, Any]]]:
    """The rows of all sources, numbered over the whole input, the malformed ones among them, and the files.

    Raises InputError for a source of which no row can be read.
    """
    settings = dataclasses.replace(settings, on_bad_rows="skip", max_rejected=1.0)
    rows, malformed, files = list[AuditRow](), list[FlaggedRow](), list[dict[str, Any]]()
    for source in settings.datasets:
        rejects = RejectLog(settings)
        examples = list(iter_examples(source, settings, rejects=rejects))
        count = Counter([one.source for one in examples] + [one["source"] for one in rejects.rows])
        paths, first = {display_path(path): path for path in source_files(source)}, dict[str, int]()
        for name in paths or [source.path]:
            first[name] = sum(file["rows"] for file in files)
            digest = hashlib.sha256(paths[name].read_bytes()).hexdigest() if paths else None
            entry = {
                "path": name,
                "sha256": digest,
                "rows": count[name],
                "format": rejects.formats[source.path],
            }
            files.append(entry)
        for example in examples:
            rows += audit_rows((example,), first[example.source] + example.row)
        for one in rejects.rows:
            where, index = (
                place(one["source"], one["row"], one["line"]),
                first[one["source"]] + one["row"],
            )
            malformed.append(FlaggedRow(index, where, excerpt(one["reason"])))
    return rows, malformed, files


def _check(
    request: AuditRequest,
    rows: Sequence[AuditRow],
    malformed: Sequence[FlaggedRow],
    labeller: Labeller | None,
) -> tuple[list[Finding], dict[str, Any]]:
    """Every finding, empty ones included, and what the report shows beside them."""
    steps = len(rows) * (1 + (labeller is not None))
    with tqdm(
        total=steps, desc="audit", unit=" checks", disable=not request.progress, leave=False
    ) as bar:
        tokens, own = None, list[str]()
        if labeller is not None:
            tokens = lengths.measure_tokens(labeller, rows, bar)
            added = (
                token.content for token in labeller.renderer.tokenizer.added_tokens_decoder.values()
            )
            own = [token for token in added if labeller.renderer.encoder.first_control_token(token)]
        text, private = text_findings(rows, own, bar)
    findings = [make_finding("malformed", malformed, len(rows) + len(malformed))]
    if tokens is not None:
        findings.append(make_finding("no_labels", _unlabelled(rows, tokens), len(rows)))
        tokens = tokens if len(tokens.total) else None
    content: dict[str, Any] = {"lengths": lengths.summarise_lengths(rows, tokens), "truncation": []}
    if tokens is not None:
        limit, fitting = request.labels.max_length, lengths.smallest_fitting(tokens)
        candidates = sorted({*lengths.CANDIDATE_LENGTHS, fitting, limit or fitting})
        content |= {
            "truncation": lengths.forecast(tokens, candidates),
            "smallest_max_length": fitting,
        }
        if limit:
            long = (tokens.total > limit).nonzero()[0]
            cut = [flag(rows[tokens.row[at]], f"{tokens.total[at]} tokens") for at in long]
            findings.append(
                make_finding("truncation", cut, len(rows), max_length=limit, fitting=fitting)
            )
    spread, content["patterns"] = diversity.find_patterns(rows)
    repeated, content["duplicates"] = duplicates.check_duplicates(rows)
    leaks, content["contamination"] = _compare_with_eval(request, rows)
    content |= {"diversity": diversity.measure_diversity(rows), "private_data": private}
    content["scripts"] = content["patterns"].pop("scripts")
    return [*findings, *text, *spread, *repeated, *leaks], content


def _compare_with_eval(
    request: AuditRequest, rows: Sequence[AuditRow]
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Rows that repeat the recipe's own test split or any other evaluation set."""
    own, sources = (
        request.data.test_split,
        {name: [source] for name, source in request.eval_data.items()},
    )
    if own:
        sources[f"split {own}"] = [
            dataclasses.replace(source, split=own) for source in request.data.datasets
        ]
    sets: dict[str, list[AuditRow]] = {}
    for name, some in sources.items():
        sets[name], malformed, _ = read_rows(dataclasses.replace(request.data, datasets=some))
        if malformed:
            fix = "repair the evaluation data; what cannot be read cannot be compared"
            raise InputError([Problem(row.where, "", row.detail, fix) for row in malformed])
    leaks = [contamination.check_split_leak(rows, sets[f"split {own}"])] if own else []
    found, tables = contamination.check_contamination(rows, sets)
    return ([*leaks, found] if sets else []), tables


def _unlabelled(rows: Sequence[AuditRow], tokens: lengths.TokenLengths) -> list[FlaggedRow]:
    """The rows of which nothing is trained."""
    labelled = set(tokens.row.tolist())
    return [
        flag(rows[at], f"{one.reason}: {one.detail}")
        for at, one in tokens.dropped
        if at not in labelled
    ]


def _samples(
    rows: Sequence[AuditRow],
    reasons: Mapping[int, Sequence[str]],
    labeller: Labeller | None,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """20 kept and 20 dropped rows by seed, as the trainer sees them: pieces of text and whether they are trained."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for name in ("kept", "dropped"):
        some = [row for row in rows if (row.index in reasons) == (name == "dropped")]
        samples[name] = [
            {
                "where": row.where,
                "reasons": reasons.get(row.index, []),
                "text": _pieces(row, labeller),
            }
            for row in random.Random(seed).sample(some, min(_SAMPLES, len(some)))
        ]
    return samples


def _pieces(row: AuditRow, labeller: Labeller | None) -> list[tuple[str, bool]]:
    turns = (
        ((f"\n{role}: ", False), (text, role == "assistant" and not labeller))
        for role, text in row.turns
    )
    parts = list(chain.from_iterable(turns))
    if labeller is not None and (labelled := labeller.label([row.example]).rows):
        parts = [(run.text, run.is_trained) for run in token_runs(labeller.renderer, labelled[-1])]
    return [(excerpt(text, _LONGEST), trained) for text, trained in parts]


def _masked(value: Any) -> Any:
    """A copy of plain data with private data masked in every text."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {mask(key): _masked(item) for key, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, (list, tuple)) else value
