"""LLaMA-Factory's chat templates: what stands in for each, and what is wrong with the one that a config names."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.errors import suggest
from sft_recipes.foreign.reading import Reading, Setting

# Words in a model's name that say it was tuned to chat.
_TUNED = re.compile(r"instruct|-chat|-it\b|thinking", re.IGNORECASE)
# Templates whose model's own has the switch.
_SWITCHED = ("qwen3", "glm4_moe", "glm4_7")


def family_of(reading: Reading) -> Mapping[str, Any] | None:
    """What the table knows of models called so."""
    name = str(reading.value("model_name_or_path")).rstrip("/").rpartition("/")[2]
    for family in reading.table.more["families"]:
        if re.match(family["model"], name, re.IGNORECASE):
            return dict(family)
    return None


def does_not_start(reading: Reading, setting: Setting | None, what: str) -> None:
    """A finding: LLaMA-Factory ends with an error before the first step."""
    reading.find(setting, f"LLaMA-Factory does not take {what}: it ends before the first step")


def _template(reading: Reading, setting: Setting) -> None:
    name = str(setting.value)
    table = reading.table.more["templates"]
    ours = {"chat_template": "tokenizer"}
    say = f"the tokenizer's own template stands in for {name!r}; a line break behind a turn is not trained"
    if name in table["texts"]:
        text = _template_text(reading.table.more["texts"][name])
        ours["chat_template"] = reading.write_file("chat_template.jinja", text)
        say = "the same text, written beside the recipe; EOS ends every answer"
    elif name == "chatml":
        ours["chat_template"] = "chatml"
        say = "our `chatml`, the same text; a tokenizer without its tokens gets none"
    elif name in table["reasoning"]:
        say = (
            f"the tokenizer's own template stands in for {name!r}; an empty reasoning block is not trained "
            "(`empty_think`), earlier reasoning is shown as that template shows it"
        )
    system = table["systems"].get(name)
    if system and not reading.value("default_system"):
        ours["system_prompt"] = system
        say += "; rows without a system prompt get the one that it writes"
    reading.differs(setting, say, ours)
    _look_at_template(reading, setting, name)


def _literal(text: str) -> str:
    """A text as an expression of Jinja."""
    return json.dumps(text).replace("{eos}", '" + eos_token + "')


def _template_text(turns: Mapping[str, list[str]]) -> str:
    """A chat template of these turns; LLaMA-Factory joins an instruction and its input by one line break."""

    def written(role: str, content: str) -> str:
        begin = _literal(turns[role][0])
        end = _literal(turns[role][1])
        return f"{{{{- {begin} + {content} + {end} -}}}}"

    joined = written("user", "message.instruction + '\\n' + message.input")
    lines = [
        "{%- for message in messages -%}",
        "{%- if message.role == 'user' and message.input is defined and message.input -%}",
        joined,
        "{%- elif message.role == 'user' -%}",
        written("user", "message.content"),
        "{%- elif message.role == 'assistant' and message.tool_calls is not defined -%}",
        written("assistant", "message.content + eos_token"),
        "{%- elif message.role == 'system' -%}",
        written("system", "message.content"),
        "{%- else -%}",
        "{{- raise_exception('this template has no place for tools') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {json.dumps(turns['assistant'][0])} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines) + "\n"


def _look_at_template(reading: Reading, setting: Setting, name: str) -> None:
    """Findings: a template that is not there, not the model's, or that teaches what nobody wants."""
    table = reading.table.more["templates"]
    known = {*table["texts"], *table["reasoning"], *table["others"]}
    family = family_of(reading)
    model = str(reading.value("model_name_or_path"))
    if name not in known:
        does_not_start(reading, setting, f"the template {name!r}; {suggest(name, known)}")
    elif name in table["texts"]:
        if _TUNED.search(model):
            what = "the text of another format in a model that was tuned to chat: what it knows of turns is lost"
            reading.find(setting, what)
        if name == "empty":
            reading.find(setting, "no EOS is trained: the model does not learn to stop")
    elif name == "chatml" and not _TUNED.search(model):
        return  # a base model takes any template
    elif family is not None and name not in family["templates"]:
        own = " or ".join(family["templates"])
        what = f"the template of another model; LLaMA-Factory's for {model} is {own}"
        reading.find(setting, what)
    thinking = reading.setting("enable_thinking")
    if name in table["reasoning"] and (thinking is None or thinking.value):
        what = (
            "answers without reasoning are trained with an empty reasoning block in front: the model learns "
            "not to think"
        )
        reading.find(setting, what)


def _enable_thinking(reading: Reading, setting: Setting) -> None:
    template = str(reading.value("template"))
    if template not in reading.table.more["templates"]["reasoning"]:
        reading.no_effect(setting, f"the template {template!r} writes no reasoning")
    elif setting.value:
        reading.no_effect(setting, "reasoning is trained where a row holds some")
    else:
        ours = {}
        if template.startswith(_SWITCHED):
            ours = {"chat_template_kwargs": {"enable_thinking": False}}
        say = "trained and served without thinking; reasoning inside answers is kept, which LLaMA-Factory removes"
        reading.differs(setting, say, ours)


RULES: Mapping[str, Callable[[Reading, Setting], None]] = {
    "template": _template,
    "enable_thinking": _enable_thinking,
}
