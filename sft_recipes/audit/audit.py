"""The audit of a data set: read it, run every check, write what was found.

`audit.json` holds all numbers, `flagged.jsonl` every row at fault, `report.html` both for people.
All rows are held in memory; the checks go over them once each and keep only what they found.
"""

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import sft_recipes
from sft_recipes import run_folder
from sft_recipes.audit import cleaning, contamination, diversity, duplicates, lengths
from sft_recipes.audit.finding import (
    CHECKS,
    SEVERITIES,
    AuditRow,
    Finding,
    FlaggedRow,
    flag,
    make_finding,
)
from sft_recipes.audit.reading import AuditData, read_rows
from sft_recipes.audit.samples import draw_samples
from sft_recipes.audit.text_checks import text_findings
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import LONGEST_MEASURED, Labeller
from sft_recipes.data.reading.json_reader import append_json_lines
from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings
from sft_recipes.report.audit_report import write_audit_report
from sft_recipes.response_patterns import mask

AUDIT = "audit.json"
FLAGGED = "flagged.jsonl"
REPORT = "report.html"


@dataclass(frozen=True, slots=True)
class AuditRequest:
    """What is audited. `renderer` None: no tokenizer is known, so nothing is counted in tokens.

    `eval_data`: sets that no row may repeat, by the name that messages show. `clean`: folder for
    the rows less those of the checks in `drop`. `report`: whether the HTML is written.
    """

    name: str
    data: DataSettings
    labels: LabelSettings
    output: Path
    renderer: ChatRenderer | None = None
    eval_data: Mapping[str, DatasetSource] = dataclasses.field(default_factory=dict)
    clean: Path | None = None
    drop: Sequence[str] = ()
    report: bool = True
    progress: bool = True


class _Checked(NamedTuple):
    """Findings, empty ones included, and what the report shows beside them."""

    findings: list[Finding]
    content: dict[str, Any]


def run_audit(request: AuditRequest) -> dict[str, Any]:
    """Run the audit, write its files, and return what `audit.json` says.

    Raises InputError for data that cannot be read, an unknown check, a `clean` that exists or has
    several data sets.
    """
    started = time.perf_counter()
    if request.clean is not None:
        cleaning.refuse_output(request.clean, request.name, request.data.datasets)
    drop = cleaning.dropping(request.drop)
    labeller = _labeller(request)
    data = read_rows(request.data)
    checked = _check(request, data, labeller)
    findings = sorted(checked.findings, key=_gravity)
    reasons = cleaning.reasons_by_row(findings, drop)
    found: list[dict[str, Any]] = []
    passed: list[dict[str, Any]] = []
    for finding in findings:
        if finding.rows:
            found.append(finding.as_json())
        else:
            passed.append(finding.as_json())
    content = {
        "source": request.name,
        "files": data.files,
        "settings": _settings(request, drop),
        "versions": {
            "sft_recipes": sft_recipes.__version__,
            "rensa": version("rensa"),
            "tokenizers": version("tokenizers"),
        },
        "seconds": round(time.perf_counter() - started, 2),
        "rows_in": data.rows_in,
        "rows_malformed": len(data.malformed),
        "rows_read": len(data.rows),
        "findings": found,
        "passed": passed,
        "waterfall": _waterfall(reasons, drop),
        **checked.content,
        "samples": draw_samples(data.rows, reasons, labeller, request.data.seed),
    }
    content = _masked(content)
    _write(request.output, content, findings)
    if request.report:
        write_audit_report(request.output)
    if request.clean is not None:
        source = request.data.datasets[0]
        content["cleaned"] = cleaning.write_cleaned(source, reasons, request.clean)
    return content


def _labeller(request: AuditRequest) -> Labeller | None:
    """As in training, but no row is dropped for the control tokens that it spells.

    Nor is one for its length, unless that is too much to be measured.
    """
    if request.renderer is None:
        return None
    labels = dataclasses.replace(request.labels, max_length=None, control_tokens="neutralize")
    return Labeller(request.renderer, labels, LONGEST_MEASURED)


def _gravity(finding: Finding) -> tuple[int, int]:
    """Errors come first, then what concerns most rows."""
    return SEVERITIES.index(finding.severity), -len(finding.rows)


def _settings(request: AuditRequest, drop: Sequence[str]) -> dict[str, Any]:
    template = None
    tokenizer = None
    if request.renderer is not None:
        template = hashlib.sha256(request.renderer.template_text.encode()).hexdigest()
        tokenizer = request.renderer.tokenizer.name_or_path
    return {
        "max_length": request.labels.max_length,
        "seed": request.data.seed,
        "drop": drop,
        "eval_data": list(request.eval_data),
        "template_sha256": template,
        "tokenizer": tokenizer,
    }


def _waterfall(
    reasons: Mapping[int, Sequence[str]], drop: Sequence[str]
) -> list[dict[str, str | int]]:
    """How many rows each check drops that no check before it does."""
    rows = dict.fromkeys(drop, 0)
    for first_reason, *_ in reasons.values():
        rows[first_reason] += 1
    steps: list[dict[str, str | int]] = []
    for check, count in rows.items():
        # A check that did not run has not filled in its title either.
        title = CHECKS[check]["title"].split(" {")[0]
        steps.append({"reason": check, "title": title, "rows": count})
    return steps


def _write(folder: Path, content: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(folder / AUDIT, content)
    flagged_file = folder / FLAGGED
    flagged_file.unlink(missing_ok=True)
    for finding in findings:
        entries = []
        for row in finding.rows:
            kind = {"check": finding.check, "severity": finding.severity}
            entries.append(_masked(kind | dataclasses.asdict(row)))
        append_json_lines(flagged_file, entries)


def _check(request: AuditRequest, data: AuditData, labeller: Labeller | None) -> _Checked:
    rows = data.rows
    tokens = None
    own_tokens: list[str] = []
    # Two passes over the rows take nearly all the time: the labels and the texts.
    passes = 1 if labeller is None else 2
    with tqdm(
        total=passes * len(rows),
        desc="audit",
        unit=" checks",
        disable=None if request.progress else True,
        leave=False,
    ) as bar:
        if labeller is not None:
            tokens = lengths.measure_tokens(labeller, rows, bar)
            own_tokens = _control_tokens(labeller.renderer)
        of_texts, private_data = text_findings(rows, own_tokens, bar)
    of_lengths = _check_lengths(request, rows, tokens)
    of_patterns, patterns = diversity.find_patterns(rows)
    of_duplicates, repeats = duplicates.check_duplicates(rows)
    of_evaluation, overlaps = _compare_with_eval(request, rows)
    findings = [
        make_finding("malformed", data.malformed, data.rows_in),
        *of_lengths.findings,
        *of_texts,
        *of_patterns,
        *of_duplicates,
        *of_evaluation,
    ]
    content = {
        **of_lengths.content,
        "patterns": patterns,
        "duplicates": repeats,
        "contamination": overlaps,
        "diversity": diversity.measure_diversity(rows),
        "private_data": private_data,
    }
    return _Checked(findings, content)


def _control_tokens(renderer: ChatRenderer) -> list[str]:
    tokens = []
    for added in renderer.tokenizer.added_tokens_decoder.values():
        if renderer.encoder.first_control_token(added.content):
            tokens.append(added.content)
    return tokens


def _check_lengths(
    request: AuditRequest, rows: Sequence[AuditRow], tokens: lengths.TokenLengths | None
) -> _Checked:
    """Lengths, and where tokens are known what cannot be trained and what a limit would cost."""
    findings = []
    if tokens is not None:
        findings.append(make_finding("no_labels", _unlabelled(rows, tokens), len(rows)))
    if tokens is None or not len(tokens.total):
        return _Checked(
            findings,
            {
                "lengths": lengths.summarise_lengths(rows, None),
                "truncation": [],
            },
        )
    limit = request.labels.max_length
    fitting = lengths.smallest_fitting(tokens)
    candidates = {*lengths.CANDIDATE_LENGTHS, fitting}
    if limit:
        candidates.add(limit)
        findings.append(_truncation(rows, tokens, limit))
    content = {
        "lengths": lengths.summarise_lengths(rows, tokens),
        "truncation": lengths.forecast(tokens, sorted(candidates)),
        "smallest_max_length": fitting,
    }
    return _Checked(findings, content)


def _truncation(rows: Sequence[AuditRow], tokens: lengths.TokenLengths, limit: int) -> Finding:
    flagged = []
    for place in (tokens.total > limit).nonzero()[0]:
        row = rows[tokens.row[place]]
        flagged.append(flag(row, f"{tokens.total[place]} tokens"))
    (cost,) = lengths.forecast(tokens, [limit])
    held = f", with {cost['share_dropped']:.1%} of the trained tokens" if flagged else ""
    return make_finding(
        "truncation",
        flagged,
        len(rows),
        max_length=limit,
        held=held,
        advice=lengths.advice(tokens, limit),
    )


def _unlabelled(rows: Sequence[AuditRow], tokens: lengths.TokenLengths) -> list[FlaggedRow]:
    """The rows of which nothing is trained."""
    labelled = set(tokens.row.tolist())
    flagged = []
    for lost in tokens.dropped:
        if lost.position not in labelled:
            detail = f"{lost.loss.reason}: {lost.loss.detail}"
            flagged.append(flag(rows[lost.position], detail))
    return flagged


def _compare_with_eval(
    request: AuditRequest, rows: Sequence[AuditRow]
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Rows that repeat the recipe's own test split or any other evaluation set."""
    held_out = {}
    for name, source in request.eval_data.items():
        held_out[name] = _read_eval(request, [source])
    findings = []
    test_split = request.data.test_split
    if test_split:
        own = []
        for source in request.data.datasets:
            own.append(dataclasses.replace(source, split=test_split))
        name = f"split {test_split}"
        held_out[name] = _read_eval(request, own)
        findings.append(contamination.check_split_leak(rows, held_out[name]))
    overlap, tables = contamination.check_contamination(rows, held_out)
    if held_out:
        findings.append(overlap)
    return findings, tables


def _read_eval(request: AuditRequest, sources: Sequence[DatasetSource]) -> list[AuditRow]:
    data = read_rows(dataclasses.replace(request.data, datasets=sources))
    if data.malformed:
        fix = "repair the evaluation data; what cannot be read cannot be compared"
        problems = []
        for row in data.malformed:
            problems.append(Problem(row.where, "", row.detail, fix))
        raise InputError(problems)
    return data.rows


def _masked(value: Any) -> Any:
    """A copy of plain data with private data masked in every text."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {mask(key): _masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(_masked, value))
    return value
