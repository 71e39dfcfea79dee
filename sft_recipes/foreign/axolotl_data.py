"""axolotl's data sets: which rows, in which format, in which template, and what of them is trained."""

from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.foreign.data_sets import DataSets, Entry
from sft_recipes.foreign.reading import Reading, Setting


def read_data_sets(reading: Reading, setting: Setting) -> None:
    """The rule of `datasets`."""
    if not isinstance(setting.value, list):
        reading.block(setting, "expected a list of data sets")
        return
    sets = DataSets(reading, setting.key)
    for number in range(len(setting.value)):
        _data_set(sets, number)
    sets.finish()


def _data_set(sets: DataSets, number: int) -> None:
    reading = sets.reading
    entry = sets.entry(number)
    kind = entry.value("type")
    types = reading.table.more["types"]
    if kind is None:
        entry.block_whole("rows without a `type` come as tokens; this project starts from text")
        return
    _source(entry)
    if not isinstance(kind, str):
        why = (
            "a prompt format of your own: write it as a chat template (`chat_template: FILE.jinja`)"
        )
        entry.block("type", why)
    elif kind not in types:
        entry.block("type", f"rows of type {kind!r}: this project reads {', '.join(types)}")
    else:
        _say_type(entry, kind, types[kind])
    for key in entry.names():
        if key in _MAPPED:
            block, ours = _MAPPED[key]
            entry.same(key, {block: {ours: entry.value(key)}})
        elif key in _ENTRY_RULES:
            _ENTRY_RULES[key](entry)


def _say_type(entry: Entry, kind: str, known: Mapping[str, Any]) -> None:
    ours = {"format": known["format"]}
    mapping = dict(known.get("columns", {}))
    if mapping:
        ours["column_mapping"] = mapping
    if known.get("turns"):
        ours["message_mapping"] = dict(known["turns"])
    if known["format"] == "raw":
        say = "texts longer than max_length are dropped and listed; axolotl cuts them into pieces"
        entry.differs("type", say, ours)
        return
    if kind == "sharegpt":
        entry.find("type", "axolotl refuses `type: sharegpt`; `chat_template` is what it reads now")
    entry.use_template(known.get("chat_template"))
    entry.same("type", ours)


def _source(entry: Entry) -> None:
    """Where the rows come from; a builder's name with files means these files."""
    path = entry.value("path")
    files = entry.value("data_files")
    builder = path in ("json", "csv", "parquet", "arrow", "text")
    if builder and isinstance(files, str):
        entry.same("path", {"path": entry.reading.local_path(files)})
        entry.no_effect("data_files", "named as the path")
        return
    if path is None:
        return
    entry.same("path", {"path": entry.reading.local_path(str(path))})
    if files is not None:
        entry.same("data_files", {"data_files": files})


# Keys that name a column or a key of turns: the mapping of ours and the name in it.
_MAPPED = {
    "field": ("column_mapping", "text"),
    "field_messages": ("column_mapping", "messages"),
    "field_tools": ("column_mapping", "tools"),
    "field_thinking": ("message_mapping", "reasoning_content"),
    "message_field_role": ("message_mapping", "role"),
    "message_field_content": ("message_mapping", "content"),
    "message_field_training": ("message_mapping", "train"),
}


def _entry_split(entry: Entry) -> None:
    split = entry.value("split")
    entry.take_split("split", str(split))


def _entry_name(entry: Entry) -> None:
    entry.same("name", {"name": entry.value("name")})


def _entry_properties(entry: Entry) -> None:
    mapping = entry.value("message_property_mappings")
    entry.same("message_property_mappings", {"message_mapping": mapping})


def _entry_roles(entry: Entry) -> None:
    entry.same("roles", {"role_mapping": entry.value("roles")})


def _entry_template(entry: Entry) -> None:
    template = entry.value("chat_template")
    entry.use_template(take_template(entry.reading, entry.setting("chat_template"), str(template)))


def _entry_jinja(entry: Entry) -> None:
    entry.use_template(entry.reading.jinja_file(entry.value("chat_template_jinja")))
    entry.same("chat_template_jinja", {})


def _entry_roles_to_train(entry: Entry) -> None:
    roles = entry.value("roles_to_train")
    if not roles:
        why = "only turns that say so are trained there; here a turn of the assistant is unless it says no"
        entry.block("roles_to_train", why)
    elif set(roles) <= {"assistant", "gpt"}:
        entry.no_effect("roles_to_train", "the assistant's turns are trained")
    else:
        names = ", ".join(map(str, roles))
        entry.block("roles_to_train", f"turns of {names}: only the assistant's are trained here")


def _entry_train_on_end(entry: Entry) -> None:
    for key in ("train_on_eos", "train_on_eot"):
        when = entry.value(key)
        if when is None:
            continue
        if when == "turn":
            entry.no_effect(key, "the end of every trained turn is trained")
        else:
            entry.differs(key, "the end of every trained turn is trained, and of no other", {})
        if when == "none":
            entry.find(key, "the end of a turn is never trained: the model does not learn to stop")


def _entry_drop_system(entry: Entry) -> None:
    if entry.value("drop_system_message"):
        entry.differs("drop_system_message", "system turns of the rows are kept", {})
    else:
        entry.no_effect("drop_system_message", "switched off")


def _without_effect(key: str, why: str) -> Callable[[Entry], None]:
    def rule(entry: Entry) -> None:
        entry.no_effect(key, why)

    return rule


_ENTRY_RULES: Mapping[str, Callable[[Entry], None]] = {
    "split": _entry_split,
    "name": _entry_name,
    "message_property_mappings": _entry_properties,
    "roles": _entry_roles,
    "chat_template": _entry_template,
    "chat_template_jinja": _entry_jinja,
    "roles_to_train": _entry_roles_to_train,
    "train_on_eos": _entry_train_on_end,
    "train_on_eot": _entry_train_on_end,
    "drop_system_message": _entry_drop_system,
    "conversation": _without_effect("conversation", "axolotl reads it for alpaca_chat alone"),
    "ds_type": _without_effect("ds_type", "follows from the file"),
    "trust_remote_code": _without_effect("trust_remote_code", "data sets run no code"),
    "template_thinking_key": _without_effect(
        "template_thinking_key", "the template reads reasoning_content"
    ),
    "preprocess_shards": _without_effect("preprocess_shards", "memory stays bounded"),
    "split_thinking": _without_effect(
        "split_thinking", "reasoning in <think> tags is read as such"
    ),
}


def take_template(reading: Reading, setting: Setting, name: str) -> str | None:
    """Account for the name of a template; which of ours stands for it, None for the model's own."""
    fallback = "tokenizer_default_fallback_"
    if name == "jinja":
        reading.no_effect(setting, "chat_template_jinja says which")
        return None
    if name in ("chatml", "alpaca"):
        reading.differs(
            setting,
            f"our `{name}`: every answer ends in the tokenizer's EOS",
            {"chat_template": name},
        )
        return name
    if name == "tokenizer_default":
        reading.no_effect(setting, "the tokenizer's own template is the default")
    elif name.startswith(fallback):
        other = name.removeprefix(fallback)
        say = f"the tokenizer's own template; a tokenizer without one takes `instruction`, not {other}"
        reading.differs(setting, say)
    else:
        reading.differs(
            setting,
            f"the tokenizer's own template stands in for axolotl's {name!r}; for a base without one give "
            "--chat_template FILE",
        )
    return None
