"""What must not leave this machine: secrets, and paths that tell of it, in all that is uploaded.

Rules for secrets are those of `response_patterns.yaml`, which the audit and the card's masks share.
Here the user's own secrets are added, which no pattern has to guess, and folders of this machine.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

from sft_recipes.errors import InputError, Problem
from sft_recipes.release.local_paths import LOCAL_PATH
from sft_recipes.response_patterns import private_spans, secret_kinds

# A vocabulary holds pieces of all that was ever written, paths and `password: a1` included.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)
_LOOSE_KINDS = ("assigned_secret", "address_with_password")
_WEIGHTS = ".safetensors"
_HEADER_BYTES = 100_000_000  # the most that the format allows
# Names of environment variables that hold secrets, and the least characters of one.
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_SECRET_CHARACTERS = 12


class Finding(NamedTuple):
    """Something private in a text: what it is, and where it begins, in characters."""

    kind: str
    start: int


@dataclass(frozen=True)
class Secrets:
    """What this user and this run are known by: texts that must not stand in any file."""

    tokens: Sequence[str]
    folders: Sequence[Path]

    @classmethod
    def of_this_machine(cls, run: Path) -> "Secrets":
        """Tokens of the Hub, secrets of the environment; the folders of the run and the user."""
        tokens = {get_token() or "", *get_stored_tokens().values()}
        for name, value in os.environ.items():
            if _SECRET_VARIABLE.search(name) and len(value) >= _SECRET_CHARACTERS:
                tokens.add(value)
        places = (run.resolve(), run.resolve().parent, Path.cwd(), Path.home())
        return cls(
            tokens=sorted(tokens - {""}),
            folders=[place for place in places if len(place.parts) > 1],  # not the root itself
        )

    def find(self, text: str) -> Iterator[Finding]:
        """Where one of them stands."""
        for token in self.tokens:
            for match in re.finditer(re.escape(token), text):
                yield Finding("token", match.start())
        for folder in self.folders:
            for match in re.finditer(rf"(?<![\w./]){re.escape(str(folder))}\b", text):
                yield Finding("path of this machine", match.start())


def require_public(staged: Path, folder: Path, secrets: Secrets) -> None:
    """Raise InputError with every private thing in the files that are `staged` from `folder`.

    File, line and field are named; a secret itself is never shown.
    """
    problems = []
    for path in sorted(staged.iterdir()):
        text = _text_of(path)
        findings: dict[int, Finding] = {}
        for finding in find_private(text, path.name, secrets):
            # Of one place the first is enough: a token in an address is both.
            findings.setdefault(finding.start, finding)
        for _, finding in sorted(findings.items()):
            problems.append(_problem(folder / path.name, text, finding))
    if problems:
        raise InputError(problems)


def find_private(text: str, name: str, secrets: Secrets) -> list[Finding]:
    """What of a file's text must not be published; `name` is that of the file."""
    findings = list(secrets.find(text))
    kinds = secret_kinds()
    is_vocabulary = name in _VOCABULARIES
    if is_vocabulary:
        kinds = [kind for kind in kinds if kind not in _LOOSE_KINDS]
    for span in private_spans(text, kinds):
        findings.append(Finding(span.kind.replace("_", " "), span.start))
    # A template may tell its model of places, as gpt-oss's does: only this run's are ours.
    if not is_vocabulary and not name.endswith(".jinja"):
        for match in LOCAL_PATH.finditer(text):
            findings.append(Finding("path of this machine", match.start()))
    return findings


def _text_of(path: Path) -> str:
    """The text of a file; of weights, their metadata."""
    if path.name.endswith(_WEIGHTS):
        return _weights_metadata(path)
    # JSON may write `/` as `\/`.
    return path.read_bytes().decode("utf-8", errors="replace").replace("\\/", "/")


def _weights_metadata(path: Path) -> str:
    """What a safetensors file says beside its tensors: a length, then so much JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _HEADER_BYTES))
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        fix = "export the run again"
        what = "this is no whole safetensors file"
        raise InputError(Problem(str(path.resolve()), "", what, fix)) from error
    return json.dumps(metadata, indent=2, ensure_ascii=False)


def _problem(path: Path, text: str, finding: Finding) -> Problem:
    """A finding with its line and, where the line looks like `field: value`, its field."""
    line = text.count("\n", 0, finding.start) + 1
    begin = text.rfind("\n", 0, finding.start) + 1
    field = re.match(r'[\s"-]*([\w-]*)"?:', text[begin : finding.start + 1])
    return Problem(
        where=f"{path}:{line}",
        field=field[1] if field else "",
        what=f"holds a {finding.kind}",
        fix="take it out (and revoke a token that was written down)",
    )
