"""What the doctor says: findings with their fix, and what each check looked at."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
# error: it does not load, or nothing was learned. warning: it acts otherwise than was meant. note:
# worth a look.
SEVERITIES: Sequence[Severity] = ("error", "warning", "note")


class NotSeen(Exception):
    """Why a check could not look."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: where, what, why it matters, what to do.

    `is_judgement`: a rule of thumb says so; whoever knows the run may know better.
    """

    check: str
    severity: Severity
    where: str
    what: str
    why: str
    fix: str
    is_judgement: bool = False

    def as_text(self) -> str:
        """Two lines: what, and the fix by itself, so that it can be copied."""
        mark = " (a judgement)" if self.is_judgement else ""
        text = f"{self.severity}{mark}: {self.where}: {self.what}"
        if self.why:
            text += f": {self.why}"
        return f"{text}.\n  Fix: {self.fix}"


@dataclass
class Look:
    """A check at work: what it has found, and in words what it has looked at."""

    check: str
    findings: list[Finding] = field(default_factory=list)
    seen: str = ""
    not_seen: str = ""  # why it could not look; then nothing else is known

    def find(self, severity: Severity, where: Path | str, what: str, why: str, fix: str) -> None:
        """Note what is wrong."""
        self.findings.append(Finding(self.check, severity, str(where), what, why, fix))

    def judge(self, severity: Severity, where: Path | str, what: str, why: str, fix: str) -> None:
        """Note what a rule of thumb says is wrong."""
        self.findings.append(Finding(self.check, severity, str(where), what, why, fix, True))

    @property
    def outcome(self) -> str:
        """In a word."""
        if self.findings:
            return "found"
        return "not looked at" if self.not_seen else "ok"

    def as_json(self) -> dict[str, Any]:
        """The same as plain data, without the findings."""
        return {"check": self.check, "outcome": self.outcome, "detail": self.not_seen or self.seen}


@dataclass(frozen=True)
class Report:
    """All that was looked at in a run: its folder, the one in it with the model, and what it is."""

    folder: Path
    model: Path
    kind: str
    looks: Sequence[Look]
    not_read: Sequence[str]  # names of pickles, which may run code when they are opened

    @property
    def findings(self) -> list[Finding]:
        """All of them, the gravest first."""
        findings: list[Finding] = []
        for look in self.looks:
            findings += look.findings
        return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))

    @property
    def looked_at(self) -> list[Look]:
        """The checks that could look."""
        return [look for look in self.looks if not look.not_seen]

    @property
    def verdict(self) -> str:
        """All of it in one sentence."""
        counts: list[str] = []
        for severity in SEVERITIES:
            number = sum(finding.severity == severity for finding in self.findings)
            if number:
                counts.append(f"{number} {severity}{'s' if number > 1 else ''}")
        looked = f"{len(self.looked_at)} of {len(self.looks)} checks could look"
        result = ", ".join(counts) or "nothing is wrong with what was looked at"
        return f"{self.folder} is {self.kind}: {result}; {looked}."

    def as_json(self) -> dict[str, Any]:
        """Plain data for `doctor --json`."""
        return {
            "folder": str(self.folder),
            "model": str(self.model),
            "kind": self.kind,
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
            "checks": [look.as_json() for look in self.looks],
            "checked": len(self.looked_at),
            "not_read": list(self.not_read),
        }


def command(*words: Path | str) -> str:
    """A command of ours, as it is typed."""
    return shlex.join(["sft-recipes", *map(str, words)])


def python(code: str, *arguments: Path | str) -> str:
    """A command that runs a line of Python on files."""
    return shlex.join(["python", "-c", code, *map(str, arguments)])
