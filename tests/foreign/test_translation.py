"""A foreign config is accounted for key by key, and what comes of it is a recipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sft_recipes.errors import InputError
from sft_recipes.foreign.account import as_json, lines
from sft_recipes.foreign.reading import Group
from sft_recipes.foreign.recipe_file import write
from sft_recipes.foreign.tables import read_table
from sft_recipes.foreign.translation import tools, translate
from sft_recipes.recipe_keys import DATA_KEYS, OWN_KEYS, SOURCE_KEYS, load_recipe, trl_keys
from sft_recipes.yaml_reader import read_settings

FIXTURES = Path(__file__).parent / "fixtures"
CONFIGS = sorted(FIXTURES.glob("*/*.yaml"))
# A folder with one folder of configs a tool, named as the tool, to be checked as the fixtures are.
OTHERS = os.environ.get("SFT_RECIPES_FOREIGN_CONFIGS")


def other_configs() -> list[Path]:
    """The configs of the folder that the environment names."""
    if OTHERS is None:
        return []
    found = []
    for tool in tools():
        folder = Path(OTHERS) / tool
        found += [path for path in sorted(folder.rglob("*")) if path.suffix in (".yaml", ".yml")]
    return found


def check_config(path: Path, tool: str, folder: Path) -> None:
    """Every key is in exactly one group, with a line; a recipe is written if nothing is blocked, and loads."""
    reading = translate(path, tool)
    account = as_json(reading)
    placed = [entry["key"] for group in account["keys"].values() for entry in group]
    assert sorted(placed) == sorted(".".join(map(str, leaf.path)) for leaf in read_settings(path))
    assert account["keys"].keys() == {group.name.lower() for group in Group}
    for group in Group:
        for outcome in reading.outcomes.values():
            if outcome.group is group and group is not Group.SAME:
                assert outcome.say
    assert list(lines(reading))
    if not reading.blocked:
        files = write(reading, folder / path.stem, force=False)
        assert load_recipe(files[0]).values == reading.recipe


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_key_is_in_one_group_and_the_recipe_loads(path: Path, tmp_path: Path) -> None:
    """Nothing of a config is dropped without a word, and what is not blocked becomes a recipe that is accepted."""
    check_config(path, path.parent.name, tmp_path)


@pytest.mark.skipif(OTHERS is None, reason="SFT_RECIPES_FOREIGN_CONFIGS names no folder")
def test_the_same_holds_for_configs_from_elsewhere(tmp_path: Path) -> None:
    """As for the fixtures, over a folder of public configs."""
    for number, path in enumerate(other_configs()):
        tool = path.relative_to(str(OTHERS)).parts[0]
        try:
            check_config(path, tool, tmp_path / str(number))
        except InputError as error:
            assert (
                "most of its keys" in str(error)
                or "set twice" in str(error)
                or "YAML" in str(error)
            )


@pytest.mark.parametrize("name", tools())
def test_a_table_names_keys_that_exist(name: str) -> None:
    """What a rule sets is a key of a recipe, a key has one rule, and every value of a rule says one thing."""
    ours = {*DATA_KEYS, *OWN_KEYS, *SOURCE_KEYS, *trl_keys().model, *trl_keys().training}
    table = read_table(name)
    for key, rule in table.rules.items():
        if rule.kind == "exact":
            assert rule.content in ours, key
        elif rule.kind == "differs":
            assert rule.content["say"], key
            assert rule.content.get("to", "output_dir") in ours, key
        elif rule.kind == "values":
            for value, meaning in rule.content.items():
                assert meaning.keys() <= {"set", "to", "say", "harmless", "refused"}, (key, value)
                assert set(meaning.get("set", {})) <= ours, (key, value)
                assert meaning.get("to", "output_dir") in ours, (key, value)
        else:
            assert isinstance(rule.content, str), key
    assert not table.known & table.rules.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_tool_is_told_from_the_keys(path: Path) -> None:
    """Without a name, a config is read as one of the tool that wrote it."""
    assert translate(path).table is translate(path, path.parent.name).table


def test_a_file_of_no_tool_is_refused(tmp_path: Path) -> None:
    """A recipe of something else, and a name that no tool has, are errors with a fix."""
    path = tmp_path / "x.yaml"
    path.write_text("apples: 3\npears: 4\n")
    with pytest.raises(InputError, match=r"most of its keys belong to none of .*--tool NAME"):
        translate(path)
    with pytest.raises(InputError, match="did you mean 'axolotl'"):
        translate(path, "axolotel")
