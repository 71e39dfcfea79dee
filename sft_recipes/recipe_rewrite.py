"""`check --fix`: a recipe file of older or other versions of TRL, in the keys of today.

Old names get their current ones, mixtures become `datasets`, a template's text moves into a file of its own, and what
has no effect here is taken out. Comments, order and quotes of everything else stay.
"""

import io
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sft_recipes.errors import InputError, Problem
from sft_recipes.recipe import parse_value, read_yaml
from sft_recipes.recipe_checks import (
    NOTES,
    REFUSED,
    REMOVE,
    SWITCHED_OFF,
    TABLES,
    current,
    states_of,
    switches_off,
)
from sft_recipes.recipe_mixtures import MIXER_KEYS, from_mixer, from_mixture

# Refused keys that one person has to decide on, unless they are switched off.
_BY_HAND: Sequence[str] = TABLES["by_hand"]
# Keys of a mixture, and what is said of it.
_MIXTURE = "their weight is ours: the share of a set's rows that is used"
# Everything in front of the first key up to a line `---`, which ruamel.yaml would lose.
_HEAD = re.compile(r"\A\ufeff?(?:(?:[ \t]*(?:#[^\n]*)?\n)*---[^\n]*\n)?")


@dataclass(frozen=True, slots=True)
class Change:
    """What one key of a file becomes: the keys of ours that say the same, none where it is taken out.

    `files` are written beside the recipe, `note` says what differs or why.
    """

    key: str
    value: Any
    ours: Mapping[str, Any]
    note: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_in_place(self) -> bool:
        """Whether only a name, or a word behind it, changes: the lines of the key stay."""
        if len(self.ours) != 1:
            return False
        (value,) = self.ours.values()
        return value == self.value or not isinstance(value, (list, dict))

    def __str__(self) -> str:
        text = f"{self.key} -> {', '.join(self.ours)}"
        if not self.ours:
            text = f"{self.key}: removed"
        elif self.is_in_place:
            ((key, value),) = self.ours.items()
            if value != self.value:
                text = f"{self.key}: {_written(self.value)} -> {key}: {_written(value)}"
        if self.note:
            text += f" ({self.note})"
        return text


def _written(value: Any) -> str:
    """A plain value as YAML writes it, or the beginning of a long one."""
    text = yaml.safe_dump(value, width=sys.maxsize).partition("\n")[0]
    if len(text) > 60:
        return text[:60] + "..."
    return text


def rewrite(path: Path) -> list[str]:
    """Bring a recipe file up to date; returns one line per change, `FILE:LINE: old -> new (note)`.

    A key whose current name is set as well is left alone: reading the recipe reports it. Raises
    InputError, with the file as it was, if it is no recipe or would not load to the same values
    under the new names.
    """
    values, lines = read_yaml(path)
    changes = planned_changes(values, path.stem)
    if changes:
        _replace(path.resolve(), changes, _expected(values, changes))
    return [f"{path}:{lines[change.key]}: {change}" for change in changes]


# -- what becomes of each key ------------------------------------------------------------------------


def planned_changes(values: Mapping[str, Any], name: str) -> list[Change]:
    """What has to change in a recipe called `name`, in the order of its keys."""
    changes: dict[str, Change] = {}
    taken: set[str] = set()
    for key in values:
        change = _change(key, values, name)
        if change is None:
            continue
        others = change.ours.keys() - {key}
        # What is set under its current name already is for a person to decide.
        if others.isdisjoint(values) and others.isdisjoint(taken):
            changes[key] = change
            taken |= others
    now = _expected(values, changes.values())
    for key in values:
        change = changes.get(key) or Change(key, values[key], {key: values[key]})
        without_effect = _without_effect(change, now)
        if without_effect:
            changes[key] = without_effect
    return [changes[key] for key in values if key in changes]


def _change(key: str, values: Mapping[str, Any], name: str) -> Change | None:
    """What becomes of one key, by itself; None where it stays, or a person has to decide."""
    value = values[key]
    if key == "chat_template" and _is_template_text(value):
        file = f"{name}.jinja"
        note = "the text of the template is in that file"
        return Change(key, value, {key: f"./{file}"}, note, {file: value})
    if key == "dataset_mixture":
        return _conversion(key, values, from_mixture(value))
    if key in MIXER_KEYS:
        first = next(mixer for mixer in MIXER_KEYS if mixer in values)
        ours = from_mixer(values)
        if key != first and ours is not None:
            return Change(key, value, {}, f"as {first}")
        return _conversion(key, values, ours)
    if key in REFUSED:
        return _removal(key, values)
    new = current(key, value)
    if new is None or (new.key == key and new.value == value):
        return None
    return Change(key, value, {new.key: new.value}, NOTES.get(key, ""))


def _is_template_text(value: Any) -> bool:
    """Whether a template stands in the recipe itself."""
    return isinstance(value, str) and ("{%" in value or "{{" in value)


def _conversion(
    key: str, values: Mapping[str, Any], ours: Mapping[str, Any] | None
) -> Change | None:
    """A mixture in our keys, unless another data set is named beside it."""
    if ours is None:
        return None
    note = ""
    if "datasets" in ours:
        note = _MIXTURE
        if values.get("dataset_name") is not None:
            return None
    return Change(key, values[key], ours, note)


def _removal(key: str, values: Mapping[str, Any]) -> Change | None:
    """Taking out a key that is not taken here, where nothing is lost by it that was asked for."""
    value = values[key]
    advice = REFUSED[key]
    if key in ("assistant_only_loss", "completion_only_loss"):
        return _loss_of(key, value)
    if key == "do_eval" and (values.get("eval_strategy") or values.get("evaluation_strategy")):
        return Change(key, value, {}, "eval_strategy says it")
    if value in SWITCHED_OFF or value in (None, "", [], {}):
        return Change(key, value, {}, "switched off")
    if not advice.startswith(REMOVE) or key in _BY_HAND:
        return None
    return Change(key, value, {}, advice.removeprefix(REMOVE))


def _loss_of(key: str, value: Any) -> Change:
    """TRL's two keys of what is trained. False is TRL's default of the one, and a wish of the other."""
    if value is False and key == "completion_only_loss":
        return Change(key, value, {"train_on": "all"})
    note = "train_on: assistant is the default"
    if not value:
        note += "; train_on: all trains the prompt, as TRL does"
    return Change(key, value, {}, note)


def _without_effect(change: Change, now: Mapping[str, Any]) -> Change | None:
    """The change that takes a key out which does nothing beside others that are set so. Where the other key is not set
    at all, it may be what was forgotten.
    """
    if len(change.ours) != 1:
        return None
    ((key, value),) = change.ours.items()
    if value is None or value in SWITCHED_OFF:
        return None
    stated = {name: value for name, value in now.items() if value is not None}
    switches = switches_off(key, stated)
    if not switches or not stated.keys() >= set(switches):
        return None
    note = f"no effect with {states_of(switches, stated)}"
    return replace(change, ours={}, note=note, files={})


def _expected(values: Mapping[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    """What the file has to hold after the changes, in this order."""
    by_key = {change.key: change.ours for change in changes}
    expected: dict[str, Any] = {}
    for key, value in values.items():
        expected.update(by_key.get(key, {key: value}))
    return expected


# -- the file ----------------------------------------------------------------------------------------


def _replace(path: Path, changes: Sequence[Change], expected: Mapping[str, Any]) -> None:
    """Write the changed file over the old one, whole or not at all."""
    text = path.read_bytes().decode("utf-8")
    line_end = "\r\n" if "\r\n" in text else "\n"
    text = _changed(text.replace("\r\n", "\n"), changes)
    values = parse_value(text)
    if values != expected or list(values) != list(expected):
        what = "old keys could not be renamed without changing other values"
        fix = "rename them by hand; check without --fix lists them"
        raise InputError(Problem(str(path), "", what, fix))
    for change in changes:
        for name, content in change.files.items():
            _write_beside(path, name, content)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text.replace("\n", line_end).encode("utf-8"))
    shutil.copymode(path, temporary)
    temporary.replace(path)


def _write_beside(path: Path, name: str, content: str) -> None:
    """Write a file beside the recipe. Raises InputError where another one has its name."""
    file = path.with_name(name)
    if file.exists() and file.read_bytes() != content.encode("utf-8"):
        what = f"its text would go to {name}, which holds something else"
        raise InputError(Problem(str(path), "chat_template", what, f"move {name} away"))
    file.write_bytes(content.encode("utf-8"))


def _changed(text: str, changes: Sequence[Change]) -> str:
    """The text of a recipe file with the changes made."""
    body = _HEAD.sub("", text, count=1)
    head = text.removesuffix(body)
    renames = [change for change in changes if change.is_in_place]
    others = [change for change in changes if not change.is_in_place]
    if others:
        body = _with_other_lines(body, others)
    if renames:
        body = _renamed(body, renames)
    return head + body


def _with_other_lines(text: str, changes: Iterable[Change]) -> str:
    """The text with other lines, or none, in the place of those of some keys; JSON's style has no lines, and stays."""
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(document, yaml.MappingNode) or document.flow_style:
        return text
    lines = text.split("\n")
    by_key = {change.key: change for change in changes}
    for key_node, value_node in reversed(document.value):
        change = by_key.get(key_node.value)
        if change is not None:
            last = _last_line(value_node)
            lines[key_node.start_mark.line : last + 1] = _lines_of(change.ours)
    return "\n".join(lines)


def _lines_of(keys: Mapping[str, Any]) -> list[str]:
    """Keys as the lines of a recipe."""
    if not keys:
        return []
    text = yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True, width=sys.maxsize)
    return text.rstrip("\n").split("\n")


def _last_line(node: yaml.Node) -> int:
    """The last line of a value, without the comments and empty lines behind it."""
    is_block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    if not is_block or not node.value:
        # Block text ends where the next line begins.
        ends_before = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
        return int(node.end_mark.line) - ends_before
    last = node.value[-1]
    if isinstance(node, yaml.MappingNode):
        last = last[1]
    return _last_line(last)


def _renamed(text: str, changes: Iterable[Change]) -> str:
    """The text with other keys, or values, in the place of some."""
    from ruamel.yaml import YAML
    from ruamel.yaml.util import load_yaml_guess_indent

    writer = YAML()
    writer.preserve_quotes = True
    writer.width = sys.maxsize  # no line is broken
    writer.representer.add_representer(type(None), _represent_null)
    document, sequence, offset = load_yaml_guess_indent(text, yaml=writer)
    writer.indent(mapping=2, sequence=sequence, offset=offset)
    for change in changes:
        ((new_key, new_value),) = change.ours.items()
        position = list(document).index(change.key)
        comment = document.ca.items.pop(change.key, None)
        value = document.pop(change.key)  # as it is written, `2e-5` or in quotes
        if new_value != change.value:
            value = new_value
        document.insert(position, new_key, value)
        if comment is not None:
            document.ca.items[new_key] = comment
    written = io.StringIO()
    writer.dump(document, written)
    return written.getvalue()


def _represent_null(representer: Any, _: None) -> Any:
    """null by its name; ruamel.yaml would leave the place behind the colon empty."""
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")
