"""Talk to a run, beside its base if asked for: rendered and decoded as in training and evaluation."""

import contextlib
import json
import sys
from typing import Any

from sft_recipes.errors import InputError
from sft_recipes.evaluation.generation import generate
from sft_recipes.evaluation.standalone import base_model, open_run
from sft_recipes.messages import Example, Message, visible


def chat(
    run: str, base: str | None, chat_template: str | None, max_new_tokens: int, as_json: bool
) -> None:
    """Answer each line of the standard input by the run and the base until `/quit`; `/reset` forgets what was said.

    Every model has its own history. With `as_json` one object per answer. A question that does not fit into the model
    any more is refused and forgotten.
    """
    _, loaded, labeller = open_run(run, chat_template)
    renderer, histories = labeller.renderer, dict[str, list[Message]]()
    models: dict[str, Any] = {"tuned": loaded.model} | (
        {"base": base_model(base, renderer.tokenizer)} if base else {}
    )
    settings: Any = {
        "stop_ids": renderer.stop_ids,
        "max_new_tokens": max_new_tokens,
        "names": ["chat"],
    }
    mark = "> " if sys.stdin.isatty() and not as_json else ""
    if mark:
        print("/reset starts a new conversation, /quit ends")
    with contextlib.suppress(EOFError):
        while (line := input(mark).strip()) != "/quit":
            if line == "/reset":
                histories.clear()
            for name, model in models.items() if line not in ("", "/reset") else ():
                messages: list[Message] = [
                    *histories.get(name, []),
                    {"role": "user", "content": line},
                ]
                prompt = renderer.prompt_ids(
                    labeller.for_template(Example(messages, "chat", 0)).messages
                )
                try:
                    answer = generate(
                        model,
                        renderer.tokenizer,
                        [prompt],
                        batch_size=1,
                        progress=False,
                        **settings,
                    )[0]
                except InputError as error:
                    print(error, file=sys.stderr)
                    break
                histories[name] = [*messages, {"role": "assistant", "content": answer.text}]
                content = {
                    "model": name,
                    "prompt": line,
                    "response": answer.text,
                    "stop_reason": answer.stop_reason,
                }
                cut = " [cut at max_new_tokens]" if answer.stop_reason == "length" else ""
                print(
                    json.dumps(content, ensure_ascii=False)
                    if as_json
                    else f"{name}: {visible(answer.text)}{cut}"
                )
