"""torchtune's builders of data sets: which rows, in which format, and what of them is trained.

A builder is named by its path in Python; what it does with the arguments that are left out differs from one to the next
and stands under `types` in `torchtune.yaml`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sft_recipes.foreign.data_sets import DataSets, Entry
from sft_recipes.foreign.reading import Reading, Setting
from sft_recipes.recipe_mixtures import SEEN, is_test_split

_PREFIX = "torchtune.datasets."
# What `load_dataset` takes for a path where files are named beside it.
_FILE_TYPES = ("json", "csv", "parquet", "arrow", "text")
# Arguments that say where the rows come from, and the builder itself.
_READ_BEFORE = ("_component_", "source", "data_files")
_STYLES = {"sharegpt": ("sharegpt", "conversations"), "openai": ("messages", "messages")}
_PROMPT_TRAINED = "only answers are trained here; `train_on: all` trains the prompt, too"


def read_data_sets(reading: Reading, setting: Setting) -> None:
    """The rule of `dataset`: one builder, or a list of them whose rows are joined."""
    sets = DataSets(reading, setting.key)
    if isinstance(setting.value, list):
        for number in range(len(setting.value)):
            _data_set(sets.entry(number))
    else:
        _data_set(sets.entry())
    sets.finish()


def builders(reading: Reading) -> list[Mapping[str, Any]]:
    """What the table says of the builders of a config, of those that it knows."""
    content = reading.value("dataset")
    entries = content if isinstance(content, list) else [content]
    known = []
    for entry in entries:
        if isinstance(entry, Mapping):
            name = str(entry.get("_component_")).removeprefix(_PREFIX)
            if name in reading.table.more["types"]:
                known.append(reading.table.more["types"][name])
    return known


def _data_set(entry: Entry) -> None:
    more = entry.reading.table.more
    component = str(entry.value("_component_"))
    name = component.removeprefix(_PREFIX)
    if name in more["refused_types"]:
        entry.block("_component_", more["refused_types"][name])
    elif name.startswith("multimodal."):
        entry.block("_component_", "rows with images: this project reads text")
    elif not component.startswith(_PREFIX) or name not in more["types"]:
        known = ", ".join(more["types"])
        entry.block("_component_", f"{component!r} is not known here; {known} are")
    else:
        _known_set(entry, name, more["types"][name])


def _known_set(entry: Entry, name: str, known: Mapping[str, Any]) -> None:
    _take_source(entry, known)
    ours = _columns(entry, known)
    set_keys = list(entry.names())
    trains_prompt = known.get("train_on_input", False) and "train_on_input" not in set_keys
    if trains_prompt:
        entry.differs("_component_", f"`{name}` trains the prompt as well; {_PROMPT_TRAINED}", ours)
        entry.find(
            "_component_", f"prompts are trained: `train_on_input` is true in `{name}` unless set"
        )
    elif known["format"] == "raw":
        say = "texts longer than max_length are dropped and listed; there they are cut, without EOS"
        entry.differs("_component_", say, ours)
    else:
        entry.same("_component_", ours)
    for key in set_keys:
        rule = _RULES.get(key)
        if rule is not None:
            rule(entry, known)
        elif key not in _READ_BEFORE:
            entry.block(key, "this argument of `load_dataset` is not known here")


def _columns(entry: Entry, known: Mapping[str, Any]) -> dict[str, Any]:
    """The format of a builder's rows, and which of their columns are read."""
    format = known["format"]
    if format == "messages":
        return _conversation(entry, known)
    if format == "raw":
        column = entry.value("column") or known["column"]
        return {"format": format, "column_mapping": {"text": column}}
    mapping = entry.value("column_map") or known.get("names") or {}
    columns = {}
    for ours, theirs in known["columns"].items():
        name = mapping.get(theirs, theirs)
        if name != ours:
            columns[ours] = name
    if columns:
        return {"format": format, "column_mapping": columns}
    return {"format": format}


def _conversation(entry: Entry, known: Mapping[str, Any]) -> dict[str, Any]:
    style = str(entry.value("conversation_style") or "sharegpt")
    format, column = _STYLES.get(style, _STYLES["openai"])
    named = entry.value("conversation_column") or (entry.value("column_map") or {}).get(column)
    if named in (None, column):
        return {"format": format}
    return {"format": format, "column_mapping": {column: named}}


def _take_source(entry: Entry, known: Mapping[str, Any]) -> None:
    """Where the rows come from: the builder's own set, a name on the Hub, or files of a type."""
    source = entry.value("source") or known.get("source")
    files = entry.value("data_files")
    if source is None:
        entry.block("_component_", "no `source` is named")
        return
    path = str(source)
    ours: dict[str, Any] = {"path": path}
    if path in _FILE_TYPES and isinstance(files, str):
        ours = {"path": entry.reading.local_path(files)}
    elif files is not None:
        ours["data_files"] = files
    elif path in _FILE_TYPES:
        entry.find("source", f"`source: {path}` without data_files names no rows")
    else:
        ours = {"path": entry.reading.local_path(path)}
    for key in ("source", "data_files"):
        if entry.value(key) is not None:
            entry.same(key, {})
    entry.ours.update(ours)


# -- arguments ---------------------------------------------------------------------------------------


def _column_argument(key: str) -> Callable[[Entry, Mapping[str, Any]], None]:
    """The account of an argument that was read with the columns."""

    def rule(entry: Entry, known: Mapping[str, Any]) -> None:
        entry.same(key, {})

    return rule


def _style(entry: Entry, known: Mapping[str, Any]) -> None:
    style = entry.value("conversation_style")
    if style in _STYLES:
        entry.same("conversation_style", {})
    else:
        entry.block("conversation_style", f"torchtune knows {' and '.join(_STYLES)}, not {style!r}")


def _split(entry: Entry, known: Mapping[str, Any]) -> None:
    split = str(entry.value("split"))
    if is_test_split(split):
        entry.find("split", SEEN)
    is_file = "data_files" in entry.names()
    if "[" in split and is_file:
        why = "a part of a file is not read: cut the file, or set max_rows for a seeded draw"
        entry.block("split", why)
    elif split == "train":
        entry.same("split", {})
    else:
        entry.same("split", {"split": split})


def _name(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.same("name", {"name": entry.value("name")})


def _train_on_input(entry: Entry, known: Mapping[str, Any]) -> None:
    if entry.value("train_on_input"):
        entry.differs("train_on_input", _PROMPT_TRAINED, {})
        entry.find(
            "train_on_input", "prompts are trained: the model also learns to write questions"
        )
    else:
        entry.same("train_on_input", {})


def _packed(entry: Entry, known: Mapping[str, Any]) -> None:
    reading = entry.reading
    if not entry.value("packed"):
        reading.same(entry.setting("packed"), {"packing": False})
        return
    say = "packs are filled best-fit here, in the order of the rows there; rows stay apart in both"
    reading.differs(entry.setting("packed"), say, {"packing": True})
    if reading.value("tokenizer.max_seq_len") is None:
        entry.find("packed", "packed rows need tokenizer.max_seq_len: torchtune stops without it")


def _split_across_pack(entry: Entry, known: Mapping[str, Any]) -> None:
    if not entry.value("packed"):
        entry.no_effect("split_across_pack", "nothing is packed")
    elif entry.value("split_across_pack"):
        setting = entry.setting("split_across_pack")
        entry.reading.same(setting, {"packing_strategy": "bfd_split"})
    else:
        entry.same("split_across_pack", {})


def _system_prompt(entry: Entry, known: Mapping[str, Any]) -> None:
    setting = entry.setting("new_system_prompt")
    ours = {"system_prompt": entry.value("new_system_prompt")}
    if known["format"] == "messages":
        say = "the system prompt of rows that bring none; there it takes the place of theirs"
        entry.reading.differs(setting, say, ours)
    else:
        entry.reading.same(setting, ours)


def _add_eos(entry: Entry, known: Mapping[str, Any]) -> None:
    if entry.value("add_eos"):
        entry.same("add_eos", {})
    else:
        entry.differs("add_eos", "every text ends in EOS here", {})
        entry.find("add_eos", "EOS is never trained: the model does not learn to stop")


def _filter(entry: Entry, known: Mapping[str, Any]) -> None:
    entry.block("filter_fn", "code that chooses rows: write the chosen rows into a file")


_RULES: Mapping[str, Callable[[Entry, Mapping[str, Any]], None]] = {
    "column_map": _column_argument("column_map"),
    "conversation_column": _column_argument("conversation_column"),
    "column": _column_argument("column"),
    "conversation_style": _style,
    "split": _split,
    "name": _name,
    "train_on_input": _train_on_input,
    "packed": _packed,
    "split_across_pack": _split_across_pack,
    "new_system_prompt": _system_prompt,
    "add_eos": _add_eos,
    "filter_fn": _filter,
}
