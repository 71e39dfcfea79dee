"""What `init --from` says: how many keys are the same, each difference, each finding, all that stands in the way."""

from collections.abc import Iterator, Sequence
from typing import Any

from sft_recipes.foreign.reading import ForeignFinding, Group, Outcome, Reading
from sft_recipes.foreign.tables import value_text

_LONGEST_VALUE = 50
# How keys end whose values nobody else may see.
_SECRETS = ("hub_token", "api_key", "secret")


def lines(reading: Reading) -> Iterator[str]:
    """The account as text, one line a key or finding."""
    counts = _counts(reading)
    yield (
        f"{reading.path}: {sum(counts.values())} keys of {reading.table.label}: "
        f"{counts[Group.SAME]} the same, {counts[Group.NO_EFFECT]} without effect here, "
        f"{counts[Group.DIFFERENT]} different, {counts[Group.BLOCKED]} in the way"
    )
    always = reading.table.more.get("always", ())
    different = _of(reading, Group.DIFFERENT)
    for title, outcomes in (
        ("in the way, so no recipe was written", reading.blocked),
        ("different", [outcome for outcome in different if outcome.rule_key not in always]),
        (
            f"different in every config of {reading.table.tool}",
            [outcome for outcome in different if outcome.rule_key in always],
        ),
    ):
        if outcomes:
            yield f"\n{title}:"
            yield from (_outcome_line(reading, outcome) for outcome in outcomes)
    if reading.defaults and not reading.blocked:
        yield f"\nnot set; the recipe says what {reading.table.tool} does then, or what is done here:"
        for outcome in reading.defaults:
            if outcome.ours:
                yield f"  {_default_line(outcome)}"
    facts = [finding for finding in reading.findings if not finding.judgement]
    judged = [finding for finding in reading.findings if finding.judgement]
    for title, findings in (
        ("wrong with this config itself", facts),
        ("worth a second look (judgement, not fact)", judged),
    ):
        if findings:
            yield f"\n{title}:"
            yield from (f"  {finding}" for finding in findings)
    silent = [outcome.rule_key for outcome in _of(reading, Group.NO_EFFECT)]
    if silent:
        yield f"\nwithout effect here (--json says why of each): {', '.join(silent)}"


def as_json(reading: Reading) -> dict[str, Any]:
    """The account as plain data; every key of the config is in one of the groups."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for group in Group:
        groups[group.name.lower()] = [
            _outcome_json(outcome)
            for outcome in reading.outcomes.values()
            if outcome.group is group
        ]
    return {
        "schema_version": 1,
        "file": str(reading.path),
        "tool": reading.table.tool,
        "tool_version": reading.table.version,
        "keys": groups,
        "defaults": [_outcome_json(outcome) for outcome in reading.defaults if outcome.ours],
        "findings": [_finding_json(finding) for finding in reading.findings],
        "launch": reading.launch,
    }


def _counts(reading: Reading) -> dict[Group, int]:
    counts = dict.fromkeys(Group, 0)
    for outcome in reading.decided:
        counts[outcome.group] += 1
    return counts


def _of(reading: Reading, group: Group) -> Sequence[Outcome]:
    return [outcome for outcome in reading.decided if outcome.group is group]


def _outcome_line(reading: Reading, outcome: Outcome) -> str:
    setting = outcome.setting
    value = ""
    if outcome.rule_key == setting.key:
        value = f" {_short(setting.value)}"
    return f"  {reading.place(setting)}: {outcome.rule_key}{value} -> {outcome.say}"


def _default_line(outcome: Outcome) -> str:
    ours = ", ".join(f"{key}: {_short(value)}" for key, value in outcome.ours.items())
    if outcome.say:
        return f"{ours} ({outcome.say})"
    return ours


def _short(value: Any) -> str:
    text = value_text(value).replace("\n", " ")
    if len(text) > _LONGEST_VALUE:
        return text[: _LONGEST_VALUE - 3] + "..."
    return text


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    value = outcome.setting.value
    if outcome.setting.key.endswith(_SECRETS):
        value = "not shown"
    return {
        "key": outcome.setting.key,
        "line": outcome.setting.line or None,
        "value": value,
        "say": outcome.say,
        "ours": dict(outcome.ours),
    }


def _finding_json(finding: ForeignFinding) -> dict[str, Any]:
    return {
        "place": finding.place,
        "key": finding.key,
        "what": finding.what,
        "judgement": finding.judgement,
        "source": finding.source,
    }
