"""Run by the python of an environment with LLaMA-Factory: rows as LLaMA-Factory itself makes them.

Reads `[{"tokenizer": FOLDER, "config": {...}, "rows": [...]}, ...]` from stdin and writes to the file that is named as
its argument, for each row, `{"input_ids", "labels"}`, or null where LLaMA-Factory drops it.
"""

from __future__ import annotations

import copy
import json
import sys
import types
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("torchaudio") is None:  # it is imported for sounds only
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
from llamafactory.hparams.data_args import DataArguments
from transformers import AutoTokenizer


def row_of(row: dict[str, Any], processor: SupervisedDatasetProcessor, formatting: str) -> Any:
    """What becomes of one row of a data set: a list of messages, or an instruction and its output."""
    attributes = DatasetAttr("file", "rows")
    if "messages" in row:
        attributes.messages = "messages"
        attributes.role_tag = "role"
        attributes.content_tag = "content"
        attributes.user_tag = "user"
        attributes.assistant_tag = "assistant"
    converter = get_dataset_converter(formatting, attributes, processor.data_args)
    converted = converter(row)
    rows = processor.preprocess_dataset({key: [value] for key, value in converted.items()})
    if not rows.get("input_ids"):
        return None
    return {key: rows[key][0] for key in ("input_ids", "labels")}


load = cache(AutoTokenizer.from_pretrained)
ORIGINALS = copy.deepcopy(TEMPLATES)
answers = []
for job in json.load(sys.stdin):
    tokenizer = copy.deepcopy(load(job["tokenizer"]))
    formatting = job["config"].pop("formatting")
    TEMPLATES.update(copy.deepcopy(ORIGINALS))  # settings are written into them
    arguments = DataArguments(**job["config"])
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    template.mm_plugin = get_mm_plugin("base")  # those of models that see ask for a processor
    processor = SupervisedDatasetProcessor(template, tokenizer, None, arguments)
    answers.append([row_of(row, processor, formatting) for row in job["rows"]])
Path(sys.argv[1]).write_text(json.dumps(answers), encoding="utf-8")
