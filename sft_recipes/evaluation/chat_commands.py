"""What a line of `chat` that begins with `/` does."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel

from sft_recipes.data.reading.json_reader import append_json_lines
from sft_recipes.data.turns import TEMPLATE_ERRORS
from sft_recipes.errors import InputError, Problem, suggest
from sft_recipes.evaluation.chat_speaker import AnswerSettings, Speaker
from sft_recipes.evaluation.open_run import OpenedRun, base_model, model_before
from sft_recipes.messages import Message

# Of a question such as "/etc/passwd: what is it?" more than a word follows the first stroke.
_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?")
HOTTEST = 2.0  # above, words come as if drawn from the whole vocabulary
_PROBE = "QZsystemZQ"


@dataclass
class Chat:
    """A conversation: who speaks, `tuned` and its `base` once it is loaded, and how.

    `settings.seed` counts the questions.
    """

    run: str
    opened: OpenedRun
    tuned: Speaker
    settings: AnswerSettings
    base: Speaker | None = None
    speakers: list[Speaker] = field(default_factory=list)
    is_over: bool = False

    def __post_init__(self) -> None:
        self.speakers = [self.tuned]


@dataclass(frozen=True, slots=True)
class Command:
    """A command: how it is written behind its name, what it does, and what it says when done."""

    usage: str
    help: str
    act: Callable[[Chat, str], str]


def obey(chat: Chat, line: str) -> str | None:
    """What the command in a line says when it is done; None for a line that is none.

    Raises InputError for a command that there is not, or not like this.
    """
    match = _COMMAND.fullmatch(line)
    if match is None:
        return None
    name, rest = match.groups()
    if name not in COMMANDS:
        fix = suggest(f"/{name}", [f"/{known}" for known in COMMANDS])
        raise InputError(Problem(f"/{name}", "", "there is no such command", fix))
    return COMMANDS[name].act(chat, (rest or "").strip())


def _help(_: Chat, __: str) -> str:
    lines = []
    for name, command in COMMANDS.items():
        lines.append(f"{f'/{name} {command.usage}':20}{command.help}")
    return "\n".join(lines)


def _reset(chat: Chat, _: str) -> str:
    for speaker in (chat.tuned, chat.base):
        if speaker is not None:
            speaker.history = []
    return "a new conversation"


def _system(chat: Chat, text: str) -> str:
    if text:
        _check_system_prompt(chat)
    chat.settings.system = text
    if text:
        return "the system prompt holds from the next question on"
    if chat.opened.labeller.settings.system_prompt:
        return "the system prompt is the recipe's again"
    return "no system prompt"


def _check_system_prompt(chat: Chat) -> None:
    """Raise InputError where the template refuses a system prompt, or leaves it out."""
    turns: list[Message] = [
        {"role": "system", "content": _PROBE},
        {"role": "user", "content": "QZuserZQ"},
    ]
    reason = "it leaves it out"
    try:
        if _PROBE in chat.opened.labeller.renderer.render(turns):
            return
    except TEMPLATE_ERRORS as error:
        reason = str(error)
    what = f"the chat template takes no system prompt ({reason})"
    raise InputError(Problem("/system", "", what, "write it at the beginning of the question"))


def _temperature(chat: Chat, text: str) -> str:
    try:
        temperature = float(text)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature <= HOTTEST:
        what = f"expected a number from 0 to {HOTTEST:g}, got {text!r}"
        raise InputError(Problem("/temperature", "", what, "write /temperature 0.7"))
    chat.settings.temperature = temperature
    if temperature:
        return f"words are drawn at temperature {temperature:g}; the same lines draw the same"
    return "always the likeliest word"


def _base(chat: Chat, word: str) -> str:
    if word not in ("on", "only", "off"):
        what = f"expected on, only or off, got {word!r}"
        raise InputError(Problem("/base", "", what, "write /base on"))
    if word == "off":
        chat.speakers = [chat.tuned]
        return "the tuned model answers"
    if chat.base is None:
        chat.base = _open_base(chat)
    if word == "only":
        chat.speakers = [chat.base]
        said = "the base answers alone"
    else:
        chat.speakers = [chat.tuned, chat.base]
        said = "tuned model and base answer"
    if len(chat.base.history) != len(chat.tuned.history):
        said += "; they have not heard the same, /reset lets both begin anew"
    return said


def _open_base(chat: Chat) -> Speaker:
    """The model before tuning: without the adapter, or loaded from where the run says it is."""
    labeller = chat.opened.labeller
    if isinstance(chat.tuned.model, PeftModel):
        return Speaker("base", chat.tuned.model, labeller, is_bare=True)
    name = model_before(chat.run, chat.opened.recipe, "/base")
    return Speaker("base", base_model(name, labeller.renderer.tokenizer), labeller)


def _save(chat: Chat, name: str) -> str:
    path = Path(name)
    if path.suffix != ".jsonl":
        raise InputError(Problem("/save", "", f"{name!r} is no .jsonl file", "/save chat.jsonl"))
    speaker = chat.speakers[0]
    if not speaker.history:
        raise InputError(Problem("/save", "", "nothing was said yet", "ask something first"))
    messages = list(speaker.history)
    if chat.settings.system:
        messages.insert(0, {"role": "system", "content": chat.settings.system})
    append_json_lines(path, [{"messages": messages}])
    return f"the conversation with {speaker.name} is a row of {path} now"


def _quit(chat: Chat, _: str) -> str:
    chat.is_over = True
    return "bye"


COMMANDS = {
    "help": Command("", "this list", _help),
    "reset": Command("", "forget what was said; system prompt and temperature stay", _reset),
    "system": Command("TEXT", "the system prompt; without a text it is as in the recipe", _system),
    "temperature": Command("N", "0: always the likeliest word; up to 2: drawn", _temperature),
    "base": Command("on|only|off", "let the model before tuning answer, too", _base),
    "save": Command("FILE", "add the conversation to a .jsonl file as training data", _save),
    "quit": Command("", "leave, as Ctrl-D does", _quit),
}
