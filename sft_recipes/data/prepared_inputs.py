"""What prepared ids depend on: the rows, the settings, the template, the tokenizer, the code; as hashes."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sft_recipes
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.loading import source_files
from sft_recipes.data.prepared import file_sha256
from sft_recipes.errors import InputError
from sft_recipes.recipe import DatasetSource, Recipe, as_dict
from sft_recipes.upstream import tokenizers

# Data settings that decide what the rows are. The mixture and the split are drawn when the rows are
# loaded: other weights need no new rows.
_READING_SETTINGS = ("test_split", "on_bad_rows", "max_rejected", "allow_empty_output", "seed")
_NO_READING_SETTINGS = frozenset({"path", "weight", "fraction"})


def fingerprint(recipe: Recipe, renderer: ChatRenderer) -> str:
    """SHA-256 of everything the prepared ids depend on."""
    return digest(prepared_inputs(recipe, renderer, []))


def changed_inputs(
    recipe: Recipe, renderer: ChatRenderer, manifest: Mapping[str, Any]
) -> list[str]:
    """What of the recipe's inputs is not as it was when the rows of this manifest were prepared."""
    before = manifest["inputs"]
    now = prepared_inputs(recipe, renderer, before["data"])
    return [name for name, value in now.items() if before.get(name) != value]


def prepared_inputs(
    recipe: Recipe, renderer: ChatRenderer, known: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """What the prepared ids depend on: hashes by name.

    `known` are those of the sources, for one that is not here.
    """
    tokenizer = renderer.tokenizer
    backend = tokenizer.backend_tokenizer.to_str().encode()
    return {
        "data": list(_sources(recipe, known)),
        "settings": digest(_settings(recipe)),
        "template": digest([renderer.template_text, renderer.chat_template_kwargs]),
        "tokenizer": digest([hashlib.sha256(backend).hexdigest(), tokenizer.special_tokens_map]),
        "code": digest([sft_recipes.__version__, *_code_hashes()]),
    }


def _settings(recipe: Recipe) -> list[Any]:
    """The settings of the recipe that decide what the rows and their ids are."""
    data = as_dict(recipe.data)
    reading: list[dict[str, Any]] = []
    for source in data["datasets"]:
        reading.append({key: source[key] for key in source.keys() - _NO_READING_SETTINGS})
    settings = [data[key] for key in _READING_SETTINGS]
    return [settings, reading, as_dict(recipe.labels), bool(recipe.data.eval_split)]


def _code_hashes() -> list[str]:
    """The hashes of the files of code that make the ids."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return [file_sha256(path) for path in [*files, Path(tokenizers.__file__)]]


def _sources(recipe: Recipe, known: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Each source's name and the hashes of its files.

    A Hub set has none, so a new version of it is not noticed.
    """
    for number, source in enumerate(recipe.data.datasets):
        name = Path(source.path).name
        before: Sequence[str] = ()
        if number < len(known):
            before = known[number]
        files = _files_of(source, recipe.data.test_split)
        if files:
            yield [name, *map(file_sha256, files)]
        elif len(before) > 1 and before[0] == name:
            what = f"{source.path} is not here: its prepared rows stand as they are"
            print(what, file=sys.stderr)
            yield list(before)
        else:
            yield [source.path]


def _files_of(source: DatasetSource, test_split: str | None) -> list[Path]:
    """The files of the splits that are read, as far as they are found."""
    files: list[Path] = []
    with contextlib.suppress(InputError):  # raised again where the rows are read
        files += source_files(source, source.split)
        if test_split:
            files += source_files(source, test_split)
    return files


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
