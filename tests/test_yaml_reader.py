"""YAML as users write it: read strictly, within bounds, and with a line for whatever is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft_recipes.errors import InputError
from sft_recipes.recipe import shipped_recipes
from sft_recipes.yaml_reader import MOST_BYTES, parse_word, parse_yaml, read_yaml_file


def bomb(levels: int) -> str:
    """Each level repeats the one before ten times."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1_000", 1000),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("no", "no"),
        ("true", True),
        ("2026-01-01", "2026-01-01"),
        ("~", None),
        ("{a: [1, 'b']}", {"a": [1, "b"]}),
        ("!!str 5", "5"),
        ("", None),
    ],
)
def test_plain_words(text: str, value: Any) -> None:
    """Known answers: the rules of YAML 1.2 for words and numbers."""
    assert parse_yaml(text, "x").value == value
    assert type(parse_yaml(text, "x").value) is type(value)


def test_aliases_stand_for_what_they_name_as_far_as_they_are_few() -> None:
    """An alias is as good as the value written again; the lines are those of the keys."""
    document = parse_yaml("a: &a {x: [1, 2]}\nb: *a\n\nc: [*a, *a]\n", "x")
    assert document.value["c"] == [document.value["a"]] * 2
    assert document.lines == {"a": 1, "b": 2, "c": 4}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (bomb(30), 5, "more than 20,000 values"),
        ("\na: &a [*a]", 2, "stands inside itself"),
        ("a: 1\nb: " + "[" * 3000, 2, "nested more than 40 deep"),
        ("a: 1\nb: " + "{x: " * 3000, 2, "nested more than 40 deep"),
        ("a: 1\nb: " + "9" * 5000, 2, "a number of 5,000 digits"),
        ("? [a]\n: 1", 1, "a key that is not text"),
        ("a: {1: 2}", 1, "a key that is not text"),
        ("a: &a {x: 1}\n<<: *a", 2, "`<<` is not taken"),
        ("\na: !!int five", 2, "'five' is no int"),
        ("a: !!set {x}", 1, "could not determine a constructor"),
        ("a: !!python/name:os.system", 1, "could not determine a constructor"),
        ("a: [", 1, "not plain YAML"),
        ("a: 1\nb: x\0", 2, "is not allowed"),
    ],
)
def test_what_is_refused_has_its_line(text: str, line: int, words: str) -> None:
    """Whatever this reader does not take is an error at its line."""
    with pytest.raises(InputError) as refused:
        parse_yaml(text, "recipe.yaml")
    assert str(refused.value).startswith(f"recipe.yaml:{line}: ")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: caf\xe9\n", r":2: not UTF-8 \(byte 0xe9\)"),
        ("a: 1\n".encode("utf-16"), r":1: not UTF-8 \(byte 0xff\)"),
        (b"#" * (MOST_BYTES + 1), "bytes are more than 500,000"),
    ],
)
def test_files_that_are_no_text_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    """With the line of the first byte that is none of UTF-8."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_yaml_file(path)


def test_words_of_the_command_line() -> None:
    """What is no YAML is text; what is YAML out of bounds is refused."""
    assert parse_word("[a") == "[a"
    assert parse_word("3e-4") == 3e-4
    with pytest.raises(InputError, match="command line: not plain YAML: a number of 5,000 digits"):
        parse_word("9" * 5000)


def test_shipped_recipes_are_within_bounds() -> None:
    """Each is read."""
    for recipe in shipped_recipes():
        assert read_yaml_file(recipe.path).lines
