"""The model card: `README.md` of a run folder, rendered from what the run wrote about itself.

Whatever the run did not write says "not recorded". Words and metadata stand in `model_card.md.jinja`; the metadata,
with every metric as `model-index`, follows https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from sft_recipes import run_folder
from sft_recipes.errors import InputError, Problem
from sft_recipes.messages import visible
from sft_recipes.recipe import Recipe
from sft_recipes.recipe_keys import load_recipe
from sft_recipes.report.evaluation_report import METRIC_TEXTS
from sft_recipes.report.page import format_estimate
from sft_recipes.response_patterns import mask

CARD = "README.md"
EXPORT = "export.json"  # what the export of a run found, beside the exported model
ADAPTER_CONFIG = "adapter_config.json"
MARK = (
    "<!-- Rendered by sft-recipes from the run folder. Delete this line to keep your own edits. -->"
)
# TRL and peft write cards at every checkpoint. A card without any of these was written by people and is kept.
_REPLACED = (
    MARK,
    "generated_from_trainer",
    "has been trained using [TRL]",
    "# Model Card for Model ID",
)
SAMPLES = 4
_TEXTS = ("system_prompt", "chat_template_kwargs")  # may begin with a slash and are no paths
# Where people keep files; a path elsewhere that is not one of this run is not told from text.
_FOLDERS = "home|Users|root|mnt|media|tmp|var|opt|srv|data|scratch|workspace|nfs|fsx|gpfs|lustre"
LOCAL_PATH = rf"(?<![\w.:/])/(?:{_FOLDERS})/[\w.@+-][^\s\"'`)\],;]*|\b[A-Za-z]:\\[^\s\"'`]+"
_HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|csv|parquet|arrow)$)\w[\w.-]*(?:/[\w.-]+)?")


def finished_run(run: Path) -> Recipe:
    """The recipe of a finished run. Raises InputError for any other folder."""
    if not run_folder.is_run_folder(run):
        raise InputError(
            Problem(str(run), "", "this is no run folder", "name the output_dir of a finished run")
        )
    state = run_folder.read_state(run).get("state")
    if state != "finished":
        fix = f"let it finish: sft-recipes train {run / run_folder.RECIPE}"
        raise InputError(
            Problem(
                str(run / run_folder.RUN_STATE), "state", f"the run is {state}, not finished", fix
            )
        )
    return load_recipe(run / run_folder.RECIPE)


def evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """The run's evaluations by name, the newest first: the content of their `metrics.json`."""
    paths = sorted(
        run.glob(f"{run_folder.EVALUATIONS}/*/metrics.json"), key=lambda path: -path.stat().st_mtime
    )
    return {path.parent.name: run_folder.read_json(path) for path in paths}


def write_card(run: Path, folder: Path | None = None, repo: str | None = None) -> Path:
    """Write the card of a run to its README.md, or to that of the folder it was exported to.

    A card that people wrote into the run folder is kept, and copied to `folder`. `repo` is its name on the Hub.
    """
    path, old = (folder or run) / CARD, run / CARD
    text = old.read_text(encoding="utf-8") if old.is_file() else MARK
    if any(made in text for made in _REPLACED):
        text = render_card(run, folder, repo)
    path.write_text(text, encoding="utf-8")
    return path


def render_card(run: Path, exported: Path | None = None, repo: str | None = None) -> str:
    """The card as Markdown, of what stands in the run folder or of the model that was `exported` from it."""
    recipe, scores, log = finished_run(run), evaluations(run), run / run_folder.LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    content = {
        **{
            "recipe": recipe,
            "labels": recipe.labels,
            "set": public(recipe.values),
            "yaml": recipe_text(recipe),
        },
        **{
            "name": repo or run.resolve().name,
            "base": public(recipe.model_name),
            "mark": MARK,
            "public": public,
        },
        **{"lora": (run / ADAPTER_CONFIG).is_file(), "exported": exported},
        **{"scores": scores, "metrics": METRIC_TEXTS, "samples": _samples(run, scores)},
        **{
            path.stem: _read(path) for path in (run / run_folder.DATA, run / run_folder.ENVIRONMENT)
        },
        **{
            "state": run_folder.read_state(run),
            "export": _read(exported / EXPORT) if exported else {},
        },
        "log": {key: value for line in lines for key, value in json.loads(line).items()},
    }
    return TEXTS.get_template("model_card.md.jinja").render(content)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as it is published: its keys as set, without the folders of this machine."""
    return yaml.safe_dump(
        {**public(recipe.values), "output_dir": "./"}, sort_keys=False, allow_unicode=True
    )


def is_hub_name(name: str) -> bool:
    """Whether this names something on the Hub, not a folder here."""
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def public(value: Any) -> Any:
    """Plain data of ours without the folders of this machine: `/a/b/c` and `../b/c` become `./c`."""
    if isinstance(value, Mapping):
        return {key: one if key in _TEXTS else public(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(one) for one in value]
    if isinstance(value, str) and re.match(r"(~|[A-Za-z]:)?[/\\]+\w|\.\.?[/\\]", value):
        return "./" + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _samples(run: Path, scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """Some answers of the newest evaluation, half of them wrong where there are wrong ones, masked."""
    path = run / run_folder.EVALUATIONS / next(iter(scores), "") / "samples.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        if path.is_file()
        else []
    )
    wrong, right = (
        [row for row in rows if (row["exact_match"] is True) is good] for good in (False, True)
    )
    chosen = [*wrong[: max(SAMPLES // 2, SAMPLES - len(right))], *right][:SAMPLES]
    texts = ("prompt", "reference", "response")
    return [
        {key: re.sub(LOCAL_PATH, "[local path]", mask(str(row[key] or ""))) for key in texts}
        for row in chosen
    ]


def _read(path: Path) -> dict[str, Any]:
    return run_folder.read_json(path) if path.is_file() else {}


_LOADER = jinja2.FileSystemLoader(Path(__file__).parent)
TEXTS = jinja2.Environment(
    loader=_LOADER, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
TEXTS.tests["hub_name"] = is_hub_name
TEXTS.filters |= {"estimate": format_estimate, "visible": visible}
