"""Prepared once, trained anywhere: a copy of the folder is enough, a changed input is noticed, damage is refused."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft_recipes
from sft_recipes.data import prepared as prepared_files
from sft_recipes.data import prepared_inputs as page
from sft_recipes.data.opening import load_tokenizer, open_labeller
from sft_recipes.data.prepare import prepare
from sft_recipes.data.prepared import PreparedData, load_prepared
from sft_recipes.errors import InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.training.train import train
from tests.conftest import instruction_rows
from tests.training.tiny import file_hashes, logged

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepared(path: Path, **overrides: Any) -> PreparedData:
    """The recipe's data, in its run folder, as `sft-recipes prepare` makes it."""
    recipe = load_recipe(path, overrides)
    return prepare(recipe, open_labeller(recipe), recipe.output_dir / "prepared", progress=False)


@pytest.fixture
def origin(
    tmp_path: Path,
    base_folder: Path,
    write_recipe: Callable[..., Path],
    write_rows: Callable[..., Path],
) -> Path:
    """A recipe with its own model and template, prepared where its rows are."""
    write_rows([*instruction_rows(44), {"instruction": "Long?", "output": "one two three " * 60}])
    shutil.copytree(base_folder, tmp_path / "model")
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    path = write_recipe(
        model_name_or_path="./model",
        chat_template="./mine.jinja",
        eval_split=4,
        max_lost=0.9,
        max_steps=2,
    )
    prepared(path)
    return path


@pytest.fixture
def copy(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything but the rows, copied to where the network is not."""
    folder = tmp_path_factory.mktemp("elsewhere") / "node"
    shutil.copytree(origin.parent, folder, ignore=shutil.ignore_patterns("train.jsonl"))
    return folder / origin.name


def test_a_copy_trains_without_rows_and_network(
    origin: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recipe, model and prepared folder, copied without the rows: the same losses and weights, no connection tried."""
    here = train(load_recipe(origin))

    def refused(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refused)
    capsys.readouterr()
    there = train(load_recipe(copy))
    assert "train.jsonl is not here: its prepared rows stand as they are" in capsys.readouterr().err
    assert len(logged(there)) == 2 and logged(there) == logged(here)
    assert file_hashes(there)["model.safetensors"] == file_hashes(here)["model.safetensors"]


def change_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One character of one row."""
    rows = path.parent / "train.jsonl"
    rows.write_text(rows.read_text().replace("(39)", "(38)"))
    return {}


def change_template(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One space in the template."""
    (path.parent / "mine.jinja").write_text(TEMPLATE.replace("m.role + '\n'", "m.role + ' \n'"))
    return {}


def change_tokenizer(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One more token."""
    tokenizer = load_tokenizer(str(path.parent / "model"))
    tokenizer.add_tokens(["colour"])
    tokenizer.save_pretrained(path.parent / "model")
    return {}


def change_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One line of the code that makes the ids."""
    folder = shutil.copytree(Path(page.__file__).parent, path.parent / "code")
    with (folder / "labels.py").open("a") as file:
        file.write("# changed\n")
    monkeypatch.setattr(page, "__file__", str(folder / "prepared_inputs.py"))
    return {}


def change_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Another release."""
    monkeypatch.setattr(sft_recipes, "__version__", "9.9")
    return {}


def change_settings(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A key of the recipe that decides which ids there are."""
    return {"max_length": 96}


CHANGES: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "rows": (change_rows, "data"),
    "template": (change_template, "template"),
    "tokenizer": (change_tokenizer, "tokenizer"),
    "code": (change_code, "code"),
    "version": (change_version, "code"),
    "settings": (change_settings, "settings"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_input_is_noticed_and_named(
    case: str, origin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unchanged, nothing is done; one changed input prepares again and says which; then nothing is done again."""
    train_rows = origin.parent / "run/prepared/train-00000.arrow"
    stamps = [train_rows.stat().st_mtime_ns]
    prepared(origin)
    stamps.append(train_rows.stat().st_mtime_ns)
    change, name = CHANGES[case]
    overrides = change(origin, monkeypatch)
    capsys.readouterr()
    for _ in range(2):
        prepared(origin, **overrides)
        stamps.append(train_rows.stat().st_mtime_ns)
    assert stamps[0] == stamps[1] < stamps[2] == stamps[3]
    assert capsys.readouterr().err.count(f"preparing again: {name} changed since") == 1


@pytest.mark.parametrize("case", ["template", "tokenizer", "code", "version", "settings"])
def test_a_copy_that_no_longer_fits_is_refused_and_kept(
    case: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the rows nothing can be prepared again: what changed is named, and the copy stays as it was."""
    before = {
        name: file
        for name, file in file_hashes(copy.parent / "run/prepared").items()
        if "arrow" in name
    }
    change, name = CHANGES[case]
    overrides = change(copy, monkeypatch)
    with pytest.raises(InputError, match=r"train\.jsonl: no such file"):
        prepared(copy, **overrides)
    assert f"preparing again: {name} changed since" in capsys.readouterr().err
    after = file_hashes(copy.parent / "run/prepared")
    assert before.items() <= after.items() and "manifest.json" in after


def test_a_new_mixture_needs_no_new_rows(origin: Path) -> None:
    """`weight` and `max_rows` are drawn from the prepared rows."""
    rows = origin.parent / "run/prepared/train-00000.arrow"
    stamp, before = rows.stat().st_mtime_ns, len(prepared(origin).train)
    assert len(prepared(origin, max_rows=7).train) == 7
    doubled = prepared(origin, dataset_name=None, datasets=[{"path": "./train.jsonl", "weight": 2}])
    assert len(doubled.train) == 2 * before
    assert rows.stat().st_mtime_ns == stamp


def test_another_name_is_another_source(copy: Path) -> None:
    """Only the source that was prepared may be absent; a name that was never there is an error."""
    with pytest.raises(InputError, match=r"trian\.jsonl: no such file"):
        prepared(copy, dataset_name=str(copy.parent / "trian.jsonl"))


def cut(path: Path) -> None:
    """All but the last bytes."""
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """One bit of one byte, the length as before."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["train-00000.arrow", "eval_examples.jsonl", "joined_groups.npy"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_copy_is_refused(file: str, damage: Callable[[Path], None], copy: Path) -> None:
    """A file that is missing, cut off or changed is refused by name before it is read."""
    damage(copy.parent / "run/prepared" / file)
    with pytest.raises(
        InputError, match=rf"{file}: missing, cut off or changed since it was prepared"
    ):
        prepared(copy)


def test_other_ranks_read_the_folder_and_nothing_else(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_prepared`, for the ranks that do not prepare, hashes nothing and gives the rows that `prepare` gives."""
    recipe, expected = load_recipe(copy), prepared(copy)

    def refused(_: Path) -> str:
        raise AssertionError("a file was hashed")

    monkeypatch.setattr(prepared_files, "file_sha256", refused)
    found = load_prepared(recipe, copy.parent / "run/prepared")
    assert found.train.to_dict() == expected.train.to_dict() and found.eval is not None
    assert found.summary == expected.summary and found.eval_examples == expected.eval_examples


def test_ranks_that_see_no_prepared_folder_say_so(copy: Path, tmp_path: Path) -> None:
    """On a machine that does not share the run folder, the message is about that and not about a missing file."""
    with pytest.raises(
        InputError,
        match=r"manifest\.json: no such file.*all machines of a run must see its output_dir",
    ):
        load_prepared(load_recipe(copy), tmp_path / "not_shared")
    cut(copy.parent / "run/prepared/train-00000.arrow")
    with pytest.raises(InputError, match="cut off"):
        load_prepared(load_recipe(copy), copy.parent / "run/prepared")
