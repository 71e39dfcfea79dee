"""Push a finished run to the Hub: listed files only, private unless asked, nothing that must not leave this machine.

The token comes from `hf auth login` or HF_TOKEN and from nowhere else. A push that was interrupted goes on when it is
run again: what has arrived is not sent twice. The client retries its uploads itself; creating the repository, checking
the card and the commit are retried here.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError

from sft_recipes import run_folder
from sft_recipes.errors import CheckFailed, InputError, Problem
from sft_recipes.recipe import Recipe
from sft_recipes.release import model_card
from sft_recipes.release.export import FOLDER, export
from sft_recipes.release.model_card import ADAPTER_CONFIG, EXPORT
from sft_recipes.response_patterns import PATTERNS, private_spans

# Everything that may leave a folder. Logs, data, optimizer states and pickles are not in here.
ALLOWED = """*.safetensors *.safetensors.index.json config.json generation_config.json tokenizer.json
tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt tokenizer.model
chat_template.jinja adapter_config.json README.md recipe.yaml""".split()
# Weights and vocabularies hold no text of ours; these do.
_READ = ("*config.json", "special_tokens_map.json", "*.jinja", "*.md", "*.yaml")
WAITS = (1, 2, 4, 8)  # seconds between attempts


def push(
    run: Path,
    repo: str,
    adapter_only: bool = False,
    public: bool = False,
    allow_failed_gate: bool = False,
    base_model: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Push the merged or whole model of a run, or its adapter alone, with its card and recipe; says what went where.

    A run that was not exported yet is. `base_model` is what an adapter's base is called on the Hub. Raises InputError
    without a token and for what must not be published (a secret, a path of this machine, anything at all to a public
    repository where a private one was asked for); CheckFailed if the gate did not pass or the Hub did not answer.
    """
    recipe = model_card.finished_run(run)
    if not allow_failed_gate:
        _require_gate(recipe, run)
    if adapter_only and not (run / ADAPTER_CONFIG).is_file():
        raise InputError(
            Problem(str(run), "--adapter_only", "the run has no adapter", "leave the option out")
        )
    api = HfApi(token=require_token())
    folder = run if adapter_only else run / FOLDER
    if not adapter_only and not (folder / EXPORT).is_file():
        export(run, progress=progress)
    model_card.write_card(run, None if adapter_only else folder, repo)
    return _upload(api, repo, public, publishable(folder, recipe, base_model))


def push_after_training(recipe: Recipe) -> None:
    """What `push_to_hub: true` in a recipe means, once its run is finished. Raises as `push`."""
    if recipe.values.get("push_to_hub"):
        print("pushed:", push(recipe.output_dir, recipe.values["hub_model_id"])["url"])


def require_token() -> str:
    """The user's token. Raises InputError if there is none, which training wants to know before it starts."""
    if token := get_token():
        return token
    fix = "run `hf auth login`, or set HF_TOKEN in the environment"
    raise InputError(Problem("Hub", "", "there is no token to push with", fix))


def _require_gate(recipe: Recipe, run: Path) -> None:
    """The newest verdict has to be a pass, and a recipe with a gate has to have one. Raises CheckFailed."""
    verdicts = [
        one["gate"]["verdict"] for one in model_card.evaluations(run).values() if "gate" in one
    ]
    verdict = next(iter(verdicts), "nothing yet" if recipe.values.get("gate") else "pass")
    if verdict != "pass":
        fix = f"sft-recipes evaluate {run} --gate ..., or push with --allow_failed_gate"
        raise CheckFailed(str(Problem(str(run), "", f"the gate says {verdict}", fix)))


def publishable(
    folder: Path, recipe: Recipe, base_model: str | None = None
) -> dict[str, Path | bytes]:
    """The files of a folder that may leave it, by name: as they stand, or the bytes they are published as.

    Raises InputError for an adapter whose base others could not load, and naming file, line and field of every secret
    and every path of this machine; a secret is never shown.
    """
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if _allowed(path.name)
    }
    files[run_folder.RECIPE] = model_card.recipe_text(recipe).encode()
    if ADAPTER_CONFIG in files:
        path = folder / ADAPTER_CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base = base_model or config["base_model_name_or_path"]
        if not model_card.is_hub_name(base):
            fix = "add --base_model NAME_ON_THE_HUB, or push it merged"
            raise InputError(
                Problem(str(path), "base_model_name_or_path", f"{base} is a folder here", fix)
            )
        files[ADAPTER_CONFIG] = json.dumps(config, indent=2).encode()
    known = (folder.resolve(), folder.resolve().parent, Path.cwd(), Path.home())
    here = [rf"(?<![\w.:/]){re.escape(str(path))}\b" for path in known if len(path.parts) > 1]
    problems, token = [], re.escape(require_token())
    for name in (name for name in files if any(fnmatchcase(name, pattern) for pattern in _READ)):
        # A template may tell its model of places, as gpt-oss's does; only those of this run are ours.
        paths = here if name.endswith(".jinja") else [*here, model_card.LOCAL_PATH]
        rules, content = {"path of this machine": "|".join(paths), "token": token}, files[name]
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8")
        found = [
            (kind, start)
            for kind, start, _ in private_spans(text)
            if PATTERNS["private"][kind].get("secret")
        ]
        found += [
            (kind, one.start()) for kind, rule in rules.items() for one in re.finditer(rule, text)
        ]
        for kind, start in found:
            before = text[:start]
            field = re.match(r'[\s"-]*([\w-]*)"?:', before.rpartition("\n")[2])
            where, what = (
                f"{folder / name}:{before.count(chr(10)) + 1}",
                f"holds a {kind.replace('_', ' ')}",
            )
            fix = "take it out (and revoke a token that was written down)"
            problems.append(Problem(where, field[1] if field else "", what, fix))
    if problems:
        raise InputError(problems)
    return files


def _allowed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def _upload(
    api: HfApi, repo: str, public: bool, files: Mapping[str, Path | bytes]
) -> dict[str, Any]:
    """One commit with all files. Files of an earlier push that are no part of the model any more are deleted with it:
    an adapter left beside merged weights would be put on top of them when they are loaded.
    """
    url = _patiently(repo, lambda: api.create_repo(repo, private=not public, exist_ok=True))
    repo = url.repo_id
    before = _patiently(repo, lambda: api.model_info(repo))
    if not before.private and not public:
        fix = "make it private first, or add --public"
        raise InputError(Problem(repo, "--repo", "the repository exists and is public", fix))
    there = {file.rfilename for file in before.siblings or []}
    deleted = sorted(name for name in there - files.keys() if _allowed(name))
    changes: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    changes += map(CommitOperationDelete, deleted)
    commit = _patiently(
        repo, lambda: api.create_commit(repo, changes, commit_message="Pushed by sft-recipes")
    )
    sent = {"url": str(url), "private": before.private, "files": [*files], "deleted": deleted}
    return {**sent, "changed": commit.oid != before.sha}


def _patiently(repo: str, call: Callable[[], Any]) -> Any:
    """The call's result, tried again where the Hub or the network may yet answer. Raises InputError or CheckFailed."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (HTTPError, ValueError, ConnectionError, RuntimeError) as raised:
            # The client wraps what went wrong while a file was sent.
            error = raised.__cause__ if type(raised) is RuntimeError else raised
            if not isinstance(error, (HTTPError, ValueError, ConnectionError)):
                raise
            status = getattr(getattr(error, "response", None), "status_code", 503)
            reason = " ".join(str(error).split()) or type(error).__name__
            # Behind a ValueError stands a name or a card that the Hub cannot take, unless its answer was no JSON.
            busy = status >= 500 or status in (408, 429)
            if not isinstance(error, (HTTPError, json.JSONDecodeError)) or not busy:
                fix = "check name and card, and that your token may write there (`hf auth whoami`)"
                raise InputError(Problem(repo, "", reason, fix)) from error
            if wait is None:
                fix = "push again; what has arrived is not sent twice"
                raise CheckFailed(
                    str(Problem(repo, "", f"nothing was published: {reason}", fix))
                ) from error
            time.sleep(wait)
    return None
