"""`replay`: a model answers general prompts before it is tuned, and its answers are mixed in later.

Narrow tuning forgets; rows that the model wrote itself show it what it could do. Answers are greedy,
one row each with the place of its prompt; those that would teach what nobody wants (empty, cut,
looping, with control tokens) are left out and counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from sft_recipes import models, run_folder
from sft_recipes.data.chat_templates import attach_chat_template
from sft_recipes.data.labels import Labeller
from sft_recipes.data.loading import RejectLog
from sft_recipes.data.prompt_groups import prompt_group, prompt_text
from sft_recipes.data.prompts import read_questions
from sft_recipes.data.reading.json_reader import append_json_lines
from sft_recipes.errors import InputError, Problem
from sft_recipes.evaluation.answering import answer
from sft_recipes.evaluation.generation import default_batch_size
from sft_recipes.messages import Example, Message
from sft_recipes.recipe import DataSettings
from sft_recipes.recipe_keys import make_data_recipe
from sft_recipes.text_files import read_json_lines

# Why an answer is left out, by its flag; the first that it has counts.
LEFT_OUT = {
    "empty": "empty",
    "unterminated": "cut at the budget",
    "loop": "looping",
    "special_token_leak": "with control tokens",
    "template_leak": "with text of the template",
    "next_turn": "with a next turn",
}
TOO_LONG = "prompt too long for the model"
_OPEN: Message = {"role": "assistant", "content": None}


@dataclass(frozen=True)
class ReplayRequest:
    """What the `replay` command was asked for. `options`: recipe keys that say how prompts are read.

    `rows`: how many prompts are drawn.
    """

    model: str
    prompts: str
    rows: int
    output: Path
    max_new_tokens: int
    batch_size: int | None = None
    force: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unfinished(self) -> Path:
        """Where answers stand until all are there."""
        return self.output.with_name(f"{self.output.name}.unfinished")


class _Drawn(NamedTuple):
    """The prompts to ask, and what became of every row that was read."""

    prompts: Sequence[Example]
    account: Mapping[str, int]


@dataclass(frozen=True)
class Replay:
    """What was written where; `read` and `asked` say what became of each row and each prompt."""

    output: Path
    read: Mapping[str, int]
    asked: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain data for `replay --json`."""
        return {"output": str(self.output), "read": dict(self.read), "asked": dict(self.asked)}

    def as_text(self, model: str) -> str:
        """The account, and what to do with the file."""
        return (
            f"{_account('rows read', self.read)}\n{_account('prompts asked', self.asked)}\n"
            f"wrote {self.output}\n\n"
            f"next: sft-recipes init --model {model} --data DATA --replay {self.output}"
        )


def _account(of_what: str, counts: Mapping[str, int]) -> str:
    parts = [f"{count} {name}" for name, count in counts.items()]
    return f"{sum(counts.values())} {of_what}: {', '.join(parts)}"


def write_replay(request: ReplayRequest, progress: bool = True) -> Replay:
    """Let the model answer a seeded sample of the prompts, and write the rows.

    Answers are kept as they come: the same request goes on where it was stopped. Raises InputError
    for a file that exists, prompts that cannot be read, and where no answer is of use.
    """
    _check_output(request)
    loaded = models.load_for_inference(request.model)
    settings = make_data_recipe(request.prompts, {**request.options, "allow_empty_output": True})
    renderer = attach_chat_template(loaded.tokenizer, settings.template)
    labeller = Labeller(renderer, settings.labels)
    drawn = _draw(settings.data, request.rows)
    answers = _Answers(request, loaded.model, labeller)
    answers.resume(drawn.prompts)
    answers.ask(drawn.prompts, progress)
    asked = Counter(entry["left_out"] or "written" for entry in answers.entries)
    if not asked["written"]:
        request.unfinished.unlink()
        what = f"none of its answers is of use ({_account('prompts asked', asked)})"
        fix = "raise --max_new_tokens, or use a model that is tuned to answer"
        raise InputError(Problem(request.model, "", what, fix))
    rows = [json.dumps(entry["row"], ensure_ascii=False) for entry in answers.written()]
    run_folder.write_text(request.output, "\n".join(rows) + "\n")
    request.unfinished.unlink()
    return Replay(request.output, drawn.account, asked)


def _check_output(request: ReplayRequest) -> None:
    """Raise InputError for a file that must not be written."""
    output = request.output
    if output.resolve() == Path(request.prompts).resolve():
        fix = "choose another --output"
        raise InputError(Problem(str(output), "--output", "the prompts stand there", fix))
    if output.is_symlink() or (output.exists() and not request.force):
        fix = "choose another --output, or add --force"
        raise InputError(Problem(str(output), "--output", "exists already", fix))


def _draw(data: DataSettings, rows: int) -> _Drawn:
    """The prompts with the smallest seeded hashes, so that equal ones are drawn once."""
    rejects = RejectLog(data)
    source = data.datasets[0]
    account = Counter({"drawn": 0})
    known: set[int] = set()
    drawn: dict[int, Example] = {}
    for example in read_questions(source, data, rejects):
        if not example.messages or example.tools:
            account["without a question, or with tools"] += 1
            continue
        group = prompt_group(prompt_text(example), data.seed)
        if group in known:
            account["with a prompt that was there before"] += 1
            continue
        known.add(group)
        drawn[group] = example
        if len(drawn) > 2 * rows:
            drawn = _smallest(drawn, rows)
    drawn = _smallest(drawn, rows)
    if not drawn:
        fix = "name a data set of prompts or conversations"
        raise InputError(Problem(source.path, "", "no row has a question without tools", fix))
    account["drawn"] = len(drawn)
    account["not drawn"] = len(known) - len(drawn)
    account["broken"] = rejects.total
    return _Drawn(list(drawn.values()), +account)


def _smallest(drawn: Mapping[int, Example], count: int) -> dict[int, Example]:
    return {group: drawn[group] for group in sorted(drawn)[:count]}


class _Answers:
    """The answers so far: in memory, and in the unfinished file behind the request they belong to."""

    def __init__(self, request: ReplayRequest, model: Any, labeller: Labeller) -> None:
        self._request = request
        self._model = model
        self._labeller = labeller
        self._decoding = f"greedy, at most {request.max_new_tokens} new tokens, {model.dtype}"
        self.entries: list[Mapping[str, Any]] = []

    def resume(self, prompts: Sequence[Example]) -> None:
        """Read what an earlier call left.

        Raises InputError if that asked something else.
        """
        path = self._request.unfinished
        settings = self._settings(prompts)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            append_json_lines(path, [settings])
            return
        fix = f"delete {path}, or ask the same again"
        first, *entries = [line.content for line in read_json_lines(path, fix)] or [{}]
        if first != settings:
            what = "holds answers to another request"
            raise InputError(Problem(str(path), "", what, fix))
        self.entries += entries

    def _settings(self, prompts: Sequence[Example]) -> dict[str, Any]:
        """What decides on the answers."""
        texts = json.dumps([[prompt.where, prompt_text(prompt)] for prompt in prompts])
        request = self._request
        renderer = self._labeller.renderer
        return {
            "model": request.model,
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "decoding": self._decoding,
            "options": dict(request.options),
            "template": renderer.template_text,
        }

    def ask(self, prompts: Sequence[Example], progress: bool) -> None:
        """Ask what has no answer yet, batch by batch, and keep each batch at once."""
        answered = {entry["prompt"] for entry in self.entries}
        left = [prompt for prompt in prompts if prompt.where not in answered]
        size = self._request.batch_size or default_batch_size()
        print(f"answers are kept in {self._request.unfinished}; stopped, the same command goes on")
        with tqdm(
            total=len(prompts),
            initial=len(prompts) - len(left),
            desc="answering",
            unit=" prompts",
            disable=None if progress else True,
        ) as bar:
            for start in range(0, len(left), size):
                batch = left[start : start + size]
                entries = list(self._answered(batch))
                append_json_lines(self._request.unfinished, entries)
                self.entries += entries
                bar.update(len(batch))

    def _answered(self, prompts: Sequence[Example]) -> Iterator[dict[str, Any]]:
        """An entry for each prompt: its row, and why that is left out, or None."""
        renderer = self._labeller.renderer
        fitting = []
        for prompt in prompts:
            asked = self._labeller.for_template(prompt)
            if self._has_room_behind(renderer.prompt_ids(asked.messages)):
                fitting.append(replace(asked, messages=[*asked.messages, _OPEN]))
            else:
                yield {"prompt": prompt.where, "left_out": TOO_LONG, "row": None}
        if not fitting:
            return
        answered = answer(
            self._model,
            renderer,
            fitting,
            max_new_tokens=self._request.max_new_tokens,
            batch_size=len(fitting),
            template_segments=renderer.template_segments,
            progress=False,
        )
        for example, judged, generation in zip(
            fitting, answered.rows(), answered.generations, strict=True
        ):
            yield {
                "prompt": example.where,
                "left_out": _fault(judged["flags"]),
                "row": self._row(example, generation.text),
            }

    def _has_room_behind(self, ids: Sequence[int]) -> bool:
        config = self._model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        return limit is None or len(ids) + self._request.max_new_tokens <= limit

    def _row(self, asked: Example, text: str) -> dict[str, Any]:
        return {
            "messages": [*asked.messages[:-1], {"role": "assistant", "content": text}],
            "source": asked.where,
            "model": self._request.model,
            "decoding": self._decoding,
        }

    def written(self) -> Iterator[Mapping[str, Any]]:
        """The entries that are not left out."""
        for entry in self.entries:
            if entry["left_out"] is None:
                yield entry


def _fault(flags: Sequence[str]) -> str | None:
    """Why an answer with these flags is left out, or None."""
    for flag, reason in LEFT_OUT.items():
        if flag in flags:
            return reason
    return None
