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
    if not isinstance(kind, str):
        why = (
            "a prompt format of your own: write it as a chat template (`chat_template: FILE.jinja`)"
        )
        entry.block("type", why)
        return
    if kind not in types:
        entry.block("type", f"rows of type {kind!r}: this project reads {', '.join(types)}")
        return
    known = types[kind]
    _source(entry)
    _say_type(entry, kind, known)
    for key in entry.names():
        rule = _ENTRY_RULES.get(key)
        if rule is not None:
            rule(entry, known)


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


def _entry_split(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same("split", {"split": entry.value("split")})


def _entry_name(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same("name", {"name": entry.value("name")})


def _entry_field(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same("field", {"column_mapping": {"text": entry.value("field")}})


def _entry_messages(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same("field_messages", {"column_mapping": {"messages": entry.value("field_messages")}})


def _entry_tools(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same("field_tools", {"column_mapping": {"tools": entry.value("field_tools")}})


def _entry_thinking(entry: Entry, known: Mapping[str, Any]) -> None:
    column = entry.value("field_thinking")
    entry.same("field_thinking", {"message_mapping": {"reasoning_content": column}})


def _entry_properties(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same(
        "message_property_mappings", {"message_mapping": entry.value("message_property_mappings")}
    )


def _entry_role_key(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same(
        "message_field_role", {"message_mapping": {"role": entry.value("message_field_role")}}
    )


def _entry_content_key(entry: Entry, known: Mapping[str, Any]) -> None:
    key = entry.value("message_field_content")
    entry.same("message_field_content", {"message_mapping": {"content": key}})


def _entry_training(entry: Entry, known: Mapping[str, Any]) -> None:
    key = entry.value("message_field_training")
    entry.same("message_field_training", {"message_mapping": {"train": key}})


def _entry_roles(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same("roles", {"role_mapping": entry.value("roles")})


def _entry_template(entry: Entry, known: Mapping[str, Any]) -> None:
    template = entry.value("chat_template")
    entry.use_template(take_template(entry.reading, entry.setting("chat_template"), str(template)))


def _entry_jinja(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.use_template(entry.reading.jinja_file(entry.value("chat_template_jinja")))
    entry.same("chat_template_jinja", {})


def _entry_roles_to_train(entry: Entry, known: Mapping[str, Any]) -> None:
    roles = entry.value("roles_to_train")
    if set(roles) <= {"assistant", "gpt"}:
        entry.no_effect("roles_to_train", "the assistant's turns are trained")
    else:
        entry.block(
            "roles_to_train",
            f"turns of {', '.join(map(str, roles))}: only the assistant's are trained here",
        )


def _entry_train_on_end(entry: Entry, known: Mapping[str, Any]) -> None:
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


def _entry_drop_system(entry: Entry, known: Mapping[str, Any]) -> None:
    if entry.value("drop_system_message"):
        entry.differs("drop_system_message", "system turns of the rows are kept", {})
    else:
        entry.no_effect("drop_system_message", "switched off")


def _without_effect(key: str, why: str) -> Callable[[Entry, Mapping[str, Any]], None]:
    def rule(entry: Entry, known: Mapping[str, Any]) -> None:
        entry.no_effect(key, why)

    return rule


_ENTRY_RULES: Mapping[str, Callable[[Entry, Mapping[str, Any]], None]] = {
    "split": _entry_split,
    "name": _entry_name,
    "field": _entry_field,
    "field_messages": _entry_messages,
    "field_tools": _entry_tools,
    "field_thinking": _entry_thinking,
    "message_property_mappings": _entry_properties,
    "message_field_role": _entry_role_key,
    "message_field_content": _entry_content_key,
    "message_field_training": _entry_training,
    "roles": _entry_roles,
    "chat_template": _entry_template,
    "chat_template_jinja": _entry_jinja,
    "roles_to_train": _entry_roles_to_train,
    "train_on_eos": _entry_train_on_end,
    "train_on_eot": _entry_train_on_end,
    "drop_system_message": _entry_drop_system,
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
