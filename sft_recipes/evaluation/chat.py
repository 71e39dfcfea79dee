"""Talk to a run, beside its base if asked for: rendered and decoded as in an evaluation."""

import contextlib
import io
import json
import sys

from sft_recipes import crash, models
from sft_recipes.errors import InputError
from sft_recipes.evaluation.chat_commands import Chat, obey
from sft_recipes.evaluation.chat_speaker import Answer, AnswerSettings, Speaker
from sft_recipes.evaluation.open_run import base_model, open_run
from sft_recipes.messages import visible

_BEGINNING = "A line is a turn. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."
# Behind an answer that did not end by itself.
_CUT = {"length": " [cut at max_new_tokens]", "stopped": " [stopped]"}


def chat(
    run: str, base: str | None, chat_template: str | None, max_new_tokens: int, as_json: bool
) -> None:
    """Let run and base answer each line of the standard input until `/quit` or its end.

    A line that begins with `/` and a word is a command. Every model has its own history. With
    `as_json` one object per answer. Answers go to stdout, any other word to stderr. The same lines
    get the same answers.
    """
    loaded = models.load_for_inference(run)
    opened = open_run(run, loaded.tokenizer, chat_template)
    tuned = Speaker("tuned", loaded.model, opened.labeller)
    conversation = Chat(run, opened, tuned, AnswerSettings(max_new_tokens))
    if base:
        model = base_model(base, opened.labeller.renderer.tokenizer)
        conversation.base = Speaker("base", model, opened.labeller)
        conversation.speakers.append(conversation.base)
    if isinstance(sys.stdin, io.TextIOWrapper):  # half a character ends nothing
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    is_terminal = sys.stdin.isatty() and not as_json
    if is_terminal:
        with contextlib.suppress(ImportError):  # where there is none, lines are plain
            import readline  # noqa: F401 - lets `input` edit lines and go back to earlier ones
        _say(_BEGINNING)
    while not conversation.is_over:
        try:
            _take_turn(conversation, as_json, is_terminal)
        except (InputError, OSError) as error:
            _say(crash.explain(error) or error)
        except KeyboardInterrupt:  # while a command does something, such as loading the base
            if not is_terminal:
                raise
            _say("\nstopped")


def _take_turn(conversation: Chat, as_json: bool, is_terminal: bool) -> None:
    """Read a line; obey it, or let every speaker answer it."""
    try:
        line = input("> " if is_terminal else "").strip()
    except EOFError:
        conversation.is_over = True
        return
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        _say("\nCtrl-D leaves")
        return
    word = obey(conversation, line)
    if word is not None:
        _say(word)
    elif line:
        conversation.settings.seed += 1
        for speaker in list(conversation.speakers):
            _let_answer(conversation, speaker, line, as_json)


def _let_answer(conversation: Chat, speaker: Speaker, question: str, as_json: bool) -> None:
    """Print an answer, in a conversation between people and models as it comes."""
    settings = conversation.settings
    prompt = speaker.prompt(question, settings)
    if prompt.left_out:
        what = f"{speaker.name}: the conversation is longer than the model's context"
        _say(f"[{what}; its first {prompt.left_out} messages are left out]")
    if as_json:
        answer = speaker.answer(prompt, settings, lambda _: None)
        print(_as_json(speaker.name, question, answer), flush=True)
    else:
        print(f"{speaker.name}: ", end="", flush=True)
        answer = speaker.answer(prompt, settings, _show)
        print(_CUT.get(answer.stop_reason, ""), flush=True)


def _show(text: str) -> None:
    print(visible(text), end="", flush=True)


def _say(word: object) -> None:
    print(word, file=sys.stderr, flush=True)


def _as_json(name: str, question: str, answer: Answer) -> str:
    content = {
        "model": name,
        "prompt": question,
        "response": answer.text,
        "stop_reason": answer.stop_reason,
    }
    return json.dumps(content, ensure_ascii=False)
