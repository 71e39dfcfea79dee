"""Pushing, with the real client, to a Hub on localhost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi

from sft_recipes.errors import CheckFailed, HubUnavailable, InputError
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.release.hub import push, push_after_training, require_token
from tests.release.conftest import write_evaluation
from tests.release.hub_server import DROPPED, TOKEN, Hub, Repository

# The client's own way of sending bytes, which its HTTP library would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MERGED = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}
ADAPTER = MERGED - {"config.json", "model.safetensors"} | {
    "adapter_config.json",
    "adapter_model.safetensors",
}


def test_a_push_is_private_and_holds_listed_files_only(
    make_run: Callable[..., Path], hub: Hub
) -> None:
    """What arrives is the exported model with card and recipe in a private repository: no logs, data or pickles."""
    run = make_run("full", exported=False)
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    pushed = push(run, "me/model", progress=False)
    repository = hub.repositories["me/model"]
    assert repository.private and pushed.private and pushed.changed
    assert set(repository.files) == MERGED == set(pushed.files)
    assert (
        repository.files["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
    )
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}  # the upload itself goes to a signed address


def test_nothing_of_this_machine_arrives(make_run: Callable[..., Path], hub: Hub) -> None:
    """Merged and adapter-only: no byte of a pushed file names the run's folder or its user's home, or is the token."""
    run = make_run("lora")
    write_evaluation(run)
    push(run, "me/merged", progress=False)
    push(run, "me/adapter", adapter_only=True, base_model="me/base", progress=False)
    for repository in hub.repositories.values():
        for name, content in repository.files.items():
            for private in (str(run.parent), str(Path.cwd()), str(Path.home()) + "/", TOKEN):
                assert private.encode() not in content, f"{name} holds {private}"
    assert set(hub.repositories["me/merged"].files) == MERGED
    assert set(hub.repositories["me/adapter"].files) == ADAPTER
    config = json.loads(hub.repositories["me/adapter"].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/base" and config["r"] == 4


def test_an_adapter_on_a_local_base_is_refused(make_run: Callable[..., Path], hub: Hub) -> None:
    """Nobody else could load it: refused with file and field, and nothing is created."""
    run = make_run("lora")
    with pytest.raises(
        InputError, match=r"adapter_config.json: base_model_name_or_path: .* is a folder here"
    ):
        push(run, "me/adapter", adapter_only=True, progress=False)
    assert not hub.calls


def test_adapter_only_needs_an_adapter(make_run: Callable[..., Path], hub: Hub) -> None:
    """A whole model has no adapter to push."""
    with pytest.raises(InputError, match="the run has no adapter"):
        push(make_run("full"), "me/adapter", adapter_only=True, progress=False)


@pytest.mark.parametrize(
    ("name", "line", "kind"),
    [
        ("README.md", "my token is hf_" + "Ab1" * 12, "access key"),
        ("README.md", "see " + TOKEN, "token"),
        (
            "README.md",
            "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----",
            "private key",
        ),
        ("README.md", "trained in /home/somebody/runs", "path of this machine"),
        ("chat_template.jinja", "{# AKIA" + "ABCDEFGH12345678 #}", "access key"),
        ("tokenizer_config.json", '"vocab_file": "/home/somebody/vocab"', "path of this machine"),
    ],
)
def test_secrets_and_local_paths_are_refused(
    make_run: Callable[..., Path], hub: Hub, name: str, line: str, kind: str
) -> None:
    """A secret or a local path in any text file stops the push before the first call, and is not printed itself."""
    run = make_run("full")
    push(run, "me/model", progress=False)
    hub.calls.clear()
    path = run / name if name == "README.md" else run / "export" / name
    lines = (
        ["a card of my own"]
        if name == "README.md"
        else path.read_text(encoding="utf-8").splitlines()
    )
    path.write_text("\n".join([*lines[:1], line, *lines[1:]]), encoding="utf-8")
    with pytest.raises(InputError) as refused:
        push(run, "me/model", progress=False)
    field = ": vocab_file" if "vocab_file" in line else ""
    assert f"{run / 'export' / name}:2{field}: holds a {kind}" in str(refused.value)
    assert line not in str(refused.value) and TOKEN not in str(refused.value)
    assert not hub.calls


def test_a_template_may_speak_of_places(make_run: Callable[..., Path], hub: Hub) -> None:
    """What a template tells its model (gpt-oss's: the drive at /mnt/data) is no path of this machine."""
    run = make_run("full")
    path = run / "export" / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8") + "{# '/mnt/data' #}", encoding="utf-8")
    assert push(run, "me/model", progress=False).changed
    path.write_text(path.read_text(encoding="utf-8") + f"{{# {run} #}}", encoding="utf-8")
    with pytest.raises(InputError, match=r"chat_template.jinja:.*holds a path of this machine"):
        push(run, "me/model", progress=False)


def test_a_second_push_sends_nothing_again(make_run: Callable[..., Path], hub: Hub) -> None:
    """Weights that have arrived are not uploaded a second time, and an unchanged run makes no commit."""
    run = make_run("full")
    push(run, "me/model", progress=False)
    assert hub.count("upload") == 1
    again = push(run, "me/model", progress=False)
    assert hub.count("upload") == 1 and hub.count("commit") == 1 and not again.changed


def test_an_interrupted_push_is_resumed(make_run: Callable[..., Path], hub: Hub) -> None:
    """A push that died at its commit says that nothing was published; the next one sends no weights again."""
    run = make_run("full")
    hub.faults["commit"] = [503] * 5
    with pytest.raises(HubUnavailable, match=r"nothing was published: .*503.*Fix: push again"):
        push(run, "me/model", progress=False)
    assert hub.count("upload") == 1 and not hub.repositories["me/model"].files
    push(run, "me/model", progress=False)
    assert hub.count("upload") == 1 and set(hub.repositories["me/model"].files) == MERGED


@pytest.mark.parametrize(
    "kind", ["create", "validate", "commit", "info", "preupload", "batch", "upload", "verify"]
)
@pytest.mark.parametrize("faults", [[503, 429], [DROPPED, 502, DROPPED]])
def test_every_call_is_tried_again(
    make_run: Callable[..., Path], hub: Hub, kind: str, faults: list[int]
) -> None:
    """Whichever call finds the Hub busy, or loses its connection half way, the push goes through."""
    hub.faults[kind] = list(faults)
    run = make_run("full")
    pushed = push(run, "me/model", progress=False)
    assert pushed.changed and not hub.faults[kind]
    files = hub.repositories["me/model"].files
    assert set(files) == MERGED
    assert files["model.safetensors"] == (run / "export" / "model.safetensors").read_bytes()
    assert hub.repositories["me/model"].commits == 1


def test_an_upload_through_hf_xet_is_tried_again(
    make_run: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet, which this server does not speak to, has an error of its own for a lost connection."""
    upload = HfApi.upload_folder
    errors = [ConnectionError("Network error"), ConnectionError("Network error")]

    def lose_connection(self: HfApi, **arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return upload(self, **arguments)

    monkeypatch.setattr(HfApi, "upload_folder", lose_connection)
    assert push(make_run("full"), "me/model", progress=False).changed


def test_deletions_are_tried_again(make_run: Callable[..., Path], hub: Hub) -> None:
    """The list of files that stand there already is asked for again, too."""
    run = make_run("lora")
    push(run, "me/model", adapter_only=True, base_model="me/base", progress=False)
    hub.faults["tree"] = [503, DROPPED]
    hub.faults["commit"] = [DROPPED]
    push(run, "me/model", progress=False)
    assert set(hub.repositories["me/model"].files) == MERGED


def test_an_upload_that_loses_its_connection_is_resumed(
    make_run: Callable[..., Path], hub: Hub
) -> None:
    """Weights that never arrive end the push with what to do; what did arrive is not sent again."""
    run = make_run("full")
    hub.faults["upload"] = [DROPPED] * 200
    with pytest.raises(HubUnavailable, match=r"nothing was published: .*Fix: push again"):
        push(run, "me/model", progress=False)
    assert not hub.repositories["me/model"].files
    # The client gives up on the answer that they arrived; they have, and are not sent again.
    hub.faults = {"verify": [503] * 6}
    uploads = hub.count("upload")
    push(run, "me/model", progress=False)
    assert hub.count("upload") == uploads + 1 and not hub.faults["verify"]
    assert set(hub.repositories["me/model"].files) == MERGED


@pytest.mark.parametrize("adapter_only", [False, True])
def test_the_run_folder_stays_as_it_was(
    make_run: Callable[..., Path], hub: Hub, adapter_only: bool
) -> None:
    """What is published in another form than it stands in the folder is not changed in the folder."""
    run = make_run("lora")
    folder = run if adapter_only else run / "export"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    push(run, "me/model", adapter_only=adapter_only, base_model="me/base", progress=False)
    for name, content in before.items():
        if name != "README.md":  # the card, which names the repository now
            assert (folder / name).read_bytes() == content, name


def test_no_server_at_all(
    make_run: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without network the run stays as it is and the message says what to do; the exit code is not 0."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    run = make_run("full")
    state = (run / "run_state.json").read_bytes()
    with pytest.raises(HubUnavailable, match=r"nothing was published: .*Fix: push again") as failed:
        push(run, "me/model", progress=False)
    assert failed.value.exit_code == 3 and (run / "run_state.json").read_bytes() == state


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_tried_again(make_run: Callable[..., Path], hub: Hub, status: int) -> None:
    """A wrong token or name is the user's to mend: one attempt, exit code 2."""
    hub.faults["create"] = [status] * 9
    with pytest.raises(InputError, match="hf auth whoami"):
        push(make_run("full"), "me/model", progress=False)
    assert hub.count("create") == 1


def test_offline_is_said(
    make_run: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE is named as the reason."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        push(make_run("full"), "me/model", progress=False)


def test_a_token_is_needed_and_asked_for_first(
    make_run: Callable[..., Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a token nothing is exported and nothing is sent."""
    monkeypatch.delenv("HF_TOKEN")
    run = make_run("full", exported=False)
    with pytest.raises(InputError, match="hf auth login"):
        push(run, "me/model", progress=False)
    assert not hub.calls and not (run / "export").exists()
    with pytest.raises(InputError, match="hf auth login"):
        require_token()


def test_a_public_repository_is_not_used_for_a_private_push(
    make_run: Callable[..., Path], hub: Hub
) -> None:
    """A repository that exists and is public is refused, unless that is asked for."""
    hub.repositories["me/model"] = Repository(private=False)
    run = make_run("full")
    with pytest.raises(InputError, match="the repository exists and is public"):
        push(run, "me/model", progress=False)
    assert not hub.repositories["me/model"].files
    assert push(run, "me/model", public=True, progress=False).private is False


def test_what_is_no_longer_part_of_the_model_is_deleted(
    make_run: Callable[..., Path], hub: Hub
) -> None:
    """Merged weights over an adapter: the adapter goes, for it would be put on top; files of other kinds stay."""
    run = make_run("lora")
    push(run, "me/model", adapter_only=True, base_model="me/base", progress=False)
    hub.repositories["me/model"].files["demo.gif"] = b"x"
    pushed = push(run, "me/model", progress=False)
    assert set(hub.repositories["me/model"].files) == MERGED | {"demo.gif"}
    assert pushed.deleted == ["adapter_config.json", "adapter_model.safetensors"]


def gate(verdict: str) -> dict[str, Any]:
    """The verdict as `evaluate --gate` writes it."""
    return {
        "gate": {
            "verdict": verdict,
            "exit_code": int(verdict != "pass"),
            "smoke": False,
            "lines": [],
        }
    }


@pytest.mark.parametrize("verdict", ["fail", "inconclusive", "insufficient_n"])
def test_a_gate_that_did_not_pass_stops_the_push(
    make_run: Callable[..., Path], hub: Hub, verdict: str
) -> None:
    """A verdict other than pass is refused before anything is sent, unless the user says so."""
    run = make_run("full")
    write_evaluation(run, **gate(verdict))
    with pytest.raises(CheckFailed, match=f"the gate says {verdict}"):
        push(run, "me/model", progress=False)
    assert not hub.calls
    assert push(run, "me/model", allow_failed_gate=True, progress=False).changed


def test_the_newest_verdict_counts(make_run: Callable[..., Path], hub: Hub) -> None:
    """A pass after a failure is pushed; an evaluation without a gate decides nothing."""
    run = make_run("full")
    verdicts = {"second": gate("fail"), "third": gate("pass"), "first": {}}
    for minutes, (name, verdict) in enumerate(verdicts.items()):
        os.utime(
            write_evaluation(run, name, **verdict) / "metrics.json", (60 * minutes, 60 * minutes)
        )
    assert push(run, "me/model", progress=False).changed


def test_a_recipe_with_a_gate_needs_a_verdict(make_run: Callable[..., Path], hub: Hub) -> None:
    """A gate that nobody has asked is no pass."""
    run = make_run("full", gate=[{"metric": "exact_match", "at_least": 0.9, "n": 100}])
    with pytest.raises(CheckFailed, match="the gate says nothing yet"):
        push(run, "me/model", progress=False)


def test_push_to_hub_in_a_recipe_is_this_push(
    make_run: Callable[..., Path], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """`push_to_hub: true` with `hub_model_id` pushes the finished run, private; without them nothing happens."""
    run = make_run("full")
    push_after_training(load_recipe(run / "recipe.yaml"))
    assert not hub.calls
    values = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    values |= {"push_to_hub": True, "hub_model_id": "me/from-recipe"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    push_after_training(load_recipe(run / "recipe.yaml"))
    assert (
        set(hub.repositories["me/from-recipe"].files) == MERGED
        and hub.repositories["me/from-recipe"].private
    )
    assert f"{hub.url}/me/from-recipe" in capsys.readouterr().out
