"""The rows of a data set for an audit: those that can be read, and those that cannot, by place."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_recipes.audit.finding import AuditRow, FlaggedRow, audit_rows, excerpt
from sft_recipes.data.loading import RejectLog, iter_examples, source_files
from sft_recipes.data.reading.json_reader import display_path
from sft_recipes.messages import Example
from sft_recipes.recipe import DatasetSource, DataSettings


@dataclass(frozen=True, slots=True)
class AuditData:
    """Rows of all sources, numbered over the whole input, the malformed ones among them.

    `files`: of each its path, SHA-256, number of rows and format.
    """

    rows: list[AuditRow] = field(default_factory=list)
    malformed: list[FlaggedRow] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows_in(self) -> int:
        """All rows of the input."""
        return len(self.rows) + len(self.malformed)


def read_rows(settings: DataSettings) -> AuditData:
    """Read all sources. Raises InputError for a source of which no row can be read."""
    settings = dataclasses.replace(settings, on_bad_rows="skip", max_rejected=1.0)
    data = AuditData()
    for source in settings.datasets:
        rejects = RejectLog(settings)
        examples = list(iter_examples(source, settings, rejects=rejects))
        first_of_file = _add_files(data, source, examples, rejects)
        for example in examples:
            index = first_of_file[example.source] + example.row
            data.rows.extend(audit_rows([example], index))
        for reject in rejects.rows:
            row = FlaggedRow(
                index=first_of_file[reject.file] + reject.row,
                where=reject.where,
                detail=excerpt(reject.reason),
            )
            data.malformed.append(row)
    return data


def _add_files(
    data: AuditData, source: DatasetSource, examples: Sequence[Example], rejects: RejectLog
) -> dict[str, int]:
    """Add the files of a source, or the Hub set; returns the index of the first row of each."""
    count = Counter(example.source for example in examples)
    count.update(reject.file for reject in rejects.rows)
    digests: dict[str, str | None] = {}
    for path in source_files(source):
        digests[display_path(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digests:
        digests[source.path] = None
    index = data.rows_in
    first_of_file = {}
    for name, digest in digests.items():
        first_of_file[name] = index
        file = {
            "path": name,
            "sha256": digest,
            "rows": count[name],
            "format": rejects.formats[source.path],
        }
        data.files.append(file)
        index += count[name]
    return first_of_file
