"""YAML that a user gives, read strictly and within bounds: recipes, gates, launch configs, overrides.

Strictly: a key stands once and is text, `2e-5` is a number, only true and false are truth values.
Within bounds: a file of a few lines whose aliases stand for billions of values, a list nested
thousands deep and a number of thousands of digits are errors with a line. No torch here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from sft_recipes.errors import InputError, Problem

# The largest shipped recipe has 2.3 kB. Half a megabyte of text is read in 0.4 s, and as many values
# as are taken in 0.7 s (measured).
MOST_BYTES = 500_000
# Values of a document, each counted as often as aliases repeat it.
MOST_VALUES = 20_000
DEEPEST = 40
# Where a value comes from that stands in no file.
COMMAND_LINE = "command line"
# 64 bits are 20 digits; `0o` and `_` included none is longer than this.
LONGEST_NUMBER = 60

# YAML 1.1 reads `no` as False, `2e-5` as text, `010` as 8 and `1:30` as 90; such words have ruined
# runs elsewhere, so the rules of YAML 1.2 hold here. Dates stay text.
_REPLACED_TAGS = (":bool", ":float", ":int", ":timestamp")
_BOOL = re.compile("^(?:true|True|TRUE|false|False|FALSE)$")
_DIGITS = r"\d[\d_]*"
_POWER = r"[eE][-+]?\d+"
_FLOAT = re.compile(
    rf"^[-+]?(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:{_POWER})?"
    rf"|{_DIGITS}{_POWER}|\.(?:inf|Inf|nan))$"
)
_INT = re.compile(rf"^(?:[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+)$")
_BASES = {"0o": 8, "0x": 16}
# What plain words and brackets may be; a tag of another kind (`!!set`, `!!python/...`) is refused.
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class YamlDocument(NamedTuple):
    """What a text holds, and the 1-based line of each top-level key where it is a mapping."""

    value: Any
    lines: dict[str, int]


class YamlSetting(NamedTuple):
    """One value of a document that stands inside no other, with its 1-based line.

    `path`: the keys that lead to it, numbers for the entries of lists. A list or mapping without
    entries is such a value, too.
    """

    path: tuple[str | int, ...]
    value: Any
    line: int


class _NotTaken(yaml.MarkedYAMLError):
    """What YAML allows and this reader does not."""

    def __init__(self, problem: str, node_or_event: Any) -> None:
        super().__init__(problem=problem, problem_mark=node_or_event.start_mark)


class _StrictLoader(yaml.SafeLoader):
    """Composes and constructs one document under the rules of the module."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self._depth = 0
        self._values = 0
        # By the node's identity: the values in it; a node under construction has no entry yet.
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose one node, counting what aliases repeat as often as they repeat it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            alias = super().compose_node(parent, index)
            if id(alias) not in self._sizes:
                raise _NotTaken(f"alias {event.anchor!r} stands inside itself", event)
            self._add(self._sizes[id(alias)], event)
            return alias
        values_before = self._values
        self._add(1, event)
        self._depth += 1
        if self._depth > DEEPEST:
            raise _NotTaken(f"nested more than {DEEPEST} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._values - values_before
        return node

    def _add(self, values: int, event: Any) -> None:
        self._values += values
        if self._values > MOST_VALUES:
            raise _NotTaken(f"more than {MOST_VALUES:,} values, aliases written out", event)

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """One value; a word under a tag that it does not fit (`!!int x`) is an error with a line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _NotTaken(
                f"{node.value!r:.80} is no {node.tag.rpartition(':')[2]}", node
            ) from error

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are texts, each written once."""
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            key = _key_of(key_node)
            if key in lines:
                what = f"set twice (first in line {lines[key]})"
                raise InputError(Problem(f"{self.name}:{line}", key, what, "keep one"))
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_int(self, node: ScalarNode) -> int:
        """A whole number; underscores between its digits are left out."""
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > LONGEST_NUMBER:
            raise _NotTaken(f"a number of {len(text):,} digits", node)
        base = _BASES.get(text[:2], 10)
        return int(text, base)


def _key_of(node: Node) -> str:
    """A key, which is text."""
    is_text = isinstance(node, ScalarNode) and node.tag == "tag:yaml.org,2002:str"
    if is_text:
        return str(node.value)
    if node.tag.endswith(":merge"):
        raise _NotTaken("`<<` is not taken: write the keys out", node)
    raise _NotTaken("a key that is not text: put it in quotes", node)


def _use_yaml_1_2_rules() -> None:
    """Give the loader its own rules for what a plain word is, and no constructor but for those."""
    rules = {}
    for first_letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        rules[first_letter] = [rule for rule in resolvers if not rule[0].endswith(_REPLACED_TAGS)]
    _StrictLoader.yaml_implicit_resolvers = rules
    patterns = {"bool": (_BOOL, "tTfF"), "int": (_INT, "-+0123456789")}
    patterns["float"] = (_FLOAT, "-+.0123456789")
    for name, (pattern, first_letters) in patterns.items():
        _StrictLoader.add_implicit_resolver(
            f"tag:yaml.org,2002:{name}", pattern, list(first_letters)
        )
    constructors = {}
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items():
        if tag is None or tag.rpartition(":")[2] in _TAGS:
            constructors[tag] = constructor
    constructors["tag:yaml.org,2002:int"] = _StrictLoader.construct_int
    _StrictLoader.yaml_constructors = constructors


_use_yaml_1_2_rules()


def parse_yaml(text: str, where: str) -> YamlDocument:
    """Read one document. Raises InputError, `where` and the line in front, for what is no YAML."""
    node, value = _read(text, where)
    lines = {}
    if isinstance(node, MappingNode):
        lines = {str(key.value): key.start_mark.line + 1 for key, _ in node.value}
    return YamlDocument(value, lines)


def _read(text: str, where: str) -> tuple[Node | None, Any]:
    """The document as nodes, which know their lines, and as plain values."""
    try:
        # Its first look at the text is made here: a character that YAML forbids is an error, too.
        loader = _StrictLoader(text, where)
        node = loader.get_single_node()
        if node is None:
            return None, None
        return node, loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _as_input_error(error, text, where) from error


def parse_word(text: str) -> Any:
    """Read one value of a command line: `2e-5` is a number, and what is no YAML is text.

    Raises InputError for what is YAML out of bounds.
    """
    try:
        return parse_yaml(text, COMMAND_LINE).value
    except InputError as error:
        is_no_yaml = isinstance(error.__cause__, yaml.YAMLError)
        if is_no_yaml and not isinstance(error.__cause__, _NotTaken):
            return text
        raise


def _as_input_error(error: yaml.YAMLError, text: str, where: str) -> InputError:
    line = 0
    what = "not plain YAML"
    fix = "use plain keys and values"
    if isinstance(error, yaml.MarkedYAMLError):
        if error.problem_mark is not None:
            line = error.problem_mark.line + 1
        what = f"not plain YAML: {error.problem or error.context}"
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        what = f"not plain YAML: the character {error.character!r} is not allowed"
        fix = "remove it"
    place = where
    if line and where != COMMAND_LINE:
        place = f"{where}:{line}"
    return InputError(Problem(place, "", what, fix))


def read_yaml_file(path: Path) -> YamlDocument:
    """Read a file. Raises InputError for one that cannot be read, is no UTF-8, or is no YAML."""
    return parse_yaml(_text_of(path), str(path))


def read_settings(path: Path) -> list[YamlSetting]:
    """Every value of a file whose top is a mapping, in its order. Raises InputError as above."""
    node, value = _read(_text_of(path), str(path))
    if not isinstance(value, dict):
        what = "not a mapping of keys to values"
        raise InputError(Problem(str(path), "", what, "name a file of `key: value` lines"))
    assert node is not None
    return list(_settings(node, value, ()))


def _settings(node: Node, value: Any, path: tuple[str | int, ...]) -> Iterator[YamlSetting]:
    if isinstance(node, MappingNode) and value:
        for key_node, value_node in node.value:
            key = key_node.value
            if isinstance(value[key], dict | list) and value[key]:
                yield from _settings(value_node, value[key], (*path, key))
            else:
                yield YamlSetting((*path, key), value[key], key_node.start_mark.line + 1)
    else:
        for number, entry_node in enumerate(node.value):
            entry = value[number]
            if isinstance(entry, dict | list) and entry:
                yield from _settings(entry_node, entry, (*path, number))
            else:
                yield YamlSetting((*path, number), entry, entry_node.start_mark.line + 1)


def _text_of(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            what = f"{size:,} bytes are more than {MOST_BYTES:,}"
            raise InputError(Problem(str(path), "", what, "name a recipe, not a data file"))
        content = path.read_bytes()
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise InputError(Problem(str(path), "", what, "check the path and its rights")) from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 (byte {content[error.start]:#04x})"
        raise InputError(Problem(f"{path}:{line}", "", what, "save it as UTF-8")) from error
