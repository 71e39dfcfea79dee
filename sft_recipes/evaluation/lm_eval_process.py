"""The process that asks: `python -m sft_recipes.evaluation.lm_eval_process SETTINGS [DATA]`.

lm-eval is imported here and nowhere else. It is its own command that runs (`lm-eval run --config
SETTINGS`); before it loads the model, the data of all tasks are loaded, so that what cannot be had
is said at once, and as an error of this project.
"""

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_recipes import crash, stop_request
from sft_recipes.errors import HubUnavailable, InputError, Problem, SFTRecipesError, suggest

TASKS = "tasks"  # beside the settings: the tasks of lm-eval that read local data
# What load_dataset calls the files of each suffix.
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_IFEVAL = "lm_eval.tasks.ifeval.instructions_util"
_PUNKT = "tokenizers/punkt_tab"


def write_local_tasks(data: Path, index: Mapping[str, Any], folder: Path) -> None:
    """Write a task for each folder `data/TASK`: lm-eval's own (or `data/*.yaml`), with these rows.

    `index` holds lm-eval's tasks by name. Raises InputError for a folder that is no task, or that
    lacks a split which the task reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for rows in sorted(data.iterdir()):
        files = {path.stem: path for path in sorted(rows.glob("*")) if path.suffix in _READERS}
        if not files:
            continue
        entry = index.get(rows.name)
        if entry is None or entry.cfg is None or not isinstance(entry.cfg.get("task"), str):
            fix = suggest(rows.name, index, "name the folder after a task of `lm-eval ls tasks`")
            raise InputError(Problem(str(rows), "--benchmark_data", "this is no task's name", fix))
        for split in _splits(entry.cfg):
            if split not in files:
                what = f"{rows.name} reads the split {split!r}, and there are {', '.join(files)}"
                fix = f"put its rows into {rows / f'{split}.jsonl'}"
                raise InputError(Problem(str(rows), "--benchmark_data", what, fix))
        task = {
            "include": str(entry.yaml_path),
            "custom_dataset": None,
            "dataset_name": None,
            "dataset_path": _READERS[next(iter(files.values())).suffix],
            "dataset_kwargs": {
                "data_files": {split: str(path.absolute()) for split, path in files.items()}
            },
        }
        text = yaml.safe_dump(task, sort_keys=False)
        (folder / f"{rows.name}.yaml").write_text(text, encoding="utf-8")


def _splits(task: Mapping[str, Any]) -> list[str]:
    """The splits that a task reads: rows to answer, and rows for examples."""
    answered = task.get("test_split") or task.get("validation_split")
    shown = task.get("fewshot_split") or task.get("training_split")
    return [split for split in (answered, shown) if split]


def _load_data(settings: Mapping[str, Any], data: Path | None) -> None:
    """Load the data of all tasks, from `data` or from the Hub. Raises InputError for unknown ones."""
    from lm_eval.tasks import TaskManager

    asked = settings["tasks"]
    paths = settings.get("include_path") or []
    manager = TaskManager(include_path=paths[:1])
    for name in asked:
        if not manager.match_tasks([name]):
            fix = suggest(name, manager.all_tasks, "`lm-eval ls tasks` lists what there is")
            what = f"lm-eval has no task {name!r}"
            raise InputError(Problem("command line", "--benchmark", what, fix))
    if data is not None:
        write_local_tasks(data, manager.task_index, Path(paths[1]))
        manager = TaskManager(include_path=paths)
    manager.load(manager.match_tasks(asked))
    _require_sentences()


def _require_sentences() -> None:
    """IFEval counts sentences with data of NLTK, and would miss them after all was generated."""
    if _IFEVAL not in sys.modules:
        return
    import nltk

    try:
        nltk.data.find(_PUNKT)
    except LookupError as error:
        what = "IFEval counts sentences with NLTK's punkt_tab, which is not here"
        fix = (
            "where there is network: python -m nltk.downloader -d DIR/nltk_data punkt_tab; "
            "DIR is that of --benchmark_data, or set NLTK_DATA=DIR/nltk_data"
        )
        raise InputError(Problem("NLTK", "punkt_tab", what, fix)) from error


def explain(error: BaseException) -> BaseException:
    """What lm-eval raised as an error of this project; signals stay what they are."""
    if isinstance(error, SFTRecipesError | KeyboardInterrupt):
        return error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    give = "give the rows: --benchmark_data DIR, with DIR/TASK/SPLIT.jsonl (docs/evaluation.md)"
    if crash.is_network_down(error):
        what = f"the Hub did not answer ({reason})"
        return HubUnavailable(str(Problem("lm-eval", "", what, f"run it again later, or {give}")))
    if "OfflineModeIsEnabled" in "".join(str(link) for link in crash.chain(error)):
        what = f"HF_HUB_OFFLINE is set, and the data are not here ({reason})"
        return InputError(Problem("lm-eval", "", what, f"unset it, or {give}"))
    fix = f"change what it names; {crash.DEBUG}=1 shows where in lm-eval it comes from"
    return InputError(Problem("lm-eval", "", reason, fix))


def main(settings: Path, data: Path | None = None) -> int:
    """Load, ask, score and write lm-eval's own files; returns the exit code."""
    stop_request.listen_for_parent(signal.SIGTERM)
    try:
        from lm_eval.__main__ import cli_evaluate

        _load_data(yaml.safe_load(settings.read_text(encoding="utf-8")), data)
        sys.argv = ["lm-eval", "run", "--config", str(settings)]
        cli_evaluate()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - told as a line, not as a traceback
        return crash.tell(explain(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
