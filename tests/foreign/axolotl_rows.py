"""Run by the python of an environment with axolotl: rows as axolotl itself makes them.

Reads `[{"tokenizer": FOLDER, "config": {...}, "rows": [...]}, ...]` from stdin and writes to the file that is named as
its argument, for each row, `{"input_ids", "labels"}`, null where axolotl drops it, or a text where it raises an error.
"""

from __future__ import annotations

import copy
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from datasets import Dataset, disable_progress_bars
from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer


def row_of(row: dict[str, Any], config: Any, tokenizer: Any) -> Any:
    """What becomes of one row of a data set."""
    dataset_config = config.datasets[0]
    base, _, style = dataset_config.type.partition(":")
    try:
        dataset, _ = get_dataset_wrapper(
            dataset_config=dataset_config,
            tokenizer=tokenizer,
            cfg=config,
            dataset_base_type=base,
            dataset=Dataset.from_list([row]),
            dataset_prompt_style=style or None,
        )
        rows = list(handle_long_seq_in_dataset(dataset, config.sequence_len, config))
    except (ValueError, TemplateError) as error:
        return f"{type(error).__name__}: {error}"
    return {key: rows[0][key] for key in ("input_ids", "labels")} if rows else None


disable_progress_bars()
load = cache(AutoTokenizer.from_pretrained)
answers = []
for job in json.load(sys.stdin):
    tokenizer = copy.deepcopy(load(job["tokenizer"]))
    config = DictDefault(job["config"])
    for name, token in (config.special_tokens or {}).items():
        tokenizer.add_special_tokens({name: AddedToken(token, normalized=False)})
    answers.append([row_of(row, config, tokenizer) for row in job["rows"]])
Path(sys.argv[1]).write_text(json.dumps(answers), encoding="utf-8")
