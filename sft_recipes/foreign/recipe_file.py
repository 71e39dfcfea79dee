"""The recipe that came of a foreign config, as a file whose comments say where each key comes from."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from sft_recipes.errors import InputError, Problem
from sft_recipes.foreign.reading import Group, Reading
from sft_recipes.recipe_keys import DATA_KEYS, OWN_KEYS, trl_keys

_WIDTH = 116
# Keys of this project that are no keys of data.
_TRAINING = {"global_batch_size", "push_to_hub", "hub_model_id", "gate"}


def write(reading: Reading, folder: Path, force: bool) -> list[Path]:
    """Write the recipe and what belongs to it into a folder; the recipe comes first.

    Raises InputError, with nothing written, for a file that exists and may not be replaced.
    """
    texts = {"recipe.yaml": "\n".join(_lines(reading)) + "\n", **reading.files}
    files = [folder / name for name in texts]
    for file in files:
        if file.is_symlink() or (file.exists() and not force):
            fix = "choose another --output, or add --force"
            raise InputError(Problem(str(file), "", "exists already", fix))
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in zip(files, texts.values(), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def _lines(reading: Reading) -> Iterator[str]:
    said: set[str] = set()
    yield f"# From {reading.path.name}, a config of {reading.table.label}. Written by `sft-recipes init --from`."
    for title, keys in _sections(reading).items():
        if keys:
            yield ""
            yield f"### {title}"
            for key in keys:
                yield from _key_lines(reading, key, said)


def _sections(reading: Reading) -> dict[str, Sequence[str]]:
    sections: dict[str, list[str]] = {"model": [], "data": [], "training": [], "evaluation": []}
    for key in reading.recipe:
        if key in trl_keys().model or key == "chat_template":
            sections["model"].append(key)
        elif "eval" in key and key != "eval_split":
            sections["evaluation"].append(key)
        elif key in DATA_KEYS or key in OWN_KEYS.keys() - _TRAINING:
            sections["data"].append(key)
        else:
            sections["training"].append(key)
    return dict(sections)


def _key_lines(reading: Reading, key: str, said: set[str]) -> Iterator[str]:
    """A key with its origin behind it, and above it what is different, once for all keys that it is said of."""
    origin = reading.origins[key]
    say = ""
    for outcome in (*reading.decided, *reading.defaults):
        if outcome.rule_key == origin.key and outcome.group is Group.DIFFERENT:
            say = outcome.say
    if say and say not in said:
        said.add(say)
        yield from _comment(say)
    text = yaml.safe_dump(
        {key: reading.recipe[key]}, sort_keys=False, allow_unicode=True, width=_WIDTH
    )
    first, *rest = text.rstrip("\n").split("\n")
    note = f"line {origin.line}, {origin.key}"
    if origin.key == "command line":
        note = "command line"
    elif origin.is_default:
        note = "not set there"
    yield f"{first}  # {note}"
    yield from rest


def _comment(text: str) -> Iterator[str]:
    line = "#"
    for word in text.split():
        if len(line) + len(word) > _WIDTH:
            yield line
            line = "#"
        line += f" {word}"
    yield line
