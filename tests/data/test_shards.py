"""A preparation is written shard by shard; one that was stopped goes on behind the last whole one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_recipes import stop_request
from sft_recipes.data import prepare as prepare_page
from sft_recipes.data import prepared_batch
from sft_recipes.data.labels import Labeller
from sft_recipes.data.opening import open_labeller
from sft_recipes.data.prepare import write_prepared
from sft_recipes.data.prepared import load_prepared
from sft_recipes.errors import InputError, TrainingFault
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.similarity import SLOTS, prompt_clusters
from tests.conftest import instruction_rows

ROWS = 130


class Killed(BaseException):
    """Stands for what ends a process at once."""


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two batches of ten rows."""
    monkeypatch.setattr(prepared_batch, "BATCH_ROWS", 10)
    monkeypatch.setattr(prepare_page, "SHARD_BATCHES", 2)


@pytest.fixture
def recipe_file(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path], small_shards: None
) -> Path:
    """Two sources of one mixture, with rows that are rejected, dropped, and asked twice."""
    rows = instruction_rows(ROWS)
    rows[7] = {"instruction": "no answer"}
    rows[45] = {"instruction": "Too long.", "output": "one two three " * 60}
    rows[90] = {"instruction": "Again too long.", "output": "one two three " * 60}
    rows[99] = rows[3]
    write_rows(rows, "first.jsonl")
    write_rows(instruction_rows(35)[5:], "second.jsonl")
    datasets = [{"path": "./first.jsonl"}, {"path": "./second.jsonl", "weight": 2}]
    return write_recipe(
        datasets=datasets,
        eval_split=12,
        max_length=96,
        on_bad_rows="skip",
        max_rejected=0.1,
        max_lost=0.9,
        dataset_num_proc=1,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(recipe_file: Path, folder: Path) -> dict[str, bytes]:
    """Prepare in a folder; returns its files."""
    recipe = load_recipe(recipe_file)
    write_prepared(recipe, open_labeller(recipe), folder, progress=False)
    return contents(folder)


def killed_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """The process that prepares ends when this batch comes back from a worker."""
    until_asked = prepare_page._Preparation._until_asked_to_stop
    seen = 0

    def stopping(self: Any, results: Iterator[Any]) -> Iterator[Any]:
        nonlocal seen
        for result in until_asked(self, results):
            if seen == batch:
                raise Killed
            seen += 1
            yield result

    monkeypatch.setattr(prepare_page._Preparation, "_until_asked_to_stop", stopping)


def write_until_killed(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, folder: Path, batch: int
) -> None:
    """Prepare in a folder up to this batch."""
    with monkeypatch.context() as patch:
        killed_at(patch, batch)
        with pytest.raises(Killed):
            write(recipe_file, folder)


def labelled_rows(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """Every row that is labelled from here on leaves a byte in a file, whichever process labels it."""
    label = Labeller.label

    def counting(self: Labeller, examples: Any) -> Any:
        with log.open("ab") as file:
            file.write(b"." * len(examples))
        return label(self, examples)

    monkeypatch.setattr(Labeller, "label", counting)


def test_files_of_shards(recipe_file: Path, tmp_path: Path) -> None:
    """Shards hold two batches of one source each, and nothing of the unfinished folder stays."""
    files = write(recipe_file, tmp_path / "prepared")
    shards = [name for name in files if name.endswith(".arrow")]
    # 129 examples of the first source make seven shards, 30 of the second two.
    assert shards == [f"train-{number:05d}.arrow" for number in range(9)]
    assert not (tmp_path / "prepared" / "unfinished").exists()
    manifest = json.loads(files["manifest.json"])
    assert set(manifest["files"]) == {
        *shards, "joined_groups.npy", "eval_examples.jsonl", "check_examples.jsonl",
    }  # fmt: skip
    data = load_prepared(load_recipe(recipe_file), tmp_path / "prepared")
    assert data.summary["train"]["rows"] == len(data.train) and data.eval is not None


@pytest.mark.parametrize("batch", [0, 5, 13, 15])
def test_stopped_anywhere_goes_on_to_the_same_files(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Ended at any batch of either source, the next call labels only what no sealed shard holds, and writes every
    byte that an undisturbed preparation writes."""
    undisturbed = write(recipe_file, tmp_path / "undisturbed")
    write_until_killed(monkeypatch, recipe_file, tmp_path / "stopped", batch)
    log = tmp_path / "labelled"
    log.touch()
    labelled_rows(monkeypatch, log)
    assert write(recipe_file, tmp_path / "stopped") == undisturbed
    # The first source has thirteen batches, the last of nine rows and alone in its shard.
    sealed = min(batch, 13) // 2 * 20 if batch < 13 else 129 + (batch - 13) // 2 * 20
    assert len(log.read_bytes()) == 129 + 30 - sealed


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "seal"])
def test_a_damaged_shard_is_written_again(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A sealed shard of which one byte differs is not gone on from, whichever file it is."""
    undisturbed = write(recipe_file, tmp_path / "undisturbed")
    write_until_killed(monkeypatch, recipe_file, tmp_path / "stopped", 9)
    unfinished = tmp_path / "stopped" / "unfinished"
    rows = unfinished / "train-00002.arrow"
    content = rows.read_bytes()
    if damage == "cut":
        rows.write_bytes(content[:-1])
    elif damage == "changed":
        rows.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    elif damage == "gone":
        (unfinished / "train-00002.prompts").unlink()
    else:
        (unfinished / "train-00002.json").write_text("{")
    assert write(recipe_file, tmp_path / "stopped") == undisturbed


def test_other_inputs_begin_anew(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of rows that have changed since, or of another setting, are not gone on from."""
    write_until_killed(monkeypatch, recipe_file, tmp_path / "stopped", 9)
    rows = tmp_path / "first.jsonl"
    rows.write_text(rows.read_text().replace("(39)", "(38)"))
    changed = write(recipe_file, tmp_path / "stopped")
    assert changed == write(recipe_file, tmp_path / "undisturbed")


def test_the_old_rows_stay_until_all_new_ones_are_there(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two preparations in one folder the first can be loaded until the second is done; then nothing of it stays."""
    folder = tmp_path / "prepared"
    first = write(recipe_file, folder)
    second = tmp_path / "second.jsonl"
    second.write_text("".join(second.read_text().splitlines(keepends=True)[:10]))
    write_until_killed(monkeypatch, recipe_file, folder, 13)
    now = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: now[name] for name in first if name != "dropped.jsonl"} == {
        name: content for name, content in first.items() if name != "dropped.jsonl"
    }
    assert "train-00008.arrow" in first
    finished = write(recipe_file, folder)
    assert (
        finished == write(recipe_file, tmp_path / "alone") and "train-00008.arrow" not in finished
    )


@pytest.mark.parametrize("moved", [0, 5, 11])
def test_stopped_while_files_are_put_in_place(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """Ended behind any of the moves at the end, the next call moves the rest and labels nothing."""
    undisturbed = write(recipe_file, tmp_path / "undisturbed")
    replace = Path.replace
    count = 0

    def replacing(path: Path, target: Path) -> Path:
        nonlocal count
        if path.parent.name == "unfinished" and Path(target).parent.name == "stopped":
            if count == moved:
                raise Killed
            count += 1
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replacing)
        with pytest.raises(Killed):
            write(recipe_file, tmp_path / "stopped")
    log = tmp_path / "labelled"
    log.touch()
    labelled_rows(monkeypatch, log)
    assert write(recipe_file, tmp_path / "stopped") == undisturbed
    assert log.read_bytes() == b""


def test_a_source_that_lost_rows_meanwhile(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source without hashes that is shorter now than what is prepared of it is refused with what to delete."""
    write_until_killed(monkeypatch, recipe_file, tmp_path / "stopped", 9)
    whole = prepare_page.iter_examples

    def shorter(*args: Any, **keys: Any) -> Iterator[Any]:
        for number, example in enumerate(whole(*args, **keys)):
            if number < 30:
                yield example

    monkeypatch.setattr(prepare_page, "iter_examples", shorter)
    with pytest.raises(InputError, match=r"has 30 rows now.*delete .*unfinished"):
        write(recipe_file, tmp_path / "stopped")


def test_a_manifest_moves_no_file_of_others(recipe_file: Path, tmp_path: Path) -> None:
    """A manifest in a copied folder that names files elsewhere is refused, and they stay."""
    folder = tmp_path / "prepared"
    files = write(recipe_file, folder)
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["../mine.txt"] = [4, "0" * 64]
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "mine.txt").write_text("mine")
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="no name of a file"):
        write(recipe_file, folder)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_prompts_from_disk_join_as_from_memory(recipe_file: Path, tmp_path: Path) -> None:
    """Signatures that were made batch by batch and read from disk give the clusters of the texts as a list."""
    import pyarrow as pa

    from sft_recipes.data.prompt_table import SCHEMA, prompt_batch, read_prompts

    texts = [f"Say the number {number % 40} in words, please, my friend." for number in range(90)]
    texts += [f"Why is the sky over the sea {word}?" for word in ("blue", "blue now", "so blue")]
    groups = [hash(text) >> 1 for text in texts]
    files: list[Path] = []
    for start in range(0, len(texts), 20):
        files.append(tmp_path / f"{start}.prompts")
        with pa.OSFile(str(files[-1]), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for at in (start, start + 10):
                writer.write_batch(prompt_batch(groups[at : at + 10], texts[at : at + 10]))
    table = read_prompts(files, tmp_path)
    different = list(dict.fromkeys(texts))
    assert list(table.prompts) == different and table.signatures.slots.shape == (43, SLOTS)
    assert table.groups.tolist() == list(dict.fromkeys(groups))
    clusters = prompt_clusters(table.prompts, table.signatures)
    assert np.array_equal(clusters, prompt_clusters(different))
    assert len(set(clusters.tolist())) < len(different)


def test_a_signal_says_that_it_goes_on(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM between two batches: Preempted, with how many rows are kept; the next call ends with the same files."""
    undisturbed = write(recipe_file, tmp_path / "undisturbed")
    seen = 0

    def asked(doing: str, kept: str = "") -> None:
        nonlocal seen
        seen += 1
        if seen == 6:
            raise Killed(f"{doing}; {kept}")

    with monkeypatch.context() as patch:
        patch.setattr(stop_request, "raise_if_asked", asked)
        with pytest.raises(
            Killed, match="40 rows are prepared, and the same command goes on there"
        ):
            write(recipe_file, tmp_path / "stopped")
    assert write(recipe_file, tmp_path / "stopped") == undisturbed


def test_workers_that_end_with_a_stopped_process_are_no_fault(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler's SIGTERM reaches workers, too: what is raised is the stop, not that a worker was killed."""
    monkeypatch.setattr(prepare_page.Workers, "map", broken_workers)
    with pytest.raises(TrainingFault, match="was killed"):
        write(recipe_file, tmp_path / "killed")

    def asked(doing: str, kept: str = "") -> None:
        raise Killed(kept)

    monkeypatch.setattr(stop_request, "raise_if_asked", asked)
    with pytest.raises(Killed, match="0 rows are prepared, and the same command goes on"):
        write(recipe_file, tmp_path / "stopped")


def broken_workers(self: Any, batches: Any) -> Iterator[Any]:
    """What a pool does of which a worker was killed."""
    raise TrainingFault("a worker was killed")
    yield


@pytest.mark.slow
def test_kill_9_of_the_command(
    write_recipe: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """`prepare` with two workers, killed with its workers once two shards are sealed: the same command says behind
    how many rows it goes on, and leaves the bytes of an undisturbed run."""
    write_rows([{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(90_000)])
    path = write_recipe(eval_split=100, dataset_num_proc=2)
    command = [sys.executable, "-m", "sft_recipes", "prepare", str(path), "--output_dir"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [*command, str(tmp_path / "undisturbed")], check=True, env=environment, capture_output=True
    )
    first = subprocess.Popen(
        [*command, str(tmp_path / "stopped")],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    unfinished = tmp_path / "stopped" / "prepared" / "unfinished"
    while not (unfinished / "train-00001.json").exists():
        assert first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "stopped" / "prepared" / "manifest.json").exists()
    second = subprocess.run(
        [*command, str(tmp_path / "stopped")],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "going on behind" in second.stderr
    assert contents(tmp_path / "stopped" / "prepared") == contents(
        tmp_path / "undisturbed" / "prepared"
    )
