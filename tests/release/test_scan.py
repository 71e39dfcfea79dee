"""What is uploaded is looked through: how often a secret is found, how often something else is taken for one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sft_recipes.errors import InputError
from sft_recipes.release.export import export
from sft_recipes.release.hub import push
from sft_recipes.release.scan import Secrets, find_private
from sft_recipes.response_patterns import mask
from tests.release.hub_server import TOKEN, Hub
from tests.release.secret_samples import Sample, look_alikes, secrets

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NOBODY = Secrets(tokens=[], folders=[])
COUNT = 60


def found(samples: list[Sample]) -> list[Sample]:
    """Those in which the scan finds something."""
    return [sample for sample in samples if find_private(sample.line, "README.md", NOBODY)]


def test_recall_and_precision() -> None:
    """Of 60 made-up secrets and 60 texts that look like some, in each of five draws: the figures are printed, and no
    worse than what they were when this was written (recall 1, precision 1).
    """
    for seed in range(5):
        hidden = secrets(seed, COUNT)
        harmless = look_alikes(seed, COUNT)
        hits = found(hidden)
        false_alarms = found(harmless)
        recall = len(hits) / len(hidden)
        precision = len(hits) / (len(hits) + len(false_alarms))
        missed = Counter(sample.kind for sample in hidden if sample not in hits)
        alarms = Counter(sample.kind for sample in false_alarms)
        print(f"seed {seed}: recall {recall:.3f}, precision {precision:.3f}")
        print(f"  missed: {dict(missed)}, false alarms: {dict(alarms)}")
        assert recall >= 0.95 and precision >= 0.95


def test_the_card_masks_what_the_scan_would_refuse() -> None:
    """A sample of an answer that holds a secret is masked, so that the card itself can be pushed."""
    for sample in secrets(7, COUNT):
        if "path" not in sample.kind:
            masked = mask(sample.line)
            assert sample.secret not in masked, sample.kind
            assert not find_private(masked, "README.md", NOBODY), masked


def test_secrets_of_the_user_need_no_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The token of the Hub and secrets of the environment are found wherever they stand, vocabularies included."""
    monkeypatch.setenv("HF_TOKEN", "no-form-at-all")
    monkeypatch.setenv("MY_SERVICE_KEY", "correct horse battery")
    monkeypatch.setenv("MY_SERVICE_NAME", "a name is no secret")
    monkeypatch.setenv("SHORT_KEY", "short")
    mine = Secrets.of_this_machine(tmp_path)
    for name in ("README.md", "tokenizer.json", "chat_template.jinja"):
        for text in ("no-form-at-all", "correct horse battery"):
            assert [finding.kind for finding in find_private(f"a {text}!", name, mine)] == ["token"]
        assert not find_private("a name is no secret, and short", name, mine)
        assert find_private(f"{tmp_path}/x", name, mine)


PLACES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


@pytest.mark.parametrize("name", PLACES)
def test_every_file_is_looked_through(make_run: Callable[..., Path], hub: Hub, name: str) -> None:
    """A key in any file of an exported folder, the metadata of the weights included, stops the push before a call, and
    is not shown.
    """
    run = make_run("full")
    key = secrets(0, 1)[0].secret
    path = run / "export" / name
    if name == "README.md":
        path = run / name  # a card of people's own goes along
        path.write_text(f"mine\n{key}", encoding="utf-8")
    elif name == "model.safetensors":
        save_file({"x": torch.zeros(1)}, path, {"note": key})
    elif name.endswith(".jinja"):
        path.write_text(path.read_text(encoding="utf-8") + key, encoding="utf-8")
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, "note": key}, indent=2), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{name}:\d+.*holds a access key") as refused:
        push(run, "me/model", progress=False)
    assert key not in str(refused.value) and not hub.calls


def test_a_vocabulary_may_hold_words(make_run: Callable[..., Path], hub: Hub) -> None:
    """Pieces like `/home/x` and `password: a1b2c3` are no secret in a vocabulary; the user's token is one."""
    run = make_run("full")
    path = run / "export" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "a": "/home/x/y password: a1b2c3d4"}), encoding="utf-8")
    assert push(run, "me/model", progress=False).changed
    path.write_text(json.dumps({**content, "a": TOKEN}), encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer.json:1: holds a token"):
        push(run, "me/model", progress=False)


@pytest.mark.parametrize("place", ["run", "export", "evaluation", "folder"])
def test_links_that_lead_out_are_refused(
    make_run: Callable[..., Path], hub: Hub, tmp_path: Path, place: str
) -> None:
    """A link to a file or folder elsewhere is named, and nothing is exported or sent."""
    run = make_run("full")
    secret = tmp_path / "secret"
    secret.write_text("mine", encoding="utf-8")
    links = {
        "run": run / "README.md",
        "export": run / "export" / "merges.txt",
        "evaluation": run / "evaluations" / "eval" / "samples.jsonl",
        "folder": run / "evaluations",
    }
    link = links[place]
    if place != "folder":
        link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret if place != "folder" else tmp_path)
    refusal = "this is a link that leads out of the folder. Fix: put what"
    with pytest.raises(InputError, match=refusal) as refused:
        push(run, "me/model", progress=False)
    assert str(link) in str(refused.value) and not hub.calls
    if place != "export":
        with pytest.raises(InputError, match=refusal):
            export(run, run / "again", progress=False)
        assert not (run / "again").exists()


def test_links_inside_are_followed(make_run: Callable[..., Path], hub: Hub) -> None:
    """A link to another file of the same folder is pushed as that file."""
    run = make_run("full")
    (run / "export" / "merges.txt").symlink_to("recipe.yaml")
    push(run, "me/model", progress=False)
    files = hub.repositories["me/model"].files
    assert files["merges.txt"] == (run / "export" / "recipe.yaml").read_bytes()


def test_an_export_is_not_written_through_a_link(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """An output that is a link, to a folder or to nothing, is refused."""
    run = make_run("full")
    for target in (tmp_path, tmp_path / "nothing"):
        link = tmp_path / f"link-{target.name}"
        link.symlink_to(target)
        with pytest.raises(InputError, match="--output: this is a link"):
            export(run, link, force=True, progress=False)
