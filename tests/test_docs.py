"""What the documents say holds: their commands run, their links lead somewhere, their files are there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from sft_recipes import run_folder
from sft_recipes.data import prepared
from tests.documents import (
    DOCUMENTS,
    README,
    ROOT,
    Block,
    apply_block,
    blocks_of,
    command_fault,
    missing_lines,
    run,
)
from tests.test_architecture import FOUNDATION, LAYERS

DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
WITH_COMMANDS = [path for path in DOCUMENTS if path not in (README, *HOW_TO)]
SHELL_KINDS = ("test", "slow", "parse-only", "refused", "found")
EXIT_CODES = {"refused": 2, "found": 1}
# The tests that a change like that of the page may break: the page has to run them.
ROOM_TESTS = {
    "add-a-check.md": "tests/audit",
    "add-a-format.md": "tests/data",
    "add-a-metric.md": "tests/evaluation/test_metrics.py",
    "add-a-recipe.md": "tests/test_shipped_recipes.py",
    "check-in-ci.md": "tests/test_verdicts.py",
    "examine-a-run.md": "tests/doctor",
}
LONGEST = 400
# What a how-to page works on: the package and its tests, without what was installed or trained.
COPIED = (
    "sft_recipes",
    "tests",
    "recipes",
    "accelerate_configs",
    "slurm",
    "scripts",
    "docs",
    "pyproject.toml",
)


def name_of(path: Path) -> str:
    """A document's name below the root, for the ids of tests."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_block_says_how_it_is_tried(path: Path) -> None:
    """A block of commands is run, or named as one that is only parsed; output follows commands that are run."""
    before = Block("", "", "")
    for block in blocks_of(path):
        if block.language == "bash":
            assert block.kind in SHELL_KINDS
        elif block.language == "text":
            assert block.kind in ("output", "output about")
            assert before.language == "bash" and before.kind != "parse-only"
        else:
            assert path in HOW_TO
            assert block.language == "diff" or block.kind.startswith("new ")
        before = block


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_exists(path: Path) -> None:
    """Every command line names a make target, a console command, a file or a module of this checkout."""
    from sft_recipes.cli import app

    verbs = [group.name for group in app.registered_groups if group.name]
    for command in app.registered_commands:
        assert command.callback is not None
        verbs.append(command.name or command.callback.__name__)
    for block in blocks_of(path):
        if block.language == "bash":
            for line in block.commands:
                assert not command_fault(line, verbs)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link is a file of the checkout; a document ends before a reader is lost."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def files_named(text: str) -> Iterator[str]:
    """Paths of code, data and pages between backticks that are no pattern and no example."""
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|md|jinja|sbatch|toml))`", text):
        if not name.startswith(("runs/", "my")):
            yield name


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_are_named_are_there(path: Path) -> None:
    """A path between backticks is a file of the checkout or, without its folder, of the package.

    Or one that a block of the page makes.
    """
    made = [block.kind.removeprefix("new ") for block in blocks_of(path)]
    for name in files_named(path.read_text(encoding="utf-8")):
        if name in made:
            continue
        places = (ROOT / name, ROOT / "sft_recipes" / name, path.parent / name)
        assert any(place.exists() for place in places), name


@pytest.mark.slow
def test_tests_that_are_named_are_there() -> None:
    """In docs/real-weights.md each fault is held by a test of the file and the name that stand beside it."""
    page = (ROOT / "docs/real-weights.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`(?:, `(test_\w+)`)?", page)
    assert len(named) > 5
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_commands_run(path: Path, tmp_path: Path) -> None:
    """The commands of a document, run in order from the root, exit 0 and print what the document shows."""
    printed = ""
    for block in blocks_of(path):
        if (block.language, block.kind) == ("bash", "test"):
            printed = "".join(run(line, tmp_path) for line in block.commands)
        elif block.language == "text":
            assert not missing_lines(block, printed)


def test_the_life_of_a_row_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The row that the architecture page follows looks at every stage as it does there."""
    from scripts.life_of_a_row import main

    blocks = blocks_of(DOCS / "architecture.md")
    (command,) = [
        block for block in blocks if "life_of_a_row" in block.body and block.language == "bash"
    ]
    shown = blocks[blocks.index(command) + 1]
    main([str(ROOT / "recipes/quickstart/full.yaml"), "--row", command.body.split()[-1]])
    printed = capsys.readouterr().out.replace(f"{ROOT}/", "")
    assert shown.body.strip() == printed.strip()


def test_the_life_of_other_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Any row of any file is followed; one that is dropped says why, one that is not there is refused."""
    from scripts.life_of_a_row import main

    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    base = str(ROOT / "recipes/quickstart/base")
    main([str(file), "--tokenizer", base])
    assert "«b»«<|endoftext|>»" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="row 1 is past the end"):
        main([str(file), "--tokenizer", base, "--row", "1"])
    with pytest.raises(SystemExit, match="--tokenizer"):
        main([str(file)])


def test_the_architecture_page_names_every_room() -> None:
    """The layer line and the list of rooms are those that the architecture test holds."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    line = " > ".join(", ".join(rooms) for rooms in LAYERS)
    assert line in " ".join(text.split())
    for room in (*chain.from_iterable(LAYERS), *FOUNDATION):
        assert re.search(rf"^\| `{room}(/|\.py)` \|", text, re.M), room


def test_generated_pages_are_up_to_date() -> None:
    """The reference of keys and metrics is what the code says today; `make docs` rewrites it."""
    from scripts.reference import PAGES

    for name, page in PAGES.items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == page(), name


def test_every_key_has_a_meaning() -> None:
    """The keys of TRL that a recipe takes, and no others, are explained, each once; so are ours."""
    from scripts.reference import TRL_MEANINGS
    from sft_recipes.recipe_keys import DATA_KEYS, OWN_KEYS, trl_keys

    explained: list[str] = []
    for meanings in TRL_MEANINGS.values():
        explained += meanings
    assert sorted(explained) == sorted(
        {**trl_keys().model, **trl_keys().training}.keys() - DATA_KEYS
    )
    text = (DOCS / "reference" / "recipe-keys.md").read_text(encoding="utf-8")
    for name in {**OWN_KEYS, **DATA_KEYS}:
        assert f"\n| `{name}` | " in text


def test_the_run_folder_page_names_every_file() -> None:
    """Every file and folder that run_folder.py and prepared.py name is described."""
    text = (DOCS / "reference" / "run-folder.md").read_text(encoding="utf-8")
    names = [
        value
        for name, value in vars(run_folder).items()
        if name.isupper() and isinstance(value, str)
    ]
    for name in [*names, *prepared.FILES, prepared.MANIFEST, prepared.DROPPED, prepared.REJECTS]:
        assert name in text, name


@pytest.mark.parametrize("path", HOW_TO, ids=name_of)
def test_a_how_to_page_says_which_file_a_block_is(path: Path) -> None:
    """Readers do not see what stands behind a fence, so the text above a block names its file."""
    text = path.read_text(encoding="utf-8")
    for above, file in re.findall(r"^```$(.*?)^```(?:diff|\w+ new) (\S+)$", text, re.M | re.S):
        assert f"`{file}`" in above


@pytest.mark.parametrize("path", HOW_TO, ids=name_of)
def test_a_how_to_page_runs_the_tests_of_its_room(path: Path) -> None:
    """Behind the last change of a page stands a command for the tests that such a change may break."""
    behind: list[str] = []
    for block in blocks_of(path):
        if block.language == "diff":
            behind = []
        elif (block.language, block.kind) == ("bash", "test"):
            behind += block.commands
    room = ROOM_TESTS[path.name]
    assert any(line.startswith("python -m pytest") and f" {room} " in line for line in behind)


@pytest.mark.parametrize("path", HOW_TO, ids=name_of)
def test_a_how_to_page_fits_the_code(path: Path, tmp_path: Path) -> None:
    """Every place that a page changes stands in its file, once; every file that it adds is new."""
    for block in blocks_of(path):
        if block.language == "diff" and not (tmp_path / block.kind).exists():
            (tmp_path / block.kind).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / block.kind, tmp_path / block.kind)
        if block.language not in ("bash", "text"):
            apply_block(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", HOW_TO, ids=name_of)
def test_a_how_to_page_does_what_it_says(path: Path, tmp_path: Path) -> None:
    """Its blocks, applied in order to a copy of the project, lead to the commands and the output it shows.

    The tests of its room are among the commands, so an example that breaks any of them is found.
    """
    root = tmp_path / "project"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^## (\d)\. ", text, re.M) == ["1", "2", "3", "4", "5"]
    printed = ""
    for block in blocks_of(path):
        if (block.language, block.kind) == ("bash", "test"):
            printed = "".join(run(line, tmp_path, root) for line in block.commands)
        elif block.language == "bash" and block.kind in EXIT_CODES:
            code = EXIT_CODES[block.kind]
            printed = "".join(run(line, tmp_path, root, code) for line in block.commands)
        elif block.language == "text":
            assert not missing_lines(block, printed)
        elif block.language != "bash":
            apply_block(block, root)
