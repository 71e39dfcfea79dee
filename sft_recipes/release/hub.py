"""Push a finished run to the Hub: listed files only, private unless asked, nothing that must not
leave this machine.

The token comes from `hf auth login` or HF_TOKEN and from nowhere else. A push that was interrupted
goes on when it is run again: what has arrived is not sent twice. The client retries its uploads
itself; creating the repository, checking the card and, without hf_xet, the commit are retried here.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from sft_recipes import run_folder
from sft_recipes.errors import CheckFailed, HubUnavailable, InputError, Problem
from sft_recipes.model_folder import ADAPTER_CONFIG
from sft_recipes.recipe import Recipe
from sft_recipes.release.adapter import require_adapter
from sft_recipes.release.export import FOLDER, export
from sft_recipes.release.finished_run import (
    EXPORT,
    evaluations,
    finished_run,
)
from sft_recipes.release.links import require_no_outside_links
from sft_recipes.release.local_paths import is_hub_name, recipe_text
from sft_recipes.release.model_card import CARD, write_card
from sft_recipes.release.scan import Secrets, require_public
from sft_recipes.text_files import interpreting, read_json

# Everything that may leave a folder. Logs, data, optimizer states and pickles are not in here.
ALLOWED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    ADAPTER_CONFIG,
    CARD,
    run_folder.RECIPE,
]
WAITS = (1, 2, 4, 8)  # seconds between attempts


@dataclass(frozen=True)
class Pushed:
    """What a push did: the repository, the files it holds now, those of an earlier push that went,
    and whether anything is new.
    """

    url: str
    private: bool
    files: list[str]
    deleted: list[str]
    changed: bool

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def as_text(self) -> str:
        """The same for the terminal, with the next step."""
        end = f"pushed: {self.url} (private: {self.private})"
        return "\n".join([*self.files, "", end, "next: read the card there, as others will"])


def push(
    run: Path,
    repo: str,
    adapter_only: bool = False,
    public: bool = False,
    allow_failed_gate: bool = False,
    base_model: str | None = None,
    progress: bool = True,
) -> Pushed:
    """Push the merged or whole model of a run, or its adapter alone, with its card and recipe.

    A run that was not exported yet is. `base_model` is what an adapter's base is called on the Hub.
    Raises InputError without a token and for what must not be published (a secret, a path of this
    machine, a link out of the folder, anything at all to a public repository where a private one
    was asked for); CheckFailed if the gate did not pass, HubUnavailable if the Hub did not answer.
    """
    recipe = finished_run(run)
    require_no_outside_links(run)
    if not allow_failed_gate:
        _require_gate(recipe, run)
    if adapter_only and not (run / ADAPTER_CONFIG).is_file():
        what = "the run has no adapter"
        raise InputError(Problem(str(run), "--adapter_only", what, "leave the option out"))
    api = HfApi(token=require_token())
    if adapter_only:
        require_adapter(recipe, run, progress)
        folder = run
        write_card(run, None, repo)
    else:
        folder = run / FOLDER
        if not (folder / EXPORT).is_file():
            export(run, progress=progress)
        _require_compared(run, folder)
        require_no_outside_links(folder)
        write_card(run, folder, repo)
    with tempfile.TemporaryDirectory() as staging:
        gather(folder, recipe, base_model, Path(staging))
        return _upload(api, repo, public, Path(staging))


def push_after_training(recipe: Recipe) -> None:
    """What `push_to_hub: true` in a recipe means, once its run is finished. Raises as `push`."""
    if recipe.values.get("push_to_hub"):
        print("pushed:", push(recipe.output_dir, recipe.values["hub_model_id"]).url)


def check_push(recipe: Recipe) -> None:
    """Raise InputError where the finished run could not be pushed, which training wants to know early."""
    wanted = bool(recipe.values.get("push_to_hub"))
    if wanted != bool(recipe.values.get("hub_model_id")):
        key = "push_to_hub" if wanted else "hub_model_id"
        what = "push_to_hub: true and hub_model_id go together"
        raise InputError(Problem(recipe.place(key), key, what, "set both or none"))
    if wanted:
        require_token()


def require_token() -> str:
    """The user's token. Raises InputError if there is none."""
    if token := get_token():
        return token
    fix = "run `hf auth login`, or set HF_TOKEN in the environment"
    raise InputError(Problem("Hub", "", "there is no token to push with", fix))


def _require_compared(run: Path, folder: Path) -> None:
    """Raise InputError for the export of an adapter that was never compared with its base."""
    if not (run / ADAPTER_CONFIG).is_file():
        return
    path = folder / EXPORT
    fix = f"sft-recipes export {run} --force"
    found = run_folder.read_json(path, fix)
    with interpreting(str(path), fix):
        is_compared = "base" in found["compared"]
    if not is_compared:
        what = "an earlier version exported this, which asked for no effect of an adapter"
        raise InputError(Problem(str(path), "compared", what, fix))


def _require_gate(recipe: Recipe, run: Path) -> None:
    """The newest verdict has to be a pass, and a recipe with a gate has to have one."""
    verdict = "nothing yet" if recipe.values.get("gate") else "pass"
    for evaluation in evaluations(run).values():
        if "gate" in evaluation:
            verdict = evaluation["gate"]["verdict"]
            break
    if verdict != "pass":
        fix = f"sft-recipes evaluate {run} --gate ..., or push with --allow_failed_gate"
        raise CheckFailed(str(Problem(str(run), "", f"the gate says {verdict}", fix)))


# -- what may leave --------------------------------------------------------------------------------


def gather(folder: Path, recipe: Recipe, base_model: str | None, staging: Path) -> None:
    """Put what may leave a folder into `staging`: links to the files as they stand, and those that
    are published otherwise, the recipe without paths and the adapter's configuration with its base.

    Raises InputError for an adapter whose base others could not load, and naming file, line and
    field of every secret and every path of this machine; a secret is never shown.
    """
    for path in sorted(folder.iterdir()):
        if path.is_file() and _matches(path.name, ALLOWED):
            (staging / path.name).symlink_to(path.resolve())
    _write_instead(staging / run_folder.RECIPE, recipe_text(recipe))
    if (staging / ADAPTER_CONFIG).exists():
        config = _adapter_config(folder / ADAPTER_CONFIG, base_model)
        _write_instead(staging / ADAPTER_CONFIG, json.dumps(config, indent=2))
    require_public(staging, folder, Secrets.of_this_machine(folder))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _write_instead(path: Path, text: str) -> None:
    """Write a file in the place of a link, not through it."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _adapter_config(path: Path, base_model: str | None) -> dict[str, Any]:
    """An adapter's configuration with its base as others find it."""
    config = read_json(path, "train the run again")
    base = base_model or str(config.get("base_model_name_or_path"))
    if not is_hub_name(base):
        what = f"{base} is a folder here"
        fix = "add --base_model NAME_ON_THE_HUB, or push it merged"
        raise InputError(Problem(str(path), "base_model_name_or_path", what, fix))
    return {**config, "base_model_name_or_path": base}


# -- the Hub ---------------------------------------------------------------------------------------


def _upload(api: HfApi, repo: str, public: bool, staging: Path) -> Pushed:
    """Upload the gathered files, and delete those of an earlier push that are no part of the model
    any more: an adapter left beside merged weights would be put on top of them by whoever loads it.
    """
    url = _patiently(repo, lambda: api.create_repo(repo, private=not public, exist_ok=True))
    repo = url.repo_id
    before = _patiently(repo, lambda: api.model_info(repo))
    if not before.private and not public:
        what = "the repository exists and is public"
        raise InputError(Problem(repo, "--repo", what, "make it private first, or add --public"))
    names = sorted(path.name for path in staging.iterdir())
    deleted = []
    for file in before.siblings or []:
        if _matches(file.rfilename, ALLOWED) and file.rfilename not in names:
            deleted.append(file.rfilename)
    deleted.sort()
    commit = _patiently(
        repo,
        lambda: api.upload_folder(
            repo_id=repo,
            folder_path=staging,
            allow_patterns=ALLOWED,
            delete_patterns=deleted or None,
            commit_message="Pushed by sft-recipes",
        ),
    )
    return Pushed(
        url=str(url),
        private=bool(before.private),
        files=names,
        deleted=deleted,
        changed=commit.oid != before.sha,
    )


def _patiently(repo: str, call: Callable[[], Any]) -> Any:
    """The call's result, tried again where the Hub or the network may yet answer.

    Raises InputError where the answer is no, HubUnavailable where there is none.
    """
    waits = iter(WAITS)
    while True:
        try:
            return call()
        except (HTTPError, ValueError, ConnectionError, RuntimeError) as raised:
            # The client wraps what went wrong while a file was sent.
            error = raised.__cause__ if type(raised) is RuntimeError else raised
            if not isinstance(error, (HTTPError, ValueError, ConnectionError)):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            if not _is_busy(error):
                fix = "check name and card, and that your token may write there (`hf auth whoami`)"
                raise InputError(Problem(repo, "", reason, fix)) from error
            wait = next(waits, None)
            if wait is None:
                what = f"nothing was published: {reason}"
                fix = "push again; what has arrived is not sent twice"
                raise HubUnavailable(str(Problem(repo, "", what, fix))) from error
        time.sleep(wait)


def _is_busy(error: Exception) -> bool:
    """Whether the same call may succeed later: no answer, one that is no JSON, an overload."""
    if isinstance(error, json.JSONDecodeError):
        return True
    if isinstance(error, ConnectionError):  # hf_xet's, or the client's wish to stay offline
        return not isinstance(error, OfflineModeIsEnabled)
    if not isinstance(error, HTTPError):  # a name or a card that the Hub cannot take
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code >= 500 or response.status_code in (408, 429)
