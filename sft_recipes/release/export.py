"""Export a finished run: one folder with the whole model that a server loads, compared with what was trained.

An adapter is merged into its base at full precision, whatever the base was held in while it was trained. What stands
in the new folder is then loaded again and compared on real prompts: logits, greedy text, and the ids that a server
makes of the prompts. A folder that differs is not left behind.
"""

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from sft_recipes import run_folder
from sft_recipes.data.chat_templates import ChatRenderer
from sft_recipes.data.labels import IGNORE_INDEX, Labeller
from sft_recipes.data.opening import load_tokenizer
from sft_recipes.data.template_checks import Outcome, TemplateCheck, check_template, require
from sft_recipes.errors import CheckFailed, InputError, Problem, suggest
from sft_recipes.messages import Example
from sft_recipes.models import agree_on_special_tokens, load_weights
from sft_recipes.recipe import LabelSettings
from sft_recipes.release.model_card import (
    ADAPTER_CONFIG,
    EXPORT,
    TEXTS,
    finished_run,
    recipe_text,
    write_card,
)

FOLDER = "export"  # inside the run folder
ROWS, PROMPTS, NEW_TOKENS, POSITIONS = (
    200,
    8,
    32,
    16,
)  # rows linted, prompts answered, tokens and logits of each
# Largest difference of a logit as a share of the largest logit: rounding, and nothing else.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
# What a client may send of a message.
_SENT = ("role", "content", "tool_calls", "name", "reasoning_content")
WITH_INPUT = "if the client writes instruction, empty line, `### Input:`, new line, input into the user's message"
_Answers = Sequence[tuple[torch.Tensor, list[int]]]


def export(
    run: Path,
    output: Path | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the servable folder of a finished run, `RUN/export` unless `output` says otherwise, and say what was found.

    `dtype` is the precision of the file; left out it is float32 for a merged adapter, and the run's own for a whole
    model. Raises InputError for an unfinished run or a folder that exists (`force` replaces an earlier export), and
    CheckFailed, leaving nothing behind, if the exported model or its template is not what was trained.
    """
    recipe, folder, adapter = (
        finished_run(run),
        output or run / FOLDER,
        (run / ADAPTER_CONFIG).is_file(),
    )
    if folder.exists() and not (force and (folder / EXPORT).is_file()):
        fix = "choose another --output, or add --force to replace an earlier export"
        raise InputError(Problem(str(folder), "--output", "the folder exists", fix))
    if dtype and dtype not in TOLERANCES:
        raise InputError(
            Problem(
                "command line", "--dtype", f"{dtype!r} is no precision", suggest(dtype, TOLERANCES)
            )
        )
    renderer = ChatRenderer(load_tokenizer(str(run)), recipe.template.chat_template_kwargs)
    examples = _real_examples(run)
    rows = Labeller(renderer, recipe.labels).label(examples).rows[:PROMPTS]
    prompts = [row.input_ids[: max(1, row.spans[0][0])] for row in rows]
    model = _load(
        *((recipe.model_name, recipe.model.get("model_revision")) if adapter else (str(run), None))
    )
    dtype = dtype or ("float32" if adapter else str(model.dtype).removeprefix("torch."))
    model, compared = model.float(), {}
    if adapter:
        model = PeftModel.from_pretrained(model, str(run)).eval()
    trained = _ask("trained", model, prompts, renderer, progress)
    if adapter:
        model = model.merge_and_unload(safe_merge=True)
        merged = _ask("merged", model, prompts, renderer, progress)
        compared["merged"] = _compare("merged", trained, merged, "float32")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _save(model.to(getattr(torch, dtype)), renderer, partial)
        del model
        gc.collect()
        model = _load(str(partial)).float()
        saved = _ask("saved", model, prompts, renderer, progress)
        compared["saved"] = _compare("saved", trained, saved, dtype)
        checks = lint(model, partial, renderer, recipe.labels, examples)
        require(checks)
        found: dict[str, Any] = {
            "dtype": dtype,
            "compared": compared,
            "checks": [*map(asdict, checks)],
        }
        run_folder.write_json(partial / EXPORT, found)
        (partial / run_folder.RECIPE).write_text(recipe_text(recipe), encoding="utf-8")
        write_card(run, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {**found, "folder": str(folder)}


def as_text(found: Mapping[str, Any], run: Path) -> str:
    """What `export` found, for the terminal, with the next steps."""
    return TEXTS.get_template("export.txt.jinja").render(
        found, run=run, path=Path(found["folder"]).absolute()
    )


def lint(
    model: Any,
    folder: Path,
    trained: ChatRenderer,
    settings: LabelSettings,
    examples: Sequence[Example],
) -> list[TemplateCheck]:
    """Checks of an exported folder as a server loads it. `trained` renders as in training; `examples` are real rows."""
    served, stops = ChatRenderer(load_tokenizer(str(folder))), trained.stop_ids
    checks = check_template(Labeller(served, settings), examples)
    # A template whose generation prompt does not begin the trained text was accepted, with a note, before training.
    noted = any(
        check.name == "training equals serving" and check.outcome == "note" for check in checks
    )
    places = (served.tokenizer, model.config.get_text_config(), model.generation_config)
    eos, pad = (
        [getattr(place, key) for place in places] for key in ("eos_token_id", "pad_token_id")
    )
    stops_there = eos[0] == eos[1] in stops and eos[2] == ([*stops] if len(stops) > 1 else stops[0])
    for name, ids, good in (
        ("EOS", eos, stops_there),
        ("PAD", pad, pad[0] == pad[1] == pad[2] not in stops),
    ):
        detail = f"tokenizer, config, generation_config: {ids}"
        checks.append(TemplateCheck(name, "ok" if good else "failed", detail))
    fit, found = _compare_ids(served.tokenizer, Labeller(trained, settings), examples)
    outcomes: tuple[Outcome, ...] = ("note" if noted else "failed", "note", "ok")
    return [*checks, TemplateCheck("training ids are serving ids", outcomes[fit], found)]


def _compare_ids(served: Any, labeller: Labeller, examples: Sequence[Example]) -> tuple[int, str]:
    """Whether a server makes the ids of the training rows of what a client sends (role and content, no arguments): the
    worst fit of a row, and how many fit. `served` is the tokenizer of the exported folder.
    """
    rows = [row for row in labeller.label(examples).rows if row.turns and not row.neutralized]
    fits = []
    for row in rows:
        example = labeller.for_template(examples[row.example])
        asked = example.messages[: row.turns[0]]
        sent = [{key: message[key] for key in _SENT if key in message} for message in asked]
        # Where the template gives `input` a section of its own, a client has to write the section itself.
        section = [
            f"{one['instruction']}\n\n### Input:\n{one['input']}" if one.get("input") else ""
            for one in asked
        ]
        written = [
            {**one, "content": text or one.get("content")}
            for one, text in zip(sent, section, strict=True)
        ]
        plain, by_hand = (
            _fit(row, served, messages, example.tools) for messages in (sent, written)
        )
        fits.append((max(plain, by_hand), plain, example.where))
    equal, with_input = sum(fit[1] == 2 for fit in fits), sum(fit[0] == 2 != fit[1] for fit in fits)
    worst, _, where = min(fits, default=(2, 2, ""))
    text = f"{equal} of {len(rows)} prompts" + (
        f", {with_input} more {WITH_INPUT}" if with_input else ""
    )
    return worst, text + ("; not", "; only the text of")[worst] + f" {where}" if worst < 2 else text


def _fit(row: Any, tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any) -> int:
    """2 where a training row begins with the ids that a server makes of these messages, none of them trained; 1 where
    only its text does, because a token reaches over the end of the prompt; else 0.
    """
    prompt = tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True
    )["input_ids"]
    if row.input_ids[: len(prompt)] == prompt:
        return 2 * ({*row.labels[: len(prompt)]} <= {IGNORE_INDEX})
    return int(tokenizer.decode(row.input_ids).startswith(tokenizer.decode(prompt)))


def _load(source: str, revision: str | None = None) -> Any:
    """The model in the precision of its file. Raises InputError where that is a quantized one."""
    model = load_weights(source, "auto", revision)
    if getattr(model, "is_quantized", False):
        fix = "name the full-precision model and train with load_in_4bit: true"
        raise InputError(
            Problem(source, "model_name_or_path", "its weights are stored quantized", fix)
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _save(model: Any, renderer: ChatRenderer, folder: Path) -> None:
    """The model and its tokenizer; the arguments that the template was trained with become its defaults."""
    tokenizer, template = renderer.tokenizer, renderer.tokenizer.chat_template
    agree_on_special_tokens(model, tokenizer, renderer.stop_ids)
    model.config.get_text_config().use_cache = True  # off while training
    model.save_pretrained(folder)
    given = renderer.chat_template_kwargs.items()
    defaults = [
        f"{{% set {key} = {key} if {key} is defined else {value!r} +%}}" for key, value in given
    ]
    tokenizer.chat_template = "".join([*defaults, template]) if defaults else template
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = template


def _real_examples(run: Path) -> list[Example]:
    """Rows of the run's data, held-out ones where there are any."""
    path = run / run_folder.PREPARED / "eval_examples.jsonl"
    if not path.is_file():
        fix = f"run `sft-recipes prepare {run / run_folder.RECIPE}` first"
        raise InputError(Problem(str(path), "", "there are no rows to compare on", fix))
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, ROWS)]
    return [Example(**{key: value for key, value in row.items() if key != "group"}) for row in rows]


def _ask(
    what: str, model: Any, prompts: Sequence[Sequence[int]], renderer: ChatRenderer, progress: bool
) -> _Answers:
    """Per prompt the logits `[positions, vocabulary]` at its end, and the ids of the greedy answer."""
    answers, pad = [], renderer.tokenizer.pad_token_id
    for prompt in tqdm(prompts, f"asking the {what} model", disable=not progress, leave=False):
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, -POSITIONS:].cpu()
            settings = {
                "max_new_tokens": NEW_TOKENS,
                "eos_token_id": list(renderer.stop_ids),
                "pad_token_id": pad,
            }
            answer = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings
            )
        answers.append((logits, answer[0, len(prompt) :].tolist()))
    return answers


def _compare(what: str, trained: _Answers, other: _Answers, dtype: str) -> dict[str, float]:
    """The largest logit difference and the equal greedy texts. Raises CheckFailed where rounding does not explain it.

    In less than float32 a near tie may fall the other way, so there texts are counted and need not be equal.
    """
    pairs = list(zip(trained, other, strict=True))
    difference = max(float((one[0] - two[0]).abs().max()) for one, two in pairs)
    largest, equal = (
        max(float(one[0].abs().max()) for one, _ in pairs),
        sum(one[1] == two[1] for one, two in pairs),
    )
    if not difference <= TOLERANCES[dtype] * largest or (dtype == "float32" and equal < len(pairs)):
        found = f"logits differ by {difference:.3g}, greedy text is equal on {equal} of {len(pairs)} prompts"
        fix = "nothing was exported; report the model and its adapter settings"
        raise CheckFailed(
            str(Problem(what, "", f"this is not the model that was trained: {found}", fix))
        )
    return {
        "logit_difference": difference,
        "largest_logit": largest,
        "equal_texts": equal,
        "prompts": len(pairs),
    }
