"""The label rules against the tools themselves, where the environment names a python that has one.

SFT_RECIPES_AXOLOTL_PYTHON, SFT_RECIPES_LLAMAFACTORY_PYTHON and SFT_RECIPES_TORCHTUNE_PYTHON name the python of
a virtual environment with axolotl 0.19, LLaMA-Factory 0.9.5 or torchtune 0.6.1. With SFT_RECIPES_TOKENIZERS real
vocabularies are taken, too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft_recipes.data.chat_templates import ChatRenderer, load_chat_template
from sft_recipes.foreign.label_rules.rows import (
    DroppedThere,
    TheirRow,
    shared_length,
    their_rows,
)
from tests.data.template_tokenizers import build_tokenizer
from tests.foreign.label_cases import (
    INSTRUCTIONS,
    Job,
    axolotl_jobs,
    llamafactory_jobs,
    save_tokenizers,
    torchtune_jobs,
)

Jobs = Callable[[Sequence[str]], Iterator[Job]]
TOOLS: dict[str, Jobs] = {
    "axolotl": axolotl_jobs,
    "llamafactory": llamafactory_jobs,
    "torchtune": torchtune_jobs,
}


def python_of(tool: str) -> str:
    """The python that has a tool; skips the test where none is named."""
    variable = f"SFT_RECIPES_{tool.upper()}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no python with {tool}")
    return os.environ[variable]


def ask(tool: str, jobs: Sequence[dict[str, Any]], folder: Path) -> list[list[Any]]:
    """What the tool itself makes of the rows of each job."""
    script = Path(__file__).with_name(f"{tool}_rows.py")
    environment = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        # LLaMA-Factory refuses versions of transformers that are newer than itself.
        "DISABLE_VERSION_CHECK": "1",
    }
    answer = folder / "answer.json"
    done = subprocess.run(
        [python_of(tool), str(script), str(answer)],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[list[Any]] = json.loads(answer.read_text(encoding="utf-8"))
    return answers


def difference(ours: Any, theirs: Any) -> str:
    """How what was computed differs from what the tool made; empty where it does not."""
    if not isinstance(theirs, dict):
        return "" if isinstance(ours, DroppedThere) else f"{ours} where the tool says {theirs!r}"
    if not isinstance(ours, TheirRow):
        return f"{ours} where the tool makes a row"
    for part in ("input_ids", "labels"):
        computed = getattr(ours, part)
        made = theirs[part]
        if computed != made:
            place = shared_length(computed, made)
            return f"{part} from {place}: {computed[place:][:9]}, the tool makes {made[place:][:9]}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_rows_are_those_of_the_tool(tool: str, tmp_path: Path) -> None:
    """Ids and labels of every job are the tool's own, and what it drops or refuses is said to be dropped."""
    python_of(tool)
    folders = save_tokenizers(tmp_path)
    jobs = list(TOOLS[tool](list(folders)))
    asked = []
    for job in jobs:
        folder = folders[job.tokenizer]
        asked.append({"tokenizer": folder, "config": dict(job.config), "rows": list(job.rows)})
    load = cache(AutoTokenizer.from_pretrained)  # the rules leave it as it is
    wrong = []
    rows = 0
    for job, answers in zip(jobs, ask(tool, asked, tmp_path), strict=True):
        tokenizer = load(folders[job.tokenizer])
        computed = their_rows(job.examples, tokenizer, job.rules)
        for number, (ours, theirs) in enumerate(zip(computed, answers, strict=True)):
            rows += 1
            found = difference(ours, theirs)
            if found:
                wrong.append(f"{job.tokenizer} {dict(job.config)} row {number}: {found}")
    print(f"{tool}: {rows} rows of {len(jobs)} jobs")
    assert not wrong, f"{len(wrong)} of {rows}\n" + "\n".join(wrong[:20])


@pytest.mark.slow
def test_the_alpaca_template_writes_what_axolotl_writes(tmp_path: Path) -> None:
    """Instruction rows under our `alpaca` template are the text of axolotl's `type: alpaca`, byte for byte."""
    tokenizer: Any = build_tokenizer("", "<s>", "</s>", "<pad>")
    tokenizer.save_pretrained(tmp_path / "base")
    job = Job("axolotl", "base", {}, INSTRUCTIONS)
    config = {"datasets": [{"path": "x", "type": "alpaca"}], "sequence_len": 4096}
    asked = {"tokenizer": str(tmp_path / "base"), "config": config, "rows": INSTRUCTIONS}
    (answers,) = ask("axolotl", [asked], tmp_path)
    tokenizer.chat_template = load_chat_template("alpaca")
    renderer = ChatRenderer(tokenizer)
    for example, theirs in zip(job.examples, answers, strict=True):
        text = renderer.render(example.messages)
        assert tokenizer.decode(theirs["input_ids"]) == text
