"""From another tool's config to a recipe: every key accounted for, every difference said, nothing guessed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.foreign import axolotl, axolotl_whole, findings, llamafactory, torchtune, trl
from sft_recipes.foreign.interpolation import Interpolation
from sft_recipes.foreign.reading import Group, Reading, Setting
from sft_recipes.foreign.tables import KeyRule, Table, is_off, read_table, value_text
from sft_recipes.recipe_checks import states_of, switches_off
from sft_recipes.recipe_keys import make_recipe
from sft_recipes.text_files import interpreting
from sft_recipes.yaml_reader import parse_word, read_settings, read_yaml_file

Rule = Callable[[Reading, Setting], None]
# A config whose keys are mostly those of a tool is one of it.
_FEWEST_KNOWN = 0.5
# How alike (difflib) a key has to be to a known one: sequence_lenght is, gptq_groupsize is no lr_groups.
_ALIKE = 0.8


@dataclass(frozen=True)
class Tool:
    """A tool whose configs are read. `rules` are those in code, by key; `finish` looks at the whole."""

    table: Table
    rules: Mapping[str, Rule]
    finish: Callable[[Reading], None]

    @property
    def names(self) -> set[str]:
        """Every key at the top of a config that the tool knows."""
        return {
            key.partition(".")[0] for key in (*self.table.rules, *self.table.known, *self.rules)
        }


def tools() -> Mapping[str, Tool]:
    """The tools whose configs are read, by name."""
    return {
        "axolotl": Tool(read_table("axolotl"), axolotl.RULES, axolotl_whole.finish),
        "llamafactory": Tool(read_table("llamafactory"), llamafactory.RULES, llamafactory.finish),
        "torchtune": Tool(read_table("torchtune"), torchtune.RULES, torchtune.finish),
        "trl": Tool(read_table("trl"), trl.rules(), trl.finish),
    }


def translate(
    path: Path,
    tool: str | None = None,
    remote_code_is_not_needed: bool = False,
    instead: Mapping[str, str] | None = None,
    data: str | None = None,
) -> Reading:
    """Read a foreign config; `instead` holds keys of ours that stand in the place of its own, `data`
    rows that stand in for data sets that are not at hand.

    Raises InputError for a file that is no YAML mapping, is of no known tool, or names no model or no data.
    """
    document = read_yaml_file(path)
    leaves = [
        Setting(".".join(map(str, leaf.path)), leaf.value, leaf.line)
        for leaf in read_settings(path)
    ]
    chosen = _tool_of(path, document.value, tool)
    interpolation = Interpolation(document.value if chosen.table.is_interpolated else {})
    tree = interpolation.tree or document.value
    reading = Reading(chosen.table, path, tree, leaves)
    reading.remote_code_is_not_needed = remote_code_is_not_needed
    reading.data = data
    walk = _Walk(reading, chosen, interpolation)
    for key, value in tree.items():
        walk.visit(key, key, value, None)
    walk.take_defaults()
    chosen.finish(reading)
    for key, value in (instead or {}).items():
        reading.replace(key, reading.local_path(value))
    _settle(reading)
    findings.look(reading)
    return reading


def _tool_of(path: Path, tree: Mapping[str, Any], name: str | None) -> Tool:
    known = tools()
    if name is not None:
        if name not in known:
            raise InputError(
                Problem("command line", "--tool", f"{name!r} is not known", suggest(name, known))
            )
        return known[name]
    shares = {}
    for candidate, tool in known.items():
        shares[candidate] = sum(key in tool.names for key in tree) / len(tree)
    best = max(shares, key=lambda candidate: shares[candidate])
    if shares[best] < _FEWEST_KNOWN:
        what = f"most of its keys belong to none of {', '.join(known)}"
        raise InputError(Problem(str(path), "", what, "say whose config it is: --tool NAME"))
    return known[best]


class _Walk:
    """Applies the rules of a tool to every key."""

    def __init__(self, reading: Reading, tool: Tool, interpolation: Interpolation) -> None:
        self._reading = reading
        self._tool = tool
        self._interpolation = interpolation
        self._patterns = (*tool.table.rules, *tool.rules)

    def visit(self, key: str, pattern: str, value: Any, inherited: KeyRule | Rule | None) -> None:
        """Decide on one key; of those below it one by one where rules are for them."""
        rule = self._tool.rules.get(pattern) or self._tool.table.rules.get(pattern) or inherited
        has_longer = any(other.startswith(f"{pattern}.") for other in self._patterns)
        if has_longer and isinstance(value, Mapping) and value:
            for name, inner in value.items():
                self.visit(f"{key}.{name}", f"{pattern}.{name}", inner, rule)
        elif has_longer and isinstance(value, list) and value:
            for number, inner in enumerate(value):
                self.visit(f"{key}.{number}", f"{pattern}.*", inner, rule)
        else:
            line = next(self._reading.below(key)).line
            self._apply(rule, pattern, Setting(key, value, line))
            self._rest(key)

    def _rest(self, key: str) -> None:
        """Keys below one whose rule passed over them."""
        reading = self._reading
        is_blocked = False
        for leaf in reading.below(key):
            outcome = reading.outcomes.get(leaf.key)
            is_blocked = is_blocked or (outcome is not None and outcome.group is Group.BLOCKED)
        for leaf in reading.below(key):
            if leaf.key in reading.outcomes:
                continue
            if leaf.value is None:
                reading.no_effect(leaf, "null: not set")
            elif is_blocked:
                reading.no_effect(leaf, "what it belongs to is blocked")
            else:
                self._unknown(_pattern(leaf.key), leaf)

    def take_defaults(self) -> None:
        """What the tool does where a key is not set, as if it were written."""
        for key, value in self._tool.table.defaults.items():
            setting = self._reading.setting(key)
            if setting is None or (setting.value == value and _is_null(self._reading, key)):
                rule = self._tool.rules.get(key) or self._tool.table.rules.get(key)
                self._apply(rule, key, Setting(key, value, 0))

    def _apply(self, rule: KeyRule | Rule | None, pattern: str, setting: Setting) -> None:
        reading = self._reading
        decides_on_null = (
            isinstance(rule, KeyRule) and rule.kind == "values" and "null" in rule.content
        )
        if setting.key in self._interpolation.unknown:
            reading.block(setting, "it names what is no key of this file: write the value out")
        elif rule is None:
            self._unknown(pattern, setting)
        elif setting.value is None and not decides_on_null:
            reading.no_effect(setting, "null: not set")
        elif isinstance(rule, KeyRule):
            apply_rule(reading, setting, rule)
        else:
            with interpreting(f"{reading.place(setting)}: {setting.key}", "correct its value"):
                rule(reading, setting)

    def _unknown(self, pattern: str, setting: Setting) -> None:
        table = self._tool.table
        reading = self._reading
        if setting.key in self._interpolation.used:
            reading.no_effect(setting, "its value stands in other keys")
            return
        if pattern in table.known or pattern.partition(".")[0] in table.known:
            if is_off(setting.value):
                reading.no_effect(setting, "switched off")
            else:
                reading.block(setting, "this project has nothing like it")
            return
        what = f"{table.tool} has no such key"
        meant = get_close_matches(pattern, [*self._patterns, *table.known], 1, _ALIKE)
        hint = f"did you mean {meant[0]!r}?" if meant else "remove it"
        if not table.ignores_unknown_keys:
            reading.block(setting, f"{what} and refuses it; {hint}")
            return
        reading.no_effect(setting, f"{table.tool} never reads it")
        reading.find(setting, f"{what} and never reads it; {hint}")


def _pattern(key: str) -> str:
    """A dotted key with `*` for the entries of lists."""
    parts = ["*" if part.isdigit() else part for part in key.split(".")]
    return ".".join(parts)


def _is_null(reading: Reading, key: str) -> bool:
    """Whether a key is written, as null."""
    leaf = reading.settings.get(key)
    return leaf is not None and leaf.value is None


def apply_rule(reading: Reading, setting: Setting, rule: KeyRule) -> None:
    """What the table says of a key."""
    content = rule.content
    if rule.kind == "exact":
        reading.same(setting, {content: _number(setting.value)})
    elif rule.kind == "harmless":
        reading.no_effect(setting, content)
    elif rule.kind == "differs":
        reading.differs(setting, content["say"], _carried(content, setting))
    elif rule.kind == "values":
        _apply_value(reading, setting, content)
    elif is_off(setting.value):
        reading.no_effect(setting, "switched off")
    elif rule.kind == "refused":
        reading.block(setting, content)
    else:
        reading.no_effect(setting, f"{reading.table.tool} does not use it")
        reading.find(setting, content)


def _number(value: Any) -> Any:
    """A number in quotes as a number, which is what every tool makes of it."""
    if not isinstance(value, str):
        return value
    number = parse_word(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        return number
    return value


def _carried(content: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """What a rule sets: the value under our key, if it has one."""
    if "to" in content:
        return {content["to"]: setting.value}
    return dict(content.get("set", {}))


def _apply_value(reading: Reading, setting: Setting, meanings: Mapping[str, Any]) -> None:
    meaning = meanings.get(value_text(setting.value), meanings.get("*"))
    if meaning is None:
        if is_off(setting.value):
            reading.no_effect(setting, "switched off")
            return
        known = ", ".join(name for name in meanings)
        reading.block(setting, f"{setting.value!r} is not known here; {known} are")
    elif "refused" in meaning:
        reading.block(setting, meaning["refused"])
    elif "harmless" in meaning:
        reading.no_effect(setting, meaning["harmless"])
    elif "say" in meaning:
        reading.differs(setting, meaning["say"], _carried(meaning, setting))
    else:
        reading.same(setting, _carried(meaning, setting))


# -- the whole ---------------------------------------------------------------------------------------


def _settle(reading: Reading) -> None:
    """Take out what other keys switch off, and let the recipe reader look at the rest."""
    if "output_dir" not in reading.recipe:
        reading.put_default("output_dir", "./run", "beside the recipe")
    for key in list(reading.recipe):
        switches = switches_off(key, reading.recipe)
        if switches:
            reading.withdraw(key, f"does nothing ({states_of(switches, reading.recipe)})")
    try:
        make_recipe(reading.recipe)
    except InputError as error:
        missing = []
        for problem in error.problems:
            key = problem.field.partition(".")[0]
            if key in reading.origins:
                reading.withdraw(key, f"{problem.what}. {problem.fix}", Group.BLOCKED)
            else:
                missing.append(Problem(str(reading.path), key, problem.what, problem.fix))
        # What a blocked key would have set is missing for that reason.
        if missing and not reading.blocked:
            raise InputError(missing) from error
