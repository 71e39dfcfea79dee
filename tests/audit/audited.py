"""Audits of small files, and what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft_recipes.audit.audit import AuditRequest, run_audit
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings
from tests.audit.planted import plant


def instruction(prompt: str, response: Any) -> dict[str, Any]:
    """A row as it stands in a file."""
    return {"instruction": prompt, "input": "", "output": response}


def planted_rows(**counts: int) -> list[dict[str, Any]]:
    """The rows of `plant` as they stand in a file."""
    messages = [example.messages for example in plant(**counts).examples]
    return [instruction(user["content"], assistant["content"]) for user, assistant in messages]


def audit(path: Path, max_length: int | None = None, **options: Any) -> dict[str, Any]:
    """Audit one file into `audit` beside it, without the HTML report, which takes a second."""
    options = {"report": False, "progress": False} | options
    request = AuditRequest(
        name=path.name,
        data=DataSettings(datasets=(DatasetSource(str(path)),)),
        labels=LabelSettings(max_length=max_length),
        output=path.parent / "audit",
        **options,
    )
    return run_audit(request)


def finding(content: dict[str, Any], check: str) -> dict[str, Any]:
    """One finding of an audit."""
    found: dict[str, Any] = {entry["check"]: entry for entry in content["findings"]}[check]
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
