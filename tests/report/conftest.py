"""Audits for the tests of their report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_recipes.audit.audit import AuditRequest, run_audit
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.recipe import DatasetSource, DataSettings, LabelSettings, TemplateSettings

Audit = dict[str, Any]
MakeAudit = Callable[..., Audit]


@pytest.fixture(scope="session")
def make_audit(
    make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> MakeAudit:
    """Audit rows, with the tests' tokenizer and ChatML or without.

    Returns what audit.json holds.
    """
    renderer = attach_chat_template(make_tokenizer(), TemplateSettings(chat_template="chatml"))

    def make(
        rows: Sequence[Any],
        held_out: Sequence[Any] = (),
        tokenizer: bool = True,
        limit: int | None = 60,
    ) -> Audit:
        folder = tmp_path_factory.mktemp("audit")
        eval_data = {}
        if held_out:
            eval_data["test.jsonl"] = write_source(folder / "test.jsonl", held_out)
        request = AuditRequest(
            name="rows",
            data=DataSettings(datasets=(write_source(folder / "rows.jsonl", rows),)),
            labels=LabelSettings(max_length=limit),
            output=folder / "out",
            renderer=renderer if tokenizer else None,
            eval_data=eval_data,
            report=False,
            progress=False,
        )
        run_audit(request)
        audit: Audit = json.loads((folder / "out" / "audit.json").read_text(encoding="utf-8"))
        return audit

    return make


def write_source(path: Path, rows: Sequence[Any]) -> DatasetSource:
    """A JSON Lines file with these rows."""
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return DatasetSource(str(path))
