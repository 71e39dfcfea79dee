"""A report of the doctor for the terminal."""

from sft_recipes.doctor.finding import Report, command
from sft_recipes.report.text_tables import text_table


def report_text(report: Report) -> str:
    """The verdict, the findings, what was looked at and what was not, and what to do next."""
    parts = [report.verdict]
    # Not in a table: a fix that is folded cannot be copied.
    parts += [finding.as_text() for finding in report.findings]
    rows = [(look.check, look.outcome, look.seen) for look in report.looked_at]
    parts.append(text_table(("looked at", "", "seen"), rows, left=3).rstrip())
    missed: dict[str, list[str]] = {}  # by the reason
    for look in report.looks:
        if look.not_seen:
            missed.setdefault(look.not_seen, []).append(look.check)
    if report.not_read:
        missed["pickles may run code when they are opened"] = list(report.not_read)
    if missed:
        reasons = [(", ".join(names), reason) for reason, names in missed.items()]
        parts.append(text_table(("not looked at", "because"), reasons, left=2).rstrip())
    parts.append(_next(report))
    return "\n\n".join(parts)


def _next(report: Report) -> str:
    if any(finding.severity == "error" for finding in report.findings):
        return f"next: mend the errors, then\n  {command('doctor', report.folder)}"
    evaluate = f"{command('evaluate', report.model, '--data')} FILE"
    return f"next:\n  {evaluate}\n  {command('export', report.model)}"
